"""Values of the right type that the machine cannot hold."""

import os
from errno import ENAMETOOLONG, ENOENT, ENOTDIR
from typing import Any

from opsd.section import Section, accepted

PATHS = ("model.path", "teacher.path", "data.train", "data.eval")
"""What a run reads."""


def beyond(section: type[Section], name: str, value: Any) -> str | None:
    """What is accepted instead of a number that torch, or a path that the system cannot hold; None for others."""
    if type(value) is int and value >= 2**63 and name != "run.seed":
        return f"{accepted(section, name.partition('.')[2])}, below 2**63"
    if name == "eval.scorer" and ".py:" in value:
        value = value.rpartition(":")[0]
    elif name not in (*PATHS, "run.dir"):
        return None
    if value is not None:
        try:
            os.stat(value)
        except ValueError:
            return "a path without null characters"
        except OSError as error:
            if error.errno == ENAMETOOLONG:
                return "a path that the system can take; this one is too long"
            # What is not there may yet be made, or asked of the hub.
            return None if error.errno in (ENOENT, ENOTDIR) else f"a path that can be reached; here: {error.strerror}"
    return None
