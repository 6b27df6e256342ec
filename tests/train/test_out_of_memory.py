"""A row that is out of memory: the step is made again in smaller rows and comes out the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import model as tiny_model
from tests.tiny_models import random_pair
from tests.training import AfterSteps, flat_weights, logged, pairs, relative, trainer
from tests.zoo import encoded_pairs
from vlmpo import MPOTrainer
from vlmpo.errors import RunError
from vlmpo.train.batching import Collator, lay_out, tree_of
from vlmpo.train.checkpoint import read_state
from vlmpo.train.memory import is_out_of_memory
from vlmpo.train.out_of_memory import StepAgain
from vlmpo.train.sharding import unwrapped
from vlmpo.tree.dummies import append_dummy, dummy_row
from vlmpo.tree.packing import RowBound

TIMES = {
    "step_seconds",
    "pairs_per_second",
    "tokens_per_second",
    "data_wait_share",
    "train_runtime",
    "total_flos",
    "memory_gib",
}
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Failing:
    """Raises once, at the ``at``-th time that rows of more than one pair come by."""

    def __init__(self, at: int, error: BaseException = FULL, times: int = 1) -> None:
        self.left, self.error, self.times = at, error, times

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0 and self.times:
            self.times -= 1
            raise self.error


def layers(run: MPOTrainer) -> Any:
    return unwrapped(run.model).model.language_model.layers


def in_forward(run: MPOTrainer, failing: Failing) -> None:
    """While the policy reads: with gradient."""
    layers(run)[1].register_forward_pre_hook(lambda *_: failing() if torch.is_grad_enabled() else None)


def in_backward(run: MPOTrainer, failing: Failing) -> None:
    """The head and the last layer have their gradients by then, the first layer and the vision tower have not."""
    layers(run)[0].register_full_backward_hook(failing)


def in_reference(run: MPOTrainer, failing: Failing) -> None:
    run.reference.model.model.language_model.layers[1].register_forward_pre_hook(failing)  # type: ignore[union-attr]


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in logged(folder)]


def finished(folder: Path, **settings: Any) -> tuple[torch.Tensor, list[dict[str, Any]], MPOTrainer]:
    """Train on 8 pairs after the run's ``prepare`` was called on it; return weights, logs and trainer."""
    prepare: Callable[[MPOTrainer], None] | None = settings.pop("prepare", None)
    defaults = {"per_device_train_batch_size": 4, "max_tokens_per_row": 400, "optim": "sgd", "learning_rate": 1e-2}
    run = trainer(folder, settings.pop("data", pairs(8)), **{**defaults, **settings})
    if prepare is not None:
        prepare(run)
    run.train()
    return flat_weights(run.model), numbers(folder), run


PLACES = {"forward": in_forward, "backward": in_backward, "reference": in_reference}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_fails_is_bit_by_bit_that_of_smaller_rows(tmp_path: Path, place: str, accumulation: int) -> None:
    put = PLACES[place]
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4}
    whole, _, _ = finished(tmp_path / "whole", dtype=torch.float64, **settings)
    # Under accumulation in the second batch, whose first row comes after those of a batch that went well.
    failing = Failing(accumulation - 1)
    weights, logs, run = finished(
        tmp_path / "failed", prepare=lambda run: put(run, failing), dtype=torch.float64, **settings
    )
    assert failing.times == 0
    bound = run.data_collator.bound
    assert bound.most is not None
    assert bound.most < 400
    assert run.row_memory.choice is not None
    assert run.row_memory.choice.out_of_memory == 1
    small, expected, _ = finished(
        tmp_path / "small", dtype=torch.float64, **{**settings, "max_tokens_per_row": bound.most}
    )
    assert torch.equal(weights, small)
    assert logs == expected
    assert relative(weights, whole) < 1e-9
    assert not torch.equal(small, flat_weights(tiny_model(dtype=torch.float64)))


@pytest.mark.slow
def test_a_later_step_leaves_those_before_as_they_were(tmp_path: Path) -> None:
    failing = Failing(2)  # one backward pass a step: the third of four
    data = pairs(16)
    weights, logs, run = finished(tmp_path / "failed", data=data, prepare=lambda run: in_backward(run, failing))
    bound = run.data_collator.bound
    late: list[MPOTrainer] = []

    def lower(step: int) -> None:
        if step == 2:
            late[0].data_collator.bound = bound

    small, expected, _ = finished(tmp_path / "small", data=data, prepare=late.append, callbacks=[AfterSteps(lower)])
    assert torch.equal(weights, small)
    assert logs == expected
    assert len(logs) == 4


