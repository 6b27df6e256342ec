"""Keep a run's rows within memory: choose what they hold before its first step, and less if one does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from vlmpo.models.adapters import is_peft, unwrap_peft
from vlmpo.train.batching import Collator
from vlmpo.train.config import MPOConfig
from vlmpo.train.lengths import count_patch_pixels
from vlmpo.train.memory_choice import (
    MemoryChoice,
    Probe,
    Situation,
    choose_memory,
    describe_choice,
    full_row,
    ranks_of_machine,
    refuse_blocks,
)
from vlmpo.train.out_of_memory import StepAgain, remedies
from vlmpo.train.provenance import Settings
from vlmpo.train.rank_sync import RankSync
from vlmpo.train.reference import Reference
from vlmpo.tree.vision_blocks import can_read_in_blocks, read_in_blocks, trains_tower


class RowsInMemory:
    """Sets the bound of a run's rows, and whether its vision tower is computed again.

    Args:
        args: the settings of the run.
        model: the policy, under no wrapper of accelerate.
        collator: of the run; its bound is set.
        ranks: the run's collectives.

    Attributes:
        choice: what is chosen; None until training has begun.
        words: it in words; empty until then.
        before: what an earlier session of the run has chosen at last, as :meth:`chosen` returns it. A checkpoint's goes
            before it if the two differ in what was done up to there.
        on_change: called whenever :meth:`chosen` changes.
        step_again: lowers the bound if a row is out of memory.
    """

    def __init__(self, args: MPOConfig, *, model: nn.Module, collator: Collator, ranks: RankSync) -> None:
        self._args = args
        self._model = model
        self._collator = collator
        self._ranks = ranks
        self.choice: MemoryChoice | None = None
        self.words = ""
        self._step = 0
        self.before: Settings = {}
        self.on_change: Callable[[], None] = lambda: None
        self.step_again = StepAgain(
            collator,
            alone=ranks.accelerator.num_processes == 1 and not ranks.share_passes,
            whole=args.reward_shift == "running",
            patch_pixels=count_patch_pixels(model),
            remedies=self._remedies,
            lowered=self._note_lower_bound,
        )

    def choose(
        self,
        known: Settings,
        *,
        done: int,
        pairs_at_once: int,
        probe: Callable[[], Probe],
        pending: Callable[[], int],
        reference: Reference | None,
    ) -> None:
        """Choose what rows hold; or take over what an earlier session of this run chose.

        Args:
            known: the settings of the checkpoint that is resumed from; empty without one.
            done: its optimizer steps.
            pairs_at_once: pairs of a micro-batch.
            probe: makes what reads rows before the first step.
            pending: returns the bytes that will be allocated beside rows.
            reference: reads images as the policy does.
        """
        policy, args, share_passes = unwrap_peft(self._model), self._args, self._ranks.share_passes
        in_blocks = can_read_in_blocks(policy)
        refuse_blocks(args.vision_memory, known=in_blocks, share_passes=share_passes)
        situation = Situation(
            device=args.device,
            tokens=args.max_tokens_per_row,
            vision=args.vision_memory,
            pairs_at_once=pairs_at_once,
            can_recompute=self._can_recompute(),
            can_measure=not share_passes,
            ranks_here=ranks_of_machine(),
            full_row=full_row(policy.config.get_text_config().hidden_size),
            every_n_layers=_every_n_layers(args),
        )
        earlier = self._chosen_before(known, done, situation.asked)
        self.choice = earlier or choose_memory(situation, probe=probe(), pending=pending, gather=self._ranks.all_gather)
        self.words = describe_choice(self.choice, known=earlier is not None)
        self._collator.bound = self.choice.bound_at(done)
        if in_blocks:
            read_in_blocks(policy, self.choice.vision == "recompute")
            if reference is not None:
                reference.read_in_blocks(self.choice.vision == "recompute")
        self.on_change()

    def begin_step(self, step: int) -> None:
        """Lower the bound if an earlier session of the run did so at optimizer step ``step``."""
        self._step = step
        if self.choice is not None and self.choice.bound_at(step) != self.choice.bound_at(step - 1):
            self._collator.bound = self.choice.bound_at(step)

    def end_step(self) -> None:
        """Keep a bound that was lowered in the step under way: all its rows have been read."""
        if self.choice is not None and self.choice.trying:
            self.choice = replace(self.choice, trying=0)
            self.on_change()

    def chosen(self) -> Settings:
        """Return what is chosen, in plain JSON values; a run that goes on takes it over."""
        return {} if self.choice is None else {"memory": self.choice.to_json()}

    def _chosen_before(self, known: Settings, done: int, asked: list[Any]) -> MemoryChoice | None:
        """Return what earlier sessions chose, None if nothing; arguments as of :meth:`choose`.

        The run's last word tells of rows that were out of memory after the checkpoint, too: its steps are made again
        as they were.
        """
        last = MemoryChoice.from_json(self.before.get("memory"), asked)
        if "chosen" not in known:
            return last
        then = MemoryChoice.from_json(known["chosen"].get("memory"), asked)
        if then is None or last is None:
            return then
        same = (then.vision, then.bound_at(done)) == (last.vision, last.bound_at(done))
        return last if same else then

    def _can_recompute(self) -> bool:
        policy = unwrap_peft(self._model)
        return can_read_in_blocks(policy) and trains_tower(policy) and not self._ranks.share_passes

    def _remedies(self) -> str:
        recomputes = self.choice is not None and self.choice.vision == "recompute"
        return remedies(
            self._args, trains_tower=self._can_recompute(), recomputes=recomputes, adapter=is_peft(self._model)
        )

    def _note_lower_bound(self) -> None:
        if self.choice is not None:
            self.choice = self.choice.lowered(self._collator.bound, self._step)
        self.on_change()


def _every_n_layers(args: MPOConfig) -> int:
    """Return of which layers activations are computed again; 0: of none."""
    if not (args.activation_checkpointing or args.gradient_checkpointing):
        return 0
    return int((args.activation_checkpointing_kwargs or {}).get("every_n_layers", 1))
