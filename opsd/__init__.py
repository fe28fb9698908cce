"""On-policy self-distillation: a language model learns from itself, reading the solution."""

missing: str | None = None
"""The package that everything here but the losses needs and that is not installed."""

try:
    from opsd.config import Config, load_config
    from opsd.errors import CheckpointError, ConfigError, Interrupted, NonFiniteError, RunError, WriteError
    from opsd.evaluation import Evaluation
    from opsd.rollouts import Rollout
    from opsd.trainer import RunResult, resume, train
except ModuleNotFoundError as error:
    missing = (error.name or "opsd").partition(".")[0]
    if missing == "opsd":
        raise

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


def __getattr__(name: str) -> object:
    # Not at the import: the command line, which imports this first, has to be able to say what to do.
    if missing and name in __all__:
        raise ModuleNotFoundError(
            f"the training loop needs {missing}, which is not installed: pip install 'opsd[train]'", name=missing
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
