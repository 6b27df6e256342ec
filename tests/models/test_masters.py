"""Float32 weights read in bfloat16: the same numbers as rounded weights give, and gradients summed in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.tiny_models import SIZE, image_tree, noise_image
from tests.tiny_models import model as tiny_model
from tests.training import relative
from tests.zoo import FAMILIES, encoded_pairs
from vlmpo.models.kernels import Kernels
from vlmpo.models.masters import HALF, Masters, can_be_masters, round_weights
from vlmpo.train.batching import lay_out
from vlmpo.train.reference import freeze
from vlmpo.tree.features import share_features
from vlmpo.tree.forward import install, response_logps
from vlmpo.tree.layout import PackedRow, build_row
from vlmpo.tree.self_check import check_rows


def with_masters(model: Any, shared: bool = True) -> Any:
    install(model, shared)
    model._vlmpo.masters = Masters(model)
    return model


def rounded(model: Any, shared: bool = True) -> Any:
    install(model, shared)
    round_weights(model)
    return model


def row(seed: int = 0, images: int = 1) -> PackedRow:
    pictures = [noise_image(56, 56, seed + number) for number in range(images)]
    return build_row([image_tree(pictures, [5, 9], seed)])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model: Any, rows: list[PackedRow]) -> None:
    with model._vlmpo.masters.kept_for_backward():
        response_logps(model, rows).sum().backward()


def test_a_read_sees_roundings_and_leaves_the_weights_alone() -> None:
    model = tiny_model()
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    values = {name: weight.detach().clone() for name, weight in weights.items()}
    masters = Masters(model)
    with masters.read():
        assert model.dtype == HALF
        for name, weight in model.named_parameters():
            assert torch.equal(weight, values[name].to(HALF))
        assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert model.dtype == torch.float32
    assert all(weight is weights[name] for name, weight in model.named_parameters())
    assert all(torch.equal(weight, values[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_reads_and_learns_as_with_rounded_weights(name: str) -> None:
    """To the bit: log-probs, and the gradients that bf16 weights would have, as float32."""
    family = FAMILIES[name]
    pair = [next(iter(encoded_pairs(name).values()))]
    batch = lay_out(pair, family.shared)
    mine, plain = with_masters(family.model(0), family.shared), rounded(family.model(0), family.shared)
    backward(mine, batch.rows[:1])
    response_logps(plain, batch.rows[:1]).sum().backward()
    assert torch.equal(response_logps(mine, batch.rows), response_logps(plain, batch.rows))
    expected = gradients(plain)
    assert gradients(mine).keys() == expected.keys()
    for key, gradient in gradients(mine).items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected[key].float()), key
    assert check_rows(mine, batch.rows if family.shared else None, lay_out(pair, False).rows, half=False) is None


@pytest.mark.parametrize("at_once", [False, True], ids=["a pass a row", "rows of one pass"])
def test_rows_are_added_up_in_float32(at_once: bool) -> None:
    """Against the sum in float64 of what each row alone gives: as exact as float32, far from sums in bfloat16."""
    rows = [row(seed) for seed in range(8)]
    model, plain = with_masters(tiny_model()), rounded(tiny_model())
    exact = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in plain.named_parameters()}
    for one in rows:
        fresh = rounded(tiny_model())
        response_logps(fresh, [one]).sum().backward()
        for name, gradient in gradients(fresh).items():
            exact[name] += gradient.double()
        response_logps(plain, [one]).sum().backward()  # bfloat16 onto bfloat16
        if not at_once:
            backward(model, [one])
    if at_once:
        backward(model, rows)

    def error(of: nn.Module) -> float:
        found = gradients(of)
        return relative(*(torch.cat([g[name].double().flatten() for name in found]) for g in (found, exact)))

    assert error(model) < 1e-6
    assert error(plain) > 1e-3


def test_tied_weights_have_one_master() -> None:
    mine, plain = (tiny_model(size=copy.copy(SIZE)) for _ in range(2))
    for model in (mine, plain):
        model.lm_head.weight = model.get_input_embeddings().weight
    with_masters(mine), rounded(plain)
    with mine._vlmpo.masters.read():
        assert mine.lm_head.weight is mine.get_input_embeddings().weight
    backward(mine, [row()])
    response_logps(plain, [row()]).sum().backward()
    assert torch.equal(mine.lm_head.weight.grad, plain.lm_head.weight.grad.float())


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_again_read_the_same(reentrant: bool) -> None:
    kept, again = with_masters(tiny_model()), with_masters(tiny_model())
    again.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        again.enable_input_require_grads()
    for model in (kept, again):
        model.train()
        backward(model, [row()])
    assert again.is_gradient_checkpointing
    assert gradients(again).keys() == gradients(kept).keys()
    for name, gradient in gradients(again).items():
        assert torch.equal(gradient, gradients(kept)[name]), name


def test_a_weight_that_moved_is_rounded_again() -> None:
    model = with_masters(tiny_model())
    weight = model.lm_head.weight

    def read() -> torch.Tensor:
        with model._vlmpo.masters.read():
            return model.lm_head.weight.detach().clone()

    first = read()
    with torch.no_grad():
        weight.add_(1.0)  # as optimizers do
    assert torch.equal(read(), weight.to(HALF))
    weight.data = weight.data + 1.0  # another memory
    assert torch.equal(read(), weight.to(HALF))
    weight.data.add_(1.0)  # nothing that autograd sees
    assert not torch.equal(read(), weight.to(HALF))
    model._vlmpo.masters.moved()
    assert torch.equal(read(), weight.to(HALF))
    assert not torch.equal(read(), first)
    model.lm_head = nn.Linear(4, 3)  # another module
    model._vlmpo.masters.moved()
    assert read().shape == (3, 4)


def test_an_error_leaves_the_weights_in_place() -> None:
    model = with_masters(tiny_model())
    weights = list(model.parameters())
    with pytest.raises(ZeroDivisionError), model._vlmpo.masters.kept_for_backward(), model._vlmpo.masters.read():
        _ = 1 / 0
    assert all(one is other for one, other in zip(model.parameters(), weights, strict=True))


def test_a_read_without_gradient_disturbs_no_backward_pass() -> None:
    """A reference that is the policy itself, read in between."""
    model, plain = with_masters(tiny_model()), with_masters(tiny_model())
    backward(plain, [row()])
    with model._vlmpo.masters.kept_for_backward():
        logps = response_logps(model, [row()])
        with torch.no_grad():
            response_logps(model, [row(1)])
        assert model.dtype == HALF
        logps.sum().backward()
    assert model.dtype == torch.float32
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, gradients(plain)[name])


def test_what_does_not_train_has_no_gradient() -> None:
    model = with_masters(tiny_model())
    model.model.vision_tower.requires_grad_(False)
    backward(model, [row()])
    assert all((p.grad is None) == ("vision_tower" in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["mixtral-text", "qwen3-moe-text"])
def test_adapters_of_experts_read_and_learn_as_with_rounded_weights(name: str) -> None:
    """PEFT puts a parametrisation in the place of such a weight in each pass, and the weight back after it."""
    models = []
    for prepare in (with_masters, rounded):
        torch.manual_seed(0)
        settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(FAMILIES[name].model(0), settings, autocast_adapter_dtype=False)
        prepare(adapted.get_base_model())
        models.append(adapted)
    mine, plain = models
    places = {key: id(p) for key, p in mine.named_parameters()}
    rows = lay_out([next(iter(encoded_pairs(name).values()))], True).rows
    for _ in range(2):
        backward(mine.get_base_model(), rows)
        response_logps(plain, rows).sum().backward()
    assert {key: id(p) for key, p in mine.named_parameters()} == places
    assert torch.equal(response_logps(mine, rows), response_logps(plain, rows))
    ours, theirs = gradients(mine), gradients(plain)
    assert ours.keys() == theirs.keys()
    assert any("experts" in key for key in ours)
    assert all(relative(ours[key], theirs[key].float()) < 1e-2 for key in ours if theirs[key].any())


def test_a_layers_gradients_do_not_wait_for_the_end_of_the_backward_pass() -> None:
    """Those of the last layer are in float32 before the first layer's backward begins."""
    model = with_masters(tiny_model())
    layers, done = model.get_decoder().layers, []
    layers[0].register_full_backward_hook(lambda *_: done.append("first layer"))
    weight = layers[-1].mlp.up_proj.weight
    weight.register_post_accumulate_grad_hook(lambda _: done.append("last layer's weight"))
    backward(model, [row(images=0)])
    assert done == ["last layer's weight", "first layer"]


