"""Load PEFT adapters, put them on a model, switch them, and copy them for a frozen reference.

``PeftModel.from_pretrained`` only warns about weights that the adapter lacks, and ignores weights that the model has no
place for. Here both are errors.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from vlmpo import compat
from vlmpo.errors import ModelError, RecipeError, first_line
from vlmpo.log import logger
from vlmpo.models.checkpoint_files import can_be_looked_for

REPEATABLE_INITS = (True, False, "gaussian", "orthogonal", "olora", "pissa")
# Inits under which a fresh LoRA adapter changes nothing: its second factor is 0, and the base stays as it is.
_STARTS_AT_BASE = (True, "gaussian")


# ---- on disk ----


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder or hub name holds a PEFT adapter."""
    if not os.path.isdir(path) and not can_be_looked_for(os.fspath(path)):
        return False  # the Hub would be asked for it, again and again
    try:
        return find_adapter_config_file(os.fspath(path)) is not None
    except (OSError, ValueError):  # no such folder or repository: loading the model raises the error
        return False


def named_base(path: str | os.PathLike[str]) -> str | None:
    """Return the base model that the adapter at ``path`` names, or None if ``path`` is no adapter.

    Args:
        path: a folder or a hub name.

    Raises:
        ModelError: the adapter names no base model, or its config cannot be read.
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
    """Return ``base``, a transformers model, with the adapter at ``path`` on it, trainable.

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

    Some change the base model too, by random numbers or by data. Whenever the adapter is loaded, the base is changed
    anew and differently, and the model that was trained is lost. EVA starts at random if it is given no data.
    """
    init = getattr(config, "init_lora_weights", True)
    if init not in REPEATABLE_INITS:
        names = ", ".join(str(known).lower() for known in REPEATABLE_INITS)
        raise ModelError(
            f"init_lora_weights: {init} depends on chance or on data, so the adapter could not be loaded again; "
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
    absent = [key for key in result.missing_keys if (weight := split_name(key, places)) and weight.adapter == name]
    for kind, keys in (("lacks", absent), ("has no place in the model for", list(result.unexpected_keys))):
        if keys:
            raise ModelError(f"the adapter in {path} does not fit the model: it {kind} {', '.join(sorted(keys)[:5])}")


@contextmanager
def _as_model_error(what: str) -> Iterator[None]:
    """Turn whatever PEFT raises over files and weights that do not fit into one line for the user."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"{what}: {first_line(error)}") from error


# ---- on a model ----


