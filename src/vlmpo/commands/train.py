"""``vlmpo train`` and ``vlmpo cache``: from a recipe to a run folder, or to a store of reference log-probs."""

from __future__ import annotations

import hashlib
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmpo.commands.adapter_settings import check_adapter_settings, lora_config, quantization
from vlmpo.commands.config import training_config
from vlmpo.commands.evaluate import add_questions, evaluate_sets, show_pair_metrics
from vlmpo.commands.guard import end_noted, training_folder
from vlmpo.commands.overwrite import delete, find_old_run
from vlmpo.commands.report import SHARE_OF_TIME, ReportRefresh, never_failing, report_at_end
from vlmpo.commands.run_data import RunData, open_run_data, overlaps_with_training, show_pair_counts
from vlmpo.commands.run_folder import MANIFEST, read_paths, same_run
from vlmpo.data.index.store import cache_folder
from vlmpo.errors import RecipeError, RunError
from vlmpo.fileio import replace_json, replace_text, writing
from vlmpo.log import logger, print_box
from vlmpo.loss import needs_reference
from vlmpo.models.adapters import is_peft
from vlmpo.models.loading import freeze_parts, load_model, load_processor
from vlmpo.recipe import Recipe
from vlmpo.recipe_yaml import dump_recipe
from vlmpo.report.write import REPORT_FILE
from vlmpo.train.arguments import check_surroundings
from vlmpo.train.cached_reference import CachedReference
from vlmpo.train.checkpoint import last_complete_checkpoint
from vlmpo.train.checkpoint_io import checkpoints_in
from vlmpo.train.config import MPOConfig
from vlmpo.train.console import duration, figures
from vlmpo.train.counts import PairCounts
from vlmpo.train.ema import AVERAGE_FOLDER
from vlmpo.train.metrics import length_warning, without_set_name
from vlmpo.train.model_card import package_versions
from vlmpo.train.provenance import identity, utc_now
from vlmpo.train.sharding import is_partitioned
from vlmpo.train.trainer import MPOTrainer


def train(recipe: Recipe, allow_changes: Sequence[str] = (), overwrite: bool = False) -> MPOTrainer:
    """Train as the recipe says, evaluate the final model, and fill the run folder, ``training.output_dir``.

    With ``training.resume_from_checkpoint`` a run that was begun goes on, one without a checkpoint starts, and one that
    is finished is left as it is.

    Args:
        recipe: the recipe.
        allow_changes: recipe keys that may differ from what the checkpoint was made by that is resumed from.
        overwrite: delete the run that is in the run folder, once all that comes before training is known to be good.

    Raises:
        VlmpoError: the recipe, the data, the model or the run folder cannot be used.
    """
    args = checked_config(recipe, allow_changes, overwrite)
    with training_folder(recipe, args, overwrite) as before:
        return _train(recipe, args, before, overwrite)


def checked_config(recipe: Recipe, allow_changes: Sequence[str], overwrite: bool) -> MPOConfig:
    """Return the settings of a training run. Raises RecipeError for what can be known to be wrong so early."""
    args = training_config(recipe)
    if overwrite and args.resume_from_checkpoint:
        raise RecipeError(
            "--overwrite deletes the run in training.output_dir, and training.resume_from_checkpoint goes on with it; "
            "leave one out"
        )
    check_surroundings(args)
    args.allow_changes = list(allow_changes)
    return args


def prepare(
    recipe: Recipe, args: MPOConfig, folder: Path, before: dict[str, Any] | None, newest: bool
) -> tuple[MPOTrainer, RunData, dict[str, Any], bool]:
    """Do all that comes before anything is written.

    Args:
        recipe, args: of the run.
        folder: its folder.
        before: the manifest of the run that is there, if it is to go on.
        newest: whether it goes on from its newest checkpoint: who names one wants its steps made again.

    Returns:
        The trainer, its data and manifest, and whether nothing is left to train.
    """
    data, overlaps = _open_data(recipe)
    trainer = _build_trainer(recipe, args, data)
    if recipe.evaluate is not None and recipe.evaluate.questions is not None:
        add_questions(trainer, recipe)
    trainer.settle_best_metric()  # a wrong name is refused before anything is written
    manifest = _manifest(recipe, trainer, data, overlaps)
    return trainer, data, manifest, before is not None and newest and _is_finished(folder, before, manifest, trainer)


