"""One arm of the benchmark, in a process of its own: ``python -m benchmarks.arms ARM SHAPE FOLDER [fill] [bf16]``.

For each line on stdin it takes one optimizer step and writes a JSON line with the step's seconds, loss and pairs. At
the end of stdin it writes its peak memory and ends. So the arms of a shape can take turns, each in memory of its own.
With ``fill`` it writes the reference's log-probs into the arm's store instead, as ``vlmpo cache`` does: a cached arm
measures every epoch but the first.

In float32 every arm computes in float32. With ``bf16`` TRL runs in its own default, which is bf16 by autocast, plain
code under autocast too, and vlmpo with ``precision: bf16``; weights and optimizer states are float32 in all of them.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain_code import TRL_OBJECTIVE, floor_loss, trl_dataset, two_rows_loss
from benchmarks.shapes import SHAPES, Shape, make_checkpoint, make_data
from vlmpo import MPOConfig, MPOTrainer
from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.models.loading import load_model, load_processor

PROMPTS = 12
RATE = 1e-6  # as published; in Adam's first steps, rounding errors of small gradients change weights by the whole rate
GROUPS = {"vlmpo, grouped by 3, cached": 3, "vlmpo, grouped by 5, cached": 5}
CACHED = ("vlmpo, cached", *GROUPS)


class Turns:
    """Takes a step for each line on stdin and writes how long it took.

    A step lasts from the line to the end of the optimizer step, so it includes fetching the pairs.
    """

    def __init__(self, pairs_a_step: int) -> None:
        self.pairs = pairs_a_step
        self._out = sys.stdout
        sys.stdout = sys.stderr  # what a trainer prints is not for the parent
        self._started = 0.0

    def wait(self) -> None:
        """Return when a line comes; end the process when stdin ends."""
        if not sys.stdin.readline():
            self._write({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})
            sys.exit(0)
        self._started = time.perf_counter()

    def done(self, loss: float | None) -> None:
        """Write the record of the step that ends now."""
        self._write({"seconds": time.perf_counter() - self._started, "loss": loss, "pairs": self.pairs})

    def _write(self, record: dict[str, Any]) -> None:
        self._out.write(json.dumps(record) + "\n")
        self._out.flush()


def common(folder: str, pairs_a_step: int) -> dict[str, Any]:
    """Return the settings that all trainers share."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": pairs_a_step,
        "num_train_epochs": 1000,
        "max_steps": 10_000,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 1.0,
    }


def drive(trainer: Any, turns: Turns) -> None:
    """Train ``trainer``, one step a turn."""
    from transformers import TrainerCallback

    class Drive(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.wait()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                turns.done(logs["loss"])
                turns.wait()

    trainer.add_callback(Drive())
    trainer.train()


def trl_arm(shape: Shape, folder: Path, turns: Turns, bf16: bool) -> None:
    """Train with TRL's DPOTrainer under its MPO setting (i)."""
    import trl

    data = make_data(shape, folder, PROMPTS)
    pairs = [data[index] for index in range(len(data))]
    settings = common(str(folder / "trl"), shape.pairs_a_step)
    args = trl.DPOConfig(bf16=bf16, gradient_checkpointing=False, **TRL_OBJECTIVE, **settings)
    checkpoint = make_checkpoint(shape, folder, PROMPTS)
    processor = load_processor(checkpoint)
    trainer = trl.DPOTrainer(
        model=load_model(checkpoint),
        ref_model=load_model(checkpoint),
        args=args,
        train_dataset=trl_dataset(pairs),
        processing_class=processor if pairs[0].images else processor.tokenizer,
    )
    drive(trainer, turns)


def vlmpo_trainer(shape: Shape, folder: Path, arm: str, bf16: bool) -> MPOTrainer:
    """Return vlmpo's trainer, its reference online or in a store, pairs grouped by prompt or not (iii, iv, v)."""
    group = GROUPS.get(arm, 1)
    settings = common(str(folder / arm.replace(" ", "-")), GROUPS.get(arm, shape.pairs_a_step))
    settings |= {"reward_shift": "none", "nll_reduction": "token", "group_by_prompt": group}
    settings["precision"] = "bf16" if bf16 else "float32"
    if arm in CACHED:
        settings |= {"reference_kind": "cache", "reference_cache_dir": str(folder / f"reference-{group}")}
    checkpoint, data = make_checkpoint(shape, folder, PROMPTS), make_data(shape, folder, PROMPTS, group)
    return MPOTrainer(model=checkpoint, args=MPOConfig(**settings), train_dataset=data)


# ---- plain code ----


PlainLoss = Callable[[Any, Any, list[EncodedPair]], Tensor]


def batches(shape: Shape, folder: Path, encoder: PairEncoder) -> Iterator[list[EncodedPair]]:
    """Yield the pairs of each step, encoded in that step, over and over."""
    data, at = make_data(shape, folder, PROMPTS), 0
    while True:
        taken = [data[(at + number) % len(data)] for number in range(shape.pairs_a_step)]
        at += shape.pairs_a_step
        yield [encoder.encode(pair) for pair in taken]


def plain_loop(shape: Shape, folder: Path, turns: Turns, loss_of: PlainLoss, two: bool, bf16: bool) -> None:
    """Train in as little code as possible; with ``two`` models if the loss needs a reference."""
    checkpoint = make_checkpoint(shape, folder, PROMPTS)
    model = load_model(checkpoint).train()
    reference = load_model(checkpoint).eval() if two else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    feed = batches(shape, folder, PairEncoder(load_processor(checkpoint)))
    while True:
        turns.wait()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = loss_of(model, reference, next(feed))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.done(loss.item())


def run(arm: str, shape: Shape, folder: Path, turns: Turns, bf16: bool) -> None:
    """Train as ``arm`` does until stdin ends."""
    if arm == "TRL 1.16":
        trl_arm(shape, folder, turns, bf16)
    elif arm == "two padded rows":
        plain_loop(shape, folder, turns, two_rows_loss, two=True, bf16=bf16)
    elif arm == "floor":
        plain_loop(shape, folder, turns, floor_loss, two=False, bf16=bf16)
    else:
        drive(vlmpo_trainer(shape, folder, arm, bf16), turns)


ARMS = ("TRL 1.16", "two padded rows", "vlmpo, online", *CACHED, "floor")


def main() -> None:
    """Run the command line."""
    arm, shape, folder = sys.argv[1], SHAPES[sys.argv[2]], Path(sys.argv[3])
    torch.manual_seed(0)
    bf16 = "bf16" in sys.argv[4:]
    if "fill" in sys.argv[4:]:
        vlmpo_trainer(shape, folder, arm, bf16).precompute_reference()
    else:
        run(arm, shape, folder, Turns(GROUPS.get(arm, shape.pairs_a_step)), bf16)


if __name__ == "__main__":
    main()
