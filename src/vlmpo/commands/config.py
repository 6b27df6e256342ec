"""MPOConfig of a recipe, to train and to evaluate."""

from __future__ import annotations

import dataclasses
import re
from difflib import get_close_matches

from transformers import TrainingArguments

from vlmpo.errors import RecipeError
from vlmpo.recipe import EXTRA_TRAINING_KEYS, Recipe, check_keys
from vlmpo.train.arguments import refuse_missing_deepspeed
from vlmpo.train.config import MPOConfig

# Keys of `training` that have no meaning in an evaluation without training.
_TRAINING_ONLY = (
    *("eval_strategy", "save_strategy", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("push_to_hub", "learning_rates", "ema_decay", "resume_from_checkpoint", "use_liger_kernel"),
)

# Keys under which transformers takes settings, or the name of a JSON file with them.
_FILES = ("accelerator_config", "fsdp_config", "deepspeed")


def training_config(recipe: Recipe) -> MPOConfig:
    """Return the MPOConfig of a recipe.

    Raises:
        RecipeError: an unknown key, a token for the Hub, a value that MPOConfig or TrainingArguments refuse, or
            DeepSpeed without its package.
    """
    check_training_keys(recipe)
    if recipe.training.get("hub_token") is not None:
        raise RecipeError(
            "training.hub_token: a recipe is kept in the run folder and pushed with it; "
            "log in with `hf auth login`, or set HF_TOKEN"
        )
    for key in _FILES:
        if isinstance(recipe.training.get(key), bool | int | float):  # a number would be taken for an open file
            raise RecipeError(f"training.{key}: expected settings or a JSON file, got {recipe.training[key]!r}")
    refuse_missing_deepspeed(recipe.training.get("deepspeed"))
    try:
        return MPOConfig(**recipe.trainer_settings())
    except (ValueError, TypeError, AttributeError, ImportError, OSError) as error:
        message = " ".join(str(error).split())
        raise RecipeError(_unknown_choice(recipe, message) or f"training: {message}") from error


def _unknown_choice(recipe: Recipe, message: str) -> str | None:
    """Return what to say of a value that is none of transformers' choices: its ``message`` lists them, but no key."""
    match = re.fullmatch(r"(.+) is not a valid \w+, please select one of \[(.+)\]", message)
    key = match and next((key for key, value in recipe.training.items() if str(value) == match[1]), None)
    if not match or key is None:
        return None
    known = match[2].replace("'", "").split(", ")
    near = get_close_matches(match[1], known, n=1)
    hint = f"did you mean {near[0]}? Known are" if near else "known are"
    return f"training: {key} cannot be {match[1]!r}; {hint} {', '.join(known)}"


def evaluation_config(recipe: Recipe) -> MPOConfig:
    """Return the MPOConfig to evaluate with, without training. Raises RecipeError like :func:`training_config`."""
    training = {key: value for key, value in recipe.training.items() if key not in _TRAINING_ONLY}
    return training_config(recipe.model_copy(update={"training": training}))


def check_training_keys(recipe: Recipe) -> None:
    """Raise RecipeError for a key under ``training`` that neither transformers nor vlmpo has."""
    known = [*(field.name for field in dataclasses.fields(TrainingArguments)), *EXTRA_TRAINING_KEYS]
    check_keys("training", recipe.training, known, "transformers.TrainingArguments")
