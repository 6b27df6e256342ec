"""Fused kernels beside the plain modules: errors and microseconds of each kind, then a whole model with more and more.

``part_kernels`` is a part of benchmarks/gpu_check. Whatever gains less than about 1 % of the whole model's time does
not belong into ``vlmpo.models.kernels.USED``. ``python -m benchmarks.gpu_kernels [--miniature]`` prints its figures.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.gpu_alignment import wait_for
from benchmarks.gpu_model import INTERNVL3_1B, MINIATURE, VlmSize, make_model, make_pairs, make_processor
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.models.families import Fused, fused_of
from vlmpo.models.kernel_check import Case, cases_of, disagreement, relative, with_gradients
from vlmpo.models.kernels import USED, Functions, Kernels, load_functions, why_absent
from vlmpo.train.batching import lay_out
from vlmpo.tree.forward import install

GIB = 1024**3
# What a model is read with, one after the other; each set has one kind more.
STAGES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "+ RMSNorm": ("rms_norm",),
    "+ gated MLP": ("rms_norm", "glu"),
    "+ MLP of the tower": ("rms_norm", "glu", "mlp"),
    "+ LayerNorm of the tower": ("rms_norm", "glu", "mlp", "layer_norm"),
    "+ rotary": ("rms_norm", "glu", "mlp", "layer_norm", "rotary"),
}
Figures = dict[str, Any]


class Run(Protocol):
    """The device, the size and the deadline of a part, as benchmarks/gpu_check gives them."""

    device: torch.device
    miniature: bool

    def left(self) -> float:
        """Return the seconds until the part must end."""


def part_kernels(run: Run) -> Figures:
    """Return the figures of every kind alone and of the whole model; passed if the kinds in use agree to rounding."""
    if run.device.type == "cuda" and (reason := why_absent()):
        return {"error": reason, "passed": False}
    functions = functions_for(run.device)
    figures: Figures = {"library": functions.name, "used": list(USED), "kinds": {}, "passed": True}
    for label, module, tokens in modules(run.miniature):
        kind = fused_of(module)
        assert kind is not None
        for case in cases_of(module, kind, functions, run.device, tokens):
            name = f"{kind.kind}: {label}, {case.inputs[0].shape[1]} rows"
            figures["kinds"][name] = figures_of(case, kind, run)
            if kind.kind in USED:
                figures["passed"] &= figures["kinds"][name]["fault"] is None
    size = MINIATURE if run.miniature else INTERNVL3_1B
    figures["model"] = whole_model(size, 2, functions, run)
    return figures


def functions_for(device: torch.device) -> Functions:
    """Return liger-kernel's functions; on a CPU, stand-ins in plain torch, whose times mean nothing."""
    if device.type == "cuda":
        return load_functions()
    from tests.fused_standins import FUNCTIONS

    return FUNCTIONS


# ---- one kind alone ----


def modules(miniature: bool) -> Iterator[tuple[str, Any, int]]:
    """Yield labels, modules of InternVL3-1B and 8B, Qwen3 and Gemma 3, and the tokens of a row of two pairs."""
    from transformers import Gemma3TextConfig, Qwen2Config
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    tokens, patches = (30, 34) if miniature else (4564, 14 * 1025)
    for name, hidden, inner in [("tiny", 32, 64)] if miniature else [("1B", 896, 4864), ("8B", 3584, 18_944)]:
        yield f"{name} ({hidden})", Qwen2RMSNorm(hidden), tokens
        with torch.device("meta"):  # only its class and sizes are read
            mlp = Qwen2MLP(Qwen2Config(hidden_size=hidden, intermediate_size=inner))
        yield f"{name} ({inner})", mlp, tokens
    yield "Qwen3's heads (128)", Qwen3RMSNorm(16 if miniature else 128), tokens
    wide = 32 if miniature else 2560
    yield f"Gemma 3 ({wide})", Gemma3RMSNorm(wide), tokens
    with torch.device("meta"):
        gemma = Gemma3MLP(Gemma3TextConfig(hidden_size=wide, intermediate_size=4 * wide))
    yield f"Gemma 3 ({4 * wide})", gemma, tokens
    yield "InternViT", _plain_mlp(32 if miniature else 1024), patches
    yield "InternViT", nn.LayerNorm(32 if miniature else 1024), patches
    yield "14 heads of 64, 2 of keys", _attention(), tokens


def _plain_mlp(width: int) -> Any:
    from transformers import InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLVisionMLP

    return InternVLVisionMLP(InternVLVisionConfig(hidden_size=width, intermediate_size=4 * width))


def _attention() -> Any:
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

    return Qwen2Attention(Qwen2Config(hidden_size=896, num_attention_heads=14, num_key_value_heads=2), 0)


def figures_of(case: Case, kind: Fused, run: Run) -> Figures:
    """Return errors against float32 and times of a case in bf16, of the plain module, the kernel and torch's own."""
    dtype = torch.bfloat16
    exact = with_gradients(case.plain, case.inputs, torch.float32)
    ways: dict[str, Callable[..., Any]] = {"plain": case.plain, "kernel": case.fused}
    if kind.kind == "rms_norm":
        ways["torch"] = functools.partial(torch_norm, offset=kind.offset)
    figures: Figures = {"fault": disagreement(case, dtype) or disagreement(case, torch.float32)}
    for name, function in ways.items():
        errors = [relative(*both) for both in zip(with_gradients(function, case.inputs, dtype), exact, strict=True)]
        figures[name] = {"error": errors[0], "gradient_error": max(errors[1:]), **times_of(function, case, dtype, run)}
    figures["times_faster"] = figures["plain"]["microseconds"] / figures["kernel"]["microseconds"]
    return figures