def is_peft(model: Any) -> bool:
    """Return whether ``model`` is a PEFT model, without importing peft for those that are not."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def unwrap_peft(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if is_peft(model) else model


def keeps_float32_matrices(model: Any) -> bool:
    """Return whether an adapter of ``model`` multiplies states by float32 buffers of its own (PEFT's VeRA)."""
    return is_peft(model) and any(config.peft_type.value == "VERA" for config in model.peft_config.values())


def active_adapter(model: Any) -> str:
    """Return the name of the one adapter of a PEFT model that is on. Raise ModelError if several are."""
    active = model.active_adapters
    if len(active) != 1:
        raise ModelError(f"one adapter can be trained at a time, the model has {len(active)} switched on: {active}")
    return str(active[0])


@contextmanager
def use_adapter(model: Any, adapter: str | None) -> Iterator[None]:
    """Switch a PEFT model to another of its adapters in the body, or to none (None); then switch it back.

    PEFT's switches also set ``requires_grad``. That would unfreeze parameters, and FSDP2, which reads it in a model's
    first forward, would never give the adapter a gradient. So every parameter keeps its ``requires_grad``, in the body
    too.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = None if adapter is None else active_adapter(model)
    try:
        if adapter is None:
            with model.disable_adapter():
                restore_requires_grad(flags)
                yield
        else:
            model.set_adapter(adapter)
            restore_requires_grad(flags)
            yield
    finally:
        if before is not None:
            model.set_adapter(before)
        restore_requires_grad(flags)


def restore_requires_grad(flags: Sequence[tuple[nn.Parameter, bool]]) -> None:
    """Give each parameter the ``requires_grad`` beside it."""
    for parameter, wanted in flags:
        if parameter.requires_grad != wanted:
            parameter.requires_grad_(wanted)


class AdapterWeight(NamedTuple):
    """Names an adapter's weight: ``place`` . ``adapter`` . ``rest`` (which may be empty)."""

    place: str
    adapter: str
    rest: str

    def under(self, adapter: str) -> str:
        """Return the same weight's name under another adapter."""
        return ".".join(part for part in (self.place, adapter, self.rest) if part)


def adapter_places(model: Any) -> set[str]:
    """Return where in ``model`` adapters keep their weights, e.g. ``layers.0.q_proj.lora_A``."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    places = set()
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, ModulesToSaveWrapper):
            places.add(f"{prefix}modules_to_save")
        elif isinstance(module, BaseTunerLayer):  # all its children but the layer that it wraps
            children = [child for child, _ in module.named_children() if child != "base_layer"]
            parameters = [parameter for parameter, _ in module.named_parameters(recurse=False)]
            places |= {prefix + place for place in (*children, *parameters)}
    return places


def split_name(name: str, places: set[str]) -> AdapterWeight | None:
    """Split the name of an adapter's weight; return None for a weight of the base model."""
    parts = name.split(".")
    for at in range(len(parts) - 1, 0, -1):
        place = ".".join(parts[:at])
        if place in places:
            return AdapterWeight(place, parts[at], ".".join(parts[at + 1 :]))
    return None


# ---- on the policy ----


def put_adapter_on(model: Any, peft_config: Any) -> Any:
    """Return ``model`` under a fresh adapter, without dropout.

    Raises:
        ModelError: it carries an adapter already, or the config fits no part of it.
        RecipeError: an entry of the config names no module.
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
    check_targets(model, peft_config)
    try:
        return get_peft_model(model, peft_config)
    except (ValueError, TypeError) as error:
        raise ModelError(f"the adapter cannot be put on the model (model.lora): {first_line(error)}") from error


def check_targets(model: Any, config: Any) -> None:
    """Raise RecipeError for entries of a LoRA config that match no module: PEFT ignores them if another one does.

    Each kind is matched as PEFT matches it.
    """
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    replaced = _entries(config, "modules_to_save")
    excluded = _entries(config, "exclude_modules")
    free = [name for name in modules if not any(map(_names(name), excluded)) and not any(map(name.endswith, replaced))]
    wrong = [
        *_unmatched("target_modules", _entries(config, "target_modules"), modules, _names),
        *_unmatched("target_parameters", _entries(config, "target_parameters"), parameters, _names),
        *_unmatched("exclude_modules", excluded, modules, _names),
        *_unmatched("modules_to_save", replaced, modules, lambda name: name.endswith),
        *_unmatched("rank_pattern", _entries(config, "rank_pattern"), modules, _ends_in),
        *_unmatched("alpha_pattern", _entries(config, "alpha_pattern"), modules, _ends_in),
    ]
    if not wrong:
        frozen = [
            entry for entry in _entries(config, "target_modules") if not any(_names(name)(entry) for name in free)
        ]
        wrong = [f"target_modules: all that {entry!r} names is excluded or frozen or trained whole" for entry in frozen]
    if wrong:
        raise RecipeError("; ".join(f"model.lora.{message}" for message in wrong))


class _Pattern(str):
    """A regular expression for whole names, where others are names or their endings."""


def _entries(config: Any, field: str) -> list[str]:
    """Return the entries of a field of a LoRA config, which may be a pattern, names, or a mapping by names."""
    value = getattr(config, field, None) or ()
    if isinstance(value, str):
        return [] if value.lower() == "all-linear" else [_Pattern(value)]
    return sorted(map(str, value))


def _names(name: str) -> Callable[[str], bool]:
    """Return whether an entry names the module ``name``: by itself, by its ending, or by a pattern."""

    def is_named_by(entry: str) -> bool:
        if isinstance(entry, _Pattern):
            return re.fullmatch(entry, name) is not None
        return name == entry or name.endswith(f".{entry}")

    return is_named_by


def _ends_in(name: str) -> Callable[[str], bool]:
    return lambda entry: re.match(rf"(.*\.)?({entry})$", name) is not None


def _unmatched(
    field: str, entries: Sequence[str], names: Sequence[str], named_by: Callable[[str], Callable[[str], Any]]
) -> list[str]:
    """Return a message for each entry that names none of ``names``."""
    endings = sorted({name.rpartition(".")[2] for name in names} - {str(number) for number in range(len(names))})
    messages = []
    for entry in entries:
        try:
            if any(named_by(name)(entry) for name in names):
                continue
        except re.error as error:
            messages.append(f"{field}: {entry!r} is no regular expression: {error}")
            continue
        near = get_close_matches(entry.rpartition(".")[2], endings, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(endings[:12])}, among others"
        messages.append(f"{field}: the model has nothing that {entry!r} names; {hint}")
    return messages


def prepare_policy_adapter(model: Any, reentrant_checkpointing: bool) -> None:
    """Check that the policy's adapter, if it has one, can be trained, and make its base ready for it.

    Args:
        model: the policy, a transformers or PEFT model.
        reentrant_checkpointing: whether gradient checkpointing is on, in its re-entrant form.

    Raises:
        ModelError: the adapter cannot be trained.
    """
    if not is_peft(model):
        if compat.has_transformers_adapter(model):
            raise ModelError(
                "the model's adapter was loaded by transformers; load it by peft.PeftModel.from_pretrained"
            )
        return
    config = model.peft_config[active_adapter(model)]
    if config.is_prompt_learning:
        raise ModelError(
            f"{config.peft_type.value} puts virtual tokens before the prompt; only adapters on layers, such as LoRA, "
            "can be trained"
        )
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise ModelError("the model's adapter is merged into its base; call unmerge_adapter() before training")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On a CPU bitsandbytes would repack its weights in evaluation into a form that gives no gradient.
            module.support_avx512bf16_for_cpu = False
    if reentrant_checkpointing:
        # Re-entrant checkpointing gives gradients only to layers with an input that requires one.
        unwrap_peft(model).enable_input_require_grads()


# ---- the reference ----


def choose_kind(kind: str, policy: Any, ref_model: Any | None, fresh_adapter: bool) -> str:
    """Return the kind of reference to build: ``copy``, ``adapter`` (switched off) or ``frozen_adapter``.

    The adapter is switched off only if it was put on for this run and changes nothing at the start. One that the policy
    already had was trained before: the reference keeps a frozen copy of it. If weights outside the adapter train, the
    reference is a copy of the whole model.

    Args:
        kind: ``reference.kind``: ``auto``, ``copy`` or ``adapter``.
        policy: a transformers or PEFT model.
        ref_model: a reference model of the user's, or None.
        fresh_adapter: whether the policy's adapter was put on for this run.

    Raises:
        RecipeError: ``adapter`` without an adapter, or together with a reference model, or if the model without the
            adapter is not the initial policy or would not stay it.
    """
    adapter_required = kind == "adapter"
    if adapter_required and not is_peft(policy):
        raise RecipeError("reference.kind is 'adapter', but the policy carries none; set model.lora or kind: copy")
    if adapter_required and ref_model is not None:
        raise RecipeError("reference.kind is 'adapter', but a reference model was given too; leave one of them out")
    if ref_model is not None or not is_peft(policy):
        return "copy"
    config = policy.peft_config[active_adapter(policy)]
    if loose := trained_beside_adapter(policy):
        if adapter_required:
            raise RecipeError(
                f"reference.kind is 'adapter', but weights outside the adapter train too ({', '.join(loose[:3])}): the "
                "reference would move with them; use kind: copy, or model.lora.bias: none"
            )
        return "copy"
    neutral = getattr(config, "init_lora_weights", True) in _STARTS_AT_BASE
    if adapter_required and fresh_adapter and not neutral:
        raise RecipeError(
            "reference.kind is 'adapter', but under model.lora.init_lora_weights: "
            f"{config.init_lora_weights} the fresh adapter already changes the model; use kind: auto"
        )
    if adapter_required or (kind == "auto" and fresh_adapter and neutral):
        return "adapter"
    return "frozen_adapter" if config.peft_type.value == "LORA" else "copy"


def trained_beside_adapter(policy: Any) -> list[str]:
    """Return the names of the parameters that train and belong to no adapter, e.g. biases under ``bias: all``."""
    places = adapter_places(policy)
    named = policy.named_parameters()
    return [name for name, parameter in named if parameter.requires_grad and split_name(name, places) is None]


def add_frozen_adapter(policy: Any) -> str:
    """Put a frozen copy of the policy's adapter beside it, on the same base model, and return the copy's name.

    The policy still reads, trains and saves only its first adapter.
    """
    active = active_adapter(policy)
    names = itertools.chain(["reference"], (f"reference_{number}" for number in itertools.count(2)))
    name = next(name for name in names if name not in policy.peft_config)
    flags = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    config = copy.deepcopy(policy.peft_config[active])
    config.lora_dropout = 0.0
    config.init_lora_weights = True  # PiSSA and its like would change the base model a second time
    policy.add_adapter(name, config)
    _copy_adapter(policy, active, name)
    policy.set_adapter(active)
    restore_requires_grad(flags)
    # Save the policy's adapter only, not the reference's.
    policy.save_pretrained = functools.partial(type(policy).save_pretrained.__get__(policy), selected_adapters=[active])
    return name


def _copy_adapter(policy: Any, source: str, target: str) -> None:
    """Copy every weight of one adapter into the other, with its dtype, and freeze the copy."""
    base = unwrap_peft(policy)
    places = adapter_places(base)
    parameters: dict[str, nn.Parameter] = dict(base.named_parameters(remove_duplicate=False))
    weights = {name: weight for name in parameters if (weight := split_name(name, places)) is not None}
    targets = {name: weight for name, weight in weights.items() if weight.adapter == target}
    for name, weight in targets.items():
        parameters[name].data = parameters[weight.under(source)].detach().clone()
        parameters[name].requires_grad_(False)
    if len(targets) != sum(weight.adapter == source for weight in weights.values()):
        raise ModelError("the policy's adapter could not be copied whole for the reference; set reference.kind: copy")
