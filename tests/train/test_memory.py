"""What rows take: measured, estimated without weights, and counted by torch's allocator; and what follows from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.memory import compare

from tests.tiny_models import SIZE
from tests.tiny_models import model as tiny_model
from tests.training import logged, pairs, trainer
from tests.zoo import FAMILIES, Family, encoded_pairs
from vlmpo.errors import RunError
from vlmpo.train import memory_choice
from vlmpo.train.batching import Collator, tree_of
from vlmpo.train.device_memory import free_bytes, pending_bytes
from vlmpo.train.lengths import count_patch_pixels
from vlmpo.train.memory import LiveBytes, Phase, RowMemory, measure_rows
from vlmpo.train.memory_choice import (
    MemoryChoice,
    Situation,
    choose_memory,
    refuse_blocks,
    spread,
)
from vlmpo.train.memory_estimate import estimate_rows, estimate_with_kernels, meta_model
from vlmpo.tree import vision_blocks
from vlmpo.tree.forward import install
from vlmpo.tree.layout import PromptTree, build_row
from vlmpo.tree.packing import SHARES, RowBound, count_patches, pack
from vlmpo.tree.vision_blocks import can_read_in_blocks, read_in_blocks, vision_tower_of

CPU, CARD = torch.device("cpu"), torch.device("cuda")
# torch's product for experts has shapes in bf16 alone; Gemma 2 caps attention scores, which no fused attention does.
LEFT_OUT = ("moe", "mixtral", "gemma2")
ESTIMATED = [family for family in FAMILIES.values() if not any(part in family.name for part in LEFT_OUT)]


# ---- figures ----


@pytest.mark.slow
def test_predictions_and_estimates_are_within_15_percent_of_the_allocator_s_count() -> None:
    figures = compare()
    assert len(figures) == 3
    for label, values in figures.items():
        assert abs(values["predicted"] - 1) < 0.15, label
        assert abs(values["estimated"] - 1) < 0.15, label
    _, kept, recomputed = (values["mib"] for values in figures.values())
    assert recomputed < 0.7 * kept


@pytest.mark.parametrize("family", ESTIMATED, ids=lambda family: family.name)
def test_every_family_is_estimated_without_weights(family: Family) -> None:
    model = family.model(0)
    tree = tree_of(max(encoded_pairs(family.name).values(), key=lambda pair: pair.prompt_ids.numel()))
    estimated = estimate_rows(
        meta_model(model.config, torch.float32, checkpointing=False), tree, recompute=False, shared=family.shared
    )
    install(model, family.shared)
    measured = measure_rows(
        lambda trees: read(model, trees, family.shared),
        tree,
        tower=vision_tower_of(model),
        meter=LiveBytes(),
        patch_pixels=count_patch_pixels(model),
    )
    size = tree.num_tokens, count_patches(tree, count_patch_pixels(model))
    for count in (1, 8):
        one, other = (memory.peak(*(count * of for of in size)) for memory in (estimated, measured))
        assert abs(one / other - 1) < 0.15


@pytest.mark.parametrize("what", ["kernels", "offload"])
def test_an_estimate_leaves_out_what_is_not_kept_on_the_device(what: str) -> None:
    """By hand: with kernels, in bf16, of a plain MLP its activation (a vision layer); of a gated one activation and
    product; of an RMS norm what comes in, in float32, and once more so beside its output. With recomputed layers whose
    inputs are on the host: the states that enter a layer.
    """
    model = tiny_model(size=replace(SIZE, text_layers=4, vision_layers=4))
    config, pixels = model.config, count_patch_pixels(model)
    tree = tree_of(encoded_pairs("internvl-qwen2")["one image"])
    tokens, patches = 64 * tree.num_tokens, 64 * count_patches(tree, pixels)
    text, vision = config.text_config, config.vision_config
    peaks = []
    for without in (False, True):
        if what == "kernels":
            bare = meta_model(config, torch.bfloat16, checkpointing=False)
        else:
            bare = meta_model(config, torch.float32, checkpointing=True, offload=without)
        if what == "kernels" and without:
            estimate_with_kernels(bare)
        memory = estimate_rows(bare, tree, recompute=False, shared=True)
        peaks.append([memory.phases[0].peak(tokens, count) for count in (0, patches)])
    if what == "kernels":
        of_token = 2 * text.intermediate_size * 2 + 2 * text.hidden_size * 4
        of_patch = vision.intermediate_size * 2
    else:
        of_token, of_patch = text.hidden_size * 4, vision.hidden_size * 4
    less = [before - after for before, after in zip(*peaks, strict=True)]
    assert less[0] == pytest.approx(tokens * text.num_hidden_layers * of_token, rel=0.3)
    assert less[1] - less[0] == pytest.approx(patches * vision.num_hidden_layers * of_patch, rel=0.3)


def read(model: Any, trees: Any, shared: bool) -> torch.Tensor:
    rows = [build_row(trees)] if shared else [build_row([alone]) for tree in trees for alone in tree.separate()]
    return model(packed_rows=rows).sum()


def test_blocks_of_tiles_take_less_and_more_tiles_hardly_more() -> None:
    """Of 40 tiles in blocks of four, the activations of four exist."""
    family = FAMILIES["internvl-qwen2"]
    model = family.model(0)
    install(model, True)
    tree = tree_of(encoded_pairs(family.name)["two images"])

    def rows_take() -> RowMemory:
        return measure_rows(
            lambda trees: read(model, trees, True),
            tree,
            tower=vision_tower_of(model),
            meter=LiveBytes(),
            patch_pixels=count_patch_pixels(model),
        )

    assert can_read_in_blocks(model)
    kept = rows_take()
    read_in_blocks(model, on=True)
    again = rows_take()
    assert again.phases[0].per_token == kept.phases[0].per_token
    assert again.phases[0].per_patch < 0.6 * kept.phases[0].per_patch


@pytest.mark.parametrize("way", ["keep", "frozen tower", "checkpointed", "every second layer", "blocks", "bf16"])
def test_longer_rows_take_what_a_few_small_ones_predict(way: str) -> None:
    """A pair has fewer tiles than a block; the gradients of the tower are there before a row is measured."""
    dtype = torch.bfloat16 if way == "bf16" else torch.float32
    model = tiny_model(size=replace(SIZE, vision_layers=8, vision_hidden=96), dtype=dtype).train()
    every = {"checkpointed": 1, "every second layer": 2}.get(way, 0)
    bare = meta_model(model.config, dtype, checkpointing=bool(every), every_n_layers=every)
    install(model, True)
    tower = vision_tower_of(model)
    assert tower is not None
    if way == "frozen tower":
        tower.requires_grad_(False)
        bare.model.vision_tower.requires_grad_(False)
    elif every:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    read_in_blocks(model, on=way == "blocks")
    pair, pixels = tree_of(encoded_pairs("internvl-qwen2")["one image"]), count_patch_pixels(model)
    pair = replace(pair, vision={name: tensor.to(dtype) for name, tensor in pair.vision.items()})
    shorter = replace(pair, responses=tuple(ids[:1] for ids in pair.responses))  # more patches a token than the pair
    memory = measure_rows(
        lambda trees: read(model, trees, True), pair, tower=tower, meter=LiveBytes(), patch_pixels=pixels
    )
    estimate = estimate_rows(bare, pair, recompute=way == "blocks", shared=True, device_type="cpu")
    for row in ([pair], [pair] * 9, [shorter] * 9):
        meter = LiveBytes()
        with meter:
            meter.start()
            read(model, row, True).backward()
        tokens, patches = sum(tree.num_tokens for tree in row), sum(count_patches(tree, pixels) for tree in row)
        assert abs(memory.peak(tokens, patches) / meter.peak() - 1) < 0.15
        assert abs(estimate.peak(tokens, patches) / meter.peak() - 1) < 0.15


def test_live_bytes_counts_what_is_alive() -> None:
    meter = LiveBytes()
    weight = torch.ones(256)  # 1024 bytes, there before
    with meter:
        meter.start()
        one = weight * 2  # 1024
        view = one.view(16, 16)  # the same storage
        assert meter.peak() == 1024
        two = one + one  # 2048
        del two
        three = one.double()  # 2048 more beside one
        assert meter.peak() == 1024 + 2048
        del one, view
        meter.mark()
        assert meter.peak() == 2048
        weight.add_(1)
        assert meter.peak() == 2048
    assert three.numel() == 256


def test_a_row_takes_the_larger_of_two_phases() -> None:
    memory = RowMemory((Phase(100, 10, 1), Phase(1000, 0, 2)), 196)
    assert memory.peak(10, 50) == 1100  # 100 + 100 + 50 = 250 before, 1000 + 100 behind
    assert memory.peak(200, 50) == 2150
    assert memory.times(2.0).peak(10, 50) == 2200
    bound = memory.bound(3000)
    assert bound.limits == ((10, 1, 2900), (0, 2, 2000))
    assert bound.cost_of(145, 0) == SHARES // 2  # half of 2900
    assert bound.cost_of(0, 1000) == SHARES  # all of 2000
    assert memory.bound(900).most == 0  # the second phase has no room: rows of single pairs


def test_rows_are_packed_by_what_trees_cost() -> None:
    def tree(tokens: int, tiles: int) -> PromptTree:
        vision = {"pixel_values": torch.zeros(tiles, 3, 2, 2)} if tiles else {}
        return PromptTree(torch.ones(tokens - 1, dtype=torch.long), (torch.ones(1, dtype=torch.long),), vision)

    bound = RowBound(SHARES, ((1, 10, 100),), patch_pixels=4)  # a patch takes as much as ten tokens
    trees = [tree(20, 3), tree(20, 3), tree(20, 8), tree(40, 0), tree(40, 0)]  # 50, 50, 100, 40, 40 of 100
    assert count_patches(trees[0], 4) == 3
    assert [bound.cost(one) for one in trees] == [500_000, 500_000, SHARES, 400_000, 400_000]
    assert pack(trees, bound.most, bound.cost) == [[2], [0, 3], [1, 4]]
    assert len(pack(trees, 100)) == 2  # by tokens
    assert RowBound.from_json(bound.to_json()) == bound


def test_a_batch_packed_again_is_what_the_collator_packs() -> None:
    pair = encoded_pairs("internvl-qwen2")
    items = [pair["one image"], pair["text only"], pair["two images"], pair["one image"]]
    whole, small = Collator(None, True, keyed=True, group=2), Collator(100, True, keyed=True, group=2)
    expected, again = small(items), small.again(whole(items))
    assert again.bound == small.bound
    assert len(again.micro_batches) == len(expected.micro_batches) > 1
    for one, other in zip(again.micro_batches, expected.micro_batches, strict=True):
        assert torch.equal(one.chosen, other.chosen)
        assert one.rejected is not None
        assert other.rejected is not None
        assert torch.equal(one.rejected, other.rejected)
        assert one.keys == other.keys
        assert one.origins == other.origins
        for row, same in zip(one.rows, other.rows, strict=True):
            assert torch.equal(row.input_ids, same.input_ids)
            assert row.vision.keys() == same.vision.keys()
            assert all(torch.equal(row.vision[name], same.vision[name]) for name in row.vision)


def test_pairs_of_one_prompt_that_were_divided_keep_their_order() -> None:
    """A loader's worker divides them under the bound that it knows, two a row: one and three, two and four."""
    pair = encoded_pairs("internvl-qwen2")["text only"]
    items = [replace(pair, chosen_ids=torch.arange(20) + at, origin=str(at)) for at in range(4)]
    cost = tree_of(items[0]).num_tokens
    divided, small = Collator(None, True, group=4), Collator(None, True, group=4)
    divided.bound, small.bound = (RowBound(cost * pairs, divide=True) for pairs in (2, 1))
    assert [part.origins for part in divided(items).micro_batches] == [["0", "2"], ["1", "3"]]
    again, expected = small.again(divided(items)), small(items)
    assert [part.origins for part in again.micro_batches] == [part.origins for part in expected.micro_batches]


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.shared], ids=lambda family: family.name)
def test_every_family_s_batches_can_be_packed_again(family: Family) -> None:
    items = list(encoded_pairs(family.name).values())
    model = family.model(0)
    install(model, True)
    small = Collator(1, True)
    again = small.again(Collator(None, True)(items))
    with torch.no_grad():
        for one, other in zip(again.micro_batches, small(items).micro_batches, strict=True):
            assert one.origins == other.origins
            assert (model(packed_rows=one.rows) - model(packed_rows=other.rows)).abs().max() < 1e-5


