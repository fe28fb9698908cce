"""YAML in which nothing is lost without a word."""

import os
from pathlib import Path
from typing import Any

import yaml

from opsd.errors import config_error


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """What the file holds; an empty mapping for an empty file.

    Raises:
        ConfigError: it cannot be read, or is no YAML.
    """
    kinds = (OSError, ValueError, RecursionError, yaml.YAMLError)
    with config_error(f"{path}: cannot be read as YAML", *kinds):
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    return {} if loaded is None else loaded


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
