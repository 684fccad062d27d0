"""The settings of a run: frozen models of a TOML file, checked before anything is loaded; torch is not imported."""

from prism.config.algorithms import (
    LOSS_PRESETS,
    REWARD_PRESETS,
    Adam,
    AlignAlgorithm,
    PolicyLoss,
    RlvrAlgorithm,
    StageAdam,
    WarmupAdam,
)
from prism.config.reading import all_keys, load_config, parse_overrides, to_toml
from prism.config.sections import (
    STAGES,
    Carelessness,
    ConfigError,
    DataSettings,
    DiscriminatorSettings,
    MemorySettings,
    Sampling,
    StageRollouts,
    TinySize,
)
from prism.config.settings import Config, model_positions

__all__ = [
    "LOSS_PRESETS",
    "REWARD_PRESETS",
    "STAGES",
    "Adam",
    "AlignAlgorithm",
    "Carelessness",
    "Config",
    "ConfigError",
    "DataSettings",
    "DiscriminatorSettings",
    "MemorySettings",
    "PolicyLoss",
    "RlvrAlgorithm",
    "Sampling",
    "StageAdam",
    "StageRollouts",
    "TinySize",
    "WarmupAdam",
    "all_keys",
    "load_config",
    "model_positions",
    "parse_overrides",
    "to_toml",
]
