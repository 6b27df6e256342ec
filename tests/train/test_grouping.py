"""Pairs of one prompt on one prompt: the order, the tree, and a step that is the same as without."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_models import processor, random_pair
from tests.training import Gradients, config, flat_weights, logged, relative, trainer
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.errors import RecordError
from vlmpo.train.batching import Collator, lay_out
from vlmpo.train.sampler import PairBatchSampler, bring_prompts_together, prompt_keys, shuffle

WORDS = ("red", "blue circle", "two", "the picture", "green square")


def one_prompt(seed: int, count: int) -> list:
    """Pairs on one prompt and image; the chosen response of each is the rejected one of the next."""
    first = random_pair(seed)
    texts = [f"{WORDS[i % 5]} {i // 5}" for i in range(count + 1)]
    return [replace(first, chosen=texts[i], rejected=texts[i + 1], origin=f"memory:{seed}.{i}") for i in range(count)]


def test_the_order_by_hand() -> None:
    labels = [b"a", b"b", b"a", b"c", b"a", b"b"]
    assert bring_prompts_together([3, 0, 1, 2, 5, 4], labels, 2) == [3, 0, 2, 1, 5, 4]
    assert bring_prompts_together([3, 0, 1, 2, 5, 4], labels, 3) == [3, 0, 2, 4, 1, 5]
    assert bring_prompts_together([3, 0, 1, 2, 5, 4], labels, 1) == [3, 0, 1, 2, 5, 4]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 9))
def test_every_pair_comes_once_and_groups_are_as_large_as_they_may(prompts: list, most: int, seed: int) -> None:
    labels = [b"%d" % prompt for prompt in prompts]
    order = bring_prompts_together(shuffle(len(labels), seed=seed, epoch=0), labels, most)
    assert sorted(order) == list(range(len(labels)))
    assert order == bring_prompts_together(shuffle(len(labels), seed=seed, epoch=0), labels, most)
    for prompt in set(prompts):
        # where groups of a prompt stand next to each other they are one run of several
        places = [at for at, index in enumerate(order) if prompts[index] == prompt]
        runs = 1 + sum(b - a > 1 for a, b in itertools.pairwise(places))
        assert runs <= -(-len(places) // most)


def test_ranks_and_steps_take_the_grouped_order_whole() -> None:
    labels = [b"%d" % (i % 3) for i in range(11)]
    expected = bring_prompts_together(shuffle(11, seed=5, epoch=0), labels, 3)
    shape = {"num_pairs": 11, "per_device": 2, "num_ranks": 2, "seed": 5}
    samplers = [PairBatchSampler(**shape, rank=rank, keys=labels, max_group=3) for rank in (0, 1)]
    batches = zip(*samplers, strict=True)
    assert [index for both in batches for batch in both for index in batch] == expected


def test_labels_tell_prompts_and_images_apart() -> None:
    pair = random_pair(0)
    same = replace(pair, chosen="another", origin="elsewhere")
    others = [
        replace(pair, prompt=(replace(pair.prompt[0], text="<image>\nother?"),)),
        replace(pair, prompt=(replace(pair.prompt[0], role="system"),)),
        replace(pair, images=random_pair(1).images),
        replace(pair, images=("a.png",)),
        replace(pair, videos=("a.png",), images=()),
    ]
    labels = prompt_keys([pair, same, *others])
    assert labels[0] == labels[1]
    assert len(set(labels)) == 1 + len(others)

    class Bad(list):
        def __getitem__(self, index):
            raise RecordError("bad_json", "x:1", "no")

    assert len(set(prompt_keys(Bad([1, 2])))) == 2


def test_a_response_of_several_pairs_is_one_branch() -> None:
    encoder = PairEncoder(processor())
    pairs = [encoder.encode(pair) for pair in one_prompt(0, 3)]
    part = lay_out(pairs, group=3)
    (row,) = part.rows
    assert row.num_responses == 4
    assert part.chosen.tolist() == [0, 1, 2]
    assert part.rejected is not None
    assert part.rejected.tolist() == [1, 2, 3]
    assert len(row.layout.spans) == 1
    assert row.vision["pixel_values"].shape == pairs[0].vision["pixel_values"].shape
    assert part.num_tokens < lay_out(pairs).num_tokens
    assert len(lay_out(pairs, group=2).rows[0].layout.spans) == 2
    assert len(lay_out(pairs, shared=False, group=3, keyed=True).rows) == len(lay_out(pairs, group=3, keyed=True).keys)


def test_only_the_same_prompt_and_image_are_grouped() -> None:
    encoder = PairEncoder(processor())
    first, second, _ = one_prompt(0, 3)
    other_image = replace(second, images=(first.images[0].rotate(180),))
    other_words = replace(second, prompt=(replace(first.prompt[0], text="<image>\nand now?"),))
    encoded = [encoder.encode(pair) for pair in (first, second, other_image, other_words, first)]
    assert [len(part) for part in Collator(None, False, group=5)(encoded).micro_batches] == [2, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["auto", "separate"])
def test_a_grouped_step_is_the_same_step(tmp_path: Path, shared: str) -> None:
    """Six pairs of two prompts, one step a time: loss, gradient and weights as without grouping; the order too."""
    data = [pair for seed in (0, 1) for pair in one_prompt(seed, 3)]
    found = []
    for name, group in (("plain", 0), ("grouped", 3), ("by two", 2)):
        gradients = Gradients()
        run = trainer(
            tmp_path / name,
            data,
            dtype=torch.float64,
            callbacks=[gradients],
            group_by_prompt=group,
            attention=shared,
            max_tiles=12,
            per_device_train_batch_size=6,
            train_sampling_strategy="sequential",
            num_train_epochs=2,
        )
        run.train()
        found.append(
            (gradients.steps, logged(tmp_path / name), flat_weights(run.model), run.all_pair_counts().to_json())
        )
    for steps, logs, weights, accounts in found[1:]:
        assert [relative(a, b) for a, b in zip(steps, found[0][0], strict=True)] == pytest.approx([0, 0], abs=1e-6)
        for line, plain in zip(logs, found[0][1], strict=True):
            for key in ("loss", "loss/nll", "loss/bco_pair", "rewards/margins", "logps/rejected", "reward_shift"):
                assert line[key] == pytest.approx(plain[key], rel=1e-6, abs=1e-9)
        assert relative(weights, found[0][2]) < 1e-6
        assert accounts == found[0][3]


@pytest.mark.slow
def test_a_shuffled_run_brings_prompts_together(tmp_path: Path) -> None:
    data = [pair for seed in range(4) for pair in one_prompt(seed, 3)]
    run = trainer(tmp_path, data, group_by_prompt=3, per_device_train_batch_size=3)
    for batch in run.get_train_dataloader():
        (part,) = batch.micro_batches
        assert len(part.rows[0].layout.spans) == 1
        assert len({origin.partition(".")[0] for origin in part.origins}) == 1
    run.train()
    assert run.all_pair_counts().used.total() == 12


def test_rows_are_bounded_by_what_a_group_takes() -> None:
    encoder = PairEncoder(processor())
    pairs = [encoder.encode(pair) for seed in (0, 1) for pair in one_prompt(seed, 3)]
    tokens = [lay_out(pairs[at : at + 3], group=3).num_tokens for at in (0, 3)]
    assert [len(part) for part in Collator(sum(tokens), True, group=3)(pairs).micro_batches] == [6]
    assert [len(part) for part in Collator(max(tokens), True, group=3)(pairs).micro_batches] == [3, 3]


def test_a_negative_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="group_by_prompt must be at least 0"):
        config(tmp_path, group_by_prompt=-1)


@pytest.mark.parametrize(
    ("most", "per_device", "told"), [(3, 1, "no two"), (3, 2, "only 2"), (3, 3, None), (0, 1, None)]
)
def test_a_micro_batch_too_small_for_a_group_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], most: int, per_device: int, told: str | None
) -> None:
    trainer(tmp_path, one_prompt(0, 3), group_by_prompt=most, per_device_train_batch_size=per_device)
    found = capsys.readouterr().err
    assert ("data.group_by_prompt" in found) == (told is not None)
    assert told is None or told in found
