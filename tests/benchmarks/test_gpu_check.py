"""benchmarks/gpu_check in miniature on a CPU: every part runs, its figures are right, and each fails alone."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu_model import (
    INTERNVL3_1B,
    INTERNVL3_8B,
    MINIATURE,
    forward_flops,
    make_model,
    make_pairs,
    make_processor,
    peak_flops,
)
from benchmarks.gpu_phases import PHASES, Phases, medians
from benchmarks.gpu_qwen import MINIATURE_2_5, MINIATURE_3, QWEN2_5_VL_3B, QWEN3_VL_2B
from benchmarks.gpu_run import Run
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_arms, gpu_check, gpu_checks, gpu_measure, gpu_speed
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.train.batching import lay_out
from vlmpo.tree import varlen
from vlmpo.tree.forward import install

CPU = torch.device("cpu")


def a_run(seconds: float = 300.0) -> Run:
    return Run(CPU, True, time.perf_counter() + seconds)


def parts_in(folder: Path) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads((folder / "gpu.json").read_text())["parts"]
    return parts


# ---- parts ----


@pytest.mark.slow
def test_the_parts_that_need_no_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "compiled_head", contextlib.nullcontext)  # a compiler is slow to start
    assert gpu_check.check(tmp_path, CPU, True, ["device", "alignment", "parity", "head"])
    parts = parts_in(tmp_path)
    assert parts["device"]["torch"] == torch.__version__
    errors = parts["alignment"]["segments"]["errors"]
    assert len(errors) == 12  # two types, one to six responses
    assert 1e-5 < max(errors.values()) < 0.01  # rounding shows, and no more
    assert "error" in parts["alignment"]["torch"]  # there is no such kernel on a CPU, and that is said
    for family in ("internvl-qwen2", "qwen2.5-vl"):
        assert 0 < parts["parity"][family]["float32"]["gradient"] < 1e-5
        assert 1e-4 < parts["parity"][family]["bfloat16"]["gradient"] < 0.2
    (head,) = (found for name, found in parts["head"].items() if name != "seconds")
    assert set(head["eager"]) == set(head["compiled"])


@pytest.mark.slow
def test_the_first_step_in_bf16(tmp_path: Path) -> None:
    assert gpu_check.check(tmp_path, CPU, True, ["start"])


@pytest.mark.slow
def test_a_wrong_kernel_fails_the_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Any, scale: Any) -> torch.Tensor:
        return query + 0 * key.sum() + 0 * value.sum()

    monkeypatch.setattr(varlen, "CANDIDATES", {"blind": lambda: blind})
    found = gpu_checks.part_alignment(a_run())
    assert not found["passed"]
    assert found["blind"]["worst"] > 0.5
    assert found["segments"]["worst"] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    ["8B", *(pytest.param(part, marks=pytest.mark.long) for part in ("peaks-8B", "levers-1B", "families", "sizes-1B"))],
)
def test_every_part_of_whole_steps_in_miniature(part: str, tmp_path: Path) -> None:
    assert gpu_check.check(tmp_path, CPU, True, [part])  # the first losses of all arms agree
    assert tempfile.gettempdir() + "/tmp" not in (tmp_path / "gpu.json").read_text()  # figures are published
    arms = parts_in(tmp_path)[part]["arms"]
    reasons = {arm["error"].split(":")[0] for arm in arms if "error" in arm}
    assert reasons <= {"left out"}
    measured = [arm for arm in arms if "error" not in arm]
    names = {arm["arm"].split(",")[0] for arm in measured}
    assert names >= ({"vlmpo"} if part == "levers-1B" else {"vlmpo", "TRL"})
    for arm in measured:
        assert sum(arm["phases"].values()) <= arm["max"] * 1.001
        assert f"| {arm['seconds']:.3f} (" in (tmp_path / "gpu.md").read_text()


def test_a_part_that_fails_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: Run) -> dict[str, Any]:
        run.figures["before"] = 1
        run.flush()
        assert parts_in(tmp_path)["bad"] == {"unfinished": True, "before": 1}  # all that is there if it is killed now
        raise RuntimeError("no luck")

    given: list[float] = []

    def device(run: Run) -> dict[str, Any]:
        given.append(run.left())
        return {"torch": torch.__version__}

    monkeypatch.setitem(sys.modules, "benchmarks.fake", types.ModuleType("benchmarks.fake"))
    for name, function in (("fails", fails), ("device", device)):
        monkeypatch.setattr(sys.modules["benchmarks.fake"], name, function, raising=False)
    parts = {"bad": (10, "fake", "fails"), "device": (5, "fake", "device"), "late": (5, "fake", "fails")}
    monkeypatch.setattr(gpu_check, "PARTS", {**parts, "new": (5, "not_yet", "part"), "old": (5, "fake", "not_yet")})
    assert not gpu_check.check(tmp_path, CPU, True, ["bad", "device", "new", "old"])
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert not record["passed"]
    assert "no luck" in record["parts"]["bad"]["error"]
    assert record["parts"]["bad"]["before"] == 1
    assert not any("unfinished" in part for part in record["parts"].values())
    assert record["parts"]["device"]["torch"] == torch.__version__
    assert given == pytest.approx([88.0], abs=1.0)  # of 440 seconds for 25 that were asked for, a fifth
    assert record["parts"]["new"]["left_out"] == "there is no benchmarks/not_yet.py"
    assert record["parts"]["old"]["left_out"] == "benchmarks/fake.py has no not_yet"
    monkeypatch.setattr(gpu_check, "ALL_SECONDS", 0.0)
    assert gpu_check.check(tmp_path, CPU, True, ["late"])  # what was left out is not wrong
    assert parts_in(tmp_path)["late"]["left_out"] == "no time was left"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--parts", "device,"], "there is no ''"),
        (["--seconds", "nan"], "nan is no time"),
        (["--parts", " device , head"], "File exists"),
    ],
)
def test_what_cannot_be_run_is_one_line_before_anything_runs(
    given: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--miniature", "--output", str(tmp_path / "file"), *given])
    monkeypatch.setattr(gpu_check, "check", None)
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert told in capsys.readouterr().err.splitlines()[-1]


# ---- arms ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "optimizer"), [pytest.param(torch.float32, "adamw", marks=pytest.mark.long), (torch.bfloat16, "sgd")]
)
def test_every_arm_runs_and_starts_at_the_same_loss(dtype: torch.dtype, optimizer: str) -> None:
    """In float32 those that compute the same agree to 1e-5; TRL scores the line break behind a turn too."""
    setting = gpu_arms.Setting(MINIATURE, dtype, optimizer, 2, False, CPU, steps=2, seconds=120, warm_up=1)
    arms = {name: arm for name, arm in gpu_arms.arms().items() if "floor" not in name}
    found = {name: gpu_measure.measure(arm, setting) for name, arm in arms.items()}
    assert {"vlmpo, online", "TRL", "two padded rows"} <= set(found)
    assert not [arm["error"] for arm in found.values() if "error" in arm]
    losses = {name: arm["first_logs"]["loss"] for name, arm in found.items() if "grouped" not in name}
    exact = 1e-5 if dtype == torch.float32 else 2e-3
    for name, loss in losses.items():
        assert loss == pytest.approx(losses["two padded rows"], rel=1e-3 if name == "TRL" else exact)
    for name, arm in found.items():
        assert arm["first_logs"].get("shared_rows", 1.0) == 1.0
        assert ("shared_rows" in arm["first_logs"]) == name.startswith("vlmpo")
        assert arm["steps"] == 2
        phases = arm["phases"]
        assert min(phases[each] for each in ("forward", "reference", "backward", "optimizer")) > 0
        assert ("filled" in arm) == ("cached" in name)
        assert (phases["feeding"] > 0) == (name != "two padded rows")
    cached = found["vlmpo, cached"]
    assert cached["filled"]["computed"] == 2 * 2 * gpu_arms.DISTINCT
    assert not cached["reference_on_device"]


@pytest.mark.slow
def test_the_floor_runs_under_checkpointing_and_the_clock_ends_an_arm() -> None:
    setting = gpu_arms.Setting(MINIATURE, torch.float32, "adamw", 1, True, CPU, steps=10**6, seconds=0.0)
    found = gpu_measure.measure(gpu_arms.floor_arm, setting)
    assert found["steps"] == 1  # the first that could be timed
    assert found["first_logs"]["loss"] == pytest.approx(math.log(1000), rel=0.01)  # random weights


def test_an_arm_without_time_is_left_out() -> None:
    run = Run(CPU, False, time.perf_counter() + 1.0)
    table = gpu_speed.Table(run, gpu_arms.Setting(MINIATURE, torch.float32, "adamw", 1, False, CPU))
    table.add("a", lambda *_: 1 // 0)
    assert run.figures["arms"][0]["error"] == "left out: no time was left"


def test_an_arm_that_fails_says_so() -> None:
    def full(*_: Any) -> int:
        raise torch.cuda.OutOfMemoryError

    setting = gpu_arms.Setting(MINIATURE, torch.float32, "adamw", 1, False, CPU)
    assert gpu_measure.measure(full, setting)["error"] == "out of memory"
    assert "ZeroDivisionError" in gpu_measure.measure(lambda *_: 1 // 0, setting)["error"]


def test_rows_are_shortened_until_they_fit() -> None:
    tried: list[int | None] = []

    def arm(setting: gpu_arms.Setting, *_: Any) -> int:
        tried.append(setting.rows)
        raise RuntimeError("CUDA: out of memory")

    found = gpu_measure.measure_fitting(arm, gpu_arms.Setting(MINIATURE, torch.float32, "adamw", 5, False, CPU))
    assert tried == [None, 2, 1]
    assert (found["error"], found["pairs_a_row"]) == ("out of memory", 1)


def test_what_liger_patches_is_put_back() -> None:
    from transformers.models.qwen2 import modeling_qwen2 as module

    before = module.Qwen2RMSNorm
    with gpu_arms._modules_unpatched():
        module.Qwen2RMSNorm = None
    assert module.Qwen2RMSNorm is before


@pytest.mark.parametrize("liger", [False, True])
def test_the_fastest_of_trls_settings_is_measured_in_full(liger: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two settings, with Liger if it is there; then the better without; the best of all once more."""
    seconds = {(1, False): 3.0, (4, False): 4.0, (1, True): 2.0, (4, True): 2.5}
    measured: list[tuple[int, bool, int]] = []

    def measure(arm: Any, setting: gpu_arms.Setting) -> dict[str, Any]:
        how = arm.keywords["micro"], arm.keywords["liger"]
        measured.append((*how, setting.steps))
        about = {"size": "8B", "pairs": 4, "recomputation": setting.checkpointing, "steps": setting.steps}
        return {**about, "seconds": seconds[how], "all_seconds": 1.0}

    monkeypatch.setattr(gpu_speed, "measure", measure)
    monkeypatch.setattr(gpu_speed, "has_liger", lambda run: liger)
    table = gpu_speed.Table(a_run(), gpu_arms.Setting(MINIATURE, torch.bfloat16, "sgd", 4, False, CPU))
    table.fastest_trl(1)
    plain = [(1, False, 2), (4, False, 2), (1, False, 10)]
    assert measured == ([(1, True, 2), (4, True, 2), (1, False, 2), (1, True, 10)] if liger else plain)
    assert [arm["arm"] for arm in table.run.figures["arms"] if arm.get("fastest")] == [
        "TRL, 1 a micro-batch" + (", Liger" if liger else "")
    ]