def test_a_copy_has_masters_of_its_own() -> None:
    model = with_masters(tiny_model())
    response_logps(model, [row()])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    with other._vlmpo.masters.read():
        assert not other.lm_head.weight.any()
    with model._vlmpo.masters.read():
        assert model.lm_head.weight.any()


def test_a_rounded_reference_reads_the_same_and_shares_a_frozen_tower() -> None:
    model = with_masters(tiny_model())
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    reference = freeze(copy.deepcopy(model), True, Kernels())
    assert not share_features(model, reference)  # one in bfloat16, one in float32
    round_weights(reference)
    with torch.no_grad():
        assert torch.equal(response_logps(model, [row()]), response_logps(reference, [row()]))
    assert share_features(model, reference)
    with torch.no_grad():
        reference.model.vision_tower.embeddings.cls_token.add_(1.0)
    assert not share_features(model, reference)


def test_generation_reads_the_same() -> None:
    mine, plain = with_masters(tiny_model()), rounded(tiny_model())
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(mine(input_ids=ids).logits, plain(input_ids=ids).logits)
    made = [model.generate(input_ids=ids, max_new_tokens=8, do_sample=False) for model in (mine, plain)]
    assert torch.equal(*made)


def test_only_whole_float32_models_have_masters() -> None:
    assert can_be_masters(tiny_model())
    mixed = tiny_model()
    mixed.lm_head.to(HALF)
    assert not can_be_masters(mixed)
