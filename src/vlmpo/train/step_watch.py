"""Stop a run at the first optimizer step whose numbers are not finite, and say which pairs and which numbers.

A log-prob or a loss that is not finite is made to show in the gradient: the loss is divided by 1, or by 0 if one of
them is not. The gradient's norm, which all ranks have alike, then tells everything at once, and is the one number
that is read from the device in a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vlmpo.errors import RunError
from vlmpo.loss import LossOutput
from vlmpo.models.finite import BadWeight, describe
from vlmpo.train.batching import MicroBatch

PAIRS_SHOWN = 8
MAX_OVERFLOWS = 20  # steps in a row that fp16's loss scaler may skip


@dataclass(frozen=True)
class PairNumbers:
    """Holds the log-probs of one pair, by name, e.g. ``policy chosen``."""

    origin: str
    logps: dict[str, float]

    @property
    def bad(self) -> list[str]:
        """Names of the log-probs that are not finite."""
        return [name for name, value in self.logps.items() if not math.isfinite(value)]


@dataclass(frozen=True)
class StepReport:
    """Holds what one rank computed in an optimizer step: its pairs, and its share of loss and terms."""

    pairs: list[PairNumbers]
    terms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Seen:
    origins: list[str]
    logps: dict[str, Tensor]  # [pairs] each
    terms: dict[str, Tensor]


class StepWatch:
    """Watches the numbers of the optimizer step under way.

    Attributes:
        overflows: steps in a row, up to now, that fp16's loss scaler skipped.
        skipped: such steps of the run.
    """

    def __init__(self) -> None:
        self.overflows = self.skipped = 0
        self._seen: list[_Seen] = []

    def start(self) -> None:
        """Begin an optimizer step."""
        self._seen = []

    def guarded(self, micro_batch: MicroBatch, policy: Tensor, reference: Tensor | None, output: LossOutput) -> Tensor:
        """Return the loss of ``output``, unchanged but for its gradient, which is not finite if a number here is not.

        Args:
            micro_batch: the pairs.
            policy, reference: log-probs of their responses, ``[responses]``.
            output: their loss.
        """
        logps = {}
        for name, of_model in (("policy", policy.detach()), ("reference", reference)):
            if of_model is not None:
                logps[f"{name} chosen"] = of_model[micro_batch.chosen]
                if micro_batch.rejected is not None and reference is not None:
                    logps[f"{name} rejected"] = of_model[micro_batch.rejected]
        loss = output.loss.detach()
        self._seen.append(_Seen(micro_batch.origins, logps, {"loss": loss, **output.terms}))
        finite = torch.isfinite(torch.cat([loss.reshape(1), *logps.values()])).all()
        return output.loss / finite.to(loss.dtype)

    def excuses(self, finite: bool, scaled: bool) -> bool:
        """Return whether the run may go on after this step.

        Args:
            finite: whether the gradient's norm is.
            scaled: whether a loss scaler looks for overflows and skips such steps (fp16).
        """
        if finite:
            self.overflows = 0
            return True
        self.overflows += scaled
        self.skipped += scaled
        return scaled and self.overflows <= MAX_OVERFLOWS

    def report(self) -> StepReport:
        """Return the numbers of this rank's part of the step."""
        pairs = []
        terms: dict[str, float] = {}
        for seen in self._seen:
            columns = {name: values.tolist() for name, values in seen.logps.items()}
            for at, origin in enumerate(seen.origins):
                pairs.append(PairNumbers(origin, {name: values[at] for name, values in columns.items()}))
            for name, value in seen.terms.items():
                terms[name] = terms.get(name, 0.0) + float(value)
        return StepReport(pairs, terms)


def unsaved_error(bad: list[BadWeight], step: int, checkpoint: Path | None) -> RunError:
    """Return the error of a model that is not saved after ``step``, as some weights are ``bad``.

    ``checkpoint`` is the last one; None if there is none.
    """
    kept = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint"
    return RunError(f"step {step}: {describe(bad)}; the model is not saved, {kept}")


def non_finite_error(
    ranks: Sequence[StepReport],
    *,
    step: int,
    grad_norm: float,
    overflows: int,
    checkpoint: Path | None,
    moved: bool,
) -> RunError:
    """Return the error that ends a run at an optimizer step whose numbers are not finite.

    Args:
        ranks: what each rank computed.
        step: number of the step, from 1.
        grad_norm: the gradient's norm.
        overflows: steps in a row that fp16's loss scaler skipped, this one among them; 0 without one.
        checkpoint: the last checkpoint; None if there is none.
        moved: whether the weights have moved nevertheless (DeepSpeed).
    """
    pairs = sorted((pair for rank in ranks for pair in rank.pairs), key=lambda pair: not pair.bad)
    terms = {name: sum(rank.terms.get(name, 0.0) for rank in ranks) for rank in ranks for name in rank.terms}
    state = (
        "DeepSpeed has made the step already: its weights are not saved"
        if moved
        else "the run stops before the weights move"
    )
    lines = [f"step {step}: {_what(pairs, terms, overflows)}; {state}"]
    for pair in pairs[:PAIRS_SHOWN]:
        numbers = ", ".join(f"{name} {value:.6g}" for name, value in pair.logps.items())
        lines.append(f"  {pair.origin or 'a pair without a place'}: {numbers}")
    if len(pairs) > PAIRS_SHOWN:
        lines.append(f"  and {len(pairs) - PAIRS_SHOWN} more pairs")
    shown = ", ".join(f"{name} {value:.6g}" for name, value in terms.items())
    lines.append(f"  {shown}{', ' if shown else ''}gradient norm {grad_norm:.6g}")
    lines.append(f"  last checkpoint: {checkpoint or 'there is none yet'}")
    lines.append(f"  {_remedy(pairs, overflows, checkpoint)}")
    return RunError("\n".join(lines))


def _what(pairs: Sequence[PairNumbers], terms: dict[str, float], overflows: int) -> str:
    bad = [pair for pair in pairs if pair.bad]
    if bad:
        models = " and ".join(dict.fromkeys(name.split()[0] for pair in bad for name in pair.bad))
        what = f"log-probs of the {models} are not finite in {len(bad)} of its {len(pairs)} pairs"
    elif not all(math.isfinite(value) for value in terms.values()):
        names = ", ".join(name for name, value in terms.items() if not math.isfinite(value))
        what = f"the loss is not finite ({names})"
    else:
        what = "the gradient is not finite, though loss and log-probs are"
    return f"{what}, {overflows} steps in a row in fp16" if overflows else what


def _remedy(pairs: Sequence[PairNumbers], overflows: int, checkpoint: Path | None) -> str:
    if overflows:
        remedy = "set training.bf16: true in the place of fp16, which overflows"
    elif any(name.startswith("reference") for pair in pairs for name in pair.bad):
        remedy = "look at these records, and at the reference's weights and dtype (model.path, reference.cache_dir)"
    else:
        remedy = "lower training.learning_rate, set training.max_grad_norm (1.0), or take these records out"
    again = "resume with training.resume_from_checkpoint=true" if checkpoint else "start anew"
    return f"{remedy}; then {again}"
