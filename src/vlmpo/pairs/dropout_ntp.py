"""Responses to preference pairs without a checkable answer: ``vlmpo pair dropout-ntp`` (DropoutNTP, MPO paper).

Chosen is the response. Its first half is kept and continued by the model WITHOUT the image; kept half and continuation
together are rejected: written without looking, that is where a model makes things up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmpo.commands.sample import build_section, open_engine, sampling_settings
from vlmpo.data.readers.questions import read_questions
from vlmpo.data.records import IMAGE_PLACEHOLDER, Message, Question, Response
from vlmpo.errors import RecordError
from vlmpo.generate.keys import prompt_hash, seed_for
from vlmpo.generate.local import Engine, Generated, GenerationRequest
from vlmpo.generate.responses import RESPONSES_FILE, ResponseFile, read_responses
from vlmpo.log import Progress
from vlmpo.pairs.correctness import Record, by_question, image_paths, prompt_of
from vlmpo.pairs.report import PairingReport
from vlmpo.recipe import Recipe

PAIRS_FILE = "pairs_dropout_ntp.jsonl"
REPORT_FILE = "dropout_ntp_report.json"
CONTINUATIONS_FILE = "continuations.jsonl"

# A word with the white space before it; in scripts written without spaces, a character.
_WORD = re.compile(r"\s*(?:[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+)")
_PLACEHOLDER = re.compile(rf"{IMAGE_PLACEHOLDER}\n?")

Save = Callable[[str, Generated], None]  # name of the continuation, and what was generated


def run_dropout_ntp(recipe: Recipe) -> PairingReport:
    """Make DropoutNTP pairs of the responses that ``vlmpo sample`` left in ``build.output_dir``.

    Writes there ``pairs_dropout_ntp.jsonl``, ``dropout_ntp_report.json`` and, as they come, ``continuations.jsonl``:
    started again after a stop, the stage goes on with what is missing.

    Raises:
        RecipeError: no ``build`` section.
        DataError: no questions, no responses, or no pair to be made of them.
        ModelError, RunError: as :func:`vlmpo.commands.sample.open_engine`.
    """
    build = build_section(recipe)
    folder = Path(str(build.output_dir))
    found = read_questions(build.questions, build.image_root, split=build.split, need_answer=False)
    responses = read_responses(folder / RESPONSES_FILE)
    engine = open_engine(recipe)
    settings = sampling_settings(recipe)
    with ResponseFile(folder / CONTINUATIONS_FILE, engine.name, settings) as file:

        def save(name: str, generated: Generated) -> None:
            file.append([Response(name, 0, generated.text, generated.finish_reason, engine.name, settings)])

        known = {r.question_id: Generated(r.text, r.finish_reason) for r in read_responses(file.path)}
        records, report = pair_dropout_ntp(
            found.questions,
            responses,
            engine,
            keep=build.keep,
            seed=build.seed,
            max_pairs=build.max_pairs,
            known=known,
            save=save,
        )
    report.note_dropped(found.dropped)
    report.finish(folder, records, PAIRS_FILE, REPORT_FILE)
    return report


def pair_dropout_ntp(
    questions: Sequence[Question],
    responses: Iterable[Response],
    engine: Engine,
    *,
    keep: float = 0.5,
    seed: int = 0,
    max_pairs: int = 15,
    known: Mapping[str, Generated] | None = None,
    save: Save = lambda name, generated: None,
) -> tuple[list[Record], PairingReport]:
    """Pairs of a response and its first part continued without the image.

    Responses are taken as they are: whether they are right is not asked. Each is cut between two words, after ``keep``
    of its words (rounded down, at least one). Not used are responses that were cut off (``unfinished_response``), of
    one word (``too_short``), to a question without image (``text_only``) or of nothing else (``empty_prompt``). No pair
    comes of a continuation that is empty (``no_continuation``), was cut off (``unfinished``) or says the same
    (``identical``), nor of a request the engine cannot take (its own reason).

    Args:
        questions, responses, seed, max_pairs: as in :func:`vlmpo.pairs.correctness.pair_correctness`.
        engine: continues the kept parts; how tokens are drawn is its own affair.
        keep: from 0 to 1, both excluded: the part of a response's words that is kept.
        known: continuations that are there already, by the name under which ``save`` was given them.
        save: is given new continuations as they come.

    Returns:
        Records of the pair files vlmpo trains on, by question id, and the counts.
    """
    report = PairingReport("dropout-ntp", questions=len(questions))
    given = by_question(questions, responses, report)
    cuts = [
        cut
        for question in sorted(questions, key=lambda question: question.id)
        for cut in _cuts(question, given.get(question.id, []), keep, seed, max_pairs, report)
    ]
    continued = _continue(cuts, engine, seed, dict(known or {}), save, report)
    records = []
    for cut in cuts:
        generated = continued.get(cut.key)
        if generated is not None and (record := _record(cut, generated, engine.name, report)) is not None:
            records.append(record)
    paired = {record["question_id"] for record in records}
    for question in questions:
        outcome = "paired" if question.id in paired else "unpaired" if question.id in given else "without_responses"
        report.outcomes[outcome] += 1
    return records, report


def cut_words(text: str, keep: float) -> str | None:
    """The first ``keep`` of the words of ``text``, rounded down but at least one; None where nothing would be left."""
    words = _WORD.findall(text)
    if len(words) < 2:
        return None
    return "".join(words[: max(1, int(len(words) * keep))])


@dataclass(frozen=True)
class _Cut:
    """A response and the part of it that is kept."""

    question: Question
    response: Response
    kept: str

    @property
    def key(self) -> str:
        """Names the continuation: another response, prompt or cut would have another."""
        response = self.response
        content = "\0".join([response.model, prompt_of(self.question, response), self.kept])
        return f"{self.question.id}/{response.sample_index}/{prompt_hash(content)}"

    def request(self, seed: int) -> GenerationRequest:
        """The prompt without its images, and the model's turn begun."""
        text = _without_images(prompt_of(self.question, self.response))
        return GenerationRequest(
            messages=(Message("user", text),),
            images=(),
            n=1,
            seed=seed_for(seed, self.key),
            prefix=self.kept,
            origin=self.question.origin,
        )


