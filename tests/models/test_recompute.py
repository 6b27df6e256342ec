"""Layers that are recomputed: the same gradients, fewer tensors kept the more there are, nothing computed in vain."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tiny_models import SIZE, image_tree, noise_image
from tests.tiny_models import model as made_model
from tests.training import Gradients, config, pairs, relative, trainer
from vlmpo.models.adapters import unwrap_peft
from vlmpo.models.recompute import Recomputation, layers_of, recomputation_settings, set_recomputation, spread
from vlmpo.tree.forward import install, response_logps
from vlmpo.tree.layout import build_row


def tiny_model(layers: int, **settings: Any) -> Any:
    return made_model(size=replace(SIZE, text_layers=layers), **settings)


def rows() -> list[Any]:
    return [build_row([image_tree([noise_image(60, 60, 1)], [5, 8], 1, torch.float64)])]


def read(model: Any) -> tuple[torch.Tensor, int]:
    """The gradients of all weights that train, and the bytes kept from forward to backward, views counted once."""
    kept: dict[int, int] = {}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps = response_logps(model, rows())
    logps.sum().backward()
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return torch.cat(gradients), sum(kept.values())


def policy(lora: bool, layers: int = 4) -> Any:
    model = tiny_model(dtype=torch.float64, layers=layers).train()
    install(model, shared=True)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).double() if lora else model


def test_flags_by_hand() -> None:
    assert spread(0, 4) == [False] * 4
    assert spread(1, 4) == [False, False, False, True]
    assert spread(2, 4) == [False, True, False, True]
    assert spread(3, 4) == [False, True, True, True]
    assert spread(9, 4) == [True] * 4
    assert spread(2, 0) == []


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_stay_and_what_is_kept_goes_down(lora: bool) -> None:
    model = policy(lora)
    text, vision = layers_of(model)
    assert len(text) == 4
    assert len(vision) >= 1
    plain, most = read(model)
    sizes = [most]
    for count in range(1, len(text) + 1):
        set_recomputation(model, Recomputation(text_layers=count))
        assert sum(layer.gradient_checkpointing for layer in text) == count
        assert not any(layer.gradient_checkpointing for layer in vision)
        gradients, kept = read(model)
        assert relative(gradients, plain) < 1e-12
        sizes.append(kept)
    set_recomputation(model, Recomputation(text_layers=99, vision_layers=99))
    gradients, kept = read(model)
    assert relative(gradients, plain) < 1e-12
    sizes.append(kept)
    assert sizes == sorted(set(sizes), reverse=True)
    set_recomputation(model, Recomputation())
    assert read(model)[1] == most
    assert not unwrap_peft(model).is_activation_checkpointing


def test_on_a_cpu_nothing_is_offloaded() -> None:
    model = policy(lora=False)
    plain, _ = read(model)
    set_recomputation(model, Recomputation(text_layers=2, offload=True))
    assert torch.equal(read(model)[0], plain)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_frozen_tower_takes_no_part_in_the_backward_pass(tmp_path: Path, lora: bool) -> None:
    """transformers would have its patches require a gradient, and recompute all of it for none."""
    model = tiny_model(layers=2)
    if not lora:
        model.model.vision_tower.requires_grad_(False)
    adapter = {"peft_config": LoraConfig(r=2, target_modules=r".*language_model.*q_proj")} if lora else {}
    store = {"reference_kind": "cache", "reference_cache_dir": str(tmp_path / "store")}  # no features to share
    run = trainer(tmp_path / "run", pairs(2), model=model, activation_checkpointing=True, **adapter, **store)
    calls: list[bool] = []
    run._check_rows = lambda: None
    tower = unwrap_peft(run.model).model.vision_tower
    tower.encoder.layer[0].mlp.register_forward_hook(lambda _, __, out: calls.append(out.requires_grad))
    run.train()
    assert calls
    assert not any(calls)
    assert len(calls) == (2 if lora else 1)  # under LoRA the policy is read as the reference too


# ---- the recipe's keys ----

HOW = [{"every_n_layers": 2}, {"every_n_layers": 3, "offload": True}, {"offload": True}]
KINDS = ["full", "lora", "bf16"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        pytest.param(kind, how, marks=[] if HOW.index(how) == KINDS.index(kind) else pytest.mark.long)
        for kind in KINDS
        for how in HOW
    ],
)
def test_a_run_passes_them_on(tmp_path: Path, how: dict[str, Any], kind: str) -> None:
    steps = []
    for name, on in (("plain", False), ("recomputed", True)):
        gradients = Gradients()
        settings: dict[str, Any] = {"callbacks": [gradients], "bf16": kind == "bf16"}
        settings |= {"activation_checkpointing": on, "activation_checkpointing_kwargs": how} if on else {}
        if kind == "lora":
            settings["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        run = trainer(tmp_path / name, pairs(2), model=tiny_model(layers=4), **settings)
        run.train()
        steps.append(gradients.steps[0])
    flags = [layer.gradient_checkpointing for part in layers_of(run.model) for layer in part]
    assert sum(flags) == -(-len(flags) // how.get("every_n_layers", 1))
    assert relative(steps[1], steps[0]) < 1e-6


def test_what_is_given_and_what_is_not(tmp_path: Path) -> None:
    own = {"use_reentrant": False, "preserve_rng_state": False}
    assert recomputation_settings(None, "cuda") == own
    assert recomputation_settings({"use_reentrant": True, "offload": True}, "cuda") == {
        **own,
        "use_reentrant": True,
        "offload": True,
    }
    assert recomputation_settings({"offload": True}, "cpu") == own
    assert config(tmp_path).activation_checkpointing_kwargs is None
    made = config(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layers": 2})
    assert made.activation_checkpointing_kwargs == made.gradient_checkpointing_kwargs == {**own, "every_n_layers": 2}
    with pytest.raises(ValueError, match="unknown key 'every_n_layer'; did you mean every_n_layers"):
        config(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layer": 2})
    for wrong in (0, -1, True, "2", 1.5):
        with pytest.raises(ValueError, match="every_n_layers must be a number above 0"):
            recomputation_settings({"every_n_layers": wrong}, "cuda")


# ---- nothing is computed in vain ----


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
def test_module_calls_of_a_step(tmp_path: Path, recomputed: bool) -> None:
    """Of two pairs in one row: a recomputed layer is read twice by the policy, all else once; the reference once."""
    run = trainer(
        tmp_path, pairs(2), model=tiny_model(layers=3), activation_checkpointing=recomputed, max_tokens_per_row=None
    )
    calls: Counter[str] = Counter()
    run._check_rows()

    def count(model: Any, owner: str) -> None:
        for name, module in model.named_modules():
            if name:
                module.register_forward_pre_hook(lambda *_, key=f"{owner} {name}": calls.update([key]))

    count(run.model, "policy")
    count(run.reference.model, "reference")
    run._check_rows = lambda: None
    run.train()
    layers = [layer for part in layers_of(run.model) for layer in part]
    within = [f"policy {name}." for name, module in run.model.named_modules() if module in layers]
    assert len(within) >= 4
    assert {name: times for name, times in calls.items() if name.startswith("reference") and times != 1} == {}
    twice = {name for name, times in calls.items() if times != 1}
    inside = {name for name in calls if name.startswith(tuple(within))}
    assert all(calls[name] <= 2 for name in calls)
    assert twice <= (inside if recomputed else set())
    assert bool(twice) == recomputed
    assert calls["policy lm_head"] == calls["policy model.vision_tower"] == calls["policy model.language_model"] == 1
