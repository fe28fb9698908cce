"""From [prompt | rollout] to the rows of hidden states that predict the rollout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from opsd.models import body


def rollout_hidden(model: nn.Module, prompts: Sequence[Sequence[int]], rollouts: Sequence[Sequence[int]]) -> Tensor:
    """(R, H) hidden states after the final norm, the inputs of the lm_head that predict the R rollout tokens.

    Args:
        prompts: B lists of token ids, none of them empty.
        rollouts: B lists of token ids, taken verbatim. R is the sum of their lengths; rows follow their order.

    The prompt's last token predicts the first rollout token, so the last rollout token is not fed at all.
    """
    device = next(model.parameters()).device
    sequences = [[*prompt, *rollout[:-1]] for prompt, rollout in zip(prompts, rollouts, strict=True)]
    width = max(map(len, sequences))
    # Padding is on the right of causal attention: no real token sees it, so its id is arbitrary, positions need no
    # correction, and without a mask the fastest attention kernel stays available.
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=device)
    rows = [
        start + position
        for start, prompt, rollout in zip(range(0, len(sequences) * width, width), prompts, rollouts, strict=True)
        for position in range(len(prompt) - 1, len(prompt) - 1 + len(rollout))
    ]
    hidden = body(model)(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, torch.tensor(rows, device=device))


def rollout_index(rollouts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """`target_ids` and `sequence_ids`, both (R,) int64: the tokens that the rows of `rollout_hidden` predict, and the
    number of the rollout that each belongs to."""
    targets = torch.tensor([token for rollout in rollouts for token in rollout], dtype=torch.int64, device=device)
    lengths = torch.tensor([len(rollout) for rollout in rollouts], device=device)
    total = sum(map(len, rollouts))  # known on the host, so that nothing waits for the device
    return targets, torch.repeat_interleave(torch.arange(len(rollouts), device=device), lengths, output_size=total)