def _train(recipe: Recipe, args: MPOConfig, before: dict[str, Any] | None, overwrite: bool) -> MPOTrainer:
    """Do what :func:`train` does, in a folder that this run holds and that has the manifest ``before``."""
    folder, began = Path(args.output_dir), time.monotonic()
    trainer, data, manifest, is_finished = prepare(recipe, args, folder, before, args.resume_from_checkpoint is True)
    if is_finished:
        return trainer
    if overwrite and trainer.accelerator.is_main_process and (old := find_old_run(folder, read_paths(recipe, "train"))):
        logger.info(f"--overwrite: deleting {old.describe()}")
        delete(old)
    checkpoint = trainer.checkpoints.choose(args.resume_from_checkpoint or None)
    _reuse_choices(trainer, (before or {}).get("chosen") or {}, started_anew=checkpoint is None)
    manifest["model"]["kernels"] = trainer.kernels.key  # those of the checkpoint, if there is one
    known = (before or {}).get("history") or []
    manifest["history"] = [*known, *(entry for entry in trainer.checkpoints.history if entry not in known)]
    if before is not None and checkpoint is not None:
        manifest["started"] = before.get("started", manifest["started"])
    if trainer.accelerator.is_main_process:
        replace_json(folder / MANIFEST, {**manifest, "status": "running"})
        replace_text(folder / "recipe.yaml", dump_recipe(recipe))
    trainer.row_memory.on_change = lambda: _note_choice(folder, trainer, manifest)
    trainer.read_pairs = manifest["data"]["sets"]
    trainer.keep_margins()
    trainer.add_callback(ReportRefresh(folder))
    with _end_reported(folder, args.world_size) if trainer.accelerator.is_main_process else nullcontext():
        trainer.train(resume_from_checkpoint=checkpoint)
        results = _finish(recipe, trainer, data, manifest)
    if trainer.accelerator.is_main_process:
        print_box("done", closing_rows(recipe, trainer, results, time.monotonic() - began))
    return trainer


@contextmanager
def _end_reported(folder: Path, ranks: int) -> Iterator[None]:
    """Note in the manifest how the body ends, and then write the report, which says so."""
    with report_at_end(folder, ranks=ranks, say_where=False), end_noted(folder):
        yield


def cache(recipe: Recipe) -> None:
    """Store the reference's log-probs of all the recipe's pairs.

    Raises:
        VlmpoError: the recipe, the data, the model or the store cannot be used.
    """
    if recipe.reference.kind != "cache":
        raise RecipeError("reference.kind: set it to cache, so that training reads what is stored")
    args = training_config(recipe)
    data, _ = _open_data(recipe)
    trainer = _build_trainer(recipe, args, data)
    with writing(args.reference_cache_dir or cache_folder() / "reference"):
        counts = trainer.precompute_reference()
    assert isinstance(trainer.reference, CachedReference)
    pair_counts = trainer.all_pair_counts()
    if trainer.accelerator.is_main_process:
        show_pair_counts(data, pair_counts)
    dropped = f", {counts['dropped']} evaluation pairs dropped" if counts["dropped"] else ""
    logger.info(
        f"reference: {counts['computed']} responses computed, {counts['known']} known before{dropped}; "
        f"in {trainer.reference.store.folder}"
    )


def _reuse_choices(trainer: MPOTrainer, chosen: dict[str, Any], *, started_anew: bool) -> None:
    """Choose again what an earlier start of the run chose for itself; a checkpoint it goes on from goes before that."""
    trainer.row_memory.before = chosen
    kernels = chosen.get("kernels") or {}
    if started_anew:
        trainer.reuse_kernels(kernels.get("kinds"), kernels.get("asked"))


def _note_choice(folder: Path, trainer: MPOTrainer, manifest: dict[str, Any]) -> None:
    """Put what the run has chosen for itself into its manifest."""
    kernels = {"asked": trainer.args.kernels, "kinds": trainer.kernels.kinds}
    manifest["chosen"] = {**trainer.row_memory.chosen(), "kernels": kernels}
    if trainer.accelerator.is_main_process:
        replace_json(folder / MANIFEST, {**manifest, "status": "running"})


# ---- before training ----


def _is_finished(folder: Path, before: dict[str, Any], now: dict[str, Any], trainer: MPOTrainer) -> bool:
    """Return whether the run in ``folder`` has made all the steps of the recipe; say so.

    Raises:
        RunError: the manifest ``before`` is of another run, or the run has no checkpoint to make more steps from.
    """
    has_checkpoint = last_complete_checkpoint(folder) is not None
    if not has_checkpoint and not same_run(before, now):
        raise RunError(
            f"{folder} holds a run of another model or other data ({folder / MANIFEST}); name another folder in "
            "training.output_dir"
        )
    if before["status"] != "finished":
        return False
    done = before.get("steps") or (before.get("final_model") or {}).get("step") or 0
    planned = trainer.planned_steps()
    if done >= planned:
        if isinstance(settings := before.get("settings"), dict):
            trainer.checkpoints.check_settings(settings, str(folder / MANIFEST))
        logger.info(f"finished: the run in {folder} has made all its {done} steps; nothing is left to train")
        return True
    if not has_checkpoint and not checkpoints_in(folder):
        raise RunError(
            f"{folder} holds a run of {done} steps that is finished, without a checkpoint to make the recipe's "
            f"{planned} from; start a new run in another training.output_dir"
        )
    return False


