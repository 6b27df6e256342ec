"""The arms of the GPU check at one setting: TRL, plain code and vlmpo, each takes steps that are timed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_model import make_model, make_pairs, make_processor
from benchmarks.gpu_phases import Phases
from benchmarks.plain_code import TRL_OBJECTIVE, floor_loss, responses_of, trl_dataset, two_rows_loss
from vlmpo import MPOConfig, MPOTrainer
from vlmpo.data.encode.encoder import EncodedPair, PairEncoder

GIB = 1024**3
DISTINCT = 3  # steps of different pairs; the data repeat them, so that no epoch ends while the clock runs
WARM_UP = 1 + DISTINCT  # each length of row has been seen by then
RATE = 1e-6
_LOGS = ("loss", "loss/sigmoid", "loss/nll", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen")


@dataclass
class Setting:
    """The settings that all arms of a table share.

    Attributes:
        size: size of the model and the pairs.
        dtype: type of the weights; with float32 the passes are in bf16 on CUDA.
        optimizer: ``adamw`` or ``sgd`` (no states).
        pairs_a_step: pairs of an optimizer step.
        checkpointing: whether activations are recomputed.
        device: where the arms run.
        steps: most steps to time.
        seconds: what an arm may take, its start included; if it takes longer, fewer steps are timed.
        rows: most pairs of a row in vlmpo's arms; None: as MPOConfig has it.
        warm_up: steps before the first that is timed.
    """

    size: Any
    dtype: torch.dtype
    optimizer: str
    pairs_a_step: int
    checkpointing: bool
    device: torch.device
    steps: int = 10
    seconds: float = 30.0
    rows: int | None = None
    warm_up: int = WARM_UP
    processor: Any = field(init=False)

    def __post_init__(self) -> None:
        self.processor = make_processor(self.size)

    @property
    def autocast(self) -> bool:
        """Return whether float32 weights are read in bf16."""
        return self.dtype == torch.float32 and self.device.type == "cuda"

    def model(self) -> Any:
        """Return a model with the same random weights each time."""
        model = make_model(self.size, self.processor, self.dtype, self.device)
        # With a name vlmpo may drop a reference whose log-probs are all stored, as it could load it again.
        model.config.name_or_path = "random-weights"
        return model

    def pairs(self, by: int = 1) -> list[Any]:
        """Return the distinct pairs, ``by`` of them a prompt."""
        return make_pairs(self.size, DISTINCT * self.pairs_a_step, by)

    def times(self) -> int:
        """Return how often the data must repeat the distinct pairs to last for all steps."""
        return -(-(self.warm_up + self.steps + 1) // DISTINCT)


class Steps:
    """Counts and times an arm's steps until it is done: enough steps after a warm-up, or out of time."""

    def __init__(self, setting: Setting, started: float) -> None:
        self.phases = Phases(setting.device)
        self.first_logs: dict[str, float] = {}
        self.notes: dict[str, Any] = {}
        self._cuda = setting.device.type == "cuda"
        self._warm_up, self._all = setting.warm_up, setting.warm_up + setting.steps
        self._deadline = started + setting.seconds
        self._started = self._training = started

    def begin(self) -> None:
        """Note that the first step begins."""
        self._training = time.perf_counter()
        self.notes["start_seconds"] = self._training - self._started

    def ended(self) -> bool:
        """Count a step that ends now; return whether it is the last."""
        self.phases.end_step()
        if self.phases.ended == 1:
            self._first()
        over = time.perf_counter() > self._deadline
        return self.phases.ended >= self._all or (over and self.phases.ended > 1)

    def _first(self) -> None:
        """Note the first step's seconds, and the most memory until its end: of a step, it is that of all others."""
        if self._cuda:
            torch.cuda.synchronize()
            self.notes["start_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()
        self.notes["first_step_seconds"] = time.perf_counter() - self._training

    def timed(self) -> list[dict[str, float]]:
        """Return the seconds of every timed step and its phases; one that was cut has less of a warm-up."""
        return self.phases.steps(min(self._warm_up, self.phases.ended - 1))


Arm = Callable[[Setting, Steps, str], int]  # takes its steps in a folder; returns the number of pairs a prompt


def readers(device: torch.device) -> int:
    """Return the loaders' workers, the same for every arm."""
    return min(8, max(1, (os.cpu_count() or 2) // 2)) if device.type == "cuda" else 0


def _common(setting: Setting, folder: str, pairs: int) -> dict[str, Any]:
    cuda, workers = setting.device.type == "cuda", readers(setting.device)
    return {
        "output_dir": folder,
        "per_device_train_batch_size": pairs,
        "max_steps": 1000,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": {"adamw": "adamw_torch_fused" if cuda else "adamw_torch", "sgd": "sgd"}[setting.optimizer],
        "bf16": setting.autocast,
        "gradient_checkpointing": setting.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if setting.checkpointing else None,
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
        "logging_steps": 10,
        "logging_first_step": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": not cuda,
        "train_sampling_strategy": "sequential",
    }


def _drive(trainer: Any, steps: Steps) -> None:
    """Train until all steps are done."""
    from transformers import TrainerCallback

    class Drive(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= steps.ended()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs and not steps.first_logs:
                steps.first_logs = {name: logs[name] for name in _LOGS if name in logs}

    trainer.add_callback(Drive())
    steps.phases.attach(trainer)
    trainer.train()


# ---- TRL ----


@functools.cache
def _trl_data(size: Any, prompts: int) -> Any:
    return trl_dataset(make_pairs(size, prompts))


@contextlib.contextmanager
def _modules_unpatched() -> Iterator[None]:
    """Undo what Liger's patches leave in transformers' modules: other arms must not run on it."""
    import transformers.models.internvl.modeling_internvl as internvl
    import transformers.models.qwen2.modeling_qwen2 as qwen2

    before = [(module, dict(vars(module))) for module in (internvl, qwen2)]
    try:
        yield
    finally:
        for module, names in before:
            vars(module).update(names)


def trl_arm(setting: Setting, steps: Steps, folder: str, micro: int | None = None, liger: bool = False) -> int:
    """Train with TRL's DPOTrainer under its MPO setting, ``micro`` pairs a micro-batch (None: all of a step's)."""
    import trl

    micro, pairs = micro or setting.pairs_a_step, setting.pairs()
    data = _trl_data(setting.size, len(pairs))
    common = {**_common(setting, folder, micro), "gradient_accumulation_steps": setting.pairs_a_step // micro}
    with _modules_unpatched():
        trainer = trl.DPOTrainer(
            model=setting.model(),
            ref_model=setting.model(),
            args=trl.DPOConfig(**TRL_OBJECTIVE, **common, use_liger_kernel=liger),
            train_dataset=data.select([*range(len(data))] * setting.times()),
            processing_class=setting.processor,
        )
        try:
            _drive(trainer, steps)
        finally:
            _end_readers(trainer)
    return 1


def _end_readers(trainer: Any) -> None:
    """End a loader's workers now: left to the garbage collector each takes five seconds, of the next arm."""
    for loader in trainer.accelerator._dataloaders:
        getattr(loader, "base_dataloader", loader)._iterator = None


# ---- vlmpo ----


def config_fields() -> set[str]:
    """Return the names of MPOConfig's fields."""
    return {each.name for each in dataclasses.fields(MPOConfig)}


def tokens_of(setting: Setting, pairs: int) -> int:
    """Return the tokens of a row of ``pairs`` of the longest pairs."""
    encoder = PairEncoder(setting.processor)
    encoded = [encoder.encode(pair) for pair in setting.pairs()]
    return pairs * max(each.prompt_ids.numel() + sum(map(len, responses_of(each))) for each in encoded)


def vlmpo_arm(setting: Setting, steps: Steps, folder: str, by: int = 1, **further: Any) -> int:
    """Train with vlmpo on ``by`` pairs a prompt, with ``further`` settings of MPOConfig."""
    given = _common(setting, folder, setting.pairs_a_step * by)
    # Without the shift, and nll over tokens: what TRL computes.
    given |= {"reward_shift": "none", "nll_reduction": "token"}
    if setting.rows is not None:
        given["max_tokens_per_row"] = tokens_of(setting, setting.rows)
    trainer = MPOTrainer(
        model=setting.model(),
        args=MPOConfig(**{**given, **further}),
        train_dataset=setting.pairs(by) * setting.times(),
        processing_class=setting.processor,
    )
    if trainer.args.reference_kind == "cache":
        steps.notes["filled"] = trainer.precompute_reference()
        model = getattr(trainer.reference.model, "model", None)
        there = model is not None and next(model.parameters()).device.type == setting.device.type
        steps.notes["reference_on_device"] = there
    _drive(trainer, steps)
    steps.notes["row_tokens"] = getattr(trainer.data_collator, "max_tokens_per_row", None)
    steps.first_logs["shared_rows"] = float(trainer.shared)  # 0 if the start-up check found a difference
    return by


def cached_arm(setting: Setting, steps: Steps, folder: str, by: int = 1, **further: Any) -> int:
    """Train with vlmpo whose store was filled before the first step."""
    store = {
        "reference_kind": "cache",
        "reference_cache_dir": f"{folder}/cache",
        "group_by_prompt": by if by > 1 else 0,
    }
    return vlmpo_arm(setting, steps, folder, by, **store, **further)


# ---- plain code ----


def _plain_loop(setting: Setting, steps: Steps, loss_of: Callable[..., Tensor], two: bool) -> int:
    """Train in as little code as possible; with ``two`` models if the loss needs a reference, all pairs in one row.

    Without a reference each pair has a backward pass of its own.
    """
    model = setting.model().train()
    frozen = setting.model().eval().requires_grad_(False) if two else None
    if frozen is not None:
        frozen.forward = steps.phases.around("reference", frozen.forward)
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if setting.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=RATE)
    else:
        fused = setting.device.type == "cuda"
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=fused)
    batches = _encoded(setting)
    steps.begin()
    while True:
        pairs = batches[steps.phases.ended % len(batches)]
        loss = 0.0
        for part in [pairs] if two else [[pair] for pair in pairs]:
            with (
                steps.phases.within("forward"),
                torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=setting.autocast),
            ):
                share = loss_of(model, frozen, part) * (len(part) / len(pairs))
            with steps.phases.within("backward"):
                share.backward()
            loss += share.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not steps.first_logs:
            steps.first_logs = {"loss": float(loss)}
        if steps.ended():
            return 1


def _encoded(setting: Setting) -> list[list[EncodedPair]]:
    """Return the pairs of each distinct step, encoded before the clock starts."""
    encoder, count = PairEncoder(setting.processor), setting.pairs_a_step
    pairs = [encoder.encode(pair) for pair in setting.pairs()]
    return [pairs[at : at + count] for at in range(0, len(pairs), count)]


def floor_arm(setting: Setting, steps: Steps, folder: str) -> int:
    """Take a plain forward and backward over the unique tokens, a pair at a time: supervised fine-tuning."""
    return _plain_loop(setting, steps, floor_loss, two=False)


def two_rows_arm(setting: Setting, steps: Steps, folder: str) -> int:
    """Read two padded rows a pair, as InternVL's trainer does."""
    return _plain_loop(setting, steps, two_rows_loss, two=True)


def arms() -> dict[str, Arm]:
    """Return the arms that can run here at their plain settings, the most informative first."""
    by_name: dict[str, Arm] = {"vlmpo, online": vlmpo_arm, "vlmpo, cached": cached_arm}
    if importlib.util.find_spec("trl"):
        by_name["TRL"] = trl_arm
    by_name["floor"] = floor_arm
    by_name["vlmpo, grouped by 3, cached"] = functools.partial(cached_arm, by=3)
    by_name["two padded rows"] = two_rows_arm
    return by_name
