"""Measures how well a model answers questions: verified answers, with intervals and paired comparisons."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlmpo.data.records import Question, Verdict
from vlmpo.errors import RecordError
from vlmpo.generate.base import Engine
from vlmpo.generate.prompts import request_for
from vlmpo.hashing import content_hash
from vlmpo.stats import paired_bootstrap, wilson
from vlmpo.verifiers.verifiers import verify

# Names of the figures of `summarise`; * is the name of a verifier.
FIGURES = ("items", "accuracy", "low", "high", "wrong", "unparsed", "cut", "mean_tokens", "accuracy/*", "items/*")


@dataclass(frozen=True)
class Answer:
    """Holds one answer to one question.

    Attributes:
        question: the question.
        text: the response.
        finish_reason: ``stop``, or ``length`` if it was cut off.
        verdict: the verifier's verdict.
    """

    question: Question
    text: str
    finish_reason: str
    verdict: Verdict

    @property
    def is_correct(self) -> bool:
        return self.verdict.status == "correct"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, one line of ``answers.jsonl``."""
        return {
            "question_id": self.question.id,
            "origin": self.question.origin,
            "question": self.question.question,
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
    """Answer each question once and judge the answers; return also the errors of unusable questions.

    Args:
        engine: answers. It should take the most likely tokens (temperature 0).
        questions: a question's own verifier goes before ``verifier``.
        style: prompt style or template.
        verifier: see :func:`vlmpo.verify`.
    """
    dropped: list[RecordError] = []
    answers = []
    results = engine.generate([request_for(question, style) for question in questions])
    for question, result in zip(questions, results, strict=True):
        if isinstance(result, RecordError):
            dropped.append(result)
            continue
        for response in result:
            verdict = verify(response.judged_text, question.answer, question.verifier or verifier)
            answers.append(Answer(question, response.text, response.finish_reason, verdict))
    return answers, dropped


def summarise(answers: Sequence[Answer], count_tokens: Callable[[str], int]) -> dict[str, float]:
    """Summarise one model's answers.

    Returns:
        ``items``; ``accuracy`` with its 95 % Wilson interval ``low``, ``high`` (an unparsed answer is not correct);
        ``unparsed``, ``wrong`` and ``cut`` (reached the token limit) as shares; ``mean_tokens``; and
        ``accuracy/NAME`` and ``items/NAME`` for each verifier, if several decided. Without answers only ``items``, 0.
    """
    count = len(answers)
    if not count:
        return {"items": 0}
    statuses = [answer.verdict.status for answer in answers]
    correct = statuses.count("correct")
    low, high = wilson(correct, count)
    figures: dict[str, float] = {
        "items": count,
        "accuracy": correct / count,
        "low": low,
        "high": high,
        "wrong": statuses.count("wrong") / count,
        "unparsed": statuses.count("unparsed") / count,
        "cut": sum(answer.finish_reason == "length" for answer in answers) / count,
        "mean_tokens": statistics.fmean(count_tokens(answer.text) for answer in answers),
    }
    names = sorted({answer.verdict.verifier for answer in answers})
    for name in names if len(names) > 1 else ():
        judged = [answer.is_correct for answer in answers if answer.verdict.verifier == name]
        figures[f"accuracy/{name}"] = sum(judged) / len(judged)
        figures[f"items/{name}"] = len(judged)
    return figures


def compare(answers: Sequence[Answer], others: Sequence[Answer], seed: int = 0) -> dict[str, float]:
    """Compare two models on the questions that both answered.

    Returns:
        ``items``; ``difference``, the accuracy of ``answers`` less that of ``others``, with its 95 % paired bootstrap
        interval ``low``, ``high``; ``only_mine`` and ``only_other``, questions that only ``answers`` or only
        ``others`` got right. Without common questions only ``items``, 0.
    """
    other_correct = {answer.question.id: answer.is_correct for answer in others}
    pairs = [(a.is_correct, other_correct[a.question.id]) for a in answers if a.question.id in other_correct]
    if not pairs:
        return {"items": 0}
    difference, low, high = paired_bootstrap([float(a) for a, _ in pairs], [float(b) for _, b in pairs], seed=seed)
    return {
        "items": len(pairs),
        "difference": difference,
        "low": low,
        "high": high,
        "only_mine": sum(a and not b for a, b in pairs),
        "only_other": sum(b and not a for a, b in pairs),
    }


def short_name(path: str) -> str:
    """Shorten a model's path for a table: its last two parts, cut and with a few hash digits if they are long."""
    name = "/".join([part for part in re.split(r"[\\/]", path) if part][-2:])
    return name if len(name) <= 40 else f"{name[:32]}-{content_hash(path, size=3)}"
