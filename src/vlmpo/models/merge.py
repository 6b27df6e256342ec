"""Merge a base model and an adapter into one whole model."""

from __future__ import annotations

import os
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmpo.errors import ModelError, first_line
from vlmpo.log import logger
from vlmpo.models import loading
from vlmpo.models.adapters import adapter_places, load_adapter, named_base, unwrap_peft


def write_merged(adapter: Path, output: Path, base: str | None = None, dtype: str = "float32") -> None:
    """Write base and adapter as one model, with its processor, into ``output``.

    The weights are added in float32 and then cast. Word embeddings stay tied to the head, unless the adapter changes
    one of them.

    Args:
        adapter: an adapter folder.
        output: a folder that is new or empty; it is written whole or not at all.
        base: the base model; None: the one that the adapter names.
        dtype: dtype of the written weights, ``float32`` or ``bfloat16``.

    Raises:
        ModelError: there is no base model, or it does not fit the adapter.
    """
    try:
        processor = loading.load_processor(str(adapter))  # saved with the adapter, or its base model's
    except ModelError:
        if base is None:
            raise
        processor = loading.load_processor(base)
    merged = merged_model(adapter, base).to(getattr(torch, dtype))
    output = output.resolve()  # a link to an empty folder stays one
    partial = output.with_name(f"{output.name}.{uuid.uuid4().hex}.partial")
    try:
        merged.save_pretrained(partial)
        processor.save_pretrained(partial)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def merged_model(adapter: Path, base: str | None) -> Any:
    """Return the base model with the adapter's weights added to its own, in float32.

    Raises:
        ModelError: they do not fit.
    """
    if base is None:
        model = loading.load_model(str(adapter))
    else:
        try:
            named = named_base(adapter)
        except ModelError:  # it names none, but one was given
            named = None
        if named != base:
            logger.info(f"note: the adapter was trained on {named}, it is merged into {base}")
        model = load_adapter(loading.load_model(base), adapter)
    was_tied = _is_tied(unwrap_peft(model))
    _untie_if_adapted(model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")  # they are not tied any more
            merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"the adapter in {adapter} cannot be merged: {first_line(error)}") from error
    if was_tied and not _is_tied(merged):
        logger.info("note: the adapter changes word embeddings or head; they are no longer tied in the merged model")
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False
    return merged


# ---- tied embeddings ----


def _weight(module: nn.Module) -> nn.Parameter:
    """Return the base model's weight of an embedding or head, under whatever an adapter put around it."""
    for inner in ("original_module", "base_layer"):
        while hasattr(module, inner):
            module = getattr(module, inner)
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and _weight(head) is _weight(model.get_input_embeddings())


def _untie_if_adapted(model: Any) -> None:
    """Give the head a weight of its own if an adapter is on it or on the embedding.

    Otherwise both changes would be added to the one weight that embedding and head share.
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
