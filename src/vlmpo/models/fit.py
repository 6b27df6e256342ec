"""Check that a model and its processor belong together, on one probe prompt, before anything else is read with them.

A processor of another model makes prompts that the model cannot read, or, worse, reads as something else. What would
end as an index error deep in a forward pass, or not at all, is one line here that names both sides.
"""

from __future__ import annotations

import contextlib
import copy
import re
from typing import Any

import torch
from PIL import Image
from transformers import CONFIG_MAPPING

from vlmpo import compat
from vlmpo.data.encode.chat_template import PROBE
from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.data.encode.processors import image_token_id, reads_images, tokenizer_of
from vlmpo.data.records import IMAGE_PLACEHOLDER, Message, PreferencePair
from vlmpo.errors import ModelError, RecordError, first_line
from vlmpo.models.adapters import unwrap_peft
from vlmpo.models.families import family_of
from vlmpo.models.vision import encode_images

_REMEDY = "load the processor that came with the model (AutoProcessor.from_pretrained)"
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
# Words of torch's errors about tensors that do not fit together. Others may have any cause, e.g. a dtype.
_ABOUT_SHAPES = re.compile(r"shape|size|channel|dimension|match", re.IGNORECASE)


def limits_of(*models: Any) -> dict[str, Any]:
    """Return PairEncoder's settings that say what all of ``models`` can read, transformers or PEFT models."""
    return {
        "vocabulary": min(map(_embedding_rows, models)),
        "takes_images": all(_takes_images(unwrap_peft(model).config) for model in models),
    }


def limits_of_config(config: Any) -> dict[str, Any]:
    """Return the same of a model of which only the config is known."""
    return {"vocabulary": config.get_text_config().vocab_size, "takes_images": _takes_images(config)}


def _takes_images(config: Any) -> bool:
    """Return False only if a model of ``config`` certainly reads text alone."""
    is_text = config.get_text_config() is config and not hasattr(config, "vision_config")
    return compat.is_image_text_config(config) or not is_text or config.model_type not in CONFIG_MAPPING


def _embedding_rows(model: Any) -> int:
    """Return how many rows the input embedding of ``model``, perhaps under an adapter, has."""
    base = unwrap_peft(model)
    embedding = base.get_input_embeddings()
    for inner in ("original_module", "base_layer"):  # of what PEFT puts around it
        embedding = getattr(embedding, inner, embedding)
    return int(getattr(embedding, "num_embeddings", None) or base.config.get_text_config().vocab_size)


def check_processor(model: Any, encoder: PairEncoder) -> EncodedPair | None:
    """Check the processor and its chat template on a probe prompt; the model itself is not run.

    Args:
        model: a transformers or PEFT model.
        encoder: made of the processor and :func:`limits_of` the model.

    Returns:
        The encoded probe; None if the template or the processor refuses it, as it will refuse records.

    Raises:
        ModelError: the processor is another model's, or the template writes tokens that the model does not have.
    """
    whole = unwrap_peft(model)
    return check_config(whole.config, encoder, getattr(whole, "generation_config", None))


def check_config(config: Any, encoder: PairEncoder, generation_config: Any = None) -> EncodedPair | None:
    """Do as :func:`check_processor` does, knowing no more of the model than its config.

    Raises:
        ModelError: as there.
    """
    processor = encoder.processor
    if compat.is_image_text_config(config) and not reads_images(processor):
        name = type(processor).__name__
        raise ModelError(f"the {config.model_type} model reads images, but {name} is a tokenizer alone; {_REMEDY}")
    probe = _encode_probe(encoder)
    if probe is not None:
        _check_image_token(config, processor, probe)
        _check_vocabulary(config, encoder, probe)
    _check_special_tokens(config, generation_config, tokenizer_of(processor))
    return probe


