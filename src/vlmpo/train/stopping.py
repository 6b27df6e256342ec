"""Let a training run end by SIGTERM or Ctrl-C after a whole step, with a checkpoint, on all ranks alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerCallback

from vlmpo import interrupt


class StopAtSignal(TrainerCallback):
    """Ends the run after a step once a signal has come to any rank.

    The ranks learn of it in the reduction that every step begins with, so that all of them end after that step. Before
    an evaluation, which may take long and which a signal ends at once, they are asked once more.

    Args:
        all_gather: returns the value of every rank.
        wait: returns once all ranks have called it.
    """

    def __init__(self, all_gather: Callable[[Any], list[Any]], wait: Callable[[], None]) -> None:
        self._all_gather = all_gather
        self._wait = wait
        self._agreed = 0

    def agree(self, signum: int) -> None:
        """Note the signal that all ranks know of; 0 if there is none."""
        self._agreed = self._agreed or signum

    @contextlib.contextmanager
    def watched(self, install: bool) -> Iterator[None]:
        """Put a signal off in the body until its step is finished; ``install``: also if nobody installed handlers."""
        self._agreed = 0
        with interrupt.watching() if install else contextlib.nullcontext(), interrupt.deferred():
            yield

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint, and for no evaluation, if the run is to end."""
        if args.world_size == 1:
            self.agree(interrupt.requested())
        elif control.should_evaluate and not self._agreed:
            self.agree(max(self._all_gather(interrupt.requested())))
        if self._agreed:
            control.should_save, control.should_evaluate = True, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do the same before an evaluation that follows an epoch."""
        if control.should_evaluate:
            self.on_step_end(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run: the checkpoint is whole. No rank leaves before the one that wrote it."""
        if self._agreed:
            self._wait()
            interrupt.stop(self._agreed, state.global_step)


@contextlib.contextmanager
def without_jit_checkpoint(args: Any) -> Iterator[None]:
    """Keep transformers from installing its handler for ``enable_jit_checkpoint`` in the body; ours means the same.

    Its run would go on as if it had finished.
    """
    asked, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
    try:
        yield
    finally:
        args.enable_jit_checkpoint = asked
