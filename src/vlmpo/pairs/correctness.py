"""Responses to preference pairs by correctness: ``vlmpo pair correctness`` (MPO paper, section 3).

Both responses of a pair answer the same prompt and come from the same model, so what the trainer reads is what was
sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlmpo.data.readers.questions import read_questions
from vlmpo.data.records import Question, Response, Verdict
from vlmpo.errors import RecipeError, RecordError
from vlmpo.generate.keys import prompt_hash, seed_for
from vlmpo.generate.prompts import prompt_text
from vlmpo.generate.responses import PROMPT_HASH, RESPONSES_FILE, read_responses
from vlmpo.pairs.report import PairingReport, question_record, write_lines
from vlmpo.recipe import Recipe
from vlmpo.settings import QUESTION_FIELD
from vlmpo.verifiers.verifiers import choose_verifier, verify, words_of

PAIRS_FILE = "pairs_correctness.jsonl"
REPORT_FILE = "pair_report.json"

Record = dict[str, Any]


def run_correctness(recipe: Recipe) -> PairingReport:
    """Pair the responses that ``vlmpo sample`` left in ``build.output_dir``, as the recipe's ``build`` section says.

    Writes there ``pairs_correctness.jsonl``; ``easy.jsonl`` and ``hard.jsonl``, the questions that were answered right
    or wrong by every response, in the form of ``build.questions``; and ``pair_report.json``, the counts.

    Raises:
        RecipeError: no ``build`` section.
        DataError: no questions, no responses, or no pair to be made of them.
    """
    from vlmpo.commands.sample import build_section

    build = build_section(recipe)
    folder = Path(str(build.output_dir))
    found = read_questions(build.questions, build.image_root, split=build.split)
    responses = read_responses(folder / RESPONSES_FILE)
    records, report = pair_correctness(
        found.questions, responses, seed=build.seed, max_pairs=build.max_pairs, verifier=build.verifier
    )
    report.note_dropped(found.dropped)
    by_id = {question.id: question for question in found.questions}
    for outcome in ("easy", "hard"):
        aside = [question_record(by_id[id_]) for id_ in report.aside[outcome]]
        write_lines(folder / f"{outcome}.jsonl", aside)
    report.finish(folder, records, PAIRS_FILE, REPORT_FILE)
    return report


def pair_correctness(
    questions: Sequence[Question],
    responses: Iterable[Response],
    *,
    seed: int = 0,
    max_pairs: int = 15,
    verifier: str = "auto",
) -> tuple[list[Record], PairingReport]:
    """Pairs of a right response and one that is not, a question at a time.

    Chosen: responses whose final answer verifies and that ended by themselves. Rejected: of kind ``wrong``, those that
    ended with another answer; of kind ``format``, those of which no final answer can be read, or that were cut off
    without the right one. A response given twice to a prompt counts once.

    Skipped as ``contained`` is a pair whose rejected final answer holds, as whole words, the truth or the chosen one's
    final answer ("red and blue" beside "red"), or whose rejected text holds the whole chosen text: such a response is
    hardly wrong. (For option letters only the latter: other letters are words too.)

    The result depends on the set of questions and responses and on ``seed``, not on their order; the draw for one
    question does not depend on the others.

    Args:
        questions: with unique ids; ``verifier`` of a question goes before the argument.
        responses: to these questions; ``settings["prompt"]`` is the prompt style they were sampled with, without it
            the question's own text is the prompt.
        seed: which pairs are taken where there are more than ``max_pairs``.
        max_pairs: pairs a question at most.
        verifier: see :func:`vlmpo.verifiers.verifiers.verify`.

    Returns:
        Records of the pair files vlmpo trains on, by question id, and the counts.
    """
    report = PairingReport("correctness", questions=len(questions))
    given = by_question(questions, responses, report)
    records: list[Record] = []
    for question in sorted(questions, key=lambda question: question.id):
        own = given.get(question.id)
        if not own:
            report.outcomes["without_responses"] += 1
            continue
        try:
            judged = [_Judged(r, verify(r.text, question.answer, _verifier(question, verifier))) for r in own]
        except RecordError as error:
            report.note_dropped([error])
            continue
        made = _pairs(question, judged, report, seed, max_pairs)
        _note_outcome(question, judged, bool(made), report)
        records += made
    return records, report


def by_question(
    questions: Sequence[Question], responses: Iterable[Response], report: PairingReport
) -> dict[str, list[Response]]:
    """The responses by question id, each list sorted; what cannot be used is counted.

    Left out: responses to no question of these (``unknown_question``), to a question whose prompt now reads otherwise
    (``question_changed``), without text (``empty``), and texts given before by the same model to the same prompt
    (``duplicate``; one that was not cut off goes before one that was).
    """
    known = {question.id: question for question in questions}
    unlike: dict[tuple[str, str, str, str], Response] = {}
    for response in sorted(responses, key=_order):
        report.responses += 1
        question = known.get(response.question_id)
        key = (response.question_id, response.model, _style(response), response.text)
        if question is None:
            report.dropped["unknown_question"] += 1
        elif _changed(question, response):
            report.dropped["question_changed"] += 1
        elif not response.text.strip():
            report.dropped["empty"] += 1
        elif key in unlike:
            report.dropped["duplicate"] += 1
        else:
            unlike[key] = response
    found: dict[str, list[Response]] = {}
    for response in unlike.values():
        found.setdefault(response.question_id, []).append(response)
    return found


def prompt_of(question: Question, response: Response) -> str:
    """The user's turn that ``response`` answered, ``<image>`` where an image stands."""
    return prompt_text(question, _style(response))


