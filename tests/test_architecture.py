"""The rules of the architecture, read from the source: who imports whom, who prints, how long a function may grow."""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.paths import REPO

SOURCE = REPO / "src" / "vlmpo"

# A module imports from its own floor and lower ones, and no two packages need each other. `vlmpo/__init__.py` only
# gathers the public names: it is the top floor, and no other module imports from it.
FLOORS = [
    {"compat", "errors", "fileio", "hashing", "interrupt", "log", "quiet", "recipe", "recipe_yaml", "settings", "stats"}
    | {"argument_kinds", "foreign_keys", "foreign_table", "options", "torchvision_shim"},
    {"data", "verifiers", "loss", "report"},
    {"models"},
    {"tree"},
    {"train", "generate", "scoring"},
    {"pairs", "evaluate"},
    {"testing", "demo"},
    {"commands"},
    {"cli", "exit_codes"},
    {"__init__", "__main__"},
]
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
MAX_FUNCTION_LINES = 100  # docstring not counted
LOSS_MAY_IMPORT = {"torch", "vlmpo", "__future__", "collections", "dataclasses", "math", "typing"}
RECIPE = {"recipe", "recipe_yaml"}
MAY_KNOW_THE_RECIPE = {"recipe", "recipe_yaml", "argument_kinds", "options", "commands", "cli"}
MAY_PRINT = {"log", "commands", "cli"}

MAY_PRINT_TOO: set[str] = set()
# Commands build the trainer and see it through; compat.py reads what transformers' Trainer keeps private.
MAY_TAKE_THE_TRAINER = {"commands", "compat"}
ALLOWED_CYCLES: list[set[str]] = []
ALLOWED_TO_TAKE_THE_TRAINER: set[str] = set()


# ---- reading the source ----


