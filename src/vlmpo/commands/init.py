"""``vlmpo init``: write a recipe fitted to the data and the model found."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from vlmpo.commands.init_fit import Fit, devices, fit
from vlmpo.commands.init_found import Found, find_data, find_model, near
from vlmpo.commands.init_text import IMAGES, MODEL, PAIRS, recipe_text
from vlmpo.errors import RecipeError
from vlmpo.fileio import writing
from vlmpo.log import print_line
from vlmpo.recipe_yaml import load_recipe, parse_recipe


def init(data: str | None, model: str | None, output: Path) -> None:
    """Write a recipe for ``data`` and ``model`` to ``output``; print what was found and the commands to go on with.

    Args:
        data: pairs, or questions to make pairs of; None: looked for near the current folder.
        model: a checkpoint; None: likewise.
        output: the recipe, which must not be there yet.

    Raises:
        VlmpoError: the recipe is there already, or what was named cannot be used.
    """
    _refuse_existing(output)
    found = Found()
    find_data(data, found)
    find_model(model, found)
    fitted = fit(found)
    fitted.notes = [*found.notes, *fitted.notes]
    text = recipe_text(fitted, found.model, output)
    parse_recipe(text)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            with output.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            _refuse_existing(output)
            raise
    load_recipe(output)
    print_line(f"recipe: {output}", style="bold")
    for line in [
        f"model: {near(found.model) if found.model else 'none found'}",
        *fitted.notes,
        *_to_fill_in(found, fitted),
    ]:
        print_line(f"  {' '.join(line.split())}")
    print_line("then:" if any(_to_fill_in(found, fitted)) else "go on with:")
    for command in _commands(fitted, output):
        print_line(f"  {command}")


def _refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        raise RecipeError(f"{output} is there already, and is not written over; name another file by --output")


def _to_fill_in(found: Found, fitted: Fit) -> Iterator[str]:
    if found.train is None:
        yield f"fill in data.train: {PAIRS} (no pairs and no questions were found here; or name them by --data)"
    if found.model is None:
        yield f"fill in model.path: {MODEL} (no checkpoint was found here; or name one by --model)"
    if fitted.needs_root:
        yield f"fill in image_root: {IMAGES}"


def _commands(fitted: Fit, output: Path) -> Iterator[str]:
    recipe = shlex.quote(str(output))
    if fitted.questions is not None:
        yield f"vlmpo sample {recipe}"
        yield f"vlmpo pair {'correctness' if fitted.with_answers else 'dropout-ntp'} {recipe}"
    yield f"vlmpo inspect {recipe}"
    if fitted.cache:
        yield f"vlmpo cache {recipe}"
    launcher = f"torchrun --nproc_per_node {devices()} -m " if devices() > 1 else ""
    yield f"{launcher}vlmpo train {recipe}"
    if fitted.hold_out or fitted.eval is not None:
        yield f"vlmpo evaluate {recipe}"
    else:
        yield f"vlmpo report {shlex.quote(os.path.join('runs', output.stem))}"
