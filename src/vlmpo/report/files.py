"""Read what a run folder, an evaluation folder or a demo's folder holds; what is absent or damaged is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlmpo.errors import RunError
from vlmpo.report.kept import KeptData, read_kept

ANSWERS = "answers.jsonl"
ANSWERS_BEFORE = "answers_before.jsonl"  # of the model before training
AGAINST = "against_answers.jsonl"  # of the second model of `vlmpo evaluate`
_MOST_LINES = 20_000  # of metrics that are parsed; of a longer file every second, third, ... line
_MOST_BYTES = 64 << 20  # of any other file


@dataclass
class Run:
    """Holds what the files of one run say.

    Attributes:
        folder: where they are.
        name: the folder's name.
        logs: the lines of ``metrics.jsonl``, in order.
        manifest, recipe: of the run; empty if there is none.
        recipe_text: the recipe as it was written.
        kept: margins and scored pairs.
        evaluations: contents of ``evaluation.json`` by folder.
        answers: (before, after) lists of answers to held-out questions.
        demo: a demo's results, if the run is one of its arms.
    """

    folder: Path
    name: str
    logs: list[dict[str, Any]] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    kept: KeptData | None = None
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ((), ())  # type: ignore[assignment]
    demo: dict[str, Any] = field(default_factory=dict)


DEMO_ARMS = ("sft_on_chosen", "dpo", "mpo")


def read_runs(folder: Path) -> list[Run]:
    """Return the run in ``folder``; of a demo's folder those of its arms.

    Raises:
        RunError: there is nothing to report on.
    """
    arms = [folder / "logs" / name for name in DEMO_ARMS]
    if (folder / "demo.json").exists() and any((arm / "metrics.jsonl").exists() for arm in arms):
        results = _object(folder / "results.json")
        runs = [_read(arm) for arm in arms if (arm / "metrics.jsonl").exists()]
        for run in runs:
            run.demo = results
        runs[-1].answers = _answers(folder)
        return runs
    run = _read(folder)
    if not (run.logs or run.manifest or run.evaluations):
        reason = "holds no run: neither metrics.jsonl nor manifest.json nor evaluation.json"
        raise RunError(f"{folder} {reason if folder.is_dir() else 'is no folder'}; name a run folder")
    return [run]


def _read(folder: Path) -> Run:
    text = _text(folder / "recipe.yaml")
    try:
        recipe = yaml.safe_load(text) or {}
    except (yaml.YAMLError, RecursionError):
        recipe = {}
    evaluations = {file.parent: _object(file) for file in sorted(folder.glob("*/evaluation.json"))}
    evaluations |= {file.parent: _object(file) for file in [folder / "evaluation.json"] if file.exists()}
    with_answers = [folder, *evaluations]
    return Run(
        folder=folder,
        name=folder.resolve().name,
        logs=list(_logs(folder / "metrics.jsonl")),
        manifest=_object(folder / "manifest.json"),
        recipe=recipe if isinstance(recipe, dict) else {},
        recipe_text=text,
        kept=read_kept(folder),
        evaluations={place.name: found for place, found in evaluations.items() if found},
        answers=next((found for found in map(_answers, with_answers) if found[1]), ([], [])),
    )


def _answers(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the answers before and after; in an evaluation the second model's are those before."""
    before = _lines(folder / ANSWERS_BEFORE) or _lines(folder / AGAINST)
    return before, _lines(folder / ANSWERS)


def _logs(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with file.open("rb") as lines:
            stride = 1 + sum(1 for _ in lines) // _MOST_LINES
            lines.seek(0)
            for number, line in enumerate(lines):
                if number % stride and b'"eval_' not in line:
                    continue
                found = _parsed(line)
                if found and isinstance(found.get("step"), int | float):
                    yield found
    except OSError:
        return


def _lines(file: Path) -> list[dict[str, Any]]:
    return [found for line in _text(file).splitlines() if (found := _parsed(line))]


def _object(file: Path) -> dict[str, Any]:
    return _parsed(_text(file)) or {}


def _parsed(text: str | bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # a line cut short by a kill
        return None
    return found if isinstance(found, dict) else None


def _text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(_MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
