"""Write the model card of a run: what was trained, on what, how, and with which results.

It holds names, but no secret, and no path but the run folder's below the working directory.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml

from vlmpo import compat, torchvision_shim
from vlmpo.fileio import replace_text
from vlmpo.log import shown
from vlmpo.models.adapters import is_peft, unwrap_peft
from vlmpo.train.reference import AdapterReference

CARD_FILE = "README.md"
_PACKAGES = (
    *("vlmpo", "torch", "torchvision", "transformers", "accelerate", "peft", "datasets", "tokenizers", "pillow"),
    "liger-kernel",
)
_PROGRESS = ("loss", "loss/sigmoid", "loss/bco_pair", "loss/nll", "rewards/accuracies", "rewards/margins")
_INTERVALS = (("rewards/accuracies", "{:.3f} [{:.3f}, {:.3f}]"), ("rewards/margins", "{:+.3f} [{:+.3f}, {:+.3f}]"))

# By the terms that are on: the objective's name, and tags. It is MPO only with all three.
OBJECTIVES: dict[frozenset[str], tuple[str, list[str]]] = {
    frozenset({"sigmoid", "bco_pair", "nll"}): ("Mixed Preference Optimization (MPO)", ["mpo"]),
    frozenset({"sigmoid", "nll"}): ("Direct Preference Optimization with an NLL term (DPO+)", ["dpo"]),
    frozenset({"sigmoid"}): ("Direct Preference Optimization (DPO)", ["dpo"]),
    frozenset({"bco_pair", "nll"}): ("Binary Classifier Optimization with an NLL term (BCO+)", ["bco"]),
    frozenset({"bco_pair"}): ("Binary Classifier Optimization (BCO)", ["bco"]),
    frozenset({"sigmoid", "bco_pair"}): ("a mix of DPO and BCO without an NLL term", ["dpo", "bco"]),
    frozenset({"nll"}): ("supervised fine-tuning (SFT)", ["sft"]),
}


@dataclass(kw_only=True)
class RunSummary:
    """Holds everything that the model card states of a run.

    Attributes:
        title: of the card.
        location: the model's name on the Hub, or else the folder that it is loaded from.
        base_model: path or Hub name of the model that training started from, if known.
        adapter: whether the result is an adapter.
        reads_images: whether the model is an image-text-to-text model.
        processor_class: the class that loads its processor.
        weights, beta, reward_shift, nll_reduction, label_smoothing: settings of the objective.
        reference: what the rewards are measured against.
        settings: rows of the table of settings.
        log_history: what was logged while training.
        final_step: the optimizer step of the final weights.
        best_by: the metric by which they were chosen and its value; None: they are those of the last step.
        ema: ``decay`` and ``step`` of the averaged weights, if there are any.
        data: by data set, ``used`` and ``dropped`` (by reason) and, if counted, ``read``, ``held_out``,
            ``not_reached``.
        datasets: names of the data sets; those on the Hub go into the metadata.
        results: metrics of each evaluation set after training, by its name, which is their prefix.
        with_shim: whether torchvision needs vlmpo's help to load beside this torch.
    """

    title: str
    location: str
    base_model: str | None
    adapter: bool
    reads_images: bool
    processor_class: str
    weights: Mapping[str, float]
    beta: float
    reward_shift: str
    nll_reduction: str
    label_smoothing: float
    reference: str
    settings: Sequence[tuple[str, Any]]
    log_history: Sequence[Mapping[str, Any]]
    final_step: int
    best_by: tuple[str, float] | None = None
    ema: Mapping[str, Any] | None = None
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    datasets: Sequence[str] = ()
    results: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    with_shim: bool = False


def package_versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages a run depends on; None if one is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def hub_name(path: str | None) -> str | None:
    """Return ``path`` if it is a name on the Hub, ``owner/name``, and not a path on this disk; else None."""
    if path is None or os.path.exists(path) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        return None
    return None if re.search(r"\.(jsonl?|parquet|ya?ml|csv|txt)(\.gz)?$", path) else path


def model_card(run: RunSummary, given: Mapping[str, Any]) -> str:
    """Return the card as Markdown with a YAML head.

    Args:
        run: the run, which is over.
        given: further metadata (``license``, ``language``, ``datasets``, ``tags``); empty values are left out.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"cell": _cell, "name": _name, "code": _code, "literal": _literal}
    template = environment.from_string(files("vlmpo.train").joinpath("model_card.md.jinja").read_text(encoding="utf-8"))
    logs = [entry for entry in run.log_history if "loss" in entry] or [{}]
    first, last = logs[0], logs[-1]
    return template.render(
        run=run,
        metadata=yaml.safe_dump(_metadata(run, given), sort_keys=True, allow_unicode=True),
        location_is_local=hub_name(run.location) is None,
        base_is_local=run.base_model is not None and hub_name(run.base_model) is None,
        base_model=hub_name(run.base_model) or (Path(run.base_model).name if run.base_model else None),
        auto_class="AutoModelForImageTextToText" if run.reads_images else "AutoModelForCausalLM",
        objective=OBJECTIVES[frozenset(run.weights)][0],
        progress=[(name, first[name], last[name]) for name in _PROGRESS if name in first and name in last],
        first_step=first.get("step"),
        last_step=last.get("step"),
        results=_results(run),
        versions=package_versions(),
    )


