"""Shared rows against separate forwards, and the chunked head against the plain one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.tiny_models import image_tree, model, noise_image, processor, tokenizer
from vlmpo.errors import ModelError
from vlmpo.models.families import support_for
from vlmpo.tree import chunked_logprobs as projection
from vlmpo.tree.attention import ATTENTION_NAME, shared_prompt_attention
from vlmpo.tree.chunked_logprobs import LogitTransform, linear_token_logps
from vlmpo.tree.forward import install, sum_by_response, token_logps
from vlmpo.tree.layout import PackedRow, PromptTree, RowLayout, TreeSpan, build_row


def one_image(seed: int) -> list:
    return [noise_image(60, 60, seed)]


def two_images(seed: int) -> list:
    return [noise_image(60, 60, seed), noise_image(120, 56, seed + 1)]


def cases() -> dict[str, list[PromptTree]]:
    same = image_tree(one_image(5), [6], 5)
    return {
        "one pair": [image_tree(one_image(0), [7, 12], 0)],
        "several pairs a row": [image_tree(one_image(i), [3 + i, 9 - i], i) for i in range(4)],
        "several images": [image_tree(two_images(1), [5, 8], 1), image_tree(two_images(3), [2, 4], 3)],
        "text only": [image_tree([], [6, 4], 2), image_tree([], [1, 9], 3)],
        "text and images": [image_tree([], [6, 4], 2), image_tree(one_image(7), [4, 4], 7)],
        "responses of one token": [image_tree(one_image(4), [1, 1], 4)],
        "identical responses": [PromptTree(same.prompt_ids, same.responses * 2, same.vision)],
        "six responses": [image_tree(one_image(6), [3, 1, 8, 2, 5, 4], 6)],
    }


def separate_logps(plain: torch.nn.Module, trees: list[PromptTree]) -> torch.Tensor:
    """One forward a response through the model's own head and attention: no code of ours."""
    parts = []
    for tree in trees:
        for response in tree.responses:
            ids = torch.cat([tree.prompt_ids, response])[None]
            logps = plain(input_ids=ids, **tree.vision).logits[0].log_softmax(-1)
            at = tree.prompt_ids.numel() - 1
            parts.append(logps[at:-1].gather(1, response[:, None]).squeeze(1))
    return torch.cat(parts)


