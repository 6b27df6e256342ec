"""One run, from recipe to run folder: ``vlmpo train``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from transformers import TrainingArguments

from vlmpo.commands.adapter_settings import check_adapter_settings, lora_config, quantization
from vlmpo.commands.run_data import RunData, open_run_data, overlaps_with_training, show_pair_counts
from vlmpo.data.index.overlap import Overlap
from vlmpo.errors import RecipeError, RunError, alike_on_a_node
from vlmpo.fileio import replace_json
from vlmpo.log import logger
from vlmpo.loss import needs_reference
from vlmpo.models import loading
from vlmpo.models.adapters import is_peft
from vlmpo.recipe import Recipe, check_training_keys
from vlmpo.recipe_yaml import dump_recipe
from vlmpo.train.cached_reference import CachedReference
from vlmpo.train.checkpoint import last_complete_checkpoint
from vlmpo.train.config import MPOConfig
from vlmpo.train.counts import PairCounts
from vlmpo.train.ema import AVERAGE_FOLDER
from vlmpo.train.metrics import length_warning, without_set_name
from vlmpo.train.model_card import package_versions
from vlmpo.train.sharding import is_partitioned
from vlmpo.train.trainer import MPOTrainer

_SHOWN = ("accuracies", "accuracies_low", "accuracies_high", "margins", "margins_low", "margins_high")
# Of `training`, what has no part in an evaluation by itself.
_TRAINING_ONLY = (
    *("eval_strategy", "save_strategy", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("push_to_hub", "learning_rates", "ema_decay", "resume_from_checkpoint"),
)

Prepare = Callable[[MPOTrainer], None]


def train(recipe: Recipe, prepare: Prepare | None = None) -> MPOTrainer:
    """Train as ``recipe`` says; the run folder is ``training.output_dir``.

    Args:
        recipe: the run.
        prepare: called with the trainer before it starts, to hang further evaluations on it.

    Raises:
        VlmpoError: the recipe, the data, the model or the run folder is at fault.
    """
    args = training_config(recipe)
    folder = Path(args.output_dir)
    _refuse_to_overwrite(folder, args)
    data, overlaps = _open_data(recipe)
    trainer = _build(recipe, args, data)
    if prepare is not None:
        prepare(trainer)
    trainer.settle_best_metric()
    main = trainer.accelerator.is_main_process
    manifest = _manifest(recipe, trainer, data)
    manifest["overlap"] = {name: dataclasses.asdict(found) for name, found in overlaps.items()}
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        replace_json(folder / "manifest.json", {**manifest, "status": "running"})
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or None)
    _finish(recipe, trainer, data, manifest)
    return trainer


def _open_data(recipe: Recipe) -> tuple[RunData, dict[str, Overlap]]:
    """The run's data, and what of its evaluation data training shows too; remarks on both are told."""
    check_adapter_settings(recipe)
    with alike_on_a_node():
        data = open_run_data(recipe)
    overlaps = overlaps_with_training(data)
    for remark in [*data.notices, *filter(None, (found.message(name) for name, found in overlaps.items()))]:
        logger.info(f"note: {remark}")
    return data, overlaps


def _build(recipe: Recipe, args: MPOConfig, data: RunData) -> MPOTrainer:
    """The trainer of a run."""
    processor = load_processor(recipe)
    _ = args.device  # sets up the process group, without which ZeRO-3 and FSDP cannot share out weights on loading
    model = load_model(recipe)
    if args.dataloader_num_workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are forked
    evaluation: Any = data.evaluation or ({} if recipe.evaluate and recipe.evaluate.questions else None)
    _check_evaluation(args, evaluation)
    return MPOTrainer(
        model=model,
        ref_model=_second_model(recipe, model),
        args=args,
        train_dataset=data.train,
        eval_dataset=next(iter(evaluation.values())) if evaluation and len(evaluation) == 1 else evaluation,
        processing_class=processor,
        peft_config=lora_config(recipe),
    )


