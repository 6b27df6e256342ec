"""Finds and loads what ``vlmpo chat`` and ``vlmpo serve`` are given: a run's model, a checkpoint, or a plain model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from vlmpo.commands.adapter_settings import quantization
from vlmpo.commands.demo import MARK_FILE
from vlmpo.commands.run_folder import MANIFEST, read_manifest
from vlmpo.errors import ModelError, RunError, VlmpoError
from vlmpo.log import logger
from vlmpo.models.adapters import choose_kind, is_adapter, is_peft, named_base, use_adapter
from vlmpo.models.checkpoint_files import means_folder
from vlmpo.models.loading import load_model, load_processor
from vlmpo.models.masters import round_weights
from vlmpo.recipe import Recipe
from vlmpo.recipe_yaml import load_recipe
from vlmpo.train.checkpoint import damage
from vlmpo.train.checkpoint_io import TRAINER_FILE, checkpoints_in, step_of
from vlmpo.train.device_memory import free_bytes
from vlmpo.train.ema import AVERAGE_FOLDER
from vlmpo.train.precision import recorded_precision

_RECIPE = "recipe.yaml"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Trained:
    """Names a model and where it comes from.

    Attributes:
        path: its folder or Hub name.
        what: which one it is, in words.
        reference: the model it was trained from; None if that is not known.
        recipe: of its run; None for a model that no run here made.
        run: folder of its run.
    """

    path: str
    what: str
    reference: str | None = None
    recipe: Recipe | None = None
    run: Path | None = None


@dataclass(frozen=True)
class Reference:
    """Holds the model that a trained one is compared with, and the context in which it answers."""

    model: Any
    while_asked: Callable[[], AbstractContextManager[Any]]
    what: str


# ---- finding ----


def find_trained(given: str) -> Trained:
    """Return the model that ``given`` names: a run folder, a checkpoint of one, a demo's, a model or an adapter.

    Of a run that is finished it is the final model; else the best checkpoint, or the newest, that is sound.

    Raises:
        RunError: it is a run without a model yet, or its checkpoints are damaged.
        ModelError: there is nothing, or no model.
    """
    folder = Path(given)
    if not folder.is_dir():
        if folder.exists() or means_folder(given):
            raise ModelError(f"there is no folder {given}; name a run folder, a checkpoint, a model or an adapter")
        return Trained(given, f"the model {given}")
    if (folder / MANIFEST).exists() and (folder / _RECIPE).exists():
        return _of_run(folder)
    if step_of(folder) is not None and (folder.parent / _RECIPE).exists():
        if found := damage(folder, to_resume=False):
            raise RunError(f"{folder} is damaged: {', '.join(found[:3])}; name another checkpoint, or the run's folder")
        return _of_recipe(folder.parent, folder, f"{folder.name} of {folder.parent}")
    if folder.name == AVERAGE_FOLDER and (folder.parent / _RECIPE).exists() and _has_model(folder):
        return _of_recipe(folder.parent, folder, f"the averaged weights of {folder.parent}")
    if (folder / MARK_FILE).exists() and _has_model(folder / "model"):
        return Trained(str(folder / "model"), f"the demo's model in {folder}", str(folder / "warm_up"))
    if not _has_model(folder):
        inside = sorted(str(path) for path in folder.glob("*") if _has_model(path) or (path / MANIFEST).exists())
        hint = f"; there are models in {', '.join(inside[:5])}" if inside else ""
        raise ModelError(f"{folder} holds neither a model nor a run of vlmpo{hint}")
    return Trained(given, f"the {'adapter' if is_adapter(given) else 'model'} in {folder}", named_base(given))


def _of_run(folder: Path) -> Trained:
    status = (read_manifest(folder) or {})["status"]
    if status == "finished" and _has_model(folder):
        return _of_recipe(folder, folder, f"the final model of {folder}")
    faults = []
    for checkpoint in _best_first(folder):
        if not (found := damage(checkpoint, to_resume=False)):
            which = "the best" if checkpoint == _best(folder) else "the newest sound one"
            return _of_recipe(folder, checkpoint, f"{checkpoint.name} of {folder}, {which} (the run is {status})")
        faults.append(f"{checkpoint.name} is damaged: {found[0]}")
    if faults:
        raise RunError(f"{folder} holds no sound checkpoint: {'; '.join(faults[:3])}")
    if status == "finished":
        raise RunError(f"{folder}: the run is finished, but its model is gone: no config.json, no adapter_config.json")
    raise RunError(f"{folder} holds no model yet: the run is {status}, and has written no checkpoint")


def _of_recipe(run: Path, path: Path, what: str) -> Trained:
    recipe = load_recipe(run / _RECIPE)
    return Trained(str(path), what, recipe.model.path, recipe, run)


def _has_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def _best_first(folder: Path) -> list[Path]:
    best = _best(folder)
    return sorted(checkpoints_in(folder), key=lambda checkpoint: checkpoint != best)  # else the newest first


def _best(folder: Path) -> Path | None:
    """Return the checkpoint that the newest one names as the best so far, if it is there."""
    for checkpoint in checkpoints_in(folder):
        try:
            best = Path(json.loads((checkpoint / TRAINER_FILE).read_bytes())["best_model_checkpoint"]).name
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        return folder / best if (folder / best).is_dir() else None
    return None


# ---- loading ----


def load_trained(trained: Trained) -> tuple[Any, Any]:
    """Return the model, on the accelerator if there is one, in evaluation mode, and its processor.

    It reads as its run read it: in the recipe's dtype, rounded to bfloat16 if the run was; a plain model in the dtype
    that it was saved in.

    Raises:
        ModelError: it cannot be loaded.
    """
    recipe = trained.recipe
    processor = load_processor(trained.path, trust_remote_code=_trusted(recipe))
    return _load(trained, trained.path, quantized=is_adapter(trained.path)), processor


def _load(trained: Trained, path: str, *, quantized: bool) -> Any:
    recipe = trained.recipe
    dtype = _saved_dtype(path) if recipe is None else recipe.model.dtype
    arguments = quantization(recipe) if recipe is not None and quantized else None
    model = load_model(path, dtype, arguments, trust_remote_code=_trusted(recipe))
    if trained.run is not None and (recorded_precision(str(trained.run)) or ("",))[0] == "bf16":
        round_weights(model)
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and arguments is None:  # quantised weights are there already
        model.to(device)
    return model.eval()


def load_reference(trained: Trained, model: Any) -> Reference | None:
    """Return the reference of ``model``, which ``trained`` names; None, said in one line, if there is none to show.

    If the adapter switched off is the reference, nothing is loaded; else a second model, if memory is left for it.
    """
    if trained.reference is None:
        logger.info("reference: none is known for a model that no run here made; it answers alone")
        return None
    fresh = trained.recipe is None or not is_adapter(trained.reference)
    if is_peft(model) and choose_kind("auto", model, None, fresh_adapter=fresh) == "adapter":
        off = partial(use_adapter, model, None)
        return Reference(model, off, f"{trained.reference}: the model with its adapter switched off")
    needed = sum(weight.nbytes for weight in model.parameters())
    free = free_bytes(model.device)
    if needed * 1.1 > free:
        logger.info(
            f"reference: not loaded, its weights take about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free"
        )
        return None
    try:
        reference = _load(trained, trained.reference, quantized=is_peft(model))
    except VlmpoError as error:
        logger.info(f"reference: it cannot be loaded, so the model answers alone. {error}")
        return None
    return Reference(reference, nullcontext, trained.reference)


def _trusted(recipe: Recipe | None) -> bool:
    return recipe is not None and recipe.model.trust_remote_code


def _saved_dtype(path: str) -> str:
    """Return the dtype that a plain model was saved in (of an adapter its base), float32 if that is not told."""
    try:
        dtype = AutoConfig.from_pretrained(named_base(path) or path).dtype
    except (OSError, ValueError, ImportError):  # loading the model says it better
        dtype = None
    return str(dtype if dtype in _DTYPES else torch.float32).removeprefix("torch.")


def place_of(trained: Trained) -> str:
    """Return the name that others know the model by: the path given, without a slash at its end."""
    return os.path.normpath(trained.path) if os.path.isdir(trained.path) else trained.path