def check_features(model: Any, processor: Any, probe: EncodedPair | None) -> None:
    """Check that the model's vision part makes as many features of the probe's image as its prompt has places.

    Reads the image with the model as it is, on its device, without gradient; families without the mark are not read.

    Args:
        model: a transformers or PEFT model whose weights are whole in this process.
        processor: what made the probe.
        probe: what :func:`check_processor` returned.

    Raises:
        ModelError: the numbers differ, or the vision part cannot read pixels of such a shape.
    """
    whole = unwrap_peft(model)
    base, image_id = whole.base_model, _image_id(whole.config)
    if probe is None or not probe.vision or image_id is None or not family_of(whole.config).takes_features:
        return
    parameter = next(base.parameters())
    vision = {
        name: tensor.to(parameter.device, whole.dtype if tensor.is_floating_point() else None)
        for name, tensor in probe.vision.items()
    }
    names = f"{type(processor).__name__} and the {whole.config.model_type} model"
    try:
        with torch.no_grad(), torch.random.fork_rng([parameter.device] if parameter.device.type == "cuda" else []):
            features = encode_images(base, vision).pooler_output
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AttributeError, TypeError, LookupError) as error:
        if isinstance(error, RuntimeError) and not _ABOUT_SHAPES.search(str(error)):
            return  # the first step meets it, as it would without this check
        given = ", ".join(vision)
        raise ModelError(
            f"{names} do not fit: the model's vision part cannot read the processor's {given} ({first_line(error)}); "
            f"{_REMEDY}"
        ) from error
    parts = [features] if isinstance(features, torch.Tensor) else list(features)
    made = sum(part.numel() // part.shape[-1] for part in parts)
    places = int((probe.prompt_ids == image_id).sum())
    if made != places:
        raise ModelError(
            f"{names} do not fit: of an image of {_PROBE_SIDE} x {_PROBE_SIDE} pixels the processor makes {places} "
            f"tokens, the model's vision part {made} features; {_REMEDY}"
        )


# ---- the probe ----

_PROBE_SIDE = 64


def _encode_probe(encoder: PairEncoder) -> EncodedPair | None:
    """Return a short question, with an image if the processor reads any, as the model would read it."""
    anything = copy.copy(encoder)
    anything.max_length = anything.vocabulary = None
    images = [Image.new("RGB", (_PROBE_SIDE, _PROBE_SIDE), "gray")] if encoder.takes_images else []
    question = f"{IMAGE_PLACEHOLDER}\n" * len(images) + "?"
    pair = PreferencePair((Message("user", question),), tuple(images), chosen=PROBE, rejected=f"{PROBE}?")
    try:
        return anything.encode(pair)
    except RecordError:
        return None


def _image_id(config: Any) -> int | None:
    """Return the id of the token at which the model of ``config`` reads an image; None if it names none."""
    ids = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((token_id for token_id in ids if isinstance(token_id, int)), None)


def _check_image_token(config: Any, processor: Any, probe: EncodedPair) -> None:
    expected = _image_id(config)
    if not probe.vision or expected is None or bool((probe.prompt_ids == expected).any()):
        return
    written = image_token_id(processor)
    raise ModelError(
        f"{type(processor).__name__} is not the processor of the {config.model_type} model: for an image it writes "
        f"{_named(processor, written)}, the model reads one at {_named(processor, expected)}; {_REMEDY}"
    )


def _check_vocabulary(config: Any, encoder: PairEncoder, probe: EncodedPair) -> None:
    """Raise ModelError if the embedding has no row for a token of the template's own, or for the image's."""
    if encoder.vocabulary is None:
        return
    ids = torch.cat([probe.prompt_ids, probe.chosen_ids])
    if family_of(config).replaces_image_tokens:
        ids = ids[ids != _image_id(config)]
    largest = int(ids.max())
    if largest >= encoder.vocabulary:
        raise ModelError(
            f"{type(encoder.processor).__name__} writes {_named(encoder.processor, largest)} into prompts or answers, "
            f"and the embedding of the {config.model_type} model has only {encoder.vocabulary} rows; {_REMEDY}, or "
            "enlarge the embedding (resize_token_embeddings)"
        )


def _named(processor: Any, token_id: int | None) -> str:
    token = None if token_id is None else tokenizer_of(processor).convert_ids_to_tokens(token_id)
    return f"token {token_id}" if token is None else f"{token!r} (token {token_id})"


# ---- special tokens ----


def _check_special_tokens(config: Any, generation_config: Any, tokenizer: Any) -> None:
    """Raise ModelError if the model's tokens for start, end and padding are certainly another tokenizer's.

    Users set some of them anew, and configs leave out what is their class's default. So one that agrees is enough, a
    default proves nothing, and one that differs is enough only if the model's is no special token of the tokenizer.
    """
    text = config.get_text_config()
    differing = {}
    for name in _SPECIAL:
        known = {token for source in (text, config, generation_config) for token in _ids_of(source, name)}
        own = getattr(tokenizer, name, None)
        if own is None or not known:
            continue
        if own in known:
            return
        if known - _ids_of(_default(text), name):
            differing[name] = known
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    ends = differing.get("eos_token_id", special)
    if len(differing) > 1 or ends.isdisjoint(special):
        own_ids = ", ".join(f"{name} {getattr(tokenizer, name)}" for name in differing)
        models = ", ".join(f"{name} {' or '.join(map(str, sorted(known)))}" for name, known in differing.items())
        raise ModelError(
            f"{type(tokenizer).__name__} is not the tokenizer of the {config.model_type} model: it has {own_ids}, the "
            f"model's config {models}; {_REMEDY}"
        )


def _ids_of(config: Any, name: str) -> set[int]:
    value = getattr(config, name, None)
    return {value} if isinstance(value, int) else set(value or ())


def _default(config: Any) -> Any:
    """Return a config of the same class with its defaults; None if it has no defaults for everything."""
    with contextlib.suppress(Exception):  # whatever a family's config checks
        return type(config)()
    return None
