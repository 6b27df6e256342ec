"""What training keeps for the report: margins as the loss saw them, pairs scored by token, and their texts."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.tiny_models import processor
from tests.training import logged, pairs, trainer
from vlmpo.data.records import PreferencePair
from vlmpo.report.kept import read_kept
from vlmpo.scoring import response_logps
from vlmpo.train.pair_margins import find_pairs, pieces, thumbnails


class Letters:
    """A tokenizer whose tokens are bytes; alone, a token loses the space before it."""

    def __call__(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace").removeprefix(" ")


def test_tokens_of_one_character_are_one_piece():
    ids = list("a é b".encode())
    policy = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    reference = [-1.5, -2.0, -2.0, -2.0, -5.0, -6.5]
    assert pieces(ids, policy, reference, Letters()) == [
        ("a", -1.0, -1.5),
        (" ", -2.0, -2.0),
        ("é", -7.0, -4.0),
        (" ", -5.0, -5.0),
        ("b", -6.0, -6.5),
    ]
    assert pieces([], [], [], Letters()) == []
    assert pieces([0xFF], [-1.0], None, Letters()) == [("\ufffd", -1.0, None)]


def test_pairs_are_found_by_the_data_sets_names_and_by_their_own():
    class Named(list):
        def origin(self, index: int) -> str:
            return f"train_dataset[{index}]"

    own = [PreferencePair((), (), "a", "b", origin=f"file:{n}") for n in range(4)]
    assert find_pairs(Named(own), {"train_dataset[2]", "file:3", "file:9"}) == {"train_dataset[2]": 2, "file:3": 3}
    assert find_pairs(own, {"file:1"}) == {"file:1": 1}


def test_thumbnails_are_small_and_readable(tmp_path: Path):
    image = Image.effect_noise((900, 300), 60).convert("RGB")
    pair = PreferencePair((), (image, str(tmp_path / "absent.png"), Image.new("RGB", (4, 4))), "a", "b")
    first, second = thumbnails(pair)
    with Image.open(io.BytesIO(base64.b64decode(first))) as shown:
        assert shown.size == (320, 107)
        assert shown.format == "JPEG"
    with Image.open(io.BytesIO(base64.b64decode(second))) as shown:
        assert shown.size == (4, 4)


@pytest.mark.slow
def test_a_run_keeps_the_margins_of_its_loss_and_scores_pairs_as_plain_scoring_does(tmp_path: Path):
    data = pairs(12)
    initial_logps = None
    run = trainer(tmp_path, data, num_train_epochs=2, dtype=torch.float64, loss_weights={"sigmoid": 1.0})
    initial_logps = response_logps(run.model, processor(), data)
    run.keep_margins()
    run.train()
    kept = run.margins.kept
    assert len(kept.first) == 24
    by_step = {step: [m for s, m in kept.first if s == step] for step, _ in kept.first}
    for line in logged(tmp_path):
        margins = by_step[line["step"]]
        assert sum(margins) / len(margins) == pytest.approx(line["rewards/margins"], abs=1e-9)
    run.score_kept_pairs(share=1.0)
    kept = read_kept(tmp_path)
    final_logps = response_logps(run.model, processor(), data)
    index = {pair.origin: at for at, pair in enumerate(data)}
    assert {pair.kind for pair in kept.pairs} == {"largest", "smallest"}
    for pair in kept.pairs:
        at = index.get(pair.origin)
        at = int(pair.origin.split("[")[1].rstrip("]")) if at is None else at
        for number, response in enumerate((pair.chosen, pair.rejected)):
            assert response.policy == pytest.approx(final_logps[at][number], abs=1e-6)
            assert response.reference == pytest.approx(initial_logps[at][number], abs=1e-6)
            assert sum(token[1] for token in response.tokens) == pytest.approx(response.policy, abs=1e-2)
        moved = [policy - reference for policy, reference in zip(final_logps[at], initial_logps[at], strict=True)]
        assert pair.margin == pytest.approx(0.1 * (moved[0] - moved[1]), abs=1e-6)
        assert len(pair.images) == pair.num_media
    assert_pairs_out_of_memory_are_left_out(run, [pair.origin for pair in kept.pairs])


def assert_pairs_out_of_memory_are_left_out(run: Any, origins: list[str]) -> None:
    """On all ranks: the first pair if it is out of memory here, and any that is so on another rank."""

    def full(*_: object) -> None:
        hook.remove()
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = run.model.register_forward_pre_hook(full)  # what is freed then takes its time
    run.score_kept_pairs(share=1e6)
    assert [pair.origin for pair in run.margins.kept.pairs] == origins[1:]
    run.ranks.all_gather = lambda found: [found, "CUDA out of memory"] if isinstance(found, str) else [found]
    run.score_kept_pairs(share=1e6)
    assert run.margins.kept.pairs == []


@pytest.mark.slow
def test_keeping_margins_changes_no_weight_and_a_resume_goes_on(tmp_path: Path):
    data = pairs(8)
    plain = trainer(tmp_path / "plain", data, num_train_epochs=2)
    plain.train()
    first = trainer(tmp_path / "kept", data, num_train_epochs=2, save_strategy="steps", save_steps=4)
    first.keep_margins()
    first.train()
    first.score_kept_pairs(share=1.0)
    for one, other in zip(plain.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(one, other)
    whole = read_kept(tmp_path / "kept")
    again = trainer(tmp_path / "kept", data, num_train_epochs=2)
    again.keep_margins()
    again.train(resume_from_checkpoint=str(tmp_path / "kept" / "checkpoint-4"))
    again.score_kept_pairs(share=1.0)
    resumed = read_kept(tmp_path / "kept")
    assert resumed.first == whole.first
    assert resumed.last == whole.last
    assert [pair.origin for pair in resumed.pairs] == [pair.origin for pair in whole.pairs]