# ---- the choice ----


class Told:
    """A probe that tells what it was told."""

    weights = 10**9

    def __init__(self, keep: RowMemory | None, recompute: RowMemory | None = None) -> None:
        self.told = {False: keep, True: recompute}
        self.asked: list[bool] = []

    def largest(self) -> tuple[int, int]:
        return 2000, 7000

    def measure(self, recompute: bool) -> RowMemory:
        self.asked.append(recompute)
        told = self.told[recompute]
        if told is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return told


GIB = 2**30
KEEP = RowMemory((Phase(GIB, 10**6, 10**6),), 196)  # 1 GiB + 9e9 bytes a pair
BLOCKS = RowMemory((Phase(GIB, 10**6, 10**4),), 196)  # 1 GiB + 2.07e9 bytes a pair


def choose(monkeypatch: pytest.MonkeyPatch, probe: Told, free: int, **settings: Any) -> MemoryChoice:
    monkeypatch.setattr(memory_choice, "free_bytes", lambda *_: free)
    usual = {"device": CARD, "tokens": "auto", "vision": "auto", "pairs_at_once": 8, "can_recompute": True}
    situation = Situation(**{**usual, "can_measure": True, "ranks_here": 1, **settings})
    gather = settings.pop("gather", lambda value: [value])
    return choose_memory(situation, probe=probe, pending=lambda: 0, gather=gather)


