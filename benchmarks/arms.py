"""One arm of the benchmark, in a process of its own: ``python -m benchmarks.arms ARM SHAPE FOLDER``.

Trains step by step: reads a line from stdin, takes one optimizer step, writes one JSON line with its seconds, loss and
pairs. At the end of stdin it writes its peak memory and ends. So the arms of a shape can take turns, each keeping its
memory to itself.
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
from torch.nn.functional import cross_entropy

from benchmarks.shapes import SHAPES, Shape, make_model, make_pairs, make_processor
from vlmpo import MPOConfig, MPOTrainer, PreferencePair, mpo_loss
from vlmpo.data.encode import EncodedPair, PairEncoder

PROMPTS = 12
RATE = 1e-5
GROUPS = {"vlmpo, grouped by 3, cached": 3, "vlmpo, grouped by 5, cached": 5}


class Turns:
    """Waits for the word to take a step, and tells how long it took.

    A step lasts from the word to the end of the optimizer's step: fetching the pairs is in it.
    """

    def __init__(self, pairs_a_step: int) -> None:
        self.pairs = pairs_a_step
        self._out = sys.stdout
        sys.stdout = sys.stderr  # what a trainer prints is not for the parent
        self._started = 0.0

    def wait(self) -> None:
        """Returns when a step is asked for; ends the process when none is any more."""
        if not sys.stdin.readline():
            self._tell({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})
            sys.exit(0)
        self._started = time.perf_counter()

    def done(self, loss: float | None) -> None:
        """The step is over."""
        self._tell({"seconds": time.perf_counter() - self._started, "loss": loss, "pairs": self.pairs})

    def _tell(self, found: dict[str, Any]) -> None:
        self._out.write(json.dumps(found) + "\n")
        self._out.flush()


def common(folder: str, pairs_a_step: int) -> dict[str, Any]:
    """Settings that all trainers share."""
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
    """Train ``trainer``, a step a turn."""
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


def trl_arm(shape: Shape, folder: str, turns: Turns) -> None:
    """(i) TRL's DPOTrainer with its MPO setting, which leaves the reward shift out."""
    import datasets
    import trl

    pairs, processor = setting(shape)
    text = datasets.Value("string")
    turns_of = [{"role": text, "content": text}]
    features = {"prompt": turns_of, "chosen": turns_of, "rejected": turns_of}
    rows = [
        {
            "prompt": [{"role": "user", "content": pair.prompt[0].text.removeprefix("<image>\n")}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in pairs
    ]
    if pairs[0].images:
        features["images"] = datasets.List(datasets.Image())
        for row, pair in zip(rows, pairs, strict=True):
            row["images"] = [image if not isinstance(image, str) else {"path": image} for image in pair.images]
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    args = trl.DPOConfig(
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
        **common(folder, shape.pairs_a_step),
    )
    drive(
        trl.DPOTrainer(
            model=make_model(shape, processor),
            ref_model=make_model(shape, processor),
            args=args,
            train_dataset=data,
            processing_class=processor if pairs[0].images else processor.tokenizer,
        ),
        turns,
    )


def vlmpo_arm(shape: Shape, folder: str, turns: Turns, **settings: Any) -> None:
    """(iii) vlmpo, its reference online; others by their settings."""
    pairs, processor = setting(shape, settings.get("group_by_prompt", 1) or 1)
    args = MPOConfig(**{**common(folder, turns.pairs), "reward_shift": "none", "nll_reduction": "token", **settings})
    trainer = MPOTrainer(model=make_model(shape, processor), args=args, train_dataset=pairs, processing_class=processor)
    drive(trainer, turns)


def setting(shape: Shape, pairs_a_prompt: int = 1) -> tuple[list[PreferencePair], Any]:
    """The shape's pairs, the same for all arms that take as many a prompt, and its processor."""
    pairs = make_pairs(shape, PROMPTS, pairs_a_prompt)
    return pairs, make_processor(shape, pairs)


# ---- our own plain code: what InternVL's trainer does, and the floor ----


def batches(shape: Shape) -> Iterator[tuple[list[EncodedPair], Any]]:
    """The pairs of each step, encoded when the step asks for them, over and over."""
    pairs, processor = setting(shape)
    encoder, at = PairEncoder(processor), 0
    while True:
        taken = [pairs[(at + number) % len(pairs)] for number in range(shape.pairs_a_step)]
        at += shape.pairs_a_step
        yield [encoder.encode(pair) for pair in taken], processor


def plain_loop(shape: Shape, turns: Turns, loss_of: Callable[[Any, Any, list[EncodedPair]], Tensor], two: bool) -> None:
    """A training loop in the fewest words; ``two`` models where the loss wants a reference."""
    processor = setting(shape)[1]
    model = make_model(shape, processor).train()
    reference = make_model(shape, processor).eval() if two else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    feed = batches(shape)
    while True:
        turns.wait()
        pairs, _ = next(feed)
        loss = loss_of(model, reference, pairs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.done(loss.item())


def padded_logps(model: Any, pairs: list[EncodedPair]) -> Tensor:
    """Log-prob of each response, ``[2 * pairs]``, chosen ones first: a padded row each, logits of every token."""
    rows = [(pair, branch) for pair in pairs for branch in (pair.chosen_ids,)]
    rows += [(pair, pair.rejected_ids) for pair in pairs if pair.rejected_ids is not None]
    length = max(pair.trunk_ids.numel() + branch.numel() for pair, branch in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (pair, branch) in enumerate(rows):
        trunk = pair.trunk_ids.numel()
        ids[row, : trunk + branch.numel()] = torch.cat([pair.trunk_ids, branch])
        mask[row, : trunk + branch.numel()] = 1
        scored[row, trunk : trunk + branch.numel()] = True
    vision = {name: torch.cat([pair.vision[name] for pair, _ in rows]) for name in rows[0][0].vision}
    logits = model(input_ids=ids, attention_mask=mask, **vision).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return (logps * scored[:, 1:]).sum(1)


def two_rows_loss(model: Any, reference: Any, pairs: list[EncodedPair]) -> Tensor:
    """(ii) Two padded rows a pair through policy and reference."""
    count = len(pairs)
    policy = padded_logps(model, pairs)
    with torch.no_grad():
        frozen = padded_logps(reference, pairs)
    lengths = torch.tensor([pair.chosen_ids.numel() for pair in pairs])
    args = (policy[:count], policy[count:], frozen[:count], frozen[count:], lengths)
    return mpo_loss(*args, nll_reduction="token").loss


def floor_loss(model: Any, reference: Any, pairs: list[EncodedPair]) -> Tensor:
    """(vi) The model's own forward over the unique tokens, logits only where a response token is predicted."""
    total = torch.zeros(())
    for pair in pairs:
        branches = [ids for ids in (pair.chosen_ids, pair.rejected_ids) if ids is not None]
        ids = torch.cat([pair.trunk_ids, *branches])
        at = torch.arange(pair.trunk_ids.numel() - 1, ids.numel() - 1)
        logits = model(input_ids=ids[None], logits_to_keep=at, **pair.vision).logits[0]
        total = total + cross_entropy(logits, ids[at + 1]) / len(pairs)
    return total


CACHED = {"reference_kind": "cache"}
ARMS: dict[str, Callable[[Shape, str, Turns], None]] = {
    "TRL 1.16": trl_arm,
    "two padded rows": lambda shape, folder, turns: plain_loop(shape, turns, two_rows_loss, two=True),
    "vlmpo, online": vlmpo_arm,
    "vlmpo, cached": lambda shape, folder, turns: vlmpo_arm(
        shape, folder, turns, reference_cache_dir=f"{folder}/cache", **CACHED
    ),
    **{
        name: lambda shape, folder, turns, by=by: vlmpo_arm(
            shape, folder, turns, group_by_prompt=by, reference_cache_dir=f"{folder}/cache-{by}", **CACHED
        )
        for name, by in GROUPS.items()
    },
    "floor": lambda shape, folder, turns: plain_loop(shape, turns, floor_loss, two=False),
}


def main() -> None:
    """The command line."""
    arm, shape, folder = sys.argv[1], SHAPES[sys.argv[2]], Path(sys.argv[3])
    torch.manual_seed(0)
    turns = Turns(GROUPS.get(arm, shape.pairs_a_step))
    ARMS[arm](shape, str(folder / arm.replace(" ", "-")), turns)


if __name__ == "__main__":
    main()
