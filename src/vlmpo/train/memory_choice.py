"""Choose at the start of a run what a row may hold, and whether the vision tower's activations are kept.

The choice is recorded: how pairs are packed into rows decides in which order their gradients are summed, so that a run
that goes on must pack them as it did.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from vlmpo.errors import RunError
from vlmpo.train.device_memory import free_bytes, in_units
from vlmpo.train.memory import RowMemory, if_it_fits
from vlmpo.tree.packing import RowBound

# Tokens of a row if nothing is measured. A GPU needs many at once to be busy; on a CPU two pairs of 7 tiles in one row
# take 0.98 of the seconds that two rows take in float32, 0.95 in bfloat16, and a seventh more memory.
ROW_TOKENS = {"cpu": 2048, "cuda": 16384}
FULL_ROW = 8192  # tokens of a row with which a GPU is busy: to make room for larger ones nothing is computed again
_WIDE = 2048  # of text layers at least so wide half as many keep it busy
_MARGINS = {"cuda": 0.05}  # of what is free stays so: memory is not handed out without gaps, on CUDA nearly
_MARGIN = 0.1
LOOKED_AT = 8  # pairs, spread over the data set, of which the largest is measured
_SMALL = 0.1  # of a CPU's free memory: a model whose weights take less is not measured


def row_tokens(device: str) -> int:
    """Return the tokens of a row on a ``device`` of that type if nothing is measured."""
    return ROW_TOKENS.get(device, ROW_TOKENS["cuda"])


def full_row(width: int) -> int:
    """Return the tokens of a row that keep a GPU busy, for text layers of this width."""
    return FULL_ROW if width < _WIDE else FULL_ROW // 2


def room_of(device: torch.device, free: int) -> int:
    """Return how many of the ``free`` bytes of ``device`` a row may take."""
    return int((1 - _MARGINS.get(device.type, _MARGIN)) * free)


def fixed_tokens(tokens: int | str | None, device: torch.device) -> int | None:
    """Return the most tokens of a row before anything is measured: ``tokens``, unless they are ``auto``."""
    return row_tokens(device.type) if isinstance(tokens, str) else tokens


@dataclass
class MemoryChoice:
    """Holds what a run has chosen, and what it was asked for.

    Attributes:
        asked: ``max_tokens_per_row`` and ``vision_memory`` as set, and which layers are computed again, if any.
        bound: of rows.
        vision: ``keep`` or ``recompute``.
        out_of_memory: how often a row did not fit, so that the bound was lowered.
        earlier: bounds that held before, each up to an optimizer step, this one included.
        trying: the step that is made again with a lower bound, until all its rows have been read; else 0.
    """

    asked: list[Any]
    bound: RowBound
    vision: str = "keep"
    out_of_memory: int = 0
    earlier: tuple[tuple[int, RowBound], ...] = ()
    trying: int = 0
    line: str = field(default="", compare=False)

    def bound_at(self, step: int) -> RowBound:
        """Return the bound under which optimizer step ``step``, from 1, is made; of 0: what was chosen at first."""
        return next((bound for last, bound in self.earlier if step <= last), self.bound)

    def lowered(self, bound: RowBound, step: int) -> MemoryChoice:
        """Return the choice with ``bound`` from optimizer step ``step`` on."""
        held = *self._before(step), (step - 1, self.bound_at(step - 1))
        return replace(self, bound=bound, out_of_memory=self.out_of_memory + 1, earlier=held, trying=step)

    def _before(self, step: int) -> tuple[tuple[int, RowBound], ...]:
        """Return those of ``earlier`` that were left before optimizer step ``step``."""
        return tuple(entry for entry in self.earlier if entry[0] < step - 1)

    def without(self, step: int) -> MemoryChoice:
        """Return the choice as it was before optimizer step ``step``."""
        return replace(self, bound=self.bound_at(step - 1), earlier=self._before(step), trying=0)

    def to_json(self) -> dict[str, Any]:
        """Return it in plain JSON values."""
        values = {"asked": self.asked, "vision": self.vision, "out_of_memory": self.out_of_memory}
        earlier = [[last, bound.to_json()] for last, bound in self.earlier]
        return {**values, "bound": self.bound.to_json(), "earlier": earlier, "trying": self.trying}

    @classmethod
    def from_json(cls, values: Any, asked: list[Any]) -> MemoryChoice | None:
        """Return what an earlier session of the run chose; None if it was asked for something else, or is damaged.

        Without a bound that it was only trying: whether the step could be made with it is not known.
        """
        try:
            if values["asked"] != asked:
                return None
            bound = RowBound.from_json(values["bound"])
            earlier = tuple((int(last), RowBound.from_json(held)) for last, held in values.get("earlier", ()))
            choice = cls(asked, bound, str(values["vision"]), int(values["out_of_memory"]), earlier)
            tried = int(values.get("trying", 0))
            return choice.without(tried) if tried else choice
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(frozen=True)
class Situation:
    """Holds what the choice depends on, on one rank.

    Attributes:
        device: of the run.
        tokens: ``max_tokens_per_row``: a number, None for no bound, or ``auto``.
        vision: ``vision_memory``.
        pairs_at_once: pairs of a micro-batch.
        can_recompute: whether the tower can be read in blocks, and trains.
        can_measure: whether rows can be read alone before the first step (not under FSDP or DeepSpeed).
        ranks_here: ranks that share this machine's memory.
        full_row: tokens of a row with which a GPU is busy.
        every_n_layers: which of the model's layers are computed again; 0: none.
    """

    device: torch.device
    tokens: int | str | None
    vision: str
    pairs_at_once: int
    can_recompute: bool
    can_measure: bool
    ranks_here: int
    full_row: int = FULL_ROW
    every_n_layers: int = 0

    @property
    def asked(self) -> list[Any]:
        """What a choice is only good for."""
        return [self.tokens, self.vision, *([self.every_n_layers] if self.every_n_layers else [])]


class Probe(Protocol):
    """Reads rows before the first step."""

    @property
    def weights(self) -> int:
        """Bytes of the model's weights."""

    def largest(self) -> tuple[int, int]:
        """Return tokens and patches of the largest of some pairs."""

    def measure(self, recompute: bool) -> RowMemory:
        """Return what rows take, with the vision tower in blocks of tiles or not."""


