"""Makes preference pairs without a checkable answer: DropoutNTP (MPO paper, section 3).

Chosen is the response. Its first half is kept and continued by the model WITHOUT the image; kept half and continuation
together are rejected, since a model that cannot see the image tends to make things up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vlmpo.data.encode.continuations import THOUGHT_CLOSE, THOUGHT_OPEN
from vlmpo.data.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Message, Question, Response
from vlmpo.errors import RecordError
from vlmpo.generate.base import Engine, Generated, GenerationRequest, incomplete_batches, judged_text
from vlmpo.generate.prompts import prompt_hash, seed_for
from vlmpo.generate.responses import IN_THOUGHT
from vlmpo.log import Progress, logger
from vlmpo.pairs.correctness import verifier_of
from vlmpo.pairs.records import Record, draw, pair_record, prompt_of, responses_by_question
from vlmpo.pairs.report import PairingReport
from vlmpo.verifiers.verifiers import verify

# A word with the white space before it; in scripts written without spaces, a character.
_WORD = re.compile(r"\s*(?:[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+)")
_PLACEHOLDER = re.compile(rf"(?:{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER})\n?")

Save = Callable[[str, Generated], object]  # takes the key of a continuation, and the continuation


def pair_dropout_ntp(
    questions: Sequence[Question],
    responses: Iterable[Response],
    engine: Engine,
    *,
    keep: float = 0.5,
    seed: int = 0,
    max_pairs: int = 15,
    verifier: str = "auto",
    known: Mapping[str, Generated] | None = None,
    save: Save = lambda key, generated: None,
) -> tuple[list[Record], PairingReport]:
    """Pair each response with its first part continued without the image.

    Each is cut between two words, after ``keep`` of its words (rounded down, at least one). Not used are responses that
    were cut off (``unfinished_response``), of one word (``too_short``), to a question without image (``text_only``) or
    of nothing but images (``empty_prompt``), and those of which the question's answer says that they are wrong
    (``wrong_response``): they would be learned. One that cannot be judged is taken as it is. A continuation makes no
    pair if it is empty (``no_continuation``), was cut off (``unfinished``) or repeats the response (``identical``), nor
    does a request that the engine cannot process (the error's reason).

    Args:
        questions, responses, seed, max_pairs, verifier: as in :func:`vlmpo.pairs.correctness.pair_correctness`.
        engine: continues the kept parts, drawing tokens as it was set up to.
        keep: the part of a response's words that is kept, between 0 and 1, both excluded.
        known: continuations that exist already, by the key with which ``save`` was called.
        save: called with each new continuation when it is ready.

    Returns:
        Records of the pair files vlmpo trains on, sorted by question id, and the counts.
    """
    report = PairingReport("dropout-ntp", questions=len(questions))
    grouped = responses_by_question(questions, responses, report)
    cuts = [
        cut
        for question in sorted(questions, key=lambda question: question.id)
        for cut in _cuts(question, grouped.get(question.id, []), keep, seed, max_pairs, verifier, report)
    ]
    continued = dict(known or {})
    to_continue = incomplete_batches(cuts, engine.batch_size, lambda cut: cut.key in continued)
    with Progress("continuing without images", len(to_continue), "responses") as progress:
        results = engine.generate([cut.request(seed) for cut in to_continue])
        for cut, result in zip(to_continue, results, strict=True):
            progress.advance(1)
            if isinstance(result, RecordError):
                report.skipped[result.reason] += 1
            elif cut.key not in continued:
                continued[cut.key] = result[0]
                save(cut.key, continued[cut.key])
    for notice in engine.notices:
        logger.info(f"note: {notice}")
    records = []
    for cut in cuts:
        if cut.key not in continued:
            continue
        unfit = _unfit(cut, continued[cut.key])
        if unfit is not None:
            report.skipped[unfit] += 1
            continue
        report.pairs["dropout_ntp"] += 1
        records.append(
            pair_record(
                cut.question,
                cut.response,
                cut.kept + continued[cut.key].text,
                kind="dropout_ntp",
                kept=cut.kept,
                model=cut.response.model,
                continued_by=engine.name,
                settings=cut.response.settings,
                sample=cut.response.sample_index,
            )
        )
    paired = {record["question_id"] for record in records}
    for question in questions:
        outcome = "paired" if question.id in paired else "unpaired" if question.id in grouped else "without_responses"
        report.outcomes[outcome] += 1
    return records, report


def cut_words(text: str, keep: float) -> str | None:
    """Return the first ``keep`` of the words of ``text``, rounded down but at least one; None if there is one only."""
    words = _WORD.findall(text)
    if len(words) < 2:
        return None
    return "".join(words[: max(1, int(len(words) * keep))])


@dataclass(frozen=True)
class _Cut:
    """Holds a response and the part of it that is kept."""

    question: Question
    response: Response
    kept: str

    @property
    def key(self) -> str:
        """Return the continuation's name, different for every response, prompt and kept part."""
        content = "\0".join([self.response.model, prompt_of(self.question, self.response), self.kept])
        return f"{self.question.id}/{self.response.sample_index}/{prompt_hash(content)}"

    def request(self, seed: int) -> GenerationRequest:
        """Make the request: the prompt without its images, and the kept part as the model's turn so far."""
        return GenerationRequest(
            messages=(Message("user", _without_images(prompt_of(self.question, self.response))),),
            images=(),
            n=1,
            seed=seed_for(seed, self.key),
            prefix=self.kept,
            origin=self.question.origin,
            in_thinking=any(mark in self.response.text for mark in (THOUGHT_OPEN, THOUGHT_CLOSE)),
        )


def _without_images(prompt: str) -> str:
    return _PLACEHOLDER.sub("", prompt).strip()


def _cuts(
    question: Question,
    responses: Sequence[Response],
    keep: float,
    seed: int,
    max_pairs: int,
    verifier: str,
    report: PairingReport,
) -> list[_Cut]:
    cuts: list[_Cut] = []
    for response in responses:
        kept = cut_words(response.text, keep)
        if not question.images and not question.videos:
            report.dropped["text_only"] += 1
        elif not _without_images(prompt_of(question, response)):
            report.dropped["empty_prompt"] += 1
        elif response.finish_reason == "length":
            report.dropped["unfinished_response"] += 1
        elif kept is None:
            report.dropped["too_short"] += 1
        elif _is_wrong(question, response, verifier):
            report.dropped["wrong_response"] += 1
        else:
            cuts.append(_Cut(question, response, kept))
    return draw(cuts, question, seed, max_pairs, report)


def _is_wrong(question: Question, response: Response, verifier: str) -> bool:
    """Return whether the question's answer, if it has one that can be compared with, says that a response is wrong."""
    try:
        name = verifier_of(question, verifier)
    except RecordError:
        return False
    text = judged_text(response.text, bool(response.settings.get(IN_THOUGHT)))
    return verify(text, question.answer, name).status == "wrong"


def _unfit(cut: _Cut, continuation: Generated) -> str | None:
    """Return why the continuation makes no pair; None if it makes one."""
    if not continuation.text.strip():
        return "no_continuation"
    if continuation.finish_reason == "length":
        return "unfinished"
    if (cut.kept + continuation.text).split() == cut.response.text.split():
        return "identical"
    return None
