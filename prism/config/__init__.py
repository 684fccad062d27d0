"""The settings of a run: frozen pydantic models of a TOML file, checked without torch before anything is loaded."""

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
    ConfigError,
    DataSettings,
    DiscriminatorSettings,
    MemorySettings,
)
from prism.config.settings import Config

__all__ = [
    "LOSS_PRESETS",
    "REWARD_PRESETS",
    "STAGES",
    "Adam",
    "AlignAlgorithm",
    "Config",
    "ConfigError",
    "DataSettings",
    "DiscriminatorSettings",
    "MemorySettings",
    "PolicyLoss",
    "RlvrAlgorithm",
    "StageAdam",
    "WarmupAdam",
    "all_keys",
    "load_config",
    "parse_overrides",
    "to_toml",
]
