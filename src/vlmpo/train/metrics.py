"""What is logged of training, from sums that add up over micro-batches and ranks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class StepSums:
    """Sums over the pairs of one or more optimizer steps on this rank. Merging ranks is adding.

    ``shares`` hold each loss term's share of its step's global mean (so the sum over a step is the mean); everything
    else is a plain sum over pairs.
    """

    values: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add_losses(self, loss: Tensor, terms: dict[str, Tensor]) -> None:
        """One part's share of the loss and of its terms."""
        self.values["share/loss"] += float(loss)
        for name, value in terms.items():
            self.values[f"share/loss/{name}"] += float(value)

    def add_pairs(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor | None,
        chosen_rewards: Tensor | None,
        rejected_rewards: Tensor | None,
        sources: list[str],
    ) -> None:
        """One part's pairs, ``[pairs]`` each, detached."""
        values = self.values
        values["pairs"] += len(sources)
        values["logps/chosen"] += float(chosen_logps.sum())
        if rejected_logps is not None:
            values["logps/rejected"] += float(rejected_logps.sum())
        if chosen_rewards is None or rejected_rewards is None:
            return
        right = (chosen_rewards > rejected_rewards).float().tolist()  # strictly: a tie is not right
        values["rewarded"] += len(sources)
        values["rewards/chosen"] += float(chosen_rewards.sum())
        values["rewards/rejected"] += float(rejected_rewards.sum())
        values["rewards/accuracies"] += sum(right)
        for source, hit in zip(sources, right, strict=True):
            values[f"pairs/{source}"] += 1.0
            values[f"right/{source}"] += hit


def add_up(parts: list[dict[str, float]]) -> dict[str, float]:
    """Values of all ranks added up, name by name."""
    total: dict[str, float] = defaultdict(float)
    for part in parts:
        for name, value in part.items():
            total[name] += value
    return dict(total)


def summarise(total: dict[str, float], steps: int) -> dict[str, float]:
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
