"""A model in one GGUF file: read by transformers with the package gguf, and made an ordinary model of."""

import importlib.util
from pathlib import Path
from typing import Any

import transformers

from opsd.errors import ConfigError


def is_gguf(path: str | None) -> bool:
    """Whether `path` is the name of a GGUF file."""
    return Path(path or "").suffix == ".gguf"


def check_gguf(path: str, option: str) -> None:
    """Raises ConfigError, which calls the path `option`, if there is no such file, it is none of GGUF, or the package
    gguf is not installed."""
    if not Path(path).is_file():
        raise ConfigError(f"{option}: there is no file {path}")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{option} {path!r} is a GGUF file, which needs the package gguf (pip install gguf)")
    with Path(path).open("rb") as file:
        begins = file.read(4)
    if begins != b"GGUF":
        raise ConfigError(f"{option} {path!r} is no GGUF file, or a damaged one: it begins with {begins!r}")


def source(path: str | None, *, weights: bool = False) -> tuple[str | None, dict[str, Any]]:
    """What `from_pretrained` takes to load `path`: the directory or hub id, and keyword arguments.

    Of a GGUF file the weights are unpacked to the type of the model, since packed ones cannot be trained. Newer
    releases of transformers have to be told so, older ones do nothing else.
    """
    if not is_gguf(path):
        return path, {}
    file = Path(str(path))
    unpacked = getattr(transformers, "GgufConfig", None) if weights else None
    more = {"quantization_config": unpacked(dequantize=True)} if unpacked else {}
    return str(file.parent), {"gguf_file": file.name, **more}


def unpacked(model: Any, path: str | None) -> Any:
    """`model`, loaded from the GGUF file `path`, without the marks of one, with which it could not be saved, and named
    by the file, not by its directory: an adapter names its base so."""
    model.name_or_path = path
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if name in vars(holder):
            delattr(holder, name)
    return model
