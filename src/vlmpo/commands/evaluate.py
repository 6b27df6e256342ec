"""``vlmpo evaluate``: a model on held-out pairs and questions; and its answers to questions while it trains."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmpo.commands.config import evaluation_config
from vlmpo.commands.guard import output_folder
from vlmpo.commands.report import never_failing, report_done
from vlmpo.commands.run_data import open_eval, open_run_data, overlaps_with_training
from vlmpo.commands.run_folder import MANIFEST
from vlmpo.data.encode.processors import tokenizer_of
from vlmpo.data.readers.questions import QuestionSet, read_questions
from vlmpo.data.records import Question
from vlmpo.errors import DataError, RecipeError, examples_by_reason, first_records
from vlmpo.evaluate import FIGURES, Answer, answer_questions, compare, short_name, summarise
from vlmpo.fileio import replace_json, replace_json_lines
from vlmpo.generate.base import Sampling
from vlmpo.generate.local import LocalEngine
from vlmpo.log import logger, print_line, print_table
from vlmpo.loss import needs_reference
from vlmpo.models.loading import load_model, load_processor
from vlmpo.models.masters import round_weights
from vlmpo.recipe import EvaluateSection, Recipe
from vlmpo.report.files import ANSWERS as ANSWERS_FILE
from vlmpo.report.files import ANSWERS_BEFORE
from vlmpo.report.write import PICTURE_FILE, REPORT_FILE
from vlmpo.train.config import MPOConfig
from vlmpo.train.metrics import FINAL, length_warning
from vlmpo.train.model_card import CARD_FILE, compared, update_results
from vlmpo.train.precision import choose_precision, reads_masters, recorded_precision
from vlmpo.train.trainer import MPOTrainer

RESULTS_FILE = "evaluation.json"


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """Evaluate as the recipe's ``evaluate`` section says and return what is written to ``evaluation.json``.

    On held-out pairs: reward accuracy, margin and log-probs against the reference, by data set, with 95 % intervals.
    On questions: greedy accuracy by verifier, unparsed rate and mean length, beside a second model's if one is given.

    Raises:
        VlmpoError: the recipe, the data or a model cannot be used.
    """
    section = recipe.evaluate or EvaluateSection()
    folder = Path(section.output_dir or Path(str(recipe.training["output_dir"])) / "evaluation")
    written = (RESULTS_FILE, ANSWERS_FILE, f"against_{ANSWERS_FILE}", REPORT_FILE, PICTURE_FILE)
    with output_folder(recipe, folder, "evaluate", "evaluate.output_dir", written):
        results = _evaluate(recipe, section, folder)
    if os.environ.get("RANK", "0") == "0":
        of_run = (folder.parent / MANIFEST).exists()  # the run's own report shows its evaluations
        report_done(folder.parent if of_run else folder)
    return results


def _evaluate(recipe: Recipe, section: EvaluateSection, folder: Path) -> dict[str, Any]:
    """Do what :func:`evaluate` does, in a folder that this process holds."""
    data = open_run_data(recipe) if recipe.data.train else None
    pairs = data.evaluation if data is not None else {"eval": open_eval(recipe)[0]} if recipe.data.eval else {}
    if not pairs and section.questions is None:
        raise RecipeError("nothing to evaluate on: give data.eval, data.hold_out or evaluate.questions")
    path = section.model or str(recipe.training["output_dir"])
    model, processor = _load(recipe, path)
    args, rounded = _settings_to_read_by(recipe, model)
    if rounded:
        round_weights(model)
    results: dict[str, Any] = {"model": path, "pairs": {}, "questions": {}}
    questions: Sequence[Question] = ()
    if pairs:
        results["pairs"] = _evaluate_pairs(recipe, args, model, processor, pairs, folder, rounded=rounded)
    if section.questions is not None:
        question_set = _read_questions(recipe, section)
        questions = question_set.questions
        answers, figures = _ask(recipe, section, model, processor, questions, check=True)
        models = {path: figures}
        replace_json_lines(folder / ANSWERS_FILE, [answer.to_json() for answer in answers])
        results["questions"] = {"dropped": question_set.counts(), "models": models}
        if section.against is not None:
            model, processor = _load(recipe, section.against, rounded=rounded)
            others, models[section.against] = _ask(recipe, section, model, processor, questions, check=True)
            replace_json_lines(folder / f"against_{ANSWERS_FILE}", [answer.to_json() for answer in others])
            results["questions"]["comparison"] = compare(answers, others)
        for figures in models.values():
            figures["not_asked"] = len(questions) - int(figures["items"])
    if data is not None:
        overlaps = overlaps_with_training(data, questions)
        if questions:
            results["questions"]["overlap"] = overlaps.pop("questions")
        results["overlap"] = overlaps
    replace_json(folder / RESULTS_FILE, results)
    show_pair_metrics(results["pairs"])
    if results["questions"]:
        _show_questions(results["questions"])
    print_line(f"figures: {folder / RESULTS_FILE}")
    if os.environ.get("RANK", "0") == "0":
        with never_failing("the model card's part on results"):
            _update_card(Path(path), results, section.against)
    return results


def _update_card(model: Path, results: Mapping[str, Any], against: str | None) -> None:
    """Put the figures into the model card beside the model that was evaluated, if vlmpo wrote it."""
    answers = None
    if (questions := results["questions"]) and (figures := questions["models"][str(results["model"])])["items"]:
        words = compared(short_name(against), questions["models"][against], questions["comparison"]) if against else ""
        answers = {**figures, "against": words}
    if update_results(model, results["pairs"], answers):
        print_line(f"model card, its results brought up to date: {model / CARD_FILE}")


def add_questions(trainer: MPOTrainer, recipe: Recipe) -> None:
    """Make the trainer answer the recipe's ``evaluate.questions`` at each of its evaluations.

    Training itself is undisturbed: neither its random numbers nor delta change.
    """
    section = recipe.evaluate
    assert section is not None
    questions = _read_questions(recipe, section).questions
    model, processor = trainer.model, trainer.encoder.processor  # not the one that is saved

    def answer() -> dict[str, float]:
        # Every rank has the whole model and answers all questions: there is nothing to gather or to wait for.
        answers, figures = _ask(recipe, section, model, processor, questions)
        if trainer.accelerator.is_main_process:
            with never_failing("the part of the report on answers"):
                name = ANSWERS_FILE if trainer.state.global_step else ANSWERS_BEFORE
                replace_json_lines(Path(trainer.args.output_dir) / name, [one.to_json() for one in answers])
        return {f"answers/{name}": value for name, value in figures.items()}

    # The names must be known before the first evaluation.
    answer.metrics = [f"answers/{name}" for name in FIGURES]  # type: ignore[attr-defined]
    trainer.extra_evaluations.append(answer)


def _load(recipe: Recipe, path: str, *, processor: bool = True, rounded: bool = False) -> tuple[Any, Any]:
    """Return the model at ``path``, its float32 weights ``rounded`` to bfloat16 or not, and its processor."""
    trusted = recipe.model.trust_remote_code
    model = load_model(path, recipe.model.dtype, trust_remote_code=trusted)
    if rounded:
        round_weights(model)
    return model, load_processor(path, trust_remote_code=trusted) if processor else None


def _settings_to_read_by(recipe: Recipe, model: Any) -> tuple[MPOConfig, bool]:
    """Return the settings to evaluate by, in the precision of the run that made the model if the recipe leaves it open.

    And whether models are to be rounded for it: those that only answer need no float32 weights beside what is read.
    """
    args = evaluation_config(recipe)
    precision = choose_precision(args, model, recorded_precision(args.output_dir))
    rounded = reads_masters(args, precision)
    if rounded:
        args.precision, args.bf16 = "auto", None
    elif precision in ("float32", "autocast") and not args.deepspeed:
        args.precision, args.bf16 = precision, None
    return args, rounded


def _evaluate_pairs(
    recipe: Recipe,
    args: MPOConfig,
    model: Any,
    processor: Any,
    pairs: dict[str, Any],
    folder: Path,
    *,
    rounded: bool,
) -> dict[str, dict[str, float]]:
    """Return the metrics of each set of pairs, by name."""
    reference = None
    if needs_reference(recipe.loss.weights):
        path = (recipe.evaluate.reference if recipe.evaluate else None) or recipe.model.path
        reference, _ = _load(recipe, path, processor=False, rounded=rounded)
    args.output_dir = str(folder)
    trainer = MPOTrainer(model=model, ref_model=reference, args=args, processing_class=processor)
    results = evaluate_sets(trainer, pairs)
    for warning in filter(None, (length_warning(metrics, name) for name, metrics in results.items())):
        logger.info(f"note: {warning}")
    return results


def evaluate_sets(trainer: MPOTrainer, pairs: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the metrics of the final model on each set of pairs, by name; they begin with the set's name.

    They are logged under names that begin with FINAL.
    """
    return {
        name: {
            key.removeprefix(FINAL): value
            for key, value in trainer.evaluate(dataset, metric_key_prefix=f"{FINAL}{name}").items()
        }
        for name, dataset in pairs.items()
    }


