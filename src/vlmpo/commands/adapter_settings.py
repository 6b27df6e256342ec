"""Adapter and quantisation of a recipe: ``model.lora`` and ``model.quantize``."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from vlmpo.errors import RecipeError
from vlmpo.models.adapters import is_adapter
from vlmpo.recipe import Recipe, check_keys


def check_adapter_settings(recipe: Recipe) -> None:
    """Raise RecipeError if ``model.lora`` or ``model.quantize`` cannot be used, before anything large is read."""
    model = recipe.model
    lora_config(recipe)
    if model.lora is not None and is_adapter(model.path):
        raise RecipeError(
            f"model.lora: {model.path} is an adapter already, which continues training; leave model.lora out, "
            "or merge it into a whole model first (vlmpo merge)"
        )
    if model.quantize is None:
        return
    if model.lora is None and not is_adapter(model.path):
        raise RecipeError(
            f"model.quantize: {model.quantize} weights cannot train; add an adapter (model.lora), or leave it out"
        )
    if find_spec("bitsandbytes") is None:
        raise RecipeError("model.quantize: it needs bitsandbytes, which is not installed; pip install bitsandbytes")


def quantization(recipe: Recipe) -> dict[str, Any] | None:
    """Return the arguments of ``from_pretrained`` for ``model.quantize``; None without it.

    4bit is NF4 with double quantisation (QLoRA), 8bit is LLM.int8. The multiplications run in bfloat16 if the run does,
    else in ``model.dtype``. All weights go to this rank's device: quantised ones do not move later.
    """
    if recipe.model.quantize is None:
        return None
    from transformers import BitsAndBytesConfig

    training = recipe.training
    half = training.get("bf16") or (training.get("precision") == "autocast" and not training.get("fp16"))
    compute = "bfloat16" if half else recipe.model.dtype
    if recipe.model.quantize == "4bit":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, compute),
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    on_gpu = torch.cuda.is_available() and not recipe.training.get("use_cpu")
    return {
        "quantization_config": config,
        "device_map": {"": f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu else "cpu"},
    }


def lora_config(recipe: Recipe) -> Any:
    """Return the ``peft.LoraConfig`` of ``model.lora``; None without it. What ``model.freeze`` names gets no adapter.

    By default every linear layer but the vocabulary head is adapted, the vision tower's among them.

    Raises:
        RecipeError: an unknown field, a value that LoraConfig refuses, or a part that is both frozen and trained.
    """
    if recipe.model.lora is None:
        return None
    from peft import LoraConfig

    known = [field.name for field in dataclasses.fields(LoraConfig)]
    check_keys("model.lora", recipe.model.lora, known, "peft.LoraConfig")
    fields = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **recipe.model.lora}
    if recipe.model.freeze:
        _refuse_frozen_copies(frozen=recipe.model.freeze, trained=fields.get("modules_to_save") or ())
        fields["exclude_modules"] = _excluded(fields.get("exclude_modules"), recipe.model.freeze)
    try:
        return LoraConfig(**fields)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"model.lora: {error}") from error


def _refuse_frozen_copies(frozen: Sequence[str], trained: Sequence[str]) -> None:
    for part in frozen:
        if both := [name for name in trained if re.search(rf"(^|\.){re.escape(part)}(\.|$)", name)]:
            raise RecipeError(f"model.lora.modules_to_save trains {both[0]}, model.freeze freezes {part}; take one out")


def _excluded(excluded: Any, frozen: Sequence[str]) -> str:
    """Return one pattern for what is excluded already (PEFT: a pattern, or names and their endings) or frozen."""
    parts = "|".join(re.escape(part) for part in frozen)
    patterns = [rf"(.*\.)?({parts})(\..*)?"]
    if isinstance(excluded, str):
        patterns.append(excluded)
    elif excluded:
        patterns.append(rf"(.*\.)?({'|'.join(re.escape(name) for name in excluded)})")
    return "|".join(f"(?:{pattern})" for pattern in patterns)
