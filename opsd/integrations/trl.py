"""TRL's SDFT, SDPO and distillation trainers with losses that never hold the logits, over rows without padding.

Each class is TRL's own (1.16) but for the computation of the loss: rollouts, prompts, teachers, options and metrics
stay as they are there, and on the same batch the loss is the same to rounding. A model that cannot run on packed rows
runs padded, with a warning that says why; the logits are not held then either.
"""

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from trl import DistillationTrainer as _DistillationTrainer
from trl.experimental.sdft import SDFTTrainer as _SDFTTrainer
from trl.experimental.sdpo import SDPOTrainer as _SDPOTrainer
from trl.models.utils import _ForwardRedirection

from opsd.scoring import rollout_hidden
from opsd_kernels import Head, dual_hidden_states, jsd_loss, lm_head_of, pack_dual_context, token_logprobs
from opsd_kernels.packing import context_hidden_states, plan_passes
from opsd_kernels.probe import evaluating

__all__ = ["DistillationTrainer", "SDFTTrainer", "SDPOTrainer"]

IMAGES = ("pixel_values", "image_grid_thw", "spatial_shapes", "image_sizes", "image_position_ids")


def _listed(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The ids of each row where `mask`, both (B, T)."""
    pairs = zip(ids.tolist(), mask.tolist(), strict=True)
    return [[token for token, counts in zip(row, own, strict=True) if counts] for row, own in pairs]


class _Packed:
    """Rows of both contexts for a trainer's padded batch."""

    _packs: bool | None = None

    def _hidden(
        self,
        student: nn.Module,
        teacher: nn.Module,
        source: str | nn.Module | None,
        inputs: dict[str, Any],
        context: AbstractContextManager[Any],
    ) -> tuple[Tensor, Tensor]:
        """(R, H) and (R, H_t): what predicts the R completion tokens, row by row of the batch, in each context.

        `source` is how `dual_hidden_states` calls the teacher; None: it is `teacher` within `context`.
        """
        width = inputs["completion_ids"].shape[1]
        prompts = _listed(inputs["prompt_ids"], inputs["prompt_mask"])
        rollouts = _listed(inputs["completion_ids"], inputs["completion_mask"])
        taught = prompts
        if "teacher_input_ids" in inputs:
            taught = _listed(inputs["teacher_input_ids"][:, :-width], inputs["teacher_attention_mask"][:, :-width])
        if self._packs is None:
            self._packs = True
            try:
                plan_passes(student, teacher=source or "live")
            except (TypeError, ValueError) as error:
                warnings.warn(f"scored padded, since {error}", stacklevel=2)
                self._packs = False
        if self._packs and source is not None:
            hidden = dual_hidden_states(student, pack_dual_context(prompts, taught, rollouts), teacher=source)
            return hidden.student, hidden.teacher
        alone = _packed if self._packs else rollout_hidden
        with torch.no_grad(), evaluating(teacher), context:
            teacher_hidden = alone(teacher, taught, rollouts)
        return alone(student, prompts, rollouts), teacher_hidden


def _packed(model: nn.Module, prompts: list[list[int]], rollouts: list[list[int]]) -> Tensor:
    return context_hidden_states(model, pack_dual_context(prompts, prompts, rollouts))


def _heads(student: Head, teacher: Head) -> dict[str, Any]:
    """The options of `jsd_loss` that say what both heads do. One shared weight serves both at once."""
    if teacher.weight is student.weight:
        return student.options()
    other = {"weight": teacher.weight, "bias": teacher.bias, "logit_scale": teacher.logit_scale}
    return {
        **student.options(),
        **{f"teacher_{name}": value for name, value in other.items()},
        "teacher_softcap": math.inf if teacher.softcap is None else teacher.softcap,
    }


class _SelfDistillation(_Packed):
    """What SDFT and SDPO have in common; below, `self` is one of TRL's trainers."""

    def compute_loss(
        self: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        if return_outputs or self.use_teacher_server or getattr(self.args, "distillation_weight", 1.0) == 0.0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        own = self.accelerator.unwrap_model(model)
        # Through the wrapper's forward, so that data parallelism sees the pass.
        with self.accelerator.autocast():
            loss, mean = _ForwardRedirection()(model, own, self._distillation_loss, own, inputs)
        mode = "train" if self.model.training else "eval"
        self._log_self_distillation_metric(mode, self.accelerator.gather(mean).mean().item())
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1.0)

    def _distillation_loss(self: Any, student: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The mean over rollouts of their tokens' means, and, detached, the mean over tokens; both 0-d."""
        args, teacher = self.args, self.accelerator.unwrap_model(self.teacher_model)
        # Of the student's own weights "live" and "base" are known by name; an average in an adapter is not.
        known = {"live": "live", "base": "base"}.get(args.teacher_model_kind)
        context = self._get_teacher_context_for_self_distillation()
        hidden, taught = self._hidden(student, teacher, known if teacher is student else teacher, inputs, context)
        head = lm_head_of(student)
        teacher_head = head if teacher is student else lm_head_of(teacher)
        written = inputs["completion_mask"].bool()
        lengths, rows = self._counted(inputs, written)
        weights = (1 / (lengths.clamp(min=1) * len(lengths)))[written.nonzero()[:, 0]]
        asked = {"mask": rows, "target_ids": inputs["completion_ids"][written], "temperature": self.temperature}
        old = None if args.distillation_is_clip is None else inputs.get("old_per_token_logps")
        if args.distillation_mode == "full_logits" and old is None:  # one pass, also with a trainable head
            loss, stats = self._divergence(hidden, taught, head, teacher_head, asked, token_weight=weights)
            return loss, stats.divergence.sum() / lengths.sum().clamp(min=1)
        if args.distillation_mode == "sampled_token":
            ours: Any = token_logprobs(hidden, head.weight, **head.options(), **asked)
            with torch.no_grad():
                theirs = token_logprobs(taught, teacher_head.weight, **teacher_head.options(), **asked)
            losses, logprobs = (ours - theirs).detach() * ours, ours.detach()
        else:
            losses, stats = self._divergence(hidden, taught, head, teacher_head, asked, reduction="none")
            logprobs = stats.student_logprob
        if old is not None:
            losses = losses * (logprobs - old[written]).clamp(-20.0, 20.0).exp().clamp(max=args.distillation_is_clip)
        losses = losses * rows
        return (losses * weights).sum(), losses.detach().sum() / lengths.sum().clamp(min=1)

    def _counted(self: Any, inputs: dict[str, Any], written: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) how many tokens of each rollout count, and (R,) bool, which."""
        counted = written
        if skipped := getattr(self, "num_loss_tokens_to_skip", 0):  # SDFT
            counted = counted & (torch.arange(written.shape[1], device=written.device) >= skipped)
        if inputs.get("self_distillation_mask") is not None:  # SDPO
            counted = counted & inputs["self_distillation_mask"].bool()[:, None]
        return counted.sum(-1), counted[written]

    def _divergence(
        self: Any, hidden: Tensor, taught: Tensor, head: Head, teacher: Head, asked: dict[str, Any], **options: Any
    ) -> Any:
        if self.args.distillation_mode == "topk_logits":
            if self.args.distillation_topk is None:
                raise ValueError("distillation_topk is None with distillation_mode 'topk_logits'; accepted: an int")
            options |= {"top_k": self.args.distillation_topk, "top_k_from": "student"}
            options["tail_bucket"] = self.args.distillation_add_tail
        asked = {"reduction": "sum", "beta": self.args.distillation_alpha, "return_stats": True, **asked, **options}
        return jsd_loss(hidden, taught, head.weight, **_heads(head, teacher), **asked)


class SDFTTrainer(_SelfDistillation, _SDFTTrainer):
    """`trl.experimental.sdft.SDFTTrainer`; arguments and options are those of TRL."""


class SDPOTrainer(_SelfDistillation, _SDPOTrainer):
    """`trl.experimental.sdpo.SDPOTrainer`; arguments and options are those of TRL.

    Raises:
        ValueError: `distillation_weight` lies between 0 and 1: the policy's share needs logits that are not held.
    """

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        args: Any = self.args
        weight = args.distillation_weight
        if weight not in (0.0, 1.0):
            raise ValueError(
                f"distillation_weight is {weight}; accepted: 1, distillation alone, or 0, TRL's policy loss"
            )


class DistillationTrainer(_Packed, _DistillationTrainer):
    """`trl.DistillationTrainer`; arguments and options are those of TRL. Batches with images are left to TRL."""

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if any(name in inputs for name in IMAGES):
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        hidden, taught = self._hidden(unwrapped_student, teacher, teacher, inputs, nullcontext())
        written = inputs["completion_mask"].bool()
        rows = (written & inputs["tool_mask"].bool() if "tool_mask" in inputs else written)[written]
        head, count = lm_head_of(unwrapped_student), rows.sum()
        options = {"beta": self.beta, "temperature": self.temperature, "mask": rows, "return_stats": True}
        options["denominator"] = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        found: Any = jsd_loss(hidden, taught, head.weight, **_heads(head, lm_head_of(teacher)), **options)
        loss, stats = found
        return loss, stats.student_entropy.sum(), count
