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
from pydantic.fields import FieldInfo

from opsd import options as sections
from opsd.errors import ConfigError
from opsd.presets import PRESETS, TINY
from opsd.section import Section, accepted

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
        by_section: dict[str, dict[str, Any]] = {}
        for name, value in options.items():
            section, _, option = name.partition(".")
            by_section.setdefault(section, {})[option] = value
        return self.model_copy(
            update={name: getattr(self, name).model_copy(update=values) for name, values in by_section.items()}
        )


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
        section, option, _ = _find(name)
        _build(section, {option: value}, together=False)  # also of what a later one hides
        user.setdefault(section, {})[option] = value
    model, data = _build("model", user.get("model", {})), _build("data", user.get("data", {}))
    if training:
        for section, values in _preset_settings(preset, model.path, data, complete).items():
            user[section] = {**values, **user.get(section, {})}
    else:
        for needed, value in (("model.path", model.path), ("data.eval", data.eval)):
            if not value:
                raise ConfigError(f"{needed} is not given: an evaluation needs a model and data with answers")
    made: dict[str, Any] = {name: _build(name, user.get(name, {})) for name in SECTIONS}
    # "tiny" is what there is without a model, and names its own: it must not stand beside that name in config.yaml.
    config = Config(**made, preset=preset if training and preset != "tiny" else None)
    if complete:
        _check_complete(config)
    return config if config.optim.lr else config.changed({"optim.lr": 5e-6 if config.lora.enabled else 1e-6})


def _build(section: str, values: Mapping[str, Any], *, together: bool = True) -> Any:
    """The section with these options, its other ones at their defaults; None where options do not go `together`, and
    need not."""
    try:
        return SECTIONS[section](**values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"] and not together:
            return None
        if not first["loc"]:
            raise ConfigError(str(first["ctx"]["error"])) from None
        name = str(first["loc"][0])
        field = SECTIONS[section].model_fields[name]
        raise ConfigError(f"{section}.{name} is {values[name]!r}; accepted: {accepted(field)}") from None


def _preset_settings(preset: Any, model_path: str | None, data: Any, complete: bool) -> Mapping[str, dict[str, Any]]:
    """The settings of `preset`, which has to go with what the user says of model and data."""
    if preset is not None and not (isinstance(preset, str) and preset in ("tiny", *PRESETS)):
        raise ConfigError(f"preset is {preset!r}; accepted: tiny, {', '.join(PRESETS)}")
    if preset == "tiny" and model_path:
        raise ConfigError(f"preset tiny is the embedded model and its data; model.path is {model_path!r}")
    named = [option for option in ("train", "eval") if getattr(data, option)]
    own = PRESETS.get(preset, {}) if preset else {}
    if not complete and preset != "tiny" and (model_path or named or preset):
        return own
    if model_path and not data.train:
        raise ConfigError("model.path is given without data.train: name a file with problem and solution")
    if named and not model_path:
        raise ConfigError(
            f"data.{named[0]} is given without model.path: the embedded tiny model only fits its own data"
        )
    if own and not model_path:
        raise ConfigError(f"preset {preset} needs a model.path and data.train")
    return own if model_path else TINY


def _check_complete(config: Config) -> None:
    """What has to be named for a run."""
    if config.teacher.kind == "model" and config.teacher.path is None:
        raise ConfigError("teacher.kind model needs teacher.path: a local directory or hub id")
    # Without a model.path it is the embedded set-up, which has data of its own.
    if config.eval.every and config.model.path and not config.data.eval:
        raise ConfigError(f"eval.every is {config.eval.every} without data.eval: name a file with problem and answer")


def unused_options(config: Config) -> list[str]:
    """Options that the user has set and that change nothing, since what they belong to is off: a line for each.

    Options at their defaults do not count, nor as the preset has them, so that a file of all options is as good as one
    of the few that matter.
    """
    off: dict[str, Iterable[str]] = {}  # what is off: the options that belong to it
    if not config.lora.enabled:
        off["lora.enabled is false"] = [f"lora.{name}" for name in sections.LoraConfig.model_fields]
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
        off["data.eval is none"] = [f"eval.{name}" for name in sections.EvalConfig.model_fields]
    values, default = config.options(), Config().options()
    preset = {s: _build(s, given) for s, given in PRESETS.get(config.preset or "", {}).items()}
    lines = []
    for why, options in off.items():
        for name in options:
            section, _, option = name.partition(".")
            expected = (default[name], getattr(preset.get(section), option, default[name]))
            if values[name] not in expected:
                lines.append(f"{name} is {_shown(values[name])}, which changes nothing, since {why}")
    return lines


def describe(accepts: Callable[[str], bool] = lambda name: True) -> str:
    """The options whose names `accepts` takes, with their defaults, as the help of the command line shows them."""
    lines = []
    for section, of in SECTIONS.items():
        chosen = {name: field for name, field in of.model_fields.items() if accepts(f"{section}.{name}")}
        if chosen:
            lines.append(f"\n{section}:")
        for name, field in chosen.items():
            head = f"  --{section}.{_dashed(name)}  [{accepted(field)}]  default {_shown(field.default)}"
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
    return _find(name)[2].annotation is bool


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
            close = difflib.get_close_matches(str(section), SECTIONS, n=4, cutoff=0.6)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(SECTIONS)}"
            raise ConfigError(f"{source}: unknown section {section!r}; {hint}")
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


def _find(name: str) -> tuple[str, str, FieldInfo]:
    """The section and the name of an option as a user spells it, and what it takes."""
    section, _, option = name.replace("-", "_").partition(".")
    if section in SECTIONS and option in SECTIONS[section].model_fields:
        return section, option, SECTIONS[section].model_fields[option]
    raise ConfigError(f"unknown option {name!r}; {_advice(section, option)}")


def _advice(section: str, option: str) -> str:
    """What there is instead of an option that does not exist, spelt as in the help."""
    known = [(s, _dashed(name)) for s, of in SECTIONS.items() for name in of.model_fields]
    spelt = _dashed(option or section)
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


def _dashed(name: str) -> str:
    return name.replace("_", "-")
