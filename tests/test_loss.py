"""The objective against numbers worked out by hand or in float64 without torch."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.paths import SHARED
from vlmpo.loss import RewardShift, check_weights, expected_start, mpo_loss
from vlmpo.settings import MPO_WEIGHTS

LN2 = math.log(2.0)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


GOLDEN = SHARED / "golden" / "mpo_loss.json"


def golden_cases() -> list:
    return json.loads(GOLDEN.read_text())["cases"] if GOLDEN.exists() else []


@pytest.mark.skipif(not GOLDEN.exists(), reason="golden values are not beside this checkout")
def test_golden_file_has_its_five_settings() -> None:
    shifts = {case["reward_shift"] for case in golden_cases()}
    assert len(golden_cases()) == 5
    assert shifts == {"previous", "running", "none"}
    assert {case["nll_reduction"] for case in golden_cases()} == {"sequence", "token"}


@pytest.mark.parametrize("case", golden_cases(), ids=lambda c: f"{c['reward_shift']}-{c['nll_reduction']}-{c['beta']}")
def test_golden_case(case: dict) -> None:
    """Every step of every case to 1e-9, as shares of its micro-batches, with delta carried along."""
    shift = RewardShift(case["reward_shift"])
    for step in case["steps"]:
        records = [record for micro in step["micro_batches"] for record in micro]
        num_pairs, num_tokens = len(records), sum(r["chosen_tokens"] for r in records)
        totals = {"loss": 0.0, "sigmoid": 0.0, "bco_pair": 0.0, "nll": 0.0}
        for micro, expected_shift in zip(step["micro_batches"], step["reward_shift_used"], strict=True):
            logps = {
                key: column(*(r[key] for r in micro))
                for key in ("policy_chosen_logp", "policy_rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
            }
            rewards = case["beta"] * torch.cat(
                [
                    logps["policy_chosen_logp"] - logps["ref_chosen_logp"],
                    logps["policy_rejected_logp"] - logps["ref_rejected_logp"],
                ]
            )
            if shift.mode == "running":
                shift.observe(rewards.mean().item(), 1)
            assert shift.value == pytest.approx(expected_shift, abs=1e-9)
            output = mpo_loss(
                logps["policy_chosen_logp"],
                logps["policy_rejected_logp"],
                logps["ref_chosen_logp"],
                logps["ref_rejected_logp"],
                column(*(r["chosen_tokens"] for r in micro)),
                weights=case["weights"],
                beta=case["beta"],
                reward_shift=shift.value,
                nll_reduction=case["nll_reduction"],
                num_pairs=num_pairs,
                num_chosen_tokens=num_tokens,
            )
            torch.testing.assert_close(torch.cat([output.chosen_rewards, output.rejected_rewards]), rewards)
            if shift.mode != "running":
                shift.observe(rewards.sum().item(), rewards.numel())
            totals["loss"] += output.loss.item()
            for name, value in output.terms.items():
                totals[name] += value.item()
        shift.step()
        for name, value in totals.items():
            if name == "loss" or name in case["weights"]:
                assert value == pytest.approx(step[name], abs=1e-9), name
        assert shift.value == pytest.approx(step["reward_shift_after"], abs=1e-9)


def test_three_terms_by_hand() -> None:
    # r_c = 0.1 * (-10 + 12) = 0.2, r_r = 0.1 * (-20 + 17) = -0.3, delta = 0.05, |y_c| = 4
    output = mpo_loss(column(-10.0), column(-20.0), column(-12.0), column(-17.0), column(4), reward_shift=0.05)
    sigmoid = -log_sigmoid(0.5)
    bco = -log_sigmoid(0.15) - log_sigmoid(0.35)
    assert output.terms["sigmoid"].item() == pytest.approx(sigmoid, abs=1e-12)
    assert output.terms["bco_pair"].item() == pytest.approx(bco, abs=1e-12)
    assert output.terms["nll"].item() == pytest.approx(2.5, abs=1e-12)
    assert output.loss.item() == pytest.approx(0.8 * sigmoid + 0.2 * bco + 2.5, abs=1e-12)
    assert output.chosen_rewards.item() == pytest.approx(0.2, abs=1e-12)
    assert output.rejected_rewards.item() == pytest.approx(-0.3, abs=1e-12)


def test_start_is_ln2_and_twice_ln2() -> None:
    logps = column(-3.0, -8.0)
    output = mpo_loss(logps, logps, logps, logps, column(2, 4))
    nll = (3.0 / 2 + 8.0 / 4) / 2
    assert output.loss.item() == pytest.approx(0.8 * LN2 + 0.2 * 2 * LN2 + nll, abs=1e-12)
    assert output.loss.item() == pytest.approx(0.8317766166719343 + nll, abs=1e-12)
    assert expected_start(MPO_WEIGHTS, nll) == pytest.approx(output.loss.item(), abs=1e-12)
    assert output.chosen_rewards.tolist() == [0.0, 0.0]


def test_label_smoothing_by_hand() -> None:
    # margin 0.5, e = 0.1: -(0.9 log s(0.5) + 0.1 log s(-0.5))
    output = mpo_loss(
        column(-10.0),
        column(-20.0),
        column(-12.0),
        column(-17.0),
        column(4),
        weights={"sigmoid": 1.0},
        label_smoothing=0.1,
    )
    assert output.loss.item() == pytest.approx(-0.9 * log_sigmoid(0.5) - 0.1 * log_sigmoid(-0.5), abs=1e-12)
    assert set(output.terms) == {"sigmoid"}


def test_nll_reductions_differ_as_they_should() -> None:
    chosen, lengths = column(-2.0, -30.0), column(1, 10)
    sequence = mpo_loss(chosen, None, None, None, lengths, weights={"nll": 1.0})
    token = mpo_loss(chosen, None, None, None, lengths, weights={"nll": 1.0}, nll_reduction="token")
    assert sequence.loss.item() == pytest.approx((2.0 + 3.0) / 2)
    assert token.loss.item() == pytest.approx(32.0 / 11)
    assert sequence.chosen_rewards is None
    assert sequence.rejected_rewards is None


def test_no_pairs_is_zero_not_nan() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    assert mpo_loss(empty, empty, empty, empty, empty).loss.item() == 0.0
    assert mpo_loss(empty, empty, empty, empty, empty, nll_reduction="token").loss.item() == 0.0


@given(
    st.lists(
        st.tuples(*(st.floats(-80, -0.01) for _ in range(4)), st.integers(1, 50)),
        min_size=2,
        max_size=8,
    ),
    st.integers(1, 7),
    st.sampled_from(["sequence", "token"]),
)
def test_shares_add_up_whatever_the_split(rows: list, cut: int, reduction: str) -> None:
    def call(part: list) -> torch.Tensor:
        columns = [column(*(row[i] for row in part)) for i in range(5)]
        return mpo_loss(
            *columns,
            reward_shift=0.3,
            nll_reduction=reduction,
            num_pairs=len(rows),
            num_chosen_tokens=sum(row[4] for row in rows),
        ).loss

    cut = min(cut, len(rows) - 1)
    assert (call(rows[:cut]) + call(rows[cut:])).item() == pytest.approx(call(rows).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"sigmod": 1.0}, "unknown loss term 'sigmod'"),
        ({"nll": -1.0}, "at least 0"),
        ({"nll": float("nan")}, "finite"),
        ({"nll": 0.0}, "nothing to train on"),
        ({}, "nothing to train on"),
    ],
)
def test_bad_weights_are_refused(weights: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_weights(weights)


def test_missing_log_probs_and_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="need the rejected response"):
        mpo_loss(column(-1.0), None, None, None, column(1))
    with pytest.raises(ValueError, match="nll_reduction"):
        mpo_loss(column(-1.0), None, None, None, column(1), weights={"nll": 1.0}, nll_reduction="mean")
    with pytest.raises(ValueError, match="label_smoothing"):
        mpo_loss(column(-1.0), None, None, None, column(1), weights={"nll": 1.0}, label_smoothing=0.5)


def test_previous_moves_once_a_step_and_weighs_by_pairs() -> None:
    shift = RewardShift("previous")
    shift.observe(6.0, 2)
    assert shift.value == 0.0
    shift.step()
    assert shift.value == 3.0
    shift.observe(0.0, 4)
    assert shift.value == 3.0
    shift.step()
    assert shift.value == 1.0  # 6 over 6 rewards, not the mean of means 1.5
    shift.step()
    assert shift.value == 1.0


def test_running_moves_at_once_and_weighs_micro_batches_alike() -> None:
    shift = RewardShift("running")
    shift.observe(6.0, 2)
    assert shift.value == 3.0
    shift.observe(0.0, 4)
    assert shift.value == 1.5
    shift.observe(0.0, 0)
    shift.step()
    assert shift.value == 1.5


def test_none_stays_zero() -> None:
    shift = RewardShift("none")
    shift.observe(6.0, 2)
    shift.step()
    assert shift.value == 0.0


@pytest.mark.parametrize("mode", ["previous", "running", "none"])
def test_reward_shift_round_trip_through_json(mode: str) -> None:
    shift, other = RewardShift(mode), RewardShift(mode)
    shift.observe(0.1 + 0.2, 3)
    shift.step()
    other.load_state_dict(json.loads(json.dumps(shift.state_dict())))
    assert other.value == shift.value
    shift.observe(1.7, 3)
    other.observe(1.7, 3)
    shift.step()
    other.step()
    assert other.value == shift.value


def test_reward_shift_refuses_other_modes() -> None:
    with pytest.raises(ValueError, match="one of previous, running, none"):
        RewardShift("prevoius")
    with pytest.raises(ValueError, match="kept in mode 'none'"):
        RewardShift("previous").load_state_dict(RewardShift("none").state_dict())