def _read_questions(recipe: Recipe, section: EvaluateSection) -> QuestionSet:
    assert section.questions is not None
    question_set = read_questions(
        section.questions, section.image_root, split=section.split, confine=recipe.data.confine
    )
    for reason, count in question_set.counts().items():
        logger.info(f"note: {count} evaluation questions dropped as {reason}")
    first = first_records(examples_by_reason(question_set.dropped))
    if not question_set.questions:
        raise DataError(
            f"{section.questions}: of {len(question_set.dropped)} questions none can be asked; the first: {first}"
        )
    if first:
        logger.info(f"note: the first questions dropped: {first}")
    if question_set.unread:
        logger.info(f"note: {question_set.unread_notice()}")
    return question_set


def _ask(
    recipe: Recipe,
    section: EvaluateSection,
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    check: bool = False,
) -> tuple[list[Answer], dict[str, float]]:
    """Return a model's greedy answers to the questions, and their figures; ``check`` model and processor first."""
    greedy = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=section.max_new_tokens)
    settings = recipe.data.model_dump(include={"max_tiles", "video_frames"})
    engine = LocalEngine(model, processor, greedy, section.batch_size, **settings)
    if check:
        engine.check_vision()
    answers, _ = answer_questions(engine, questions, section.prompt, section.verifier)
    tokenizer = tokenizer_of(processor)
    return answers, summarise(answers, lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))


