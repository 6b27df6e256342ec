"""How pixels and a chosen response travel from disk to the loss, traced as a run does it, against docs/architecture.md.

A HOP is a function of ours that is handed the value and hands it on: returns it, or gives it to the next. What a
function calls in its own file, directly or through a library, belongs to its hop. What runs inside the model's forward
is the model's. The reference, which reads the same rows beside the policy, is left out.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from PIL import Image

from tests.paths import REPO
from tests.tiny_models import model as tiny_model
from tests.tiny_models import noise_image, processor, tokenizer
from tests.training import config
from vlmpo import MPOTrainer
from vlmpo.data.dataset import open_pairs
from vlmpo.data.readers.spec import SourceSpec

SOURCE = f"{REPO / 'src' / 'vlmpo'}/"
CHOSEN = "red circle, two"
FORWARD = "_patched.<locals>.forward"
MOST_HOPS = 14
MOST_FRAMES = 7  # of ours, from training_step to the model's own forward

Holds = Callable[[Any], bool]


def inside(value: Any, holds: Holds, depth: int = 8) -> bool:
    """Whether ``value``, or what it contains, holds what is looked for."""
    if holds(value):
        return True
    if depth == 0 or isinstance(value, type | str | bytes | torch.Tensor):
        return False
    if isinstance(value, dict):
        parts = list(value.values())
    elif dataclasses.is_dataclass(value):
        parts = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    else:
        parts = list(value) if isinstance(value, list | tuple) else []
    return any(inside(part, holds, depth - 1) for part in parts[:40])


def holds_pixels(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, dict) and "pixel_values" in value)


def holds_chosen(value: Any) -> bool:
    """Its text, its token ids, or, once there is a gradient, log-probs made of them."""
    ids = tokenizer()(CHOSEN)["input_ids"]
    if isinstance(value, str):
        return CHOSEN in value
    if isinstance(value, list) and all(isinstance(one, int) for one in value):
        return contains(value, ids)
    if isinstance(value, torch.Tensor):
        return value.requires_grad if value.is_floating_point() else contains(value.flatten().tolist(), ids)
    return False


def contains(numbers: list[int], run: list[int]) -> bool:
    return any(numbers[at : at + len(run)] == run for at in range(len(numbers) - len(run) + 1))


@dataclass
class Call:
    """A call of one of our functions."""

    file: str
    function: str
    caller: Call | None  # the next function of ours below it on the stack
    direct: bool  # no library between the two
    received: bool
    returned: bool = False
    passed_on: bool = False  # to a function it called, which did not just give it back

    @property
    def hands_on(self) -> bool:
        return self.returned or self.passed_on

    @property
    def is_inline(self) -> bool:
        """A comprehension or a lambda: part of its function."""
        return self.function.rpartition(".")[2].startswith("<")

    def callers(self) -> Iterator[Call]:
        call = self.caller
        while call is not None:
            yield call
            call = call.caller


class Tracer:
    """Notes which functions hand a value on, while it is the profile function."""

    def __init__(self, holds: Holds) -> None:
        self.holds = holds
        self.running: Call | None = None
        self.frames: list[FrameType] = []
        self.arrived = False  # at the loss
        self.calls: list[Call] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(SOURCE):
            return
        if event == "call" and not self.arrived:
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            received = any(inside(frame.f_locals.get(name), self.holds) for name in names)
            if code.co_name == "mpo_loss" and received:
                self.arrived = True
                self.reached()
                return
            direct = bool(self.frames) and frame.f_back is self.frames[-1]
            self.running = Call(code.co_filename[len(SOURCE) :], code.co_qualname, self.running, direct, received)
            self.frames.append(frame)
        elif event == "return" and self.frames and frame is self.frames[-1]:
            assert self.running is not None
            call, self.running = self.running, self.running.caller
            self.frames.pop()
            call.returned = argument is not None and inside(argument, self.holds)
            if call.hands_on:
                self.calls.append(call)
            caller = self.running
            if caller is not None and (caller.received or call.direct):
                caller.passed_on |= call.passed_on and (call.received or call.is_inline)

    def reached(self) -> None:
        """Note that the function that runs has handed the value to its destination."""
        if self.running is not None:
            self.running.passed_on = True

    def hops(self) -> list[tuple[str, str]]:
        """File and function of each hop, in the order in which they hand the value on."""
        found = {}
        for call in self.calls:
            part_of_another = call.caller is not None and call.caller.file == call.file and call.caller.hands_on
            of_reference = any(other.file == "train/reference.py" for other in (call, *call.callers()))
            in_model = any(other.function == FORWARD for other in call.callers())
            if not (call.is_inline or part_of_another or of_reference or in_model):
                found[call.file, call.function] = None
        return list(found)


@pytest.fixture
def run(tmp_path: Path) -> MPOTrainer:
    """A trainer on one pair with an image, both on disk."""
    noise_image(64, 56, 1).save(tmp_path / "a.png")
    record = {"image": "a.png", "question": "<image>\nwhat is it?", "chosen": CHOSEN, "rejected": "blue square"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    pairs = open_pairs([SourceSpec(path=str(tmp_path / "pairs.jsonl"), image_root=str(tmp_path))])
    settings = config(tmp_path / "run", per_device_train_batch_size=1)
    made = MPOTrainer(model=tiny_model(), args=settings, train_dataset=pairs, processing_class=processor())
    made._check_rows = lambda: None  # type: ignore[method-assign]  # it reads the pair too
    return made


@contextmanager
def at_forward(model: Any, call: Callable[[FrameType], None]) -> Iterator[None]:
    """Call ``call`` with the caller's frame whenever the base model's own forward begins with a gradient."""
    kind = type(model.base_model)
    plain = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            call(sys._getframe(1))
        return plain(self, *args, **kwargs)

    kind.forward = forward
    try:
        yield
    finally:
        kind.forward = plain


@pytest.mark.slow
def test_few_frames_lie_between_the_step_and_the_model(run: MPOTrainer) -> None:
    stacks: list[list[str]] = []

    def note(frame: FrameType | None) -> None:
        names = []
        while frame is not None:
            if frame.f_code.co_filename.startswith(SOURCE):
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        stacks.append(names[::-1])

    with at_forward(run.model, note):
        run.train()
    (stack,) = stacks
    assert len(stack[stack.index("training_step") :]) <= MOST_FRAMES, stack


@pytest.mark.slow
@pytest.mark.parametrize(("value", "holds"), [("pixel_values", holds_pixels), ("chosen", holds_chosen)])
def test_the_walks_are_those_of_the_documentation(run: MPOTrainer, value: str, holds: Holds) -> None:
    tracer = Tracer(holds)
    with at_forward(run.model, lambda _: tracer.reached()):
        sys.setprofile(tracer)
        try:
            run.train()
        finally:
            sys.setprofile(None)
    hops = tracer.hops()
    assert len(hops) <= MOST_HOPS, hops
    assert sorted(hops) == sorted(documented(value)), hops


def documented(value: str) -> list[tuple[str, str]]:
    """The rows of the walk's table in docs/architecture.md: file and function."""
    text = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8").partition(f"### `{value}`")[2]
    section = re.split(r"^### |<!-- walks: end", text, flags=re.MULTILINE)[0]
    return [(file, name) for file, name in re.findall(r"^\| \d+ \| (\S+) \| `(.*?)` \|", section, flags=re.MULTILINE)]
