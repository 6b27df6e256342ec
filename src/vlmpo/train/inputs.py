"""Prepare the arguments of MPOTrainer: load models by name, read records as pairs, refuse what would have no effect.

TRL's DPOTrainer has arguments of the same names; see docs/from_trl.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmpo import compat
from vlmpo.data.formats import as_pairs
from vlmpo.errors import RecipeError
from vlmpo.models import loading

_UNUSED = {
    "data_collator": "vlmpo lays pairs out in rows itself",
    "compute_metrics": "evaluation reports rewards, margins and losses; append to trainer.extra_evaluations for more",
}


def refuse_unused(**given: Any) -> None:
    """Raise RecipeError for an argument that would have no effect."""
    for name, value in given.items():
        if value is not None:
            raise RecipeError(f"MPOTrainer: {name} is not used ({_UNUSED[name]}); leave it out")


def load_named(model: Any, ref_model: Any, processing_class: Any) -> tuple[Any, Any, Any]:
    """Return policy, reference and processor; load those given by name or path, models in float32.

    Raises:
        ModelError: there is no such model, or no processor for it.
        RecipeError: no processor is given, and no name or path to load one from.
    """
    name = model if isinstance(model, str) else compat.name_or_path(getattr(model, "config", None))
    if isinstance(model, str):
        model = loading.load_model(model)
    if isinstance(ref_model, str):
        ref_model = loading.load_model(ref_model)
    if processing_class is None:
        if not name:
            raise RecipeError("MPOTrainer: processing_class is missing; pass the model's processor")
        processing_class = loading.load_processor(name)
    return model, ref_model, processing_class


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
