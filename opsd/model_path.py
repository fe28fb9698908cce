"""What may name a model: a directory, a GGUF file, an id on the hub."""

import os
import re
from pathlib import Path

from opsd import gguf_file
from opsd.errors import ConfigError

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""What may be the name of a model on the hub: all other text is a path."""


def hub_notes(model_path: str | None, teacher_path: str | None = None) -> list[str]:
    """A line for each model that is no directory here, so that the hub will be asked for it, which may take long."""
    return [
        f"there is no directory {path}: the hub is asked for it ({option})"
        for option, path in (("model.path", model_path), ("teacher.path", teacher_path))
        if path and not Path(path).exists() and HUB_ID.fullmatch(path)
    ]


def check_path(path: str, option: str) -> None:
    """Refuses a run or a checkpoint, and what can be no name on the hub, which would be asked in vain."""
    directory, above = Path(path), Path(os.path.normpath(Path(path) / ".."))
    if (directory / "manifest.json").is_file():
        advice = f"opsd train --resume {os.path.normpath(above / '..')} finishes its run"
        raise ConfigError(f"{option} {path!r} is a checkpoint, which is no model; {advice}")
    if (directory / "run.json").is_file():
        there = [str(directory / name) for name in ("model", "best") if (directory / name).is_dir()]
        advice = f"its model is {' or '.join(there)}" if there else f"opsd train --resume {path} goes on to its model"
        raise ConfigError(f"{option} {path!r} is a run directory; {advice}")
    if directory.is_dir():
        return
    if gguf_file.is_gguf(path):
        return gguf_file.check_gguf(path, option)
    if directory.exists():
        raise ConfigError(f"{option} {path!r} is a file; accepted: a directory, a .gguf, or a model's id on the hub")
    if directory.name in ("model", "best") and (above / "run.json").is_file():
        advice = f"the run is not finished; opsd train --resume {above} goes on to it"
        if (above / "summary.json").is_file():
            advice = f"its run kept none; its directory is {above}"
        raise ConfigError(f"{option}: there is no directory {path}: {advice}")
    if not HUB_ID.fullmatch(path):
        raise ConfigError(f"{option}: there is no directory {path}; accepted: a directory, or a hub id like org/name")
