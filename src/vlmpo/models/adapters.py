"""A PEFT adapter on disk, put on its base model whole or not at all; and which weights of a model are an adapter's.

``PeftModel.from_pretrained`` only warns where the adapter lacks weights the model has a place for, and says nothing of
weights it has no place for. Here both are errors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from transformers.utils.peft_utils import find_adapter_config_file

from vlmpo.errors import ModelError, first_line

REPEATABLE_INITS = (True, False, "gaussian", "orthogonal", "olora", "pissa")


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a folder or hub name holds a PEFT adapter."""
    try:
        return find_adapter_config_file(os.fspath(path)) is not None
    except (OSError, ValueError):  # no such folder or repository: whoever loads the model says so
        return False


def named_base(path: str | os.PathLike[str]) -> str | None:
    """The base model that the adapter at ``path`` (a folder or a hub name) names; None: ``path`` is no adapter.

    Raises ModelError where the adapter names none.
    """
    if not is_adapter(path):
        return None
    from peft import PeftConfig

    with _as_model_error(f"the adapter config in {path} cannot be read"):
        base = PeftConfig.from_pretrained(os.fspath(path)).base_model_name_or_path
    if not base:
        raise ModelError(
            f"the adapter in {path} names no base model; write its path or name into base_model_name_or_path of "
            f"{os.path.join(path, 'adapter_config.json')}"
        )
    return str(base)


def load_adapter(base: Any, path: str | os.PathLike[str]) -> Any:
    """``base`` (a transformers model) under the adapter at ``path``, trainable.

    Raises:
        ModelError: the adapter was not made for this base: other modules or shapes, weights missing or left over.
    """
    from peft import PeftConfig, PeftModel

    with _as_model_error(f"the adapter config in {path} cannot be read"):
        check_init(PeftConfig.from_pretrained(os.fspath(path)))
    with _as_model_error(f"the adapter in {path} does not fit its base model"):
        model = PeftModel.from_pretrained(base, os.fspath(path), is_trainable=True)
    take_over(model, path)
    return model


def check_init(config: Any) -> None:
    """Raise ModelError for a ``LoraConfig.init_lora_weights`` under which an adapter cannot be read back.

    Some change the base model too, by chance or by data; it is changed anew, and otherwise, whenever the adapter is
    loaded, and the model that was trained is gone. EVA is left a random start where nobody feeds it data.
    """
    init = getattr(config, "init_lora_weights", True)
    if init not in REPEATABLE_INITS:
        names = ", ".join(str(known).lower() for known in REPEATABLE_INITS)
        raise ModelError(
            f"init_lora_weights: {init} depends on chance or on data, so the adapter could not be read back; "
            f"use one of {names}"
        )


def take_over(model: Any, path: str | os.PathLike[str]) -> None:
    """Load the adapter weights at ``path`` into the active adapter of ``model``, a PEFT model, strictly.

    Raises:
        ModelError: the file is missing, lacks weights of the adapter, has others left over, or other shapes.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    name = active_adapter(model)
    with _as_model_error(f"no adapter weights can be read from {path}"):
        saved = load_peft_weights(os.fspath(path), device="cpu")
    with _as_model_error(f"the adapter in {path} does not fit the model"):
        result = set_peft_model_state_dict(model, saved, adapter_name=name)
    places = adapter_places(model)
    absent = [key for key in result.missing_keys if (own := split_name(key, places)) and own.adapter == name]
    for kind, keys in (("lacks", absent), ("has no place in the model for", list(result.unexpected_keys))):
        if keys:
            raise ModelError(f"the adapter in {path} does not fit the model: it {kind} {', '.join(sorted(keys)[:5])}")


def active_adapter(model: Any) -> str:
    """The name of the one adapter of a PEFT model that is on. Raises ModelError where several are."""
    active = model.active_adapters
    if len(active) != 1:
        raise ModelError(f"one adapter can be trained at a time, the model has {len(active)} switched on: {active}")
    return str(active[0])


class AdapterWeight(NamedTuple):
    """The name of an adapter's weight: ``place`` . ``adapter`` . ``rest`` (which may be empty)."""

    place: str
    adapter: str
    rest: str

    def under(self, adapter: str) -> str:
        """The same weight's name under another adapter."""
        return ".".join(part for part in (self.place, adapter, self.rest) if part)


def adapter_places(model: Any) -> set[str]:
    """Where in ``model`` adapters keep their weights, e.g. ``layers.0.q_proj.lora_A``; all else is the base's."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    places = set()
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, ModulesToSaveWrapper):
            places.add(f"{prefix}modules_to_save")
        elif isinstance(module, BaseTunerLayer):  # all that hangs on such a layer but the layer it wraps
            children = [child for child, _ in module.named_children() if child != "base_layer"]
            places |= {prefix + own for own in [*children, *(p for p, _ in module.named_parameters(recurse=False))]}
    return places


def split_name(name: str, places: set[str]) -> AdapterWeight | None:
    """Take the name of a weight apart, where it is an adapter's; None for a weight of the base model."""
    parts = name.split(".")
    for at in range(len(parts) - 1, 0, -1):
        place = ".".join(parts[:at])
        if place in places:
            return AdapterWeight(place, parts[at], ".".join(parts[at + 1 :]))
    return None


@contextmanager
def _as_model_error(what: str) -> Iterator[None]:
    """Whatever PEFT raises over files and weights that do not fit, as one line for the user."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        first = first_line(error)
        raise ModelError(f"{what}: {first}") from error
