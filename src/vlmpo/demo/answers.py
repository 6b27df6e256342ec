"""What the demo's model answers: generated, parsed, checked against the truth, and paired."""

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
    """``samples`` responses to each question; at temperature 0 the likeliest tokens.

    Image tokens are never generated: a response that holds one cannot be read again.
    """
    model.eval()
    answers: list[list[str]] = []
    for start in range(0, len(questions), BATCH):
        inputs = _prompts(processor, questions[start : start + BATCH])
        with torch.no_grad():
            ids = model.generate(
                **inputs,
                **_sampling(temperature),
                num_return_sequences=samples,
                max_new_tokens=MAX_NEW_TOKENS,
                suppress_tokens=_never_said(processor.tokenizer),
            )
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        answers += [texts[i : i + samples] for i in range(0, len(texts), samples)]
    return answers


def _prompts(processor: Any, questions: Sequence[Question]) -> Any:
    conversations = [
        [{"role": turn.role, "content": content_of(turn.text)} for turn in prompt(question.text)]
        for question in questions
    ]
    texts = [processor.apply_chat_template(turns, add_generation_prompt=True) for turns in conversations]
    images = [[render(question.scene)] for question in questions]
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


def _sampling(temperature: float) -> dict[str, Any]:
    # top_k 0: the default of 50 would be a second setting beside the temperature.
    return {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}


def _never_said(tokenizer: Any) -> list[int]:
    """Every special token but the one that ends the turn."""
    return [index for index in tokenizer.all_special_ids if index != tokenizer.eos_token_id]


def parse(response: str) -> int | None:
    """The number of a response that ends in ``Final answer: N .``; None where it does not."""
    found = _FINAL.fullmatch(response)
    return int(found[1]) if found else None


def is_worked(response: str) -> bool:
    """Whether the response counts aloud over at least one line before it answers."""
    return any(f"{line}:" in response.split() for line in LINES)


def marks(questions: Sequence[Question], responses: Sequence[str]) -> dict[str, float | None]:
    """Accuracy of one response a question.

    Returns:
        ``items``; ``accuracy`` with its 95 % Wilson interval ``low``, ``high``; the shares ``unparsed`` and ``worked``;
        ``accuracy_worked`` and ``accuracy_direct``, of the responses of either habit, None where there is none.
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


def _mean(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def make_pairs(
    questions: Sequence[Question], responses: Sequence[Sequence[str]], *, most: int, seed: int
) -> list[PreferencePair]:
    """At most ``most`` pairs a question, each of a right and a wrong response; a question with but one kind gives none.

    Equal responses count once. An unparsed response is a wrong one; an empty one is not used.
    """
    random = np.random.default_rng(seed)
    pairs: list[PreferencePair] = []
    for question, texts in zip(questions, responses, strict=True):
        unlike = [text for text in dict.fromkeys(texts) if text.strip()]
        right = [text for text in unlike if parse(text) == question.truth]
        wrong = [text for text in unlike if parse(text) != question.truth]
        both = [(good, bad) for good in right for bad in wrong]
        for index in random.permutation(len(both))[:most]:
            chosen, rejected = both[index]
            pairs.append(PreferencePair(prompt(question.text), (render(question.scene),), chosen, rejected, SOURCE))
    return pairs
