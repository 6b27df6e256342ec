"""Memory on a GPU: what rows are predicted and estimated to take, and a step whose first row cannot fit.

``part_memory`` is a part like those of ``benchmarks/gpu_check.py``: a function of its Run that returns figures, among
them ``passed``. Alone: ``python -m benchmarks.gpu_memory [--miniature]``.

- shapes: InternVL3-1B, bf16: rows of 2 and 8 pairs with the vision tower's activations kept, and of 8 pairs computed
  again in blocks of tiles. The peak growth by the allocator's statistics; what a few small rows predict, and what
  ``vlmpo inspect`` estimates on the meta device, as multiples of it.
- out of memory: 24 pairs in a row without a bound, which take more than 200 GiB. The step must be made all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_model import INTERNVL3_1B, MINIATURE, VlmSize, make_model, make_pairs, make_processor
from vlmpo import MPOConfig, MPOTrainer
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.train.batching import tree_of
from vlmpo.train.lengths import count_patch_pixels
from vlmpo.train.memory import RowMemory, measure_rows, meter_for
from vlmpo.train.memory_estimate import estimate_rows, meta_model
from vlmpo.tree.forward import install, response_logps
from vlmpo.tree.layout import PackedRow, PromptTree, build_row
from vlmpo.tree.packing import count_patches
from vlmpo.tree.vision_blocks import read_in_blocks, vision_tower_of

SHAPES = ((2, False), (8, False), (8, True))  # pairs of a row, and whether the tower is computed again
TOO_MANY = 24  # pairs
BOUND = 0.15  # of the measured peak, that a prediction or an estimate may be off


@dataclass(frozen=True)
class Alone:
    """What this part reads of ``gpu_check.Run``."""

    device: torch.device
    miniature: bool


def part_memory(run: Any) -> dict[str, Any]:
    """Return the figures of both checks; ``passed`` if numbers are within 15 % and the step was made."""
    size = MINIATURE if run.miniature else INTERNVL3_1B
    figures: dict[str, Any] = {"shapes": shapes(size, run.device)}
    _clear(run.device)
    figures["out of memory"] = too_large(size, run.device)
    _clear(run.device)
    # Rows of a miniature are so small that what does not depend on them decides; there only the step counts.
    bound = math.inf if run.miniature else BOUND
    ratios = [shape[kind] for shape in figures["shapes"].values() for kind in ("predicted", "estimated")]
    figures["passed"] = all(abs(ratio - 1) <= bound for ratio in ratios) and figures["out of memory"]["finished"]
    return figures


def shapes(size: VlmSize, device: torch.device) -> dict[str, dict[str, float]]:
    """Return GiB by the allocator for each shape, and what was predicted and estimated as multiples of it."""
    processor = make_processor(size)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make_model(size, processor, dtype, device).train()
    install(model, shared=True)
    encoder, pixels = PairEncoder(processor), count_patch_pixels(model)
    trees = [tree_of(encoder.encode(pair)) for pair in make_pairs(size, max(count for count, _ in SHAPES))]
    meter, figures = meter_for(device), {}
    bare, known = meta_model(model.config, dtype, checkpointing=False), {}

    def read(of_row: Sequence[PromptTree]) -> Tensor:
        return response_logps(model, [_on(build_row(of_row), device, dtype)]).sum()

    for count, recompute in SHAPES:
        read_in_blocks(model, recompute)
        if recompute not in known:
            started = time.perf_counter()
            tower = vision_tower_of(model)
            measured = measure_rows(read, trees[0], tower=tower, meter=meter, patch_pixels=pixels)
            between = time.perf_counter()
            estimate = estimate_rows(bare, trees[0], recompute=recompute, shared=True)
            seconds = between - started, time.perf_counter() - between
            known[recompute] = (measured, estimate, seconds)
        row = trees[:count]
        with meter:
            meter.start()
            read(row).backward()
            peak = meter.peak()
        tokens, patches = sum(tree.num_tokens for tree in row), sum(count_patches(tree, pixels) for tree in row)
        label = f"{count} pairs, {tokens} tokens, {patches} patches, {'recompute' if recompute else 'keep'}"
        figures[label] = _figures(peak, (tokens, patches), *known[recompute])
    return figures


def _figures(
    peak: int, size: tuple[int, int], measured: RowMemory, estimate: RowMemory, seconds: tuple[float, float]
) -> dict[str, float]:
    return {
        "gib": peak / 2**30,
        "predicted": measured.peak(*size) / peak,
        "estimated": estimate.peak(*size) / peak,
        "seconds_to_measure": seconds[0],
        "seconds_to_estimate": seconds[1],
    }


def _on(row: PackedRow, device: torch.device, dtype: torch.dtype) -> PackedRow:
    moved = row.to(device)
    vision = {name: t.to(dtype) if t.is_floating_point() else t for name, t in moved.vision.items()}
    return replace(moved, vision=vision)


def too_large(size: VlmSize, device: torch.device) -> dict[str, Any]:
    """Make one step whose pairs cannot be in one row; return how often rows were halved, and what became of it."""
    processor = make_processor(size)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pairs = make_pairs(size, TOO_MANY)
    with tempfile.TemporaryDirectory() as folder:
        args = MPOConfig(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=len(pairs),
            max_tokens_per_row=None,
            vision_memory="keep",
            optim="sgd",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            use_cpu=device.type != "cuda",
        )
        model = make_model(size, processor, dtype, device)
        trainer = MPOTrainer(model=model, args=args, train_dataset=pairs, processing_class=processor)
        if device.type != "cuda":
            _full_above(model, tokens=1000)
        started = time.perf_counter()
        with contextlib.redirect_stdout(None):
            trainer.train()
        logs = next(logs for logs in trainer.state.log_history if "loss" in logs)
    assert trainer.row_memory.choice is not None
    times = trainer.row_memory.choice.out_of_memory
    finished = times > 0 and trainer.state.global_step == 1 and math.isfinite(logs["loss"])
    return {
        "halved": times,
        "finished": finished,
        "most_tokens": trainer.row_memory.choice.bound.most,
        "pairs": trainer.trained_pairs.used.total(),
        "rewards": [logs["rewards/chosen"], logs["rewards/rejected"]],
        "seconds": time.perf_counter() - started,
    }


def _full_above(model: Any, tokens: int) -> None:
    """Let a forward of more ``tokens`` be out of memory: for a CPU, whose memory a miniature does not fill."""

    def look(_module: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        layout = keywords.get("vlmpo_layout")
        if layout is not None and layout.num_tokens > tokens:
            raise torch.OutOfMemoryError(f"a row of {layout.num_tokens} tokens, in miniature")

    model.model.language_model.layers[-1].register_forward_pre_hook(look, with_kwargs=True)


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    """Run the part alone and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--miniature", action="store_true", help="tiny sizes, on any device")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    print(json.dumps(part_memory(Alone(device, options.miniature or device.type != "cuda")), indent=1))


if __name__ == "__main__":
    main()
