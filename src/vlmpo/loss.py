"""Compute the loss of Mixed Preference Optimization: its terms, their weighted sum, and the reward shift delta.

All terms take and return one number per pair, ``[pairs]``, in the precision of their input (float32 or better). Rewards
are the implicit ones, ``r = beta * (log pi(y|x) - log ref(y|x))``, with log-probs summed over the scored tokens.

A call sees a share of the optimizer step's global batch (a micro-batch on one rank). It sums locally and divides by
the denominators of the WHOLE batch, so that the shares of all calls add up to the loss of the batch, however it was
split into rows, micro-batches or ranks.

delta is "the moving average of previous rewards" (arXiv 2411.10442). It is state of training: saved in every
checkpoint, restored on resume, the same on every rank, unchanged by evaluation. Callers pass sums and counts that are
already summed over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlmpo.settings import LOSS_TERMS, MPO_WEIGHTS, NllReduction, ShiftMode


def implicit_reward(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """Return ``r = beta * log(pi(y|x) / ref(y|x))``, DPO eq. 5 without the partition term (arXiv 2305.18290)."""
    return beta * (policy_logps - reference_logps)


def sigmoid(chosen_rewards: Tensor, rejected_rewards: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return ``-log sigmoid(r_c - r_r)``, DPO eq. 7 (arXiv 2305.18290).

    With ``label_smoothing`` e the label is assumed wrong with probability e (conservative DPO):
    ``-(1 - e) log sigmoid(m) - e log sigmoid(-m)``, m the margin.
    """
    margins = chosen_rewards - rejected_rewards
    if label_smoothing == 0.0:
        return -logsigmoid(margins)
    return -(1.0 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def bco_pair(chosen_rewards: Tensor, rejected_rewards: Tensor, reward_shift: float) -> Tensor:
    """Return ``-log sigmoid(r_c - delta) - log sigmoid(-(r_r - delta))``: BCO (arXiv 2404.04656), MPO's L_q."""
    return -logsigmoid(chosen_rewards - reward_shift) - logsigmoid(-(rejected_rewards - reward_shift))


def nll(chosen_logps: Tensor) -> Tensor:
    """Return ``-log pi(y_c|x)``, MPO's L_g (arXiv 2411.10442) before it is divided by the response's length."""
    return -chosen_logps


@dataclass(frozen=True)
class LossOutput:
    """Holds the result of :func:`mpo_loss`.

    Attributes:
        loss: scalar, this call's share of the global batch's weighted loss.
        terms: each term with a weight above 0, by name: scalar, its share of the global mean, unweighted, detached.
        chosen_rewards, rejected_rewards: ``[pairs]``, detached, ``beta * log-ratio`` whatever the weights of the terms;
            None if no term needs a reference.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    chosen_rewards: Tensor | None
    rejected_rewards: Tensor | None


def needs_reference(weights: Mapping[str, float]) -> bool:
    """Return whether a preference term is on, which needs a reference and rejected responses."""
    return weights.get("sigmoid", 0.0) > 0 or weights.get("bco_pair", 0.0) > 0


def check_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the terms with a weight above 0, in their fixed order.

    Raises:
        ValueError: a name is unknown, a weight is negative or not finite, or all are 0.
    """
    for name, weight in weights.items():
        if name not in LOSS_TERMS:
            raise ValueError(f"unknown loss term {name!r}; the terms are {', '.join(LOSS_TERMS)}")
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"the weight of {name} must be a finite number of at least 0, not {weight}")
    active = {name: float(weights[name]) for name in LOSS_TERMS if weights.get(name, 0.0) > 0}
    if not active:
        raise ValueError("all loss weights are 0: there is nothing to train on")
    return active


def expected_start(weights: Mapping[str, float], nll: float) -> float:
    """Return the loss while policy and reference are equal (r = 0, delta = 0): ``w_s ln 2 + w_b 2 ln 2 + w_n nll``."""
    ln2 = math.log(2.0)
    return weights.get("sigmoid", 0.0) * ln2 + weights.get("bco_pair", 0.0) * 2 * ln2 + weights.get("nll", 0.0) * nll


def mpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor | None,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    chosen_lengths: Tensor,
    *,
    weights: Mapping[str, float] = MPO_WEIGHTS,
    beta: float = 0.1,
    reward_shift: float = 0.0,
    nll_reduction: NllReduction = "sequence",
    label_smoothing: float = 0.0,
    num_pairs: float | None = None,
    num_chosen_tokens: float | None = None,
) -> LossOutput:
    """Compute the loss of MPO, ``L = w_p L_p + w_q L_q + w_g L_g`` (arXiv 2411.10442, section 3).

    Args:
        policy_chosen_logps, policy_rejected_logps: ``[pairs]``, summed over scored tokens, float32 or better.
        reference_chosen_logps, reference_rejected_logps: the same under the frozen reference. These two and
            ``policy_rejected_logps`` may be None if only ``nll`` is on.
        chosen_lengths: ``[pairs]``, scored tokens of each chosen response.
        weights: weights of the terms ``sigmoid``, ``bco_pair``, ``nll``; a missing one is 0.
        beta: scale of the implicit rewards.
        reward_shift: delta's current value.
        nll_reduction: ``sequence``: mean over pairs of ``-log p / |y|`` (the paper); ``token``: one mean over all
            chosen tokens of the global batch.
        label_smoothing: label smoothing of the sigmoid term, in [0, 0.5).
        num_pairs, num_chosen_tokens: the global denominators; None: those of this call.

    Raises:
        ValueError: unknown term or reduction, label smoothing out of range, or log-probs missing that a term needs.
    """
    active = check_weights(weights)
    if nll_reduction not in get_args(NllReduction):
        raise ValueError(f"nll_reduction must be one of {', '.join(get_args(NllReduction))}, not {nll_reduction!r}")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), not {label_smoothing}")
    pairs = policy_chosen_logps.shape[0] if num_pairs is None else num_pairs
    tokens = float(chosen_lengths.sum()) if num_chosen_tokens is None else num_chosen_tokens

    chosen_rewards = rejected_rewards = None
    values: dict[str, Tensor] = {}
    if needs_reference(active):
        if policy_rejected_logps is None or reference_chosen_logps is None or reference_rejected_logps is None:
            raise ValueError("sigmoid and bco_pair need the rejected response and the reference's log-probs")
        chosen_rewards = implicit_reward(policy_chosen_logps, reference_chosen_logps, beta)
        rejected_rewards = implicit_reward(policy_rejected_logps, reference_rejected_logps, beta)
    if chosen_rewards is not None and rejected_rewards is not None:
        if "sigmoid" in active:
            values["sigmoid"] = _share(sigmoid(chosen_rewards, rejected_rewards, label_smoothing), pairs)
        if "bco_pair" in active:
            values["bco_pair"] = _share(bco_pair(chosen_rewards, rejected_rewards, reward_shift), pairs)
    if "nll" in active:
        summed = nll(policy_chosen_logps)
        # MPO's L_g divides each response by its own length; the token reduction divides all by one count.
        per_pair = summed / chosen_lengths if nll_reduction == "sequence" else summed
        values["nll"] = _share(per_pair, pairs if nll_reduction == "sequence" else tokens)

    loss = torch.stack([weight * values[name] for name, weight in active.items()]).sum()
    return LossOutput(
        loss=loss,
        terms={name: value.detach() for name, value in values.items()},
        chosen_rewards=None if chosen_rewards is None else chosen_rewards.detach(),
        rejected_rewards=None if rejected_rewards is None else rejected_rewards.detach(),
    )


def _share(per_pair: Tensor, denominator: float) -> Tensor:
    # A global batch that lost all its pairs has denominator 0 and nothing to sum: its share is 0, not NaN.
    return per_pair.sum() / max(denominator, 1.0)


class RewardShift:
    """Keeps the reward shift delta.

    Args:
        mode: ``previous`` (the paper's words): the mean of all rewards, chosen and rejected, of all EARLIER optimizer
            steps, weighted by pairs; moves once a step, in :meth:`step`. ``running`` (InternVL's published trainer): a
            cumulative mean into which each micro-batch's mean enters BEFORE its loss, all with the same weight; moves
            in :meth:`observe`. ``none``: stays 0.

    Raises:
        ValueError: the mode is unknown.
    """

    def __init__(self, mode: ShiftMode = "previous") -> None:
        if mode not in get_args(ShiftMode):
            raise ValueError(f"reward shift must be one of {', '.join(get_args(ShiftMode))}, not {mode!r}")
        self.mode: ShiftMode = mode
        self._sum = 0.0  # of the rewards behind value (previous), or of micro-batch means (running)
        self._count = 0.0
        self._pending_sum = 0.0  # previous: rewards of the optimizer step under way
        self._pending_count = 0.0

    @property
    def value(self) -> float:
        """delta for the next loss; 0 before any reward was observed."""
        return self._sum / self._count if self._count else 0.0

    def observe(self, reward_sum: float, count: float) -> None:
        """Take in rewards, by their sum and number over all ranks.

        In ``running`` mode one call is one micro-batch: ``reward_sum / count`` is its mean, whatever its size.
        A call with ``count`` 0 (a micro-batch without pairs) changes nothing.
        """
        if self.mode == "none" or count == 0:
            return
        if self.mode == "previous":
            self._pending_sum += reward_sum
            self._pending_count += count
        else:
            self._sum += reward_sum / count
            self._count += 1.0

    def step(self) -> None:
        """Let the rewards of the optimizer step that is over enter delta, in ``previous`` mode."""
        self._sum += self._pending_sum
        self._count += self._pending_count
        self._pending_sum = self._pending_count = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return mode and sums as JSON values; called between optimizer steps, so no reward is pending."""
        return {"mode": self.mode, "sum": self._sum, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: it was kept in another mode.
        """
        if state["mode"] != self.mode:
            raise ValueError(f"the saved reward shift was kept in mode {state['mode']!r}, this run has {self.mode!r}")
        self._sum, self._count = float(state["sum"]), float(state["count"])
        self._pending_sum = self._pending_count = 0.0
