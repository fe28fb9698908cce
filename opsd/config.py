"""The configuration of a run: read from defaults, a preset, a YAML file and the command line, before a model is loaded.

Later ones win in that order. What the options are, and what each takes, stands in `opsd.options`.
"""

from __future__ import annotations

import difflib
import json
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from opsd import options as sections
from opsd.errors import ConfigError, brief
from opsd.limits import beyond
from opsd.presets import PRESETS, TINY
from opsd.section import Section, accepted
from opsd.strict_yaml import read_yaml
from opsd.top_k_options import KINDS, PATHS, check_top_k

ABBREVIATED = {"learning-rate": "lr", "learnrate": "lr", "rank": "r"}
"""Names of options that one would expect, too far from ours to be found by their letters."""


class Config(BaseModel):
    """Every section's options."""

    model_config = ConfigDict(frozen=True)

    model: sections.ModelConfig = sections.ModelConfig()
    lora: sections.LoraConfig = sections.LoraConfig()
    data: sections.DataConfig = sections.DataConfig()
    prompts: sections.PromptsConfig = sections.PromptsConfig()
    rollout: sections.RolloutConfig = sections.RolloutConfig()
    teacher: sections.TeacherConfig = sections.TeacherConfig()
    objective: sections.ObjectiveConfig = sections.ObjectiveConfig()
    optim: sections.OptimConfig = sections.OptimConfig()
    eval: sections.EvalConfig = sections.EvalConfig()
    run: sections.RunConfig = sections.RunConfig()
    preset: str | None = None
    """Of `opsd.presets.PRESETS`, the one that lies below; what it sets is in the sections already."""

    def options(self) -> dict[str, Any]:
        """Every option's value by its dotted name."""
        return {f"{section}.{name}": value for section in SECTIONS for name, value in getattr(self, section)}

    def changed(self, options: Mapping[str, Any]) -> Config:
        """A copy with other values, which are not checked, for some dotted names."""
        update: dict[str, Section] = {}
        for name, value in options.items():
            section, _, option = name.partition(".")
            update[section] = update.get(section, getattr(self, section)).model_copy(update={option: value})
        return self.model_copy(update=update)


SECTIONS: dict[str, type[Section]] = {
    name: type(field.default) for name, field in Config.model_fields.items() if name != "preset"
}


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
        user.setdefault(section, {})[option] = _checked(section, option, value)  # also what a later one hides
    model, data = user.get("model", {}), user.get("data", {})
    if training:
        for section, values in _preset_settings(preset, model.get("path"), data, complete).items():
            user[section] = {**values, **user.get(section, {})}
    else:
        for needed, value in (("model.path", model.get("path")), ("data.eval", data.get("eval"))):
            if not value:
                raise ConfigError(f"{needed} is not given: an evaluation needs a model and data with answers")
    made: dict[str, Any] = {name: section(**user.get(name, {})) for name, section in SECTIONS.items()}
    # "tiny" is what there is without a model, and names its own: it must not stand beside that name in config.yaml.
    if made["teacher"].kind in KINDS and "tail_bucket" not in user.get("objective", {}):
        made["objective"] = made["objective"].model_copy(update={"tail_bucket": True})
    config = Config(**made, preset=preset if training and preset != "tiny" else None)
    _check_together(config, complete)
    return config if config.optim.lr else config.changed({"optim.lr": 5e-6 if config.lora.enabled else 1e-6})


def _checked(section: str, option: str, value: Any) -> Any:
    """`value` in the type of the option."""
    takes: Any
    try:
        checked = getattr(SECTIONS[section](**{option: value}), option)
        takes = beyond(SECTIONS[section], f"{section}.{option}", checked)
    except ValidationError as error:
        first = error.errors()[0]
        takes = first["ctx"]["error"] if first["type"] == "value_error" else accepted(SECTIONS[section], option)
    if takes is not None:
        raise ConfigError(f"{section}.{option} is {brief(value)}; accepted: {takes}") from None
    return checked