def flat_gradient(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", list(cases()))
@pytest.mark.parametrize("layout", ["one row", "a row a tree", "separate rows"])
def test_rows_equal_separate_forwards(name: str, layout: str) -> None:
    """Log-probs to 1e-5 a token, gradients to 1e-5 relative, float32 (math kernels differ, nothing else)."""
    trees = cases()[name]
    plain, ours = model(), model()
    install(ours, shared=layout != "separate rows")
    if layout == "one row":
        rows = [build_row(trees)]
    elif layout == "a row a tree":
        rows = [build_row([tree]) for tree in trees]
    else:
        rows = [build_row([part]) for tree in trees for part in tree.separate()]
    got, expected = ours(packed_rows=rows), separate_logps(plain, trees)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    mine, theirs = flat_gradient(ours), flat_gradient(plain)
    assert theirs.norm() > 1e-2
    assert (mine - theirs).norm() / theirs.norm() < 1e-5
    # vision weights alone as well, so that a large text gradient hides nothing
    if any(tree.vision for tree in trees):
        mine, theirs = flat_gradient(ours.model.vision_tower), flat_gradient(plain.model.vision_tower)
        assert (mine - theirs).norm() / theirs.norm() < 1e-5


def test_branches_that_differ_in_their_first_token_only() -> None:
    """Peers that shift labels twice lose the first response token: both responses would then be equal."""
    tree = image_tree(one_image(0), [4], 0)
    other = tree.responses[0].clone()
    other[0] = (other[0] + 1) % 300
    ours, plain = model(), model()
    install(ours, shared=True)
    both = PromptTree(tree.prompt_ids, (tree.responses[0], other), tree.vision)
    rows = [build_row([both])]
    sums = sum_by_response(ours(packed_rows=rows), rows)
    expected = separate_logps(plain, [both]).double().view(2, 4).sum(1)
    torch.testing.assert_close(sums, expected, atol=2e-5, rtol=0)
    assert abs(sums[0] - sums[1]) > 1e-2


def test_token_zero_is_a_token() -> None:
    tree = image_tree(one_image(0), [3], 0)
    with_zero = PromptTree(tree.prompt_ids, (torch.tensor([0, 7, 0]), torch.tensor([7])), tree.vision)
    ours, plain = model(), model()
    install(ours, shared=True)
    got = ours(packed_rows=[build_row([with_zero])])
    torch.testing.assert_close(got, separate_logps(plain, [with_zero]), atol=1e-5, rtol=0)


def broken(row: PackedRow, layout: RowLayout | None = None, positions: torch.Tensor | None = None) -> PackedRow:
    fields = {name: getattr(row, name) for name in PackedRow.__dataclass_fields__}
    if layout is not None:
        fields["layout"] = layout
    if positions is not None:
        fields["position_ids"] = positions
    return PackedRow(**fields)


@pytest.mark.parametrize("fault", ["sees its sibling", "positions go on after the sibling"])
def test_a_broken_layout_shows(fault: str) -> None:
    """Negative control: the parity above would fail if a response saw its sibling or took later positions."""
    trees = [image_tree(one_image(0), [7, 12], 0)]
    row = build_row(trees)
    span = row.layout.spans[0]
    if fault == "sees its sibling":
        row = broken(row, layout=RowLayout((TreeSpan(0, span.prompt, (7 + 12,)),)))
    else:
        row = broken(row, positions=torch.arange(row.layout.num_tokens)[None])
    ours, plain = model(), model()
    install(ours, shared=True)
    difference = (ours(packed_rows=[row]) - separate_logps(plain, trees)).abs()
    assert difference[:7].max() < 1e-5  # the first response is not touched
    assert difference[7:].max() > 1e-3


@pytest.mark.parametrize("chunk", [1, 64, 10**9])
def test_chunked_head_equals_the_plain_one_in_float64(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(5, 32, bias=True).double()
    targets = torch.tensor([0, 31, 4, 4, 0, 9, 1])
    got = token_logps(hidden, head, targets, chunk_elements=chunk)
    expected = head(hidden).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    weights = torch.randn(7, dtype=torch.float64)
    inputs = (hidden, head.weight, head.bias)
    mine = torch.autograd.grad((got * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kept", [0, 3 * 7 * 8 * 8, 10**9])
def test_logits_kept_or_computed_again_give_the_same_gradient(kept: int) -> None:
    """7 tokens in float64 by blocks of 8 of 30 entries: none, three or all four blocks kept; and backward twice."""
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(30, dtype=torch.float64, requires_grad=True)
    targets, inputs = torch.tensor([0, 29, 7, 8, 15, 16, 24]), (hidden, weight, bias)  # at the edges of blocks
    cap = LogitTransform(scale=0.5, softcap=2.0)
    got = linear_token_logps(hidden, weight, bias, targets, 7 * 8, cap, kept_bytes=kept)
    logits = 2.0 * (0.5 * (hidden @ weight.t() + bias) / 2.0).tanh()
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    weights = torch.randn(7, dtype=torch.float64)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for _ in range(2):
        mine = torch.autograd.grad((got * weights).sum(), inputs, retain_graph=True)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_kept_logits_stay_within_their_budget() -> None:
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(30, 5)
    held: list[int] = []

    def note(saved: torch.Tensor) -> torch.Tensor:
        if saved.shape[-2:] == (7, 8):  # blocks of logits, in one piece
            held.append(saved.nbytes)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        linear_token_logps(hidden, weight, None, torch.zeros(7, dtype=torch.long), 7 * 8, kept_bytes=2 * 224 + 1)
        linear_token_logps(hidden.detach(), weight, None, torch.zeros(7, dtype=torch.long), 7 * 8)
    assert held == [2 * 224]


@pytest.mark.parametrize(
    ("elements", "vocabulary", "widths"),
    [
        (5 * 100, 200, [64, 64, 64, 8]),  # of 100 columns a multiple of 64
        (5 * 64, 200, [64, 64, 64, 8]),
        (5 * 63, 130, [63, 63, 4]),  # too few to choose
        (5 * 300, 200, [200]),  # all of them, and they are kept
        (3, 4, [1, 1, 1, 1]),
    ],
)
def test_blocks_are_of_widths_that_tensor_cores_like(
    elements: int, vocabulary: int, widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(vocabulary, 4)
    plain, seen = projection._project, []

    def project(states: torch.Tensor, block: torch.Tensor, *further: Any) -> torch.Tensor:
        seen.append(block.shape[0])
        return plain(states, block, *further)

    monkeypatch.setattr(projection, "_project", project)
    got = linear_token_logps(hidden, weight, None, torch.zeros(5, dtype=torch.long), elements)
    assert seen == widths
    got.sum().backward()
    assert seen[len(widths) :] == [width for width in widths if width < widths[0]]  # whole blocks were kept


def test_a_sure_token_keeps_its_small_gradient_in_bfloat16() -> None:
    """softmax less one-hot is taken before rounding: 1 - p of 1e-4 would be lost where p is rounded first."""
    hidden = torch.tensor([[9.0]]).bfloat16().requires_grad_()
    weight = torch.tensor([[1.0], [0.0]]).bfloat16()
    linear_token_logps(hidden, weight, None, torch.tensor([0]), 100).sum().backward()
    expected = 1 - torch.tensor(9.0).sigmoid()  # 1.2e-4
    assert abs(hidden.grad.item() - expected) < 0.01 * expected


def test_head_in_bfloat16_sums_in_float32() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 16).bfloat16().requires_grad_()
    head = torch.nn.Linear(16, 64, bias=False).bfloat16()
    targets = torch.randint(0, 64, (300,))
    got = token_logps(hidden, head, targets, chunk_elements=64)  # one row a chunk: 300 additions
    assert got.dtype == torch.float32
    got.sum().backward()
    wide = torch.nn.Linear(16, 64, bias=False).double()
    wide.weight.data = head.weight.detach().double()
    wide(hidden.detach().double()).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    error = (head.weight.grad.double() - wide.weight.grad).norm() / wide.weight.grad.norm()
    assert error < 5e-3  # bfloat16's own rounding is 4e-3; 300 additions in bfloat16 give several times that


def test_a_head_that_is_no_plain_linear_is_called_itself() -> None:
    class Scaled(torch.nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return 3.0 * super().forward(states)

    torch.manual_seed(0)
    head, hidden = Scaled(5, 32, bias=False), torch.randn(7, 5, requires_grad=True)
    targets = torch.arange(7)
    got = token_logps(hidden, head, targets, chunk_elements=64)
    expected = (3 * hidden @ head.weight.t()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(got, expected)
    mine = torch.autograd.grad(got.sum(), (hidden, head.weight))
    theirs = torch.autograd.grad(expected.sum(), (hidden, head.weight))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_generate_is_untouched_by_the_attention() -> None:
    """Also with left padding, where our attention must take the ordinary mask."""
    ours, plain = model(), model()
    install(ours, shared=True)
    template = processor().apply_chat_template
    texts = [
        template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": t}]}], add_generation_prompt=True
        )
        for t in ("what?", "what colour is the first row in the picture?")
    ]
    batch = processor()(images=[[i] for i in two_images(0)[:1] * 2], text=texts, padding=True, return_tensors="pt")
    assert (batch.attention_mask == 0).any()
    settings = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": None}
    assert ours.generate(**batch, **settings).tolist() == plain.generate(**batch, **settings).tolist()


def test_a_copy_answers_from_its_own_weights() -> None:
    ours = model()
    install(ours, shared=True)
    rows = [build_row(cases()["one pair"])]
    before = ours(packed_rows=rows).detach()
    frozen = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1)
    assert torch.equal(frozen(packed_rows=rows), before)
    assert not torch.equal(ours(packed_rows=rows), before)


def test_the_attention_name_is_set_for_the_text_part_and_not_saved(tmp_path) -> None:
    ours = model()
    install(ours, shared=True)
    assert ours.config.text_config._attn_implementation == ATTENTION_NAME
    assert ours.config.vision_config._attn_implementation != ATTENTION_NAME
    ours.save_pretrained(tmp_path)
    assert ATTENTION_NAME not in (tmp_path / "config.json").read_text()


def test_nothing_to_read_still_hangs_on_the_weights() -> None:
    ours = model()
    install(ours, shared=True)
    nothing = ours(packed_rows=[])
    assert nothing.shape == (0,)
    nothing.sum().backward()
    assert ours.lm_head.weight.grad is not None
    assert ours.lm_head.weight.grad.abs().max() == 0


def test_attention_refuses_what_would_be_silently_wrong() -> None:
    layer = torch.nn.Module()
    states = torch.randn(1, 2, 5, 4)
    layout = RowLayout((TreeSpan(0, 3, (1, 1)),))
    with pytest.raises(ModelError, match="dropout"):
        shared_prompt_attention(layer, states, states, states, None, dropout=0.1, vlmpo_layout=layout)
    with pytest.raises(ModelError, match="uses softcap"):
        shared_prompt_attention(layer, states, states, states, None, softcap=3.0, vlmpo_layout=layout)
    with pytest.raises(ModelError, match="covers 5 tokens"):
        shared_prompt_attention(layer, states[:, :, :4], states, states, None, vlmpo_layout=layout)
    layer.is_causal = False
    with pytest.raises(ModelError, match="not a causal text layer"):
        shared_prompt_attention(layer, states, states, states, None, vlmpo_layout=layout)


def test_support_is_told_with_its_reason() -> None:
    from transformers import Gemma2Config, InternVLConfig, Qwen2Config, Qwen3_5TextConfig

    assert support_for(model().config).shared
    assert support_for(Qwen2Config()).shared
    assert not support_for(Gemma2Config()).shared  # it caps its attention scores, which SDPA cannot
    assert "gemma2" in support_for(Gemma2Config()).reason
    hybrid = InternVLConfig(text_config=Qwen3_5TextConfig().to_dict())
    assert not support_for(hybrid).shared
    assert "linear_attention" in support_for(hybrid).reason
    assert not support_for(InternVLConfig(text_config=Gemma2Config().to_dict())).shared
    assert tokenizer().convert_ids_to_tokens(0) == "!"  # what the tests above take id 0 to be
