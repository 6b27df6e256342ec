"""Generates the demo model's answers, parses them, marks them against the truth and pairs them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vlmpo.data.encode.chat_template import content_of
from vlmpo.data.records import PreferencePair
from vlmpo.demo.task import LINES, SOURCE, Question, prompt, render
from vlmpo.stats import wilson

MAX_NEW_TOKENS = 48  # the longest worked answer takes 33, end of turn included
BATCH = 128  # questions generated at a time
_FINAL = re.compile(r"(?:.* )?Final answer: (\d+) \.", re.DOTALL)


def generate(
    model: Any, processor: Any, questions: Sequence[Question], *, samples: int = 1, temperature: float = 0.0
) -> list[list[str]]:
    """Generate ``samples`` responses to each question; at temperature 0 of the most likely tokens.

    Of the special tokens only the end of the turn is generated: a response with an image token cannot be encoded again.
    """
    tokenizer = processor.tokenizer
    # top_k 0: the default of 50 would be a second setting beside the temperature.
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    model.eval()
    responses: list[list[str]] = []
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        conversations = [
            [{"role": turn.role, "content": content_of(turn.text)} for turn in prompt(question.text)]
            for question in batch
        ]
        inputs = processor(
            text=[processor.apply_chat_template(turns, add_generation_prompt=True) for turns in conversations],
            images=[[render(question.scene)] for question in batch],
            padding=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            ids = model.generate(
                **inputs,
                **sampling,
                num_return_sequences=samples,
                max_new_tokens=MAX_NEW_TOKENS,
                suppress_tokens=[index for index in tokenizer.all_special_ids if index != tokenizer.eos_token_id],
            )
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        responses += [texts[i : i + samples] for i in range(0, len(texts), samples)]
    return responses


def parse(response: str) -> int | None:
    """Return the number of a response that ends in ``Final answer: N .``; None if it does not."""
    final = _FINAL.fullmatch(response)
    return int(final[1]) if final else None


def is_worked(response: str) -> bool:
    """Return whether the response counts aloud over at least one line before it answers."""
    return any(f"{line}:" in response.split() for line in LINES)


def marks(questions: Sequence[Question], responses: Sequence[str]) -> dict[str, float | None]:
    """Mark one response a question.

    Returns:
        ``items``; ``accuracy`` with its 95 % Wilson interval ``low``, ``high``; the shares ``unparsed`` and ``worked``;
        ``accuracy_worked`` and ``accuracy_direct``, of the responses that count aloud or not, None if there are none.
    """
    parsed = [parse(response) for response in responses]
    right = [number == question.truth for question, number in zip(questions, parsed, strict=True)]
    worked = [is_worked(response) for response in responses]
    low, high = wilson(sum(right), len(right))
    return {
        "items": len(right),
        "accuracy": _mean(right),
        "low": low,
        "high": high,
        "unparsed": _mean([number is None for number in parsed]),
        "worked": _mean(worked),
        "accuracy_worked": _mean([hit for hit, aloud in zip(right, worked, strict=True) if aloud]),
        "accuracy_direct": _mean([hit for hit, aloud in zip(right, worked, strict=True) if not aloud]),
    }


def answer_records(questions: Sequence[Question], responses: Sequence[str]) -> list[dict[str, Any]]:
    """Return answers as lines of ``answers.jsonl``; one that cannot be parsed is ``unparsed``."""
    status = {True: "correct", False: "incorrect"}
    return [
        {
            "question_id": str(number),
            "question": question.text,
            "truth": str(question.truth),
            "text": response,
            "status": "unparsed" if parse(response) is None else status[parse(response) == question.truth],
        }
        for number, (question, response) in enumerate(zip(questions, responses, strict=True))
    ]


def _mean(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def make_pairs(
    questions: Sequence[Question], responses: Sequence[Sequence[str]], *, most: int, seed: int
) -> list[PreferencePair]:
    """Pair right with wrong responses, at most ``most`` pairs a question.

    Repeated responses count once. An unparsed response is a wrong one; an empty one is not used.
    """
    random = np.random.default_rng(seed)
    pairs: list[PreferencePair] = []
    for question, texts in zip(questions, responses, strict=True):
        distinct = [text for text in dict.fromkeys(texts) if text.strip()]
        right = [text for text in distinct if parse(text) == question.truth]
        wrong = [text for text in distinct if parse(text) != question.truth]
        both = [(good, bad) for good in right for bad in wrong]
        for index in random.permutation(len(both))[:most]:
            chosen, rejected = both[index]
            image, origin = render(question.scene), f"{SOURCE}:{len(pairs) + 1}"
            pairs.append(PreferencePair(prompt(question.text), (image,), chosen, rejected, SOURCE, origin))
    return pairs