def _metadata(run: RunSummary, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the head's values; keys as the Hub defines them."""
    base, (_, tags) = hub_name(run.base_model), OBJECTIVES[frozenset(run.weights)]
    datasets, more_tags = given.get("datasets"), given.get("tags") or ()
    tags = ["vlmpo", *tags, *(["lora"] if run.adapter else [])]
    tags += [more_tags] if isinstance(more_tags, str) else more_tags
    head = {
        "base_model": base,
        "base_model_relation": ("adapter" if run.adapter else "finetune") if base else None,
        "datasets": [datasets] if isinstance(datasets, str) else datasets or list(filter(hub_name, run.datasets)),
        "language": given.get("language"),
        "library_name": "peft" if run.adapter else "transformers",
        "license": given.get("license"),
        "pipeline_tag": "image-text-to-text" if run.reads_images else "text-generation",
        "tags": list(dict.fromkeys(tags)),
    }
    return {key: value for key, value in head.items() if value}


# ---- results ----

_PARTS = ("none", "pairs", "answers")  # of the results, each between two marks, so that it can be replaced
_ABOUT_REWARDS = (
    "On held-out pairs, with 95 % intervals. Accuracy: how often the chosen response's implicit reward is above the "
    "rejected one's; margin: the mean difference of the two."
)


def update_results(folder: Path, pairs: Mapping[str, Mapping[str, float]], answers: Mapping[str, Any] | None) -> bool:
    """Put the figures of a later evaluation into the card in ``folder``, in the place of those that are there.

    Args:
        folder: the model's.
        pairs: metrics of each evaluation set; empty leaves what the card says of pairs.
        answers: ``items``, ``accuracy``, ``low``, ``high`` and ``unparsed`` of the answers to questions; ``against``,
            a sentence on another model, or nothing. None leaves what the card says of questions.

    Returns:
        Whether there is such a card, of vlmpo's making.
    """
    file = folder / CARD_FILE
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    if any(text.count(mark) != 1 for part in _PARTS for mark in _marks(part)):
        return False
    new = {"none": "", "pairs": _pairs_text(pairs), "answers": "" if answers is None else _answers_text(answers)}
    for part, found in new.items():
        if found or part == "none":
            before, rest = text.split(_marks(part)[0], 1)
            text = before + _marked(part, found) + rest.split(_marks(part)[1], 1)[1]
    replace_text(file, text)
    return True


def _results(run: RunSummary) -> str:
    answers = _answers(run)
    pairs = _pairs_text(run.results)
    texts = {
        "none": "" if pairs or answers else "No evaluation was asked for.",
        "pairs": pairs,
        "answers": "" if answers is None else _answers_text(answers),
    }
    return "\n".join(_marked(part, texts[part]) for part in _PARTS)


def _marks(part: str) -> tuple[str, str]:
    return f"<!-- vlmpo {part} -->", f"<!-- end of vlmpo {part} -->"


def _marked(part: str, text: str) -> str:
    start, end = _marks(part)
    return f"{start}\n\n{text}\n\n{end}" if text else f"{start}\n{end}"


def _pairs_text(results: Mapping[str, Mapping[str, float]]) -> str:
    rows = [row for name, metrics in results.items() for row in _result_rows(name, metrics)]
    if not rows:
        return ""
    with_rewards = any(row[-1] for row in rows)
    head = ["evaluation set", "data set", "pairs", "loss", "reward accuracy", "reward margin"]
    table = [head, ["---"] * len(head), *rows]
    lines = [_ABOUT_REWARDS if with_rewards else "On held-out examples.", ""]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in table)])


