import operator
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # the tensors are small, and the tests themselves run in parallel

for folder in ("kernels", "opsd", "recipes"):  # their helper modules
    sys.path.insert(0, str(Path(__file__).parent / folder))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also the cases that tests mark as exhaustive or thinned")


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "exhaustive: runs with --all only",
        "thinned(n): without --all, the cases of a grid whose indices add up to a multiple of n: every value is among "
        "them where the other parameters have n values between them",
    ):
        config.addinivalue_line("markers", line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        thinned = item.get_closest_marker("thinned")
        out = item.get_closest_marker("exhaustive") or (thinned and sum(_indices(item)) % thinned.args[0])
        (left if out else kept).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def _indices(item: Any) -> list[int]:
    """Which of its values the case has, for each parametrization."""
    found = []
    for mark in item.iter_markers("parametrize"):
        names, values = mark.args[:2]
        if not values:  # the case that is skipped
            continue
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        own = [item.callspec.params[name] for name in names]
        cases = [
            value.values if isinstance(value, type(pytest.param())) else value if len(names) > 1 else [value]
            for value in values
        ]
        found.append([all(map(operator.is_, own, case)) for case in cases].index(True))
    return found


def _repair_interpreter() -> None:
    """Triton 3.6's interpreter bounds a loop by an array of one element, which is no number to numpy from 2.4 on."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if os.environ.get("TRITON_INTERPRET") == "1":
    import triton

    if triton.__version__.startswith("3.6."):
        _repair_interpreter()
