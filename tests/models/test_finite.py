"""Weights that are not finite are named, whatever their dtype, and nothing else is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.tiny_models import model as tiny_model
from vlmpo.errors import ModelError
from vlmpo.models.finite import BadWeight, non_finite_weights, refuse_non_finite
from vlmpo.models.loading import load_model


def layers(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_weight_with_some_is_named_with_their_number(dtype: torch.dtype) -> None:
    model = layers(dtype)
    assert non_finite_weights(model) == []
    with torch.no_grad():
        model[0].bias[1] = math.nan
        model[1].weight[0, 2] = math.inf
        model[1].weight[1, 0] = -math.inf  # their sum is NaN, not infinite
    assert non_finite_weights(model) == [BadWeight("0.bias", 1, 3), BadWeight("1.weight", 2, 6)]
    told = r"^model x: weight 0\.bias has 1 non-finite values of 3 \(1 more weights have some\); "
    with pytest.raises(ModelError, match=told):
        refuse_non_finite(model, "model x")


@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float32, 3e38)])
def test_a_sum_that_overflows_is_no_fault_of_the_weights(dtype: torch.dtype, large: float) -> None:
    model = nn.Linear(64, 64).to(dtype)
    nn.init.constant_(model.weight, large)
    assert not model.weight.sum().isfinite()
    assert non_finite_weights(model) == []


def test_what_holds_no_floating_point_numbers_is_left_out() -> None:
    model = nn.Module()
    model.packed = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    model.nothing = nn.Parameter(torch.empty(0))
    model.later = nn.Parameter(torch.empty(3, device="meta"))
    assert non_finite_weights(model) == []
    assert non_finite_weights(nn.Identity()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_damaged_checkpoint_is_refused_when_it_is_loaded(tmp_path: Path, value: float) -> None:
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name][0, :3] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=rf"^model {tmp_path}: weight \S+down_proj\.weight has 3 non-finite values of "
    ):
        load_model(str(tmp_path))


def test_a_damaged_adapter_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tiny_model().save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base"))
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    load_model(str(tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_B" in name)
    weights[name][0, 0] = math.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"^adapter {tmp_path}/adapter: weight \S*lora_B\S* has 1 non-finite values"):
        load_model(str(tmp_path / "adapter"))