def torch_norm(states: Tensor, weight: Tensor, offset: float) -> tuple[Tensor, ...]:
    """Normalise by torch's own function, which has a kernel too; its casts are Gemma's."""
    return (nn.functional.rms_norm(states, weight.shape, weight + offset if offset else weight, 1e-6),)


def times_of(function: Callable[..., Any], case: Case, dtype: torch.dtype, run: Run) -> Figures:
    """Return microseconds of forward and backward: of the clock, and on CUDA of the kernels, with their number."""
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in case.inputs]
    grads = [torch.randn_like(out) for out in function(*leaves)]

    def once() -> None:  # a kernel may write into the leaves: their values do not matter here
        torch.autograd.grad(function(*leaves), leaves, grads)

    rounds, repeats = (2, 1) if run.miniature else (5, 20)
    taken = []
    once()
    for _ in range(rounds):
        wait_for(run.device)
        started = time.perf_counter()
        for _ in range(repeats):
            once()
        wait_for(run.device)
        taken.append(1e6 * (time.perf_counter() - started) / repeats)
    return {"microseconds": statistics.median(taken), **launches_of(once, run.device)}


def launches_of(function: Callable[[], Any], device: torch.device) -> Figures:
    """Return how many kernels one call launches on CUDA, and their microseconds; nothing elsewhere."""
    if device.type != "cuda":
        return {}
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return {"launches": len(kernels), "kernel_microseconds": sum(event.time_range.elapsed_us() for event in kernels)}


# ---- the whole model ----


@dataclass
class Reading:
    """A model, a row of pairs, and what one forward and backward of it costs."""

    model: Any
    rows: list[Any]
    device: torch.device

    def __call__(self) -> Tensor:
        """Read the row, forward and backward, and return the log-probs."""
        self.model.zero_grad(set_to_none=True)
        logps: Tensor = self.model(packed_rows=self.rows)
        (logps.sum() / 100).backward()
        return logps.detach()

    def milliseconds(self, repeats: int) -> list[float]:
        """Return the clock's milliseconds of each of ``repeats`` readings."""
        taken = []
        for _ in range(repeats):
            wait_for(self.device)
            started = time.perf_counter()
            self()
            wait_for(self.device)
            taken.append(1e3 * (time.perf_counter() - started))
        return taken


def whole_model(size: VlmSize, pairs: int, functions: Functions, run: Run) -> Figures:
    """Measure forward and backward of one row of ``pairs`` pairs in bf16 with each of STAGES, in two rounds."""
    processor = make_processor(size)
    encoder = PairEncoder(processor)
    encoded = [encoder.encode(pair) for pair in make_pairs(size, pairs)]
    rows = [row.to(run.device) for row in lay_out(encoded, True).rows]
    for row in rows:
        row.vision.update({name: tensor.to(torch.bfloat16) for name, tensor in row.vision.items()})
    model = make_model(size, processor, torch.bfloat16, run.device).train()
    install(model, shared=True)
    reading = Reading(model, rows, run.device)
    figures: Figures = {name: {"milliseconds": []} for name in STAGES}
    expected: Tensor | None = None
    for round_number in range(2):
        for name, kinds in STAGES.items():
            if run.left() < 5:
                continue
            figures[name]["modules"] = dict(Kernels(kinds, functions).bind(model))
            logps = reading()  # compiles; not timed
            expected = logps if expected is None else expected
            figures[name]["difference"] = float((logps.double() - expected.double()).abs().max())
            if run.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            figures[name]["milliseconds"] += reading.milliseconds(1 if run.miniature else 6)
            if run.device.type == "cuda":
                figures[name]["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            if round_number == 0:
                figures[name] |= launches_of(reading, run.device)
    Kernels().bind(model)
    _add_gains(figures)
    del model, reading, rows
    gc.collect()
    return figures


def _add_gains(figures: Figures) -> None:
    """Replace all milliseconds by their median, and add the share of the plain model's that each stage saves."""
    before: float | None = None
    whole = 0.0
    for stage in figures.values():
        if not stage["milliseconds"]:
            continue
        stage["milliseconds"] = statistics.median(stage["milliseconds"])
        whole = whole or stage["milliseconds"]
        stage["gain"] = 0.0 if before is None else (before - stage["milliseconds"]) / whole
        before = stage["milliseconds"]


def main() -> None:
    """Run the part alone and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--miniature", action="store_true", help="tiny sizes, on any device")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.miniature:
        sys.exit("no CUDA device here; --miniature runs the part at tiny sizes without one")

    @dataclass
    class Alone:
        device: torch.device
        miniature: bool

        def left(self) -> float:
            return 1000.0

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    print(json.dumps(part_kernels(Alone(device, options.miniature)), indent=1))


if __name__ == "__main__":
    main()
