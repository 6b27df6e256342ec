"""``vlmpo merge``: a base model and an adapter become one whole model."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmpo.errors import ModelError, RunError, first_line
from vlmpo.log import logger
from vlmpo.models import loading
from vlmpo.models.adapters import adapter_places, is_adapter, load_adapter, named_base
from vlmpo.train.checkpoint import last_complete_checkpoint
from vlmpo.train.reference import unwrap_peft


def merge(adapter: Path, output: Path, base: str | None = None, dtype: str = "float32") -> None:
    """Write base and adapter as one model, with its processor, into ``output``.

    Added up in float32 and then cast. Word embeddings stay tied to the head, unless the adapter tells them apart.

    Args:
        adapter: an adapter folder, a checkpoint, or the run folder of a finished run.
        output: a folder that is new or empty; it is there whole or not at all.
        base: the base model; None: the one the adapter names.
        dtype: of the weights written, ``float32`` or ``bfloat16``.

    Raises:
        RunError: ``output`` holds something.
        ModelError: no adapter there, no base model, or one that does not fit.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise RunError(f"{output} is not empty; name a new folder for the merged model")
    _check_adapter(adapter)
    processor = _processor(adapter, base)
    merged = merged_model(adapter, base).to(getattr(torch, dtype))
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(partial)
    processor.save_pretrained(partial)
    output.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial, output)
    print(f"model and processor: {output}")


def merged_model(adapter: Path, base: str | None) -> Any:
    """The base model with the adapter's weights added to its own, float32. Raises ModelError where they do not fit."""
    if base is None:
        model = loading.load_model(str(adapter))
    else:
        named = named_base(adapter) if _names_a_base(adapter) else None
        if named != base:
            logger.info(f"note: the adapter was trained on {named}, it is merged into {base}")
        model = load_adapter(loading.load_model(base), adapter)
    was_tied = _is_tied(unwrap_peft(model))
    _untie_where_told_apart(model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")  # which is what was just mended
            merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        first = first_line(error)
        raise ModelError(f"the adapter in {adapter} cannot be merged: {first}") from error
    if was_tied and not _is_tied(merged):
        _say_untied(merged)
    return merged


def _check_adapter(adapter: Path) -> None:
    if is_adapter(adapter):
        return
    if not adapter.is_dir():
        raise ModelError(f"there is no adapter folder {adapter}")
    if (adapter / "config.json").is_file():
        raise ModelError(f"{adapter} holds a whole model, no adapter: there is nothing to merge")
    newest = last_complete_checkpoint(adapter)
    hint = f"; its newest checkpoint is {newest}" if newest is not None else ""
    raise ModelError(f"{adapter} holds no adapter (adapter_config.json is missing){hint}")


def _names_a_base(adapter: Path) -> bool:
    try:
        return named_base(adapter) is not None
    except ModelError:  # it names none: the one that was given will do
        return False


def _processor(adapter: Path, base: str | None) -> Any:
    """The adapter's own processor, which was saved beside it, or the base model's."""
    try:
        return loading.load_processor(str(adapter))
    except ModelError:
        if base is None:
            raise
        return loading.load_processor(base)


# ---- tied embeddings ----


def _weight(module: nn.Module) -> nn.Parameter:
    """The base model's weight of an embedding or head, under whatever an adapter put around it."""
    for inner in ("original_module", "base_layer"):
        while hasattr(module, inner):
            module = getattr(module, inner)
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _is_tied(model: Any) -> bool:
    return model.get_output_embeddings() is not None and (
        _weight(model.get_output_embeddings()) is _weight(model.get_input_embeddings())
    )


def _untie_where_told_apart(model: Any) -> None:
    """Give the head a weight of its own where an adapter sits on it or on the embedding.

    Both would be added to the one weight otherwise, and be read by the embedding and the head alike.
    """
    base = unwrap_peft(model)
    places = adapter_places(base)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    names = [name for name, module in base.named_modules() if module in ends]
    if not _is_tied(base) or not any(place.startswith(f"{name}.") for name in names for place in places):
        return
    head = ends[1]
    while hasattr(head, "base_layer"):
        head = head.base_layer
    target = getattr(head, "original_module", head)
    target.weight = nn.Parameter(_weight(head).detach().clone(), requires_grad=False)


def _say_untied(model: Any) -> None:
    logger.info("note: the adapter tells word embeddings and head apart; they are no longer tied in the merged model")
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
