"""MPOConfig: what transformers' TrainingArguments lack for Mixed Preference Optimization."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from transformers import TrainingArguments

from vlmpo import compat
from vlmpo.loss import check_weights
from vlmpo.settings import MPO_WEIGHTS, Attention, NllReduction, OnBadRecord, OverLong, ReferenceKind, ShiftMode
from vlmpo.train.metrics import greater_is_better
from vlmpo.train.param_groups import check_values

CHOICES = {
    "reward_shift": get_args(ShiftMode),
    "nll_reduction": get_args(NllReduction),
    "reference_kind": get_args(ReferenceKind),
    "over_long": get_args(OverLong),
    "on_bad_record": get_args(OnBadRecord),
    "attention": get_args(Attention),
    "train_sampling_strategy": ("random", "sequential"),
}


# Tokens of a row. A GPU wants many at once; what is read at once on a CPU should stay near its caches (measured there:
# two pairs of 7 tiles are read a little faster together, two of 13 tiles apart, and apart they take far less memory).
ROW_TOKENS = {"cpu": 1536, "cuda": 16384}


def row_tokens(device: str) -> int:
    """``max_tokens_per_row`` where nothing else is asked for, on a ``device`` of that type."""
    return ROW_TOKENS.get(device, ROW_TOKENS["cuda"])


@dataclass
class MPOConfig(TrainingArguments):
    """TrainingArguments and the settings of MPO.

    Attributes:
        loss_weights: of the terms ``sigmoid``, ``bco_pair``, ``nll``; None: 0.8, 0.2, 1.0. ``{"nll": 1.0}`` is
            supervised fine-tuning: no reference, no rejected response.
        beta: scale of the implicit rewards.
        reward_shift: how delta moves: ``previous``, ``running`` or ``none`` (see vlmpo.loss).
        nll_reduction: ``sequence`` (the paper) or ``token``.
        label_smoothing: of the sigmoid term, in [0, 0.5).
        reference_kind: ``copy`` of the initial policy, ``adapter`` switched off, or ``auto``: the adapter where there
            is one.
        reference_cache_dir: where ``cache`` keeps log-probs; None: a folder of the user's, shared by all runs.
        max_length: tokens of prompt and longer response together; None: no limit.
        over_long: ``drop`` such pairs (counted), or ``cut`` the responses' ends.
        max_tiles: tiles a pair's images may take together.
        video_frames: images a video becomes at most.
        max_tokens_per_row: a micro-batch is read in rows of at most so many tokens, each with its own backward pass,
            so that the longest row decides the memory, not the micro-batch. 0: what suits the device, see ROW_TOKENS;
            None: no bound.
        group_by_prompt: up to so many pairs of one prompt come next to each other and share its prompt, a response that
            several of them hold is read once; 0: pairs come as they are shuffled. Pairs of one prompt then meet in a
            step more often than chance would have it.
        balance_ranks: ranks share the pairs of each step by the work they make, not in order; which pairs make a step
            stays as it is. Without effect on one process, on ``train_sampling_strategy: sequential`` and under
            ``reward_shift: running``, where the order of micro-batches decides how delta moves.
        on_bad_record: ``skip`` and count, or ``fail``.
        num_train_epochs, learning_rate: default to 1 and 1e-6 here.
        learning_rates: rates by part, of ``vision``, ``projector`` and ``text``; other parts take ``learning_rate``.
        ema_decay: of an exponential moving average of the weights (see vlmpo.train.ema); 0 or None: none.
        attention: ``auto`` shares prompts where the model family allows; ``separate`` reads one response a row.
    """

    loss_weights: dict[str, float] | None = field(default=None)
    beta: float = 0.1
    reward_shift: str = "previous"
    nll_reduction: str = "sequence"
    label_smoothing: float = 0.0
    reference_kind: str = "auto"
    reference_cache_dir: str | None = None
    max_length: int | None = None
    over_long: str = "drop"
    max_tiles: int = 12
    video_frames: int = 8
    max_tokens_per_row: int | None = 0
    group_by_prompt: int = 0
    balance_ranks: bool = True
    on_bad_record: str = "skip"
    attention: str = "auto"
    learning_rates: dict[str, float] | None = field(default=None)
    ema_decay: float | None = None
    # The published recipes: one epoch, small steps (transformers' 3 epochs at 5e-5 would ruin an SFT checkpoint).
    num_train_epochs: float = 1.0
    learning_rate: float = 1e-6
    # A NaN must show in the log, not be replaced by the mean of earlier losses.
    logging_nan_inf_filter: bool = False
    logging_first_step: bool = True
    report_to: Any = "none"

    _VALID_DICT_FIELDS = [*compat.fields_given_as_json(), "loss_weights", "learning_rates"]  # noqa: RUF012

    def __post_init__(self) -> None:
        direction = (
            self.greater_is_better
        )  # before transformers guesses: only names that end in "loss" are losses to it
        super().__post_init__()
        if self.max_tokens_per_row == 0:
            self.max_tokens_per_row = row_tokens(self.device.type)
        self._check_choices(direction)
        self.loss_weights = check_weights(MPO_WEIGHTS if self.loss_weights is None else self.loss_weights)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.group_by_prompt < 0:
            raise ValueError(f"group_by_prompt must be at least 0, not {self.group_by_prompt}")
        if self.dataloader_num_workers < 0:
            raise ValueError(f"dataloader_num_workers must be at least 0, not {self.dataloader_num_workers}")
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, not {self.beta}")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor is not MPO's; set label_smoothing (loss.label_smoothing)")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), not {self.label_smoothing}")

    def _check_choices(self, direction: bool | None) -> None:
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            raise ValueError("save_strategy: best: best by what? Set metric_for_best_model, e.g. eval_loss")
        if self.metric_for_best_model is not None and direction is None:
            self.greater_is_better = greater_is_better(self.metric_for_best_model)
        check_values(self.learning_rates or {})
        decay = self.ema_decay
        if decay is not None and (isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1):
            raise ValueError(f"ema_decay must be in [0, 1), e.g. 0.999 (0: no average), not {decay!r}")

    @property
    def weights(self) -> dict[str, float]:
        """The terms that are on."""
        assert self.loss_weights is not None  # set in __post_init__
        return self.loss_weights

    @property
    def loss_settings(self) -> dict[str, Any]:
        """What every call of :func:`vlmpo.loss.mpo_loss` in a run is told alike."""
        return {
            "weights": self.weights,
            "beta": self.beta,
            "nll_reduction": self.nll_reduction,
            "label_smoothing": self.label_smoothing,
        }
