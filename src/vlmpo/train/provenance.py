"""What a run was made by: its settings under their recipe keys, kept in checkpoints and compared on resume.

A change of some settings would make the record of the run false, as its first steps were made otherwise: it is refused
unless the user names its key. All other changes are noted in the run's history.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vlmpo.errors import RecipeError, RecordError, RunError
from vlmpo.hashing import content_hash
from vlmpo.models.adapters import active_adapter, is_peft
from vlmpo.train.config import MPOConfig
from vlmpo.train.model_card import package_versions

Settings = dict[str, Any]  # JSON values by recipe key
Changes = dict[str, tuple[Any, Any]]  # before and now, by recipe key

# Fields of MPOConfig that a recipe has elsewhere than under `training`.
_KEYS = {
    "loss_weights": "loss.weights",
    **{name: f"loss.{name}" for name in ("beta", "reward_shift", "nll_reduction", "label_smoothing")},
    **{name: f"data.{name}" for name in ("max_length", "over_long", "max_tiles", "video_frames", "group_by_prompt")},
    **{name: f"data.{name}" for name in ("on_bad_record", "max_bad_share", "balance_ranks")},
    "reference_kind": "reference.kind",
    "reference_cache_dir": "reference.cache_dir",
    "attention": "model.attention",
    "kernels": "model.kernels",
}
# Fields that say nothing about what the run makes.
_PASSING = {"output_dir", "resume_from_checkpoint", "allow_changes", "local_rank", "logging_dir", "run_name"}
_MUST_STAY = {
    *("loss.weights", "loss.beta", "loss.reward_shift", "loss.nll_reduction", "loss.label_smoothing"),
    *("data.max_length", "data.over_long", "data.max_tiles", "data.video_frames", "data.group_by_prompt"),
    *("data.train.sources", "data.train.files", "data.train.pairs", "data.hold_out"),
    *("model.path", "model.dtype", "model.freeze", "model.quantize"),
    *("training.seed", "training.data_seed", "training.optim", "training.optim_args"),
    *("training.precision", "training.bf16", "training.fp16"),
    *("training.train_sampling_strategy", "training.dataloader_drop_last"),
}
# Their product is the global batch; under a running delta each of them counts.
_BATCH = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps", "ranks")
# DeepSpeed's engine brings back the rates it had; of the others vlmpo.train.checkpoint keeps what the run gave.
_RATES = {
    *("training.learning_rate", "training.weight_decay", "training.lr_scheduler_type", "training.warmup_steps"),
    *("training.adam_beta1", "training.adam_beta2", "training.adam_epsilon", "training.lr_scheduler_kwargs"),
}
_OWN_RATES = {"reduce_lr_on_plateau", "greedy"}  # schedules that keep their rates in the optimizer
_ADAPTER = (
    *("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "target_parameters", "bias"),
    *("use_rslora", "use_dora", "layers_to_transform", "rank_pattern", "alpha_pattern"),
)
_SHAPES = {"model.lora", "model.lora.r", "model.lora.target_modules", "model.lora.modules_to_save"}  # cannot be loaded
_SAMPLE = 64  # pairs that stand for a data set without files
_LONGEST = 80  # characters of a value in a message


def utc_now() -> str:
    """Return the time as manifests and histories have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# ---- what this run is made by ----


def run_settings(args: MPOConfig, model: Any, given: Mapping[str, Any]) -> Settings:
    """Return the settings of a run.

    Args:
        args: the trainer's settings.
        model: the policy; of its adapter the config counts.
        given: settings that the trainer does not know, e.g. ``data.train.files``; they go before those that it knows.
    """
    fields = {_KEYS.get(name, f"training.{name}"): value for name, value in args.to_dict().items()}
    settings = {key: value for key, value in fields.items() if key.removeprefix("training.") not in _PASSING}
    settings |= {f"versions.{name}": version for name, version in package_versions().items()}
    settings |= {"ranks": args.world_size, "model.lora": adapter_settings(model)}
    return json.loads(json.dumps(settings | dict(given), default=str))


def adapter_settings(model: Any) -> Settings | None:
    """Return what a policy's adapter is made by, None without one."""
    return _adapter_fields(model.peft_config[active_adapter(model)].to_dict()) if is_peft(model) else None


def identity(settings: Settings) -> Settings:
    """Return those settings that must stay."""
    return {key: value for key, value in settings.items() if key in {*_MUST_STAY, *_BATCH, *_RATES, "model.lora"}}


def _adapter_fields(config: Mapping[str, Any]) -> Settings:
    known = {name: config[name] for name in _ADAPTER if config.get(name)}
    fields = {name: sorted(value) if isinstance(value, set | list) else value for name, value in known.items()}
    return {**fields, "peft_type": str(getattr(config.get("peft_type"), "value", config.get("peft_type")))}


