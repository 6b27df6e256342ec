"""Which checkpoint is the best: the metrics an evaluation gives, by name, and which way each of them is better."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from vlmpo.errors import RecipeError
from vlmpo.log import logger

_BOUNDS = ("", "_low", "_high")
# Searched for in a metric's name, in this order.
_DIRECTIONS = (
    (r"rewards/(accuracies|margins|chosen)", True),
    (r"rewards/rejected", False),
    (r"logps/chosen", True),
    (r"logps/rejected", False),
    (r"answers/(accuracy|low|high)", True),
    (r"answers/(wrong|unparsed|cut)", False),
    (r"(^|_)loss($|/)", False),
)


def greater_is_better(metric: str) -> bool | None:
    """Whether a higher ``metric`` is better, by its name; None where that does not tell.

    transformers takes every name that does not end in "loss" for a metric of which more is better.
    """
    for pattern, higher in _DIRECTIONS:
        if re.search(pattern, metric):
            return higher
    return None


def pair_metrics(terms: Sequence[str], with_rewards: bool, sources: Sequence[str] | None = ()) -> list[str]:
    """Names of what :func:`vlmpo.train.evaluation.evaluate_pairs` can give.

    Args:
        terms: of the loss that are on.
        with_rewards: whether there is a reference.
        sources: names of the data sets in the evaluation set; None: not known, and ``*`` stands for any.
    """
    names = ["loss", *(f"loss/{term}" for term in terms), "logps/chosen", "pairs", "pairs_dropped"]
    if not with_rewards:
        return names
    rewards = ["rewards/chosen", "rewards/rejected"]
    rewards += [f"rewards/{name}{bound}" for name in ("accuracies", "margins") for bound in _BOUNDS]
    names += [*rewards, "logps/rejected", "lengths/chosen", "lengths/rejected", "pairs_similar_length"]
    names += [f"rewards/accuracies_similar_length{bound}" for bound in _BOUNDS]
    several = ["*"] if sources is None else sources if len(sources) > 1 else ()
    return names + [f"{name}/{source}" for source in several for name in (*rewards, "pairs")]


def known_metrics(by_set: Mapping[str, Sequence[str]], extra: Sequence[str]) -> list[str]:
    """Full names of an evaluation's metrics while training.

    Args:
        by_set: names by evaluation set; the only set of a trainer that knows no name for it is "".
        extra: names of further evaluations' metrics.
    """
    full = [f"eval_{name}_{metric}" if name else f"eval_{metric}" for name in by_set for metric in by_set[name]]
    return full + [f"eval_{metric}" for metric in extra]


def of_only_set(asked: str | None, name: str) -> str | None:
    """``held_out_loss`` as ``eval_loss``: a trainer that has one evaluation set gives its metrics no set's name."""
    for prefix in (f"eval_{name}_", f"{name}_"):
        if asked is not None and asked.startswith(prefix):
            return f"eval_{asked.removeprefix(prefix)}"
    return asked


def resolve(asked: str, known: Sequence[str]) -> str:
    """The full name of the metric that is ``asked`` for: with or without ``eval_``, or as of the set named ``eval``.

    Raises RecipeError where there is none, naming those there are.
    """
    for candidate in (asked, f"eval_{asked}", f"eval_eval_{asked}"):
        if any(_fits(candidate, name) for name in known):
            return candidate
    near = get_close_matches(asked if asked.startswith("eval_") else f"eval_{asked}", known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise RecipeError(
        f"training.metric_for_best_model: no evaluation of this run gives {asked!r}{hint} "
        f"There are: {', '.join(known) or 'none'}"
    )


def _fits(candidate: str, name: str) -> bool:
    return candidate.startswith(name[:-1]) and len(candidate) >= len(name) if name.endswith("*") else candidate == name


def metrics_of_sets(data: Any, terms: Sequence[str], with_rewards: bool) -> dict[str, list[str]]:
    """Metric names by evaluation set, of a trainer's ``eval_dataset``: one set, several by name, or None."""
    sets = data if isinstance(data, dict) else {} if data is None else {"": data}
    return {name: pair_metrics(terms, with_rewards, _sources(part)) for name, part in sets.items()}


def _sources(data: Any) -> list[str] | None:
    """Names of the data sets in ``data``, where it tells them without opening every record."""
    tell = getattr(data, "source", None)
    return sorted({tell(index) for index in range(len(data))}) if callable(tell) else None


def settle_best_metric(args: Any, eval_dataset: Any, with_rewards: bool, extra_evaluations: Sequence[Any]) -> None:
    """Give ``args.metric_for_best_model`` its full name.

    Args:
        args: MPOConfig of the run.
        eval_dataset: one set, several by name, or None.
        with_rewards: whether there is a reference.
        extra_evaluations: further evaluations; their ``metrics`` name what they give, if they have it.

    Raises:
        RecipeError: no evaluation will give that metric, or it is unknown which way it is better.
    """
    metric = args.metric_for_best_model
    if metric is None:
        return
    if args.eval_strategy == "no":
        raise RecipeError(
            "training.metric_for_best_model: nothing is evaluated while training; set training.eval_strategy"
        )
    by_set = metrics_of_sets(eval_dataset, list(args.weights), with_rewards)
    extra = [name for one in extra_evaluations for name in getattr(one, "metrics", ("*",))]
    args.metric_for_best_model = resolve(metric, known_metrics(by_set, extra))
    if args.greater_is_better is None:
        raise RecipeError(
            f"training.metric_for_best_model: is a higher {metric!r} better, or a lower? Set training.greater_is_better"
        )
    by_steps = args.save_strategy == args.eval_strategy == "steps"
    if args.load_best_model_at_end and by_steps and args.save_steps != args.eval_steps:
        logger.info("note: the best checkpoint is sought among the evaluations at which one is saved")
