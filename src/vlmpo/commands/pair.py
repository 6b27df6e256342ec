"""``vlmpo pair``: from responses to preference pairs, by correctness or by DropoutNTP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmpo.commands.guard import output_folder
from vlmpo.commands.sample import build_section, open_engine, sampling_settings
from vlmpo.data.readers.questions import read_questions
from vlmpo.errors import DataError
from vlmpo.fileio import replace_json, replace_json_lines
from vlmpo.generate.base import Generated
from vlmpo.generate.responses import RESPONSES_FILE, open_responses, read_responses
from vlmpo.log import print_line, print_table
from vlmpo.pairs.correctness import pair_correctness
from vlmpo.pairs.dropout_ntp import pair_dropout_ntp
from vlmpo.pairs.records import Record, question_record
from vlmpo.pairs.report import PairingReport
from vlmpo.recipe import BuildSection, Recipe

CORRECTNESS_PAIRS, CORRECTNESS_REPORT = "pairs_correctness.jsonl", "pair_report.json"
DROPOUT_PAIRS, DROPOUT_REPORT = "pairs_dropout_ntp.jsonl", "dropout_ntp_report.json"
CONTINUATIONS_FILE = "continuations.jsonl"
_WRITTEN = (
    *("easy.jsonl", "hard.jsonl", CORRECTNESS_PAIRS, CORRECTNESS_REPORT),
    *(DROPOUT_PAIRS, DROPOUT_REPORT, CONTINUATIONS_FILE),
)


def correctness(recipe: Recipe) -> PairingReport:
    """Pair the responses that ``vlmpo sample`` left in ``build.output_dir``, as the recipe's ``build`` section says.

    Writes there ``pairs_correctness.jsonl``; ``easy.jsonl`` and ``hard.jsonl``, the questions that every response
    answered right or wrong, in the form of ``build.questions``; and ``pair_report.json``, the counts.

    Raises:
        RecipeError: there is no ``build`` section.
        DataError: there are no questions or no responses, or no pair can be made of them.
    """
    build = build_section(recipe)
    folder = Path(str(build.output_dir))
    with output_folder(recipe, folder, "pair", "build.output_dir", _WRITTEN):
        return _correctness(recipe, build, folder)


def _correctness(recipe: Recipe, build: BuildSection, folder: Path) -> PairingReport:
    questions = read_questions(build.questions, build.image_root, split=build.split, confine=recipe.data.confine)
    records, report = pair_correctness(
        questions.questions,
        read_responses(folder / RESPONSES_FILE),
        seed=build.seed,
        max_pairs=build.max_pairs,
        verifier=build.verifier,
    )
    report.errors += questions.dropped
    by_id = {question.id: question for question in questions.questions}
    for outcome, ids in report.aside.items():
        replace_json_lines(folder / f"{outcome}.jsonl", [question_record(by_id[id_]) for id_ in ids])
    _write_and_show(records, report, folder / CORRECTNESS_PAIRS, folder / CORRECTNESS_REPORT)
    return report


def dropout_ntp(recipe: Recipe) -> PairingReport:
    """Make DropoutNTP pairs of the responses that ``vlmpo sample`` left in ``build.output_dir``.

    Writes there ``pairs_dropout_ntp.jsonl``, ``dropout_ntp_report.json`` and, one by one, ``continuations.jsonl``: a
    second run after a stop generates only what is missing.

    Raises:
        RecipeError: there is no ``build`` section.
        DataError: there are no questions or no responses, or no pair can be made of them.
        ModelError, RunError: as :func:`vlmpo.commands.sample.open_engine`.
    """
    build = build_section(recipe)
    folder = Path(str(build.output_dir))
    with output_folder(recipe, folder, "pair", "build.output_dir", _WRITTEN):
        return _dropout_ntp(recipe, build, folder)


def _dropout_ntp(recipe: Recipe, build: BuildSection, folder: Path) -> PairingReport:
    questions = read_questions(
        build.questions, build.image_root, split=build.split, need_answer=False, confine=recipe.data.confine
    )
    responses = read_responses(folder / RESPONSES_FILE)
    engine = open_engine(recipe)
    with open_responses(folder / CONTINUATIONS_FILE, engine.name, sampling_settings(recipe)) as file:
        records, report = pair_dropout_ntp(
            questions.questions,
            responses,
            engine,
            keep=build.keep,
            seed=build.seed,
            max_pairs=build.max_pairs,
            verifier=build.verifier,
            known={r.question_id: Generated(r.text, r.finish_reason) for r in read_responses(file.path)},
            save=lambda key, continuation: file.append(key, [continuation]),
        )
    report.errors += questions.dropped
    _write_and_show(records, report, folder / DROPOUT_PAIRS, folder / DROPOUT_REPORT)
    return report


def _write_and_show(records: Sequence[Record], report: PairingReport, pairs_file: Path, report_file: Path) -> None:
    """Write the pairs and the report, and print the counts. Raise DataError if there is no pair."""
    replace_json_lines(pairs_file, records)
    replace_json(report_file, report.to_json())
    rows: list[tuple[str, int]] = []
    for label, total, counts in [
        ("questions", report.questions + len(report.errors), report.outcomes),
        ("  not used", len(report.errors), report.dropped_questions),
        ("responses", report.responses, report.verdicts),
        ("  not used", report.dropped.total(), report.dropped),
        ("pairs", report.pairs.total(), report.pairs),
        ("  not made", report.skipped.total(), report.skipped),
    ]:
        rows += [(label, total), *((f"    {name}", count) for name, count in sorted(counts.items()) if count)]
    print_table(f"pairs: {report.stage}", rows)
    for messages in report.examples.values():
        for message in messages:
            print_line(f"  {message}")
    print_line(f"{report.pairs.total()} pairs in {pairs_file}")
    if not records:
        raise DataError(
            f"{pairs_file.with_name(RESPONSES_FILE)}: no pair could be made; the reasons are in {report_file}"
        )
