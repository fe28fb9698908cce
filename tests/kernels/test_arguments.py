"""Every bad argument is named, with what it was and what is accepted, before any work is done."""

import math

import pytest
import torch
from _helpers import problem

import opsd_kernels

STUDENT, TEACHER, WEIGHT = problem(6, 4, 9, dtype=torch.float32)


def call(**changes):
    arguments = {
        "student_hidden": STUDENT.view(2, 3, 4), "teacher_hidden": TEACHER.view(2, 3, 4), "weight": WEIGHT, **changes
    }  # fmt: skip
    return opsd_kernels.jsd_loss(**arguments)


BAD_OPTIONS = [
    ("beta", 1.5, ValueError), ("beta", -0.1, ValueError), ("beta", math.nan, ValueError), ("beta", "half", TypeError),
    ("beta", True, TypeError),
    ("temperature", 0, ValueError), ("temperature", -1.0, ValueError), ("temperature", math.inf, ValueError),
    ("entry_clip", 0.0, ValueError), ("entry_clip", "0.05", TypeError), ("token_clip", -1, ValueError),
    ("top_k", 0, ValueError), ("top_k", 10, ValueError), ("top_k", 2.5, TypeError),
    ("top_k_from", "both", ValueError), ("tail_bucket", 1, TypeError), ("tail_bucket", True, ValueError),
    ("mask", torch.ones(2, 3), TypeError), ("mask", torch.ones(3, 2, dtype=torch.bool), ValueError),
    ("mask", [True], TypeError), ("mask", torch.ones(2, 3, dtype=torch.bool).to_sparse(), TypeError),
    ("token_weight", torch.ones(6), ValueError), ("token_weight", torch.ones(2, 3, dtype=torch.int64), TypeError),
    ("token_weight", torch.ones(2, 3, requires_grad=True), ValueError),
    ("sequence_ids", torch.ones(2, 3), TypeError), ("sequence_ids", torch.ones(2, dtype=torch.int64), ValueError),
    ("target_ids", torch.ones(2, 3, dtype=torch.int32), TypeError),
    ("target_ids", torch.full((2, 3), 9), ValueError), ("target_ids", torch.full((2, 3), -1), ValueError),
    ("logit_scale", 0.0, ValueError), ("softcap", -3.0, ValueError), ("teacher_softcap", 0, ValueError),
    ("teacher_logit_scale", math.nan, ValueError),
    ("valid_vocab", 0, ValueError), ("valid_vocab", 10, ValueError), ("valid_vocab", 3.0, TypeError),
    ("reduction", "average", ValueError), ("denominator", 0, ValueError), ("denominator", "6", TypeError),
    ("denominator", torch.ones(2), ValueError), ("denominator", torch.tensor(-1.0), ValueError),
    ("denominator", True, TypeError), ("denominator", torch.tensor(True), TypeError),
    ("return_stats", "yes", TypeError), ("return_stats", None, TypeError), ("return_stats", 1, TypeError),
    ("gradient_filter", 0.0, ValueError), ("gradient_filter", "1e-3", TypeError),
    ("process_group", object(), TypeError),
    ("backend", "cuda", ValueError), ("workspace_bytes", 0, ValueError), ("workspace_bytes", 1e9, TypeError),
]  # fmt: skip
BAD_TENSORS = [
    ("student_hidden", STUDENT.long(), TypeError), ("student_hidden", None, TypeError),
    ("student_hidden", torch.tensor(1.0), ValueError), ("student_hidden", STUDENT.view(2, 3, 4).to_sparse(), TypeError),
    ("teacher_hidden", TEACHER, ValueError), ("teacher_hidden", torch.ones(2, 3, 5), ValueError),
    ("weight", WEIGHT.T, ValueError), ("weight", WEIGHT[0], ValueError), ("weight", WEIGHT.int(), TypeError),
    ("weight", WEIGHT[:0], ValueError), ("weight", WEIGHT.to_sparse(), TypeError),
    ("weight", WEIGHT.to("meta"), ValueError),
    ("teacher_weight", torch.ones(8, 4), ValueError), ("teacher_weight", torch.ones(9), ValueError),
    ("teacher_weight", torch.ones(9, 4).to_sparse_coo(), TypeError),
    ("bias", torch.ones(8), ValueError), ("bias", torch.ones(9, dtype=torch.int64), TypeError),
    ("teacher_bias", torch.ones(1), ValueError),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error"), BAD_OPTIONS + BAD_TENSORS)
def test_jsd_loss_names_the_bad_argument(name, value, error):
    blamed = "teacher_hidden" if name == "student_hidden" and value is not None and value.ndim == 2 else name
    with pytest.raises(error) as caught:
        call(**{name: value})
    message = str(caught.value)
    assert blamed in message or (name, message.split()[0]) == ("student_hidden", "student_hidden")
    assert any(word in message for word in ("must be", "must have", "must fit", "needs", "is for", "not supported"))


NOT_FOR_LOGITS = [("gradient_filter", 1e-3, ValueError), ("process_group", 1, ValueError)]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [o for o in BAD_OPTIONS if o[0] not in ("gradient_filter", "process_group")] + NOT_FOR_LOGITS,
)
def test_jsd_loss_from_logits_names_the_bad_argument(name, value, error):
    logits = (STUDENT @ WEIGHT.T).view(2, 3, 9)
    with pytest.raises(error, match=name):
        opsd_kernels.jsd_loss_from_logits(logits, logits, **{name: value})