@pytest.mark.slow
def test_rows_are_halved_as_often_as_needed_and_groups_divided(tmp_path: Path) -> None:
    """Four pairs of one prompt are one tree; only single pairs fit here."""
    one = random_pair(3, images=2)
    others = [random_pair(seed) for seed in range(10, 13)]
    data = [one, *(replace(one, chosen=other.chosen, rejected=other.rejected) for other in others)]
    read: list[int] = []

    def only_single_pairs(run: MPOTrainer) -> None:
        def look(_module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
            layout = keywords.get("vlmpo_layout")
            if run.state.max_steps and layout is not None:
                read.append(sum(len(span.responses) for span in layout.spans))
                if read[-1] > 2:
                    raise FULL

        layers(run)[0].register_forward_pre_hook(look, with_kwargs=True)

    settings = {"group_by_prompt": 4, "data": data, "dtype": torch.float64}
    whole, _, _ = finished(tmp_path / "whole", **settings)
    weights, _, run = finished(tmp_path / "failed", prepare=only_single_pairs, **settings)
    assert run.data_collator.bound.divide
    assert read[-4:] == [2, 2, 2, 2]
    assert relative(weights, whole) < 1e-9  # a step is the same, whatever its rows


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["auto", "separate"])
def test_a_pair_that_does_not_fit_alone_ends_the_run_with_its_name(tmp_path: Path, shared: str) -> None:
    failing = Failing(0, times=99)
    with pytest.raises(RunError) as caught:
        finished(tmp_path, prepare=lambda run: in_backward(run, failing), data=pairs(4), attention=shared)
    text = str(caught.value)
    assert text.startswith("memory:")
    assert " tokens and " in text
    assert " image patches, is out of memory (CUDA out of memory." in text
    assert "training.activation_checkpointing: true, model.vision_memory: recompute, reference.kind: cache" in text


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])
def test_a_lower_bound_is_kept_in_checkpoints_and_taken_over_at_its_step(tmp_path: Path, step: int) -> None:
    settings = {"data": pairs(16), "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}
    failing = Failing(step - 1)
    weights, logs, run = finished(tmp_path / "run", prepare=lambda run: in_backward(run, failing), **settings)
    kept = read_state(tmp_path / "run" / "checkpoint-4")["settings"]["chosen"]["memory"]
    assert kept["out_of_memory"] == 1
    assert kept["earlier"] == [[step - 1, RowBound(400).to_json()]]
    assert RowBound.from_json(kept["bound"]) == run.data_collator.bound
    settings.pop("data")
    again = trainer(
        tmp_path / "run",
        pairs(16),
        **{"per_device_train_batch_size": 4, "max_tokens_per_row": 400, "optim": "sgd", "learning_rate": 1e-2},
        **settings,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.data_collator.bound == run.data_collator.bound
    assert torch.equal(flat_weights(again.model), weights)
    assert numbers(tmp_path / "run") == logs


@pytest.mark.slow
def test_rows_that_are_read_whole_cannot_be_halved(tmp_path: Path) -> None:
    failing = Failing(0)
    with pytest.raises(RunError, match=r"a micro-batch of 4 pairs .* lower training\.per_device_train_batch_size"):
        finished(tmp_path, prepare=lambda run: in_backward(run, failing), reward_shift="running")


@pytest.mark.slow
def test_memory_that_is_out_elsewhere_has_a_message_too(tmp_path: Path) -> None:
    def full(step: int) -> None:
        raise FULL

    with pytest.raises(RunError, match="out of memory outside of a training row"):
        finished(tmp_path, callbacks=[AfterSteps(full)])


def test_on_many_ranks_the_message_names_the_largest_pair_and_a_bound() -> None:
    family = encoded_pairs("internvl-qwen2")
    collator = Collator(None, True)
    again = StepAgain(
        collator, alone=False, whole=False, patch_pixels=196, remedies=lambda: "model.lora", lowered=lambda: None
    )
    batch = collator([family["text only"], family["two images"]])

    def fail() -> None:
        with again.watched() as attempt:
            attempt.reading = batch.micro_batches[0]
            raise FULL

    with pytest.raises(RunError) as caught:
        fail()
    pair = family["two images"]
    tokens = pair.prompt_ids.numel() + pair.chosen_ids.numel() + pair.rejected_ids.numel()
    total = batch.micro_batches[0].num_tokens
    assert str(caught.value) == (
        f"{pair.origin}: a pair of {tokens} tokens and 32 image patches, in a row of 2 pairs and {total} tokens, is "
        "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); set training.max_tokens_per_row: "
        f"{total // 2}, model.lora"
    )
    assert caught.value.met_by == "rank"
    assert collator.bound == RowBound(None)


@pytest.mark.parametrize("shared", [True, False])
def test_a_row_with_a_dummy_image_is_named_too(shared: bool) -> None:
    """One of many ranks: its last row has no image of its own, and gets one so that it reads as the others do."""
    family = encoded_pairs("internvl-qwen2")
    again = StepAgain(
        Collator(None, shared), alone=False, whole=False, patch_pixels=196, remedies=str, lowered=lambda: None
    )
    row = Collator(None, shared)([family["text only"]]).micro_batches[0]
    row = replace(row, rows=[append_dummy(of_row, tree_of(family["one image"])) for of_row in row.rows])
    with pytest.raises(RunError, match=r"a pair of \d+ tokens and 0 image patches, is out of memory"):
        fail(again, row)
    with pytest.raises(RunError, match="a row of no pair, which keeps ranks in step, is out of memory"):
        fail(again, replace(lay_out([]), rows=[dummy_row(tree_of(family["one image"]))]))


def fail(again: StepAgain, reading: Any) -> None:
    with again.watched() as attempt:
        attempt.reading = reading
        raise FULL


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["copy", "cache"])
def test_an_evaluation_reads_a_row_that_does_not_fit_in_parts(tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "group_by_prompt": 2}
    settings |= {"reference_kind": kind, "dtype": torch.float64, "data": pairs(4)}
    one = random_pair(3)
    held_out = [*pairs(4, 30), one, replace(one, rejected="two", origin="memory:other")]
    whole, _, _ = finished(
        tmp_path / "whole", **settings, eval_dataset=held_out, reference_cache_dir=str(tmp_path / "a")
    )

    def failing(run: MPOTrainer) -> None:
        fails = Failing(0, times=2)
        layers(run)[1].register_forward_pre_hook(
            lambda module, _: fails() if run.state.max_steps and not module.training else None
        )

    cache = str(tmp_path / "b")
    weights, _, run = finished(
        tmp_path / "failed", prepare=failing, **settings, eval_dataset=held_out, reference_cache_dir=cache
    )
    assert torch.equal(weights, whole)
    assert run.data_collator.bound == RowBound(400)
    found, expected = (evaluations(tmp_path / name) for name in ("failed", "whole"))
    assert found == pytest.approx(expected, rel=1e-12)


def evaluations(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        name: value
        for line in lines
        for name, value in line.items()
        if name.startswith("eval_") and not name.endswith(("runtime", "per_second"))
    }


@pytest.mark.slow
def test_what_is_scored_before_training_is_read_in_parts_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"reference_kind": "cache", "reference_cache_dir": str(tmp_path / "cache")}
    run = trainer(tmp_path / "run", pairs(4), per_device_train_batch_size=4, **settings)
    model = run.reference.load()  # type: ignore[union-attr]
    model.model.model.language_model.layers[1].register_forward_pre_hook(Failing(0, times=2))
    assert run.precompute_reference() == {"known": 0, "computed": 8, "dropped": 0}
    alone = trainer(tmp_path / "alone", pairs(1))
    layers(alone)[1].register_forward_pre_hook(Failing(0, times=99))
    with pytest.raises(RunError, match="out of memory outside of a training row"):
        alone.train()
    with pytest.raises(RunError, match=r"memory:0: a pair of \d+ tokens .* set a lower data\.max_tiles"):
        alone.evaluate(pairs(1))


def test_other_errors_pass() -> None:
    again = StepAgain(
        Collator(None, True), alone=True, whole=False, patch_pixels=1, remedies=lambda: "", lowered=lambda: None
    )
    with pytest.raises(RuntimeError, match="shapes"), again.watched():
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize(
    ("error", "out"),
    [
        (FULL, True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
        (KeyError("x"), False),
    ],
)
def test_which_errors_are_memory_s(error: BaseException, out: bool) -> None:
    assert is_out_of_memory(error) is out
