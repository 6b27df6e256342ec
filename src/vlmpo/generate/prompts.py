"""How a question is put to the model."""

from __future__ import annotations

import re

from vlmpo.data.records import IMAGE_PLACEHOLDER, Question
from vlmpo.errors import RecipeError
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
_LEADING_IMAGES = re.compile(rf"(?:{IMAGE_PLACEHOLDER}\s*)+")


def prompt_text(question: Question, style: str) -> str:
    """The user's turn for ``question``, ``<image>`` where an image stands.

    Args:
        question: images that stand before its text stand before the whole prompt.
        style: ``direct`` (a short answer), ``cot`` (reasoning, then "Final answer: .."), ``boxed`` (reasoning, then
            ``\\boxed{...}``), or a template of your own that holds ``{question}``; its other braces are left alone.

    Raises:
        RecipeError: neither a style nor a template.
    """
    template = _TEMPLATES.get(style, style)
    if QUESTION_FIELD not in template:
        styles = ", ".join(PROMPT_STYLES)
        raise RecipeError(f"build.prompt: {style!r} is neither one of {styles} nor a template with {QUESTION_FIELD}")
    leading = _LEADING_IMAGES.match(question.question)
    images = leading.group() if leading else ""
    return images + template.replace(QUESTION_FIELD, question.question[len(images) :])
