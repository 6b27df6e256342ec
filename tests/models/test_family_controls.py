"""Negative controls: what is broken on purpose shows, in the log-probs and in the start-up check."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import random_pair
from tests.training import config
from tests.tree.test_families import plain_logps
from tests.zoo import FAMILIES, encoded_pairs
from tests.zoo.text import build
from vlmpo import MPOTrainer
from vlmpo.errors import ModelError
from vlmpo.models import families
from vlmpo.models.families import Family, logit_scale_and_softcap
from vlmpo.train.batching import lay_out
from vlmpo.tree import attention, layout, positions
from vlmpo.tree import forward as logprobs
from vlmpo.tree.attention import ATTENTION_NAME
from vlmpo.tree.chunked_logprobs import LogitTransform
from vlmpo.tree.forward import install, token_logps
from vlmpo.tree.layout import PackedRow, RowLayout, TreeSpan
from vlmpo.tree.self_check import check_rows

SAMPLED = ["internvl-qwen2", "qwen2.5-vl", "llava-1.5"]


def sees_its_sibling(row: PackedRow) -> PackedRow:
    """Both responses are one to the attention: the second reads the first."""
    spans = tuple(TreeSpan(s.start, s.prompt, (sum(s.responses),)) for s in row.layout.spans)
    broken = RowLayout(spans)
    broken.positions = row.layout.positions
    return dataclasses.replace(row, layout=broken)


def goes_on_after_the_sibling(row: PackedRow) -> PackedRow:
    """The second response stands behind the first instead of beside it."""
    changed = row.position_ids.clone()
    counted = None if row.layout.positions is None else row.layout.positions.clone()
    for span in row.layout.spans:
        first, *others = span.responses
        at = span.start + span.prompt + first
        changed[0, at : at + sum(others)] += first
        if counted is not None:
            counted[..., at : at + sum(others)] += first
    broken = RowLayout(row.layout.spans)
    broken.positions = counted
    return dataclasses.replace(row, position_ids=changed, layout=broken)


def one_dimension(row: PackedRow) -> PackedRow:
    broken = RowLayout(row.layout.spans)
    broken.positions = row.position_ids.expand(3, 1, -1)
    return dataclasses.replace(row, layout=broken)


FAULTS: list[tuple[str, Callable[[PackedRow], PackedRow]]] = [
    *((name, fault) for name in SAMPLED for fault in (sees_its_sibling, goes_on_after_the_sibling)),
    *((name, one_dimension) for name in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe")),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_layout_shows(name: str, fault: Callable[[PackedRow], PackedRow]) -> None:
    model = FAMILIES[name].model(0)
    install(model, shared=True)
    pair = encoded_pairs(name)["one image"]
    row, separate = lay_out([pair]).rows[0], lay_out([pair], shared=False).rows
    positions.positions_of(model, row)  # counted, for the faults to change
    expected = plain_logps(FAMILIES[name].model(0), name, ["one image"])
    with torch.no_grad():
        sound, broken = model(packed_rows=[row]), model(packed_rows=[fault(row)])
    first = pair.chosen_ids.numel()
    assert (sound - expected).abs().max() < 1e-5
    assert (broken - expected)[first:].abs().max() > 1e-3
    if fault is not one_dimension:
        assert (broken - expected)[:first].abs().max() < 1e-5  # the first response is not touched
    assert check_rows(model, [row], separate, half=False) is None
    assert (check_rows(model, [fault(row)], separate, half=False) or 0.0) > 1e-3


def test_finite_weights_that_overflow_are_not_blamed_on_the_family() -> None:
    model = FAMILIES["internvl-qwen2"].model(0)
    install(model, shared=True)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(3e38)
    pair = encoded_pairs("internvl-qwen2")["one image"]
    with pytest.raises(ModelError, match="its own forward gives log-probabilities that are not finite") as told:
        check_rows(model, None, lay_out([pair], shared=False).rows, half=False)
    assert "family" not in str(told.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_a_run_with_broken_rows_falls_back_with_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Also in bfloat16 autocast, whose rounding the check allows for."""
    monkeypatch.setattr(layout, "RowLayout", _one_response)
    run = MPOTrainer(
        model=FAMILIES[name].model(0),
        args=config(tmp_path, max_steps=1, bf16=True),
        train_dataset=[random_pair(1), random_pair(4)],
        processing_class=FAMILIES[name].processor(),
    )
    assert run.shared
    run.train()
    assert not run.shared
    told = [line for line in capsys.readouterr().err.splitlines() if "NOT sharing the prompt" in line]
    assert len(told) == 1
    assert "memory:1 shared and separate rows differ by" in told[0]


