"""Prepare the arguments of MPOTrainer: load models by name, read records as pairs, refuse what would have no effect.

TRL's DPOTrainer has arguments of the same names; see docs/from_trl.md.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainingArguments

from vlmpo import compat
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.formats import as_pairs
from vlmpo.errors import ModelError, RecipeError
from vlmpo.log import logger
from vlmpo.models import loading
from vlmpo.models.adapters import unwrap_peft
from vlmpo.models.checkpoint_files import INTERNVL_CHAT, why_foreign
from vlmpo.models.families import support_for
from vlmpo.models.fit import limits_of
from vlmpo.train.config import MPOConfig
from vlmpo.train.kernel_choice import settle_liger

_UNUSED = {
    "data_collator": "vlmpo lays pairs out in rows itself",
    "compute_metrics": "evaluation reports rewards, margins and losses; append to trainer.extra_evaluations for more",
}


def refuse_unused(**given: Any) -> None:
    """Raise RecipeError for an argument that would have no effect."""
    for name, value in given.items():
        if value is not None:
            raise RecipeError(f"MPOTrainer: {name} is not used ({_UNUSED[name]}); leave it out")


def check_arguments(args: Any, peft_config: Any) -> None:
    """Raise RecipeError unless the settings are an MPOConfig and the adapter's, if any, are PEFT's."""
    if not isinstance(args, MPOConfig):
        kind = type(args).__name__
        remedy = "its fields that MPOConfig has too keep their names (docs/from_trl.md)"
        if isinstance(args, Mapping):
            remedy = "MPOConfig(**args)"
        elif type(args) is TrainingArguments:  # to_dict() hides the token
            remedy = "MPOConfig(**{**args.to_dict(), 'hub_token': args.hub_token}) takes over all that is set"
        raise RecipeError(
            f"MPOTrainer: args is of type {kind}, without MPO's own settings; pass an MPOConfig: {remedy}"
        )
    try:
        settle_liger(args)  # it may have been set since
    except ValueError as error:
        raise RecipeError(f"MPOTrainer: {error}") from error
    if peft_config is not None and not hasattr(peft_config, "peft_type"):
        raise RecipeError(
            f"MPOTrainer: peft_config is of type {type(peft_config).__name__}; pass a configuration of PEFT, e.g. "
            "peft.LoraConfig(r=16)"
        )


def encoder_for(args: MPOConfig, processor: Any, need_rejected: bool, *models: Any) -> PairEncoder:
    """Return what turns pairs into what all of ``models`` can read; those that are None count for nothing."""
    return PairEncoder(
        processor,
        max_length=args.max_length,
        over_long=args.over_long,  # type: ignore[arg-type]
        max_tiles=args.max_tiles,
        need_rejected=need_rejected,
        video_frames=args.video_frames,
        **limits_of(*(model for model in models if model is not None)),
    )


def shares_prompts(args: MPOConfig, model: Any) -> bool:
    """Return whether the responses to a prompt are to share a row; log it if ``model`` does not allow that."""
    support = support_for(model.config)
    if args.attention == "auto" and not support.shared:
        logger.info(f"NOT sharing the prompt between responses: {support.reason}. Each is read in a row of its own.")
    return args.attention == "auto" and support.shared


def refuse_shared_weights(model: Any, ref_model: Any | None) -> None:
    """Raise RecipeError if training ``model`` would move ``ref_model``, which is to stay as it is.

    Weights that do not train, such as those of a frozen vision tower, may belong to both.
    """
    if ref_model is None:
        return
    trained = {key for parameter in model.parameters() if parameter.requires_grad for key in _places(parameter)}
    shared = next((n for n, p in ref_model.named_parameters() if not trained.isdisjoint(_places(p))), None)
    if ref_model is model or unwrap_peft(ref_model) is unwrap_peft(model) or shared is not None:
        raise RecipeError(
            "MPOTrainer: ref_model is the model itself, or shares weights with it that train"
            f"{'' if shared is None else f' ({shared})'}, so it would change with every step; leave ref_model out "
            "(the initial model is then the reference), or load it a second time"
        )


def _places(parameter: Any) -> tuple[int, ...]:
    """Return what identifies a parameter and its memory; the latter only if it has any of its own here."""
    memory = 0
    with contextlib.suppress(RuntimeError, NotImplementedError):  # on meta, or a subclass without storage
        memory = parameter.untyped_storage().data_ptr()
    return (id(parameter), memory) if memory else (id(parameter),)


def load_named(model: Any, ref_model: Any, processing_class: Any) -> tuple[Any, Any, Any]:
    """Return policy, reference and processor; load those given by name or path, models in float32.

    Raises:
        ModelError: there is no such model, or no processor for it.
        RecipeError: a model is no model; no processor is given, and no name or path to load one from.
    """
    name = os.fspath(model) if _is_name(model) else compat.name_or_path(getattr(model, "config", None))
    model = _as_model(model, "model")
    ref_model = None if ref_model is None else _as_model(ref_model, "ref_model")
    if processing_class is None:
        if not name:
            raise RecipeError("MPOTrainer: processing_class is missing; pass the model's processor")
        processing_class = loading.load_processor(name)
    return model, ref_model, processing_class


def _is_name(given: Any) -> bool:
    return isinstance(given, str | os.PathLike)


def _as_model(given: Any, name: str) -> Any:
    """Return the model that the argument ``name`` gives, loaded if it is a name or path."""
    if _is_name(given):
        return loading.load_model(os.fspath(given))
    if not isinstance(given, nn.Module) or getattr(given, "config", None) is None:
        kind = f"the class {given.__name__}" if isinstance(given, type) else f"of type {type(given).__name__}"
        kind = "missing" if given is None else kind
        raise RecipeError(
            f"MPOTrainer: {name} is {kind}; pass a model of transformers or PEFT, or the name or path of one"
        )
    architecture = type(unwrap_peft(given)).__name__
    if architecture == INTERNVL_CHAT and (reason := why_foreign({"model_type": "internvl_chat"})):
        raise ModelError(f"MPOTrainer: {name} cannot be used: {reason}")
    return given


def pairs_of(data: Any, need_rejected: bool, name: str) -> Any:
    """Return the argument ``name``, a data set or a mapping of them by name, with PreferencePairs as items.

    None stays None.

    Raises:
        DataError: records fit no format, or the data set has no length or no items by number.
    """
    if data is None:
        return None
    if isinstance(data, Mapping) and name == "eval_dataset":
        return {
            key: as_pairs(part, need_rejected=need_rejected, name=f"{name}[{key!r}]", source=str(key))
            for key, part in data.items()
        }
    return as_pairs(data, need_rejected=need_rejected, name=name)
