"""Compare what rows are estimated to take with what torch's allocator counts: ``python -m benchmarks.memory``.

On a CPU, an InternVL between toy and 1B. Three numbers for each shape of row, as ratios to the allocator's: what a few
small rows measured at the start of a run predict, what ``vlmpo inspect`` estimates without weights, and the vision
tower read in blocks beside a tower whose activations are kept. The allocator's count is torch.profiler's, which shares
nothing with the other two.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_model import VlmSize, make_model, make_pairs, make_processor
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.train.lengths import count_patch_pixels
from vlmpo.train.memory import RowMemory, measure_rows, meter_for
from vlmpo.train.memory_estimate import estimate_rows, meta_model
from vlmpo.train.row_probe import tree_of
from vlmpo.tree.forward import install, response_logps
from vlmpo.tree.layout import PromptTree, build_row
from vlmpo.tree.packing import count_patches
from vlmpo.tree.vision_blocks import read_in_blocks, vision_tower_of

SIZE = VlmSize("small", 128, 4, 4, 2, 344, 2000, 96, 4, 4, 384, 112, 14, 5, 12, (40, 80))
SHAPES = ((2, False), (8, False), (8, True))  # pairs of a row, and whether the tower is computed again


def allocated_peak(run: Any) -> int:
    """Return by how many bytes the CPU allocator's count grew at most while ``run`` ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = [event for event in json.loads(file.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def compare(size: VlmSize = SIZE, shapes: Sequence[tuple[int, bool]] = SHAPES) -> dict[str, dict[str, float]]:
    """Return MiB by the allocator for each shape, and what was predicted and estimated as multiples of it."""
    processor = make_processor(size)
    model = make_model(size, processor, torch.float32, torch.device("cpu")).train()
    config = model.config
    install(model, shared=True)
    encoder = PairEncoder(processor)
    pairs = max(count for count, _ in shapes)
    trees = [tree_of(encoder.encode(pair)) for pair in make_pairs(size, pairs)]
    pixels = count_patch_pixels(model)
    meter = meter_for(torch.device("cpu"))

    def read(of_row: Sequence[PromptTree]) -> Tensor:
        return response_logps(model, [build_row(of_row)]).sum()

    figures: dict[str, dict[str, float]] = {}
    known: dict[bool, tuple[RowMemory, RowMemory]] = {}
    for count, recompute in shapes:
        read_in_blocks(model, recompute)
        if recompute not in known:
            tower = vision_tower_of(model)
            measured = measure_rows(read, trees[0], tower=tower, meter=meter, patch_pixels=pixels)
            bare = meta_model(config, torch.float32, checkpointing=False)
            estimated_rows = estimate_rows(bare, trees[0], recompute=recompute, shared=True, device_type="cpu")
            known[recompute] = measured, estimated_rows
        row = trees[:count]
        tokens, patches = sum(tree.num_tokens for tree in row), sum(count_patches(tree, pixels) for tree in row)
        peak = allocated_peak(lambda row=row: read(row).backward())  # type: ignore[misc]
        predicted, estimated = (memory.peak(tokens, patches) / peak for memory in known[recompute])
        label = f"{count} pairs, {tokens} tokens, {patches} patches, {'recompute' if recompute else 'keep'}"
        figures[label] = {"mib": peak / 2**20, "predicted": predicted, "estimated": estimated}
    return figures


def main() -> None:
    """Print a line a shape."""
    for label, values in compare().items():
        shown = f"{values['mib']:.0f} MiB, predicted {values['predicted']:.3f}, inspect {values['estimated']:.3f} of it"
        print(f"{label}: {shown}")


if __name__ == "__main__":
    main()