def _given_settings(recipe: Recipe, trainer: MPOTrainer, data: RunData, hashes: dict[str, str]) -> dict[str, Any]:
    """Return what the run is made by and the trainer does not know, by recipe key."""
    sources = [source.model_dump(exclude={"path"}) for source in recipe.data.train]
    for source in sources:
        source["image_root"] = source["image_root"] and os.path.realpath(source["image_root"])
    settings = {
        "data.train.sources": sources,
        "data.train.files": list(hashes.values()),
        "data.train.pairs": len(data.train),
        "data.hold_out": recipe.data.hold_out,
        "model.dtype": recipe.model.dtype,
        "model.freeze": sorted(recipe.model.freeze),
        "model.quantize": recipe.model.quantize,
        "model.trust_remote_code": recipe.model.trust_remote_code,
        "data.eval": recipe.model_dump(mode="json")["data"]["eval"],
        "evaluate": recipe.model_dump(mode="json")["evaluate"],
        "recipe": recipe.model_dump(mode="json"),
    }
    if trainer.reference is None:  # else the reference's hash tells
        settings["model.path"] = os.path.realpath(recipe.model.path)
    return settings


def _open_data(recipe: Recipe) -> tuple[RunData, dict[str, Any]]:
    """Return the data, and what its evaluation sets share with the training pairs; log remarks on both."""
    check_adapter_settings(recipe)
    data = open_run_data(recipe)
    for notice in data.notices:
        logger.info(f"note: {notice}")
    return data, overlaps_with_training(data)