def _preset_settings(
    preset: Any, model_path: str | None, data: Mapping[str, Any], complete: bool
) -> Mapping[str, dict[str, Any]]:
    """The settings of `preset`, which has to go with what the user says of model and data."""
    if preset is not None and not (isinstance(preset, str) and preset in ("tiny", *PRESETS)):
        raise ConfigError(f"preset is {preset!r}; accepted: tiny, {', '.join(PRESETS)}")
    if preset == "tiny" and model_path:
        raise ConfigError(f"preset tiny is the embedded model and its data; model.path is {model_path!r}")
    named = [option for option in ("train", "eval") if data.get(option)]
    embedded = preset == "tiny" or not (model_path or named or preset)
    if (complete or embedded) and not model_path:
        if named:
            known = "the embedded tiny model only fits its own data"
            raise ConfigError(f"data.{named[0]} is given without model.path: {known}")
        if not embedded:
            raise ConfigError(f"preset {preset} needs a model.path and data.train")
    if complete and model_path and not data.get("train"):
        raise ConfigError("model.path is given without data.train: name a file with problem and solution")
    return TINY if embedded else PRESETS.get(preset or "", {})


def _check_together(config: Config, complete: bool) -> None:
    """Refuses options that contradict each other and, where they have to be `complete`, what is not named.

    Without a model.path it is the embedded set-up, which has data of its own.
    """
    teacher, objective, options = config.teacher, config.objective, config.eval
    if teacher.kind not in PATHS and teacher.path is not None:
        belongs = f"with teacher.kind {teacher.kind}, which has none; set teacher.kind model or leave it out"
        raise ConfigError(f"teacher.path is {teacher.path!r} {belongs}")
    check_top_k(config.options())
    if objective.tail_bucket and objective.top_k is None and teacher.kind not in KINDS:
        raise ConfigError("objective.tail_bucket is true without objective.top_k: it holds the mass outside the top k")
    for name in ("entry_clip", "token_clip", "top_k"):
        if objective.form == "sampled_token" and getattr(objective, name) is not None:
            raise ConfigError(f"objective.{name} has no meaning with objective.form sampled_token")
    for name in ("keep_best", "patience"):
        if (value := getattr(options, name)) and not options.every:
            needed = "set eval.every to the steps between two"
            raise ConfigError(f"eval.{name} is {_shown(value)} without eval.every: {needed}")
    if complete and teacher.kind in PATHS and teacher.path is None:
        raise ConfigError(f"teacher.kind {teacher.kind} needs teacher.path: {PATHS[teacher.kind]}")
    if complete and options.every and config.model.path and not config.data.eval:
        raise ConfigError(f"eval.every is {options.every} without data.eval: name a file with problem and answer")
    if options.temperature > 0:
        return
    if options.samples > 1:
        raise ConfigError("eval.samples > 1 with eval.temperature 0: greedy answers are all the same")
    for name in ("top_p", "top_k", "min_p"):
        value, off = getattr(options, name), sections.EvalConfig.model_fields[name].default
        if value != off:
            then = f"greedy answers are not sampled; accepted then: {off:g}, which is off"
            raise ConfigError(f"eval.{name} is {value:g} with eval.temperature 0: {then}")


DIVERGENCE = tuple(f"objective.{name}" for name in ("form", "beta", "entry_", "token_", "top_k", "tail_"))
"""How the names begin of what a recipe has its own options for."""


def unused_options(config: Config) -> list[str]:
    """Options that the user has set and that change nothing, since what they belong to is off: a line for each.

    Options at their defaults do not count, nor as the preset has them, so that a file of all options is as good as one
    of the few that matter.
    """
    teacher, recipe = config.teacher, config.objective.recipe
    evaluated = config.data.eval or not config.model.path or recipe  # the embedded set-up has its own data
    belongs: dict[str, tuple[Any, tuple[str, ...]]] = {  # to an option: whether that is on, and how names begin
        "lora.enabled": (config.lora.enabled, ("lora.",)),
        "teacher.kind": (teacher.kind == "ema", ("teacher.ema_",)),
        "teacher.reason_first": (teacher.reason_first, ("teacher.reason_max_", "prompts.reason", "prompts.analysis")),
        "objective.top_k": (config.objective.top_k, ("objective.top_k_from",)),
        "objective.form": (config.objective.form != "sampled_token", ("objective.beta",)),
        "objective.recipe": (config.objective.recipe is None, DIVERGENCE),
        "data.eval": (evaluated, ("eval.",)),
    }
    values, default = config.options(), Config().options()
    preset = {f"{s}.{name}": v for s, of in PRESETS.get(config.preset or "", {}).items() for name, v in of.items()}
    return [
        f"{name} is {_shown(value)}, which changes nothing, since {owner} is {_shown(values[owner])}"
        for owner, (on, beginnings) in belongs.items()
        for name, value in values.items()
        if not on and name.startswith(beginnings) and value not in (default[name], preset.get(name, default[name]))
    ]


