import sys
from pathlib import Path

import torch

torch.set_num_threads(1)  # the tensors are small, and the tests themselves run in parallel

for folder in ("kernels", "opsd"):  # their helper modules
    sys.path.insert(0, str(Path(__file__).parent / folder))
