"""Seconds an optimizer step, side by side in one run: vlmpo against TRL's DPOTrainer with its MPO setting.

    python -m benchmarks.steps [--tiles 1 7] [--repeats 3] [--steps 3]

The same InternVL of 11 M parameters and random weights, the same pairs (2 a step, responses of about 100 tokens),
float32, optimizer step included. The arms take turns; reported are medians over the repeats with minimum and maximum,
and each arm's speed as a ratio to TRL's in the same run. TRL leaves the reward shift out, so vlmpo runs with
``reward_shift: none`` here. Writes ``benchmarks/results/steps.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmpo import Message, MPOConfig, MPOTrainer, PreferencePair
from vlmpo.demo.tiny import TinySize, build_model, build_processor, train_tokenizer

RESULTS = Path(__file__).resolve().parent / "results" / "steps.json"
SIZE = TinySize(
    image_size=224,
    patch_size=14,
    vision_hidden=192,
    vision_layers=6,
    vision_heads=6,
    text_hidden=256,
    text_layers=6,
    text_heads=8,
    text_kv_heads=4,
    max_tiles=12,
)
VOCABULARY = 8192
PAIRS_A_STEP = 2
# Width of an image of height 224 that is cut into so many tiles, thumbnail included.
WIDTHS = {1: 224, 7: 224 * 6, 13: 224 * 12}


def words(random: np.random.Generator, count: int) -> str:
    """``count`` words that the byte-level tokenizer does not know: about two tokens each."""
    return " ".join("".join(random.choice(list("abcdefghij"), size=2)) for _ in range(count))


def make_pairs(tiles: int, count: int) -> list[PreferencePair]:
    """Pairs on noise images of ``tiles`` tiles."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        pixels = random.integers(0, 255, (224, WIDTHS[tiles], 3), dtype=np.uint8)
        prompt = (Message("user", "<image>\n" + words(random, 15)),)
        found.append(PreferencePair(prompt, (Image.fromarray(pixels),), words(random, 35), words(random, 35)))
    return found


def common(steps: int) -> dict[str, Any]:
    """Settings both trainers share."""
    return {
        "per_device_train_batch_size": PAIRS_A_STEP,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
    }


def vlmpo_arm(processor: Any, tokenizer: Any, pairs: list[PreferencePair], attention: str) -> Callable[[int], float]:
    """Seconds a step of MPOTrainer."""

    def measure(steps: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            args = MPOConfig(output_dir=folder, reward_shift="none", attention=attention, **common(steps))
            model = build_model(tokenizer, SIZE)
            trainer = MPOTrainer(model=model, args=args, train_dataset=pairs, processing_class=processor)
            return _time(trainer, steps)

    return measure


def trl_arm(processor: Any, tokenizer: Any, pairs: list[PreferencePair]) -> Callable[[int], float]:
    """Seconds a step of TRL's DPOTrainer."""
    import datasets
    import trl

    text = datasets.Value("string")
    turns = [{"role": text, "content": text}]
    features = {"images": datasets.List(datasets.Image()), "prompt": turns, "chosen": turns, "rejected": turns}
    rows = [
        {
            "images": list(pair.images),
            "prompt": [{"role": "user", "content": pair.prompt[0].text.removeprefix("<image>\n")}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in pairs
    ]
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))

    def measure(steps: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            args = trl.DPOConfig(
                output_dir=folder,
                bf16=False,
                gradient_checkpointing=False,
                max_length=None,
                loss_type=["sigmoid", "bco_pair", "sft"],
                loss_weights=[0.8, 0.2, 1.0],
                **common(steps),
            )
            model, reference = build_model(tokenizer, SIZE), build_model(tokenizer, SIZE)
            trainer = trl.DPOTrainer(
                model=model, ref_model=reference, args=args, train_dataset=data, processing_class=processor
            )
            return _time(trainer, steps)

    return measure


def _time(trainer: Any, steps: int) -> float:
    """Seconds a step over ``steps`` steps after the first, which warms up."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        ends: list[float]

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ends = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return (clock.ends[-1] - clock.ends[0]) / (steps - 1)


def measure(tiles: int, repeats: int, steps: int) -> dict[str, Any]:
    """All arms at one shape, taking turns."""
    pairs = make_pairs(tiles, PAIRS_A_STEP * steps)
    tokenizer = train_tokenizer([pair.chosen for pair in pairs], vocab_size=400)
    tokenizer.add_tokens([f"<unused{i}>" for i in range(VOCABULARY - len(tokenizer))])
    processor = build_processor(tokenizer, SIZE)
    arms = {
        "TRL 1.16 DPOTrainer": trl_arm(processor, tokenizer, pairs),
        "vlmpo": vlmpo_arm(processor, tokenizer, pairs, "auto"),
        "vlmpo, separate rows": vlmpo_arm(processor, tokenizer, pairs, "separate"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            seconds[name].append(arm(steps))
    peer = statistics.median(seconds["TRL 1.16 DPOTrainer"])
    return {
        name: {
            "median": statistics.median(found),
            "min": min(found),
            "max": max(found),
            "speed_to_trl": peer / statistics.median(found),
        }
        for name, found in seconds.items()
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 7], choices=sorted(WIDTHS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    results = {}
    for tiles in options.tiles:
        results[f"{tiles} tiles"] = measure(tiles, options.repeats, options.steps)
        for name, found in results[f"{tiles} tiles"].items():
            print(
                f"{tiles:3} tiles  {name:22} {found['median']:.3f} s a step "
                f"[{found['min']:.3f}, {found['max']:.3f}]  {found['speed_to_trl']:.2f}x",
                flush=True,
            )
    RESULTS.parent.mkdir(exist_ok=True)
    command = f"python -m benchmarks.steps --tiles {' '.join(map(str, options.tiles))} --repeats {options.repeats}"
    RESULTS.write_text(
        json.dumps({"command": command, "threads": torch.get_num_threads(), "shapes": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
