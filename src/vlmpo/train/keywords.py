"""Answer keywords of MPOConfig that are another tool's, or misspelt, with ours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

from vlmpo.foreign_keys import Answer, answers

_NAMES = {  # of the recipe's keys whose name as a keyword is not their last part
    "loss.weights": "loss_weights",
    "reference.kind": "reference_kind",
    "reference.cache_dir": "reference_cache_dir",
}
_ELSEWHERE = {
    "model.path": "pass the model to MPOTrainer(model=...)",
    "model.lora": "pass MPOTrainer(peft_config=peft.LoraConfig(...))",
    "model.dtype": "load the model in that dtype and pass it to MPOTrainer(model=...)",
    "model.freeze": "freeze the parts of the model and pass it to MPOTrainer(model=...)",
    "model.quantize": "load the model quantized and pass it to MPOTrainer(model=...)",
    "data.train": "pass the data to MPOTrainer(train_dataset=...)",
    "data.eval": "pass the data to MPOTrainer(eval_dataset=...)",
    "data.hold_out": "split the data and pass MPOTrainer(eval_dataset=...)",
}
_Class = TypeVar("_Class", bound=type)


def answer_keywords(cls: _Class) -> _Class:
    """Make a dataclass answer keywords that are not its fields with ours, all of them in one TypeError."""
    build: Callable[..., None] = cls.__init__  # type: ignore[misc]

    @functools.wraps(build)
    def answering(self: Any, *args: Any, **settings: Any) -> None:
        known = [one.name for one in fields(self) if one.init]
        if unknown := {name: value for name, value in settings.items() if name not in known}:
            raise TypeError(f"{type(self).__name__}: {'; '.join(_lines(unknown, settings, known))}")
        build(self, *args, **settings)

    cls.__init__ = answering  # type: ignore[misc]
    return cls


def _lines(unknown: Mapping[str, Any], given: Mapping[str, Any], known: Collection[str]) -> Iterator[str]:
    told = answers(unknown, given)
    yield from (f"{', '.join(answer.keys)}: a keyword {_in_python(answer, known)}" for answer in told)
    answered = {key for answer in told for key in answer.keys}
    for name in (name for name in unknown if name not in answered):
        nearest = get_close_matches(name, known, n=1)
        yield f"{name}: unknown keyword{f'; did you mean {nearest[0]}?' if nearest else ''}"


def _in_python(answer: Answer, known: Collection[str]) -> str:
    for key, advice in _ELSEWHERE.items():
        if answer.ours == key or answer.ours.startswith(f"{key}."):
            return f"of {answer.tools}; {advice}"
    name = _NAMES.get(answer.ours) or answer.ours.removeprefix("training.").partition(".")[0]
    if answer.ours and name not in known:  # data.max_length: max_length
        name = answer.ours.rpartition(".")[2]
    part = answer.ours.partition(f".{name}.")[2]  # training.learning_rates.vision: learning_rates={"vision": ...}
    return answer.text(lambda _, value: name if value is None else f"{name}={ ({part: value} if part else value)!r}")
