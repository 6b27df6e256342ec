"""``vlmpo evaluate``: a model on held-out pairs and on held-out questions; and the same while it trains."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmpo.commands.run_data import RunData, open_eval, open_run_data, overlaps_with_training
from vlmpo.commands.train import evaluation_config, show_evaluation
from vlmpo.data.encode.processors import tokenizer_of
from vlmpo.data.index.overlap import Item
from vlmpo.data.readers.questions import QuestionSet, read_questions
from vlmpo.data.records import Question
from vlmpo.errors import RecipeError
from vlmpo.evaluate import FIGURES, Answer, answer_questions, compare, short_name, summarise
from vlmpo.fileio import replace_json
from vlmpo.generate.local import LocalEngine, Sampling
from vlmpo.log import logger
from vlmpo.loss import needs_reference
from vlmpo.models import loading
from vlmpo.recipe import EvaluateSection, Recipe
from vlmpo.train.metrics import length_warning
from vlmpo.train.trainer import MPOTrainer

RESULTS_FILE = "evaluation.json"
ANSWERS_FILE = "answers.jsonl"


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """Evaluate as the recipe's ``evaluate`` section says; returns what is written to ``evaluation.json``.

    On held-out pairs: reward accuracy, margin, log-probs, by data set, with 95 % intervals, against the reference. On
    questions: greedy accuracy by verifier, unparsed rate, mean length, beside a second model's where one is given.

    Raises:
        VlmpoError: the recipe, the data or a model is at fault.
    """
    section = recipe.evaluate or EvaluateSection()
    data = open_run_data(recipe) if recipe.data.train else None
    pairs = data.evaluation if data is not None else {"eval": open_eval(recipe)[0]} if recipe.data.eval else {}
    if not pairs and section.questions is None:
        raise RecipeError("nothing to evaluate on: give data.eval, data.hold_out or evaluate.questions")
    folder = Path(section.output_dir or Path(str(recipe.training["output_dir"])) / "evaluation")
    path = section.model or str(recipe.training["output_dir"])
    model, processor = loading.load_model(path, recipe.model.dtype), loading.load_processor(path)
    results: dict[str, Any] = {"model": path, "pairs": {}, "questions": {}}
    asked: Sequence[Question] = ()
    if pairs:
        results["pairs"] = _evaluate_pairs(recipe, section, model, processor, pairs, folder)
    if section.questions is not None:
        found = evaluation_questions(section)
        asked = found.questions
        results["questions"] = _evaluate_questions(recipe, section, path, model, processor, found, folder)
    if data is not None:
        overlaps = _overlaps(data, asked)
        if asked:
            results["questions"]["overlap"] = overlaps.pop("questions")
        results["overlap"] = overlaps
    replace_json(folder / RESULTS_FILE, results)
    console = Console()
    show_evaluation(console, results["pairs"])
    _show_questions(console, results["questions"])
    console.print(f"figures: {folder / RESULTS_FILE}", markup=False, highlight=False, soft_wrap=True)
    return results


def evaluation_questions(section: EvaluateSection) -> QuestionSet:
    """The section's questions, those that cannot be used named to the user."""
    assert section.questions is not None
    found = read_questions(section.questions, section.image_root, split=section.split)
    for reason, count in found.counts().items():
        logger.info(f"note: {count} evaluation questions dropped as {reason}")
    return found


def ask_while_training(recipe: Recipe) -> Any:
    """What ``vlmpo train`` hangs on its trainer: the recipe's questions, asked at each evaluation.

    None where the recipe has no questions to evaluate on. Nothing of training is touched: no random numbers, no delta.
    """
    section = recipe.evaluate
    if section is None or section.questions is None:
        return None

    def prepare(trainer: MPOTrainer) -> None:
        questions = evaluation_questions(section).questions
        engine = _engine(recipe, section, trainer.model, trainer.processing_class)

        def ask() -> dict[str, float]:
            # Each rank asks all questions of its own whole copy of the model: nothing to gather, nothing to wait for.
            answers, _ = answer_questions(engine, questions, section.prompt, section.verifier)
            figures = summarise(answers, _counter(trainer.processing_class))
            return {f"answers/{name}": value for name, value in figures.items()}

        ask.metrics = [f"answers/{name}" for name in FIGURES]  # type: ignore[attr-defined]  # known before the first
        trainer.extra_evaluations.append(ask)

    return prepare


