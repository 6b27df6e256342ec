"""Compute the metrics of training and evaluation, name them, and decide which are better if higher.

Every reporter, ``metrics.jsonl`` and the screen get the same log, once. Its names are made here: those of training
stand alone (``rewards/margins``), those of an evaluation begin with ``eval_`` (``eval_held_out_loss`` if there are
several sets), those of the final model with ``test_``. TensorBoard and W&B show them as ``train/rewards/margins``,
``eval/held_out_loss`` and ``test/held_out_loss``: transformers takes the beginning for a group.
"""

from __future__ import annotations

import math
import re
import resource
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmpo.errors import RecipeError, RunError
from vlmpo.log import logger
from vlmpo.loss import LossOutput, expected_start, mpo_loss, needs_reference
from vlmpo.stats import mean_interval, wilson

FINAL = "test_"  # begins the names of what the final model comes to
_SIMILAR_LENGTH = 0.8  # of the longer response's tokens, at least, in the shorter one
_STRONG_LENGTH_RATIO = 1.5

# Whether a higher metric is better, by the first pattern found in its name.
_DIRECTIONS = (
    (r"rewards/(accuracies|margins|chosen)", True),
    (r"rewards/rejected", False),
    (r"logps/chosen", True),
    (r"logps/rejected", False),
    (r"answers/(accuracy|low|high)", True),
    (r"answers/(wrong|unparsed|cut)", False),
    (r"(^|_)loss($|/)", False),
)