def test_what_is_kept_is_kept_as_long_as_a_full_row_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Told(KEEP, BLOCKS)
    choice = choose(monkeypatch, probe, free=60 * GIB)  # four pairs, 8000 tokens, take 36e9 bytes
    assert choice.vision == "keep"
    assert probe.asked == [False]
    room = int(0.95 * 60 * GIB)
    assert choice.bound == RowBound(SHARES, ((10**6, 10**6, room - GIB),), 196)
    assert choice.line.startswith("rows of up to 13362 tokens (6 such pairs): a pair of 2000 tokens and 7000 patches")
    assert "takes 9.4 GiB of the 57.0 GiB" in choice.line


def test_the_tower_is_computed_again_if_a_full_row_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Told(KEEP, BLOCKS)
    assert choose(monkeypatch, probe, free=20 * GIB).vision == "recompute"
    assert probe.asked == [False, True]
    assert choose(monkeypatch, Told(KEEP, BLOCKS), free=20 * GIB, pairs_at_once=1).vision == "keep"
    assert choose(monkeypatch, Told(KEEP, BLOCKS), free=20 * GIB, vision="keep").vision == "keep"
    assert choose(monkeypatch, Told(KEEP, BLOCKS), free=20 * GIB, can_recompute=False).vision == "keep"
    assert choose(monkeypatch, Told(None, BLOCKS), free=20 * GIB).vision == "recompute"
    fixed = choose(monkeypatch, Told(KEEP, BLOCKS), free=20 * GIB, tokens=2000)
    assert fixed.vision == "keep"
    assert fixed.bound == RowBound(2000)


