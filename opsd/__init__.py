"""On-policy self-distillation: a language model learns from itself, told more."""

try:
    from opsd.checkpoint import CheckpointError
    from opsd.config import Config, ConfigError, load_config
    from opsd.evaluate import Evaluation
    from opsd.rollouts import Rollout
    from opsd.trainer import Interrupted, NonFiniteError, RunError, RunResult, WriteError, resume, train
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the training loop needs {error.name}, which is not installed: pip install 'opsd[train]'", name=error.name
    ) from error

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "Evaluation",
    "Interrupted",
    "NonFiniteError",
    "Rollout",
    "RunError",
    "RunResult",
    "WriteError",
    "load_config",
    "resume",
    "train",
]
