"""Groups responses by question and writes records, for both ways of pairing."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vlmpo.data.records import Question, Response
from vlmpo.errors import RecordError
from vlmpo.generate.prompts import prompt_hash, prompt_text, seed_for
from vlmpo.generate.responses import PROMPT_HASH
from vlmpo.pairs.report import PairingReport
from vlmpo.settings import QUESTION_FIELD

Record = dict[str, Any]
T = TypeVar("T")


def prompt_style(response: Response) -> str:
    """Return the style of the prompt that ``response`` answers; by default the question's own text is the prompt."""
    return str(response.settings.get("prompt", QUESTION_FIELD))


def prompt_of(question: Question, response: Response) -> str:
    """Return the user's turn that ``response`` answers, with ``<image>`` at the place of each image."""
    return prompt_text(question, prompt_style(response))


def responses_by_question(
    questions: Sequence[Question], responses: Iterable[Response], report: PairingReport
) -> dict[str, list[Response]]:
    """Return the usable responses by question id, each list sorted; count the others in ``report``.

    Left out are responses to none of ``questions`` (``unknown_question``), to a question whose prompt has changed
    since (``question_changed``), without text (``empty``), and repetitions of a text by the same model to the same
    prompt (``duplicate``; a finished response goes before one that was cut off).
    """

    def order(response: Response) -> tuple[str, str, str, bool, int, str]:
        is_cut = response.finish_reason == "length"
        style = prompt_style(response)
        return response.question_id, response.model, style, is_cut, response.sample_index, response.text

    by_id = {question.id: question for question in questions}
    seen: set[tuple[str, str, str, str]] = set()
    grouped: dict[str, list[Response]] = {}
    for response in sorted(responses, key=order):
        report.responses += 1
        question = by_id.get(response.question_id)
        key = (response.question_id, response.model, prompt_style(response), response.text)
        stored_hash = response.settings.get(PROMPT_HASH)
        if question is None:
            report.dropped["unknown_question"] += 1
        elif stored_hash is not None and stored_hash != prompt_hash(prompt_of(question, response)):
            report.dropped["question_changed"] += 1
        elif not response.text.strip():
            report.dropped["empty"] += 1
        elif key in seen:
            report.dropped["duplicate"] += 1
        else:
            seen.add(key)
            grouped.setdefault(response.question_id, []).append(response)
    return grouped


def draw(items: Sequence[T], question: Question, seed: int, max_pairs: int, report: PairingReport) -> list[T]:
    """Draw at most ``max_pairs`` of a question's pairs, in order; count the others in ``report``."""
    drawn = np.random.default_rng(seed_for(seed, question.id)).permutation(len(items))[:max_pairs]
    report.skipped["over_max_pairs"] += len(items) - len(drawn)
    return [items[index] for index in sorted(drawn.tolist())]


def pair_record(question: Question, response: Response, rejected: str, **details: Any) -> Record:
    """Return the record of a pair file in which ``response`` is chosen; ``details`` are written after the pair.

    Raises:
        RecordError: an image is neither a path nor encoded bytes.
    """
    for image in (*question.images, *question.videos):
        if not isinstance(image, str | bytes):
            detail = f"the images of pairs must be paths, this one is a {type(image).__name__}; save it to a file first"
            raise RecordError("image_not_a_path", question.origin, detail)
    return {
        **_media_fields(question),
        "question": prompt_of(question, response),
        "chosen": response.text,
        "rejected": rejected,
        "question_id": question.id,
        **details,
    }


def question_record(question: Question) -> Record:
    """Return the question as a record of a file of questions, with absolute image paths."""
    record = {
        "id": question.id,
        **_media_fields(question),
        "question": question.question,
        "answer": question.answer,
        "verifier": question.verifier,
        "split": question.split,
    }
    return {key: value for key, value in record.items() if value is not None}


def _media_fields(question: Question) -> Record:
    """Return the images and videos as a record holds them: absolute paths, and embedded ones in base64."""
    fields = {}
    for name, media in (("image", question.images), ("video", question.videos)):
        written = [
            str(Path(medium).absolute()) if isinstance(medium, str) else _data_url(medium, name) for medium in media
        ]
        if written:
            fields[name] = written[0] if len(written) == 1 else written
    return fields


def _data_url(content: bytes, kind: str) -> str:
    return f"data:{kind}/*;base64,{base64.b64encode(content).decode()}"
