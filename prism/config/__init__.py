"""The settings of a run: frozen models of a TOML file, checked before anything is loaded; torch is not imported."""

from prism.config.algorithms import LOSS_PRESETS, REWARD_PRESETS, Algorithm, AlignAlgorithm, PolicyLoss, RlvrAlgorithm
from prism.config.reading import all_keys, load_config, parse_overrides, to_toml
from prism.config.sections import STAGES, Adam, Discriminator, Optimiser, Sampling
from prism.config.settings import Config, model_positions
from prism.config.types import ConfigError

__all__ = [
    "LOSS_PRESETS",
    "REWARD_PRESETS",
    "STAGES",
    "Adam",
    "Algorithm",
    "AlignAlgorithm",
    "Config",
    "ConfigError",
    "Discriminator",
    "Optimiser",
    "PolicyLoss",
    "RlvrAlgorithm",
    "Sampling",
    "all_keys",
    "load_config",
    "model_positions",
    "parse_overrides",
    "to_toml",
]