def _answers_text(answers: Mapping[str, Any]) -> str:
    when = f" at step {answers['step']}" if "step" in answers else ""
    accuracy = "{accuracy:.3f} [{low:.3f}, {high:.3f}]".format(**answers)
    text = f"Greedy answers to {int(answers['items'])} questions{when}: accuracy {accuracy}, "
    return f"{text}unparsed {100 * answers['unparsed']:.1f}%.{answers.get('against') or ''}"


def compared(name: str, figures: Mapping[str, float], comparison: Mapping[str, float]) -> str:
    """Return a sentence on a second model that answered the same questions; "" if both answered none.

    Args:
        name: of the second model.
        figures: of its answers.
        comparison: see :func:`vlmpo.evaluate.compare`.
    """
    if not comparison.get("items") or not figures.get("items"):
        return ""
    difference = "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**comparison)
    return f" {_name(name)} has {figures['accuracy']:.3f}; the difference is {difference}."


def _result_rows(name: str, metrics: Mapping[str, float]) -> Iterator[list[str]]:
    """Yield a row for the whole evaluation set and one for each of its data sets, if there are several."""
    prefix = f"{name}_pairs/"
    sources = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]
    for label, suffix in [("all", ""), *((source, f"/{source}") for source in sources)]:
        loss = metrics.get(f"{name}_loss{suffix}")
        row = [
            _name(name),
            _name(label),
            str(int(metrics[f"{name}_pairs{suffix}"])),
            "" if loss is None else f"{loss:.4f}",
        ]
        for metric, form in _INTERVALS:
            values = [metrics.get(f"{name}_{metric}{bound}{suffix}") for bound in ("", "_low", "_high")]
            row.append("" if None in values else form.format(*values))
        yield row


def _answers(run: RunSummary) -> Mapping[str, Any] | None:
    """Return the logged metrics of answers to questions: those of the final weights' step, else the last ones."""
    logged = [entry for entry in run.log_history if entry.get("eval_answers/items")]
    entry = next((entry for entry in logged if entry["step"] == run.final_step), logged[-1] if logged else None)
    if entry is None:
        return None
    prefix = "eval_answers/"
    return {"step": entry["step"], **{k.removeprefix(prefix): v for k, v in entry.items() if k.startswith(prefix)}}


def _cell(value: Any) -> str:
    """Put ``value`` on one line of a Markdown table."""
    return shown(" ".join(str(value).split())).replace("|", "\\|").replace("<", "\\<")


def _name(value: Any) -> str:
    """Put a name from data on one line, none of it read as Markdown or HTML."""
    return re.sub(r"([\\`*\[\]<>|&~]|^[#+-])", r"\\\1", shown(" ".join(str(value).split())))


def _code(value: Any) -> str:
    """Put a name on one line as inline code; one that could end it, or that holds a mark, as escaped text."""
    text = shown(" ".join(str(value).split()))
    return _name(value) if "`" in text or "<!--" in text else f"`{text}`"


def _literal(value: Any) -> str:
    """Write a name as a Python string, on one line; no backtick ends the block of code, and none is read as a mark."""
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("`", "\\x60")
    escaped = escaped.replace("<!--", "<\\x21--")
    return f'"{shown(escaped)}"'


# ---- fields of the summary ----


def location_of(folder: str | os.PathLike[str]) -> str:
    """Return what a model's folder is loaded by: its path as given from the working directory, or else its name."""
    whole = Path(folder).absolute()
    below = not Path(folder).is_absolute() and ".." not in Path(folder).parts and whole != Path.cwd()
    return Path(folder).as_posix() if below else whole.name


