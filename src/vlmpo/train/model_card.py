"""The model card of a run: what was trained, on what, how, and what came of it. Names only: no path, no secret."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml

from vlmpo import compat
from vlmpo.models.adapters import is_peft, unwrap_peft
from vlmpo.train.citations import citations, method
from vlmpo.train.counts import PairCounts
from vlmpo.train.reference import AdapterReference

if TYPE_CHECKING:
    from vlmpo.train.trainer import MPOTrainer as ChoosingTrainer

CARD_FILE = "README.md"
_TEMPLATE = "model_card.md.jinja"
_PACKAGES = ("vlmpo", "torch", "torchvision", "transformers", "accelerate", "peft", "datasets", "tokenizers", "pillow")
_PROGRESS = ("loss", "loss/sigmoid", "loss/bco_pair", "loss/nll", "rewards/accuracies", "rewards/margins")
_INTERVALS = (("rewards/accuracies", "{:.3f} [{:.3f}, {:.3f}]"), ("rewards/margins", "{:+.3f} [{:+.3f}, {:+.3f}]"))


@dataclass
class RunSummary:
    """What a trainer does not know of its run by itself.

    Attributes:
        base_model: path or Hub name; None: as the model's config has it.
        data: by data set, ``read``, ``used``, ``held_out``, ``dropped`` by reason, ``not_reached``; None: from
            ``pair_counts``.
        datasets: data sets as the recipe names them; those that are Hub names go into the metadata.
        results: metrics of each evaluation set after training, by its name, which is their prefix.
        pair_counts: of the pairs training met.
    """

    base_model: str | None = None
    data: Mapping[str, Mapping[str, Any]] | None = None
    datasets: Sequence[str] = ()
    results: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    pair_counts: PairCounts = field(default_factory=PairCounts)


def package_versions() -> dict[str, str | None]:
    """Python and the packages a run rests on; None: not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hub_name(path: str | None) -> str | None:
    """``path`` if it is a name on the Hub, ``owner/name``, and nothing on this disk."""
    if path is None or os.path.exists(path) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        return None
    return None if re.search(r"\.(jsonl?|parquet|ya?ml|csv|txt)(\.gz)?$", path) else path


