"""As a command, prints the lower bounds of pyproject.toml as constraints for pip: what `make test-oldest` installs."""

from __future__ import annotations

import re
import sys
from itertools import chain
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[^]]*\])?>=(?P<version>[\w.]+)(?P<marker>\s*;.*)?")
_UNBOUNDED = re.compile(r"[\w.-]+(\[[^]]*\])?")  # any version, or the project's own extras


def lower_bounds(pyproject: Path) -> list[str]:
    """The constraint of each requirement of the project and its extras that has a lower bound, sorted.

    Raises:
        ValueError: a requirement has another form than `name>=version`, or two give one name different bounds.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    found: dict[str, str] = {}
    for requirement in [*project["dependencies"], *chain(*project["optional-dependencies"].values())]:
        match = _REQUIREMENT.fullmatch(requirement)
        if match is None:
            if _UNBOUNDED.fullmatch(requirement):
                continue
            raise ValueError(f"{pyproject}: requirement {requirement!r}, accepted: 'name' or 'name>=version'")
        constraint = f"{match['name']}=={match['version']}{match['marker'] or ''}"
        if found.setdefault(match["name"].lower(), constraint) != constraint:
            raise ValueError(f"{pyproject}: {constraint!r} and {found[match['name'].lower()]!r}, accepted: one bound")
    return sorted(found.values())


if __name__ == "__main__":
    print(*lower_bounds(Path(__file__).resolve().parent.parent / "pyproject.toml"), sep="\n")