def pairs_hash(dataset: Any) -> str:
    """Return the number of pairs and a hash of the texts of some of them, evenly spaced, in their order."""
    count = len(dataset)
    texts = []
    for index in range(0, count, max(1, count // _SAMPLE)):
        try:
            pair = dataset[index]
            texts += [*(message.text for message in pair.prompt), pair.chosen, pair.rejected or ""]
        except RecordError as error:
            texts.append(error.reason)
    return f"{count} pairs, {content_hash(json.dumps(texts), size=8)}"


# ---- what a checkpoint was made by ----


def settings_of(checkpoint: Path, state: Mapping[str, Any]) -> Settings:
    """Return the settings in a checkpoint's ``state``; of one of vlmpo 0.1 what its files tell of its adapter."""
    recorded = state.get("settings")
    if isinstance(recorded, dict):
        return recorded
    configs = sorted(checkpoint.glob("adapter_config.json")) or sorted(checkpoint.glob("*/adapter_config.json"))
    try:
        if configs:
            return {"model.lora": _adapter_fields(json.loads(configs[0].read_bytes()))}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise RunError(f"{checkpoint} is damaged: {configs[0].name} is no adapter's config") from error
    return {"model.lora": None} if (checkpoint / "config.json").is_file() else {}


def precision_of(settings: Settings) -> str | None:
    """Return the precision that ``settings`` tell, also those made before there was a choice; None: they tell none."""
    if "training.precision" in settings:
        return str(settings["training.precision"])
    if "training.bf16" not in settings:
        return None
    return "autocast" if settings["training.bf16"] or settings.get("training.fp16") else "float32"


# ---- comparing ----


def changes(before: Settings, now: Settings) -> Changes:
    """Return what differs between the settings that both have, an adapter's by its single fields."""
    found: Changes = {}
    made_in = precision_of(before)
    if made_in == "float32" and now.get("training.precision") not in ("bf16", "autocast"):
        made_in = now.get("training.precision")  # before there was a choice, weights of another type counted as these
    if made_in is not None:
        before = {"training.precision": made_in, **before}
    for key in sorted(before.keys() & now.keys() - {"recipe"}):  # its parts are there under their own keys
        old, new = before[key], now[key]
        if key == "model.lora" and isinstance(old, dict) and isinstance(new, dict):
            fields = sorted(old.keys() | new.keys())
            found |= {f"{key}.{name}": (old.get(name), new.get(name)) for name in fields}
        else:
            found[key] = (old, new)
    return {key: pair for key, pair in found.items() if pair[0] != pair[1]}


def refuse_changes(
    found: Changes, before: Settings, now: Settings, *, where: str, allowed: Collection[str], deepspeed: bool = False
) -> None:
    """Raise RunError if a change would make the record of the run false and is not ``allowed``.

    Args:
        found: from :func:`changes`.
        before, now: the settings compared.
        where: the checkpoint or manifest that holds the former.
        allowed: keys that may differ; each stands for the keys below it too.
        deepspeed: whether DeepSpeed loads the optimizer, with the rates it had.

    Raises:
        RecipeError: a key of ``allowed`` that no setting has.
    """
    known = {*now, *(f"model.lora.{name}" for name in _ADAPTER)}
    for key in allowed:
        if not any(name == key or name.startswith(f"{key}.") for name in known):
            near = get_close_matches(key, [name for name in known if _must_stay(name, now, now)], n=1)
            raise RecipeError(f"--allow-changes: no setting is called {key!r}" + (f"; {near[0]}?" if near else ""))
    refused = {
        key: pair
        for key, pair in found.items()
        if (_must_stay(key, before, now) or (deepspeed and key in _RATES))
        and (key in _SHAPES or not any(key == name or key.startswith(f"{name}.") for name in allowed))
    }
    if refused:
        keys = ",".join(key for key in refused if key not in _SHAPES)
        remedy = f"; to go on all the same, and have it noted: --allow-changes {keys}" if keys else ""
        raise RunError(
            f"{where} was made with other settings: {describe(refused)}. Set them back, or start a new run in another "
            f"training.output_dir{remedy}"
        )


def describe(found: Changes) -> str:
    """Return changes as one line."""
    return "; ".join(f"{key}: {_short(old)} -> {_short(new)}" for key, (old, new) in found.items())


def _must_stay(key: str, before: Settings, now: Settings) -> bool:
    if key in _BATCH:
        return now.get("loss.reward_shift") == "running" or _global_batch(before) != _global_batch(now)
    if key == "training.lr_scheduler_type":
        return bool({before.get(key), now.get(key)} & _OWN_RATES)
    if key in _RATES:
        return before.get("training.lr_scheduler_type") in _OWN_RATES
    return key in _MUST_STAY or key == "model.lora" or key.startswith("model.lora.")


def _global_batch(settings: Settings) -> int | None:
    try:
        sizes = [int(settings[key]) for key in _BATCH]
    except (KeyError, TypeError, ValueError):
        return None
    return sizes[0] * sizes[1] * sizes[2]


def _short(value: Any) -> str:
    if isinstance(value, dict) and "peft_type" in value:
        return f"an adapter ({value['peft_type']}, r {value.get('r')})"
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