def image_paths(question: Question) -> list[str]:
    """The question's images as the pair file names them. Raises RecordError for one that is no path."""
    for image in question.images:
        if not isinstance(image, str):
            detail = f"pairs name their images by path, this question holds a {type(image).__name__}; save it first"
            raise RecordError("image_not_a_path", question.origin, detail)
    return [str(Path(image).absolute()) for image in question.images]


# ---- one question ----


@dataclass(frozen=True)
class _Judged:
    response: Response
    verdict: Verdict

    @property
    def is_cut(self) -> bool:
        return self.response.finish_reason == "length"

    @property
    def group(self) -> tuple[str, str]:
        return self.response.model, _style(self.response)

    @cached_property
    def text_words(self) -> str:
        return _spaced(self.response.text)

    @cached_property
    def answer_words(self) -> str:
        return _spaced(self.verdict.parsed or "")


def _pairs(
    question: Question, judged: Sequence[_Judged], report: PairingReport, seed: int, max_pairs: int
) -> list[Record]:
    report.verdicts.update(one.verdict.status for one in judged)
    right = [one for one in judged if one.verdict.status == "correct"]
    if cut := sum(one.is_cut for one in right):
        report.dropped["unfinished"] += cut
    truth = _spaced(question.answer)
    candidates: dict[tuple[str, str, str], tuple[_Judged, _Judged]] = {}
    for chosen in right:
        for rejected in judged:
            if chosen.is_cut or rejected.verdict.status == "correct" or chosen.group != rejected.group:
                continue
            if _is_contained(chosen, rejected, truth):
                report.skipped["contained"] += 1
                continue
            key = (_style(chosen.response), chosen.response.text, rejected.response.text)
            candidates.setdefault(key, (chosen, rejected))
    pairs = list(candidates.values())
    taken = sorted(np.random.default_rng(seed_for(seed, question.id)).permutation(len(pairs))[:max_pairs].tolist())
    report.skipped["over_max_pairs"] += len(pairs) - len(taken)
    return [_record(question, pairs[index], report) for index in taken]


def _is_contained(chosen: _Judged, rejected: _Judged, truth: str) -> bool:
    if chosen.text_words in rejected.text_words:
        return True
    if rejected.verdict.parsed is None or chosen.verdict.verifier == "option":
        return False
    return any(answer.strip() and answer in rejected.answer_words for answer in (truth, chosen.answer_words))


def _spaced(text: str) -> str:
    """The words of ``text`` with a space around each: one such string holds another only as whole words."""
    return f" {' '.join(words_of(text))} "


def _record(question: Question, pair: tuple[_Judged, _Judged], report: PairingReport) -> Record:
    chosen, rejected = pair
    is_wrong = rejected.verdict.status == "wrong" and not rejected.is_cut
    kind = "wrong" if is_wrong else "format"
    report.pairs[kind] += 1
    images = image_paths(question)
    return {
        **({"image": images[0] if len(images) == 1 else images} if images else {}),
        "question": prompt_of(question, chosen.response),
        "chosen": chosen.response.text,
        "rejected": rejected.response.text,
        "question_id": question.id,
        "answer": question.answer,
        "chosen_parsed": chosen.verdict.parsed,
        "rejected_parsed": rejected.verdict.parsed,
        "kind": kind,
        "verifier": chosen.verdict.verifier,
        "model": chosen.response.model,
        "settings": chosen.response.settings,
        "samples": [chosen.response.sample_index, rejected.response.sample_index],
    }


def _note_outcome(question: Question, judged: Sequence[_Judged], is_paired: bool, report: PairingReport) -> None:
    statuses = {one.verdict.status for one in judged}
    if is_paired:
        outcome = "paired"
    elif statuses == {"correct"}:
        outcome = "easy"
    elif "correct" in statuses:
        outcome = "unpaired"
    else:
        outcome = "hard" if "wrong" in statuses else "unreadable"
    report.outcomes[outcome] += 1
    if outcome in report.aside:
        report.aside[outcome].append(question.id)


def _verifier(question: Question, default: str) -> str:
    """The verifier for this question. Raises RecordError, naming the question's line, where it cannot decide it."""
    try:
        return choose_verifier(question.answer, question.verifier or default)
    except RecordError as error:
        raise RecordError(error.reason, question.origin, error.detail) from None
    except RecipeError as error:
        if question.verifier is None:
            raise
        raise RecordError("unknown_verifier", question.origin, str(error)) from None


# ---- responses ----


def _order(response: Response) -> tuple[str, str, str, bool, int, str]:
    is_cut = response.finish_reason == "length"
    return response.question_id, response.model, _style(response), is_cut, response.sample_index, response.text


def _style(response: Response) -> str:
    return str(response.settings.get("prompt", QUESTION_FIELD))


def _changed(question: Question, response: Response) -> bool:
    stored = response.settings.get(PROMPT_HASH)
    return stored is not None and stored != prompt_hash(prompt_of(question, response))
