"""What a section of options is: how its values may be written, and how the help and the errors say what it takes."""

import os
import types
import typing
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """Options that belong together. `accepted` says of each what it takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """What the command line and YAML write in their own way: none, lists with commas, on and off, paths."""
        kind, optional = kind_of(cls.model_fields[str(info.field_name)])
        if isinstance(value, str):
            if optional and value.lower() in ("none", "null"):
                return None
            return [item.strip() for item in value.split(",")] if typing.get_origin(kind) is tuple else value
        if isinstance(value, bool):  # YAML reads a bare on or off as a truth value
            if kind in (int, float):
                raise ValueError("a truth value is no number")
            return ("off", "on")[value] if typing.get_origin(kind) is Literal else value
        return os.fspath(value) if isinstance(value, os.PathLike) else value


def option(default: Any, help: str, **limits: float) -> Any:
    """An option's default, its documentation and its range, spelt as in pydantic."""
    return Field(default, description=help, **limits)  # type: ignore[call-overload]


def kind_of(field: FieldInfo) -> tuple[Any, bool]:
    """The option's type without `| None`, and whether None is allowed."""
    hint: Any = field.annotation
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (kind,) = (a for a in typing.get_args(hint) if a is not type(None))
        return kind, True
    return hint, False


def accepted(field: FieldInfo) -> str:
    """What the option takes, as errors and the help say it: `int >= 1|none`."""
    kind, optional = kind_of(field)
    bounds, args = list(field.metadata), typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        text = "|".join(args)
    elif typing.get_origin(kind) is tuple and args[-1] is ...:
        text = "text, several separated by commas"
    elif typing.get_origin(kind) is tuple:
        number, *limits = typing.get_args(args[0])
        text, bounds = ",".join([number.__name__] * len(args)), limits[0].metadata
    else:
        text = {bool: "true|false", str: "text"}.get(kind, kind.__name__)
    limits = []
    for bound in bounds:
        for sign, name in ((">=", "ge"), (">", "gt"), ("<=", "le")):
            if hasattr(bound, name):
                limits.append(f"{sign} {getattr(bound, name):g}")
    return " ".join([text, " and ".join(limits)]).strip() + ("|none" if optional else "")
