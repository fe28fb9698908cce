"""What a run began with, so that one that is resumed can tell whether it still is the same run."""

import contextlib
import hashlib
import json
import platform
import uuid
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import nn

from opsd.errors import ConfigError
from opsd.prompts import Example
from opsd.setup import Setup
from opsd.teacher_cache import CachedTeacher


def digest_inputs(setup: Setup) -> dict[str, str]:
    """What a checkpoint relies on and does not hold: digests of initial weights, the teacher's, and the data."""
    run = setup.run
    found = {
        "model.path": fingerprint(sorted(run.model.named_parameters())),
        "data.train": _digest(setup.examples),
        "data.eval": _digest(setup.eval_examples),
    }
    if isinstance(run.teacher, CachedTeacher):
        found["teacher.path"] = run.teacher.cache.digest
    if run.config.teacher.kind == "model" and isinstance(run.teacher.source, nn.Module):
        found["teacher.path"] = fingerprint(sorted(run.teacher.source.named_parameters()))
    return found


def describe(setup: Setup) -> dict[str, Any]:
    """What `run.json` holds: the run's own id, when it was started, on what, and the digests of `digest_inputs`."""
    created = setup.prompter.date.isoformat()  # as the prompts have it
    described = {"id": uuid.uuid4().hex, "created": created, **_environment(setup.run.device)}
    return {**described, "identity": digest_inputs(setup)}


def check_identity(
    digests: Mapping[str, str], described: Mapping[str, Any], device: torch.device, *, same_evaluation: bool = True
) -> list[str]:
    """What is not as it was when the run of `run.json` began, so that it goes on a little differently: a line for each.

    Args:
        digests: of `digest_inputs` now, before anything was restored.
        same_evaluation: whether the options that choose the rows of data.eval are the same, too.

    Raises:
        ConfigError: model, teacher or data have changed, so that a resumed run would be another one.
    """
    began = described.get("identity") or {}
    for name, value in digests.items():
        if began.get(name) != value and (same_evaluation or name != "data.eval"):
            raise ConfigError(
                f"what {name} names has changed since the run began: its digest was {began.get(name)!r}, now {value!r}"
            )
    return [
        f"the run began with {name} {described.get(name)}, now it is {value}: from here it may differ a little"
        for name, value in _environment(device).items()
        if described.get(name) != value
    ]


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A digest of names, types, shapes and a sample of the values: tells whether a model is still the same one."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].cpu().contiguous().view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(examples: Sequence[Example]) -> str:
    """A digest of the prompts and of the fields of the rows that a scorer may read."""
    digest = hashlib.sha256()
    for example in examples:
        row = example.row
        read = (
            example.student,
            example.teacher,
            example.contexts,
            row.problem,
            row.solution,
            row.answer,
            row.teacher_prompt,
            row.record,
            *([example.reason] if example.reason else []),
        )
        digest.update(json.dumps(read, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _environment(device: torch.device) -> dict[str, Any]:
    packages = {}
    for name in ("torch", "transformers", "peft", "triton", "opsd"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "packages": packages,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }
