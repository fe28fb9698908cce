"""Checkpoints: everything that the rest of a run depends on, written so that a crash at any moment leaves a good one.

A checkpoint is a directory `step-00000050` with `state.pt` and, written after it, `manifest.json`, which holds the
state's size and SHA-256 and the id of the run. It is made under another name, flushed to the disk and then renamed, so
that under its own name it is whole; what the disk or a copy did to it later, the manifest tells.
"""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from opsd import distributed
from opsd.errors import CheckpointError
from opsd.files import remove_unfinished, replace_directory

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")


def save_checkpoint(directory: Path, step: int, state: dict[str, Any], *, run_id: str, keep: int) -> Path:
    """Writes `state` as the checkpoint of `step` in `directory`, and of those up to it removes all but `keep`.

    Args:
        state: nested dicts, lists and tuples of tensors, numbers, text and None.
        run_id: what `load_checkpoint` will compare.

    Raises:
        CheckpointError: it cannot be written (a full disk, say). Older checkpoints are then as they were.
    """
    final = directory / f"step-{step:08d}"

    def write(fresh: Path) -> None:
        fresh.mkdir()
        with (fresh / "state.pt").open("wb") as file:
            torch.save(state, file)
        manifest = {"format": FORMAT, "run": run_id, "step": step, **_digest(fresh / "state.pt")}
        (fresh / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    try:
        directory.mkdir(exist_ok=True)
        remove_unfinished(directory)
        replace_directory(final, write)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
        left = list_checkpoints(directory)
        last = f"the last good one is {left[0].name}" if left else "there is no older one"
        raise CheckpointError(f"{final}: cannot be written, {last}: {error}") from error
    # Later ones, which were passed over or come from elsewhere, must not make this one look old.
    for old in [path for path in list_checkpoints(directory) if path.name <= final.name][keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(path: Path, *, run_id: str) -> dict[str, Any]:
    """The state in the checkpoint at `path`, its tensors on the CPU.

    Raises:
        CheckpointError: it is incomplete, changed since it was written, of another version, or of another run.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        form, run, step, size, digest = (manifest[name] for name in ("format", "run", "step", "bytes", "sha256"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is incomplete, it has no manifest.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its manifest.json cannot be read: {error!r}") from error
    if form != FORMAT:
        raise CheckpointError(f"{path}: has format {form!r}, this version reads {FORMAT}")
    if run != run_id:
        raise CheckpointError(f"{path}: belongs to another run, {run!r}; this one is {run_id!r}")
    if path.name != f"step-{step:08d}":
        raise CheckpointError(f"{path}: its manifest.json is that of step {step}")
    try:
        found = _digest(path / "state.pt")
    except OSError as error:
        raise CheckpointError(f"{path}: its state.pt cannot be read: {error.strerror or error}") from error
    if found["bytes"] != size:
        raise CheckpointError(f"{path}: its state.pt has {found['bytes']} bytes, {size} were written")
    if found["sha256"] != digest:
        raise CheckpointError(f"{path}: its state.pt is corrupted, its SHA-256 is not that of manifest.json")
    several = distributed.size() > 1  # then mapped: one copy in memory for all processes of a machine
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=several)


def latest_checkpoint(
    directory: Path, *, run_id: str, warn: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The newest usable checkpoint with its state; None if none was ever finished. Each one passed over is named to
    `warn`.

    Raises:
        CheckpointError: there are some, and none can be used.
    """
    reasons = []
    for path in list_checkpoints(directory):
        try:
            return path, load_checkpoint(path, run_id=run_id)
        except CheckpointError as error:
            reasons.append(str(error))
            warn(f"passed over a checkpoint: {error}")
    if reasons:
        raise CheckpointError("no checkpoint can be used:\n" + "\n".join(reasons))
    return None


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, the newest first."""
    return sorted((path for path in directory.glob("step-*") if _NAME.fullmatch(path.name)), reverse=True)


def random_state() -> dict[str, Any]:
    """The states of the generators of torch (all devices), Python and numpy."""
    numpy: Any = np.random.get_state()
    kind, keys, *rest = numpy
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    for number, cuda in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda, number)
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes of `model`: the parameters that require a gradient, and its persistent buffers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}

    def frozen(name: str) -> bool:  # a parameter, or what is known of one: the scales of 4 bits
        parts = name.split(".")
        return any(".".join(parts[:count]) in parameters for count in range(1, len(parts) + 1))

    state = model.state_dict(keep_vars=False)
    return {name: value for name, value in state.items() if name in trained or not frozen(name)}


def load_trained_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Puts back what `trained_state` gave.

    Raises:
        ValueError: `state` is that of another model or of other adapters; the first difference is named.
    """
    own = trained_state(model)
    for name in sorted(own.keys() | state.keys()):
        shapes = [tuple(values[name].shape) if name in values else None for values in (own, state)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} has shape {shapes[0]} in the model and {shapes[1]} in the checkpoint")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(distributed.like(state[name], value))


def _digest(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
