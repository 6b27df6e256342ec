"""Ways to read a row on a GPU, side by side: error, milliseconds of forward and backward, and memory.

At the heads of InternVL3-1B (14 on 2, of 64) and 8B (28 on 4, of 128), seven tiles: two prompts of two responses, as in
a row of pairs, and one prompt of ten, as in a group. The candidates are SDPA by segments (torch's choice, and cuDNN),
every kernel of ``vlmpo.tree.varlen.CANDIDATES``, torch's varlen on the flash attention that another package brings
(FA3, FA4), and FlexAttention, which is compiled and therefore comes last. What cannot run here says why.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import attention as torch_attention

from benchmarks.gpu_alignment import Reader, in_one_call, in_segments, random_states, wait_for, with_gradients
from vlmpo.tree import varlen
from vlmpo.tree.layout import RowLayout, TreeSpan

Figures = dict[str, Any]
FLEX_SECONDS = 15.0  # that its compilation may take


class Shape(NamedTuple):
    """Describes the attention of one layer over one row: heads and their size, prompts, responses to each."""

    name: str
    heads: int
    kv_heads: int
    width: int
    prompts: int
    responses: int

    def layout(self, miniature: bool) -> RowLayout:
        """Return the row: prompts of 1,832 tokens, responses of 225."""
        prompt, length = (40, 12) if miniature else (1832, 225)
        size = prompt + self.responses * length
        return RowLayout(tuple(TreeSpan(at * size, prompt, self.responses * (length,)) for at in range(self.prompts)))


SHAPES = [
    Shape(f"{name}, {responses} responses", heads, kv_heads, width, prompts, responses)
    for name, heads, kv_heads, width in (("1B", 14, 2, 64), ("8B", 28, 4, 128))
    for prompts, responses in ((2, 2), (1, 10))
]


def part_attention(run: Any) -> Figures:
    """Measure all candidates at all shapes; ``fastest`` names the fastest right one of each shape.

    Args:
        run: has ``device``, ``miniature``, and ``left()`` in seconds.
    """
    by_shape: dict[str, Figures] = {shape.name: {} for shape in SHAPES}
    exact: dict[str, list[Tensor]] = {}
    for name, load in candidates().items():
        for shape in SHAPES:
            if run.left() < (FLEX_SECONDS if name == "flex" else 3.0):
                by_shape[shape.name][name] = {"error": "left out: no time was left"}
                continue
            try:
                with load() as reader:
                    by_shape[shape.name][name] = measured(reader, shape, run, exact)
            except Exception as fault:
                by_shape[shape.name][name] = {"error": f"{type(fault).__name__}: {str(fault)[:300]}"}
    fastest = {name: fastest_right(found) for name, found in by_shape.items()}
    return {"bound": varlen._ROUNDING, "shapes": by_shape, "fastest": fastest, "table": table(by_shape)}


def fastest_right(found: Figures) -> str | None:
    """Return the candidate with the fewest milliseconds among those within the bound."""
    right = {name: one["ms"] for name, one in found.items() if one.get("error_norm", 1.0) <= varlen._ROUNDING}
    return min(right, key=lambda name: right[name]) if right else None


def table(by_shape: dict[str, Figures]) -> str:
    """Return all figures as a Markdown table."""
    lines = ["| shape | candidate | ms | ms of the host | extra MiB | error |", "|---|---|---|---|---|---|"]
    for shape, found in by_shape.items():
        for name, one in found.items():
            if "error" in one:
                lines.append(f"| {shape} | {name} | | | | {one['error'].splitlines()[0][:90]} |")
            else:
                cells = f"{one['ms']:.2f} | {one['host_ms']:.2f} | {one['extra_mib']:.0f} | {one['error_norm']:.1e}"
                lines.append(f"| {shape} | {name} | {cells} |")
    return "\n".join(lines)


def measured(reader: Reader, shape: Shape, run: Any, exact: dict[str, list[Tensor]]) -> Figures:
    """Return error, milliseconds and memory of ``reader``; ``exact`` keeps the results in float32 by shape."""
    layout = shape.layout(run.miniature)
    states = [part.bfloat16() for part in random_states(layout, shape.heads, shape.kv_heads, shape.width, run.device)]
    if shape.name not in exact:
        wide = [part.float() for part in states]
        exact[shape.name] = with_gradients(lambda qkv, row: varlen.attend_densely(*qkv, row), wide, layout)
    got = with_gradients(reader, states, layout)
    pairs = zip(got, exact[shape.name], strict=True)
    error = max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)
    device, host = [], []
    cuda = run.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3 if run.miniature else 15):
        wait_for(run.device)
        started = time.perf_counter()
        with_gradients(reader, states, layout)
        host.append(1e3 * (time.perf_counter() - started))
        wait_for(run.device)
        device.append(1e3 * (time.perf_counter() - started))
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else 0.0
    return {
        "error_norm": error,
        "ms": statistics.median(device[1:]),
        "host_ms": statistics.median(host[1:]),  # until all is handed to the device
        "extra_mib": extra,
    }


# ---- candidates ----


def candidates() -> dict[str, Callable[[], Any]]:
    """Return for each candidate what opens its reader, as a context."""
    found: dict[str, Callable[[], Any]] = {"segments": lambda: as_context(in_segments)}
    for name, load in varlen.CANDIDATES.items():
        found[name] = lambda load=load: as_context(in_one_call(load()))
    for name in ("FA3", "FA4"):
        found[f"torch with {name}"] = lambda name=name: with_implementation(name)
    # cuDNN's attention comes last: on an H100 it read ten responses wrongly, and nothing ran after it any more.
    return {**found, "flex": lambda: as_context(flex_reader()), "segments, cuDNN": by_cudnn}


@contextmanager
def as_context(reader: Reader) -> Iterator[Reader]:
    """Yield ``reader``."""
    yield reader


@contextmanager
def by_cudnn() -> Iterator[Reader]:
    """Yield SDPA by segments, through cuDNN as far as it takes them; further responses need a mask there."""
    order = [torch_attention.SDPBackend.CUDNN_ATTENTION, torch_attention.SDPBackend.EFFICIENT_ATTENTION]

    def read(states: list[Tensor], layout: RowLayout) -> Tensor:
        return in_segments(states, layout, masked=True)

    with torch_attention.sdpa_kernel(order, set_priority=True):
        yield read


@contextmanager
def with_implementation(name: str) -> Iterator[Reader]:
    """Yield torch's varlen kernel on another flash attention, which a package registers with torch."""
    activate = getattr(torch_attention, "activate_flash_attention_impl", None)
    restore = getattr(torch_attention, "restore_flash_attention_impl", None)
    if activate is None or restore is None:
        raise ImportError(f"torch {torch.__version__} cannot change its flash attention and change it back")
    activate(name)
    try:
        yield in_one_call(varlen.CANDIDATES["torch"]())
    finally:
        restore()


def flex_reader() -> Reader:
    """Return FlexAttention, compiled; the row's mask is made once a row, as it would be in training."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=True) if torch.cuda.is_available() else flex_attention
    masks: dict[int, Any] = {}

    def read(states: list[Tensor], layout: RowLayout) -> Tensor:
        query, key, value = (part.transpose(0, 1)[None] for part in states)
        if id(layout) not in masks:
            masks[id(layout)] = create_block_mask(sees(layout, query.device), None, None, *2 * (layout.num_tokens,))
        out = compiled(query, key, value, block_mask=masks[id(layout)], enable_gqa=True)
        return out[0].transpose(0, 1)

    return read


def sees(layout: RowLayout, device: torch.device) -> Callable[..., Tensor]:
    """Return which tokens a token of the row sees, as FlexAttention asks it."""
    tree, part = [], []
    for number, span in enumerate(layout.spans):
        tree += (span.prompt + sum(span.responses)) * [number]
        part += span.prompt * [0]
        for place, length in enumerate(span.responses, start=1):
            part += length * [place]
    trees, parts = (torch.tensor(values, device=device) for values in (tree, part))

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (parts[key] == 0) | (parts[key] == parts[query])
        return (key <= query) & (trees[key] == trees[query]) & same

    return seen
