"""The rules of the house, read from the source: which room may import which, and how long a function may grow."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import REPO

SOURCE = REPO / "src" / "vlmpo"
MODULES = sorted(SOURCE.rglob("*.py"))

# A module imports from its own storey and lower ones, and no two rooms need each other. `vlmpo/__init__.py` only
# gathers the public names: it sits on the roof, and nothing inside the house imports from it.
STOREYS = [
    {"errors", "files", "intervals", "recipe", "torchvision_shim"},
    {"data"},
    {"tree"},
    {"loss"},
    {"train", "build"},
    {"evaluate"},
    {"report", "demo"},
    {"cli"},
    {"__init__", "__main__"},
]
STOREY = {room: floor for floor, rooms in enumerate(STOREYS) for room in rooms}
MAX_FUNCTION_LINES = 60  # docstring not counted
LOSS_MAY_IMPORT = {"torch", "vlmpo", "__future__", "collections", "dataclasses", "math", "typing"}


def imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    """Full dotted names a module imports, wherever in it: lazily and under TYPE_CHECKING count like any other, since a
    type from above is a dependency on above too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], base]).rstrip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    """`vlmpo.loss.sigmoid` -> `loss`; the package's own names belong to its `__init__`."""
    part = name.split(".")[1] if "." in name else "__init__"
    return part if part in STOREY else "__init__"


def breaches(source: str, module: str) -> list[str]:
    """Imports of `module` (dotted, below vlmpo) that the house forbids."""
    room = module.split(".")[0]
    found = []
    for name in imported_names(ast.parse(source), f"vlmpo.{module}".rpartition(".")[0]):
        top = name.split(".")[0]
        if top == "trl":
            found.append(f"{module} imports {name}: trl is for tests and benchmarks")
        if room == "loss" and (top not in LOSS_MAY_IMPORT or (top == "vlmpo" and room_of(name) != "loss")):
            found.append(f"{module} imports {name}: the loss knows torch and itself only")
        if top == "vlmpo" and STOREY[room_of(name)] > STOREY[room]:
            found.append(f"{module} imports {name}: {room} lies below {room_of(name)}")
    return found


def room_needs(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which rooms each room imports from, given the source of every module."""
    needs: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = imported_names(ast.parse(source), f"vlmpo.{module}".rpartition(".")[0])
        rooms = {room_of(name) for name in names if name.split(".")[0] == "vlmpo"}
        needs.setdefault(module.split(".")[0], set()).update(rooms - {module.split(".")[0]})
    return needs


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_one_way(path):
    module = dotted(path)
    assert module.split(".")[0] in STOREY, f"{module} has no storey yet: give its room a place in STOREYS"
    assert breaches(path.read_text(encoding="utf-8"), module) == []


def test_no_two_rooms_need_each_other():
    order = graphlib.TopologicalSorter(room_needs({dotted(p): p.read_text(encoding="utf-8") for p in MODULES}))
    assert "data" in list(order.static_order())  # raises CycleError, naming the rooms


def test_a_cycle_is_seen():
    sources = {"train.run": "from vlmpo.build import sample", "build.engines": "import vlmpo.commands.train"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(room_needs(sources)).prepare()


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from vlmpo.commands.train import train", "data.encode"),
        ("import vlmpo.cli", "train.run"),
        ("from vlmpo import mpo_loss", "train.trainer"),
        ("def f():\n    from vlmpo.report import page", "train.run"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vlmpo.tree import layout", "data.encode"),
        ("from ..tree import layout", "data.encode"),
        ("from vlmpo.data.records import PreferencePair", "loss.mpo"),
        ("import numpy", "loss.terms"),
        ("from trl import DPOTrainer", "train.trainer"),
    ],
)
def test_a_breach_is_seen(source, module):
    assert len(breaches(source, module)) == 1


def test_what_is_allowed_is_let_through():
    source = "import torch\nfrom vlmpo.loss import terms\nfrom . import terms\nfrom vlmpo.loss import dpo\n"
    assert breaches(source, "loss.mpo") == []
    assert breaches("from vlmpo.tree import layout\nfrom vlmpo.errors import DataError", "train.trainer") == []
    assert breaches("from vlmpo import torchvision_shim", "data.encode") == []
    assert breaches("from vlmpo.train import run", "evaluate.answers") == []


def function_lengths(source: str) -> Iterator[tuple[str, int]]:
    """(name, lines) of every function; its docstring and decorators are not counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, lines


def test_lengths_are_counted_without_the_docstring():
    source = 'def f(\n    x,\n):\n    """One\n\n    Two."""\n    return x\n'
    assert list(function_lengths(source)) == [("f", 4)]


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_function_fits_a_screen(path):
    long = [(n, k) for n, k in function_lengths(path.read_text(encoding="utf-8")) if k > MAX_FUNCTION_LINES]
    assert long == []
