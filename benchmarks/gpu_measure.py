"""Measures an arm: seconds and phases of a step, peak memory and MFU."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_arms import DISTINCT, GIB, Arm, Setting, Steps
from benchmarks.gpu_model import forward_flops, make_pairs, make_processor, peak_flops
from benchmarks.gpu_phases import medians
from benchmarks.plain_code import responses_of
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.log import logger
from vlmpo.train import cached_reference, reference

OUT_OF_MEMORY = "out of memory"


@functools.cache
def _flops_a_pair(size: Any, prompts: int, by: int) -> float:
    encoder = PairEncoder(make_processor(size))
    pairs = [encoder.encode(pair) for pair in make_pairs(size, prompts, by)]
    total = 0
    for at in range(0, len(pairs), by):
        responses = [ids.numel() for pair in pairs[at : at + by] for ids in responses_of(pair)]
        total += 3 * forward_flops(size, pairs[at].prompt_ids.numel(), responses).total
    return total / len(pairs)


def useful_flops(setting: Setting, by: int) -> float:
    """Return the fewest operations of an optimizer step: forward and backward (two forwards) of every unique token.

    Neither the reference nor anything that is read or computed twice is counted.
    """
    return _flops_a_pair(setting.size, DISTINCT * setting.pairs_a_step, by) * setting.pairs_a_step * by


def _clean_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def _switches_kept() -> Iterator[None]:
    """Put back what a deterministic arm switches for the whole process."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.deterministic, cudnn.benchmark = before


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """Keep what vlmpo logs, in place of writing it."""
    said: list[str] = []
    keep = logging.Handler()
    keep.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    with mock.patch.object(logger, "handlers", [keep]):
        yield said


def measure(arm: Arm, setting: Setting) -> dict[str, Any]:
    """Measure one arm; return its figures, or the error if it cannot run (out of memory is a result)."""
    _clean_memory(setting.device)  # of the arm before, which may take its time
    started = time.perf_counter()
    steps = Steps(setting, started)
    with tempfile.TemporaryDirectory() as folder, _heard() as said, _weights_not_hashed(), _switches_kept():
        try:
            with contextlib.redirect_stdout(None):  # trainers print their logs
                by = arm(setting, steps, folder)
            figures = summary(setting, steps, by)
        except Exception as fault:  # the other arms go on
            out = isinstance(fault, torch.cuda.OutOfMemoryError) or OUT_OF_MEMORY in str(fault).lower()
            error = OUT_OF_MEMORY if out else f"{type(fault).__name__}: {str(fault)[:500]}"
            figures = {"error": error, "steps": steps.phases.ended}
    about = {"size": setting.size.name, "pairs": setting.pairs_a_step, "recomputation": setting.checkpointing}
    if setting.rows is not None:
        about["pairs_a_row"] = setting.rows
    said = [line.replace(folder, "FOLDER") for line in said]  # a temporary one, whose name says nothing to a reader
    return {**about, **figures, **steps.notes, "said": said, "all_seconds": time.perf_counter() - started}


def measure_fitting(arm: Arm, setting: Setting) -> dict[str, Any]:
    """Measure an arm of vlmpo; if memory runs out, again with rows of half as many pairs, and so on."""
    figures, rows = measure(arm, setting), setting.pairs_a_step
    while figures.get("error") == OUT_OF_MEMORY and rows > 1:
        rows //= 2
        figures = measure(arm, replace(setting, rows=rows))
    return figures


def summary(setting: Setting, steps: Steps, by: int) -> dict[str, Any]:
    """Return the figures of an arm."""
    timed = steps.timed()
    seconds = [step["step"] for step in timed]
    pairs, median = setting.pairs_a_step * by, statistics.median(seconds)
    phases = medians(timed)
    figures: dict[str, Any] = {
        "seconds": median,
        "min": min(seconds),
        "max": max(seconds),
        "steps": len(seconds),
        "phases": phases,
        "pairs_per_second": pairs / median,
        "first_logs": steps.first_logs,
    }
    useful = useful_flops(setting, by)
    figures["useful_tflops"] = useful / median / 1e12
    if setting.device.type == "cuda":
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        figures["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        peak = peak_flops(torch.cuda.get_device_name())
        if peak:
            figures["mfu"] = useful / median / peak
            figures["mfu_passes"] = useful / (phases["forward"] + phases["backward"]) / peak
    return figures


@contextlib.contextmanager
def _weights_not_hashed() -> Iterator[None]:
    """Spare cached arms the hash of the weights, 15 seconds at 8B: they are the same random numbers each time."""
    with contextlib.ExitStack() as patches:
        for module in (reference, cached_reference):
            patches.enter_context(mock.patch.object(module, "weights_hash", return_value="random weights"))
        yield
