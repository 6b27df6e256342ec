"""Seconds, memory and MFU of TRL, plain code and vlmpo at one size, one arm after the other in this process."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_model import VlmSize, forward_flops, make_model, make_pairs, make_processor, peak_flops
from benchmarks.plain_code import TRL_OBJECTIVE, floor_loss, responses_of, trl_dataset, two_rows_loss
from vlmpo import MPOConfig, MPOTrainer
from vlmpo.data.encode.encoder import EncodedPair, PairEncoder

GIB = 1024**3
STEPS_AN_EPOCH = 3  # a reference store is full after one epoch
RATE = 1e-6


@dataclass
class Setting:
    """The settings that all arms of a table share.

    Attributes:
        size: size of the model and the pairs.
        dtype: type of the weights and optimizer states; float32 computes under bf16 autocast.
        optimizer: ``adamw`` or ``sgd`` (no states).
        pairs_a_step: pairs of an optimizer step, all in one micro-batch.
        checkpointing: whether activations are checkpointed.
        device: where the arms run.
        steps: most steps to time.
        seconds: what an arm may take, its start included; if it takes longer, fewer steps are timed.
    """

    size: VlmSize
    dtype: torch.dtype
    optimizer: str
    pairs_a_step: int
    checkpointing: bool
    device: torch.device
    steps: int = 5
    seconds: float = 30.0
    processor: Any = field(init=False)

    def __post_init__(self) -> None:
        self.processor = make_processor(self.size)

    @property
    def autocast(self) -> bool:
        """Return whether the arms compute in bf16 by autocast."""
        return self.dtype == torch.float32 and self.device.type == "cuda"

    def model(self) -> Any:
        """Return a model with the same random weights each time."""
        return make_model(self.size, self.processor, self.dtype, self.device)


class Steps:
    """Counts an arm's steps until it is done: after a warm-up and ``setting.steps`` steps, or out of time."""

    def __init__(self, setting: Setting, warm_up: int, started: float) -> None:
        self._device, self._warm_up, self._count = setting.device, warm_up, setting.steps
        self._deadline = started + setting.seconds
        self.ends: list[float] = []
        self.first_logs: dict[str, float] = {}

    def ended(self) -> bool:
        """Count a step that ends now; return whether it is the last."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        return len(self.ends) >= 1 + self._warm_up + self._count or (
            self.ends[-1] > self._deadline and len(self.ends) > 1 + self._warm_up
        )

    def seconds(self) -> list[float]:
        """Return the seconds of every timed step, from the end of the one before."""
        ends = self.ends[self._warm_up :]
        return [after - before for before, after in itertools.pairwise(ends)]


Arm = Callable[[Setting, Steps, str], int]  # takes its steps in a folder; returns the number of pairs a prompt


def _common(setting: Setting, folder: str, pairs: int) -> dict[str, Any]:
    cuda = setting.device.type == "cuda"
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
        "dataloader_num_workers": 4 if cuda else 0,
        "dataloader_persistent_workers": cuda,
        "logging_steps": 1,
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
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= steps.ended()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs and not steps.first_logs:
                steps.first_logs = {name: value for name, value in logs.items() if isinstance(value, float)}

    trainer.add_callback(Drive())
    trainer.train()


def trl_arm(setting: Setting, steps: Steps, folder: str) -> int:
    """Train with TRL's DPOTrainer under its MPO setting."""
    import trl

    pairs = make_pairs(setting.size, STEPS_AN_EPOCH * setting.pairs_a_step)
    trainer = trl.DPOTrainer(
        model=setting.model(),
        ref_model=setting.model(),
        args=trl.DPOConfig(**TRL_OBJECTIVE, **_common(setting, folder, setting.pairs_a_step)),
        train_dataset=trl_dataset(pairs),
        processing_class=setting.processor,
    )
    _drive(trainer, steps)
    return 1


def vlmpo_arm(setting: Setting, steps: Steps, folder: str, by: int = 1, **further: Any) -> int:
    """Train with vlmpo on ``by`` pairs a prompt."""
    pairs = make_pairs(setting.size, STEPS_AN_EPOCH * setting.pairs_a_step, by)
    common = _common(setting, folder, setting.pairs_a_step * by)
    # Without the shift, and nll over tokens: what TRL computes.
    args = MPOConfig(**common, reward_shift="none", nll_reduction="token", **further)
    trainer = MPOTrainer(model=setting.model(), args=args, train_dataset=pairs, processing_class=setting.processor)
    _drive(trainer, steps)
    steps.first_logs["shared_rows"] = float(trainer.shared)  # 0 if the start-up check found a difference
    return by


# ---- plain code ----