def test_not_even_one_pair_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose(monkeypatch, Told(None, None), free=2 * GIB)
    assert choice.bound == RowBound(0)
    assert "hardly fits" in choice.line


def test_ranks_take_the_smallest_room_and_the_largest_need(monkeypatch: pytest.MonkeyPatch) -> None:
    other = RowMemory((Phase(GIB, 2 * 10**6, 10**5),), 196)

    def gather(value: Any) -> list[Any]:
        return [value, (other, 30 * GIB)] if isinstance(value, tuple) else [value]

    monkeypatch.setattr(memory_choice, "free_bytes", lambda *_: 60 * GIB)
    situation = Situation(CARD, "auto", "keep", 8, True, can_measure=True, ranks_here=1)
    choice = choose_memory(situation, probe=Told(KEEP), pending=lambda: 0, gather=gather)
    assert choice.bound.limits == ((2 * 10**6, 10**6, 29 * GIB),)


def test_a_small_model_on_a_cpu_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Told(KEEP)
    choice = choose(monkeypatch, probe, free=60 * GIB, device=CPU)  # a weight of 1 GB
    assert choice.bound == RowBound(2048)
    assert probe.asked == []
    assert choice.line == ""
    bound = choose(monkeypatch, Told(KEEP), free=5 * GIB, device=CPU, can_recompute=False).bound
    assert bound.limits[-1] == (1, 0, 2048)
    assert bound.cost_of(2048, 0) == SHARES  # never more than 2048 tokens, and less if memory says so


