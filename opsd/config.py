"""Every option of a run: one dataclass per section, one documented and validated field per option.

An option is spelt ``section.option`` in errors, ``--section.option VALUE`` on the command line and as two nested keys
in a YAML file. Values are checked when they are read, before a model is loaded.
"""

import difflib
import json
import math
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

TRACKERS = ("tensorboard", "wandb", "trackio")


ABBREVIATED = {"learning-rate": "lr", "learnrate": "lr", "rank": "r"}
"""Names of options that one would expect, too far from ours to be found by their letters."""


class ConfigError(Exception):
    """The run cannot start as asked: an option, a file or a combination of them is unusable."""


def _opt(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    mapping: Callable[[Mapping[str, Any]], Any] | None = None,
):
    """A field with its documentation and its range: `low` <= value <= `high`, value > `above`.

    With `mapping` the value may be a mapping, too, of which it makes what is written otherwise.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, "above": above, "mapping": mapping})


def _as_pairs(columns: Mapping[str, str]) -> list[str]:
    return [name + "=" + column for name, column in columns.items()]


def _as_json(arguments: Mapping[str, Any]) -> str:
    return json.dumps(dict(arguments))


@dataclass(frozen=True)
class ModelConfig:
    path: str | None = _opt(None, "local directory or hub id; none: the embedded tiny model and its data")
    dtype: Literal["float32", "bfloat16"] = _opt(
        "float32",
        "type of the weights; small updates vanish in bfloat16 weights, so use it for LoRA, not for full training",
    )
    autocast: Literal["none", "bfloat16"] = _opt("none", "compute in this type with weights of `dtype`")
    packing: Literal["auto", "on", "off"] = _opt(
        "auto", "score both contexts as packed rows without padding; auto: where the model allows it"
    )
    gradient_checkpointing: bool = _opt(False, "recompute activations in the backward pass to save memory")
    attn_implementation: str | None = _opt(
        None, "as in transformers: sdpa, eager, flash_attention_2 ...; none: its choice"
    )


@dataclass(frozen=True)
class LoraConfig:
    enabled: bool = _opt(False, "train low-rank adapters (needs peft); the base teacher then costs no second copy")
    r: int = _opt(64, "rank", low=1)
    alpha: int = _opt(128, "scale of the update is alpha / r", low=1)
    dropout: float = _opt(0.0, "dropout before the adapters, student's scoring pass only", low=0, high=0.999)
    target_modules: tuple[str, ...] = _opt(("all-linear",), "all-linear (the head excepted), or names of modules")


@dataclass(frozen=True)
class DataConfig:
    train: str | None = _opt(
        None,
        "JSONL or Parquet file, or a datasets directory: problem and solution, or prompt and privileged_context; "
        "optionally answer and teacher_prompt",
    )
    eval: str | None = _opt(None, "the same with answer; solution only if the teacher is to be evaluated too")
    columns: tuple[str, ...] | None = _opt(
        None,
        "names of the file's columns that are not called so: problem=question,solution=gold; in YAML also a mapping",
        mapping=_as_pairs,
    )
    max_prompt_tokens: int = _opt(4096, "longest prompt, student's or teacher's, template included", low=1)
    too_long: Literal["error", "drop"] = _opt("error", "what to do with a row whose prompt is longer; never cut")
    skip_bad_rows: bool = _opt(False, "count and skip rows that cannot be used instead of stopping")


@dataclass(frozen=True)
class PromptsConfig:
    student: str = _opt(
        "{problem}\n\nWork through this step by step and finish with the final answer in \\boxed{}.",
        "template of what the student reads; {problem} is replaced",
    )
    teacher: str = _opt(
        "{problem}\n\nA correct solution, for your eyes only:\n\n{solution}\n\nLet it inform you, then answer the "
        "problem afresh: work through it step by step and finish with the final answer in \\boxed{}.",
        "template of what the teacher reads; {problem} and {solution} are replaced",
    )
    chat: Literal["auto", "on", "off"] = _opt(
        "auto", "wrap the text as a user message in the tokenizer's chat template; auto: if it has one"
    )
    student_chat_args: str | None = _opt(
        None,
        'JSON object of arguments for the chat template of the student\'s prompt: {"enable_thinking": false}; in YAML '
        "also a mapping",
        mapping=_as_json,
    )
    teacher_chat_args: str | None = _opt(None, "the same for the teacher's prompt", mapping=_as_json)
    reason: str = _opt(
        "{problem}\n\nA correct solution:\n\n{solution}\n\nExplain in a few sentences which ideas make it work and "
        "where one could go wrong. Do not solve the problem anew.",
        "with teacher.reason_first: template of what the teacher reads to write its analysis",
    )
    analysis: str = _opt(
        "{teacher}\n\nYour own notes on that solution:\n\n{analysis}",
        "with teacher.reason_first: how the analysis joins the text of the teacher's prompt",
    )


@dataclass(frozen=True)
class RolloutConfig:
    max_new_tokens: int = _opt(1024, "longest rollout", low=1)
    per_prompt: int = _opt(1, "rollouts of each prompt in a step", low=1)
    temperature: float = _opt(1.0, "sampling temperature", above=0)
    top_p: float = _opt(
        1.0, "nucleus sampling; 1: off, so that rollouts come from the student's own distribution", above=0, high=1
    )
    top_k: int = _opt(0, "sample among the k likeliest tokens; 0: off", low=0)
    min_p: float = _opt(0.0, "drop tokens below this share of the likeliest; 0: off", low=0, high=1)
    batch_size: int = _opt(32, "rollouts generated together; changes memory and speed, not the samples", low=1)
    importance_cap: float | None = _opt(
        None,
        "weight each token by min(p_student / p_sampler, this), for one more product with the head; none: off",
        above=0,
    )


@dataclass(frozen=True)
class TeacherConfig:
    kind: Literal["base", "live", "ema", "model"] = _opt(
        "base",
        "base: the initial weights, frozen; live: the weights being trained; ema: their moving average; model: another "
        "model, teacher.path",
    )
    path: str | None = _opt(None, "with kind model: local directory or hub id, of the same vocabulary")
    ema_decay: float = _opt(0.99, "with kind ema: teacher = decay * teacher + (1 - decay) * student", low=0, high=1)
    ema_every: int = _opt(1, "with kind ema: steps between updates of the teacher", low=1)
    reason_first: bool = _opt(
        False, "at each step the teacher first writes an analysis of each solution, which joins its prompt"
    )
    reason_max_new_tokens: int = _opt(512, "longest analysis", low=1)


@dataclass(frozen=True)
class ObjectiveConfig:
    form: Literal["full", "sampled_token"] = _opt(
        "full", "divergence over the vocabulary, or on the sampled token only"
    )
    beta: float = _opt(
        0.5, "0: forward KL; 1: reverse KL; between: JSD, bounded and so safe without a clip", low=0, high=1
    )
    temperature: float = _opt(1.0, "of both distributions in the loss", above=0)
    entry_clip: float | None = _opt(
        None,
        "upper bound of each vocabulary entry's term (nats); made for beta 0: nearer to 1, negative terms outweigh "
        "what is left of the positive ones, and a run can collapse while its loss falls",
        above=0,
    )
    token_clip: float | None = _opt(None, "upper bound of each token's divergence (nats)", above=0)
    top_k: int | None = _opt(None, "compare the k likeliest tokens only", low=1)
    top_k_from: Literal["teacher", "student"] = _opt("teacher", "whose k likeliest tokens")
    tail_bucket: bool = _opt(False, "with top_k: one more entry for the rest of the mass, instead of renormalising")
    reduction: Literal["mean", "sequence_mean"] = _opt(
        "mean", "over all rollout tokens, or over rollouts of their means"
    )
    backend: Literal["auto", "torch", "triton", "native", "cluster"] = _opt("auto", "of opsd_kernels")
    workspace_bytes: int | None = _opt(None, "memory bound of the loss's workspace; none: opsd_kernels decides", low=1)


@dataclass(frozen=True)
class OptimConfig:
    lr: float | None = _opt(
        None, "peak learning rate; none: 5e-6 for LoRA; 1e-6 for full training, where every weight moves", above=0
    )
    betas: tuple[float, float] = _opt((0.9, 0.999), "of AdamW", low=0, high=0.999999)
    weight_decay: float = _opt(0.0, "of AdamW; never on norms and biases", low=0)
    steps: int = _opt(100, "optimiser steps", low=1)
    batch_size: int = _opt(32, "prompts per step", low=1)
    micro_batch_size: int = _opt(4, "rollouts scored together; changes memory and speed, not the gradient", low=1)
    warmup_steps: int = _opt(10, "steps of linear warm-up", low=0)
    schedule: Literal["constant", "linear", "cosine"] = _opt("constant", "of the learning rate after the warm-up")
    max_grad_norm: float | None = _opt(1.0, "clip the gradient's norm to this; none: off", above=0)


@dataclass(frozen=True)
class EvalConfig:
    every: int = _opt(0, "evaluate every so many steps, besides before and after; 0: off", low=0)
    scorer: str = _opt(
        "exact",
        "exact: the text of eval.answer_pattern equals the answer; math_verify: mathematically equal (needs the "
        "package math-verify); module:function or file.py:function: your own, of (text, row)",
    )
    keep_best: bool = _opt(False, "keep the weights of the best evaluation in <dir>/best (needs eval.every)")
    patience: int | None = _opt(None, "stop after so many evaluations without a better one (needs eval.every)", low=1)
    max_problems: int | None = _opt(None, "use the first so many problems; none: all", low=1)
    samples: int = _opt(1, "answers per problem: avg@k, and pass@k for k up to this", low=1)
    temperature: float = _opt(0.0, "0: greedy", low=0)
    top_p: float = _opt(1.0, "nucleus sampling; 1: off", above=0, high=1)
    top_k: int = _opt(0, "sample among the k likeliest tokens; 0: off", low=0)
    min_p: float = _opt(0.0, "drop tokens below this share of the likeliest; 0: off", low=0, high=1)
    max_new_tokens: int | None = _opt(None, "none: that of rollout", low=1)
    answer_pattern: str = _opt(
        r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}",
        "regular expression with one group; its last match is the answer",
    )
    batch_size: int = _opt(32, "prompts generated together", low=1)


@dataclass(frozen=True)
class RunConfig:
    dir: str | None = _opt(None, "output directory, new or empty; none: runs/<model>-<number>")
    seed: int = _opt(0, "of everything random", low=0)
    device: Literal["auto", "cpu", "cuda"] = _opt("auto", "auto: cuda if there is one")
    threads: int | None = _opt(None, "of the CPU; none: torch's choice, too many on a shared machine", low=1)
    log_every: int = _opt(1, "steps between printed lines; every step is in metrics.jsonl", low=1)
    sample_every: int = _opt(10, "steps between rollouts written to samples.jsonl; 0: off", low=0)
    save: bool = _opt(True, "save the trained model, or the adapter, in <dir>/model")
    checkpoint_every: int = _opt(50, "steps between checkpoints in <dir>/checkpoints; 0: off", low=0)
    keep_checkpoints: int = _opt(2, "how many of the last ones stay", low=1)
    trackers: tuple[str, ...] | None = _opt(None, "also log to these: tensorboard, wandb, trackio")


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    preset: str | None = None
    """Of `opsd.presets.PRESETS`, the one that lies below; what it sets is in the sections already."""


SECTIONS: dict[str, type] = {f.name: f.default_factory for f in fields(Config) if f.name != "preset"}  # type: ignore[misc]


def sections(config: Config) -> dict[str, dict[str, Any]]:
    """The options of `config` by section and name."""
    return {name: asdict(getattr(config, name)) for name in SECTIONS}


def load_config(
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Iterable[tuple[str, Any]] = (),
    preset: str | None = None,
    *,
    training: bool = True,
    complete: bool = True,
    below: Iterable[tuple[str, Any]] = (),
) -> Config:
    """The configuration of a run: defaults, below a preset, below a file or mapping, below `overrides`.

    Args:
        source: a YAML file of nested sections, or such a mapping, or None. It may name a `preset`, too.
        overrides: (dotted option, value) pairs, later ones win; values may be text, dashes may stand for underscores.
        preset: one of `opsd.presets.PRESETS`, or "tiny", the embedded set-up, which is also what there is without a
            `model.path`; wins over that of `source`.
        training: whether the options are for training. If not, they are for the evaluation of a model: `model.path` and
            `data.eval` must be there, `data.train` need not, and presets mean nothing.
        complete: whether the model and the data that a run needs have to be named. If not, the options are to be looked
            at and filled in, and what goes with a model that is not named is left as it is.
        below: more pairs, between the defaults and `source`.

    Raises:
        ConfigError: naming the option, its value and what is accepted.
    """
    named, given = _read(source)
    preset = preset or named
    user: dict[str, dict[str, Any]] = {}
    for name, value in [*below, *given, *overrides]:
        section, option = _find(name)
        user.setdefault(section, {})[option.name] = _coerce(f"{section}.{option.name}", value, option)
    if training:
        for name, value in _preset_options(preset, user, complete):
            section, option = _find(name)
            user.setdefault(section, {}).setdefault(option.name, _coerce(name, value, option))
    else:
        for needed in ("model.path", "data.eval"):
            section, _, name = needed.partition(".")
            if not user.get(section, {}).get(name):
                raise ConfigError(f"{needed} is not given: an evaluation needs a model and data with answers")
    made: dict[str, Any] = {name: section(**user.get(name, {})) for name, section in SECTIONS.items()}
    # "tiny" is what there is without a model, and names its own: it must not stand beside that name in config.yaml.
    config = Config(**made, preset=preset if training and preset != "tiny" else None)
    _check_together(config, complete)
    if config.optim.lr is None:
        object.__setattr__(config.optim, "lr", 5e-6 if config.lora.enabled else 1e-6)
    return config


def _preset_options(preset: str | None, user: Mapping[str, Mapping[str, Any]], complete: bool) -> list[tuple[str, Any]]:
    """The settings of `preset`, which has to go with what the user says of model and data."""
    from opsd.presets import PRESETS

    if preset is not None and not (isinstance(preset, str) and preset in ("tiny", *PRESETS)):
        raise ConfigError(f"preset is {preset!r}; accepted: tiny, {', '.join(PRESETS)}")
    model_path, data = user.get("model", {}).get("path"), user.get("data", {})
    if preset == "tiny" and model_path:
        raise ConfigError(f"preset tiny is the embedded model and its data; model.path is {model_path!r}")
    named = [option for option in ("train", "eval") if data.get(option)]
    if not complete and preset != "tiny" and (model_path or named or preset):
        return _flatten(PRESETS[preset], f"preset {preset}") if preset in PRESETS else []
    if model_path:
        if not data.get("train"):
            raise ConfigError("model.path is given without data.train: name a file with problem and solution")
    else:
        for option in named:
            raise ConfigError(
                f"data.{option} is given without model.path: the embedded tiny model only fits its own data"
            )
    if preset in PRESETS:
        if not model_path:
            raise ConfigError(f"preset {preset} needs a model.path and data.train")
        return _flatten(PRESETS[preset], f"preset {preset}")
    if model_path:
        return []
    from opsd import tiny

    return _flatten(tiny.SETTINGS, "the embedded set-up")


def unused_options(config: Config) -> list[str]:
    """What is set and changes nothing, since what it belongs to is off: a line each that says so.

    Options at their defaults do not count, nor as the preset has them, so that a file of all options is as good as one
    of the few that matter.
    """
    preset = _of_preset(config)
    off: dict[str, list[str]] = {}  # what is off: the options that belong to it
    if not config.lora.enabled:
        off["lora.enabled is false"] = [f"lora.{option.name}" for option in fields(LoraConfig)]
    if config.teacher.kind != "ema":
        off[f"teacher.kind is {config.teacher.kind}"] = ["teacher.ema_decay", "teacher.ema_every"]
    if not config.teacher.reason_first:
        names = ["teacher.reason_max_new_tokens", "prompts.reason", "prompts.analysis"]
        off["teacher.reason_first is false"] = names
    if config.objective.top_k is None:
        off["objective.top_k is none"] = ["objective.top_k_from"]
    if config.objective.form == "sampled_token":
        off["objective.form is sampled_token"] = ["objective.beta"]
    if config.data.eval is None and config.model.path is not None:  # without a model it is the embedded set-up's
        off["data.eval is none"] = [f"eval.{option.name}" for option in fields(EvalConfig)]
    lines = []
    for why, names in off.items():
        for name in names:
            section, option = _find(name)
            value = getattr(getattr(config, section), option.name)
            if value != option.default and value != preset.get(name, option.default):
                lines.append(f"{name} is {_shown(value)}, which changes nothing, since {why}")
    return lines


def _of_preset(config: Config) -> dict[str, Any]:
    """The settings of `config.preset` by their dotted names."""
    from opsd.presets import PRESETS

    pairs = _flatten(PRESETS[config.preset], "") if config.preset else []
    return {name: _coerce(name, value, _find(name)[1]) for name, value in pairs}


def describe(accepts: Callable[[str], bool] = lambda name: True) -> str:
    """The options whose names `accepts` takes, with their defaults, as the help of the command line shows them."""
    lines = []
    for section, cls in SECTIONS.items():
        chosen = [option for option in fields(cls) if accepts(f"{section}.{option.name}")]
        if chosen:
            lines.append(f"\n{section}:")
        for option in chosen:
            name = f"{section}.{option.name.replace('_', '-')}"
            head = f"  --{name}  [{_accepted(option)}]  default {_shown(option.default)}"
            lines += textwrap.wrap(head, 110, subsequent_indent=" " * 8, break_on_hyphens=False)
            lines += textwrap.wrap(option.metadata["help"], 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """A default as one would write it on the command line; text of several lines as JSON has it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, str):
        return json.dumps(value) if "\n" in value else value
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def to_yaml(config: Config) -> str:
    """`config` as YAML that `load_config` reads back."""
    plain = {s: {k: list(v) if isinstance(v, tuple) else v for k, v in d.items()} for s, d in sections(config).items()}
    named = {"preset": config.preset} if config.preset else {}
    return yaml.safe_dump({**named, **plain}, sort_keys=False, allow_unicode=True)


