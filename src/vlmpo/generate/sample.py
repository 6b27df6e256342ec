"""Samples the responses that a file of responses does not contain yet."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from vlmpo.data.records import Question
from vlmpo.errors import DataError, RecordError, RunError, examples_by_reason
from vlmpo.generate.base import Engine, incomplete_batches
from vlmpo.generate.prompts import prompt_hash, prompt_text, request_for, seed_for
from vlmpo.generate.responses import ResponseFile
from vlmpo.log import Progress, logger

_HOPELESS = 20  # requests that fail before the first response: then it is not the records
_SUSPICIOUS = 8  # questions, each with nothing but identical responses, after which the user is warned


@dataclass
class SampleReport:
    """Counts what a run of ``vlmpo sample`` did.

    Attributes:
        read: records in the file of questions.
        questions: of these, the usable ones.
        dropped: errors of the records and requests that cannot be used.
        before: responses that were in the file already.
        written: responses added.
        repaired: bytes removed because a kill had cut off their line.
        finish_reasons: of the generated responses.
        asked: questions that got two or more responses in this run.
        identical: of these, the ones whose responses are all the same.
        seconds: time spent on generating.
    """

    read: int = 0
    questions: int = 0
    dropped: list[RecordError] = field(default_factory=list)
    before: int = 0
    written: int = 0
    repaired: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    identical: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values: dropped records as counts by reason, with examples."""
        return {
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "dropped"},
            "finish_reasons": dict(self.finish_reasons),
            "dropped": dict(Counter(error.reason for error in self.dropped)),
            "examples": examples_by_reason(self.dropped),
        }


def is_complete(file: ResponseFile, questions: Sequence[Question], samples: int) -> bool:
    """Return whether ``file`` contains ``samples`` responses to each of ``questions``."""
    return all(set(range(samples)) <= file.done.get(question.id, set()) for question in questions)


def check_prompts(file: ResponseFile, questions: Sequence[Question], style: str) -> None:
    """Raise RunError if a question's prompt is not the one its responses in ``file`` answer."""
    for question in questions:
        stored = file.prompt_hashes.get(question.id)
        if stored is not None and stored != prompt_hash(prompt_text(question, style)):
            raise RunError(
                f"{question.origin}: question {question.id!r} has changed since its responses in {file.path} "
                "were sampled; give the new question another id, or name another folder in build.output_dir"
            )


def sample_missing(
    engine: Engine,
    questions: Sequence[Question],
    file: ResponseFile,
    report: SampleReport,
    *,
    style: str,
    samples: int,
    seed: int,
    identical_cause: str | None,
) -> None:
    """Generate what ``file`` does not contain yet, in the order of ``questions``, and count it in ``report``.

    Args:
        engine: generates. Each batch of which anything is missing is generated whole (see ``incomplete_batches``).
        questions: all questions, also those already answered.
        file: the responses are appended to it, question by question.
        report: the run's counts.
        style: prompt style or template.
        samples: responses a question.
        seed: a response depends on it and on its question's id, not on the other questions.
        identical_cause: what may be wrong if all responses to a question are identical; None if nothing is.

    Raises:
        DataError: the first requests all failed.
        RunError: the engine cannot answer at all.
    """

    to_ask = incomplete_batches(questions, engine.batch_size, lambda question: is_complete(file, [question], samples))
    requests = [request_for(q, style, n=samples, seed=seed_for(seed, q.id)) for q in to_ask]
    started = time.perf_counter()
    with Progress("sampling", len(to_ask) * samples, "responses") as progress:
        for question, request, generated in zip(to_ask, requests, engine.generate(requests), strict=True):
            progress.advance(samples)
            if isinstance(generated, RecordError):
                report.dropped.append(generated)
                if not report.written and len(report.dropped) >= _HOPELESS and not report.before:
                    raise DataError(f"{_HOPELESS} requests failed and none succeeded; the last: {generated}")
                continue
            report.written += file.append(question.id, generated, prompt_hash(request.messages[0].text))
            report.finish_reasons.update(response.finish_reason for response in generated)
            if len(generated) >= 2:
                report.asked += 1
                report.identical += len({response.text for response in generated}) == 1
                if identical_cause is not None and report.asked == report.identical == _SUSPICIOUS:
                    logger.info(f"warning: {identical_warning(report, samples, identical_cause)}")
    report.seconds = time.perf_counter() - started
    for notice in engine.notices:
        logger.info(f"note: {notice}")


def identical_warning(report: SampleReport, samples: int, cause: str) -> str:
    """Describe how many questions got identical responses only."""
    return (
        f"{report.identical} of {report.asked} questions got {samples} identical answers {cause} "
        "Identical answers make no pairs"
    )