def _encoded(setting: Setting) -> list[list[EncodedPair]]:
    """Return the pairs of each step of an epoch, encoded before the clock starts."""
    encoder, count = PairEncoder(setting.processor), setting.pairs_a_step
    pairs = [encoder.encode(pair) for pair in make_pairs(setting.size, STEPS_AN_EPOCH * count)]
    return [pairs[at : at + count] for at in range(0, len(pairs), count)]


def _plain_loop(setting: Setting, steps: Steps, loss_of: Callable[..., Tensor], two: bool) -> int:
    """Train in as little code as possible; with ``two`` models if the loss needs a reference."""
    model = setting.model().train()
    reference = setting.model().eval().requires_grad_(False) if two else None
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if setting.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=RATE)
    else:
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=RATE, weight_decay=0.0, fused=setting.device.type == "cuda"
        )
    batches = _encoded(setting)
    while True:
        pairs = batches[len(steps.ends) % len(batches)]
        with torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=setting.autocast):
            loss = loss_of(model, reference, pairs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not steps.first_logs:
            steps.first_logs = {"loss": loss.item()}
        if steps.ended():
            return 1


def arms() -> dict[str, Arm]:
    """Return the arms that can run here, the most informative first."""
    by_name: dict[str, Arm] = {"vlmpo, online": vlmpo_arm}
    if importlib.util.find_spec("trl"):
        by_name["TRL"] = trl_arm

    def cached(by: int) -> Arm:
        def arm(setting: Setting, steps: Steps, folder: str) -> int:
            store = {"reference_kind": "cache", "reference_cache_dir": f"{folder}/cache"}
            return vlmpo_arm(setting, steps, folder, by, group_by_prompt=by, **store)

        return arm

    by_name["floor"] = lambda setting, steps, folder: _plain_loop(setting, steps, floor_loss, two=False)
    by_name["vlmpo, cached"] = cached(1)
    by_name["vlmpo, grouped by 3, cached"] = cached(3)
    by_name["two padded rows"] = lambda setting, steps, folder: _plain_loop(setting, steps, two_rows_loss, two=True)
    return by_name


def useful_flops(setting: Setting, pairs_a_prompt: int) -> float:
    """Return the fewest operations of an optimizer step: forward and backward (two forwards) of every unique token.

    Neither the reference nor anything that is read or computed twice is counted.
    """
    encoder = PairEncoder(setting.processor)
    pairs = [encoder.encode(pair) for pair in make_pairs(setting.size, STEPS_AN_EPOCH, pairs_a_prompt)]
    total = 0
    for at in range(0, len(pairs), pairs_a_prompt):
        responses = [ids.numel() for pair in pairs[at : at + pairs_a_prompt] for ids in responses_of(pair)]
        total += 3 * forward_flops(setting.size, pairs[at].prompt_ids.numel(), responses).total
    return total / STEPS_AN_EPOCH * setting.pairs_a_step


@contextlib.contextmanager
def _clean_memory(device: torch.device) -> Iterator[None]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """Measure one arm; return its figures, or the error if it cannot run (out of memory is a result)."""
    steps = Steps(setting, STEPS_AN_EPOCH if "cached" in name else 1, time.perf_counter())
    with _clean_memory(setting.device), tempfile.TemporaryDirectory() as folder:
        try:
            with contextlib.redirect_stdout(None):  # trainers print their logs
                by = arms()[name](setting, steps, folder)
        except torch.cuda.OutOfMemoryError:
            return {"error": "out of memory", "steps": len(steps.ends)}
        except Exception as fault:  # the other arms go on
            return {"error": f"{type(fault).__name__}: {str(fault)[:500]}"}
    return summary(setting, steps, by)


def summary(setting: Setting, steps: Steps, by: int) -> dict[str, Any]:
    """Return the figures of an arm."""
    seconds = steps.seconds()
    pairs, median = setting.pairs_a_step * by, statistics.median(seconds)
    figures: dict[str, Any] = {
        "seconds": median,
        "min": min(seconds),
        "max": max(seconds),
        "steps": len(seconds),
        "pairs_per_second": pairs / median,
        "first_logs": steps.first_logs,
    }
    achieved = useful_flops(setting, by) / median
    figures["useful_tflops"] = achieved / 1e12
    if setting.device.type == "cuda":
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        peak = peak_flops(torch.cuda.get_device_name())
        figures["mfu"] = achieved / peak if peak else None
    return figures


def table(setting: Setting, seconds_left: Callable[[], float]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and figures of one arm after the other; an arm without time left yields an error."""
    most = setting.seconds
    for name in arms():
        setting.seconds = min(most, seconds_left())
        enough = setting.seconds >= most / 2
        yield name, measure(name, setting) if enough else {"error": "left out: no time was left"}
