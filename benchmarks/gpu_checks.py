"""The parts of the GPU check that hold numbers to what they must be, and the vocabulary head's block sizes."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks import gpu_arms, head
from benchmarks.gpu_alignment import errors_of, readers, times_of
from benchmarks.gpu_model import MINIATURE, make_pairs
from benchmarks.gpu_parity import parity_of
from benchmarks.gpu_run import Figures, Run
from vlmpo import MPOConfig, MPOTrainer
from vlmpo.tree import chunked_logprobs as projection
from vlmpo.tree import varlen


def part_device(run: Run) -> Figures:
    """Return the device's name and the libraries' versions."""
    figures: Figures = {"python": platform.python_version(), "device": str(run.device)}
    for name in ("torch", "transformers", "accelerate", "peft", "trl", "liger-kernel", "flash-attn"):
        try:
            figures[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            figures[name] = None
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        figures |= {"name": properties.name, "gib": properties.total_memory / 2**30, "cuda": torch.version.cuda}
        figures["capability"] = list(torch.cuda.get_device_capability(run.device))
    return figures


def part_alignment(run: Run) -> Figures:
    """Return the relative errors of every kernel that loads, and why the others do not load."""
    figures: Figures = {"passed": True, "bound": varlen._ROUNDING, "taken": None}
    for name, load in readers().items():
        try:
            reader = load()
            figures[name] = {"errors": errors_of(reader, run.device, run.miniature)}
        except Exception as fault:
            figures[name] = {"error": f"{type(fault).__name__}: {str(fault)[:300]}"}
            continue
        figures[name]["worst"] = max(figures[name]["errors"].values())
        figures["passed"] &= figures[name]["worst"] <= varlen._ROUNDING
        figures[name]["milliseconds"] = times_of(reader, run.device, run.miniature)
    if run.device.type == "cuda":
        chosen = varlen.kernel_for(run.device)
        figures["taken"] = None if chosen is None else getattr(chosen, "__qualname__", repr(chosen)).split(".")[0]
        figures["passed"] &= chosen is not None
    return figures


def part_parity(run: Run) -> Figures:
    """Compare small models of two families, float32 and bf16, to their own forward."""
    names = ("internvl-qwen2", "qwen2.5-vl")
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        figures: Figures = {name: parity_of(name, run.device) for name in names}
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before
    passed = []
    for name in names:
        full, half = figures[name]["float32"], figures[name]["bfloat16"]
        passed += [full["largest"] < 1e-4, full["gradient"] < 1e-4, half["mean"] < 0.1, half["gradient"] < 0.2]
    return {**figures, "passed": all(passed)}


# ---- start ----


def part_start(run: Run) -> Figures:
    """Check the first step's sigmoid term and rewards, with float32 weights read in bf16 and with bf16 weights."""
    figures: Figures = {"passed": True}
    for dtype in (torch.bfloat16, torch.float32):
        logs = first_logs(run, dtype)
        label = "float32 weights" if dtype == torch.float32 else "bf16 weights"
        figures[label] = {name: logs[name] for name in ("loss/sigmoid", "rewards/chosen", "rewards/rejected")}
        figures["passed"] &= abs(logs["loss/sigmoid"] - math.log(2)) < 1e-6
        figures["passed"] &= logs["rewards/chosen"] == logs["rewards/rejected"] == 0.0
    return figures


def first_logs(run: Run, dtype: torch.dtype) -> dict[str, float]:
    """Return the logs of one step of MPOTrainer on a small model with responses of hundreds of tokens."""
    size = MINIATURE
    if not run.miniature:
        size = replace(MINIATURE, text_hidden=256, tiles=7, image_size=224, response_words=(250, 500))
    setting = gpu_arms.Setting(size, dtype, "adamw", 2, False, run.device)
    with tempfile.TemporaryDirectory() as folder:
        args = MPOConfig(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=2,
            bf16=dtype == torch.float32,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            use_cpu=run.device.type != "cuda",
        )
        pairs = make_pairs(size, 2)
        trainer = MPOTrainer(model=setting.model(), args=args, train_dataset=pairs, processing_class=setting.processor)
        with contextlib.redirect_stdout(None):
            trainer.train()
    return next(logs for logs in trainer.state.log_history if "loss" in logs)


# ---- head ----


def part_head(run: Run) -> Figures:
    """Return seconds and memory of the vocabulary head by block size, eager and compiled."""
    sizes: tuple[head.Size, ...] = head.MINIATURE
    if not run.miniature:
        sizes = (head.Size(900, 151_674, 896), head.Size(900, 151_674, 3584))
    figures: Figures = {}
    for size in sizes:
        label = f"{size.scored} tokens, vocabulary {size.vocabulary}, hidden {size.hidden}"
        figures[label] = {"eager": head.seconds(size, run.device, 5)}
        if run.device.type == "cuda":
            memory = {name: head.extra_memory(size, name, run.device) for name in head.arms(run.device)}
            figures[label]["extra_mib"] = memory
        if run.left() < 15:
            figures[label]["compiled"] = {"error": "left out: no time was left"}
            continue
        with compiled_head():
            figures[label]["compiled"] = guarded(functools.partial(head.seconds, size, run.device, 5))
    return figures


@contextlib.contextmanager
def compiled_head() -> Iterator[None]:
    """Compile the passes over a block of logits."""
    with (
        mock.patch.object(projection, "_excess", torch.compile(projection._excess)),
        mock.patch.object(torch, "logsumexp", torch.compile(torch.logsumexp)),
    ):
        yield


def guarded(function: Callable[[], Any]) -> Any:
    """Return what ``function`` returns, or its error."""
    try:
        return function()
    except Exception as fault:
        return {"error": f"{type(fault).__name__}: {str(fault)[:300]}"}
