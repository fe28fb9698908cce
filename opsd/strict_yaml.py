"""YAML in which nothing is lost without a word."""

import os
from pathlib import Path
from typing import Any

import yaml

from opsd.errors import config_error
from opsd.files import read_file

MOST = 100_000
"""Entries; a few hundred bytes of aliases could stand for more than any memory holds."""


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """What the file holds; an empty mapping for an empty file.

    Raises:
        ConfigError: it cannot be read, is no YAML, or its aliases make it more than `MOST` entries, or endless.
    """
    kinds = (OSError, ValueError, RecursionError, yaml.YAMLError)
    with config_error(f"{path}: cannot be read as YAML", *kinds):
        loaded = yaml.load(read_file(Path(path)).decode(), _Loader)
        if _entries(loaded, {}) > MOST:
            raise ValueError(f"its aliases stand for over {MOST} entries")
    return {} if loaded is None else loaded


def _entries(value: Any, known: dict[int, int]) -> int:
    """How many entries `value` has if all its aliases are written out."""
    if not isinstance(value, list | tuple | set | dict):
        return 1
    if id(value) not in known:
        known[id(value)] = -1
        known[id(value)] = 1 + sum(_entries(v, known) for v in (value.values() if isinstance(value, dict) else value))
    if known[id(value)] < 0:
        raise ValueError("an alias stands within what it stands for")
    return known[id(value)]


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, where YAML's last one would silently win. What looks like a number
    or a date and is none, 5000 digits or a 99th of May, stays text, so that its option says what it takes."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError:
            return node.value

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node
