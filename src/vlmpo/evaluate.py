"""How well a model answers questions: greedy answers, held against the truth, with intervals and paired comparisons."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from vlmpo.data.records import Message, Question, Verdict
from vlmpo.errors import RecordError
from vlmpo.generate.local import Engine, GenerationRequest
from vlmpo.generate.prompts import prompt_text
from vlmpo.stats import paired_bootstrap, wilson
from vlmpo.verifiers.verifiers import verify

# What `summarise` can give; * stands for a verifier.
FIGURES = (
    *("items", "accuracy", "low", "high", "wrong", "unparsed", "cut", "mean_tokens"),
    *("accuracy/*", "items/*"),
)


@dataclass(frozen=True)
class Answer:
    """One answer to one question.

    Attributes:
        question: what was asked.
        text: the response.
        finish_reason: ``stop``, or ``length`` where it was cut.
        verdict: what the verifier says of it.
    """

    question: Question
    text: str
    finish_reason: str
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, one line of ``answers.jsonl``."""
        return {
            "question_id": self.question.id,
            "origin": self.question.origin,
            "truth": self.question.answer,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "status": self.verdict.status,
            "parsed": self.verdict.parsed,
            "verifier": self.verdict.verifier,
        }


def answer_questions(
    engine: Engine, questions: Sequence[Question], style: str, verifier: str = "auto"
) -> tuple[list[Answer], list[RecordError]]:
    """Ask ``engine`` each question once and judge what it says; and the questions that could not be asked.

    A question's own verifier goes before ``verifier``. The engine decides how tokens are drawn: greedily, if the
    figures shall say what the model holds for likeliest.
    """
    requests = [
        GenerationRequest(
            (Message("user", prompt_text(question, style)),), question.images, n=1, seed=0, origin=question.origin
        )
        for question in questions
    ]
    dropped: list[RecordError] = []
    responses = engine.generate(requests, on_bad=lambda _, error: dropped.append(error))
    answers = []
    for question, generated in zip(questions, responses, strict=True):
        for one in generated:
            verdict = verify(one.text, question.answer, question.verifier or verifier)
            answers.append(Answer(question, one.text, one.finish_reason, verdict))
    return answers, dropped


def summarise(answers: Sequence[Answer], count_tokens: Callable[[str], int]) -> dict[str, float]:
    """Figures of one model's answers.

    Returns:
        ``items``; ``accuracy`` with its 95 % Wilson interval ``low``, ``high`` (an unparsed answer is not correct);
        ``unparsed``, ``wrong`` and ``cut`` (reached the token limit) as shares; ``mean_tokens``; and
        ``accuracy/NAME`` for each verifier, where several decided. Without answers only ``items``, 0.
    """
    count = len(answers)
    if not count:
        return {"items": 0}
    statuses = [answer.verdict.status for answer in answers]
    right = statuses.count("correct")
    low, high = wilson(right, count)
    figures: dict[str, float] = {
        "items": count,
        "accuracy": right / count,
        "low": low,
        "high": high,
        "wrong": statuses.count("wrong") / count,
        "unparsed": statuses.count("unparsed") / count,
        "cut": sum(answer.finish_reason == "length" for answer in answers) / count,
        "mean_tokens": statistics.fmean(count_tokens(answer.text) for answer in answers),
    }
    names = sorted({answer.verdict.verifier for answer in answers})
    for name in names if len(names) > 1 else ():
        own = [answer.verdict.status == "correct" for answer in answers if answer.verdict.verifier == name]
        figures[f"accuracy/{name}"] = sum(own) / len(own)
        figures[f"items/{name}"] = len(own)
    return figures


def compare(mine: Sequence[Answer], other: Sequence[Answer], seed: int = 0) -> dict[str, float]:
    """Difference in accuracy on the questions both answered, with its 95 % paired bootstrap interval.

    Returns:
        ``items``, ``difference`` (mine - other), ``low``, ``high``, ``only_mine`` and ``only_other`` (questions that
        one alone got right); ``items`` alone, 0, where they share no question.
    """
    theirs = {answer.question.id: answer.verdict.status == "correct" for answer in other}
    both = [
        (answer.verdict.status == "correct", theirs[answer.question.id])
        for answer in mine
        if answer.question.id in theirs
    ]
    if not both:
        return {"items": 0}
    difference, low, high = paired_bootstrap([float(a) for a, _ in both], [float(b) for _, b in both], seed=seed)
    return {
        "items": len(both),
        "difference": difference,
        "low": low,
        "high": high,
        "only_mine": sum(a and not b for a, b in both),
        "only_other": sum(b and not a for a, b in both),
    }


def short_name(path: str) -> str:
    """A model's name for a table: the last parts of its path, and a few digits of the whole where that is cut."""
    parts = [part for part in re.split(r"[\\/]", path) if part]
    name = "/".join(parts[-2:])
    return name if len(name) <= 40 else f"{name[:32]}-{blake2b(path.encode(), digest_size=3).hexdigest()}"
