"""``vlmpo evaluate``: a model on held-out pairs and questions; and its answers to questions while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from vlmpo.commands.run_data import RunData, open_eval, open_run_data, overlaps_with_training
from vlmpo.commands.train import evaluation_config, show_evaluation
from vlmpo.data.encode.processors import tokenizer_of
from vlmpo.data.index.overlap import Item
from vlmpo.data.readers.questions import QuestionSet, read_questions
from vlmpo.data.records import Question
from vlmpo.errors import RecipeError
from vlmpo.evaluate import FIGURES, Answer, answer_questions, compare, short_name, summarise
from vlmpo.fileio import replace_json, replace_json_lines
from vlmpo.generate.base import Sampling
from vlmpo.generate.local import LocalEngine
from vlmpo.log import logger, print_line, print_table
from vlmpo.loss import needs_reference
from vlmpo.models import loading
from vlmpo.recipe import EvaluateSection, Recipe
from vlmpo.train.metrics import length_warning
from vlmpo.train.trainer import MPOTrainer

RESULTS_FILE = "evaluation.json"
ANSWERS_FILE = "answers.jsonl"


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """Evaluate as the recipe's ``evaluate`` section says and return what is written to ``evaluation.json``.

    On held-out pairs: reward accuracy, margin and log-probs against the reference, by data set, with 95 % intervals.
    On questions: greedy accuracy by verifier, unparsed rate and mean length, beside a second model's if one is given.

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
    questions: Sequence[Question] = ()
    if pairs:
        results["pairs"] = _evaluate_pairs(recipe, section, model, processor, pairs, folder)
    if section.questions is not None:
        question_set = _read_questions(section)
        questions = question_set.questions
        results["questions"] = _evaluate_questions(recipe, section, path, model, processor, question_set, folder)
    if data is not None:
        overlaps = _overlaps(data, questions)
        if questions:
            results["questions"]["overlap"] = overlaps.pop("questions")
        results["overlap"] = overlaps
    replace_json(folder / RESULTS_FILE, results)
    console = Console()
    show_evaluation(console, results["pairs"])
    if results["questions"]:
        _show_questions(console, results["questions"])
    print_line(console, f"figures: {folder / RESULTS_FILE}")
    return results


def ask_while_training(recipe: Recipe) -> Callable[[MPOTrainer], None] | None:
    """Return what adds the recipe's questions to a trainer's evaluations; None if the recipe has no questions.

    Training itself is undisturbed: neither its random numbers nor delta change.
    """
    section = recipe.evaluate
    if section is None or section.questions is None:
        return None

    def prepare(trainer: MPOTrainer) -> None:
        questions = _read_questions(section).questions
        engine = _greedy_engine(recipe, section, trainer.model, trainer.processing_class)

        def ask() -> dict[str, float]:
            # Every rank asks its own whole copy of the model all questions: there is nothing to gather or to wait for.
            answers, _ = answer_questions(engine, questions, section.prompt, section.verifier)
            figures = summarise(answers, _token_counter(trainer.processing_class))
            return {f"answers/{name}": value for name, value in figures.items()}

        # The names must be known before the first evaluation.
        ask.metrics = [f"answers/{name}" for name in FIGURES]  # type: ignore[attr-defined]
        trainer.extra_evaluations.append(ask)

    return prepare


def _read_questions(section: EvaluateSection) -> QuestionSet:
    assert section.questions is not None
    question_set = read_questions(section.questions, section.image_root, split=section.split)
    for reason, count in question_set.counts().items():
        logger.info(f"note: {count} evaluation questions dropped as {reason}")
    return question_set


def _greedy_engine(recipe: Recipe, section: EvaluateSection, model: Any, processor: Any) -> LocalEngine:
    greedy = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=section.max_new_tokens)
    return LocalEngine(model, processor, greedy, section.batch_size, max_tiles=recipe.data.max_tiles)


def _token_counter(processor: Any) -> Callable[[str], int]:
    tokenizer = tokenizer_of(processor)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _evaluate_pairs(
    recipe: Recipe, section: EvaluateSection, model: Any, processor: Any, pairs: dict[str, Any], folder: Path
) -> dict[str, dict[str, float]]:
    """Return the metrics of each set of pairs, by name."""
    reference = None
    if needs_reference(recipe.loss.weights):
        reference = loading.load_model(section.reference or recipe.model.path, recipe.model.dtype)
    args = evaluation_config(recipe)
    args.output_dir = str(folder)
    trainer = MPOTrainer(model=model, ref_model=reference, args=args, processing_class=processor)
    results = {}
    for name, dataset in pairs.items():
        results[name] = trainer.evaluate(dataset, metric_key_prefix=name)
        if warning := length_warning(results[name], name):
            logger.info(f"note: {warning}")
    return results


def _overlaps(data: RunData, questions: Sequence[Question]) -> dict[str, Any]:
    """Return what training has seen of each set of pairs and of the questions; log it if there is any."""
    items = [Item(question.question, question.images, question.origin) for question in questions]
    overlaps = overlaps_with_training(data, {"questions": items} if items else None)
    for message in filter(None, (overlap.message(name) for name, overlap in overlaps.items())):
        logger.info(f"note: {message}")
    return {name: asdict(overlap) for name, overlap in overlaps.items()}


def _evaluate_questions(
    recipe: Recipe,
    section: EvaluateSection,
    path: str,
    model: Any,
    processor: Any,
    question_set: QuestionSet,
    folder: Path,
) -> dict[str, Any]:
    """Return the figures of the model's answers, those of the second model's, and their comparison."""
    answers: dict[str, list[Answer]] = {}
    results: dict[str, Any] = {"dropped": question_set.counts(), "models": {}}
    for name in [path] if section.against is None else [path, section.against]:
        if name != path:
            model, processor = loading.load_model(name, recipe.model.dtype), loading.load_processor(name)
        engine = _greedy_engine(recipe, section, model, processor)
        answers[name], errors = answer_questions(engine, question_set.questions, section.prompt, section.verifier)
        results["models"][name] = {**summarise(answers[name], _token_counter(processor)), "not_asked": len(errors)}
        file = folder / (ANSWERS_FILE if name == path else f"against_{ANSWERS_FILE}")
        replace_json_lines(file, [answer.to_json() for answer in answers[name]])
    if section.against is not None:
        results["comparison"] = compare(answers[path], answers[section.against])
    return results


def _show_questions(console: Console, results: dict[str, Any]) -> None:
    rows = [("model", "questions", "accuracy", "unparsed", "cut", "mean tokens")]
    for path, figures in results["models"].items():
        if not figures["items"]:
            rows.append((short_name(path), "0", "-", "-", "-", "-"))
            continue
        accuracy = f"{figures['accuracy']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}]"
        unparsed, cut = f"{figures['unparsed']:.1%}", f"{figures['cut']:.1%}"
        rows.append((short_name(path), str(figures["items"]), accuracy, unparsed, cut, f"{figures['mean_tokens']:.1f}"))
    print_table(console, "questions: greedy answers, 95 % intervals", rows)
    comparison = results.get("comparison")
    if comparison and comparison["items"]:
        print_line(
            console,
            f"difference: {comparison['difference']:+.3f} [{comparison['low']:+.3f}, {comparison['high']:+.3f}] "
            f"(paired bootstrap over {comparison['items']} questions)",
        )