def choose_memory(
    situation: Situation,
    *,
    probe: Probe,
    pending: Callable[[], int],
    gather: Callable[[Any], list[Any]],
) -> MemoryChoice:
    """Choose what rows hold, the same on every rank.

    Args:
        situation: of this rank.
        probe: reads rows of the largest of some pairs.
        pending: returns what will be allocated beside rows.
        gather: returns what each rank gives.
    """
    s = situation
    free = free_bytes(s.device, s.ranks_here)
    enough = s.device.type == "cpu" and probe.weights < _SMALL * free
    wanted = s.tokens == "auto" or (s.vision == "auto" and s.can_recompute)
    if not s.can_measure or not wanted or any(gather(enough)):
        return MemoryChoice(
            s.asked, RowBound(fixed_tokens(s.tokens, s.device)), "keep" if s.vision == "auto" else s.vision
        )

    def look(recompute: bool) -> tuple[RowMemory | None, int]:
        memory = _measured(probe, recompute)
        room = room_of(s.device, free_bytes(s.device, s.ranks_here) - pending())
        found = gather((memory, room))
        measured = [memory for memory, _ in found if memory is not None]
        return _largest(measured) if len(measured) == len(found) else None, min(room for _, room in found)

    return settled(s, probe.largest(), look)[0]