def _without_images(prompt: str) -> str:
    return _PLACEHOLDER.sub("", prompt).strip()


def _cuts(
    question: Question, responses: Sequence[Response], keep: float, seed: int, max_pairs: int, report: PairingReport
) -> list[_Cut]:
    cuts: list[_Cut] = []
    for response in responses:
        kept = cut_words(response.text, keep)
        if not question.images:
            report.dropped["text_only"] += 1
        elif not _without_images(prompt_of(question, response)):
            report.dropped["empty_prompt"] += 1
        elif response.finish_reason == "length":
            report.dropped["unfinished_response"] += 1
        elif kept is None:
            report.dropped["too_short"] += 1
        else:
            cuts.append(_Cut(question, response, kept))
    drawn = np.random.default_rng(seed_for(seed, question.id)).permutation(len(cuts))
    report.skipped["over_max_pairs"] += max(0, len(cuts) - max_pairs)
    return [cuts[index] for index in sorted(drawn[:max_pairs].tolist())]


def _continue(
    cuts: Sequence[_Cut], engine: Engine, seed: int, known: dict[str, Generated], save: Save, report: PairingReport
) -> dict[str, Generated]:
    """Continuations by key. A batch of which anything is missing is asked whole: alone, a response could differ."""
    size = engine.batch_size
    batches = [cuts[start : start + size] for start in range(0, len(cuts), size)]
    asked = [cut for batch in batches if any(cut.key not in known for cut in batch) for cut in batch]

    def on_bad(_: GenerationRequest, error: RecordError) -> None:
        report.skipped[error.reason] += 1

    with Progress("continuing without images", len(asked), "responses") as progress:
        for cut, texts in zip(asked, engine.generate([cut.request(seed) for cut in asked], on_bad), strict=True):
            progress.advance(1)
            for generated in texts:
                if cut.key not in known:
                    known[cut.key] = generated
                    save(cut.key, generated)
        for remark in engine.notices:
            progress.notice(f"note: {remark}")
    return known


def _record(cut: _Cut, generated: Generated, continued_by: str, report: PairingReport) -> Record | None:
    rejected = cut.kept + generated.text
    reason = None
    if not generated.text.strip():
        reason = "no_continuation"
    elif generated.finish_reason == "length":
        reason = "unfinished"
    elif rejected.split() == cut.response.text.split():
        reason = "identical"
    if reason:
        report.skipped[reason] += 1
        return None
    report.pairs["dropout_ntp"] += 1
    images = image_paths(cut.question)
    return {
        "image": images[0] if len(images) == 1 else images,
        "question": prompt_of(cut.question, cut.response),
        "chosen": cut.response.text,
        "rejected": rejected,
        "question_id": cut.question.id,
        "kind": "dropout_ntp",
        "kept": cut.kept,
        "model": cut.response.model,
        "continued_by": continued_by,
        "settings": cut.response.settings,
        "sample": cut.response.sample_index,
    }
