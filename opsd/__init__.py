"""On-policy self-distillation: a language model learns from itself, told more."""

try:
    from opsd.config import Config, ConfigError, load_config
    from opsd.trainer import NonFiniteError, RunResult, train
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the training loop needs {error.name}, which is not installed: pip install 'opsd[train]'", name=error.name
    ) from error

__all__ = ["Config", "ConfigError", "NonFiniteError", "RunResult", "load_config", "train"]