def is_right(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Return ``[pairs]`` bool: whether the chosen response has the higher implicit reward. A tie is False."""
    return chosen_rewards > rejected_rewards


# ---- training ----


class StepSums:
    """Sums metrics over the pairs of one or more optimizer steps on this rank; the sums of several ranks add up.

    Numbers stay on the device until ``values`` is read: to read one is to wait for all that the device was given.
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = defaultdict(float)
        self._unread: list[tuple[list[str], Tensor]] = []

    @property
    def values(self) -> dict[str, float]:
        """The sums by name.

        Those under ``loss/`` hold each term's share of its step's global mean, so that their sum over a step is the
        mean. All others are plain sums over pairs.
        """
        unread, self._unread = self._unread, []
        for names, numbers in unread:
            for name, number in zip(names, numbers.tolist(), strict=True):
                self._values[name] += number
        return self._values

    def snapshot(self) -> tuple[dict[str, float], list[tuple[list[str], Tensor]]]:
        """Return what the sums are now, for :meth:`restore`; nothing is read from the device."""
        return dict(self._values), list(self._unread)

    def restore(self, snapshot: tuple[dict[str, float], list[tuple[list[str], Tensor]]]) -> None:
        """Be what the sums were then."""
        values, unread = snapshot
        self._values, self._unread = defaultdict(float, values), list(unread)

    def add(
        self,
        output: LossOutput,
        *,
        chosen_logps: Tensor,
        rejected_logps: Tensor | None,
        sources: Sequence[str],
        num_tokens: int,
    ) -> None:
        """Add the pairs of a micro-batch.

        Args:
            output: their loss.
            chosen_logps, rejected_logps: ``[pairs]``, the policy's log-probs, detached.
            sources: the data set of each pair.
            num_tokens: tokens that were read.
        """
        values = self._values
        values["tokens"] += num_tokens
        values["pairs"] += len(sources)
        numbers = {f"loss/{name}": value for name, value in output.terms.items()}
        numbers["logps/chosen"] = chosen_logps.sum()
        if rejected_logps is not None:
            numbers["logps/rejected"] = rejected_logps.sum()
        right = chosen_logps[:0]
        rewarded: list[str] = []
        if output.chosen_rewards is not None and output.rejected_rewards is not None:
            right = is_right(output.chosen_rewards, output.rejected_rewards)
            rewarded = [f"right/{source}" for source in sources]
            values["rewarded"] += len(sources)
            numbers["rewards/chosen"] = output.chosen_rewards.sum()
            numbers["rewards/rejected"] = output.rejected_rewards.sum()
            numbers["rewards/accuracies"] = right.sum()
            for source in sources:
                values[f"pairs/{source}"] += 1.0
        together = torch.cat([*(number.reshape(1) for number in numbers.values()), right])
        self._unread.append(([*numbers, *rewarded], together))


def add_up(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Add up the values of all ranks, name by name."""
    total: dict[str, float] = defaultdict(float)
    for part in parts:
        for name, value in part.items():
            total[name] += value
    return dict(total)


def carried_on(window: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the sums with which ``rank`` of ``ranks`` goes on: of the loss, and behind the next log.

    What is averaged over ranks is the same on each; of other numbers of ranks, the first carries on all other sums.

    Args:
        window: both sums of every rank that wrote the checkpoint, as ``loss`` and ``sums``; null is no finite number.
    """
    known = [{part: {k: math.nan if v is None else v for k, v in of[part].items()} for part in of} for of in window]
    if len(known) == ranks:
        return known[rank]["loss"], known[rank]["sums"]
    since_log = sum(of["loss"]["since_log"] for of in known) / len(known)
    added = add_up([of["sums"] for of in known]) if rank == 0 else {}
    steps = {name: known[0]["sums"].get(name, 0.0) for name in ("steps", "empty_steps")}
    return {**known[0]["loss"], "since_log": since_log}, {**added, **steps}


def training_metrics(total: Mapping[str, float], steps: float) -> dict[str, float]:
    """Return the logged metrics of ``steps`` optimizer steps: means of the terms over steps, of the rest over pairs.

    There are rewards only if a preference term is on. With more than one data set, reward accuracy and number of pairs
    are also given for each.
    """
    metrics = {name: value / steps for name, value in total.items() if name.startswith("loss/")}
    for count, names in (
        ("pairs", ("logps/chosen", "logps/rejected")),
        ("rewarded", ("rewards/chosen", "rewards/rejected", "rewards/accuracies")),
    ):
        if total.get(count):
            metrics |= {name: total[name] / total[count] for name in names if name in total}
    if total.get("rewarded"):
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    sources = sorted(name.removeprefix("pairs/") for name in total if name.startswith("pairs/"))
    for source in sources if len(sources) > 1 else ():
        metrics[f"rewards/accuracies/{source}"] = total[f"right/{source}"] / total[f"pairs/{source}"]
        metrics[f"pairs/{source}"] = total[f"pairs/{source}"]
    return metrics


def window_metrics(ranks: Sequence[Mapping[str, float]], seconds: float) -> dict[str, float]:
    """Return the logged metrics of the optimizer steps since the last log.

    Args:
        ranks: the values of each rank's StepSums, with ``steps``, the seconds of ``data_wait`` and the bytes of
            ``peak_memory`` among them.
        seconds: time that these steps took.
    """
    total = add_up(ranks)
    total.pop("peak_memory", None)  # of the rank that takes most
    peak = max(rank.get("peak_memory", 0.0) for rank in ranks)
    waited = total.pop("data_wait", 0.0) / len(ranks)
    steps = max(total.pop("steps", 0.0) / len(ranks), 1.0)
    empty = total.pop("empty_steps", 0.0) / len(ranks)
    metrics = {**training_metrics(total, max(steps - empty, 1.0)), "step_seconds": seconds / steps}
    if empty:
        metrics |= {"empty_steps": empty, "steps": steps}
    if seconds > 0:
        metrics["data_wait_share"] = waited / seconds
        metrics["pairs_per_second"] = total.get("pairs", 0.0) / seconds
        metrics["tokens_per_second"] = total.get("tokens", 0.0) / seconds
    if peak:
        metrics["memory_gib"] = peak / 2**30
    return metrics


def peak_memory(device: torch.device) -> float:
    """Return the most bytes this process has held at once: of the accelerator if there is one, else of the system."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def leave_out_empty_steps(logs: dict[str, float]) -> None:
    """Make the loss the mean over the steps that had a pair; remove it if none had one: it is not 0, there is none."""
    empty, steps = logs.get("empty_steps", 0.0), logs.pop("steps", 0.0)
    if empty and empty < steps:
        logs["loss"] *= steps / (steps - empty)
    elif empty:
        for name in [name for name in logs if name == "loss" or name.startswith("loss/")]:
            del logs[name]


def start_loss(logs: Mapping[str, float], weights: Mapping[str, float], router_coefficient: float | None) -> float:
    """Return the loss expected while policy and reference are equal, and log it beside the first measured one."""
    offset = expected_start(weights, 0.0)
    nll = weights.get("nll", 0.0) * logs.get("loss/nll", 0.0)
    router = (router_coefficient or 0.0) * logs.get("loss/router_aux", 0.0)
    expected = offset + nll + router
    parts = f"{offset:.4f} + nll {nll:.4f}" + (f" + router {router:.4f}" if router else "")
    logger.info(f"first loss {logs['loss']:.4f}; expected {parts} = {expected:.4f}")
    return expected


# ---- evaluation ----


class ScoredPair(NamedTuple):
    """Holds the log-probs of one pair, summed over scored tokens; in supervised fine-tuning only the chosen one's."""

    source: str
    chosen_length: int
    rejected_length: int | None
    policy_chosen: float
    policy_rejected: float | None
    reference_chosen: float | None
    reference_rejected: float | None


def evaluation_metrics(
    pairs: Sequence[ScoredPair], *, num_dropped: int, reward_shift: float, loss_settings: Mapping[str, Any]
) -> dict[str, float]:
    """Return the metrics of held-out pairs: loss, terms and log-probs; rewards, with 95 % intervals, and lengths.

    With more than one data set, rewards and number of pairs are also given for each.

    Args:
        pairs: all pairs that were scored, over all ranks.
        num_dropped: pairs that could not be used.
        reward_shift: delta's present value.
        loss_settings: further keywords of :func:`vlmpo.loss.mpo_loss`.
    """
    counts: dict[str, float] = {"pairs": len(pairs), "pairs_dropped": num_dropped}
    if not pairs:
        return counts
    output = mpo_loss(
        policy_chosen_logps=torch.tensor([pair.policy_chosen for pair in pairs], dtype=torch.float64),
        policy_rejected_logps=_column([pair.policy_rejected for pair in pairs]),
        reference_chosen_logps=_column([pair.reference_chosen for pair in pairs]),
        reference_rejected_logps=_column([pair.reference_rejected for pair in pairs]),
        chosen_lengths=torch.tensor([pair.chosen_length for pair in pairs], dtype=torch.float64),
        reward_shift=reward_shift,
        **loss_settings,
    )
    metrics = {"loss": output.loss.item(), **{f"loss/{name}": value.item() for name, value in output.terms.items()}}
    metrics |= {"logps/chosen": _mean([pair.policy_chosen for pair in pairs]), **counts}
    if output.chosen_rewards is None or output.rejected_rewards is None:
        return metrics
    lengths = [(pair.chosen_length, pair.rejected_length or 0) for pair in pairs]
    metrics["logps/rejected"] = _mean([pair.policy_rejected or 0.0 for pair in pairs])
    metrics["lengths/chosen"] = _mean([chosen for chosen, _ in lengths])
    metrics["lengths/rejected"] = _mean([rejected for _, rejected in lengths])
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    metrics |= reward_metrics(chosen, rejected)
    # Between responses of similar length, length does not give away which is better.
    similar = torch.tensor([min(both) >= _SIMILAR_LENGTH * max(both) for both in lengths])
    metrics["pairs_similar_length"] = int(similar.sum())
    if similar.any():
        right = is_right(chosen[similar], rejected[similar])
        metrics |= _accuracy("rewards/accuracies_similar_length", right)
    sources = sorted({pair.source for pair in pairs})
    for source in sources if len(sources) > 1 else ():
        here = torch.tensor([pair.source == source for pair in pairs])
        of_source = {**reward_metrics(chosen[here], rejected[here]), "pairs": int(here.sum())}
        metrics |= {f"{name}/{source}": value for name, value in of_source.items()}
    return metrics


def reward_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, float]:
    """Return the mean implicit rewards; accuracy with its Wilson interval, mean margin with its normal interval.

    Args:
        chosen_rewards, rejected_rewards: ``[pairs]``, at least one pair.
    """
    chosen, rejected = chosen_rewards.tolist(), rejected_rewards.tolist()
    margin, low, high = mean_interval([c - r for c, r in zip(chosen, rejected, strict=True)])
    return {
        "rewards/chosen": _mean(chosen),
        "rewards/rejected": _mean(rejected),
        **_accuracy("rewards/accuracies", is_right(chosen_rewards, rejected_rewards)),
        "rewards/margins": margin,
        "rewards/margins_low": low,
        "rewards/margins_high": high,
    }


def _accuracy(name: str, right: Tensor) -> dict[str, float]:
    count = int(right.sum())
    low, high = wilson(count, len(right))
    return {name: count / len(right), f"{name}_low": low, f"{name}_high": high}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _column(values: Sequence[float | None]) -> Tensor | None:
    return None if None in values else torch.tensor(values, dtype=torch.float64)


def length_warning(metrics: Mapping[str, float], prefix: str) -> str | None:
    """Return a warning if the lengths of chosen and rejected responses differ so much that length alone may decide."""
    chosen, rejected = metrics.get(f"{prefix}_lengths/chosen"), metrics.get(f"{prefix}_lengths/rejected")
    if chosen is None or rejected is None or max(chosen, rejected) <= _STRONG_LENGTH_RATIO * min(chosen, rejected):
        return None
    return (
        f"{prefix}: chosen responses have {chosen:.0f} tokens, rejected ones {rejected:.0f} on average; "
        "reward accuracy may measure length (see rewards/accuracies_similar_length)"
    )


# ---- names ----


def pair_metric_names(weights: Mapping[str, float], sources: Sequence[str] | None) -> list[str]:
    """Return the names of the metrics that :func:`evaluation_metrics` can give.

    Args:
        weights: of the loss terms that are on.
        sources: names of the data sets in the evaluation set; None if they are unknown, which gives names in ``*``.
    """
    rewarded = needs_reference(weights)
    pair = ScoredPair("", 1, 1, 0.0, 0.0, 0.0, 0.0) if rewarded else ScoredPair("", 1, None, 0.0, None, None, None)
    names = list(evaluation_metrics([pair], num_dropped=0, reward_shift=0.0, loss_settings={"weights": weights}))
    if rewarded and (sources is None or len(sources) > 1):
        by_source = [*reward_metrics(torch.zeros(1), torch.zeros(1)), "pairs"]
        names += [f"{name}/{source}" for source in sources or ("*",) for name in by_source]
    return names


def evaluation_metric_names(eval_dataset: Any, weights: Mapping[str, float], extra: Sequence[str]) -> list[str]:
    """Return the full names of the metrics that an evaluation during training can give.

    Args:
        eval_dataset: the trainer's: one set, several by name, or None.
        weights: of the loss terms that are on.
        extra: names of the metrics that further evaluations add.
    """
    sets = eval_dataset if isinstance(eval_dataset, dict) else {} if eval_dataset is None else {"": eval_dataset}
    full = []
    for name, data in sets.items():
        source = getattr(data, "source", None)  # gives a pair's data set without reading the record
        sources = sorted({source(index) for index in range(len(data))}) if callable(source) else None
        prefix = f"eval_{name}_" if name else "eval_"
        full += [f"{prefix}{metric}" for metric in pair_metric_names(weights, sources)]
    return full + [f"eval_{metric}" for metric in extra]


def resolve_metric(metric: str, known: Sequence[str]) -> str:
    """Return the full name of ``metric``, which may lack ``eval_`` or ``eval_eval_``.

    Raises:
        RecipeError: it is not among the ``known`` names, of which a final ``*`` matches any ending.
    """
    for candidate in (metric, f"eval_{metric}", f"eval_eval_{metric}"):
        for name in known:
            stem = name.removesuffix("*")
            if candidate == name or (stem != name and candidate.startswith(stem) and candidate != stem):
                return candidate
    near = get_close_matches(metric if metric.startswith("eval_") else f"eval_{metric}", known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise RecipeError(
        f"training.metric_for_best_model: no evaluation of this run gives {metric!r}{hint} "
        f"There are: {', '.join(known) or 'none'}"
    )


def without_set_name(metric: str | None, name: str) -> str | None:
    """Return ``held_out_loss`` as ``eval_loss``: with one evaluation set, metrics do not have the set's name."""
    for prefix in (f"eval_{name}_", f"{name}_"):
        if metric is not None and metric.startswith(prefix):
            return f"eval_{metric.removeprefix(prefix)}"
    return metric


def greater_is_better(metric: str) -> bool | None:
    """Return whether a higher ``metric`` is better, by its name; None if the name is unknown.

    transformers takes a higher value for the better one unless the name ends in "loss".
    """
    return next((higher for pattern, higher in _DIRECTIONS if re.search(pattern, metric)), None)


def may_be_best(name: str | None, metrics: Mapping[str, float], step: int) -> bool:
    """Return whether an evaluation after ``step`` may be the best by the metric ``name``: never by one that is NaN.

    Raises:
        RunError: it gave no such metric.
    """
    if name is None:
        return False
    if name not in metrics:
        given = ", ".join(sorted(metrics))
        raise RunError(f"training.metric_for_best_model: this evaluation gave no {name}; it gave {given}")
    if not math.isfinite(metrics[name]):  # no later one would be better than NaN
        logger.info(f"{name} is {metrics[name]} at step {step}: it is not the best")
    return math.isfinite(metrics[name])


def settle_best_metric(args: Any, eval_dataset: Any, extra_evaluations: Sequence[Any]) -> None:
    """Give ``args.metric_for_best_model`` its full name.

    Args:
        args: MPOConfig of the run.
        eval_dataset: one set, several by name, or None.
        extra_evaluations: further evaluations; their ``metrics``, if they have it, names what they give.

    Raises:
        RecipeError: no evaluation will give that metric, or it is unknown whether a higher one is better.
    """
    metric = args.metric_for_best_model
    if metric is None:
        return
    if args.eval_strategy == "no":
        raise RecipeError(
            "training.metric_for_best_model: nothing is evaluated while training; set training.eval_strategy"
        )
    extra = [name for one in extra_evaluations for name in getattr(one, "metrics", ("*",))]
    args.metric_for_best_model = resolve_metric(metric, evaluation_metric_names(eval_dataset, args.weights, extra))
    if args.greater_is_better is None:
        raise RecipeError(
            f"training.metric_for_best_model: is a higher {metric!r} better, or a lower? Set training.greater_is_better"
        )
    by_steps = args.save_strategy == args.eval_strategy == "steps"
    if args.load_best_model_at_end and by_steps and args.save_steps != args.eval_steps:
        logger.info("note: only evaluations at which a checkpoint is saved can give the best checkpoint")
