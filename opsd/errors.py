"""Why a run, or an evaluation, cannot start or go on. The messages are for people: they name the option, the file or
the row, its value, and what is accepted."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(Exception):
    """The run cannot start as asked: an option, a file or a combination of them is unusable."""


@contextmanager
def config_error(where: str, *kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds become a ConfigError that begins with `where`."""
    try:
        yield
    except kinds as error:
        raise ConfigError(f"{where}: {one_line(error)}") from error


def one_line(error: BaseException, most: int = 2000) -> str:
    """What `error` says, without the line breaks of libraries that draw; of one that says nothing its kind. Of what is
    longer than `most` characters the middle is left out."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 500]} ... {text[-450:]} ({len(text)} characters)"


def brief(value: object, most: int = 500) -> str:
    """`value` as a message shows it: of what is long the beginning, and how long it is."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write an integer of so many digits
        return f"an {type(value).__name__} of more digits than can be shown"
    return text if len(text) <= most else f"{text[: most - 50]} ... ({len(text)} characters)"


class DataError(ConfigError):
    """A row that cannot be used, named by file, line and reason."""


class ScorerError(ConfigError):
    """The user's scorer failed, or what it gave back is no score."""


class Undecided(Exception):
    """A scorer cannot judge this answer: it counts as wrong, and is counted among the undecided."""


class CheckpointError(Exception):
    """A checkpoint cannot be used or written; the message names it and says why."""


class RunError(Exception):
    """A run stopped before its end; the message says why and what is safe."""


class NonFiniteError(RunError):
    """The loss or its gradient is infinite or not a number. The optimiser has not used it."""


class WriteError(RunError):
    """Something of the run cannot be written, a full disk for example."""


class Interrupted(RunError):
    """The run was asked to stop. `signal` is the number of the signal."""

    def __init__(self, message: str, signal: int = signal.SIGINT):
        super().__init__(message)
        self.signal = signal