def _one_response(spans: tuple[TreeSpan, ...]) -> RowLayout:
    return RowLayout(tuple(TreeSpan(s.start, s.prompt, (sum(s.responses),)) for s in spans))


def test_gemma_needs_its_image_blocks_and_its_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without either, the parity of test_families would break."""
    expected = plain_logps(FAMILIES["gemma3"].model(0), "gemma3", ["two images"]).detach()
    model = FAMILIES["gemma3"].model(0)
    install(model, shared=True)

    def off() -> float:
        with torch.no_grad():
            got = model(packed_rows=lay_out([encoded_pairs("gemma3")["two images"]]).rows)
        return float((got - expected).abs().max())

    assert off() < 1e-5
    with monkeypatch.context() as patch:
        patch.setattr(positions, "family_of", lambda config: Family(config.model_type))
        assert off() > 1e-3
    with monkeypatch.context() as patch:
        plain = attention.in_segments
        patch.setattr(attention, "in_segments", lambda *arguments: plain(*arguments[:-1], None))  # no window
        assert off() > 1e-3
    assert off() < 1e-5


@pytest.mark.parametrize("name", ["granite-text", "cohere-text", "gemma3-text", "gemma2-text"])
def test_a_head_that_is_not_known_stops_the_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Were the family's scale or soft cap not applied, every log-prob would be wrong, shared and separate alike."""
    monkeypatch.setattr(logprobs, "logit_scale_and_softcap", lambda config: (1.0, None))
    run = MPOTrainer(
        model=FAMILIES[name].model(0),
        args=config(tmp_path, max_steps=1),
        train_dataset=[random_pair(1, images=0)],
        processing_class=FAMILIES[name].processor(),
    )
    with pytest.raises(ModelError, match=f"{name.removesuffix('-text')}.*differ from the model's own by") as told:
        run.train()
    assert "ForCausalLM" in str(told.value)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("gemma3_text", {"final_logit_softcapping": 2.0}),
        ("granite", {"logits_scaling": 3.0}),
        ("granitemoe", {"logits_scaling": 3.0, "num_local_experts": 2, "num_experts_per_tok": 1}),
        ("granitemoeshared", {"logits_scaling": 3.0, "num_local_experts": 2, "num_experts_per_tok": 1}),
        ("cohere", {"logit_scale": 0.3}),
        ("cohere2", {"logit_scale": 0.3, "layer_types": ["full_attention", "full_attention"]}),
    ],
)
def test_every_head_on_the_list(kind: str, changes: dict[str, Any]) -> None:
    model = build(0, kind, **changes)
    assert logit_scale_and_softcap(model.config) != (1.0, None)
    install(model, shared=False)
    rows = lay_out([encoded_pairs("qwen2-text")["text only"]], shared=False).rows
    assert check_rows(model, None, rows, half=False) is None


def test_the_heads_on_the_list_are_all_tested() -> None:
    listed = {row.model_type for row in families.FAMILIES.values() if row.logits}
    (marks,) = [mark for mark in test_every_head_on_the_list.pytestmark if mark.name == "parametrize"]
    assert {kind for kind, _ in marks.args[1]} == listed