def test_jsd_loss_from_logits_names_unknown_options_and_bad_shapes():
    logits = (STUDENT @ WEIGHT.T).view(2, 3, 9)
    with pytest.raises(TypeError, match="no option 'betta'; accepted: beta"):
        opsd_kernels.jsd_loss_from_logits(logits, logits, betta=0.5)
    with pytest.raises(ValueError, match="teacher_logits must have shape"):
        opsd_kernels.jsd_loss_from_logits(logits, logits[..., :5])
    with pytest.raises(TypeError, match="student_logits must be float"):
        opsd_kernels.jsd_loss_from_logits(logits.long(), logits)
    with pytest.raises(ValueError, match="student_logits must have a vocabulary"):
        opsd_kernels.jsd_loss_from_logits(logits[..., :0], logits[..., :0])
    with pytest.raises(ValueError, match="teacher_logits must have a vocabulary"):
        opsd_kernels.jsd_loss_from_logits(logits, logits[..., :0], valid_vocab=9)
    with pytest.raises(ValueError, match=r"student_logits must have shape \(..., V\)"):
        opsd_kernels.jsd_loss_from_logits(torch.tensor(1.0), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("hidden", STUDENT[0, 0], ValueError), ("return_entropy", 1, TypeError), ("return_entropy", None, TypeError),
        ("weight", WEIGHT.to_sparse(), TypeError), ("weight", WEIGHT.T, ValueError), ("target_ids", None, TypeError),
        ("target_ids", torch.zeros(6), TypeError), ("target_ids", torch.zeros(5, dtype=torch.int64), ValueError),
        ("target_ids", torch.full((6,), 9), ValueError), ("bias", torch.ones(3), ValueError),
        ("temperature", 0.0, ValueError), ("softcap", 0.0, ValueError), ("mask", torch.ones(6), TypeError),
        ("backend", "triton?", ValueError), ("process_group", 1, TypeError), ("workspace_bytes", -5, ValueError),
    ],
)  # fmt: skip
def test_token_logprobs_names_the_bad_argument(name, value, error):
    arguments = {"hidden": STUDENT, "weight": WEIGHT, "target_ids": torch.zeros(6, dtype=torch.int64), name: value}
    with pytest.raises(error, match=name):
        opsd_kernels.token_logprobs(**arguments)


def test_sequence_mean_needs_to_know_the_sequences():
    with pytest.raises(ValueError, match="sequence_ids must be given"):
        opsd_kernels.jsd_loss(STUDENT, TEACHER, WEIGHT, reduction="sequence_mean")


def test_a_denominator_without_a_mean_is_an_error():
    with pytest.raises(ValueError, match="denominator is for reduction"):
        call(reduction="sum", denominator=3)
