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
from torch.nn.functional import cross_entropy

from benchmarks.gpu_model import VlmSize, forward_flops, make_model, make_pairs, make_processor, peak_flops
from vlmpo import MPOConfig, MPOTrainer, mpo_loss
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
    """Train with TRL's DPOTrainer under its MPO setting, which leaves the reward shift out."""
    import datasets
    import trl

    text = datasets.Value("string")
    turns = [{"role": text, "content": text}]
    features = {"images": datasets.List(datasets.Image()), "prompt": turns, "chosen": turns, "rejected": turns}
    pairs = make_pairs(setting.size, STEPS_AN_EPOCH * setting.pairs_a_step)
    records = [
        {
            "images": list(pair.images),
            "prompt": [{"role": "user", "content": pair.prompt[0].text.removeprefix("<image>\n")}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in pairs
    ]
    args = trl.DPOConfig(
        max_length=None,
        loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
        **_common(setting, folder, setting.pairs_a_step),
    )
    trainer = trl.DPOTrainer(
        model=setting.model(),
        ref_model=setting.model(),
        args=args,
        train_dataset=datasets.Dataset.from_list(records, features=datasets.Features(features)),
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


# ---- plain code: what InternVL's trainer does, and the floor ----


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
            loss = loss_of(model, reference, pairs, setting.device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not steps.first_logs:
            steps.first_logs = {"loss": loss.item()}
        if steps.ended():
            return 1


def _responses(pair: EncodedPair) -> list[Tensor]:
    return [ids for ids in (pair.chosen_ids, pair.rejected_ids) if ids is not None]


def padded_logps(model: Any, pairs: list[EncodedPair], device: torch.device) -> Tensor:
    """Return each response's log-prob, ``[2 * pairs]``, chosen ones first, from a padded row each and all logits."""
    rows = [(pair, _responses(pair)[number]) for number in range(2) for pair in pairs]
    length = max(pair.prompt_ids.numel() + response.numel() for pair, response in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (pair, response) in enumerate(rows):
        prompt = pair.prompt_ids.numel()
        ids[row, : prompt + response.numel()] = torch.cat([pair.prompt_ids, response])
        mask[row, : prompt + response.numel()] = 1
        scored[row, prompt : prompt + response.numel()] = True
    vision = {name: torch.cat([pair.vision[name] for pair, _ in rows]).to(device) for name in rows[0][0].vision}
    ids, scored = ids.to(device), scored.to(device)
    logits = model(input_ids=ids, attention_mask=mask.to(device), **vision).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return (logps * scored[:, 1:]).sum(1)


def _two_rows_loss(model: Any, reference: Any, pairs: list[EncodedPair], device: torch.device) -> Tensor:
    count = len(pairs)
    policy = padded_logps(model, pairs, device)
    with torch.no_grad():
        frozen = padded_logps(reference, pairs, device)
    lengths = torch.tensor([pair.chosen_ids.numel() for pair in pairs], device=device)
    halves = policy[:count], policy[count:], frozen[:count], frozen[count:]
    return mpo_loss(*halves, lengths, nll_reduction="token").loss


def _floor_loss(model: Any, reference: Any, pairs: list[EncodedPair], device: torch.device) -> Tensor:
    """Return the loss of the model's own forward over the unique tokens, with logits for response tokens only."""
    total = torch.zeros((), device=device)
    for pair in pairs:
        ids = torch.cat([pair.prompt_ids, *_responses(pair)]).to(device)
        at = torch.arange(pair.prompt_ids.numel() - 1, ids.numel() - 1, device=device)
        vision = {name: values.to(device) for name, values in pair.vision.items()}
        logits = model(input_ids=ids[None], logits_to_keep=at, **vision).logits[0]
        total = total + cross_entropy(logits.float(), ids[at + 1]) / len(pairs)
    return total


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

    by_name["floor"] = lambda setting, steps, folder: _plain_loop(setting, steps, _floor_loss, two=False)
    by_name["vlmpo, cached"] = cached(1)
    by_name["vlmpo, grouped by 3, cached"] = cached(3)
    by_name["two padded rows"] = lambda setting, steps, folder: _plain_loop(setting, steps, _two_rows_loss, two=True)
    return by_name


def useful_flops(setting: Setting, pairs_a_prompt: int) -> float:
    """Return the fewest operations of an optimizer step: forward and backward (two forwards) of every unique token.

    Neither the reference nor anything that is read or computed twice is counted.
    """
    encoder = PairEncoder(setting.processor)
    pairs = [encoder.encode(pair) for pair in make_pairs(setting.size, STEPS_AN_EPOCH, pairs_a_prompt)]
    total = 0
    for at in range(0, len(pairs), pairs_a_prompt):
        responses = [ids.numel() for pair in pairs[at : at + pairs_a_prompt] for ids in _responses(pair)]
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