def describe(accepts: Callable[[str], bool] = lambda name: True) -> str:
    """The options whose names `accepts` takes, with their defaults, as the help of the command line shows them."""
    lines = []
    for section, of in SECTIONS.items():
        chosen = {name: field for name, field in of.model_fields.items() if accepts(f"{section}.{name}")}
        if chosen:
            lines.append(f"\n{section}:")
        for name, field in chosen.items():
            head = f"  --{section}.{_dashed(name)}  [{accepted(of, name)}]  default {_shown(field.default)}"
            lines += textwrap.wrap(head, 110, subsequent_indent=" " * 8, break_on_hyphens=False)
            lines += textwrap.wrap(field.description or "", 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """A value as one would write it on the command line; text of several lines as JSON has it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, str):
        return json.dumps(value) if "\n" in value else value
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def to_yaml(config: Config) -> str:
    """`config` as YAML that `load_config` reads back."""
    plain = config.model_dump(mode="json")  # lists for tuples
    named = {"preset": config.preset} if config.preset else {}
    return yaml.safe_dump({**named, **{name: plain[name] for name in SECTIONS}}, sort_keys=False, allow_unicode=True)


def is_flag(name: str) -> bool:
    """Whether the option `name` (dotted) is true or false, so that it may stand alone on a command line."""
    section, option = _find(name)
    return SECTIONS[section].model_fields[option].annotation is bool


def yaml_options(path: str | Path | None) -> list[tuple[str, Any]]:
    """The (dotted option, value) pairs of a YAML file, as they stand there; none for None. A ConfigError names a file
    that cannot be read, or does not hold sections of options."""
    return _read(path)[1]


def _read(source: str | Path | Mapping[str, Any] | None) -> tuple[str | None, list[tuple[str, Any]]]:
    """The preset that `source` names, and its options."""
    if source is None:
        return None, []
    if isinstance(source, Mapping):
        name, loaded = "config", dict(source)
    elif isinstance(source, str | os.PathLike):
        name = str(source)
        loaded = read_yaml(source)
    else:
        raise ConfigError(f"config is {source!r}; accepted: the path of a YAML file, or a mapping of sections")
    preset = loaded.pop("preset", None) if isinstance(loaded, dict) else None
    return preset, _flatten(loaded, name)


def _flatten(nested: Any, source: str) -> list[tuple[str, Any]]:
    if not isinstance(nested, Mapping):
        raise ConfigError(f"{source}: expected sections ({', '.join(SECTIONS)}), got {brief(nested)}")
    options = []
    for section, values in nested.items():
        if section not in SECTIONS:
            close = difflib.get_close_matches(str(section), SECTIONS, n=4, cutoff=0.6)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(SECTIONS)}"
            raise ConfigError(f"{source}: unknown section {brief(section)}; {hint}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source}: section {section} should hold options, got {brief(values)}")
        spelt: dict[str, Any] = {}
        for name, value in values.items():
            # Dashes may stand for underscores, so that two keys can be one option.
            other = spelt.setdefault(str(name).replace("-", "_"), name)
            if other != name:
                raise ConfigError(f"{source}: section {section} has both {other} and {name}, which are the same option")
            options.append((f"{section}.{name}", value))
    return options


def _find(name: str) -> tuple[str, str]:
    """The section and the name of an option as a user spells it."""
    section, _, option = name.replace("-", "_").partition(".")
    if section in SECTIONS and option in SECTIONS[section].model_fields:
        return section, option
    raise ConfigError(f"unknown option {name!r}; {_advice(section, option)}")


def _advice(section: str, option: str) -> str:
    """What there is instead of an option that does not exist, spelt as in the help."""
    known = [(s, _dashed(name)) for s, of in SECTIONS.items() for name in of.model_fields]
    spelt = _dashed(option or section)
    spelt = ABBREVIATED.get(spelt, spelt)
    own, names = [name for s, name in known if s == section], {name for _, name in known}
    # In other sections, too: optim.temperature should suggest rollout.temperature.
    near = [spelt] if spelt in names else difflib.get_close_matches(spelt, sorted(names), n=4, cutoff=0.6)
    found = [(s, name) for s, name in known if name in near]
    found = [(s, name) for s, name in found if s == section] or found
    if found:
        return f"did you mean {' or '.join(f'{s}.{name}' for s, name in found)}?"
    if own:
        return f"known in {section}: {', '.join(f'{section}.{name}' for name in own)}"
    return f"options are spelt section.option; the sections: {', '.join(SECTIONS)}"


def _dashed(name: str) -> str:
    return name.replace("_", "-")
