"""Rows that the package `datasets` reads: of a directory that it saved, or of a data set on the hub."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opsd.errors import ConfigError, DataError, one_line

HUB = "hub:"
"""What the name of a data set on the hub begins with, so that it cannot be taken for a path."""


def dataset_records(path: Path, splits: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(source, row) for each row of `path`: what `save_to_disk` wrote, or hub:org/name[[:CONFIG]:SPLIT].

    Of several splits, where none is named, the one of `splits` is read.

    Raises:
        ConfigError: `datasets` is missing, or the name on the hub cannot be understood.
        DataError: it cannot be read, or not exactly one split fits.
    """
    hub = str(path).startswith(HUB)
    name, *chosen = str(path).removeprefix(HUB).split(":")
    if hub and (len(chosen) > 2 or "" in (name, *chosen)):
        raise ConfigError(f"{path}: accepted: hub:org/name, hub:org/name:SPLIT or hub:org/name:CONFIG:SPLIT")
    try:
        import datasets
    except ImportError as error:
        what = "a data set of the hub" if hub else "this directory"
        raise ConfigError(f"{path}: {what} needs the package datasets: pip install 'opsd[data]'") from error
    try:
        if hub:
            loaded = datasets.load_dataset(name, *chosen[:-1], split=chosen[-1] if chosen else None)
        else:
            loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises whatever a damaged file makes of its parsers
        raise DataError(f"{path}: cannot be read by datasets: {one_line(error)}") from error
    where = str(path)
    if isinstance(loaded, datasets.DatasetDict):
        fitting = [split for split in splits if split in loaded]
        if len(loaded) > 1 and len(fitting) != 1:
            first = next(iter(loaded))
            one = f"name one, such as {path}:{first}" if hub else f"the directory of one split, such as {path / first}"
            use = "train" if "train" in splits else "eval"
            raise DataError(
                f"{path}: has the splits {', '.join(loaded)}; for data.{use} exactly one of {', '.join(splits)} is "
                f"expected, or {one}"
            )
        (split,) = loaded if len(loaded) == 1 else fitting
        where, loaded = f"{path}:{split}" if hub else str(path / split), loaded[split]
    # A saved set remembers its format; its rows may be tensors and lack columns.
    number = 0
    try:
        for number, record in enumerate(loaded.with_format(None), start=1):
            yield f"{where}:row {number}", record
    except Exception as error:  # decoding: images need another package, say
        raise DataError(f"{where}:row {number + 1}: cannot be read by datasets: {one_line(error)}") from error
