"""LoRA for the policy, and the reference that needs no second copy of the base model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from vlmpo import compat
from vlmpo.errors import ModelError, RecipeError
from vlmpo.log import logger
from vlmpo.models.adapters import active_adapter, adapter_places, check_init, is_adapter, split_name
from vlmpo.recipe import Recipe, check_lora_keys
from vlmpo.train.reference import is_peft, restore_requires_grad, unwrap_peft

# Inits under which a fresh LoRA adapter changes nothing: its second factor is 0, and the base stays as it is.
_STARTS_AT_BASE = (True, "gaussian")


# ---- the adapter a recipe asks for ----


def check_adapter_settings(recipe: Recipe) -> None:
    """Raise RecipeError where what ``model`` says of adapters cannot be, before anything large is read."""
    model = recipe.model
    lora_config(recipe)
    if model.lora is not None and is_adapter(model.path):
        raise RecipeError(
            f"model.lora: {model.path} is an adapter already, and goes on training; leave model.lora out, or make it a "
            "whole model first (vlmpo merge)"
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
    """What ``from_pretrained`` is told for ``model.quantize``: NF4 with double quantisation (QLoRA), or LLM.int8.

    The multiplications run in bfloat16 where the run does, else in ``model.dtype``. All weights go to this rank's
    device: quantised ones do not move later.
    """
    if recipe.model.quantize is None:
        return None
    from transformers import BitsAndBytesConfig

    compute = "bfloat16" if recipe.training.get("bf16") else recipe.model.dtype
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
    """``peft.LoraConfig`` of ``model.lora``; None without it. What ``model.freeze`` names gets no adapter.

    By default every linear layer but the vocabulary head is adapted, the vision tower's among them.

    Raises:
        RecipeError: an unknown field, a value LoraConfig refuses, or a part that is to be frozen and trained at once.
    """
    if recipe.model.lora is None:
        return None
    from peft import LoraConfig

    check_lora_keys(recipe, [field.name for field in dataclasses.fields(LoraConfig)])
    fields = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **recipe.model.lora}
    if recipe.model.freeze:
        _refuse_frozen_copies(recipe.model.freeze, fields.get("modules_to_save") or ())
        fields["exclude_modules"] = _excluded(fields.get("exclude_modules"), recipe.model.freeze)
    try:
        return LoraConfig(**fields)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"model.lora: {error}") from error


def _refuse_frozen_copies(frozen: Sequence[str], trained: Sequence[str]) -> None:
    for part in frozen:
        if both := [name for name in trained if re.search(rf"(^|\.){re.escape(part)}(\.|$)", name)]:
            raise RecipeError(f"model.lora.modules_to_save trains {both[0]}, model.freeze freezes {part}; take one out")


def _excluded(given: Any, frozen: Sequence[str]) -> str:
    """One pattern for what is excluded already (PEFT: a pattern, or names and their endings) and what is frozen."""
    parts = "|".join(re.escape(part) for part in frozen)
    patterns = [rf"(.*\.)?({parts})(\..*)?"]
    if isinstance(given, str):
        patterns.append(given)
    elif given:
        patterns.append(rf"(.*\.)?({'|'.join(re.escape(name) for name in given)})")
    return "|".join(f"(?:{pattern})" for pattern in patterns)


# ---- the adapter on the policy ----


def put_adapter_on(model: Any, peft_config: Any) -> Any:
    """``model`` under a fresh adapter, without dropout.

    Raises:
        ModelError: it carries an adapter already, or the config fits no part of it.
    """
    from peft import get_peft_model

    if is_peft(model):
        raise ModelError(
            "the model already carries an adapter; pass such a model or a peft_config (model.lora), not both"
        )
    if getattr(peft_config, "lora_dropout", 0.0):
        logger.info(f"lora_dropout {peft_config.lora_dropout} forced to 0: the rewards would be noise at the start")
        peft_config.lora_dropout = 0.0
    check_init(peft_config)
    try:
        return get_peft_model(model, peft_config)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"the adapter cannot be put on the model (model.lora): {str(error).splitlines()[0]}"
        ) from error


def check_policy_adapter(model: Any, args: Any) -> None:
    """See that the policy's adapter, where it has one, can be trained under ``args`` (TrainingArguments).

    Raises:
        ModelError: it cannot.
    """
    if not is_peft(model):
        if compat.has_transformers_adapter(model):
            raise ModelError(
                "the model's adapter was loaded by transformers; load it by peft.PeftModel.from_pretrained"
            )
        return
    config = model.peft_config[active_adapter(model)]
    if config.is_prompt_learning:
        raise ModelError(f"{config.peft_type.value} puts virtual tokens before the prompt; only LoRA and its kin train")
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise ModelError("the model's adapter is merged into its base; call unmerge_adapter() before training")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On a CPU bitsandbytes would repack its weights in evaluation into a form that gives no gradient.
            module.support_avx512bf16_for_cpu = False
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        # Re-entrant checkpointing gives gradients only to what lies behind an input that has one.
        unwrap_peft(model).enable_input_require_grads()


# ---- the reference ----


def choose_kind(kind: str, policy: Any, given: Any | None, fresh_adapter: bool) -> str:
    """What the reference is to be: ``copy``, ``adapter`` (off) or ``frozen_adapter``, as asked or as fits.

    The adapter is switched off only where it is ``fresh_adapter``, put on for this run, and starts by changing nothing.
    One that came with the policy is part of what was trained before: the reference keeps a frozen copy of it. Where
    more than a LoRA adapter trains, only a copy of the whole model stays as it is.

    Raises:
        RecipeError: ``adapter`` without an adapter, beside a reference model, or where it would not be the initial
            policy, or not stay it.
    """
    asked = kind == "adapter"
    if asked and not is_peft(policy):
        raise RecipeError("reference.kind is 'adapter', but the policy carries none; set model.lora or kind: copy")
    if asked and given is not None:
        raise RecipeError("reference.kind is 'adapter', but a reference model was given too; leave one of them out")
    if given is not None or not is_peft(policy):
        return "copy"
    config = policy.peft_config[active_adapter(policy)]
    if loose := trained_beside_adapter(policy):
        if asked:
            raise RecipeError(
                f"reference.kind is 'adapter', but weights outside the adapter train too ({', '.join(loose[:3])}): the "
                "reference would move with them; use kind: copy, or model.lora.bias: none"
            )
        return "copy"
    neutral = getattr(config, "init_lora_weights", True) in _STARTS_AT_BASE
    if asked and fresh_adapter and not neutral:
        raise RecipeError(
            "reference.kind is 'adapter', but under model.lora.init_lora_weights: "
            f"{config.init_lora_weights} the fresh adapter already changes the model; use kind: auto"
        )
    if asked or (kind == "auto" and fresh_adapter and neutral):
        return "adapter"
    return "frozen_adapter" if config.peft_type.value == "LORA" else "copy"


def trained_beside_adapter(policy: Any) -> list[str]:
    """Names of the parameters that train and belong to no adapter, e.g. biases under ``bias: all``."""
    places = adapter_places(policy)
    named = policy.named_parameters()
    return [name for name, parameter in named if parameter.requires_grad and split_name(name, places) is None]


def add_frozen_adapter(policy: Any) -> str:
    """Put a frozen copy of the policy's adapter beside it, on the same base model; the name of the copy.

    The policy goes on reading and training its own adapter, and saves that one alone.
    """
    own = active_adapter(policy)
    name = next(n for n in _names("reference") if n not in policy.peft_config)
    flags = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    config = copy.deepcopy(policy.peft_config[own])
    config.lora_dropout = 0.0
    config.init_lora_weights = True  # PiSSA and its like would change the base model a second time
    policy.add_adapter(name, config)
    _copy_adapter(policy, own, name)
    policy.set_adapter(own)
    restore_requires_grad(flags)
    save_only(policy, own)
    return name


def save_only(policy: Any, adapter: str) -> None:
    """Let ``policy.save_pretrained`` write one adapter, without the reference's beside it."""
    policy.save_pretrained = functools.partial(
        type(policy).save_pretrained.__get__(policy), selected_adapters=[adapter]
    )


def _names(stem: str) -> Any:
    yield stem
    number = 2
    while True:
        yield f"{stem}_{number}"
        number += 1


def _copy_adapter(policy: Any, source: str, target: str) -> None:
    """Every weight of one adapter into the other, in its own dtype, and frozen."""
    base = unwrap_peft(policy)
    places = adapter_places(base)
    weights: dict[str, nn.Parameter] = dict(base.named_parameters(remove_duplicate=False))
    copies = 0
    for name, parameter in weights.items():
        own = split_name(name, places)
        if own is None or own.adapter != target:
            continue
        parameter.data = weights[own.under(source)].detach().clone()
        parameter.requires_grad_(False)
        copies += 1
    if copies != sum(1 for name in weights if (own := split_name(name, places)) and own.adapter == source):
        raise ModelError("the policy's adapter could not be copied whole for the reference; set reference.kind: copy")
