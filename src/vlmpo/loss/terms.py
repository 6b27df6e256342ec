"""The terms of Mixed Preference Optimization, one pure function each.

All take and return one number a pair, ``[pairs]``, in the precision they are given (float32 or better). Rewards are
the implicit ones, ``r = beta * (log pi(y|x) - log ref(y|x))``, with log-probs summed over the scored tokens.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def implicit_reward(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """``r = beta * log(pi(y|x) / ref(y|x))``, DPO eq. 5 without the partition term (arXiv 2305.18290). ``[pairs]``."""
    return beta * (policy_logps - reference_logps)


def sigmoid(chosen_rewards: Tensor, rejected_rewards: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """``-log sigmoid(r_c - r_r)``, DPO eq. 7 (arXiv 2305.18290). ``[pairs]``.

    With ``label_smoothing`` e the label is taken as wrong with probability e (conservative DPO):
    ``-(1 - e) log sigmoid(m) - e log sigmoid(-m)``, m the margin.
    """
    margins = chosen_rewards - rejected_rewards
    if label_smoothing == 0.0:
        return -logsigmoid(margins)
    return -(1.0 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def bco_pair(chosen_rewards: Tensor, rejected_rewards: Tensor, reward_shift: float) -> Tensor:
    """``-log sigmoid(r_c - delta) - log sigmoid(-(r_r - delta))``: BCO (arXiv 2404.04656), MPO's L_q. ``[pairs]``."""
    return -logsigmoid(chosen_rewards - reward_shift) - logsigmoid(-(rejected_rewards - reward_shift))


def nll(chosen_logps: Tensor) -> Tensor:
    """``-log pi(y_c|x)``, MPO's L_g (arXiv 2411.10442) before it is divided by the response's length. ``[pairs]``."""
    return -chosen_logps
