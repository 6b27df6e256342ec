"""What ranks read only to stay in step: it is never scored, adds exactly nothing, and is as much as the others read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.ranks import skewed_pairs
from tests.tiny_models import model as tiny_model
from tests.tiny_models import processor
from vlmpo.data.encode.encoder import PairEncoder, Unusable
from vlmpo.errors import RecipeError, RecordError, RunError
from vlmpo.train.batching import Batch, Collator, MicroBatch, lay_out, merge
from vlmpo.train.rank_sync import RankSync, StepInfo
from vlmpo.train.sharding import configure_fsdp, no_gradient_sync
from vlmpo.tree.dummies import append_dummy
from vlmpo.tree.forward import install, sum_by_response
from vlmpo.tree.layout import PromptTree, build_row

PAIRS = skewed_pairs(8)  # 0, 1, 5 have images; 2, 3, 6, 7 have none; 4 is too long


def encoder() -> PairEncoder:
    return PairEncoder(processor(), max_length=400)


def rank_sync(kind: DistributedType = DistributedType.FSDP, shared: bool = True, processes: int = 2) -> RankSync:
    accelerator = SimpleNamespace(num_processes=processes, distributed_type=kind)
    return RankSync(accelerator, encoder(), Collator(None, shared))


def micro_batch(*indices: int, shared: bool = True, bound: int | None = 100) -> Batch:
    return Collator(bound, shared)([encoder().encode(PAIRS[index]) for index in indices])


def part_of(index: int, shared: bool = True) -> MicroBatch:
    return lay_out([encoder().encode(PAIRS[index])], shared)


@pytest.fixture(scope="module")
def model() -> Any:
    made = tiny_model(dtype=torch.float64)
    install(made, shared=True)
    return made


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_an_idle_image_changes_nothing(model: Any, shared: bool) -> None:
    """Same log-probs, same gradients, and of the tower, which is run through, gradients of exactly 0."""
    step = rank_sync(shared=shared)
    results = []
    for rows in (
        part_of(2, shared).rows,
        [append_dummy(row, step.dummy_tree(True)) for row in part_of(2, shared).rows],
    ):
        model.zero_grad()
        logps = model(packed_rows=rows, share_prompts=shared)
        (logps.square().sum() / 100).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((logps.detach(), gradients, [sum(row.layout.num_tokens for row in rows)]))
    (plain, without, [few]), (idle, having, [many]) = results
    assert many > few
    assert torch.allclose(idle, plain, rtol=1e-13, atol=0)
    tower = [name for name in without if "vision_tower" in name or "projector" in name]
    assert len(tower) > 10
    for name, gradient in having.items():
        if name in tower:
            assert without[name] is None or not without[name].any()
            if "mask_token" not in name:
                assert gradient is not None
                assert not gradient.any()
        else:
            assert float((gradient - without[name]).norm()) <= 1e-13 * float(without[name].norm())


def test_the_scored_tokens_of_a_row_stay_what_they_were() -> None:
    part = lay_out([encoder().encode(PAIRS[index]) for index in (2, 3)])
    (row,) = part.rows
    longer = append_dummy(row, rank_sync().dummy_tree(True))
    assert torch.equal(longer.targets, row.targets)
    assert torch.equal(longer.logit_positions, row.logit_positions)
    assert torch.equal(longer.response_index, row.response_index)
    assert longer.num_responses == row.num_responses == 4
    assert longer.vision
    assert not row.vision
    tokens = row.input_ids.shape[1]
    assert torch.equal(longer.input_ids[:, :tokens], row.input_ids)
    assert longer.dummy_tokens == longer.input_ids.shape[1] - tokens > 0


def test_a_dummy_behind_a_row_is_the_row_built_with_it() -> None:
    pairs = [encoder().encode(PAIRS[index]) for index in (2, 3, 6)]
    dummy = rank_sync().dummy_tree(True)
    trees = [PromptTree(p.prompt_ids, (p.chosen_ids, p.rejected_ids), {}, p.token_types) for p in pairs]
    got, whole = append_dummy(build_row(trees), dummy), build_row([*trees, dummy])
    assert got.layout.spans == whole.layout.spans
    assert got.token_types.keys() == whole.token_types.keys()
    assert got.vision.keys() == whole.vision.keys()
    for name in ("input_ids", "position_ids"):
        assert torch.equal(getattr(got, name), getattr(whole, name))
    for name, types in whole.token_types.items():
        assert torch.equal(got.token_types[name], types)
    for name, tensor in whole.vision.items():
        assert torch.equal(got.vision[name], tensor)


def test_unscored_tokens_are_in_no_count() -> None:
    step = rank_sync()
    plain = [part_of(2), part_of(3)]
    work = StepInfo.merge([StepInfo.of([Batch(plain)]), StepInfo.of([micro_batch(0, 1, 5, bound=1)])])
    (level,) = step.add_dummies([Batch(plain)], work, torch.nn.Identity())
    assert [len(part.rows) for part in level.micro_batches] == [1, 1, 1]
    assert [len(part) for part in level.micro_batches] == [1, 1, 0]
    for idle, own in zip(level.micro_batches, [*plain, lay_out([])], strict=True):
        assert idle.num_tokens == own.num_tokens
    assert merge(level.micro_batches).response_lengths[:4] == merge(plain).response_lengths
    assert merge(level.micro_batches).chosen.tolist() == [0, 2]
    assert len(level) == 2
    assert level.num_chosen_tokens == Batch(plain).num_chosen_tokens


@pytest.mark.parametrize(("shared", "rows"), [(True, 1), (False, 2)])
def test_every_rank_reads_as_many_rows_with_images(shared: bool, rows: int) -> None:
    """Three parts against one against none: afterwards three each, of equally many rows, each with an image."""
    batches = [micro_batch(0, 1, 5, shared=shared, bound=1), micro_batch(2, shared=shared), Batch([lay_out([])])]
    work = StepInfo.merge([StepInfo.of([batch]) for batch in batches])
    assert work.micro_batches == (3,)
    step = rank_sync(shared=shared)
    for batch in batches:
        (level,) = step.add_dummies([batch], work, torch.nn.Identity())
        assert [len(part.rows) for part in level.micro_batches] == [rows] * 3
        assert all(row.vision for part in level.micro_batches for row in part.rows)


def test_without_any_image_no_tower_is_run() -> None:
    batches = [micro_batch(2, 3, bound=1), micro_batch(6)]
    work = StepInfo.merge([StepInfo.of([batch]) for batch in batches])
    for batch in batches:
        (level,) = rank_sync().add_dummies([batch], work, torch.nn.Identity())
        assert not any(row.vision for part in level.micro_batches for row in part.rows)
    # ZeRO-3 would take an earlier gradient for the tower's: there it always has one.
    (level,) = rank_sync(DistributedType.DEEPSPEED).add_dummies([batches[1]], work, torch.nn.Identity())
    assert all(row.vision for part in level.micro_batches for row in part.rows)


def test_a_lone_process_reads_its_own_pairs_only() -> None:
    batch = micro_batch(2, 0, bound=1)
    step = rank_sync(DistributedType.NO, processes=1)
    (level,) = step.add_dummies([batch], StepInfo.of([batch]), torch.nn.Identity())
    assert [part.rows for part in level.micro_batches] == [part.rows for part in batch.micro_batches]
    empty = Batch([lay_out([])])
    (level,) = step.add_dummies(
        [empty], StepInfo.of([empty]), torch.nn.Identity()
    )  # a backward pass needs something to go through
    assert [row.dummy_tokens == row.layout.num_tokens for part in level.micro_batches for row in part.rows] == [True]


def test_an_idle_part_has_no_loss_and_no_gradient(model: Any) -> None:
    (part,) = rank_sync().add_dummies(
        [Batch([lay_out([])])], StepInfo.of([micro_batch(0)]), torch.nn.Identity()
    )[0].micro_batches  # fmt: skip
    logps = sum_by_response(model(packed_rows=part.rows), part.rows)
    model.zero_grad()
    assert logps[part.chosen].sum().item() == 0.0
    logps[part.chosen].sum().backward()
    touched = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(touched) > 40
    assert not any(gradient.any() for gradient in touched)


def test_work_adds_up_and_errors_are_told_to_all() -> None:
    error = RecordError("over_long", "a.jsonl:4", "too long")
    other = RecordError("empty", "b.jsonl:9", "empty")
    mine = StepInfo.of([micro_batch(0, 1), micro_batch(2)])
    assert (mine.pairs, mine.images, mine.videos, mine.error) == (3, True, False, None)
    empty = StepInfo.of([Batch([lay_out([])], [Unusable(error, "a")]), micro_batch(3)], error)
    total = StepInfo.merge([mine, empty, StepInfo.of([micro_batch(6), micro_batch(7)], other)])
    assert total.pairs == 6
    assert total.chosen_tokens == sum(int(encoder().encode(PAIRS[i]).chosen_ids.numel()) for i in (0, 1, 2, 3, 6, 7))
    assert total.micro_batches == (mine.micro_batches[0], 1)
    assert total.error is error
    assert (total.records, total.failed) == (7, 0)
    with pytest.raises(RecordError, match="too long") as raised:
        rank_sync(processes=1).all_reduce([micro_batch(2)], error)
    assert raised.value.met_by == "all"


@pytest.mark.parametrize("reason", ["missing_image", "undecodable_image", "undecodable_video", "file_changed"])
def test_files_that_fail_are_counted_over_ranks_and_other_faults_are_not(reason: str) -> None:
    lost = Batch([lay_out([])], [Unusable(RecordError(reason, "a.jsonl:4", "gone"), "a")] * 2)
    long = Batch([lay_out([])], [Unusable(RecordError("over_long", "a.jsonl:5", "too long"), "a")])
    total = StepInfo.merge([StepInfo.of([lost, micro_batch(0)]), StepInfo.of([long, lost])])
    assert (total.pairs, total.records, total.failed) == (1, 6, 4)


def test_videos_under_a_sharding_wrapper_are_refused() -> None:
    batch = micro_batch(0)
    batch.micro_batches[0].rows[0].vision["pixel_values_videos"] = torch.zeros(1)
    with pytest.raises(RunError, match="videos cannot be trained on under FSDP or DeepSpeed"):
        rank_sync(processes=1).all_reduce([batch])
    assert rank_sync(DistributedType.MULTI_GPU, processes=1).all_reduce([batch]).videos


def fsdp(**plugin: Any) -> Any:
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(**plugin))
    return SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)


def test_mixed_precision_rounds_no_log_prob_and_no_sum_of_gradients() -> None:
    accelerator = fsdp(fsdp_version=2)
    plugin = accelerator.state.fsdp_plugin
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype is torch.bfloat16  # what accelerate would do
    configure_fsdp(accelerator, torch.nn.Identity(), asked_for=True)
    expected = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None)
    assert plugin.mixed_precision_policy == expected


def test_layers_to_wrap_are_those_the_model_has() -> None:
    """LLaVA names layers of CLIP's text model among its own, which it does not have."""
    made = tiny_model()
    made._no_split_modules = {*made._no_split_modules, "CLIPTextEmbeddings"}
    accelerator = fsdp(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP")
    configure_fsdp(accelerator, made, asked_for=True)
    accelerator.state.fsdp_plugin.set_auto_wrap_policy(made)  # raises for a layer it does not find
    assert accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap == ["InternVLVisionLayer", "Qwen2DecoderLayer"]
    chosen = fsdp(fsdp_version=2, transformer_cls_names_to_wrap=["Qwen2DecoderLayer"])
    configure_fsdp(chosen, made, asked_for=True)
    assert chosen.state.fsdp_plugin.transformer_cls_names_to_wrap == ["Qwen2DecoderLayer"]


def test_fsdp1_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"FSDP of version 1 is not supported; set training\.fsdp_config\.version: 2"):
        configure_fsdp(fsdp(fsdp_version=1), torch.nn.Identity(), asked_for=True)


@pytest.mark.parametrize("asked_for", [True, False])
def test_what_is_not_sharded_is_said(asked_for: bool, capsys: pytest.CaptureFixture[str]) -> None:
    alone = SimpleNamespace(distributed_type=DistributedType.NO, device=torch.device("cpu"))
    configure_fsdp(alone, torch.nn.Identity(), asked_for=asked_for)
    assert ("NOT sharded: training.fsdp has no effect on cpu" in capsys.readouterr().err) is asked_for


def test_gradients_are_not_due_before_the_last_part() -> None:
    """DeepSpeed would step the optimizer in the backward pass of every part."""
    seen = []
    state = SimpleNamespace(sync_gradients=True)
    state._set_sync_gradients = lambda value: seen.append(value) or setattr(state, "sync_gradients", value)
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, gradient_state=state)
    with no_gradient_sync(accelerator, torch.nn.Identity()):
        assert not state.sync_gradients
    assert state.sync_gradients
    assert seen == [False, True]
