"""Warnings of a run that runs away, on histories made by hand; healthy ones, noise included, give none."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.training import pairs, trainer
from vlmpo.train import runaway
from vlmpo.train.runaway import Logged, RunawayWatch, both_fall, margin_is_large, norm_spikes, shift_drifts


def logs(chosen: float, rejected: float, shift: float = 0.0) -> dict[str, float]:
    """As logged at beta 0.1; arguments in nats."""
    rewards = {"rewards/chosen": 0.1 * chosen, "rewards/rejected": 0.1 * rejected}
    return {**rewards, "rewards/margins": 0.1 * (chosen - rejected), "reward_shift": shift}


def history(chosen: list[float], rejected: list[float], every: int = 1) -> list[Logged]:
    values = enumerate(zip(chosen, rejected, strict=True))
    return [Logged(every * (at + 1), c, r, 0.1 * (c - r), 0.0) for at, (c, r) in values]


# ---- the gradient's norm ----


@pytest.mark.parametrize(
    ("before", "last", "warns"),
    [
        ([1.0] * 20, 101.0, True),
        ([1.0] * 20, 100.0, False),
        ([1.0] * 19, 1e9, False),  # too early to say
        ([0.5, 2.0] * 20, 130.0, True),  # median 1.25
        ([0.5, 2.0] * 20, 120.0, False),
        ([1.0] * 30 + [90.0] * 5, 101.0, True),  # earlier peaks do not move the median
        ([0.0] * 30, 5.0, False),
    ],
)
def test_a_gradient_far_above_its_median(before: list[float], last: float, warns: bool) -> None:
    assert (norm_spikes([*before, last]) is not None) == warns


def test_a_healthy_gradient_gives_no_warning() -> None:
    """Norms that fall by a thousand over a run, times up to ten by chance."""
    draw = random.Random(0)
    watch = RunawayWatch(beta=0.1)
    for step in range(2000):
        assert watch.see_norm(step, 1000.0 ** (1 - step / 2000) * draw.uniform(0.3, 3.0)) is None


# ---- both log-probs fall ----


def falling(count: int, slope: float, start: float = 0.0) -> list[float]:
    return [start + slope * at for at in range(count)]


@pytest.mark.parametrize(
    ("chosen", "rejected", "every", "warns"),
    [
        (falling(51, -0.1), falling(51, -0.5), 1, True),
        (falling(50, -0.1), falling(50, -0.5), 1, False),  # 49 steps
        (falling(51, 0.1), falling(51, -0.5), 1, False),  # chosen rises: as it should be
        (falling(51, -0.1), falling(51, 0.5), 1, False),
        (falling(51, -0.001), falling(51, -0.001), 1, False),  # hardly at all
        (falling(51, -0.1, start=20), falling(51, -0.5), 1, False),  # chosen above the reference still
        (falling(6, -1.0), falling(6, -2.0), 10, True),
        (falling(4, -1.0), falling(4, -2.0), 100, False),  # too few logs to say
        (falling(6, -1.0), falling(6, -2.0), 100, True),
        (falling(40, -0.2) + [-8.0] * 60, falling(40, -0.2) + [-8.0] * 60, 1, False),  # fell and stays
    ],
)
def test_both_log_probs_falling(chosen: list[float], rejected: list[float], every: int, warns: bool) -> None:
    assert (both_fall(history(chosen, rejected, every)) is not None) == warns


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_is_no_fall(seed: int) -> None:
    """Both log-probs move together, three nats to and fro, below the reference."""
    draw = random.Random(seed)
    watch = RunawayWatch(beta=0.1)
    for step in range(1000):
        noise = draw.gauss(0.0, 3.0)
        assert watch.see_log(step + 1, logs(-2.0 + noise, -4.0 + noise)) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_fall_in_noise_is_seen(seed: int) -> None:
    draw = random.Random(seed)
    watch = RunawayWatch(beta=0.1)
    for step in range(300):
        watch.see_log(step + 1, logs(-0.5 * step + draw.gauss(0.0, 3.0), -1.0 * step + draw.gauss(0.0, 3.0)))
    assert "both log-probs fall" in watch.warnings


# ---- margin and delta ----


@pytest.mark.parametrize(("margin", "warns"), [(50.0, False), (50.1, True), (-51.0, True), (12.0, False)])
def test_a_margin_beyond_its_bound(margin: float, warns: bool) -> None:
    assert (margin_is_large([Logged(1, 0.0, 0.0, margin, 0.0)]) is not None) == warns


@pytest.mark.parametrize(
    ("shifts", "warns"),
    [
        ([float(at) for at in range(1, 13)], True),
        ([-float(at) for at in range(1, 13)], True),
        ([0.1 * at for at in range(1, 13)], False),  # grows, far from the bound
        ([30.0] * 12, False),  # large, and stays
        ([*range(1, 11), 10.0, 12.0], False),  # held once
        ([2.0 * at for at in range(1, 10)], False),  # too few logs
    ],
)
def test_a_drifting_delta(shifts: list[float], warns: bool) -> None:
    assert (shift_drifts([Logged(at, 0.0, 0.0, 0.0, shift) for at, shift in enumerate(shifts)]) is not None) == warns


# ---- once each ----


def test_each_kind_warns_once_with_its_step_and_remedy() -> None:
    watch = RunawayWatch(beta=0.1)
    told = []
    for step in range(1, 200):
        told += watch.see_log(step, logs(-10.0 * step, -20.0 * step, shift=-1.5 * step))
        told.append(watch.see_norm(step, 1.0 if step < 100 else 1e6) or "")
    told = [line for line in told if line]
    assert len(told) == 4
    assert set(watch.warnings) == {"gradient norm", "both log-probs fall", "reward margin", "reward shift"}
    assert told[0].startswith("step 11: delta, the reward shift, is -16.5")
    assert told[-1].startswith("step 100: the gradient norm is 1e+06, 1000000 times its median over the last 99 steps")
    assert all("lower training.learning_rate" in line for line in told)


def test_logs_without_rewards_or_with_nan_say_nothing() -> None:
    watch = RunawayWatch(beta=0.1)
    assert watch.see_log(1, {"loss": 2.0}) == []
    assert watch.see_log(2, {**logs(0, 0), "rewards/margins": float("nan")}) == []
    assert watch.see_norm(3, float("inf")) is None
    assert watch.warnings == {}


@pytest.mark.slow
def test_a_healthy_run_does_not_warn_and_one_that_runs_away_does(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy = trainer(Path(tmp_path) / "healthy", pairs(12), num_train_epochs=5, learning_rate=1e-4)
    healthy.train()
    assert healthy.watch.runaway.warnings == {}
    assert "warning:" not in capsys.readouterr().err
    monkeypatch.setattr(runaway, "MAX_MARGIN", 0.05)
    wild = trainer(Path(tmp_path) / "wild", pairs(12), num_train_epochs=5, learning_rate=3e-3)
    wild.train()
    assert list(wild.watch.runaway.warnings) == ["reward margin"]
    assert capsys.readouterr().err.count("warning: step ") == 1
