"""Counts every question, response and pair when pairs are made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vlmpo.errors import RecordError, examples_by_reason


@dataclass
class PairingReport:
    """Counts the questions, responses and pairs of one pairing.

    Attributes:
        stage: ``correctness`` or ``dropout-ntp``.
        questions: questions to be paired.
        responses: responses read.
        verdicts: judged responses: ``correct``, ``wrong``, ``unparsed``.
        outcomes: questions. Correctness: ``paired``, ``easy`` (all responses right), ``hard`` (none right, some wrong),
            ``unreadable`` (all unparsed), ``unpaired`` (some right, but every pair skipped), ``without_responses``.
            DropoutNTP: ``paired``, ``unpaired``, ``without_responses``.
        dropped: responses not used, by reason.
        errors: why questions could not be used.
        skipped: pairs not made, by reason.
        pairs: pairs made, by kind.
        aside: ids of the easy and the hard questions.
    """

    stage: str
    questions: int = 0
    responses: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    errors: list[RecordError] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    aside: dict[str, list[str]] = field(default_factory=lambda: {"easy": [], "hard": []})

    @property
    def dropped_questions(self) -> Counter[str]:
        """Return how many questions could not be used, by reason."""
        return Counter(error.reason for error in self.errors)

    @property
    def examples(self) -> dict[str, list[str]]:
        """Return the first messages under each reason of ``dropped_questions``."""
        return examples_by_reason(self.errors)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; counts of 0 are left out."""
        counts = ("verdicts", "outcomes", "dropped", "dropped_questions", "skipped", "pairs")
        return {
            "stage": self.stage,
            "questions": self.questions,
            "responses": self.responses,
            "parsed": self.verdicts["correct"] + self.verdicts["wrong"],
            **{name: {key: n for key, n in sorted(getattr(self, name).items()) if n} for name in counts},
            "pairs_total": self.pairs.total(),
            "examples": self.examples,
        }
