"""Values of the right type that the machine cannot hold."""

import os
from errno import ENAMETOOLONG
from typing import Any

from opsd.section import Section, accepted

PATHS = ("model.path", "teacher.path", "data.train", "data.eval")
"""What a run reads."""


def beyond(section: type[Section], name: str, value: Any) -> str | None:
    """What is accepted instead of a number that torch, or a path that the system cannot hold; None for others."""
    if type(value) is int and value >= 2**63 and name != "run.seed":
        return f"{accepted(section, name.partition('.')[2])}, below 2**63"
    if name in (*PATHS, "run.dir") and value is not None:
        try:
            os.stat(value)
        except ValueError:
            return "a path without null characters"
        except OSError as error:
            return "a path that the system can take; this one is too long" if error.errno == ENAMETOOLONG else None
    return None