def settled(
    s: Situation, largest: tuple[int, int], look: Callable[[bool], tuple[RowMemory | None, int]]
) -> tuple[MemoryChoice, RowMemory | None]:
    """Return the choice, and what rows take under it: the vision tower is computed again only if it must be.

    Args:
        s: what the choice depends on.
        largest: tokens and patches of the largest of some pairs.
        look: returns what rows take, with the tower in blocks or not, and how many bytes there are for a row.
    """
    rows = s.tokens if isinstance(s.tokens, int) else s.full_row
    row = [max(min(s.pairs_at_once, rows // max(largest[0], 1)), 1) * size for size in largest]
    tried = ["keep", "recompute"] if s.vision == "auto" and s.can_recompute else [s.vision]
    vision, memory, room = "keep", None, 0
    for way in tried:
        vision = "keep" if way == "auto" else way
        memory, room = look(vision == "recompute")
        if memory is not None and memory.peak(*row) <= room:
            break
    return _choice(s, vision, memory, max(room, 0), largest), memory


def _measured(probe: Probe, recompute: bool) -> RowMemory | None:
    """Return what rows take; None if not even one pair fits."""
    return if_it_fits(lambda: probe.measure(recompute))[0]


def _largest(of_ranks: Sequence[RowMemory]) -> RowMemory:
    """Return the most that any rank measured, so that all pack alike."""
    phases = zip(*(memory.phases for memory in of_ranks), strict=True)
    return of_ranks[0]._replace(
        phases=tuple(type(same[0])(*(max(values) for values in zip(*same, strict=True))) for same in phases)
    )


def _choice(s: Situation, vision: str, memory: RowMemory | None, room: int, largest: tuple[int, int]) -> MemoryChoice:
    how = "the vision tower's activations are computed again, a few tiles at a time" if vision == "recompute" else ""
    if not isinstance(s.tokens, str):
        return MemoryChoice(s.asked, RowBound(s.tokens), vision, line=how)
    if memory is None:
        line = f"rows of one pair each: one of {largest[0]} tokens and {largest[1]} patches hardly fits"
        return MemoryChoice(s.asked, RowBound(0), vision, line=line)
    bound = memory.bound(room)
    if s.device.type == "cpu":  # larger rows are no faster there
        bound = replace(bound, limits=(*bound.limits, (1, 0, row_tokens("cpu"))))
    line = rows_line(bound, memory, room, largest)
    return MemoryChoice(s.asked, bound, vision, line=f"{line}; {how}" if how else line)


def rows_line(bound: RowBound, memory: RowMemory, room: int, largest: tuple[int, int]) -> str:
    """Return a line on what rows may hold.

    Args:
        bound: of rows.
        memory: what they take.
        room: bytes there are for them.
        largest: tokens and patches of the largest pair that was looked at.
    """
    cost = bound.cost_of(*largest)
    pairs = (bound.most or 0) // max(cost, 1)
    tokens = max((bound.most or 0) * largest[0] // max(cost, 1), largest[0])
    each = f"a pair of {largest[0]} tokens and {largest[1]} patches takes {in_units(memory.peak(*largest))}"
    fits = f"{pairs} such pairs" if pairs > 1 else "one such pair"
    return f"rows of up to {tokens} tokens ({fits}): {each} of the {in_units(room)} there are for a row"


def describe_choice(choice: MemoryChoice | None, known: bool) -> str:
    """Return in words what was chosen, or that it is what the run had ``known`` from before."""
    if choice is None:
        return ""
    bound = choice.bound
    if known:
        size = f"of up to {bound.most} tokens" if not bound.limits and bound.most else "as large"
        return f"rows {size} as this run had before (max_tokens_per_row, vision_memory: {choice.vision})"
    if choice.line:
        return choice.line
    rows = "each micro-batch is read whole" if bound.most is None else f"rows of up to {bound.most} tokens"
    return rows if choice.vision == "keep" else f"{rows}; the vision tower's activations are computed again"


def spread(count: int) -> Iterable[int]:
    """Return the places of up to LOOKED_AT items, evenly spread over ``count``."""
    looked_at = min(LOOKED_AT, count)
    return [at * (count - 1) // max(looked_at - 1, 1) for at in range(looked_at)]


def refuse_blocks(vision: str, *, known: bool, share_passes: bool) -> None:
    """Raise RunError if ``vision_memory: recompute`` cannot be had.

    Args:
        vision: ``vision_memory``.
        known: whether the model has a tower that can be read in blocks.
        share_passes: whether ranks must make the same passes: those with fewer tiles would have fewer blocks.
    """
    if vision != "recompute" or (known and not share_passes):
        return
    if share_passes:
        raise RunError(
            "model.vision_memory: recompute reads as many blocks as a rank has tiles, and under FSDP or DeepSpeed all "
            "ranks must make the same passes; set keep, and training.activation_checkpointing: true"
        )
    raise RunError(
        "model.vision_memory: recompute needs a vision tower that is known to read each tile by itself; this model has "
        "none: set keep, and training.activation_checkpointing: true"
    )


def ranks_of_machine() -> int:
    """Return how many ranks share this machine."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