def _build_trainer(recipe: Recipe, args: MPOConfig, data: RunData) -> MPOTrainer:
    """Return the trainer, with its processor, model, reference and data sets."""
    processor = load_processor(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
    _ = args.device  # sets up the process group; without it ZeRO-3 and FSDP cannot shard weights as they are loaded
    model = _load_policy(recipe)
    if args.dataloader_num_workers != 0:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are forked
    evaluation: Any = data.evaluation
    if len(evaluation) == 1:  # transformers names the metrics of a single set without the set's name
        name, evaluation = next(iter(evaluation.items()))
        args.metric_for_best_model = without_set_name(args.metric_for_best_model, name)
    elif not evaluation and not (recipe.evaluate and recipe.evaluate.questions):
        evaluation = None
        if args.eval_strategy != "no":
            raise RecipeError(
                f"training.eval_strategy is {args.eval_strategy.value!r}, but there is nothing to evaluate on; "
                "give data.eval, data.hold_out or evaluate.questions"
            )
    return MPOTrainer(
        model=model,
        ref_model=_load_partitioned_reference(recipe, model),
        args=args,
        train_dataset=data.train,
        eval_dataset=evaluation,
        processing_class=processor,
        peft_config=lora_config(recipe),
    )


def _load_policy(recipe: Recipe) -> Any:
    """Return the model to train, in the recipe's dtype, its frozen parts frozen.

    Raises:
        ModelError: there is no model, or its checkpoint lacks weights.
        RecipeError: a part that ``model.freeze`` names does not exist.
    """
    model = load_model(
        recipe.model.path, recipe.model.dtype, quantization(recipe), trust_remote_code=recipe.model.trust_remote_code
    )
    if recipe.model.dtype == "bfloat16" and recipe.model.lora is None and not is_peft(model):
        logger.info(
            "weights are kept in bfloat16: at learning rates near 1e-6 most updates round away (model.dtype: float32)"
        )
    freeze_parts(model, recipe.model.freeze)
    return model


def _load_partitioned_reference(recipe: Recipe, model: Any) -> Any:
    """Load the initial model again for the reference if ZeRO-3 partitioned ``model``: it cannot be copied then."""
    has_adapter = recipe.model.lora is not None or is_peft(model)
    if not is_partitioned(model) or not needs_reference(recipe.loss.weights):
        return None
    if has_adapter and recipe.reference.kind != "copy":
        return None
    return load_model(recipe.model.path, recipe.model.dtype, trust_remote_code=recipe.model.trust_remote_code)


def _manifest(recipe: Recipe, trainer: MPOTrainer, data: RunData, overlaps: dict[str, Any]) -> dict[str, Any]:
    """Return what identifies the run: versions, seeds, settings, hashes of the reference and of the data files."""
    hashes = {path: _file_hash(path) for path in data.train.paths}
    trainer.given_settings |= _given_settings(recipe, trainer, data, hashes)
    return {
        "started": utc_now(),
        "versions": package_versions(),
        "seed": trainer.args.seed,
        "data_seed": trainer.args.data_seed,
        "world_size": trainer.args.world_size,
        "model": {
            "path": recipe.model.path,
            "shared_rows": trainer.shared,
            "max_tiles": trainer.encoder.max_tiles,
        },
        "reference_hash": None if trainer.reference is None else trainer.reference.weights_hash(),
        "data": {
            "hashes": hashes,
            "formats": {name: [asdict(info) for info in infos] for name, infos in data.formats().items()},
            **_data_counts(data, PairCounts()),
        },
        "overlap": overlaps,
        "settings": identity(trainer.settings()),
    }


def _file_hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


# ---- after training ----


def _finish(
    recipe: Recipe, trainer: MPOTrainer, data: RunData, manifest: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Save and evaluate the final model; write averaged weights, manifest and model card; push if asked to.

    Returns:
        The metrics of each set of held-out pairs.
    """
    folder = Path(trainer.args.output_dir)
    trainer.save_model(trainer.args.output_dir, _internal_call=True)  # pushed below, once the card has its results
    if trainer.average is not None:
        trainer.save_average(folder / AVERAGE_FOLDER)
    results = evaluate_sets(trainer, data.evaluation)
    warnings = [length_warning(metrics, name) for name, metrics in results.items()]
    notices = [remark for of_rank in trainer.ranks.all_gather(trainer.encoder.notices) for remark in of_rank]
    for remark in dict.fromkeys([*notices, *filter(None, warnings)]):
        logger.info(f"note: {remark}")
    manifest["data"] |= _data_counts(data, trainer.trained_pairs)
    trainer.card_fields |= {
        "base_model": recipe.model.path,
        "datasets": [source.path for source in recipe.data.train],
        "results": results,
        "data": manifest["data"]["sets"],
    }
    if trainer.accelerator.is_main_process:
        steps = trainer.state.global_step
        final = {"steps": steps, "final_model": trainer.final_model(), "evaluation": results}
        trainer.create_model_card()
        replace_json(folder / MANIFEST, {**manifest, "status": "finished", **final})  # last: the folder is whole
        show_pair_counts(data, trainer.trained_pairs)
        show_pair_metrics(results)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    with never_failing("the part of the report on single pairs"):  # after the push: it holds texts and images
        trainer.score_kept_pairs(SHARE_OF_TIME)
    return results


def closing_rows(
    recipe: Recipe, trainer: MPOTrainer, results: Mapping[str, Mapping[str, float]], seconds: float
) -> list[tuple[str, object]]:
    """Return what the box at the end of a run says: what it took, came to and left, and what to do next.

    Args:
        recipe: of the run.
        trainer: of the run, which is over.
        results: from the final evaluation, by set.
        seconds: that the command took.
    """
    folder, state = trainer.args.output_dir, trainer.state
    last: dict[str, Any] = next((log for log in reversed(state.log_history) if "loss" in log), {})
    rows: list[tuple[str, object]] = [
        ("time", f"{duration(seconds)}, {state.global_step} steps"),
        ("training", "  ".join(text for text, _ in figures(last))),
    ]
    for name, metrics in results.items():
        plain = {key.removeprefix(f"{name}_"): value for key, value in metrics.items()}
        rows.append((name.replace("_", " "), "  ".join(text for text, _ in figures(plain))))
    final = trainer.final_model()
    best = [f"the best by {metric}: {value:.4g}" for metric, value in final.get("best_by", {}).items()]
    rows.append(("model", f"{folder}" + (f" (of step {final['step']}, {best[0]})" if best else "")))
    if (report := Path(folder) / REPORT_FILE).exists():
        rows.append(("report", report))
    rows.append(("try it", shlex.join(["vlmpo", "chat", folder])))
    if results or (recipe.evaluate is not None and recipe.evaluate.questions is not None):
        rows.append(("evaluate", shlex.join(["vlmpo", "evaluate", str(Path(folder) / "recipe.yaml")])))
    return [row for row in rows if row[1]]


def _data_counts(data: RunData, trained: PairCounts) -> dict[str, Any]:
    """Count every pair: ``read = used + held_out + dropped + not_reached`` for each data set."""
    dropped = PairCounts.merged([data.screened, trained])
    sets = {}
    for source, read in data.read.items():
        reasons = {reason: count for (name, reason), count in sorted(dropped.dropped.items()) if name == source}
        used, held_out = trained.used[source], data.held_out[source]
        sets[source] = {
            "read": read,
            "used": used,
            "held_out": held_out,
            "dropped": reasons,
            # A pair used before a resume may be one that is dropped since: its image is gone.
            "not_reached": max(0, read - used - held_out - sum(reasons.values())),
        }
    eval_dropped = data.eval_screened.to_json()["dropped"]
    return {"sets": sets, "examples": dropped.examples, "eval_dropped": eval_dropped, **trained.mishaps()}