def cache(recipe: Recipe) -> None:
    """Put the reference's log-probs of all the recipe's pairs into the store: ``vlmpo cache``.

    Raises:
        VlmpoError: the recipe, the data, the model or the store is at fault.
    """
    if recipe.reference.kind != "cache":
        raise RecipeError("reference.kind: set it to cache, so that training reads what is put there")
    args = training_config(recipe)
    data, _ = _open_data(recipe)
    trainer = _build(recipe, args, data)
    counts = trainer.precompute_reference()
    assert isinstance(trainer.reference, CachedReference)
    known, computed, dropped = counts["known"], counts["computed"], counts["dropped"]
    pair_counts = trainer.all_pair_counts()
    if trainer.accelerator.is_main_process:
        show_pair_counts(Console(), data, pair_counts)
    aside = f", {dropped} evaluation pairs dropped" if dropped else ""
    logger.info(
        f"reference: {computed} responses computed, {known} known before{aside}; in {trainer.reference.store.folder}"
    )


def _finish(recipe: Recipe, trainer: MPOTrainer, data: RunData, manifest: dict[str, Any]) -> None:
    """Save and evaluate the final model; leave manifest, averaged weights and model card; push, where asked to."""
    folder = Path(trainer.args.output_dir)
    trainer.save_model(trainer.args.output_dir, _internal_call=True)  # pushed below, when the card has its results
    if trainer.average is not None:
        trainer.save_average(folder / AVERAGE_FOLDER)
    results = {name: trainer.evaluate(part, metric_key_prefix=name) for name, part in data.evaluation.items()}
    pair_counts = trainer.all_pair_counts()
    warnings = [length_warning(metrics, name) for name, metrics in results.items()]
    for remark in [*trainer.encoder.notices, *filter(None, warnings)]:
        logger.info(f"note: {remark}")
    manifest["data"] |= _data_counts(data, pair_counts)
    named = [source.path for source in recipe.data.train]
    trainer.card_fields |= {"base_model": recipe.model.path, "datasets": named, "results": results}
    trainer.card_fields["data"] = manifest["data"]["sets"]
    if trainer.accelerator.is_main_process:
        final = {"final_model": trainer.final_model(), "evaluation": results}
        replace_json(folder / "manifest.json", {**manifest, "status": "finished", **final})
        trainer.create_model_card()
        console = Console()
        show_pair_counts(console, data, pair_counts)
        show_evaluation(console, results)
        console.print(f"model and processor: {folder}", markup=False, highlight=False, soft_wrap=True)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def _check_evaluation(args: MPOConfig, evaluation: Any) -> None:
    """Something is there to evaluate on, and the metric of the best checkpoint goes by the trainer's names."""
    if args.eval_strategy != "no" and evaluation is None:
        raise RecipeError(
            f"training.eval_strategy is {args.eval_strategy.value!r}, but there is nothing to evaluate on; "
            "give data.eval, data.hold_out or evaluate.questions"
        )
    if evaluation and len(evaluation) == 1:
        args.metric_for_best_model = without_set_name(args.metric_for_best_model, next(iter(evaluation)))


def training_config(recipe: Recipe) -> MPOConfig:
    """MPOConfig of a recipe. Raises RecipeError for an unknown key or a value TrainingArguments refuse."""
    check_training_keys(recipe, [field.name for field in dataclasses.fields(TrainingArguments)])
    if recipe.training.get("hub_token") is not None:
        raise RecipeError(
            "training.hub_token: a recipe is kept in the run folder and pushed with it; "
            "log in with `hf auth login`, or set HF_TOKEN"
        )
    try:
        return MPOConfig(**recipe.trainer_settings())
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"training: {error}") from error


def evaluation_config(recipe: Recipe) -> MPOConfig:
    """MPOConfig to evaluate with, outside of training. Raises RecipeError like :func:`training_config`."""
    training = {key: value for key, value in recipe.training.items() if key not in _TRAINING_ONLY}
    return training_config(recipe.model_copy(update={"training": training}))


