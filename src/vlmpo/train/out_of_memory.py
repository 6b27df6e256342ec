"""Make an optimizer step again, with smaller rows, if one of its rows is out of memory.

A backward pass that fails has added some of its row's gradients to those of the rows before it; nothing tells which. So
the step begins anew: its gradients are dropped, and all its batches up to the one that failed are packed into rows of
half the size and read again, earlier ones of an accumulated step too. They are on the host, and the step's sums are put
back to where they were. The step is then, bit by bit, that of a run whose rows had this bound from here on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from vlmpo.errors import RunError, first_line
from vlmpo.log import logger
from vlmpo.train.batching import Collator, MicroBatch, PromptGroup, groups_of
from vlmpo.train.memory import Result, if_it_fits, is_out_of_memory
from vlmpo.train.readers import ended_reader
from vlmpo.tree.packing import RowBound, count_patches

_ELSEWHERE = (
    "out of memory outside of a training row (the optimizer's states, an evaluation or a checkpoint): {reason}. Lower "
    "training.per_device_eval_batch_size or training.max_tokens_per_row, set training.optim: adamw_bnb_8bit or "
    "adafactor, model.lora or reference.kind: cache, or shard the model (training.fsdp)"
)
_TO_SCORE = "a lower data.max_tiles or data.max_length, model.dtype: bfloat16, or shard the model (training.fsdp)"


@dataclass
class Attempt:
    """Holds the micro-batch, on the host, that is read at present, and why memory is out, if it is."""

    reading: MicroBatch | None = None
    failure: str | None = None


class StepAgain:
    """Lowers the bound of rows if one is out of memory.

    Args:
        collator: of the run; its bound is lowered.
        alone: whether this process makes the steps alone; many ranks would have to fail together.
        whole: whether a batch is read in one pass whatever the bound (``reward_shift: running``).
        patch_pixels: pixels of a patch of the vision tower.
        remedies: returns what the user can set.
        lowered: called once the bound has been lowered.
    """

    def __init__(
        self,
        collator: Collator,
        *,
        alone: bool,
        whole: bool,
        patch_pixels: int,
        remedies: Callable[[], str],
        lowered: Callable[[], None],
    ) -> None:
        self._collator = collator
        self._alone = alone
        self._whole = whole
        self._patch_pixels = patch_pixels
        self._remedies = remedies
        self._lowered = lowered

    @contextmanager
    def watched(self) -> Iterator[Attempt]:
        """Note in the attempt, instead of raising it, that memory is out in the body; the bound is then lowered.

        Raises:
            RunError: a row of a single pair is out of memory, or a row on one of many ranks.
        """
        attempt = Attempt()
        try:
            yield attempt
        except Exception as error:
            if attempt.reading is None or not is_out_of_memory(error):
                raise
            attempt.failure = first_line(error)
        if attempt.failure is not None:
            self._halve(attempt.reading, attempt.failure)

    def read_in_parts(
        self, micro_batch: MicroBatch, read: Callable[[MicroBatch], Result]
    ) -> Iterator[tuple[MicroBatch, Result]]:
        """Yield a micro-batch and what ``read``, a pass without gradient, returns; of its halves if memory is out.

        The bound stays as it is: such a pass takes less than a training row, which it is for.

        Raises:
            RunError: a single pair is out of memory, or a row on one of many ranks.
        """
        result, reason = if_it_fits(lambda: read(micro_batch))
        if result is not None:
            yield micro_batch, result
            return
        parts = self._collator.halved(micro_batch) if self._alone else []
        if len(parts) < 2:
            raise self._failed(f"{self._describe(micro_batch)}, is out of memory ({reason}); set {_TO_SCORE}")
        for part in parts:
            yield from self.read_in_parts(part, read)

    def _halve(self, failed: MicroBatch | None, reason: str) -> None:
        """Lower the bound to half of the row that has failed, or raise RunError."""
        bound = self._collator.bound
        assert failed is not None
        groups = groups_of(failed, self._collator.shared) if not self._whole else []
        if len(failed) < 2 or not self._alone or not groups:
            raise self._error(failed, reason)
        half = max(sum(bound.cost(group.tree) for group in groups) // 2, 1)
        most = half if bound.most is None else min(half, bound.most)
        self._collator.bound = replace(bound, most=most, divide=bound.divide or len(groups) == 1)
        logger.info(
            f"out of memory in a row of {failed.num_tokens} tokens and {len(failed)} pairs: the step is made again, "
            f"and from now on rows are at most half as large ({size_of(self._collator.bound, failed, groups)}); to do "
            "with larger ones: " + self._remedies()
        )
        self._lowered()

    def _error(self, failed: MicroBatch, reason: str) -> RunError:
        """Return the error of a row that cannot be made smaller; it names the largest pair."""
        remedies = self._remedies()
        if len(failed) > 1 and self._whole:
            remedies = f"lower training.per_device_train_batch_size (reward_shift: running reads it whole), {remedies}"
        elif len(failed) > 1 and not self._alone:
            remedies = f"training.max_tokens_per_row: {max(failed.num_tokens // 2, 1)}, {remedies}"
        what = self._describe(failed, whole=self._whole)
        return self._failed(f"{what}, is out of memory ({reason}); set {remedies}")

    def _failed(self, text: str) -> RunError:
        error = RunError(text)
        if not self._alone:
            error.met_by = "rank"
        return error

    def _describe(self, failed: MicroBatch, whole: bool = False) -> str:
        """Return the largest pair of a row in words; ``whole``: that row is a batch, of which some pairs are named."""
        if not len(failed):
            return "a row of no pair, which keeps ranks in step"
        groups = groups_of(failed, self._collator.shared) if not whole and failed.groups else []
        largest = max(groups, key=lambda group: group.tree.num_tokens, default=None)
        if largest is None:
            names = ", ".join(failed.origins[:3])
            return f"a micro-batch of {len(failed)} pairs and {failed.num_tokens} tokens, {names}"
        patches = count_patches(largest.tree, self._patch_pixels)
        name = largest.pairs[0].origin or "a pair without a place"
        what = f"{name}: a pair of {largest.tree.num_tokens} tokens and {patches} image patches"
        if len(failed) > 1:
            what += f", in a row of {len(failed)} pairs and {failed.num_tokens} tokens"
        return what


def size_of(bound: RowBound, failed: MicroBatch, groups: list[PromptGroup]) -> str:
    """Return how large rows like ``failed`` may be under ``bound``, in words."""
    cost = sum(bound.cost(group.tree) for group in groups)
    return f"about {(bound.most or 0) * failed.num_tokens // max(cost, 1)} tokens"


def remedies(settings: Any, *, trains_tower: bool, recomputes: bool, adapter: bool) -> str:
    """Return what takes less memory and is not set yet, as recipe keys, the cheapest first.

    Args:
        settings: MPOConfig of the run.
        trains_tower: whether the vision tower trains.
        recomputes: whether it is read in blocks.
        adapter: whether only an adapter trains.
    """
    known = {
        "training.activation_checkpointing: true": not settings.gradient_checkpointing,
        "model.vision_memory: recompute": trains_tower and not recomputes,
        "reference.kind: cache": settings.reference_kind not in ("cache", "adapter") and not adapter,
        "a lower data.max_tiles or data.max_length": True,
        "model.lora": not adapter,
    }
    return ", ".join(remedy for remedy, helps in known.items() if helps)


@contextmanager
def explained() -> Iterator[None]:
    """Turn an error of memory in the body, a run, into RunError: a reader that was killed for it too.

    Rows of a step have errors of their own.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        if (reader := ended_reader(error)) is not None:
            told = RunError(reader)
            told.met_by = "rank"
            raise told from error
        if not is_out_of_memory(error):
            raise
        raise RunError(_ELSEWHERE.format(reason=first_line(error))) from error