def dotted(path: Path) -> str:
    """`src/vlmpo/train/trainer.py` -> `train.trainer`, `src/vlmpo/train/__init__.py` -> `train.__init__`."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


MODULES = {dotted(path): path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}
each_module = pytest.mark.parametrize("module", MODULES)


@functools.cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def package_of(module: str) -> str:
    return module.split(".")[0]


def imported_names(source: str, module: str) -> Iterator[str]:
    """Full dotted names a module imports, wherever in it: lazy imports and those under TYPE_CHECKING count like any
    other, since a type from a higher floor is a dependency on it too."""
    inside = ["vlmpo", *module.split(".")[:-1]]  # the package the module is in
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = inside[: len(inside) - node.level + 1] + base
            yield from (".".join([*base, alias.name]) for alias in node.names)


def imported_packages(source: str, module: str) -> set[str]:
    """The packages of vlmpo a module imports from; a name that is in none of them is one of `vlmpo/__init__.py`."""
    names = (name.split(".") for name in imported_names(source, module))
    packages = {name[1] if len(name) > 1 else "__init__" for name in names if name[0] == "vlmpo"}
    return {package if package in FLOOR else "__init__" for package in packages}


def imported_modules(source: str, module: str, modules: Iterable[str]) -> set[str]:
    """Which of ``modules`` a module imports."""
    names = [name.removeprefix("vlmpo.") for name in imported_names(source, module) if name.startswith("vlmpo.")]
    return {other for other in modules if any(f"{name}.".startswith(f"{other}.") for name in names)} - {module}


# ---- floors ----


def floor_breaches(source: str, module: str) -> list[str]:
    """Imports of a module that its floor forbids."""
    package = package_of(module)
    packages = imported_packages(source, module)
    others = {name.split(".")[0] for name in imported_names(source, module)}
    found = [f"{package} is below {other}" for other in sorted(packages) if FLOOR[other] > FLOOR[package]]
    if "trl" in others:
        found.append("trl is for tests and benchmarks")
    if package == "loss" and (others - LOSS_MAY_IMPORT or packages - {"loss", "settings"}):
        found.append("the loss may import torch, vlmpo.settings and the standard library only")
    return found


@each_module
def test_imports_point_one_way(module):
    assert package_of(module) in FLOOR, f"give {package_of(module)} a place in FLOORS"
    assert floor_breaches(MODULES[module], module) == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from vlmpo.commands.train import train", "data.records"),
        ("import vlmpo.cli", "train.trainer"),
        ("from vlmpo import mpo_loss", "train.trainer"),
        ("def f():\n    from vlmpo.commands import train", "train.trainer"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vlmpo.tree import layout", "data.records"),
        ("from ..tree import layout", "data.records"),
        ("from vlmpo.errors import RecipeError", "loss"),
        ("import numpy", "loss"),
        ("from trl import DPOTrainer", "train.trainer"),
    ],
)
def test_an_import_from_a_higher_floor_is_found(source, module):
    assert len(floor_breaches(source, module)) == 1


def test_imports_from_the_same_and_lower_floors_are_allowed():
    assert floor_breaches("import torch\nfrom vlmpo.settings import MPO_WEIGHTS\n", "loss") == []
    assert floor_breaches("from vlmpo.tree import layout\nfrom vlmpo.errors import DataError", "train.trainer") == []
    assert floor_breaches("from vlmpo import torchvision_shim", "data.records") == []
    assert floor_breaches("from vlmpo.generate import local", "evaluate") == []


# ---- cycles ----


def package_graph(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """Which packages each package imports from."""
    graph: dict[str, set[str]] = {}
    for module, source in modules.items():
        package = package_of(module)
        graph.setdefault(package, set()).update(imported_packages(source, module) - {package})
    return graph


def cycles(modules: Mapping[str, str]) -> list[set[str]]:
    """Groups of modules that all import each other, directly or through others."""
    graph = {module: imported_modules(source, module, modules) for module, source in modules.items()}
    reached = {module: set(others) for module, others in graph.items()}
    for middle in graph:
        for others in reached.values():
            if middle in others:
                others |= reached[middle]
    groups = {frozenset(other for other in reached[module] if module in reached[other]) for module in reached}
    return sorted((set(group) for group in groups if group), key=sorted)


def test_no_two_packages_need_each_other():
    order = graphlib.TopologicalSorter(package_graph(MODULES))
    assert "data" in list(order.static_order())  # raises CycleError, naming the packages


def test_no_two_modules_need_each_other():
    assert cycles(MODULES) == ALLOWED_CYCLES


def test_a_cycle_is_found():
    modules = {"train.trainer": "from vlmpo.generate import local", "generate.local": "import vlmpo.train.trainer"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(package_graph(modules)).prepare()
    assert cycles(modules) == [{"train.trainer", "generate.local"}]
    three = {
        "tree.a": "from .b import f",
        "tree.b": "def f():\n    from vlmpo.tree import c",
        "tree.c": "if TYPE_CHECKING:\n    from vlmpo.tree.a import T",
        "tree.d": "import vlmpo.tree.a",
    }
    assert cycles(three) == [{"tree.a", "tree.b", "tree.c"}]
    assert cycles({**three, "tree.c": "from vlmpo.tree.ab import x"}) == []


# ---- who knows the recipe, who prints ----


def knows_the_recipe(source: str, module: str) -> bool:
    return package_of(module) not in MAY_KNOW_THE_RECIPE and bool(imported_packages(source, module) & RECIPE)


def prints(source: str, module: str) -> bool:
    calls = (node.func for node in ast.walk(parsed(source)) if isinstance(node, ast.Call))
    by_builtin = any(isinstance(function, ast.Name) and function.id == "print" for function in calls)
    by_rich = any(name.split(".")[0] == "rich" for name in imported_names(source, module))
    return package_of(module) not in MAY_PRINT and (by_builtin or by_rich)


def test_only_commands_know_the_recipe():
    assert {m for m, source in MODULES.items() if knows_the_recipe(source, m)} == set()


def test_only_commands_print():
    assert {m for m, source in MODULES.items() if prints(source, m)} == MAY_PRINT_TOO


def test_who_knows_the_recipe_and_who_prints_is_found():
    assert knows_the_recipe("def f():\n    from vlmpo.recipe_yaml import load_recipe", "train.trainer")
    assert knows_the_recipe("from vlmpo import recipe", "train.trainer")
    assert not knows_the_recipe("from vlmpo.recipe import Recipe", "commands.train")
    assert not knows_the_recipe("from vlmpo.settings import MPO_WEIGHTS", "train.trainer")
    assert prints("def f():\n    print(1)", "train.trainer")
    assert prints("from rich.console import Console", "train.trainer")
    assert not prints("print(1)", "commands.train")
    assert not prints("from vlmpo.log import logger\nlogger.info('print(1)')", "train.trainer")


# ---- functions ----


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def takes_the_trainer(source: str, module: str) -> bool:
    """Whether a function has a parameter named `trainer`: only the trainer's own module passes itself on."""
    every = [
        argument.arg
        for function in functions(source)
        for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    ]
    return module != "train.trainer" and package_of(module) not in MAY_TAKE_THE_TRAINER and "trainer" in every


def function_lengths(source: str) -> Iterator[tuple[str, int]]:
    """(name, lines) of every function, without its docstring and decorators."""
    for node in functions(source):
        lines = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
        yield node.name, lines


def test_functions_take_values_not_the_trainer():
    assert {m for m, source in MODULES.items() if takes_the_trainer(source, m)} == ALLOWED_TO_TAKE_THE_TRAINER


def test_a_function_that_takes_the_trainer_is_found():
    assert takes_the_trainer("class C:\n    def __init__(self, trainer): ...", "train.ema")
    assert takes_the_trainer("def f(*, trainer=None): ...", "train.ema")
    assert not takes_the_trainer("def f(trainer): ...", "train.trainer")
    assert not takes_the_trainer("def on_save(self, args, **kwargs): ...", "train.ema")


@each_module
def test_no_function_is_too_long(module):
    assert [(name, lines) for name, lines in function_lengths(MODULES[module]) if lines > MAX_FUNCTION_LINES] == []


def test_lengths_are_counted_without_the_docstring():
    source = 'def f(\n    x,\n):\n    """One\n\n    Two."""\n    return x\n'
    assert list(function_lengths(source)) == [("f", 4)]
