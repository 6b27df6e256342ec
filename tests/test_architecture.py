"""The rules of the house, read from the source: which package may import which, and how long a function may grow."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import REPO

SOURCE = REPO / "src" / "vlmpo"
MODULES = sorted(SOURCE.rglob("*.py"))

# A module imports from its own floor and lower ones, and no two packages need each other. `vlmpo/__init__.py` only
# gathers the public names: it sits on the roof, and nothing inside the house imports from it.
FLOORS = [
    {"compat", "errors", "fileio", "log", "stats", "recipe", "recipe_yaml", "torchvision_shim"},
    {"data", "verifiers", "loss"},
    {"models"},
    {"tree"},
    {"train", "generate", "scoring"},
    {"pairs", "evaluate"},
    {"testing", "demo"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
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


def package_of(name: str) -> str:
    """`vlmpo.loss.sigmoid` -> `loss`; the package's own names belong to its `__init__`."""
    part = name.split(".")[1] if "." in name else "__init__"
    return part if part in FLOOR else "__init__"


def breaches(source: str, module: str) -> list[str]:
    """Imports of `module` (dotted, below vlmpo) that the house forbids."""
    package = module.split(".")[0]
    found = []
    for name in imported_names(ast.parse(source), f"vlmpo.{module}".rpartition(".")[0]):
        top = name.split(".")[0]
        if top == "trl":
            found.append(f"{module} imports {name}: trl is for tests and benchmarks")
        if package == "loss" and (top not in LOSS_MAY_IMPORT or (top == "vlmpo" and package_of(name) != "loss")):
            found.append(f"{module} imports {name}: the loss knows torch and itself only")
        if top == "vlmpo" and FLOOR[package_of(name)] > FLOOR[package]:
            found.append(f"{module} imports {name}: {package} lies below {package_of(name)}")
    return found


def package_needs(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which packages each package imports from, given the source of every module."""
    needs: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = imported_names(ast.parse(source), f"vlmpo.{module}".rpartition(".")[0])
        packages = {package_of(name) for name in names if name.split(".")[0] == "vlmpo"}
        needs.setdefault(module.split(".")[0], set()).update(packages - {module.split(".")[0]})
    return needs


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_one_way(path):
    module = dotted(path)
    assert module.split(".")[0] in FLOOR, f"{module} has no floor yet: give its package a place in FLOORS"
    assert breaches(path.read_text(encoding="utf-8"), module) == []


def test_no_two_packages_need_each_other():
    order = graphlib.TopologicalSorter(package_needs({dotted(p): p.read_text(encoding="utf-8") for p in MODULES}))
    assert "data" in list(order.static_order())  # raises CycleError, naming the packages


def test_a_cycle_is_seen():
    sources = {"train.trainer": "from vlmpo.generate import local", "generate.local": "import vlmpo.train.trainer"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(package_needs(sources)).prepare()


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from vlmpo.commands.train import train", "data.records"),
        ("import vlmpo.cli", "train.trainer"),
        ("from vlmpo import mpo_loss", "train.trainer"),
        ("def f():\n    from vlmpo.commands import train", "train.trainer"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vlmpo.tree import layout", "data.records"),
        ("from ..tree import layout", "data.records"),
        ("from vlmpo.data.records import PreferencePair", "loss"),
        ("import numpy", "loss"),
        ("from trl import DPOTrainer", "train.trainer"),
    ],
)
def test_a_breach_is_seen(source, module):
    assert len(breaches(source, module)) == 1


def test_what_is_allowed_is_let_through():
    source = "import torch\nfrom vlmpo.loss import dpo\n"
    assert breaches(source, "loss") == []
    assert breaches("from vlmpo.tree import layout\nfrom vlmpo.errors import DataError", "train.trainer") == []
    assert breaches("from vlmpo import torchvision_shim", "data.records") == []
    assert breaches("from vlmpo.generate import local", "evaluate") == []


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
