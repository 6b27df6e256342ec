"""Extend transformers' TrainingArguments by the settings of Mixed Preference Optimization."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from transformers import TrainingArguments

from vlmpo import compat
from vlmpo.loss import check_weights
from vlmpo.settings import (
    MPO_WEIGHTS,
    Attention,
    NllReduction,
    OnBadRecord,
    OverLong,
    ReferenceKind,
    ShiftMode,
    VisionMemory,
)
from vlmpo.train.metrics import greater_is_better
from vlmpo.train.param_groups import check_values

CHOICES = {
    "reward_shift": get_args(ShiftMode),
    "nll_reduction": get_args(NllReduction),
    "reference_kind": get_args(ReferenceKind),
    "over_long": get_args(OverLong),
    "on_bad_record": get_args(OnBadRecord),
    "attention": get_args(Attention),
    "vision_memory": get_args(VisionMemory),
    "train_sampling_strategy": ("random", "sequential"),
}


@dataclass
class MPOConfig(TrainingArguments):
    """Holds TrainingArguments and the settings of MPO.

    Attributes:
        loss_weights: weights of the terms ``sigmoid``, ``bco_pair``, ``nll``; None: 0.8, 0.2, 1.0. ``{"nll": 1.0}`` is
            supervised fine-tuning, without a reference and rejected responses.
        beta: scale of the implicit rewards.
        reward_shift: how delta moves: ``previous``, ``running`` or ``none`` (see vlmpo.loss).
        nll_reduction: ``sequence`` (the paper) or ``token``.
        label_smoothing: label smoothing of the sigmoid term, in [0, 0.5).
        reference_kind: ``copy`` of the initial policy, the policy with its ``adapter`` switched off, a ``cache`` of
            log-probs on disk, or ``auto``: ``adapter`` if the policy has one, else ``copy``.
        reference_cache_dir: folder in which ``cache`` keeps log-probs; None: one in the user's cache folder, shared by
            all runs.
        max_length: most tokens of a prompt and its longer response together; None: no limit.
        over_long: ``drop`` longer pairs (they are counted), or ``cut`` the ends of their responses.
        max_tiles: most tiles of all images of a pair together; None: a data set's own number, or else what the model's
            processor allows one image.
        video_frames: most frames that are read of a video.
        max_tokens_per_row: most tokens of a row; a micro-batch is read in several rows, each with a backward pass, so
            that a row's length bounds the memory, not the micro-batch's. ``auto``: as many as fit, by a measure at the
            start (see vlmpo.train.memory_choice); None: no bound.
        group_by_prompt: put up to this many pairs of one prompt next to each other, so that they share the prompt, and
            a response that several of them have is read once. Pairs of one prompt are then in one step more often than
            by chance. 0: leave pairs in shuffled order.
        balance_ranks: give ranks equal work in each step, rather than its pairs in order; the step has the same pairs.
            Without effect on one process, under ``train_sampling_strategy: sequential``, and under ``reward_shift:
            running``, as there the order of micro-batches decides how delta moves.
        on_bad_record: ``skip`` a bad record and count it, or ``fail``.
        max_bad_share: share of the records read while training whose images, videos or data files may fail under
            ``skip``, once 1,000 are read; more end the run. 1: any.
        num_train_epochs, learning_rate: as in TrainingArguments, with the defaults 1 and 1e-6.
        learning_rates: learning rates of the parts ``vision``, ``projector`` and ``text``; a part without one takes
            ``learning_rate``.
        ema_decay: decay of an exponential moving average of the weights (see vlmpo.train.ema); 0 or None: no average.
        allow_changes: recipe keys, e.g. ``loss.beta``, that may differ from what the checkpoint was made by that is
            resumed from; the change is noted in the run's history.
        vision_memory: ``keep`` the vision tower's activations, ``recompute`` them in the backward pass, a few tiles
            at a time, or ``auto``: by the same measure.
        attention: ``auto`` shares prompts if the model family allows it; ``separate`` reads each response in a row of
            its own.
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
    max_tiles: int | None = None
    video_frames: int = 8
    max_tokens_per_row: int | str | None = "auto"
    group_by_prompt: int = 0
    balance_ranks: bool = True
    on_bad_record: str = "skip"
    max_bad_share: float = 0.05
    attention: str = "auto"
    vision_memory: str = "auto"
    learning_rates: dict[str, float] | None = field(default=None)
    ema_decay: float | None = None
    allow_changes: list[str] | None = field(default=None)
    # The published recipes: one epoch, small steps (transformers' 3 epochs at 5e-5 would ruin an SFT checkpoint).
    num_train_epochs: float = 1.0
    learning_rate: float = 1e-6
    # A NaN must appear in the log, not be replaced by the mean of earlier losses.
    logging_nan_inf_filter: bool = False
    logging_first_step: bool = True
    report_to: Any = "none"

    _VALID_DICT_FIELDS = [*compat.fields_given_as_json(), "loss_weights", "learning_rates"]  # noqa: RUF012

    def __post_init__(self) -> None:
        # Read before transformers guesses: it takes a higher value for the better one unless the name ends in "loss".
        chosen_by_user = self.greater_is_better is not None
        super().__post_init__()
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            raise ValueError("save_strategy: best: best by what? Set metric_for_best_model, e.g. eval_loss")
        if self.metric_for_best_model is not None and not chosen_by_user:
            self.greater_is_better: bool | None = greater_is_better(self.metric_for_best_model)
        rows = self.max_tokens_per_row
        if rows not in ("auto", None) and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise ValueError(f"max_tokens_per_row must be a whole number above 0, auto, or None, not {rows!r}")
        self.loss_weights = check_weights(MPO_WEIGHTS if self.loss_weights is None else self.loss_weights)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        tiles = self.max_tiles
        if tiles is not None and (isinstance(tiles, bool) or not isinstance(tiles, int) or tiles < 1):
            raise ValueError(f"max_tiles must be a whole number above 0, or None for the model's own, not {tiles!r}")
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
        if not 0.0 <= self.max_bad_share <= 1.0:
            raise ValueError(f"max_bad_share must be in [0, 1], not {self.max_bad_share}")
        check_values(self.learning_rates or {})
        decay = self.ema_decay
        if decay is not None and (isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1):
            raise ValueError(f"ema_decay must be in [0, 1), e.g. 0.999 (0: no average), not {decay!r}")

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the terms that are on."""
        assert self.loss_weights is not None  # set in __post_init__
        return self.loss_weights

    @property
    def loss_settings(self) -> dict[str, Any]:
        """Keywords that every call of :func:`vlmpo.loss.mpo_loss` in a run has in common."""
        return {
            "weights": self.weights,
            "beta": self.beta,
            "nll_reduction": self.nll_reduction,
            "label_smoothing": self.label_smoothing,
        }