def test_first_losses_that_differ_fail_a_part() -> None:
    run = a_run()
    about = {"size": "1B", "pairs": 8}
    run.figures["arms"] = [
        {**about, "arm": "vlmpo, online", "first_logs": {"loss": 10.0}},
        {**about, "arm": "TRL, 2 a micro-batch", "first_logs": {"loss": 10.04}},
        {**about, "arm": "floor", "first_logs": {"loss": 9.0}},
        {**about, "arm": "vlmpo, cached", "error": "out of memory"},
    ]
    assert gpu_speed.agreement(run) == {"losses_apart": pytest.approx(0.004), "passed": True}
    for wrong in (10.1, math.nan):
        run.figures["arms"][1]["first_logs"]["loss"] = wrong
        assert not gpu_speed.agreement(run)["passed"]
    run.figures["arms"][1]["error"] = "out of memory"
    assert gpu_speed.agreement(run) == {}  # nothing was compared


# ---- phases ----


def test_phases_add_up_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: a reference within a forward, two micro-batches; what follows the last backward is the optimizer's."""
    clock = iter([0.0, 1.0, 3.0, 3.5, 4.5, 6.5, 7.5, 7.5, 9.5, 10.0, 11.0, 11.0, 13.0, 14.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    phases = Phases(CPU)
    phases.end_step()  # 0
    with phases.within("feeding"):  # 1 to 3
        pass
    with phases.within("forward"), phases.within("reference"):  # 3.5, 4.5 to 6.5, 7.5
        pass
    with phases.within("backward"):  # 7.5 to 9.5
        pass
    with phases.within("forward"):  # 10 to 11
        pass
    with phases.within("backward"):  # 11 to 13
        pass
    phases.end_step()  # 14
    (step,) = phases.steps(1)
    expected = {"feeding": 2.0, "reference": 2.0, "forward": 3.0, "backward": 4.0, "optimizer": 1.0, "other": 2.0}
    assert step == {**expected, "step": 14.0}
    assert sum(step[phase] for phase in PHASES) == 14.0
    assert medians([step, step, {**step, "forward": 30.0}]) == expected


# ---- sizes ----


@pytest.mark.parametrize("size", [MINIATURE, MINIATURE_2_5, MINIATURE_3], ids=lambda size: size.name)
def test_operations_are_those_that_torch_counts(size: Any) -> None:
    """All but attention's, which torch's counter leaves out on a CPU; attention is worked out by hand below."""
    processor = make_processor(size)
    model = make_model(size, processor, torch.float32, CPU)
    install(model, shared=True)
    encoder = PairEncoder(processor)
    pairs = [encoder.encode(pair) for pair in make_pairs(size, 2)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(packed_rows=lay_out(pairs, True).rows)
    counted = sum(n for name, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    sizes = [(p.prompt_ids.numel(), [p.chosen_ids.numel(), p.rejected_ids.numel()]) for p in pairs]
    assert counted == sum(forward_flops(size, *lengths).products for lengths in sizes)


def test_attention_operations_by_hand() -> None:
    """Prompt 2 and responses of 1 and 2: 3 + 3 + (4 + 3) = 13 pairs see each other, 2 layers of width 32."""
    vision = 4 * 2 * 3 * (4 * 4 + 1) ** 2 * 32
    assert forward_flops(MINIATURE, 2, [1, 2]).attention == vision + 4 * 2 * 13 * 32


def test_attention_operations_of_windows_by_hand() -> None:
    """56 x 112 pixels are 32 patches: one layer sees all of them, the other 8 windows of 4."""
    text = 4 * 2 * 13 * 32
    assert forward_flops(MINIATURE_2_5, 2, [1, 2]).attention == 4 * 32 * (32 * 32 + 8 * 4 * 4) + text
    assert forward_flops(MINIATURE_3, 2, [1, 2]).attention == 4 * 32 * 2 * 32 * 32 + text


def test_the_sizes_are_those_published() -> None:
    """Parameters in billions, head and embeddings counted once if they are tied; image tokens of a prompt."""
    sizes = {INTERNVL3_1B: 0.938, INTERNVL3_8B: 7.944, QWEN2_5_VL_3B: 3.755, QWEN3_VL_2B: 2.128}
    for size, billions in sizes.items():
        processor = make_processor(size)
        model = make_model(size, processor, torch.bfloat16, torch.device("meta"))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.001)
        prompt = PairEncoder(processor).encode(make_pairs(size, 1)[0]).prompt_ids
        assert prompt.eq(model.config.image_token_id).sum() == 1792
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") is None