def objective_fields(args: Any) -> dict[str, Any]:
    """Return the fields of RunSummary that the run's MPOConfig gives."""
    names = ("weights", "beta", "reward_shift", "nll_reduction", "label_smoothing")
    return {"title": Path(args.output_dir).absolute().name, **{name: getattr(args, name) for name in names}}


def describe_model(model: Any, processor: Any, reference: Any) -> dict[str, Any]:
    """Return the fields of RunSummary that policy, processor and reference give."""
    config = unwrap_peft(model).config
    return {
        "with_shim": torchvision_shim.is_in_use(),
        "base_model": compat.name_or_path(config),
        "adapter": is_peft(model),
        "reads_images": compat.is_image_text_config(config),
        "processor_class": "AutoProcessor" if hasattr(processor, "tokenizer") else "AutoTokenizer",
        "reference": reference.words if isinstance(reference, AdapterReference) else "a frozen model",
    }


def training_settings(
    args: Any,
    *,
    per_device: int,
    state: Any,
    model: Any,
    parameter_counts: Mapping[str, tuple[int, int]],
    shared: bool,
    tiles: int,
    precision: str,
) -> list[tuple[str, Any]]:
    """Return the rows of the table of settings.

    Args:
        args: the run's MPOConfig.
        per_device: pairs in a batch of one rank.
        state: transformers' TrainerState at the end of training.
        model: the policy.
        parameter_counts: numbers of (all, trained) parameters by part.
        shared: whether responses share their prompt.
        tiles: most tiles of a pair without a bound of its own.
        precision: that the model was trained in.
    """
    half = "float16" if args.mixed_precision == "fp16" else "bfloat16"
    mixed = {"bf16": "bfloat16, over float32 weights", "autocast": f"{half}, by autocast"}.get(precision, "none")
    pairs_per_step = per_device * args.gradient_accumulation_steps * args.world_size
    weights_dtype = next((p.dtype for p in model.parameters() if p.requires_grad), None)
    adapter = model.peft_config[model.active_adapter] if is_peft(model) else None
    ranks = f" ({args.world_size} ranks)" if args.world_size > 1 else ""
    unit = "of all steps" if 0 < args.warmup_steps < 1 else "steps"
    limit = "no limit" if args.max_length is None else f"{args.max_length} tokens, else {args.over_long}"
    return [
        ("global batch", f"{pairs_per_step} pairs{ranks}"),
        ("optimizer steps", state.global_step),
        ("epochs", f"{state.epoch or 0.0:.4g}"),
        ("learning rate", f"{args.learning_rate:g}"),
        *((f"learning rate, {part}", f"{rate:g}") for part, rate in (args.learning_rates or {}).items()),
        ("schedule", f"{args.lr_scheduler_type.value}, warm-up {args.warmup_steps:g} {unit}"),
        ("optimizer", f"{args.optim.value}, weight decay {args.weight_decay:g}"),
        ("gradient clipping", f"norm {args.max_grad_norm:g}" if args.max_grad_norm > 0 else "none"),
        ("trained weights kept in", str(weights_dtype).removeprefix("torch.")),
        ("mixed precision", mixed),
        *((f"parameters, {part}", f"{trained:,} trained of {n:,}") for part, (n, trained) in parameter_counts.items()),
        *([] if adapter is None else [("adapter", describe_adapter(adapter))]),
        ("longest pair", limit),
        ("tiles", f"at most {tiles} a pair" + (", the processor's own bound" if args.max_tiles is None else "")),
        ("prompt shared between responses", "yes" if shared else "no"),
        ("seed", args.seed),
    ]


def describe_adapter(config: Any) -> str:
    """Return kind, rank and place of an adapter, by its PEFT configuration."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    names = config.target_modules
    targets = names if isinstance(names, str) else ", ".join(sorted(names or ()))
    if getattr(config, "lora_alpha", None) is None:  # no LoRA
        return f"{kind}, on {targets}"
    return f"{kind}, rank {config.r}, alpha {config.lora_alpha:g}, on {targets}"
