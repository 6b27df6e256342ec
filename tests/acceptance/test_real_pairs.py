"""Long acceptance runs on real pairs (``make accept``; about fifteen minutes on two cores)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.visonlyqa import DATA, run

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not DATA.exists(), reason="the visonlyqa pairs are not beside this checkout"),
]
LENGTHS = {"visonlyqa_reasoning": 1047, "visonlyqa_no_reasoning": 570}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("visonlyqa")
    return [run(DATA, folder / str(seed), seed) for seed in (0, 1, 2)]


def test_every_pair_is_accounted_for(results: list[dict[str, Any]]) -> None:
    for result in results:
        for source, counts in result["sets"].items():
            assert counts["read"] == LENGTHS[source]
            assert counts["not_reached"] == 0
            assert counts["used"] + counts["held_out"] + sum(counts["dropped"].values()) == counts["read"]
            assert counts["used"] > 0.85 * counts["read"]


def test_the_loss_falls(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["loss_last_tenth"] < result["loss_first_tenth"] - 0.1


def test_reward_accuracy_on_reasoning_pairs(results: list[dict[str, Any]]) -> None:
    """A model without knowledge still learns what a chosen answer with reasoning looks like."""
    found = [result["last_quarter"]["visonlyqa_reasoning"]["accuracy"] for result in results]
    assert sum(found) / len(found) > 0.53, found


def test_both_subsets_are_reported_with_intervals(results: list[dict[str, Any]]) -> None:
    for result in results:
        for part in ("last_quarter", "held_out"):
            assert result[part].keys() == LENGTHS.keys()
            for figures in result[part].values():
                assert 0.0 < figures["low"] < figures["accuracy"] < figures["high"] < 1.0


def test_the_saved_model_generates(results: list[dict[str, Any]]) -> None:
    assert all(result["generated"] >= 1 for result in results)


def test_sixty_four_pairs_are_learned_to_the_end(tmp_path: Path) -> None:
    """The pairs are learned by heart: accuracy 1, a growing margin, a sigmoid loss near 0."""
    lines = (DATA / "annotations" / "reasoning.jsonl").read_text().splitlines()[:1024:16]
    assert len(lines) == 64
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(lines) + "\n")
    result = run(
        DATA,
        tmp_path / "run",
        0,
        data={"train": [{"path": str(pairs), "image_root": str(DATA / "images")}], "hold_out": 0.0},
        training={"num_train_epochs": 40},
    )
    assert result["sets"]["pairs"]["used"] == 64
    folder = tmp_path / "run" / "run"
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "loss" in step]
    epochs = [steps[i : i + 8] for i in range(0, len(steps), 8)]  # 8 steps of 8 pairs

    def mean(epoch: list[dict[str, float]], key: str) -> float:
        return sum(step[key] for step in epoch) / len(epoch)

    print([round(mean(epoch, "rewards/margins"), 2) for epoch in epochs])
    assert len(epochs) == 40
    assert mean(epochs[-1], "rewards/accuracies") == 1.0
    assert mean(epochs[-1], "loss/sigmoid") < 0.01
    margins = [mean(epoch, "rewards/margins") for epoch in epochs]
    assert margins[0] < margins[10] < margins[20] < margins[39]