def _refuse_to_overwrite(folder: Path, args: MPOConfig) -> None:
    manifest = folder / "manifest.json"
    if args.resume_from_checkpoint or not manifest.exists():
        return
    if json.loads(manifest.read_text()).get("status") == "running" and last_complete_checkpoint(folder) is None:
        raise RunError(
            f"{folder} already holds a run, which has not come to its first checkpoint: there is nothing to go on "
            "with. If it runs no more, remove the folder, or name another one in training.output_dir"
        )
    raise RunError(
        f"{folder} already holds a run; set training.resume_from_checkpoint=true to go on with it, "
        "or name another folder in training.output_dir"
    )


def load_processor(recipe: Recipe) -> Any:
    """The model's own processor. Raises ModelError where it cannot be loaded."""
    return loading.load_processor(recipe.model.path)


def load_model(recipe: Recipe) -> Any:
    """The policy, whole, in the recipe's dtype, its frozen parts frozen.

    Raises:
        ModelError: no model there, or weights missing in the checkpoint.
        RecipeError: a frozen part that does not exist, or quantised weights without an adapter.
    """
    model = loading.load_model(recipe.model.path, recipe.model.dtype, quantization(recipe))
    if recipe.model.dtype == "bfloat16" and recipe.model.lora is None and not is_peft(model):
        logger.info(
            "weights are kept in bfloat16: at learning rates near 1e-6 most updates round away (model.dtype: float32)"
        )
    loading.freeze_parts(model, recipe.model.freeze)
    return model


def _second_model(recipe: Recipe, model: Any) -> Any:
    """The initial model once more, for the reference, where ZeRO-3 took the first apart and it cannot be copied."""
    adapter = recipe.reference.kind != "copy" and (recipe.model.lora is not None or is_peft(model))
    if adapter or not is_partitioned(model) or not needs_reference(dict(recipe.loss.weights)):
        return None
    return loading.load_model(recipe.model.path, recipe.model.dtype)


# ---- the run folder ----


def _manifest(recipe: Recipe, trainer: MPOTrainer, data: RunData) -> dict[str, Any]:
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": package_versions(),
        "seed": trainer.args.seed,
        "data_seed": trainer.args.data_seed,
        "world_size": trainer.args.world_size,
        "model": {"path": recipe.model.path, "shared_rows": trainer.shared},
        "reference_hash": None if trainer.reference is None else trainer.reference.weights_hash(),
        "data": {
            "hashes": {path: _file_hash(path) for path in data.train.paths},
            "formats": {name: [dataclasses.asdict(i) for i in infos] for name, infos in data.formats().items()},
            **_data_counts(data, PairCounts()),
        },
    }


def _file_hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _data_counts(data: RunData, trained: PairCounts) -> dict[str, Any]:
    """``read = used + held_out + dropped + not_reached`` for every data set."""
    dropped = PairCounts.merged([data.screened, trained])
    sets = {}
    for source, read in data.read.items():
        reasons = {reason: n for (name, reason), n in sorted(dropped.dropped.items()) if name == source}
        used, aside = trained.used[source], data.held_out[source]
        sets[source] = {
            "read": read,
            "used": used,
            "held_out": aside,
            "dropped": reasons,
            "not_reached": read - used - aside - sum(reasons.values()),
        }
    return {"sets": sets, "examples": dropped.examples, "eval_dropped": data.eval_screened.to_json()["dropped"]}


def show_evaluation(console: Console, results: dict[str, dict[str, float]]) -> None:
    """Print reward accuracy and margin of each evaluation set, as a whole and by data set."""
    for name, metrics in results.items():
        if f"{name}_rewards/accuracies" not in metrics:
            continue
        title = f"{name}: reward accuracy and margin, 95 % intervals"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("data set", overflow="fold")  # a name is never cut
        for column in ("pairs", "accuracy", "margin"):
            table.add_column(column, justify="right", no_wrap=True)
        prefix = f"{name}_pairs/"
        sources = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]
        for label, suffix in [("all", ""), *((source, f"/{source}") for source in sources)]:
            values = [metrics[f"{name}_rewards/{key}{suffix}"] for key in _SHOWN]
            accuracy = "{:.3f} [{:.3f}, {:.3f}]".format(*values[:3])
            margin = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*values[3:])
            table.add_row(label, str(int(metrics[f"{name}_pairs{suffix}"])), accuracy, margin)
        console.print(table)
