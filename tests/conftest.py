import os
import sys
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)  # the tensors are small, and the tests themselves run in parallel

for folder in ("kernels", "opsd"):  # their helper modules
    sys.path.insert(0, str(Path(__file__).parent / folder))


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