def _engine(recipe: Recipe, section: EvaluateSection, model: Any, processor: Any) -> LocalEngine:
    greedy = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=section.max_new_tokens)
    return LocalEngine(model, processor, greedy, section.batch_size, max_tiles=recipe.data.max_tiles)


def _counter(processor: Any) -> Any:
    tokenizer = tokenizer_of(processor)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _evaluate_pairs(
    recipe: Recipe, section: EvaluateSection, model: Any, processor: Any, pairs: dict[str, Any], folder: Path
) -> dict[str, dict[str, float]]:
    """Metrics of each set of pairs, by name."""
    with_preferences = needs_reference(recipe.loss.weights)
    reference = (
        loading.load_model(section.reference or recipe.model.path, recipe.model.dtype) if with_preferences else None
    )
    args = evaluation_config(recipe)
    args.output_dir = str(folder)
    trainer = MPOTrainer(model=model, ref_model=reference, args=args, processing_class=processor)
    results = {}
    for name, part in pairs.items():
        found = trainer.evaluate(part, metric_key_prefix=name)
        results[name] = found
        warning = length_warning(found, name)
        if warning:
            logger.info(f"note: {warning}")
    return results


def _overlaps(data: RunData, asked: Sequence[Question]) -> dict[str, Any]:
    """What training has seen of each set of pairs and of the questions; told to the user where there is any."""
    items = [Item(question.question, question.images, question.origin) for question in asked]
    found = overlaps_with_training(data, {"questions": items} if items else None)
    for message in filter(None, (overlap.message(name) for name, overlap in found.items())):
        logger.info(f"note: {message}")
    return {name: asdict(overlap) for name, overlap in found.items()}


def _evaluate_questions(
    recipe: Recipe, section: EvaluateSection, path: str, model: Any, processor: Any, found: QuestionSet, folder: Path
) -> dict[str, Any]:
    """Figures of the model's answers, the second model's, and their comparison."""
    folder.mkdir(parents=True, exist_ok=True)
    asked: dict[str, list[Answer]] = {}
    results: dict[str, Any] = {"dropped": found.counts(), "models": {}}
    for name in [path] if section.against is None else [path, section.against]:
        if name != path:
            model, processor = loading.load_model(name, recipe.model.dtype), loading.load_processor(name)
        engine = _engine(recipe, section, model, processor)
        answers, dropped = answer_questions(engine, found.questions, section.prompt, section.verifier)
        asked[name] = answers
        results["models"][name] = {**summarise(answers, _counter(processor)), "not_asked": len(dropped)}
        file = folder / (ANSWERS_FILE if name == path else f"against_{ANSWERS_FILE}")
        file.write_text("".join(json.dumps(answer.to_json()) + "\n" for answer in answers), encoding="utf-8")
    if section.against is not None:
        results["comparison"] = compare(asked[path], asked[section.against])
    return results


def _show_questions(console: Console, results: dict[str, Any]) -> None:
    if not results:
        return
    table = Table(title="questions: greedy answers, 95 % intervals", title_justify="left")
    for column in ("model", "questions", "accuracy", "unparsed", "cut", "mean tokens"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for path, figures in results["models"].items():
        if not figures["items"]:
            table.add_row(short_name(path), "0", *["-"] * 4)
            continue
        accuracy = f"{figures['accuracy']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}]"
        shares = (f"{figures[name]:.1%}" for name in ("unparsed", "cut"))
        table.add_row(
            short_name(os.fspath(path)), str(figures["items"]), accuracy, *shares, f"{figures['mean_tokens']:.1f}"
        )
    console.print(table)
    comparison = results.get("comparison")
    if comparison and comparison["items"]:
        console.print(
            f"difference: {comparison['difference']:+.3f} [{comparison['low']:+.3f}, {comparison['high']:+.3f}] "
            f"(paired bootstrap over {comparison['items']} questions)",
            markup=False,
            highlight=False,
        )
