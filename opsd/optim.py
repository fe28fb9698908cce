"""The optimiser and its learning rate."""

import math

import torch
from torch import nn

from opsd.options import OptimConfig


def make_optimizer(model: nn.Module, options: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what requires a gradient; norms and biases, all vectors, do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    assert options.lr is not None  # load_config fills it in
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=options.lr, betas=options.betas)


def learning_rate(options: OptimConfig, number: int) -> float:
    """The rate of step `number`, counted from 1; never 0, which would waste the step's rollouts."""
    assert options.lr is not None  # load_config fills it in
    warmup = options.warmup_steps
    if number <= warmup:
        return options.lr * number / (warmup + 1)
    done = (number - warmup - 1) / max(1, options.steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return options.lr * factor[options.schedule]