def test_a_choice_is_taken_over_if_the_same_was_asked() -> None:
    choice = MemoryChoice(["auto", "auto"], RowBound(SHARES, ((1, 2, 3),), 196, divide=True), "recompute", 2)
    assert MemoryChoice.from_json(choice.to_json(), ["auto", "auto"]) == choice
    assert MemoryChoice.from_json(choice.to_json(), [4096, "auto"]) is None
    usual = Situation(CARD, "auto", "auto", 8, True, can_measure=True, ranks_here=1)
    assert MemoryChoice.from_json(choice.to_json(), usual.asked) == choice
    assert MemoryChoice.from_json(choice.to_json(), replace(usual, every_n_layers=2).asked) is None
    for damaged in (None, {}, {"asked": ["auto", "auto"], "bound": 1}):
        assert MemoryChoice.from_json(damaged, ["auto", "auto"]) is None


def test_a_choice_knows_which_bound_held_at_which_step() -> None:
    first = MemoryChoice([400, "auto"], RowBound(400))
    twice = first.lowered(RowBound(200), 3).lowered(RowBound(100), 3)  # both at the third step
    then = twice.lowered(RowBound(50), 7)
    assert [then.bound_at(step).most for step in range(9)] == [400, 400, 400, 100, 100, 100, 100, 50, 50]
    sooner = then.lowered(RowBound(80), 5)  # made again with less memory
    assert [sooner.bound_at(step).most for step in range(9)] == [400, 400, 400, 100, 100, 80, 80, 80, 80]
    assert sooner.out_of_memory == 4
    made = replace(sooner, trying=0)
    assert MemoryChoice.from_json(made.to_json(), [400, "auto"]) == made
    back = MemoryChoice.from_json(sooner.to_json(), [400, "auto"])  # the run ended within the fifth step
    assert back is not None
    assert [back.bound_at(step).most for step in range(9)] == [400, 400, 400, 100, 100, 100, 100, 100, 100]


