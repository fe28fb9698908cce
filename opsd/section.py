"""What a section of options is: how its values are read, and how errors and the help say what it takes."""

from __future__ import annotations

import json
import os
import typing
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


def json_text(value: Any) -> Any:
    """A mapping as JSON, which is how an option holds it."""
    if isinstance(value, Mapping):
        with suppress(TypeError):
            return json.dumps(dict(value))
    return value


class Section(BaseModel):
    """Options that belong together. A validator's ValueError says what it accepts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """What the command line and YAML write in their own way: none, lists with commas, on and off, paths."""
        hint: Any = cls.model_fields[str(info.field_name)].annotation
        kinds = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
        origins = [typing.get_origin(kind) for kind in kinds]
        if isinstance(value, str):
            if type(None) in kinds and value.lower() in ("none", "null"):
                return None
            return [item.strip() for item in value.split(",")] if tuple in origins else value
        if isinstance(value, bool) and Literal in origins:  # YAML reads a bare on or off as a truth value
            return ("off", "on")[value]
        if isinstance(value, bool) and (int in kinds or float in kinds):
            return str(value)  # no number, as which pydantic would take it
        return os.fspath(value) if isinstance(value, os.PathLike) else value


def option(default: Any, help: str, **limits: float) -> Any:
    """An option's default, its documentation and its range, spelt as in pydantic."""
    return Field(default, description=help, **limits)  # type: ignore[call-overload]


def accepted(section: type[Section], name: str) -> str:
    """What the option takes, as errors and the help say it: `int >= 1|none`."""
    schema = section.model_json_schema()["properties"][name]
    return "|".join(_in_words(kind) for kind in schema.get("anyOf", [schema]))


def _in_words(schema: Mapping[str, Any]) -> str:
    """What a JSON schema admits."""
    if "enum" in schema:
        return "|".join(schema["enum"])
    if "prefixItems" in schema:
        kind, *limits = _in_words(schema["prefixItems"][0]).split(" ")
        return " ".join([",".join([kind] * len(schema["prefixItems"])), *limits])
    kinds = {"string": "text", "boolean": "true|false", "integer": "int", "number": "float", "null": "none"}
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<="}
    limits = [f"{sign} {_number(schema[limit])}" for limit, sign in signs.items() if limit in schema]
    kind = kinds.get(schema["type"], "text, several separated by commas")
    return f"{kind} {' and '.join(limits)}".strip()


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