def model_card(
    trainer: ChoosingTrainer, given: Mapping[str, Any], title: str | None = None, base_model: str | None = None
) -> str:
    """The card as Markdown with its YAML head.

    Args:
        trainer: a trainer whose training is over; its ``facts`` are told too.
        given: metadata from outside (``license``, ``language``, ``datasets``, ``tags``); empty values stay out.
        title, base_model: instead of the run folder's name and of what the facts say.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(files("vlmpo.train").joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    base = base_model or trainer.facts.base_model or compat.name_or_path(unwrap_peft(trainer.model).config)
    base = hub_name(base) or (Path(base).name if base else None)
    final = trainer.final_model()
    return template.render(
        metadata=yaml.safe_dump(_metadata(trainer, given, hub_name(base)), sort_keys=True, allow_unicode=True),
        title=title or Path(trainer.args.output_dir).absolute().name,
        base_model=base,
        versions=package_versions(),
        weights_remark=_weights_remark(final),
        ema=final.get("ema"),
        citations=citations(trainer.args.weights),
        **_loading(trainer, base),
        **_objective(trainer, base),
        **_data_and_training(trainer),
        **_results(trainer),
    )


# ---- head and loading ----


def _metadata(trainer: ChoosingTrainer, given: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    adapter, (_, _, tags) = is_peft(trainer.model), method(trainer.args.weights)
    more = [given["tags"]] if isinstance(given.get("tags"), str) else list(given.get("tags") or ())
    datasets = given.get("datasets") or [name for name in map(hub_name, trainer.facts.datasets) if name]
    head = {
        "base_model": base,
        "base_model_relation": ("adapter" if adapter else "finetune") if base else None,
        "datasets": [datasets] if isinstance(datasets, str) else datasets,
        "language": given.get("language"),
        "library_name": "peft" if adapter else "transformers",
        "license": given.get("license"),
        "pipeline_tag": "image-text-to-text" if _reads_images(trainer) else "text-generation",
        "tags": list(dict.fromkeys(["vlmpo", *tags, *(["lora"] if adapter else []), *more])),
    }
    return {key: value for key, value in head.items() if value}


def _reads_images(trainer: ChoosingTrainer) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return unwrap_peft(trainer.model).config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _loading(trainer: ChoosingTrainer, base: str | None) -> dict[str, Any]:
    processor = "AutoProcessor" if hasattr(trainer.processing_class, "tokenizer") else "AutoTokenizer"
    return {
        "adapter": is_peft(trainer.model),
        "auto_class": "AutoModelForImageTextToText" if _reads_images(trainer) else "AutoModelForCausalLM",
        "auto_processor": processor,
        "where": getattr(trainer, "hub_model_id", None) or Path(trainer.args.output_dir).absolute().name,
        "sentence": f"{f'`{base}`' if base else 'A model'} trained with {method(trainer.args.weights)[1]}.",
    }


def _weights_remark(final: Mapping[str, Any]) -> str:
    if final["checkpoint"] is None:
        return f"The weights are those of the last optimizer step, {final['step']}."
    ((metric, value),) = final["best_by"].items()
    return f"The weights are those of optimizer step {final['step']}, the best checkpoint by `{metric}` ({value:.4g})."


# ---- objective, data, training ----


def _objective(trainer: ChoosingTrainer, base: str | None) -> dict[str, Any]:
    args, weights = trainer.args, trainer.args.weights
    lines = []
    if "sigmoid" in weights or "bco_pair" in weights:
        reference = "a frozen model"
        if isinstance(own := getattr(trainer, "reference", None), AdapterReference):
            reference = "the model with its adapter off" if own.frozen is None else "the model under its first adapter"
        lines.append(f"rewards: beta {args.beta:g}, against {reference}")
    if "bco_pair" in weights:
        lines.append(f"reward shift (delta): {args.reward_shift}")
    if "nll" in weights:
        lines.append(f"nll reduction: {args.nll_reduction}")
    if "sigmoid" in weights and args.label_smoothing:
        lines.append(f"label smoothing: {args.label_smoothing:g}")
    name = method(weights)[1]
    return {
        "objective": f"{name[0].upper()}{name[1:]}: the weighted sum of these terms, each a mean over the optimizer "
        "step's global batch.",
        "loss_weights": {name: f"{weight:g}" for name, weight in weights.items()},
        "loss_settings": lines,
    }


def _data_and_training(trainer: ChoosingTrainer) -> dict[str, Any]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    first, last = (logs[0], logs[-1]) if logs else ({}, {})
    names = [name for name in _PROGRESS if name in first and name in last]
    return {
        "data": list(_data_rows(trainer.facts)),
        "settings": [(name, _cell(value)) for name, value in _settings(trainer)],
        "progress": [(name, f"{first[name]:.4f}", f"{last[name]:.4f}") for name in names],
        "first_step": first.get("step"),
        "last_step": last.get("step"),
    }


def _data_rows(facts: RunSummary) -> Iterator[dict[str, Any]]:
    sets = facts.data
    if sets is None:
        known = facts.pair_counts.to_json()
        names = sorted({*known["used"], *known["dropped"]})
        sets = {n: {"used": known["used"].get(n, 0), "dropped": known["dropped"].get(n, {})} for n in names}
    for name, counts in sets.items():
        dropped = sum(counts["dropped"].values())
        yield {
            "name": _cell(name),
            "read": counts.get("read", "not counted"),
            "used": counts["used"],
            "held_out": counts.get("held_out", "not counted"),
            "dropped": dropped,
            "not_reached": counts.get("not_reached", "not counted"),
            "reasons": ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items()),
        }


def _settings(trainer: ChoosingTrainer) -> Iterator[tuple[str, Any]]:
    args, state = trainer.args, trainer.state
    batch = compat.batch_size_per_device(trainer) * args.gradient_accumulation_steps * args.world_size
    yield "global batch", f"{batch} pairs ({args.world_size} ranks)" if args.world_size > 1 else f"{batch} pairs"
    yield "optimizer steps", state.global_step
    yield "epochs", f"{state.epoch or 0.0:.4g}"
    yield "learning rate", f"{args.learning_rate:g}"
    for part, rate in (args.learning_rates or {}).items():
        yield f"learning rate, {part}", f"{rate:g}"
    yield "schedule", f"{args.lr_scheduler_type.value}, warm-up {args.warmup_steps:g} {_warmup_unit(args)}"
    yield "optimizer", f"{args.optim.value}, weight decay {args.weight_decay:g}"
    yield "gradient clipping", f"norm {args.max_grad_norm:g}" if args.max_grad_norm > 0 else "none"
    kept = next((p.dtype for p in trainer.model.parameters() if p.requires_grad), None)
    yield "trained weights kept in", str(kept).removeprefix("torch.")
    yield "mixed precision", "bfloat16" if args.bf16 else "float16" if args.fp16 else "none"
    for part, (every, trained) in trainer.parameter_counts.items():
        yield f"parameters, {part}", f"{trained:,} trained of {every:,}"
    if is_peft(trainer.model):
        yield "adapter", _adapter(trainer.model)
    yield "longest pair", "no limit" if args.max_length is None else f"{args.max_length} tokens, else {args.over_long}"
    yield "tiles", f"at most {args.max_tiles} a pair"
    yield "prompt shared between responses", "yes" if getattr(trainer, "shared", False) else "no"
    yield "seed", args.seed


def _warmup_unit(args: Any) -> str:
    return "of all steps" if 0 < args.warmup_steps < 1 else "steps"


def _adapter(model: Any) -> str:
    config = model.peft_config[model.active_adapter]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    names = config.target_modules
    targets = names if isinstance(names, str) else ", ".join(sorted(names or ()))
    if getattr(config, "lora_alpha", None) is None:  # an adapter that is not LoRA's
        return f"{kind}, on {targets}"
    return f"{kind}, rank {config.r}, alpha {config.lora_alpha:g}, on {targets}"


# ---- results ----


def _results(trainer: ChoosingTrainer) -> dict[str, Any]:
    rows = [row for name, metrics in trainer.facts.results.items() for row in _result_rows(name, metrics)]
    return {"results": rows, "answers": _answers(trainer)}


def _result_rows(name: str, metrics: Mapping[str, float]) -> Iterator[list[str]]:
    prefix = f"{name}_pairs/"
    sources = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]
    for label, suffix in [("all", ""), *((source, f"/{source}") for source in sources)]:
        loss = metrics.get(f"{name}_loss{suffix}")
        figures = [_with_interval(metrics, f"{name}_{key}", suffix, form) for key, form in _INTERVALS]
        pairs = f"{int(metrics[f'{name}_pairs{suffix}'])}"
        yield [_cell(name), _cell(label), pairs, "" if loss is None else f"{loss:.4f}", *figures]


def _with_interval(metrics: Mapping[str, float], name: str, suffix: str, form: str) -> str:
    values = [metrics.get(f"{name}{bound}{suffix}") for bound in ("", "_low", "_high")]
    return "" if None in values else form.format(*values)


def _answers(trainer: ChoosingTrainer) -> dict[str, Any] | None:
    """Figures of the questions asked while training: at the final weights' step, else the last time."""
    asked = [entry for entry in trainer.state.log_history if entry.get("eval_answers/items")]
    if not asked:
        return None
    found = next((entry for entry in asked if entry["step"] == trainer.final_step), asked[-1])
    accuracy = "{:.3f} [{:.3f}, {:.3f}]".format(*(found[f"eval_answers/{key}"] for key in ("accuracy", "low", "high")))
    unparsed = f"{found['eval_answers/unparsed']:.1%}"
    return {
        "questions": int(found["eval_answers/items"]),
        "step": found["step"],
        "accuracy": accuracy,
        "unparsed": unparsed,
    }


def _cell(value: Any) -> str:
    """``value`` on one line of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")