@pytest.mark.slow
def test_gradients_and_states_that_are_not_there_yet() -> None:
    model = torch.nn.Linear(10, 10, bias=False)
    frozen = torch.nn.Linear(10, 10).requires_grad_(False)
    both = torch.nn.ModuleList([model, frozen])
    assert pending_bytes(both, torch.optim.SGD(model.parameters(), lr=0.1)) == 400
    assert pending_bytes(both, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)) == 400 + 400
    adam = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert pending_bytes(both, adam) == 400 + 800
    model.weight.grad = torch.zeros_like(model.weight)
    adam.step()
    assert pending_bytes(both, adam) == 400  # the states are there
    assert pending_bytes(both.to(torch.bfloat16), torch.optim.AdamW(model.parameters(), lr=0.1)) == 200 + 400


@pytest.mark.slow
def test_what_a_small_model_takes_beside_its_rows() -> None:
    model = torch.nn.Linear(3, 2, bias=False)  # 24 bytes
    assert pending_bytes(model, None) == 24
    assert pending_bytes(model, torch.optim.SGD(model.parameters())) == 24
    assert pending_bytes(model, torch.optim.SGD(model.parameters(), momentum=0.9)) == 48
    adam = torch.optim.AdamW(model.parameters())
    assert pending_bytes(model, adam) == 72
    adam.state[model.weight] = {name: torch.zeros(2, 3) for name in ("exp_avg", "exp_avg_sq")}
    assert pending_bytes(model, adam) == 24  # the states are there
    model.requires_grad_(False)
    assert pending_bytes(model, None) == 0


def test_free_memory_of_a_cpu_is_shared_by_its_ranks() -> None:
    free = free_bytes(CPU)
    assert 0 < free < 2**50
    assert abs(free_bytes(CPU, 2) * 2 / free - 1) < 0.2


def test_pairs_are_looked_at_all_over_a_data_set() -> None:
    assert list(spread(1)) == [0]
    assert list(spread(3)) == [0, 1, 2]
    assert list(spread(701)) == [0, 100, 200, 300, 400, 500, 600, 700]


def test_blocks_that_cannot_be_had_are_refused() -> None:
    refuse_blocks("auto", known=False, share_passes=True)
    refuse_blocks("recompute", known=True, share_passes=False)
    with pytest.raises(RunError, match=r"model\.vision_memory: recompute .* under FSDP"):
        refuse_blocks("recompute", known=True, share_passes=True)
    with pytest.raises(RunError, match=r"model\.vision_memory: recompute needs a vision tower"):
        refuse_blocks("recompute", known=False, share_passes=False)


# ---- a run ----


@pytest.mark.slow
def test_a_run_measures_first_and_is_then_the_run_it_would_have_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = trainer(tmp_path / "plain", pairs(6), max_tokens_per_row=1024, dtype=torch.float64)
    plain.train()
    monkeypatch.setattr(memory_choice, "_SMALL", 0.0)  # measure a tiny model too
    run = trainer(tmp_path / "run", pairs(6), dtype=torch.float64)
    run.train()
    assert [line["loss"] for line in logged(tmp_path / "run")] == [line["loss"] for line in logged(tmp_path / "plain")]
    assert run.row_memory.choice is not None
    assert len(run.row_memory.choice.bound.limits) == 3
    assert "rows of up to " in caplog.text
    assert run.settings()["chosen"]["memory"]["vision"] == "keep"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["copy", "cache"])
def test_rewards_start_at_zero_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(vision_blocks, "BLOCK_TILES", 1)
    settings: dict[str, Any] = {"reference_kind": kind, "reference_cache_dir": str(tmp_path / "cache")}
    run = trainer(tmp_path / "run", pairs(6), vision_memory="recompute", model=tiny_model(), **settings)
    run.train()
    first = logged(tmp_path / "run")[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert run.row_memory.choice is not None
    assert run.row_memory.choice.vision == "recompute"
    kept = trainer(tmp_path / "kept", pairs(6), vision_memory="keep", reference_kind="copy")
    kept.train()
    losses = [[line["loss"] for line in logged(tmp_path / name)] for name in ("run", "kept")]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4
