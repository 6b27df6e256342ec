"""Seconds and memory of the vocabulary head by size of its blocks: ``python -m benchmarks.head [--device cuda]``.

Forward and backward of :func:`vlmpo.tree.chunked_logprobs.linear_token_logps` on random states and targets, for blocks
of several sizes, with logits kept for the backward pass and without; for comparison all logits at once and
``cross_entropy``. The arms take turns; reported are medians with minimum and maximum. On a CPU the seconds are CPU time
on one thread, so that other work on the machine counts little. Memory is the rise of the peak above weight, its
gradient and the states, each arm in a process of its own. Writes ``benchmarks/results/head.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlmpo.tree import chunked_logprobs as projection

RESULTS = Path(__file__).resolve().parent / "results" / "head.json"
MEBI = 1024 * 1024
BLOCKS = {
    "cpu": (MEBI // 4, MEBI // 2, MEBI, 4 * MEBI, 16 * MEBI),
    "cuda": (2 * MEBI, 8 * MEBI, 32 * MEBI, 128 * MEBI),
}
Head = Callable[[Tensor, Tensor, Tensor], Tensor]


class Size(NamedTuple):
    """The number of scored tokens and of vocabulary entries, and the hidden size."""

    scored: int
    vocabulary: int
    hidden: int


SIZES = (Size(412, 8192, 256), Size(412, 151_936, 256), Size(2000, 32_768, 512))
MINIATURE = (Size(20, 100, 8),)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probs from all logits at once."""
    return -cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")


def blocks(elements: int, kept: int) -> Head:
    """Return vlmpo's head with blocks of ``elements`` logits and ``kept`` bytes kept."""

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return projection.linear_token_logps(hidden, weight, None, targets, elements, kept_bytes=kept)

    return head


def arms(device: torch.device) -> dict[str, Head]:
    """Return all arms by name."""
    heads: dict[str, Head] = {"all logits": plain}
    for elements in BLOCKS[device.type]:
        for kept in (0, projection.KEPT_BYTES):
            heads[f"blocks of {elements / MEBI:g} Mi, {kept // MEBI} MiB kept"] = blocks(elements, kept)
    return heads


def states(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, weight, targets and the incoming gradient."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(size.scored, size.hidden, generator=generator)
    weight = torch.randn(size.vocabulary, size.hidden, generator=generator) / size.hidden**0.5
    targets = torch.randint(size.vocabulary, (size.scored,), generator=generator)
    grad = torch.randn(size.scored, generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), grad.to(device)


def run(head: Head, hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor) -> float:
    """Return the seconds of one forward and backward pass."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    clock = time.perf_counter if hidden.is_cuda else time.process_time
    if hidden.is_cuda:
        torch.cuda.synchronize()
    started = clock()
    head(hidden, weight, targets).backward(grad)
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return clock() - started


def seconds(size: Size, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the median, minimum and maximum seconds of each arm."""
    given = states(size, device)
    taken: dict[str, list[float]] = {name: [] for name in arms(device)}
    for number in range(repeats + 1):
        for name, head in arms(device).items():
            spent = run(head, *given)
            if number:  # the first warms up
                taken[name].append(spent)
    return {name: {"median": statistics.median(t), "min": min(t), "max": max(t)} for name, t in taken.items()}


def peak(device: torch.device) -> float:
    """Return the peak memory since the last call in MiB; on a CPU that of the whole process, as Linux counts it."""
    if device.type == "cuda":
        mib = torch.cuda.max_memory_allocated(device) / MEBI
        torch.cuda.reset_peak_memory_stats(device)
        return mib
    status = Path("/proc/self/status").read_text()
    mib = int(status.split("VmHWM:")[1].split()[0]) / 1024
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to what is in use now
    return mib


def extra_memory(size: Size, name: str, device: torch.device) -> float:
    """Return the MiB by which the peak rises above weight, its gradient and the states. Call it in a fresh process."""
    given = states(size, device)
    run(plain, *states(Size(4, 16, 4), device))  # loads whatever a first backward pass needs
    gradients = torch.ones_like(given[1]), torch.ones_like(given[0])  # as large as the gradients
    peak(device)
    before = peak(device)  # all of that, and nothing that was freed before
    del gradients
    run(arms(device)[name], *given)
    return peak(device) - before


def in_own_process(size: Size, name: str, device: str) -> float:
    """Call :func:`extra_memory` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.head", "--device", device, "--memory", *map(str, size), name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(sizes: tuple[Size, ...], device: str, repeats: int) -> dict[str, Any]:
    """Measure the seconds and memory of all arms at all sizes."""
    results: dict[str, Any] = {}
    for size in sizes:
        label = f"{size.scored} tokens, vocabulary {size.vocabulary}, hidden {size.hidden}"
        results[label] = seconds(size, torch.device(device), repeats)
        for name, arm in results[label].items():
            arm["extra_mib"] = in_own_process(size, name, device)
            spread = f"{1e3 * arm['median']:8.1f} ms [{1e3 * arm['min']:.1f}, {1e3 * arm['max']:.1f}]"
            print(f"{label:45} {name:32} {spread:32} {arm['extra_mib']:7.0f} MiB", flush=True)
    return results


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--miniature", action="store_true", help="one tiny size: does the script itself work?")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--memory", nargs=4, metavar=("SCORED", "VOCABULARY", "HIDDEN", "ARM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        *size, name = options.memory
        print(extra_memory(Size(*map(int, size)), name, torch.device(options.device)))
        return
    results = measure(MINIATURE if options.miniature else SIZES, options.device, options.repeats)
    record = {"device": options.device, "torch": torch.__version__, "repeats": options.repeats, "sizes": results}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
