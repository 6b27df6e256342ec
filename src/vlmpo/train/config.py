"""Extend transformers' TrainingArguments by the settings of Mixed Preference Optimization."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import TrainingArguments

from vlmpo import compat
from vlmpo.log import logger
from vlmpo.loss import check_weights
from vlmpo.models.recompute import recomputation_settings
from vlmpo.settings import (
    MPO_WEIGHTS,
    Attention,
    Kernels,
    NllReduction,
    OnBadRecord,
    OverLong,
    Precision,
    ReferenceKind,
    ShiftMode,
    VisionMemory,
)
from vlmpo.train.arguments import check_numbers
from vlmpo.train.determinism import prepare_determinism
from vlmpo.train.kernel_choice import settle_liger
from vlmpo.train.keywords import answer_keywords
from vlmpo.train.launcher import only_cpu
from vlmpo.train.metrics import greater_is_better
from vlmpo.train.param_groups import check_values

CHOICES = {
    "reward_shift": get_args(ShiftMode),
    "nll_reduction": get_args(NllReduction),
    "reference_kind": get_args(ReferenceKind),
    "over_long": get_args(OverLong),
    "on_bad_record": get_args(OnBadRecord),
    "attention": get_args(Attention),
    "kernels": get_args(Kernels),
    "precision": get_args(Precision),
    "vision_memory": get_args(VisionMemory),
    "train_sampling_strategy": ("random", "sequential"),
}


def asked_precision(precision: str, bf16: bool | None, fp16: bool) -> str:
    """Return what the settings ask for: ``auto``, ``float32``, ``bf16`` or ``autocast``.

    Raises:
        ValueError: they contradict each other.
    """
    if fp16 and precision in ("float32", "bf16"):
        raise ValueError(f"precision: {precision} contradicts fp16: true, which is autocast to float16; leave one out")
    if bf16 and precision == "float32":
        raise ValueError("precision: float32 contradicts bf16: true; leave one out")
    if bf16 is False and (precision == "bf16" or (precision == "autocast" and not fp16)):
        raise ValueError(f"precision: {precision} contradicts bf16: false; leave one out")
    if precision != "auto":
        return precision
    if fp16 or os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        return "autocast"
    if bf16 or (bf16 is None and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"):
        return "bf16"
    return "auto" if bf16 is None else "float32"


def bf16_by_deepspeed(args: Any, asked: str) -> bool | None:
    """Return the value of ``bf16`` that DeepSpeed's settings are compared with and filled in by.

    Asked for nothing, the hardware decides if DeepSpeed's own settings leave ``bf16.enabled`` open.
    """
    if asked != "auto":
        return asked in ("bf16", "autocast") and not args.fp16
    given = args.deepspeed
    settings = given if isinstance(given, dict) else json.loads(Path(str(given)).read_text(encoding="utf-8"))
    on_gpu = torch.cuda.is_available() and not args.use_cpu
    open_ = (settings.get("bf16") or {}).get("enabled") == "auto"
    return True if open_ and compat.has_fast_bf16(torch.device("cuda" if on_gpu else "cpu")) else None


@answer_keywords
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
        num_train_epochs, learning_rate, logging_steps: as in TrainingArguments, with the defaults 1, 1e-6 and 10.
        learning_rates: learning rates of the parts ``vision``, ``projector`` and ``text``; a part without one takes
            ``learning_rate``.
        deterministic: two runs with one seed are equal to the bit on a GPU too, more slowly (see
            vlmpo.train.determinism). To be set before CUDA is used in the process.
        ema_decay: decay of an exponential moving average of the weights (see vlmpo.train.ema); 0 or None: no average.
        dataloader_num_workers: processes that read data for this rank, 0: the training process itself; None: by the
            machine's cores, see vlmpo.train.readers.
        allow_changes: recipe keys, e.g. ``loss.beta``, that may differ from what the checkpoint was made by that is
            resumed from; the change is noted in the run's history.
        vision_memory: ``keep`` the vision tower's activations, ``recompute`` them in the backward pass, a few tiles
            at a time, or ``auto``: by the same measure.
        attention: ``auto`` shares prompts if the model family allows it; ``separate`` reads each response in a row of
            its own.
        kernels: ``auto`` computes norms and gated MLPs by fused kernels on CUDA if liger-kernel is installed and agrees
            with the plain modules; ``off`` does not. ``use_liger_kernel`` is another name for ``auto``, and an error
            if there can be none.
        precision: ``float32`` reads and trains the weights in their own type, ``bf16`` in bfloat16 over float32
            weights, ``autocast`` by torch's autocast; ``auto``: ``bf16`` if the hardware is fast at it, see
            :mod:`vlmpo.train.precision`.
        bf16: True asks for ``precision: bf16``, False for ``float32``; None: ``precision`` decides.
        use_cpu: use the CPU although there is an accelerator; it becomes True if there is none.
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
    kernels: str = "auto"
    precision: str = "auto"
    bf16: bool | None = None
    vision_memory: str = "auto"
    learning_rates: dict[str, float] | None = field(default=None)
    ema_decay: float | None = None
    deterministic: bool = False
    allow_changes: list[str] | None = field(default=None)
    # The published recipes: one epoch, small steps (transformers' 3 epochs at 5e-5 would ruin an SFT checkpoint).
    num_train_epochs: float = 1.0
    learning_rate: float = 1e-6
    dataloader_num_workers: int | None = None
    # A NaN must appear in the log, not be replaced by the mean of earlier losses.
    logging_nan_inf_filter: bool = False
    logging_first_step: bool = True
    logging_steps: float = 10
    report_to: Any = "none"

    _VALID_DICT_FIELDS = [*compat.fields_given_as_json(), "loss_weights", "learning_rates"]  # noqa: RUF012

    def __post_init__(self) -> None:
        # Read before transformers guesses: it takes a higher value for the better one unless the name ends in "loss".
        check_numbers(self)
        chosen_by_user = self.greater_is_better is not None
        readers = self.dataloader_num_workers
        self.dataloader_num_workers = 1 if readers is None else readers  # transformers compares it with numbers
        if not isinstance(self.deterministic, bool):
            raise ValueError(f"deterministic must be true or false, not {self.deterministic!r}")
        prepare_determinism(self.deterministic, self.full_determinism)  # transformers uses CUDA in what follows
        if not self.deepspeed and only_cpu(os.environ):
            self.use_cpu = True
        self._set_up_precision(super().__post_init__)
        self.dataloader_num_workers = readers
        given: Any = self.gradient_checkpointing_kwargs  # transformers has made the two names equal
        if self.activation_checkpointing or given:
            recomputation = recomputation_settings(given, self.device.type)
            self.activation_checkpointing_kwargs: Any = recomputation
            self.gradient_checkpointing_kwargs: Any = recomputation  # its deprecated alias
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            raise ValueError("save_strategy: best: best by what? Set metric_for_best_model, e.g. eval_loss")
        if self.metric_for_best_model is not None:
            by_nature = greater_is_better(self.metric_for_best_model)
            if not chosen_by_user:
                self.greater_is_better: bool | None = by_nature
            elif by_nature is not None and self.greater_is_better != by_nature:
                kept, better = ("highest", "lower") if self.greater_is_better else ("lowest", "higher")
                logger.info(
                    f"note: greater_is_better: {str(self.greater_is_better).lower()} makes the {kept} "
                    f"{self.metric_for_best_model} the best, though a {better} one is better; leave it out if that is "
                    "not meant"
                )
        rows = self.max_tokens_per_row
        if rows not in ("auto", None) and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise ValueError(f"max_tokens_per_row must be a whole number above 0, auto, or None, not {rows!r}")
        self.loss_weights = check_weights(MPO_WEIGHTS if self.loss_weights is None else self.loss_weights)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        settle_liger(self)
        tiles = self.max_tiles
        if tiles is not None and (isinstance(tiles, bool) or not isinstance(tiles, int) or tiles < 1):
            raise ValueError(f"max_tiles must be a whole number above 0, or None for the model's own, not {tiles!r}")
        if self.group_by_prompt < 0:
            raise ValueError(f"group_by_prompt must be at least 0, not {self.group_by_prompt}")
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, not {self.beta}")
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise ValueError(f"{name}: evaluations compute as training does; leave it out, and see precision")
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

    def _set_up_precision(self, set_up: Callable[[], None]) -> None:
        """Call transformers' ``set_up``; it learns of ``bf16`` if DeepSpeed's settings depend on it, else not.

        It would refuse bf16 on a CPU. The trainer, which knows the model, tells accelerate what to do.
        """
        if self.precision not in CHOICES["precision"]:
            raise ValueError(f"precision must be one of {', '.join(CHOICES['precision'])}, not {self.precision!r}")
        asked, given = asked_precision(self.precision, self.bf16, self.fp16), self.bf16
        if given and self.fp16:
            raise ValueError("bf16: true contradicts fp16: true; leave one out")
        self.bf16 = bf16_by_deepspeed(self, asked) if self.deepspeed else None
        set_up()
        self.bf16 = given

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