@pytest.mark.slow
def test_a_family_off_the_list_is_told_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = MPOTrainer(
        model=FAMILIES["gemma2-text"].model(0),
        args=config(tmp_path, max_steps=1),
        train_dataset=[random_pair(1, images=0)],
        processing_class=FAMILIES["gemma2-text"].processor(),
    )
    run.train()
    told = [line for line in capsys.readouterr().err.splitlines() if "NOT sharing the prompt" in line]
    assert len(told) == 1
    assert "family 'gemma2' is not on the list" in told[0]


@pytest.mark.parametrize("map_", [LogitTransform(0.3), LogitTransform(softcap=2.0), LogitTransform(1.7, 5.0)])
def test_mapped_logits_by_autograd_in_float64(map_: LogitTransform) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(5, 32).double()
    targets = torch.tensor([0, 31, 4, 4, 0, 9, 1])
    logits = map_.scale * head(hidden)
    if map_.softcap is not None:
        logits = map_.softcap * torch.tanh(logits / map_.softcap)
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    inputs = (hidden, head.weight, head.bias)
    weights = torch.randn(7, dtype=torch.float64)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)

    class Other(torch.nn.Linear):
        """Takes the path of heads that are no plain Linear."""

    other = Other(5, 32).double()
    other.load_state_dict(head.state_dict())
    for one, chunk in ((head, 64), (head, 10**9), (other, 64)):
        got = token_logps(hidden, one, targets, chunk_elements=chunk, logit_transform=map_)
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
        mine = torch.autograd.grad((got * weights).sum(), (hidden, one.weight, one.bias))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


VISION = [name for name, family in FAMILIES.items() if family.images and family.shared]


@pytest.mark.parametrize("name", VISION)
def test_the_attention_never_reads_an_image(name: str) -> None:
    """Set for the whole model it reaches the vision tower too: refused where the layout does, plain elsewhere."""
    model = FAMILIES[name].model(0)
    install(model, shared=True)
    model.set_attn_implementation(ATTENTION_NAME)
    rows = lay_out([encoded_pairs(name)["two images"]]).rows
    if name.startswith(("qwen2", "qwen3-")):  # hands every keyword on to its vision layers
        with pytest.raises(ModelError, match="VisionAttention is not a causal text layer"):
            model(packed_rows=rows)
        return
    with torch.no_grad():
        got = model(packed_rows=rows)
    torch.testing.assert_close(
        got, plain_logps(FAMILIES[name].model(0), name, ["two images"]).detach(), atol=1e-5, rtol=0
    )


def test_windows_by_hand() -> None:
    """Prompt of three, responses of two and two, a window of three tokens: who sees whom."""
    rows = RowLayout((TreeSpan(0, 3, (2, 2)),))
    here = torch.device("cpu")
    assert rows.prompt_mask(rows.spans[0], None, here) is None
    assert rows.prompt_mask(rows.spans[0], 5, here) is None
    prompt: Any = rows.prompt_mask(rows.spans[0], 3, here)
    assert prompt.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    # the second response's keys are the prompt's last two tokens and its own
    assert rows.response_mask(2, 4, 3, here).int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert rows.response_mask(2, 4, None, here).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_image_blocks_by_hand() -> None:
    """Text, an image of two tokens, text, an image of two, text: an image sees itself whole and nothing ahead."""
    rows = RowLayout((TreeSpan(0, 6, (1, 1)),))
    rows.blocks = torch.tensor([-1, 0, 0, -1, 1, 1, -1, -1])
    here = torch.device("cpu")
    seen: Any = rows.prompt_mask(rows.spans[0], None, here)
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1],
    ]
    windowed: Any = rows.prompt_mask(rows.spans[0], 2, here)
    assert windowed[4].int().tolist() == [0, 0, 0, 1, 1, 1, 0]
    assert windowed[5].int().tolist() == [0, 0, 0, 0, 1, 1, 0]
