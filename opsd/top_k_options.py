"""Teachers of which the likeliest tokens alone are known, and the options that go with them."""

from collections.abc import Mapping
from typing import Any

from opsd.errors import ConfigError

KINDS = ("cached", "server")
"""Of `teacher.kind`: log-probabilities from files, or over HTTP."""

PATHS = {
    "model": "a local directory or hub id",
    "cached": "a directory of opsd cache-teacher",
    "server": "its address, such as http://localhost:8000",
}
"""What `teacher.path` is, by `teacher.kind`."""


def check_top_k(options: Mapping[str, Any]) -> None:
    """Refuses options by their dotted names that need all of the teacher's distribution, or the teacher itself.

    Raises:
        ConfigError: naming the option and what is accepted.
    """
    kind = options["teacher.kind"]
    if kind not in KINDS:
        return
    accepted: dict[str, Any] = {
        "objective.form": "full",
        "objective.recipe": None,
        "objective.top_k_from": "teacher",
        "teacher.reason_first": False,
    }
    if kind == "server":
        if options["objective.top_k"] is None:
            raise ConfigError("teacher.kind server needs objective.top_k, how many tokens to ask for at each position")
        accepted["objective.temperature"] = 1.0  # a server's prompt_logprobs are not tempered
    for name, value in accepted.items():
        if options[name] != value:
            only = "none" if value is None else str(value).lower()
            raise ConfigError(
                f"{name} is {options[name]!r} with teacher.kind {kind}, of which the likeliest tokens alone are known; "
                f"accepted: {only}"
            )
