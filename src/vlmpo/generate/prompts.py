"""Writes the prompt that puts a question to the model, and the hashes and seeds derived from it."""

from __future__ import annotations

import re

from vlmpo.data.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Message, Question
from vlmpo.errors import RecipeError
from vlmpo.generate.base import GenerationRequest
from vlmpo.hashing import content_hash, stable_hash
from vlmpo.settings import PROMPT_STYLES, QUESTION_FIELD

_TEMPLATES = {
    "direct": f"{QUESTION_FIELD}\nAnswer the question with a single word, number or phrase.",
    "cot": (
        f"{QUESTION_FIELD}\nThink step by step and write your reasoning down. "
        'Then end with a line of the form "Final answer: .." that holds the answer alone.'
    ),
    "boxed": (
        f"{QUESTION_FIELD}\nThink step by step and write your reasoning down. "
        r"Then end with the answer alone, in the form \boxed{...}."
    ),
}
_LEADING_IMAGES = re.compile(rf"(?:(?:{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER})\s*)+")


def prompt_text(question: Question, style: str) -> str:
    """Write the user's turn for ``question``, with ``<image>`` at the place of each image.

    Args:
        question: images that come before its text come before the whole prompt.
        style: ``direct`` (a short answer), ``cot`` (reasoning, then "Final answer: .."), ``boxed`` (reasoning, then
            ``\\boxed{...}``), or a template that contains ``{question}``; its other braces are left alone.

    Raises:
        RecipeError: ``style`` is neither a style nor a template.
    """
    template = _TEMPLATES.get(style, style)
    if QUESTION_FIELD not in template:
        styles = ", ".join(PROMPT_STYLES)
        raise RecipeError(f"build.prompt: {style!r} is neither one of {styles} nor a template with {QUESTION_FIELD}")
    leading = _LEADING_IMAGES.match(question.question)
    images = leading.group() if leading else ""
    return images + template.replace(QUESTION_FIELD, question.question[len(images) :])


def prompt_hash(prompt: str) -> str:
    """Return 16 hex digits that identify a prompt, the same in every process."""
    return content_hash(prompt, size=8)


def seed_for(seed: int, name: str) -> int:
    """Return a 64-bit seed that depends on ``seed`` and ``name`` alone, the same in every process."""
    return stable_hash(f"{seed}:{name}")


def request_for(question: Question, style: str, *, n: int = 1, seed: int = 0) -> GenerationRequest:
    """Make the request for ``n`` responses to ``question``, put to the model in ``style``."""
    return GenerationRequest(
        messages=(Message("user", prompt_text(question, style)),),
        images=question.images,
        n=n,
        seed=seed,
        origin=question.origin,
        videos=question.videos,
    )
