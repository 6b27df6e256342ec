"""Makes preference pairs by correctness: a right response and one that is not (MPO paper, section 3).

Both responses of a pair answer the same prompt and come from the same model, so the trainer reads what was sampled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from vlmpo.data.encode.continuations import THOUGHT_CLOSE, closes_unopened
from vlmpo.data.records import Question, Response, Verdict
from vlmpo.errors import RecipeError, RecordError
from vlmpo.generate.base import judged_text
from vlmpo.generate.responses import IN_THOUGHT
from vlmpo.pairs.records import Record, draw, pair_record, prompt_style, responses_by_question
from vlmpo.pairs.report import PairingReport
from vlmpo.verifiers.verifiers import choose_verifier, verify, words_of


def pair_correctness(
    questions: Sequence[Question],
    responses: Iterable[Response],
    *,
    seed: int = 0,
    max_pairs: int = 15,
    verifier: str = "auto",
) -> tuple[list[Record], PairingReport]:
    """Pair right responses with ones that are not, question by question.

    Chosen are responses whose final answer verifies and that the model ended itself. Rejected are, as kind ``wrong``,
    those that the model ended with another answer and, as kind ``format``, those without a readable final answer or
    cut off without the right one; the record of one that was cut off says ``rejected_complete: false``. A response
    repeated to the same prompt counts once. A thought that the prompt opens and the response never closes holds no
    final answer.

    A pair is skipped as ``contained`` if the rejected final answer contains, as whole words, the truth or the chosen
    final answer ("red and blue" beside "red"), or if the rejected text contains the whole chosen text: such a response
    is hardly wrong. (For option letters only the latter: other letters are words too.)

    The result depends on the set of questions and responses and on ``seed``, not on their order; the draw for one
    question does not depend on the others.

    Args:
        questions: with unique ids; a question's own ``verifier`` goes before the argument.
        responses: to these questions; ``settings["prompt"]`` is the prompt style they were sampled with. Without it
            the question's own text is the prompt.
        seed: decides which pairs are taken if there are more than ``max_pairs``.
        max_pairs: limit on the pairs of a question.
        verifier: see :func:`vlmpo.verify`.

    Returns:
        Records of the pair files vlmpo trains on, sorted by question id, and the counts.
    """
    report = PairingReport("correctness", questions=len(questions))
    grouped = responses_by_question(questions, responses, report)
    opened = _opened_thoughts([response for answers in grouped.values() for response in answers])
    records: list[Record] = []
    for question in sorted(questions, key=lambda question: question.id):
        if question.id not in grouped:
            report.outcomes["without_responses"] += 1
            continue
        try:
            name = verifier_of(question, verifier)
        except RecordError as error:
            report.errors.append(error)
            continue
        judged = [_Judged(r, verify(_judged_text(r, opened), question.answer, name)) for r in grouped[question.id]]
        report.verdicts.update(one.status for one in judged)
        new = _question_pairs(question, judged, report, seed, max_pairs)
        outcome = "paired" if new else _unpaired_outcome({one.status for one in judged})
        report.outcomes[outcome] += 1
        if outcome in report.aside:
            report.aside[outcome].append(question.id)
        records += new
    return records, report


@dataclass(frozen=True)
class _Judged:
    response: Response
    verdict: Verdict

    @property
    def is_cut(self) -> bool:
        return self.response.finish_reason == "length"

    @property
    def status(self) -> str:
        """Return the verdict's status; what was cut off may have been going to answer otherwise: it is not wrong."""
        return "unparsed" if self.is_cut and self.verdict.status == "wrong" else self.verdict.status

    @property
    def group(self) -> tuple[str, str]:
        """Return the model and the prompt style: only responses that share both are paired."""
        return _group(self.response)

    @cached_property
    def text_words(self) -> str:
        return _spaced_words(self.response.text)

    @cached_property
    def answer_words(self) -> str:
        return _spaced_words(self.verdict.parsed or "")


def _question_pairs(
    question: Question, judged: Sequence[_Judged], report: PairingReport, seed: int, max_pairs: int
) -> list[Record]:
    right = [one for one in judged if one.verdict.status == "correct"]
    if cut := sum(one.is_cut for one in right):
        report.dropped["unfinished"] += cut
    truth = _spaced_words(question.answer)
    candidates: dict[tuple[str, str, str], tuple[_Judged, _Judged]] = {}  # the same texts of two models count once
    for chosen in right:
        for rejected in judged:
            if chosen.is_cut or rejected.verdict.status == "correct" or chosen.group != rejected.group:
                continue
            if _is_contained(chosen, rejected, truth):
                report.skipped["contained"] += 1
                continue
            key = (prompt_style(chosen.response), chosen.response.text, rejected.response.text)
            candidates.setdefault(key, (chosen, rejected))
    records = []
    for chosen, rejected in draw(list(candidates.values()), question, seed, max_pairs, report):
        kind = "wrong" if rejected.status == "wrong" else "format"
        report.pairs[kind] += 1
        records.append(
            pair_record(
                question,
                chosen.response,
                rejected.response.text,
                answer=question.answer,
                chosen_parsed=chosen.verdict.parsed,
                rejected_parsed=rejected.verdict.parsed,
                kind=kind,
                verifier=chosen.verdict.verifier,
                model=chosen.response.model,
                settings=chosen.response.settings,
                samples=[chosen.response.sample_index, rejected.response.sample_index],
                **({"rejected_complete": False} if rejected.is_cut else {}),
            )
        )
    return records


def _group(response: Response) -> tuple[str, str]:
    return response.model, prompt_style(response)


def _opened_thoughts(responses: Sequence[Response]) -> set[tuple[str, str]]:
    """Return the models and prompt styles whose prompts open a thought.

    A server does not say it. The finished responses show it: at least half of them close a thought they did not open.
    """
    finished = [response for response in responses if response.finish_reason != "length"]
    every = Counter(map(_group, finished))
    closing = Counter(_group(response) for response in finished if closes_unopened(response.text))
    return {group for group, count in closing.items() if 2 * count >= every[group]}


def _judged_text(response: Response, opened: set[tuple[str, str]]) -> str:
    """Return the response as a verifier is to read it."""
    in_thought = response.settings.get(IN_THOUGHT) or (
        _group(response) in opened and THOUGHT_CLOSE not in response.text
    )
    return judged_text(response.text, bool(in_thought))


def _is_contained(chosen: _Judged, rejected: _Judged, truth: str) -> bool:
    if chosen.text_words in rejected.text_words:
        return True
    if rejected.verdict.parsed is None or chosen.verdict.verifier == "option":
        return False
    return any(answer.strip() and answer in rejected.answer_words for answer in (truth, chosen.answer_words))


def _spaced_words(text: str) -> str:
    """Join the words of ``text`` with a space around each, so that ``in`` finds whole words only."""
    return f" {' '.join(words_of(text))} "


def _unpaired_outcome(statuses: set[str]) -> str:
    if statuses == {"correct"}:
        return "easy"
    if "correct" in statuses:
        return "unpaired"
    return "hard" if "wrong" in statuses else "unreadable"


def verifier_of(question: Question, default: str) -> str:
    """Return the verifier for this question. Raise RecordError, naming the question's line, if it cannot decide it."""
    try:
        return choose_verifier(question.answer, question.verifier or default)
    except RecordError as error:
        raise RecordError(error.reason, question.origin, error.detail) from None
    except RecipeError as error:
        if question.verifier is None:
            raise
        raise RecordError("unknown_verifier", question.origin, str(error)) from None
