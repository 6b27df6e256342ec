"""What is logged of training, from sums that add up over micro-batches and ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vlmpo.log import logger
from vlmpo.loss import LossOutput, expected_start
from vlmpo.train.batching import MicroBatch


class TrainingMetrics:
    """Sums over the pairs of the optimizer steps since the last log, on this rank. Merging ranks is adding.

    Sums under ``share/`` hold each loss term's share of its step's global mean, so the sum over a step is the mean; all
    else is a plain sum over pairs.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._step_rewards = [0.0, 0.0]

    def update(self, micro_batch: MicroBatch, policy_logps: Tensor, output: LossOutput) -> None:
        """Add a micro-batch: its loss, and ``policy_logps``, ``[responses]``, detached."""
        sums = self._sums
        sums["share/loss"] += float(output.loss.detach())
        for name, value in output.terms.items():
            sums[f"share/loss/{name}"] += float(value)
        sums["pairs"] += len(micro_batch)
        sums["tokens"] += micro_batch.num_tokens
        sums["logps/chosen"] += float(policy_logps[micro_batch.chosen].sum())
        if output.chosen_rewards is None or output.rejected_rewards is None:
            return
        sums["logps/rejected"] += float(policy_logps[micro_batch.rejected].sum())
        chosen, rejected = float(output.chosen_rewards.sum()), float(output.rejected_rewards.sum())
        correct = (output.chosen_rewards > output.rejected_rewards).float().tolist()  # strictly: a tie is not correct
        sums["rewarded"] += len(micro_batch)
        sums["rewards/chosen"] += chosen
        sums["rewards/rejected"] += rejected
        sums["rewards/accuracies"] += sum(correct)
        for source, hit in zip(micro_batch.sources, correct, strict=True):
            sums[f"pairs/{source}"] += 1.0
            sums[f"right/{source}"] += hit
        self._step_rewards[0] += chosen + rejected
        self._step_rewards[1] += 2.0 * len(micro_batch)

    def step_rewards(self) -> list[float]:
        """Return sum and count of all rewards of the optimizer step under way, on this rank."""
        return self._step_rewards

    def end_step(self) -> None:
        """Note that an optimizer step is over."""
        self._step_rewards = [0.0, 0.0]
        self._sums["steps"] += 1

    def take(self, seconds: float, waited: float, *, gather: Callable[[Any], list[Any]]) -> dict[str, float]:
        """Return the metrics since the last call, over all ranks, and start anew.

        Args:
            seconds: of the optimizer steps since then.
            waited: of these, how many were spent waiting for data.
            gather: returns an object of every rank.
        """
        ranks = gather({**self._sums, "data_wait": waited})
        total = add_up(ranks)
        waited = total.pop("data_wait") / len(ranks)
        steps = max(total.pop("steps", 0.0) / len(ranks), 1.0)
        self._sums = defaultdict(float)
        logs = summarise(total, steps)
        logs["step_seconds"] = seconds / steps
        if seconds > 0:
            logs["data_wait_share"] = waited / seconds
            logs["pairs_per_second"] = total.get("pairs", 0.0) / seconds
            logs["tokens_per_second"] = total.get("tokens", 0.0) / seconds
        return logs


def start_loss(logs: Mapping[str, float], weights: Mapping[str, float], router_coefficient: float | None) -> float:
    """Return the loss expected while policy and reference are the same, and say it beside the first measured one."""
    offset = expected_start(weights, 0.0)
    nll = weights.get("nll", 0.0) * logs.get("loss/nll", 0.0)
    router = (router_coefficient or 0.0) * logs.get("loss/router_aux", 0.0)
    expected = offset + nll + router
    parts = f"{offset:.4f} + nll {nll:.4f}" + (f" + router {router:.4f}" if router else "")
    logger.info(f"first loss {logs['loss']:.4f}; expected {parts} = {expected:.4f}")
    return expected


def add_up(parts: list[dict[str, float]]) -> dict[str, float]:
    """Values of all ranks added up, name by name."""
    total: dict[str, float] = defaultdict(float)
    for part in parts:
        for name, value in part.items():
            total[name] += value
    return dict(total)


def summarise(total: dict[str, float], steps: float) -> dict[str, float]:
    """Logged metrics of ``steps`` optimizer steps: terms averaged over steps, the rest over pairs.

    Rewards are absent when no preference term is on. With more than one data set, each one's reward accuracy and
    number of pairs stand beside the total.
    """
    logs = {n.removeprefix("share/"): v / steps for n, v in total.items() if n.startswith("share/loss/")}
    pairs, rewarded = total.get("pairs", 0.0), total.get("rewarded", 0.0)
    for name in ("logps/chosen", "logps/rejected"):
        if name in total and pairs:
            logs[name] = total[name] / pairs
    if rewarded:
        for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies"):
            logs[name] = total[name] / rewarded
        logs["rewards/margins"] = logs["rewards/chosen"] - logs["rewards/rejected"]
        sources = sorted(name.removeprefix("pairs/") for name in total if name.startswith("pairs/"))
        for source in sources if len(sources) > 1 else ():
            logs[f"rewards/accuracies/{source}"] = total[f"right/{source}"] / total[f"pairs/{source}"]
            logs[f"pairs/{source}"] = total[f"pairs/{source}"]
    return logs
