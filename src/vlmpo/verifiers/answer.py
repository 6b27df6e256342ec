r"""Finds the final answer of a response, without guessing.

In this order:

1. The last of these marks: a "Final answer: ..." line (also "the final answer is ..."), ``\boxed{...}``,
   ``<answer>...</answer>``. If the last one is cut off, empty or denied, there is no final answer: an earlier mark is
   not used instead.
2. Without such a mark, the last plain statement of an answer: "Answer: B", "答案是3"; without that, the last of "option
   C is correct" and "I choose C". One that only speaks about the answer ("the answer is clear from the chart") is
   passed over.
3. Without that either, a response that is nothing but an answer: one short line, no sentence.

A response that is a JSON object with an ``answer`` has that. An answer that the rest of the response takes back, or
leaves open, is none.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from vlmpo.verifiers.characters import same_length, shortened
from vlmpo.verifiers.doubt import (
    is_alternative,
    is_doubtful,
    is_filler,
    is_hedged,
    is_remark,
    is_taken_back,
)
from vlmpo.verifiers.languages import LANGUAGES, words
from vlmpo.verifiers.marks import OPTION, Mark, find_marks, is_denied, is_long_remark
from vlmpo.verifiers.sentences import EMPHASIS, first_sentence, is_sentence, said_of_subject, tidy

_BARE_LABEL = re.compile(
    rf"(?:{words('option')}\s*\(?[A-Za-z]\)?[.:]?$|\([A-Za-z]\)|[A-Za-z]\)|[A-Z][.:](?:\s|$))", re.IGNORECASE
)
_YES_OR_NO = re.compile(f"{words('yes', 'no')}[.。!]?", re.IGNORECASE)
_YES_OR_NO_WORD = re.compile(words("yes", "no"), re.IGNORECASE)
# "Yes, there is a dog." Only the head answers.
_HEADED = re.compile(
    rf"[*_]*(?P<head>(?P<yes>{words('yes')})|{words('no')})[*_]*[,.;、。]\s*(?P<rest>.+)", re.IGNORECASE
)
_DENIAL = re.compile(rf"{words('denial')}|n't\b|\bno\b", re.IGNORECASE)
_REASONED = re.compile(rf"(?P<core>[^\s,.]+),?\s+{words('reason')}", re.IGNORECASE)  # "B, because it is tallest."
_NO_VERB = re.compile(r"[А-ЯЁ].*\s.*\.")  # Russian sentences need none: "Машина красная."
_JSON_KEYS = ("answer", "final_answer", "final answer")
_MOST_BARE, _MOST_SAID = 120, 4  # characters of a bare answer; words that a bare sentence says of its subject
LONGEST_RESPONSE = 200_000  # characters; some 50,000 tokens
_LONGEST = 1000  # characters of a final answer; a longer one is a story, and slow to parse
_NOUN = re.compile("|".join(language.noun for language in LANGUAGES.values()))
# A second question that the response goes on to ask and answer.
_NEXT_QUESTION = re.compile(
    r"^\W*(?:next )?(?:question|q|user|human|assistant|问题|题目|質問|問題|pregunta|frage|pergunta|вопрос)\s*\d*\s*:",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    """Holds an answer as the response gives it.

    Attributes:
        text: without emphasis and a surrounding ``$``.
        is_sentence: whether it is taken from a sentence that nothing announces, "The car is red.": if it is the truth
            the sentence says so, but if not, the question may have been another one.
        is_remark: whether it speaks about the answer, "clear from the chart"; then it is none, unless it is the truth.
    """

    text: str
    is_sentence: bool = False
    is_remark: bool = False


def parse_final_answer(text: str) -> str | None:
    """Return the final answer in the response's words, without emphasis and a surrounding ``$``.

    The last of several answers counts. A reasoning block (``<think>...</think>``) is not part of the response; after
    one that is never closed there is no response.

    Args:
        text: a whole response.

    Returns:
        The answer's text, on one line unless boxed; None if no final answer can be read.
    """
    found = find_final_answer(text)
    return None if found is None or found.is_remark else found.text


def find_final_answer(text: str) -> FinalAnswer | None:
    """Return the final answer as :func:`parse_final_answer` reads it, with what the verifiers must know of it."""
    _, closed, after = text.replace("\r\n", "\n").rpartition("</think>")
    text = (after if closed else after.partition("<think>")[0]).strip()
    if len(text) > LONGEST_RESPONSE:
        return None
    text = shortened(text)
    if (value := _json_answer(text)) is not None:
        return FinalAnswer(tidy(value)) if value.strip() else None
    marks = find_marks(text)
    if not marks:
        return _bare(text)
    shape = same_length(text)
    chosen = _decisive(shape, marks)
    if chosen is None or chosen.text is None or len(chosen.text) > _LONGEST:
        return None
    if is_taken_back(text[chosen.end :], chosen.text) or is_hedged(text[max(0, chosen.start - 200) : chosen.start]):
        return None
    answer = tidy(chosen.text)
    return FinalAnswer(answer, is_remark=chosen.is_remark) if answer else None


def _json_answer(text: str) -> str | None:
    """Return the value of ``answer`` of a response that is a JSON object, maybe in a code block; None if it is none."""
    found = re.fullmatch(r"(?:```\w*\s*)?(\{.*\})\s*(?:```)?", text, re.DOTALL)
    try:
        value = json.loads(found[1], parse_float=str, parse_int=str) if found else None
    except (ValueError, RecursionError):
        return None
    answers = [answer for key, answer in value.items() if key.lower() in _JSON_KEYS] if isinstance(value, dict) else []
    return answers[0] if len(answers) == 1 and isinstance(answers[0], str) else None


def _decisive(shape: str, marks: list[Mark]) -> Mark | None:
    """Return the last mark of those that weigh most; None if a later one, or one to another question, differs.

    Remarks are passed over, unless there is nothing else.
    """
    marks = [mark for mark in marks if not mark.is_remark] or marks
    weight = max(mark.weight for mark in marks)
    chosen = next(mark for mark in reversed(marks) if mark.weight == weight)
    inner = [mark for mark in marks if chosen.start < mark.start < chosen.end and mark.weight > OPTION]
    chosen = inner[-1] if inner else chosen  # "Final answer: the answer is B"
    others = [mark for mark in marks if not _agree(mark, chosen)]
    if any(mark.label and chosen.label and mark.label != chosen.label for mark in others):
        return None
    gaps = [shape[mark.end : chosen.start] for mark in others if mark.end <= chosen.start and mark.weight == weight]
    if any(map(_NEXT_QUESTION.search, gaps)):
        return None
    later = [mark for mark in others if mark.start >= chosen.end]
    if chosen.text is None or not later:
        return chosen
    if any(mark.text is None for mark in later):
        return None
    return later[-1] if is_taken_back(shape[chosen.end : later[-1].start + 12], chosen.text) else None


def _agree(one: Mark, other: Mark) -> bool:
    return tidy(one.text or "").lower() == tidy(other.text or "").lower()


def _bare(text: str) -> FinalAnswer | None:
    if not text or "\n" in text or len(text) > _MOST_BARE:
        return None
    shape = same_length(text)
    is_short = _BARE_LABEL.match(shape.strip(EMPHASIS)) is not None or _YES_OR_NO.fullmatch(shape) is not None
    if is_short or (not is_sentence(text) and first_sentence(text) == text):
        return FinalAnswer(
            tidy(text), is_sentence=bool(_NO_VERB.fullmatch(text)), is_remark=is_filler(text) or is_long_remark(text)
        )
    if is_doubtful(text) or _NOUN.search(shape.lower()):  # "the answer of the student is B"
        return None
    headed = _HEADED.fullmatch(shape)
    if headed and not (_YES_OR_NO_WORD.search(headed["rest"]) or (headed["yes"] and _DENIAL.search(headed["rest"]))):
        return FinalAnswer(tidy(headed["head"]), is_sentence=True)
    reasoned = _REASONED.match(shape)
    if reasoned and first_sentence(text) == text and not is_sentence(reasoned["core"]):
        return FinalAnswer(text[: reasoned.end("core")], is_sentence=True)
    return _statement(tidy(text))


def _statement(sentence: str) -> FinalAnswer | None:
    """Return what a bare sentence such as "The car is red." says of its subject, if that is short and plain."""
    said = said_of_subject(sentence)
    if not said or len(said.split()) > _MOST_SAID or is_sentence(said) or is_remark(said):
        return None
    if is_alternative(f"x {said}") or is_denied(said, has_verb=True):
        return None
    return FinalAnswer(tidy(said), is_sentence=True)
