"""The checkpoints of one run, on all its ranks: the one it goes on from, and those it writes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlmpo.log import logger
from vlmpo.train.checkpoint import check_rates, check_reference, damage, read_state, write_state
from vlmpo.train.checkpoint_io import checkpoints_in, checksums, clear_partial, partial_of, publish, whole_list
from vlmpo.train.config import MPOConfig
from vlmpo.train.provenance import Changes, Settings, changes, describe, refuse_changes, settings_of, utc_now
from vlmpo.train.rank_sync import RankSync
from vlmpo.train.resume import choose_checkpoint
from vlmpo.train.sharding import broadcast_object


class RunCheckpoints:
    """Finds and writes the checkpoints of a run; every rank calls every method.

    Args:
        args: the settings of the run.
        ranks: its collectives.
        made_by: returns what the run is made by.
        reuse: takes over what a run chose by itself, from the settings of the checkpoint it goes on from.
        reference_hash: returns the hash of its reference's weights; None without one.
        deepspeed: whether DeepSpeed loads the optimizer.

    Attributes:
        history: when the run was resumed, from what, and what had changed; kept in checkpoints.
        partial: the folder that a checkpoint is being written into; None: none is.
    """

    def __init__(
        self,
        args: MPOConfig,
        ranks: RankSync,
        *,
        made_by: Callable[[], Settings],
        reuse: Callable[[Settings], None],
        reference_hash: Callable[[], str | None],
        deepspeed: bool,
    ) -> None:
        self.history: list[dict[str, Any]] = []
        self.partial: str | None = None
        self._args = args
        self._ranks = ranks
        self._made_by = made_by
        self._reuse = reuse
        self._reference_hash = reference_hash
        self._deepspeed = deepspeed
        self._chosen: tuple[Any, str | None] | None = None  # what was asked for, and the answer

    @property
    def _writes(self) -> bool:
        """Whether this rank writes the files that a run has once."""
        return bool(self._args.should_save)

    def first_reference_hash(self) -> str | None:
        """Return the first rank's hash of the reference."""
        return self._ranks.all_gather(self._reference_hash())[0]

    def _wait(self) -> None:
        self._ranks.accelerator.wait_for_everyone()

    # ---- going on ----

    def choose(self, resume: str | bool | None) -> str | None:
        """Return the checkpoint that the run goes on from, None if it starts; once asked, the answer stays.

        The checkpoint is sound, and this run is made by what it was made by. What a kill left half written in the run
        folder is removed.

        Args:
            resume: a name, True for the newest sound one of the run folder, or None.

        Raises:
            RunError: the checkpoint, or each of the folder, is damaged; or it is of other settings, rates or another
                reference.
        """
        if self._chosen is None or resume not in self._chosen:
            folder = self._args.output_dir
            self._wait()  # others may still be looking at what is there
            if self._writes:
                clear_partial(folder)
            self._wait()
            found = None
            if resume:
                there = broadcast_object(self._ranks.accelerator, checkpoints_in(folder))
                found = choose_checkpoint(resume, folder, there, self.damage_in)  # type: ignore[arg-type]
                if found is None:
                    logger.info(f"there is no checkpoint in {folder} yet: the run starts")
            if found is not None:
                self._check_made_by(found)
            self._chosen = (resume, None if found is None else os.fspath(found))
        return self._chosen[1]

    def forget_choice(self) -> None:
        """Look again at the next call of :meth:`choose`."""
        self._chosen = None

    def damage_in(self, checkpoint: Path, to_resume: bool = True) -> list[str]:
        """Return what is wrong with a checkpoint, on every rank the same; ranks share the reading of its files."""
        each = self._args.save_on_each_node  # each node has files of its own
        part, parts = (0, 1) if each else (self._args.process_index, self._args.world_size)
        found = self._ranks.all_gather(damage(checkpoint, to_resume=to_resume, part=part, parts=parts))
        return list(dict.fromkeys(itertools.chain.from_iterable(found)))

    def check_settings(self, before: Settings, where: str) -> Changes:
        """Return how this run's settings differ from those ``before``, which ``where`` holds.

        Raises:
            RunError: a change would make the record of the run false, and ``allow_changes`` does not name it.
        """
        now, allowed = self._made_by(), self._args.allow_changes or ()
        found = changes(before, now)
        refuse_changes(found, before, now, where=where, allowed=allowed, deepspeed=self._deepspeed)
        return found

    def _check_made_by(self, checkpoint: Path) -> None:
        """Compare the run with what a checkpoint was made by, and note the resume in the history."""
        state = read_state(checkpoint)
        before = settings_of(checkpoint, state)
        self._reuse(before)
        found = self.check_settings(before, str(checkpoint))
        check_rates(checkpoint, self._args.learning_rates)
        check_reference(checkpoint, self.first_reference_hash())
        if found:
            logger.info(f"changed since {checkpoint}, and noted: {describe(found)}")
        noted = {key: list(pair) for key, pair in found.items()}
        self.history = [*state.get("history", []), {"resumed": utc_now(), "from": str(checkpoint), "changes": noted}]

    # ---- writing ----

    @contextmanager
    def written_beside(self, checkpoint: Path) -> Iterator[Path]:
        """Yield the folder in which the body is to write ``checkpoint``; :attr:`partial` is the one above it."""
        partial = partial_of(checkpoint)
        if self._writes:
            clear_partial(checkpoint.parent)
        self._wait()
        self.partial = os.fspath(partial.parent)
        try:
            yield partial
        finally:
            self.partial = None

    def note_best(self, state: Any, folder: Path) -> None:
        """Note in the TrainerState where the best checkpoint is, which may be the one that is being written."""
        best = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if state.best_global_step and (state.best_global_step == state.global_step or best.exists()):
            state.best_model_checkpoint = os.fspath(best)

    def complete(self, checkpoint: Path, **state: Any) -> None:
        """Write our own part of a checkpoint, which marks it complete, and put it in its place.

        Args:
            checkpoint: its place.
            state: see :func:`vlmpo.train.checkpoint.write_state`.
        """
        partial = partial_of(checkpoint)
        self._wait()  # all ranks have written their files
        own = checksums(partial, rank=self._args.process_index, first=self._writes)
        of_ranks = self._ranks.all_gather(own)
        state |= {"reference_hash": self._reference_hash(), "learning_rates": self._args.learning_rates}
        state |= {"settings": self._made_by(), "history": self.history}
        if self._writes:
            write_state(partial, **state, files=whole_list(partial, [*of_ranks, own]))
            publish(partial, checkpoint)
        self._wait()
