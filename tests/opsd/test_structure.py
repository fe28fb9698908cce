"""The structure of the package: what keeps it a thin loop that one can read. Nothing here runs a model."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from opsd.recipes import make, names

PACKAGE = Path(__file__).parents[2] / "opsd"
FILES = sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".js", ".css", ".html", ".j2"))
ROOMS = {".".join(("opsd", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES
         if path.suffix == ".py"}  # fmt: skip

LONGEST, ALL = 320, 13314
CORE = {"opsd.step": 170, "opsd.loop": 225, "opsd.run": 130}
GROUND = ("opsd.errors", "opsd.presets", "opsd.section")

OPTIONAL = {
    "vllm",
    "datasets",
    "pyarrow",
    "peft",
    "matplotlib",
    "math_verify",
    "wandb",
    "trackio",
    "torch.utils.tensorboard",
    "resource",
}
"""What need not be installed, is not there on every system, or takes seconds and is seldom needed."""


def lines(path):
    return path.read_text(encoding="utf-8").count("\n")


def imports(room, *, deferred=False):
    """The modules that `room` imports at its top, or the ones within functions instead."""
    tree = ast.parse(ROOMS[room].read_text(encoding="utf-8"))
    within = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
              for node in ast.walk(function)}  # fmt: skip
    package = room.rpartition(".")[0]
    for node in ast.walk(tree):
        if (id(node) in within) != deferred:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*([package] if node.level else []), *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" if f"{base}.{alias.name}" in named() else base for alias in node.names)


def named():
    """Rooms by the names that imports call them."""
    return {room.removesuffix(".__init__"): room for room in ROOMS}


def graph():
    """Which rooms each room needs before it is there."""
    names = named()
    return {room: {names[name] for name in imports(room) if name in names} - {"opsd.__init__"} for room in ROOMS}


def test_no_room_needs_itself():
    needs = graph()
    assert sum(map(len, needs.values())) > 60  # the imports are seen at all
    done: set[str] = set()
    while ready := {room for room in needs.keys() - done if needs[room] <= done}:
        done |= ready
    assert not needs.keys() - done, f"these import each other in a circle: {sorted(needs.keys() - done)}"


def test_only_optional_packages_are_imported_late():
    late = [(room, name) for room in ROOMS for name in imports(room, deferred=True)]
    assert len(late) > 5
    allowed = {("opsd.__main__", "opsd.cli")}  # which says what to install before it imports it
    wrong = [(room, name) for room, name in late
             if (room, name) not in allowed
             and not any(name == package or name.startswith(f"{package}.") for package in OPTIONAL)]  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("room", GROUND)
def test_the_ground_floor_imports_nothing_above_it(room):
    assert not graph()[room]


def test_no_file_is_longer_than_one_can_read_in_one_sitting():
    assert len(FILES) > 30
    assert {path.name: lines(path) for path in FILES if lines(path) > LONGEST} == {}


def test_the_package_stays_thin():
    assert sum(map(lines, FILES)) <= ALL


@pytest.mark.parametrize(("room", "most"), CORE.items())
def test_the_core_stays_short(room, most):
    assert lines(ROOMS[room]) <= most


def test_recipes_need_torch_alone():
    absent = ("transformers", "pydantic", "yaml", "rich", "numpy", "filelock")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import opsd.recipes as r; print(r.names())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{names()}\n", done.stderr


@pytest.mark.parametrize(("name", "options", "said"), [
    ("opd", {}, "recipe is 'opd'; accepted: act_guide, anti_sd, "),
    ("lightning", {"beta": 1}, "recipe lightning has no option 'beta'; accepted: backend"),
])  # fmt: skip
def test_unknown_recipes_and_options_are_named(name, options, said):
    with pytest.raises(ValueError, match=said):
        make(name, **options)


def test_the_step_knows_no_option_of_a_recipe_a_teacher_or_an_engine():
    text = ROOMS["opsd.step"].read_text(encoding="utf-8")
    assert "config.rollout" in text
    assert not any(f"config.{section}" in text for section in ("objective", "teacher", "eval", "lora"))
    assert "isinstance" not in text