# ---- tables ----


def show_pair_metrics(results: Mapping[str, Mapping[str, float]]) -> None:
    """Print reward accuracy and margin of each set of pairs, as a whole and by data set; without rewards the loss."""
    for name, metrics in results.items():
        if f"{name}_rewards/accuracies" not in metrics:
            if f"{name}_loss" in metrics:
                count = int(metrics[f"{name}_pairs"])
                print_line(f"{name}: loss {metrics[f'{name}_loss']:.4f} on {count} held-out examples")
            continue
        prefix = f"{name}_pairs/"
        sources = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]
        rows = [("data set", "pairs", "accuracy", "margin")]
        for label, suffix in [("all", ""), *((source, f"/{source}") for source in sources)]:
            accuracy, margin = (
                [metrics[f"{name}_rewards/{figure}{end}{suffix}"] for end in ("", "_low", "_high")]
                for figure in ("accuracies", "margins")
            )
            rows.append(
                (
                    label,
                    str(int(metrics[f"{name}_pairs{suffix}"])),
                    "{:.3f} [{:.3f}, {:.3f}]".format(*accuracy),
                    "{:+.3f} [{:+.3f}, {:+.3f}]".format(*margin),
                )
            )
        print_table(f"{name}: reward accuracy and margin, 95 % intervals", rows)


def _show_questions(results: dict[str, Any]) -> None:
    rows = [("model", "questions", "accuracy", "unparsed", "cut", "mean tokens")]
    for path, figures in results["models"].items():
        if not figures["items"]:
            rows.append((short_name(path), "0", "-", "-", "-", "-"))
            continue
        accuracy = f"{figures['accuracy']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}]"
        unparsed, cut = f"{figures['unparsed']:.1%}", f"{figures['cut']:.1%}"
        rows.append((short_name(path), str(figures["items"]), accuracy, unparsed, cut, f"{figures['mean_tokens']:.1f}"))
    print_table("questions: greedy answers, 95 % intervals", rows)
    comparison = results.get("comparison")
    if comparison and comparison["items"]:
        print_line(
            f"difference: {comparison['difference']:+.3f} [{comparison['low']:+.3f}, {comparison['high']:+.3f}] "
            f"(paired bootstrap over {comparison['items']} questions)",
        )
