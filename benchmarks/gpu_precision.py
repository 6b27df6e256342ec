"""What float32 weights under bf16 passes cost, beside the other ways to compute in bf16, at one size on one device.

Forward and backward of one row and a step of AdamW, alone, without a trainer:

- ``bf16 weights``: no float32 weights at all; the speed to reach.
- ``masters``: vlmpo's own (vlmpo.models.masters).
- ``autocast``: float32 weights under torch's autocast.
- ``FSDP2``: sharded over a mesh of one, parameters and reduction in float32, computing in bf16.

``benchmarks/gpu_check.py`` runs it as a part; alone: ``python -m benchmarks.gpu_precision [--miniature]``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import distributed

from benchmarks.gpu_model import INTERNVL3_1B, MINIATURE, VlmSize, make_model, make_pairs, make_processor
from vlmpo import compat
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.models.masters import Masters
from vlmpo.train.batching import lay_out
from vlmpo.tree.forward import install, response_logps
from vlmpo.tree.layout import PackedRow

GIB = 1024**3
WAYS = ("bf16 weights", "masters", "autocast", "FSDP2")
RATE = 1e-6


class Run(Protocol):
    """What is known of a part's run."""

    device: torch.device
    miniature: bool

    def left(self) -> float:
        """Return the seconds until the part must end."""
        ...


def part_precision(run: Run) -> dict[str, Any]:
    """Return seconds and memory of each way by number of pairs in the row, and masters' seconds over FSDP2's."""
    size, counts, steps = (MINIATURE, (1, 2), 2) if run.miniature else (INTERNVL3_1B, (2, 8), 5)
    processor = make_processor(size)
    encoder = PairEncoder(processor)
    pairs = [encoder.encode(pair) for pair in make_pairs(size, max(counts))]
    rows = {count: lay_out(pairs[:count], True).rows for count in counts}
    figures: dict[str, Any] = {f"{count} pairs": {} for count in counts}
    with _mesh_of_one(run.device):
        for way in WAYS:
            if run.left() < 3:
                figures["error"] = f"left out for want of time: {way}"
                continue
            made = _guarded(partial(_Way, way, size, processor, run.device))
            for count in counts:
                figures[f"{count} pairs"][way] = (
                    made if isinstance(made, dict) else _guarded(partial(made.measure, rows[count], steps))
                )
            del made
            _clean(run.device)
    for by_way in (figures[f"{count} pairs"] for count in counts):
        ours, other = (by_way.get(name, {}) for name in ("masters", "FSDP2"))
        if "seconds" in ours and "seconds" in other:
            by_way["masters to FSDP2"] = ours["seconds"] / other["seconds"]
    return figures


class _Way:
    """A model set up one way, and its optimizer."""

    def __init__(self, way: str, size: VlmSize, processor: Any, device: torch.device) -> None:
        self._device, self._way = device, way
        dtype = torch.bfloat16 if way == "bf16 weights" else torch.float32
        self.model = make_model(size, processor, dtype, device).train()
        install(self.model, shared=True)
        self._masters = Masters(self.model) if way == "masters" else None
        self.model._vlmpo.masters = self._masters
        if way == "FSDP2":
            _shard(self.model, device)
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.0, fused=fused)

    def measure(self, rows: list[PackedRow], steps: int) -> dict[str, Any]:
        """Return median seconds of ``steps`` steps after two for warm-up, the loss of the first, and peak memory."""
        rows = [self._on_device(row) for row in rows]
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        passes, updates, losses = [], [], []
        for _ in range(steps + 2):
            started = self._now()
            losses.append(self._pass(rows))
            middle = self._now()
            self.optimizer.step()
            if self._masters is not None:
                self._masters.moved()
            self.optimizer.zero_grad(set_to_none=True)
            passes.append(middle - started)
            updates.append(self._now() - middle)
        both = [one + other for one, other in zip(passes[2:], updates[2:], strict=True)]
        figures = {
            "forward_backward": statistics.median(passes[2:]),
            "optimizer": statistics.median(updates[2:]),
            "seconds": statistics.median(both),
            "first_loss": losses[0],
        }
        if self._device.type == "cuda":
            figures["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        return figures

    def _pass(self, rows: list[PackedRow]) -> float:
        half = torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._way == "autocast")
        with contextlib.nullcontext() if self._masters is None else self._masters.kept_for_backward():
            with half:
                loss = -response_logps(self.model, rows).sum() / 1000
            loss.backward()
        return float(loss.detach())

    def _on_device(self, row: PackedRow) -> PackedRow:
        row = row.to(self._device)
        if self._way != "autocast":
            row.vision.update({n: t.bfloat16() for n, t in row.vision.items() if t.is_floating_point()})
        return row

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@contextlib.contextmanager
def _mesh_of_one(device: torch.device) -> Any:
    """Hold a process group of this process alone in the body, unless there is one already."""
    if distributed.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = distributed.FileStore(str(Path(folder) / "store"), 1)
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            distributed.destroy_process_group()


def _shard(model: Any, device: torch.device) -> None:
    """Shard layers and model over a mesh of one, as vlmpo has accelerate do it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (1,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    }
    layers = compat.layers_to_wrap(model)
    for module in [module for module in model.modules() if type(module).__name__ in layers]:
        fully_shard(module, **settings)
    fully_shard(model, **settings)


def _guarded(function: Callable[[], Any]) -> Any:
    """Return what ``function`` returns, or its error as figures."""
    try:
        return function()
    except torch.cuda.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as fault:
        return {"error": f"{type(fault).__name__}: {str(fault)[:300]}"}


def _clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Alone:
    """A run of this file alone: 60 seconds."""

    def __init__(self, miniature: bool) -> None:
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.miniature = miniature
        self._ends = time.perf_counter() + 60.0

    def left(self) -> float:
        return self._ends - time.perf_counter()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--miniature", action="store_true", help="tiny sizes, on any device")
    print(json.dumps(part_precision(_Alone(parser.parse_args().miniature)), indent=1))


if __name__ == "__main__":
    main()
