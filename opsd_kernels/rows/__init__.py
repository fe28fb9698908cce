"""The row pass: from a chunk's logits to per-token values and their gradient. One file per backend, one signature.

    divergence_rows(student, teacher, objective, *, targets, table, dz, row_scale)
    logprob_rows(logits, targets, transform, temperature, *, table, dz, row_scale)
    top_k_rows(logits, k, transform, temperature) -> logprobs (n, k), likeliest first, ids (n, k), logsumexps (n,)

    top_k_ids(logits, k) -> ids (n, k) of the largest
    outside_rows(student, teacher, ids, objective) -> log Z_S, log Z_T, log Z_S − log Z_T, (n,) each
        of the tempered logits but those at `ids` (n, k); the difference is as accurate as the models' gap is small.
        −inf where nothing is left. No teacher: the student twice.
    tail_gradient_rows(logits, transform, temperature, *, shift, weight, dz)
        dz = weight·exp(y − shift)·dy/dlogits, with y the tempered logits, weight and shift (n,); 0 for a weight of 0.
        What it leaves where exp(y − shift) overflows is not to be relied on.

The last three are what `support.py`, the divergence on a top-k support, needs of a backend; `divergence_rows` itself is
that of the whole vocabulary, with `objective.top_k` None. A backend may also have

    mix_rows(parts, mixture, temperature, *, constants, biases)
        a mixed target's logits, times `temperature`, over the first of `parts` (K, n, V): the products of
        `mixture.parts`, those that are linear first. constants (n, K, 4): of each part its factor, its bias's, and
        `LogitTransform.inner_outer`; biases (K, V), read where a part has one, or None.

student, teacher, logits: (n, V) float32 or float64, the head's output before scale, cap and temperature; not modified
    unless dz is that very tensor.
targets: (n,) int64; may be None for the divergence, whose columns of log-probabilities are then not filled.
table: (C, n) in the logits' dtype, filled with the first C of the columns below (1, or all that the pass has).
dz: None, or (n, V) in any floating dtype, filled with d loss / d student (the un-transformed logits) times `row_scale`
    (n,); it may be `student` (or `logits`) itself.
"""

from enum import IntEnum


class Column(IntEnum):
    """Rows of the table that `divergence_rows` fills: the loss alone, or all of them where statistics are wanted."""

    LOSS = 0
    DIVERGENCE = 1
    STUDENT_ENTROPY = 2
    TEACHER_ENTROPY = 3
    ENTRY_CLIPPED = 4
    CLIPPED_AMOUNT = 5
    TOKEN_CLIPPED = 6
    STUDENT_LOGPROB = 7
    TEACHER_LOGPROB = 8


DROPPED = len(Column)  # one more row, filled by the chunk loop: the bound on what a gradient filter dropped


class LogprobColumn(IntEnum):
    """Rows of the table that `logprob_rows` fills."""

    LOGPROB = 0
    ENTROPY = 1
