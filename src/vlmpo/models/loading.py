"""Load checkpoints and their processors, whole or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from vlmpo import compat
from vlmpo.errors import ModelError, RecipeError
from vlmpo.models.adapters import is_adapter, load_adapter, named_base
from vlmpo.models.checkpoint_files import what_processor_lacks, why_refused, why_unloadable
from vlmpo.models.finite import refuse_non_finite
from vlmpo.quiet import hide_bars


def load_processor(path: str, *, trust_remote_code: bool = False) -> Any:
    """Load a model's processor, from a folder or the hub; a text-only model's is its tokenizer.

    An adapter's is the one saved with it, or else its base model's. Code that comes with it runs only if
    ``trust_remote_code`` is set; left open, transformers would ask on the terminal.

    Raises:
        ModelError: it cannot be loaded, or lacks its tokenizer; or the model beside it can never be loaded.
    """
    trusted = {"trust_remote_code": trust_remote_code}
    if not is_adapter(path) and (reason := why_unloadable(path, processor_only=True, **trusted)):
        raise ModelError(f"model.path: no processor can be loaded from {path}: {reason}")
    try:
        processor = AutoProcessor.from_pretrained(path, **trusted)
    except (OSError, ValueError, ImportError) as error:
        if base := named_base(path):
            return _base_of_adapter(path, base, functools.partial(load_processor, trust_remote_code=trust_remote_code))
        reason = what_processor_lacks(path) or why_refused(error)
        raise ModelError(f"model.path: no processor can be loaded from {path}: {reason}") from error
    if not isinstance(processor, ProcessorMixin | PreTrainedTokenizerBase):  # but a part of one
        raise ModelError(
            f"model.path: {path} has a {type(processor).__name__} but no whole processor; put the model's processor "
            "and tokenizer files there"
        )
    return processor


def load_model(
    path: str, dtype: str = "float32", quantized: dict[str, Any] | None = None, *, trust_remote_code: bool = False
) -> Any:
    """Load a model, text-only or not, on the CPU; load a PEFT adapter on its base model, trainable.

    Args:
        path: a folder or a hub name.
        dtype: dtype of the weights.
        quantized: further arguments of ``from_pretrained``, which quantise the weights.
        trust_remote_code: run the code that comes with the model.

    Raises:
        ModelError: no model there, weights missing in the checkpoint, which transformers would fill with noise, or
            weights that are not finite.
    """
    hide_bars()
    if base := named_base(path):
        load = functools.partial(load_model, dtype=dtype, quantized=quantized, trust_remote_code=trust_remote_code)
        adapted = load_adapter(_base_of_adapter(path, base, load), path)
        refuse_non_finite(adapted, f"adapter {path}")
        return adapted
    if reason := why_unloadable(path, trust_remote_code=trust_remote_code):
        raise ModelError(f"model.path: no model can be loaded from {path}: {reason}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        has_images = compat.is_image_text_config(config)
        model_class: Any = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
        model, info = model_class.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **(quantized or {}),
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"model.path: no model can be loaded from {path}: {why_refused(error)}") from error
    absent = sorted(str(key) for key in {*info["missing_keys"], *info["mismatched_keys"]})
    if absent:
        raise ModelError(
            f"model.path: {path} lacks {len(absent)} of the model's weights ({', '.join(absent[:3])}, ...); "
            "they would be random"
        )
    refuse_non_finite(model, f"model {path}")
    if quantized:
        from peft import prepare_model_for_kbit_training

        # Frozen, and what is not quantised (norms, head, embedding) in float32; the trainer switches checkpointing on.
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def _base_of_adapter(adapter: str, base: str, load: Callable[[str], Any]) -> Any:
    try:
        return load(base)
    except ModelError as error:
        raise ModelError(
            f"{adapter} is an adapter on the model {base}, which cannot be used; put that model there, or write where "
            f"it is into base_model_name_or_path of the adapter's adapter_config.json. {error}"
        ) from error


def freeze_parts(model: Any, parts: Sequence[str]) -> None:
    """Freeze the named submodules: ``vision_tower`` matches any submodule of that name, at any depth.

    Raises:
        RecipeError: a name matches no submodule.
    """
    for part in parts:
        modules = [m for name, m in model.named_modules() if name == part or name.endswith(f".{part}")]
        if not modules:
            known = sorted({name.rpartition(".")[2] for name, _ in model.named_modules() if 0 < name.count(".") < 2})
            raise RecipeError(f"model.freeze: the model has no part {part!r}; it has {', '.join(known)}, among others")
        for module in modules:
            module.requires_grad_(False)
