"""On-policy self-distillation: a language model learns from itself, told more."""

from opsd.config import Config, ConfigError, load_config
from opsd.trainer import NonFiniteError, RunResult, train

__all__ = ["Config", "ConfigError", "NonFiniteError", "RunResult", "load_config", "train"]
