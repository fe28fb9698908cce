"""Settings that belong together, by name: they lie between the defaults and what a user gives.

`paper` is the set-up of OPSD (arXiv 2601.18734). `sdft` (arXiv 2601.19897) and `sdpo` (arXiv 2601.20802) are relatives
that differ in the teacher, an exponential moving average of the student, and in comparing the likeliest tokens only.
Their figures rest on secondary sources, the defaults of TRL's trainers of the same names and public reimplementations,
and not on the papers' own code. As everywhere here, the privileged information is what the data give: SDPO's own, the
student's successful attempts and the environment's feedback, has to be put there first.
"""

from typing import Any

Settings = dict[str, dict[str, Any]]
"""Options by section and name."""

_AVERAGED: Settings = {
    "teacher": {"kind": "ema", "ema_decay": 0.95},
    "objective": {"beta": 0.5, "top_k": 100, "top_k_from": "student", "tail_bucket": True},
    "rollout": {"importance_cap": 2.0},
}

# Without a learning rate: that of the paper, 5e-6, is what optim.lr is for LoRA, and too high without.
PRESETS: dict[str, Settings] = {
    "paper": {
        "lora": {
            "enabled": True,
            "r": 64,
            "alpha": 128,
            "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        },
        "rollout": {"max_new_tokens": 1024, "per_prompt": 1, "temperature": 1.1, "top_p": 0.95, "top_k": 20},
        "teacher": {"kind": "base"},
        "objective": {"beta": 0.0, "entry_clip": 0.05},
        "optim": {"max_grad_norm": 0.1, "batch_size": 32, "steps": 100},
    },
    "sdft": _AVERAGED,
    "sdpo": {**_AVERAGED, "rollout": {"importance_cap": 2.0, "per_prompt": 8}},
}

TINY: Settings = {
    "prompts": {
        "student": "Q:{problem}\nA:",
        "teacher": "Q:{problem}\nR:{solution}\nA:",
        "reference": "R:{solution}\nA:",
    },
    "rollout": {"max_new_tokens": 40, "temperature": 1.0, "batch_size": 64},
    "teacher": {"kind": "base"},
    "objective": {"beta": 0.5},
    "optim": {
        "lr": 5e-4,
        "steps": 120,
        "batch_size": 64,
        "micro_batch_size": 64,
        "betas": (0.9, 0.95),
        "warmup_steps": 5,
        "schedule": "linear",
    },
    "eval": {"answer_pattern": r"#(\d+)$", "temperature": 0.0, "batch_size": 250, "every": 20},
}
"""The embedded set-up, the preset "tiny": of the model and the data that `opsd.tiny` makes, and of no others."""