def is_flag(name: str) -> bool:
    """Whether the option `name` (dotted) is true or false, so that it may stand alone on a command line."""
    _, option = _find(name)
    return option.type is bool


def yaml_options(path: str | Path | None) -> list[tuple[str, Any]]:
    """The (dotted option, value) pairs of a YAML file, as they stand there; none for None.

    Raises:
        ConfigError: the file cannot be read, or does not hold sections of options.
    """
    return _read(path)[1]


def _read(source: str | Path | Mapping[str, Any] | None) -> tuple[str | None, list[tuple[str, Any]]]:
    """The preset that `source` names, and its options."""
    if source is None:
        return None, []
    loaded: Any = source
    if not isinstance(source, Mapping):
        if not isinstance(source, str | os.PathLike):
            raise ConfigError(f"config is {source!r}; accepted: the path of a YAML file, or a mapping of sections")
        try:
            loaded = yaml.load(Path(source).read_text(encoding="utf-8"), _Loader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{source}: cannot be read as YAML: {error}") from error
    name = "config" if isinstance(source, Mapping) else str(source)
    options = {} if loaded is None else loaded
    preset = options.get("preset") if isinstance(options, Mapping) else None
    if preset is not None:
        options = {section: values for section, values in options.items() if section != "preset"}
    return preset, _flatten(options, name)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, where YAML's last one would silently win."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _flatten(nested: Any, source: str) -> list[tuple[str, Any]]:
    if not isinstance(nested, Mapping):
        raise ConfigError(f"{source}: expected sections ({', '.join(SECTIONS)}), got {nested!r}")
    options = []
    for section, values in nested.items():
        if section not in SECTIONS:
            raise ConfigError(f"{source}: unknown section {section!r}; {_nearest(str(section), SECTIONS)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source}: section {section} should hold options, got {values!r}")
        spelt: dict[str, Any] = {}
        for name, value in values.items():
            # Dashes may stand for underscores, so that two keys can be one option.
            other = spelt.setdefault(str(name).replace("-", "_"), name)
            if other != name:
                raise ConfigError(f"{source}: section {section} has both {other} and {name}, which are the same option")
            options.append((f"{section}.{name}", value))
    return options


def _find(name: str) -> tuple[str, Field]:
    section, _, option = name.replace("-", "_").partition(".")
    if section in SECTIONS:
        for candidate in fields(SECTIONS[section]):
            if candidate.name == option:
                return section, candidate
    raise ConfigError(f"unknown option {name!r}; {_advice(section, option)}")


def _advice(section: str, option: str) -> str:
    """What there is instead of an option that does not exist, spelt as in the help."""
    known = [(s, f.name.replace("_", "-")) for s, cls in SECTIONS.items() for f in fields(cls)]
    spelt = (option or section).replace("_", "-")
    spelt = ABBREVIATED.get(spelt, spelt)
    own = [name for s, name in known if s == section]
    # In other sections, too: optim.temperature should suggest rollout.temperature.
    names = {name for _, name in known}
    near = [spelt] if spelt in names else difflib.get_close_matches(spelt, sorted(names), n=4, cutoff=0.6)
    found = [(s, name) for s, name in known if name in near]
    found = [(s, name) for s, name in found if s == section] or found
    if found:
        return f"did you mean {' or '.join(f'{s}.{name}' for s, name in found)}?"
    if own:
        return f"known in {section}: {', '.join(f'{section}.{name}' for name in own)}"
    return f"options are spelt section.option; the sections: {', '.join(SECTIONS)}"


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def _split(option: Field) -> tuple[Any, bool]:
    """The option's type without `| None`, and whether None is allowed."""
    hint: Any = option.type
    if isinstance(hint, types.UnionType):
        (kind,) = (a for a in typing.get_args(hint) if a is not type(None))
        return kind, True
    return hint, False


def _accepted(option: Field) -> str:
    kind, optional = _split(option)
    if typing.get_origin(kind) is Literal:
        text = "|".join(typing.get_args(kind))
    elif typing.get_origin(kind) is tuple:
        args = typing.get_args(kind)
        text = (
            f"{'text' if args[0] is str else args[0].__name__}, several separated by commas"
            if args[-1] is ...
            else ",".join(a.__name__ for a in args)
        )
    else:
        text = {bool: "true|false", str: "text"}.get(kind, kind.__name__)
    m = option.metadata
    bounds = [
        f"{sign} {m[key]:g}" for key, sign in (("low", ">="), ("above", ">"), ("high", "<=")) if m[key] is not None
    ]
    return " ".join([text, " and ".join(bounds)]).strip() + ("|none" if optional else "")


def _coerce(name: str, value: Any, option: Field) -> Any:
    """`value`, text or YAML, as the type of `option`, within its range."""
    kind, optional = _split(option)
    error = ConfigError(f"{name} is {value!r}; accepted: {_accepted(option)}")
    if isinstance(value, Mapping) and (read := option.metadata["mapping"]):
        try:
            value = read(value)
        except (TypeError, ValueError):
            raise error from None
    if value is None or (optional and isinstance(value, str) and value.lower() in ("none", "null")):
        if optional:
            return None
        raise error
    if typing.get_origin(kind) is Literal:
        if isinstance(value, bool):  # YAML reads a bare on or off as a truth value
            value = "on" if value else "off"
        if value not in typing.get_args(kind):
            raise error
        return value
    if typing.get_origin(kind) is tuple:
        items = [v.strip() for v in value.split(",")] if isinstance(value, str) else value
        args = typing.get_args(kind)
        if not isinstance(items, list | tuple) or not items or (args[-1] is not ... and len(items) != len(args)):
            raise error
        return tuple(_scalar(v, args[0], option, error) for v in items)
    return _scalar(value, kind, option, error)


def _scalar(value: Any, kind: type, option: Field, error: ConfigError) -> Any:
    if kind is str:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            raise error
        return value
    if kind is bool:
        word = str(value).lower()
        if word not in ("true", "false", "yes", "no", "on", "off", "1", "0"):
            raise error
        return word in ("true", "yes", "on", "1")
    if isinstance(value, bool):
        raise error
    try:
        # PyYAML reads 1e-6 as text, so text is a number here too; an int must not be a rounded float.
        number = int(str(value)) if kind is int else float(value)
    except (TypeError, ValueError):
        raise error from None
    m = option.metadata
    inside = (m["low"] is None or number >= m["low"]) and (m["high"] is None or number <= m["high"])
    if not math.isfinite(number) or not inside or (m["above"] is not None and number <= m["above"]):
        raise error
    return number


def _check_together(config: Config, complete: bool = True) -> None:
    """What no single option can tell; with `complete`, of what has to be named, too."""
    o = config.objective
    if o.tail_bucket and o.top_k is None:
        raise ConfigError("objective.tail_bucket is true without objective.top_k: it holds the mass outside the top k")
    if o.form == "sampled_token":
        for name in ("entry_clip", "token_clip", "top_k"):
            if getattr(o, name) is not None:
                raise ConfigError(f"objective.{name} has no meaning with objective.form sampled_token")
    kind, path = config.teacher.kind, config.teacher.path
    if complete and kind == "model" and path is None:
        raise ConfigError("teacher.kind model needs teacher.path: a local directory or hub id")
    if kind != "model" and path is not None:
        raise ConfigError(
            f"teacher.path is {path!r} with teacher.kind {kind}, which has none; set teacher.kind model or leave it out"
        )
    for option in ("keep_best", "patience"):
        if getattr(config.eval, option) and not config.eval.every:
            value = _shown(getattr(config.eval, option))
            raise ConfigError(f"eval.{option} is {value} without eval.every: set eval.every to the steps between two")
    # Without a model.path it is the embedded set-up, which has data of its own.
    if complete and config.eval.every and config.model.path and not config.data.eval:
        raise ConfigError(f"eval.every is {config.eval.every} without data.eval: name a file with problem and answer")
    for tracker in config.run.trackers or ():
        if tracker not in TRACKERS:
            raise ConfigError(f"run.trackers has {tracker!r}; accepted: {', '.join(TRACKERS)}")
    templates = {
        "student": ("{problem}",),
        "teacher": ("{problem}", "{solution}"),
        "reason": ("{solution}",),
        "analysis": ("{teacher}", "{analysis}"),
    }
    for name, required in templates.items():
        for placeholder in required:
            if placeholder not in getattr(config.prompts, name):
                raise ConfigError(f"prompts.{name} lacks {placeholder}: {getattr(config.prompts, name)!r}")
    if "{solution}" in config.prompts.student:
        raise ConfigError("prompts.student contains {solution}, which only the teacher may see")
    try:
        groups = re.compile(config.eval.answer_pattern).groups
    except re.error as error:
        raise ConfigError(
            f"eval.answer_pattern {config.eval.answer_pattern!r} is no regular expression: {error}"
        ) from error
    if groups != 1:
        raise ConfigError(
            f"eval.answer_pattern {config.eval.answer_pattern!r} has {groups} groups; accepted: exactly 1"
        )
    if config.eval.samples > 1 and config.eval.temperature == 0:
        raise ConfigError("eval.samples > 1 with eval.temperature 0: greedy answers are all the same")
    for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        value = getattr(config.eval, name)
        if value != off and config.eval.temperature == 0:
            raise ConfigError(
                f"eval.{name} is {value:g} with eval.temperature 0: greedy answers are not sampled; accepted then: "
                f"{off:g}, which is off"
            )
