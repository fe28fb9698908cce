"""Every option of a run: one class for each section, one documented field with its range for each option.

An option is spelt `section.option` in errors, `--section.option VALUE` on the command line and as two nested keys in a
YAML file. A section checks each of its options; what goes together is checked in `opsd.config`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from opsd.section import Section, json_text, option

TRACKERS = ("tensorboard", "wandb", "trackio")


class ModelConfig(Section):
    path: str | None = option(None, "local directory, GGUF file or hub id; none: the embedded tiny model and its data")
    dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "type of the weights; small updates vanish in bfloat16 weights, so use it for LoRA, not for full training",
    )
    autocast: Literal["none", "bfloat16"] = option("none", "compute in this type with weights of `dtype`")
    load_in_4bit: bool = option(False, "linear layers in 4 bits, the head not (NF4; needs bitsandbytes): for LoRA")
    packing: Literal["auto", "on", "off"] = option(
        "auto", "score both contexts as packed rows without padding; auto: where the model allows it"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    attn_implementation: str | None = option(
        None, "as in transformers: sdpa, eager, flash_attention_2 ...; none: its choice"
    )
    trust_remote_code: bool = option(
        False, "run code that comes with the model, its tokenizer or the teacher; it can do whatever you can"
    )


class LoraConfig(Section):
    enabled: bool = option(False, "train low-rank adapters (needs peft); the base teacher then costs no second copy")
    r: int = option(64, "rank", ge=1)
    alpha: int = option(128, "scale of the update is alpha / r", ge=1)
    dropout: float = option(0.0, "dropout before the adapters, student's scoring pass only", ge=0, le=0.999)
    target_modules: tuple[str, ...] = option(
        ("all-linear",), "all-linear (the head excepted), or names of modules", min_length=1
    )


class DataConfig(Section):
    train: str | None = option(
        None,
        "JSONL or Parquet file, datasets directory, or hub:org/name[[:CONFIG]:SPLIT]: problem and solution, "
        "or prompt and privileged_context; optionally answer and teacher_prompt",
    )
    eval: str | None = option(None, "the same with answer; solution only if the teacher is to be evaluated too")
    columns: tuple[str, ...] | None = option(
        None,
        "names of the file's columns that are not called so: problem=question,solution=gold; in YAML also a mapping",
        min_length=1,
    )
    max_prompt_tokens: int = option(4096, "longest prompt, student's or teacher's, template included", ge=1)
    too_long: Literal["error", "drop"] = option("error", "what to do with a row whose prompt is longer; never cut")
    skip_bad_rows: bool = option(False, "count and skip rows that cannot be used instead of stopping")

    @field_validator("columns", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair):
            return [f"{name}={column}" for name, column in value.items()]
        return value


class PromptsConfig(Section):
    student: str = option(
        "{problem}\n\nWork through this step by step and finish with the final answer in \\boxed{}.",
        "template of what the student reads; {problem} is replaced",
    )
    teacher: str = option(
        "{problem}\n\nA correct solution, for your eyes only:\n\n{solution}\n\nLet it inform you, then answer the "
        "problem afresh: work through it step by step and finish with the final answer in \\boxed{}.",
        "template of what the teacher reads; {problem} and {solution} are replaced",
    )
    chat: Literal["auto", "on", "off"] = option(
        "auto", "wrap the text as a user message in the tokenizer's chat template; auto: if it has one"
    )
    student_chat_args: str | None = option(
        None,
        "JSON object of arguments for the chat template of the student's prompt: "
        '{"enable_thinking": false}; in YAML also a mapping',
    )
    teacher_chat_args: str | None = option(None, "the same for the teacher's prompt")
    reason: str = option(
        "{problem}\n\nA correct solution:\n\n{solution}\n\nExplain in a few sentences which ideas make it work and "
        "where one could go wrong. Do not solve the problem anew.",
        "with teacher.reason_first: template of what the teacher reads to write its analysis",
    )
    analysis: str = option(
        "{teacher}\n\nYour own notes on that solution:\n\n{analysis}",
        "with teacher.reason_first: how the analysis joins the text of the teacher's prompt",
    )

    contexts: str | None = option(
        None,
        "JSON object of templates by context, the teacher's or another of a recipe: each {name} is problem, solution, "
        "a column of the row, right_rollout or wrong_rollout (another of the same prompt); or a template's name: "
        "rubric, feedback, translation, construction, wrong_answer, right_rollout, wrong_rollout; also a mapping",
    )

    @field_validator("student_chat_args", "teacher_chat_args", "contexts", mode="before")
    @classmethod
    def _json(cls, value: Any) -> Any:
        return json_text(value)

    reference: str = option(
        "A correct solution of a problem that is not shown:\n\n{solution}\n\nAnswer that problem: work through it step "
        "by step and finish with the final answer in \\boxed{}.",
        "with a recipe that reads the solution alone, purified say: template of what it reads",
    )

    @field_validator("student", "teacher", "reason", "analysis", "reference")
    @classmethod
    def _template(cls, text: str, info: ValidationInfo) -> str:
        needed = {
            "student": "{problem}",
            "teacher": "{problem} {solution}",
            "reason": "{solution}",
            "reference": "{solution}",
        }
        for placeholder in needed.get(str(info.field_name), "{teacher} {analysis}").split():
            if placeholder not in text:
                raise ValueError(f"text with {placeholder}")
        if info.field_name == "student" and "{solution}" in text:
            raise ValueError("text without {solution}, which only the teacher may see")
        return text


_TEMPERATURES = {"ge": 1e-6, "le": 1e6}
"""Logits divided by less, or more, are infinite or all the same in float32."""

_TOP_P = option(1.0, "nucleus sampling; 1: off", gt=0, le=1)
_TOP_K = option(0, "sample among the k likeliest tokens; 0: off", ge=0)
_MIN_P = option(0.0, "drop tokens below this share of the likeliest; 0: off", ge=0, le=1)


class RolloutConfig(Section):
    max_new_tokens: int = option(1024, "longest rollout", ge=1)
    per_prompt: int = option(1, "rollouts of each prompt in a step", ge=1)
    temperature: float = option(1.0, "sampling temperature", **_TEMPERATURES)
    top_p: float = option(1.0, "nucleus sampling; 1: off, rollouts from the student's own distribution", gt=0, le=1)
    top_k: int = _TOP_K
    min_p: float = _MIN_P
    batch_size: int = option(32, "rollouts generated together; changes memory and speed, not the samples", ge=1)
    engine: Literal["generate", "vllm"] = option(
        "generate", "what writes them; vllm: in this process, with the student's weights anew before each step"
    )
    vllm_memory: float = option(0.3, "with engine vllm: its share of the device's memory while it writes", gt=0, lt=1)
    importance_cap: float | None = option(
        None,
        "weight each token by min(p_student / p_sampler, this), for one more product with the head; none: off",
        gt=0,
    )


class TeacherConfig(Section):
    kind: Literal["base", "live", "ema", "model", "cached", "server"] = option(
        "base",
        "base: the initial weights, frozen; live: the weights being trained; ema: their moving average; "
        "model: another model, teacher.path; cached: what opsd cache-teacher wrote to teacher.path, its rollouts too, "
        "which are then no longer the student's own; server: objective.top_k tokens of the vLLM server at teacher.path",
    )
    path: str | None = option(
        None,
        "with kind model: local directory, GGUF file or hub id, of the same vocabulary; with cached: a directory of "
        "opsd cache-teacher; with server: http://HOST:PORT",
    )
    ema_decay: float = option(0.99, "with kind ema: teacher = decay * teacher + (1 - decay) * student", ge=0, le=1)
    ema_every: int = option(1, "with kind ema: steps between updates of the teacher", ge=1)
    reason_first: bool = option(
        False, "at each step the teacher first writes an analysis of each solution, which joins its prompt"
    )
    reason_max_new_tokens: int = option(512, "longest analysis", ge=1)


class ObjectiveConfig(Section):
    form: Literal["full", "sampled_token"] = option(
        "full", "divergence over the vocabulary, or on the sampled token only"
    )
    recipe: str | None = option(
        None, "a method of the family by its name, in place of form and of the divergence's options; see opsd recipes"
    )
    recipe_options: str | None = option(None, 'JSON object of its options: {"beta": 0.5}; in YAML also a mapping')
    advantage: Literal["normalised", "centred", "raw"] = option(
        "normalised",
        "with a recipe that needs advantages: the score of eval.scorer less the mean of the prompt's rollouts, over "
        "their standard deviation; without the latter; or the score itself",
    )
    beta: float = option(
        0.5, "0: forward KL; 1: reverse KL; between: JSD, bounded and so safe without a clip", ge=0, le=1
    )
    temperature: float = option(1.0, "of both distributions in the loss", **_TEMPERATURES)
    entry_clip: float | None = option(
        None,
        "upper bound of each vocabulary entry's term (nats); made for beta 0: nearer to 1, negative terms "
        "outweigh what is left of the positive ones, and a run can collapse while its loss falls",
        gt=0,
    )
    token_clip: float | None = option(None, "upper bound of each token's divergence (nats)", gt=0)
    top_k: int | None = option(None, "compare the k likeliest tokens only", ge=1)
    top_k_from: Literal["teacher", "student"] = option("teacher", "whose k likeliest tokens")
    tail_bucket: bool = option(
        False,
        "with top_k: one more entry for the rest of the mass, instead of renormalising; true by itself where the "
        "teacher is cached or a server",
    )
    reduction: Literal["mean", "sequence_mean"] = option(
        "mean", "over all rollout tokens, or over rollouts of their means"
    )
    backend: Literal["auto", "torch", "triton", "native", "cluster"] = option("auto", "of opsd_kernels")
    workspace_bytes: int | None = option(None, "memory bound of the loss's workspace; none: opsd_kernels decides", ge=1)

    @field_validator("recipe_options", mode="before")
    @classmethod
    def _json(cls, value: Any) -> Any:
        return json_text(value)


_Beta = Annotated[float, Field(ge=0, le=0.999999)]


class OptimConfig(Section):
    lr: float | None = option(
        None, "peak learning rate; none: 5e-6 for LoRA; 1e-6 for full training, where every weight moves", gt=0
    )
    betas: tuple[_Beta, _Beta] = option((0.9, 0.999), "of AdamW")
    weight_decay: float = option(0.0, "of AdamW; never on norms and biases", ge=0)
    steps: int = option(100, "optimiser steps", ge=1)
    batch_size: int = option(32, "prompts per step", ge=1)
    micro_batch_size: int = option(4, "rollouts scored together; changes memory and speed, not the gradient", ge=1)
    warmup_steps: int = option(10, "steps of linear warm-up", ge=0)
    schedule: Literal["constant", "linear", "cosine"] = option("constant", "of the learning rate after the warm-up")
    max_grad_norm: float | None = option(1.0, "clip the gradient's norm to this; none: off", gt=0)


BOXED = "boxed"  # of eval.answer_pattern


class EvalConfig(Section):
    every: int = option(0, "evaluate every so many steps, besides before and after; 0: off", ge=0)
    scorer: str = option(
        "exact",
        "exact: the text of eval.answer_pattern equals the answer; math_verify: mathematically equal "
        "(needs the package math-verify); module:function or file.py:function: your own, of (text, row)",
    )
    keep_best: bool = option(False, "keep the weights of the best evaluation in <dir>/best (needs eval.every)")
    patience: int | None = option(None, "stop after so many evaluations without a better one (needs eval.every)", ge=1)
    max_problems: int | None = option(None, "use the first so many problems; none: all", ge=1)
    samples: int = option(1, "answers per problem: avg@k, and pass@k for k up to this", ge=1)
    temperature: float = option(0.0, "0: greedy", ge=0, le=_TEMPERATURES["le"])
    top_p: float = _TOP_P
    top_k: int = _TOP_K
    min_p: float = _MIN_P
    max_new_tokens: int | None = option(None, "none: that of rollout", ge=1)
    answer_pattern: str = option(
        BOXED,
        "where the answer is. boxed: the last \\boxed{}, braces counted; none if that is empty or not closed; else a "
        "regular expression with one group, whose last match it is",
    )
    batch_size: int = option(32, "prompts generated together", ge=1)

    @field_validator("temperature")
    @classmethod
    def _greedy_or_warm(cls, temperature: float) -> float:
        if 0 < temperature < _TEMPERATURES["ge"]:
            raise ValueError(f"0, or {_TEMPERATURES['ge']:g} to {_TEMPERATURES['le']:g}")
        return temperature

    @field_validator("answer_pattern")
    @classmethod
    def _one_group(cls, pattern: str) -> str:
        if pattern == BOXED:
            return pattern
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"boxed, or a regular expression, which this is not: {error}") from error
        if groups != 1:
            raise ValueError(f"boxed, or a regular expression with exactly 1 group, this one has {groups} groups")
        return pattern


class RunConfig(Section):
    dir: str | None = option(None, "output directory, new or empty; none: runs/<model>-<number>")
    seed: int = option(0, "of everything random", ge=0, le=2**64 - 1)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda if there is one")
    threads: int | None = option(None, "of the CPU; none: torch's choice, too many on a shared machine", ge=1, le=1024)
    process_minutes: float = option(30, "how long one of several processes waits for another", gt=0, le=10_000)
    shard: bool = option(True, "several processes that train the whole model divide it among them (FSDP2)")
    log_every: int = option(1, "steps between printed lines; every step is in metrics.jsonl", ge=1)
    sample_every: int = option(10, "steps between rollouts written to samples.jsonl; 0: off", ge=0)
    save: bool = option(True, "save the trained model, or the adapter, in <dir>/model")
    checkpoint_every: int = option(50, "steps between checkpoints in <dir>/checkpoints; 0: off", ge=0)
    keep_checkpoints: int = option(2, "how many of the last ones stay", ge=1)
    trackers: tuple[str, ...] | None = option(None, "also log to these: tensorboard, wandb, trackio", min_length=1)
    push_to_hub: str | None = option(None, "upload what is saved to this hub repository org/name, private if it is new")

    @field_validator("push_to_hub")
    @classmethod
    def _repository(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            raise ValueError("org/name of a repository on the hub")
        return name

    @field_validator("trackers")
    @classmethod
    def _known(cls, trackers: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if not set(trackers or ()) <= set(TRACKERS):
            raise ValueError(", ".join(TRACKERS))
        return trackers
