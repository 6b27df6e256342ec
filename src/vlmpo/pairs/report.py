"""What became of every question and response when pairs were made, and the files they are written to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmpo.data.records import Question
from vlmpo.errors import DataError, RecordError
from vlmpo.fileio import replace_json, replace_text
from vlmpo.generate.responses import RESPONSES_FILE

_EXAMPLES = 3  # records named under each reason


@dataclass
class PairingReport:
    """The counts of one pairing.

    Attributes:
        stage: ``correctness`` or ``dropout-ntp``.
        questions: that were to be paired.
        responses: that were read.
        verdicts: of the responses that were judged: ``correct``, ``wrong``, ``unparsed``.
        outcomes: of the questions. Correctness: ``paired``, ``easy`` (all right), ``hard`` (none right, some wrong),
            ``unreadable`` (all unparsed), ``unpaired`` (right ones there, but every pair skipped),
            ``without_responses``. DropoutNTP: ``paired``, ``unpaired``, ``without_responses``.
        dropped: responses that were not used, by reason.
        dropped_questions: questions that cannot be used, by reason.
        skipped: pairs that were not made, by reason.
        pairs: pairs that were made, by kind.
        aside: ids of the easy and the hard questions.
        examples: the first messages under each reason of ``dropped_questions``.
    """

    stage: str
    questions: int = 0
    responses: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_questions: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    aside: dict[str, list[str]] = field(default_factory=lambda: {"easy": [], "hard": []})
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note_dropped(self, errors: Sequence[RecordError]) -> None:
        """Count questions that cannot be used."""
        for error in errors:
            self.dropped_questions[error.reason] += 1
            messages = self.examples.setdefault(error.reason, [])
            if len(messages) < _EXAMPLES:
                messages.append(str(error))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; counts of 0 are left out."""
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

    def finish(self, folder: Path, records: Sequence[dict[str, Any]], pairs_file: str, report_file: str) -> None:
        """Write the pairs and this report into ``folder``, and print the counts.

        Raises:
            DataError: there is no pair; the report is written all the same.
        """
        write_lines(folder / pairs_file, records)
        replace_json(folder / report_file, self.to_json())
        self.show(Console(), folder / pairs_file)
        if not records:
            raise DataError(f"{folder / RESPONSES_FILE}: no pair could be made; {report_file} there says why")

    def show(self, console: Console, pairs_file: Path) -> None:
        """Print the counts as a table, and the first messages under each reason."""
        table = Table(title=f"pairs: {self.stage}", title_justify="left", show_header=False)
        table.add_column(justify="left")
        table.add_column(justify="right")
        for label, total, counts in [
            ("questions", self.questions + self.dropped_questions.total(), self.outcomes),
            ("  not used", self.dropped_questions.total(), self.dropped_questions),
            ("responses", self.responses, self.verdicts),
            ("  not used", self.dropped.total(), self.dropped),
            ("pairs", self.pairs.total(), self.pairs),
            ("  not made", self.skipped.total(), self.skipped),
        ]:
            table.add_row(label, str(total))
            for name, count in sorted(counts.items()):
                if count:
                    table.add_row(f"    {name}", str(count))
        console.print(table)
        for messages in self.examples.values():
            for message in messages:
                console.print(f"  {message}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"{self.pairs.total()} pairs in {pairs_file}", markup=False, highlight=False, soft_wrap=True)


def question_record(question: Question) -> dict[str, Any]:
    """The question as a line of a file of questions, images by absolute path."""
    images = [str(Path(image).absolute()) for image in question.images]
    record = {
        "id": question.id,
        "image": images[0] if len(images) == 1 else images or None,
        "question": question.question,
        "answer": question.answer,
        "verifier": question.verifier,
        "split": question.split,
    }
    return {key: value for key, value in record.items() if value is not None}


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, in place of what was there: whole or not at all."""
    replace_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
