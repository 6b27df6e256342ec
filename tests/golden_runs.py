"""The runs of the golden record, every setting written out: a default that changes later does not change them.

Only public names of vlmpo are used, and of the other helpers the tiny model and its processor alone.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from PIL import Image

from tests.tiny_models import model as tiny_model
from tests.tiny_models import processor
from vlmpo import Message, MPOConfig, MPOTrainer, PreferencePair

Record = dict[str, Any]

# Not of the record: how long things took.
TIMES = frozenset(
    {
        *("step_seconds", "pairs_per_second", "tokens_per_second", "data_wait_share", "total_flos", "memory_gib"),
        *("train_runtime", "train_samples_per_second", "train_steps_per_second"),
    }
)
WRAPPERS = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
WORDS = ("red", "blue", "green", "circle", "square", "two", "three", "seven", "not", "the", "picture", "row", "!")

# ---- settings ----

COMMON: Record = {
    # steps
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "max_steps": -1,
    # optimizer and schedule: of SGD a gradient that is nothing but rounding stays nothing, Adam would blow it up
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 3e-2,
    "learning_rates": None,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "ema_decay": None,
    # objective
    "loss_weights": {"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1.0},
    "beta": 0.1,
    "reward_shift": "previous",
    "nll_reduction": "sequence",
    "label_smoothing": 0.0,
    "reference_kind": "auto",
    "reference_cache_dir": None,
    # data
    "max_length": 400,
    "over_long": "drop",
    "max_tiles": 2,
    "video_frames": 8,
    "max_tokens_per_row": 160,
    "group_by_prompt": 0,
    "balance_ranks": True,
    "on_bad_record": "skip",
    "attention": "auto",
    "train_sampling_strategy": "random",
    "dataloader_num_workers": 0,
    "dataloader_drop_last": False,
    "seed": 7,
    "data_seed": 7,
    # machine
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
    "torch_compile": False,
    # log
    "logging_strategy": "steps",
    "logging_steps": 1,
    "logging_first_step": True,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "disable_tqdm": True,
    "report_to": "none",
}
LORA: Record = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": ["q_proj", "v_proj", "up_proj"],
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
}
SFT: Record = {
    "loss_weights": {"nll": 1.0},
    "nll_reduction": "token",
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 2,
}
# Beside MPOConfig's fields: `pairs`, to train on; `prompts`, of them that differ (0: all); `evaluate`, pairs to
# evaluate on at the end; `lora`; `cache`: a reference store in the run's folder; `ranks`.
RUNS: dict[str, Record] = {
    "mpo": {"pairs": 12, "evaluate": 5},
    "mpo_running": {
        "pairs": 16,
        "reward_shift": "running",
        "gradient_accumulation_steps": 2,
        "label_smoothing": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "num_train_epochs": 2,
    },
    "mpo_separate": {
        "pairs": 12,
        "attention": "separate",
        "over_long": "cut",
        "reward_shift": "none",
        "train_sampling_strategy": "sequential",
    },
    "dpo": {
        "pairs": 12,
        "loss_weights": {"sigmoid": 1.0},
        "reference_kind": "copy",
        "optim": "adamw_torch",
        "optim_args": None,
        "learning_rate": 1e-2,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-2,  # far above rounding: see COMMON's optimizer
        "weight_decay": 0.01,
    },
    "sft": {"pairs": 12, **SFT},
    "lora": {"pairs": 12, "lora": LORA, "learning_rate": 1e-1},
    "cached_grouped": {
        "pairs": 12,
        "prompts": 5,
        "cache": True,
        "reference_kind": "cache",
        "group_by_prompt": 3,
        "per_device_train_batch_size": 3,
        "num_train_epochs": 2,
    },
    "mpo_two_ranks": {"pairs": 21, "evaluate": 5, "ranks": 2},
    "mpo_accumulated_two_ranks": {
        "pairs": 21,
        "ranks": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "nll_reduction": "token",
    },
    "sft_two_ranks": {"pairs": 21, "ranks": 2, **SFT},
    "lora_two_ranks": {"pairs": 21, "ranks": 2, "lora": LORA, "learning_rate": 1e-1},
}

# ---- data ----


def make_pairs(count: int, first: int = 0, prompts: int = 0) -> list[PreferencePair]:
    """Pairs of two data sets, with one, two and no images, of uneven lengths; the sixth response is far too long."""
    return [_pair(number, number % prompts if prompts else number) for number in range(first, first + count)]


def _pair(number: int, prompt: int) -> PreferencePair:
    asked, said = np.random.default_rng([1, prompt]), np.random.default_rng([2, number])
    images = (1, 2, 0, 1)[prompt % 4]
    chosen, rejected = (_words(said, 1 + int(said.integers(4 + 6 * (number % 4)))) for _ in range(2))
    return PreferencePair(
        prompt=(Message("user", "<image>\n" * images + f"what colour is it, {_words(asked, 5)}?"),),
        images=tuple(_noise(asked, 40 + 13 * (prompt % 7), 50) for _ in range(images)),
        chosen="red " * 400 if number == 5 else chosen,
        rejected=rejected + " !" if rejected == chosen else rejected,
        source=("north", "south")[number % 2],
        origin=f"golden:{number}",
    )


def _words(random: np.random.Generator, count: int) -> str:
    return " ".join(random.choice(WORDS, size=count))


def _noise(random: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))


# ---- a run ----


def do_run(name: str, folder: Path, **changes: Any) -> Record:
    """Do a run of RUNS in this process (or this rank) and say what is recorded of it.

    Args:
        name: of RUNS.
        folder: where its metrics go.
        changes: settings to be other than the record's, to see that it notices.
    """
    run = {**RUNS[name], **changes}
    own = {key: run.pop(key, None) for key in ("pairs", "prompts", "evaluate", "lora", "cache", "ranks")}
    settings = {**COMMON, **run, "output_dir": str(folder)}
    if own["cache"]:
        settings["reference_cache_dir"] = str(folder / "store")
    if own["ranks"]:
        settings["ddp_backend"] = "gloo"
    trainer = MPOTrainer(
        model=tiny_model(seed=0, dtype=torch.float64),
        args=MPOConfig(**settings),
        train_dataset=make_pairs(own["pairs"], prompts=own["prompts"] or 0),
        eval_dataset=make_pairs(own["evaluate"], first=100) if own["evaluate"] else None,
        processing_class=processor(),
        peft_config=LoraConfig(**own["lora"]) if own["lora"] else None,
    )
    before = _state(trainer.model)
    trainer.train()
    if own["evaluate"]:
        trainer.evaluate()
    after, trained = _state(trainer.model), _trained(trainer.model)
    for key in before.keys() - trained:
        assert torch.equal(before[key], after[key]), f"{key} is frozen and has changed"
    return {
        "log": _log(folder) if trainer.is_world_process_zero() else [],
        "weights": {key: _digest(key, before[key], after[key]) for key in sorted(trained)},
    }


def _bare(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {_bare(name): value.detach().double().clone() for name, value in model.state_dict().items()}


def _trained(model: torch.nn.Module) -> set[str]:
    return {_bare(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def _digest(name: str, before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """Norm, and dot product with a random vector of the name's own, of the final tensor and of what training added."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    probe = torch.randn(after.numel(), generator=generator, dtype=torch.float64)
    found = {}
    for kind, tensor in {"final": after, "change": after - before}.items():
        found[f"{kind}_norm"] = float(tensor.norm())
        found[f"{kind}_dot"] = float(tensor.flatten() @ probe)
    return found


def _log(folder: Path) -> list[Record]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
