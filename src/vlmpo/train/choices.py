"""What users expect of a trainer beside its objective: the best checkpoint, averaged weights, rates by part, a card."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlmpo.errors import RecipeError, RunError, first_line
from vlmpo.log import logger
from vlmpo.train import param_groups as rates
from vlmpo.train.checkpoint import read_state, write_state
from vlmpo.train.counts import PairCounts
from vlmpo.train.ema import WeightAverage
from vlmpo.train.metrics import evaluation_metric_names, resolve_metric
from vlmpo.train.model_card import CARD_FILE, RunSummary, model_card, training_settings
from vlmpo.train.ranks import RanksTrainer
from vlmpo.train.reference import AdapterReference, is_peft, unwrap_peft


class ChoosingTrainer(RanksTrainer):
    """transformers' Trainer with these choices; :class:`vlmpo.train.trainer.MPOTrainer` adds the objective.

    Attributes:
        average: of the weights, where ``ema_decay`` is set.
        parameter_counts: numbers of (all, trained) parameters by part.
        trained_pairs: what became of the pairs of all ranks, once training is over.
        card_fields: fields of the model card's RunSummary that the trainer does not know, or not as well.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.extra_evaluations: list[Callable[[], dict[str, float]]] = []
        self.card_fields: dict[str, Any] = {}
        self.trained_pairs = PairCounts()
        every, trained = rates.count_by_part(self.model), rates.count_by_part(self.model, trained_only=True)
        self.parameter_counts = {part: (count, trained.get(part, 0)) for part, count in every.items()}
        self._group_parts: list[str] = []
        self._part_rates: dict[str, float] = {}
        if self.args.learning_rates:
            self._check_rates()
        self.average = self._new_average()

    # ---- the best checkpoint ----

    def settle_best_metric(self) -> None:
        """Give ``metric_for_best_model`` its full name. Raises RecipeError where no evaluation will give it."""
        asked = self.args.metric_for_best_model
        if asked is None:
            return
        if self.args.eval_strategy == "no":
            raise RecipeError(
                "training.metric_for_best_model: nothing is evaluated while training; set training.eval_strategy"
            )
        extra = [name for one in self.extra_evaluations for name in getattr(one, "metrics", ("*",))]
        known = evaluation_metric_names(self.eval_dataset, self.args.weights, extra)
        self.args.metric_for_best_model = resolve_metric(asked, known)
        if self.args.greater_is_better is None:
            raise RecipeError(
                f"training.metric_for_best_model: is a higher {asked!r} better, or a lower? "
                "Set training.greater_is_better"
            )
        by_steps = self.args.save_strategy == self.args.eval_strategy == "steps"
        if self.args.load_best_model_at_end and by_steps and self.args.save_steps != self.args.eval_steps:
            logger.info("note: the best checkpoint is sought among the evaluations at which one is saved")

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As transformers does, of evaluations whose weights are kept: one that is not saved cannot be loaded."""
        name = self.args.metric_for_best_model
        if name is None:
            return False
        if name not in metrics:
            given = ", ".join(sorted(metrics))
            raise RunError(f"training.metric_for_best_model: this evaluation gave no {name}; it gave {given}")
        if self.args.load_best_model_at_end and self.args.save_strategy != "best" and not self.control.should_save:
            return False
        return super()._determine_best_metric(metrics, trial)

    @property
    def final_step(self) -> int:
        """The optimizer step whose weights the model holds once training is over."""
        best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        return self.state.best_global_step if best else self.state.global_step

    def final_model(self) -> dict[str, Any]:
        """Which weights the final model has, in plain JSON values."""
        told: dict[str, Any] = {"step": self.final_step, "checkpoint": None}
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            told["checkpoint"] = Path(self.state.best_model_checkpoint).name
            told["best_by"] = {self.args.metric_for_best_model: self.state.best_metric}
        if self.average is not None:
            told["ema"] = {"decay": self.average.decay, "step": self.state.global_step}
        return told

    # ---- averaged weights ----

    def _new_average(self) -> WeightAverage | None:
        if not self.args.ema_decay:
            return None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise RecipeError(
                "training.ema_decay: an average is kept of whole weights, and FSDP and DeepSpeed hold parts of them; "
                "leave ema_decay out, or train data-parallel (DDP)"
            )
        average = WeightAverage(self.args.ema_decay)
        self.add_callback(average)
        return average

    def save_average(self, folder: str | os.PathLike[str]) -> None:
        """Save the model with the averaged weights, and the processor, as a model folder of its own."""
        if self.average is None or not self.average.averages:
            raise RunError("there is no average to save: set ema_decay, and train")
        with self.average.applied_to(self.model):
            self.save_model(os.fspath(folder), _internal_call=True)
        if self.args.should_save:
            (Path(folder) / CARD_FILE).unlink(missing_ok=True)  # PEFT's, which is a form to fill in

    # ---- rates by part ----

    def _check_rates(self) -> None:
        if self.optimizer is not None:
            raise RecipeError("learning_rates: the optimizer was given, with its rates; leave one of them out")
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if plugin is not None and "optimizer" in plugin.deepspeed_config:
            raise RecipeError(
                "training.learning_rates: the DeepSpeed configuration brings an optimizer of its own; take it out there"
            )
        asked = self.args.learning_rates
        trained = rates.check_parts(self.model, asked)
        told = (f"{part} {count:,} at {asked.get(part, self.args.learning_rate):g}" for part, count in trained.items())
        logger.info(f"parameters that train, and their rates: {', '.join(told)}")

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers' optimizer, its groups split by part where ``learning_rates`` asks for it."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.args.learning_rates:
            source = self.model if model is None else model
            self._group_parts = rates.split_groups(optimizer, source, self.args.learning_rates)
        return optimizer

    def _get_learning_rate(self) -> float:
        """The base rate as scheduled, whichever group comes first; the other parts' rates are kept for the log."""
        rate = super()._get_learning_rate()
        if not self._group_parts:
            return rate
        now = dict(zip(self._group_parts, (group["lr"] for group in self.optimizer.param_groups), strict=True))
        asked, base = self.args.learning_rates, self.args.learning_rate
        self._part_rates = {f"learning_rate/{part}": float(now[part]) for part in asked}
        unnamed = [float(now[part]) for part in now if part not in asked]
        if unnamed:
            return unnamed[0]
        first = self._group_parts[0]  # every part has a rate of its own: all are scaled alike
        return base * (float(now[first]) / asked[first])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the rates of parts beside the base one."""
        if "learning_rate" in logs:
            logs |= self._part_rates
        super().log(logs, start_time)

    # ---- checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; what was chosen is held against the run, and the checkpoint it goes on from, before it starts."""
        self.settle_best_metric()
        if isinstance(resume_from_checkpoint, str):
            self._check_checkpoint(resume_from_checkpoint)
        if self.average is not None:
            self.average.start_from(resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None)
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.trained_pairs = self.all_pair_counts()
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            logger.info(
                f"NOT the best checkpoint: none was kept with a {self.args.metric_for_best_model} to go by. "
                f"The model is that of the last step, {self.state.global_step}."
            )
        return output

    def _check_checkpoint(self, checkpoint: str) -> None:
        before, now = read_state(checkpoint).get("learning_rates"), self.args.learning_rates or None
        if before != now:
            raise RunError(
                f"{checkpoint} was trained with training.learning_rates {before}, this run has {now}; "
                "the optimizer goes on with the rates it had, so give the same"
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.average is not None and self.args.should_save:
            self.average.save(f"{self._get_output_dir(trial)}/checkpoint-{self.state.global_step}")

    # ---- the Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As transformers does. Raises RunError where the Hub cannot be reached or refuses."""
        try:
            super().init_hf_repo(token=token, private=private)
        except OSError as error:
            raise RunError(
                f"training.push_to_hub: {first_line(error)} (log in with `hf auth login`, or set HF_TOKEN)"
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint, once our own part of it is there too: without it nobody could resume from the Hub."""
        if self.average is not None and self.args.should_save:
            self.average.save(checkpoint_folder)
        state = self._mpo_state()
        if self.args.should_save:
            write_state(checkpoint_folder, state)
        super()._push_from_checkpoint(checkpoint_folder)

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs: Any) -> Any:
        """Upload the run folder, its model card in it. Raises RunError where that fails; the folder is whole."""
        try:
            return super().push_to_hub(commit_message, **kwargs)
        except OSError as error:
            raise RunError(
                f"training.push_to_hub: {first_line(error)}; the model is in {self.args.output_dir}, push it from there"
            ) from error

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset_tags: str | list[str] | None = None,
    ) -> None:
        """Write ``README.md`` into the run folder, in the place of transformers' own card.

        Args:
            language, license, tags, dataset_tags: for the card's metadata; what is not given stays out of it.
            model_name: its title; the run folder's name by default.
            finetuned_from: the base model's name on the Hub.
        """
        if not self.is_world_process_zero():
            return
        given = {"language": language, "license": license, "datasets": dataset_tags, "tags": tags}
        named = {"title": model_name, "base_model": finetuned_from}
        summary = self.run_summary(**{name: value for name, value in named.items() if value})
        text = model_card(summary, given)
        (Path(self.args.output_dir) / CARD_FILE).write_text(text, encoding="utf-8")

    def run_summary(self, **fields: Any) -> RunSummary:
        """Summarise the run for its model card; ``card_fields`` and ``fields`` go before what the trainer knows."""
        args, state, policy, adapter = self.args, self.state, unwrap_peft(self.model), is_peft(self.model)
        folder, final = Path(args.output_dir).absolute().name, self.final_model()
        reference = "a frozen model"
        if isinstance(used := getattr(self, "reference", None), AdapterReference):
            reference = "the model with its adapter off" if used.frozen is None else "the model under its first adapter"
        settings = training_settings(
            args,
            pairs_per_step=self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            num_steps=state.global_step,
            num_epochs=state.epoch or 0.0,
            weights_dtype=next((p.dtype for p in self.model.parameters() if p.requires_grad), None),
            parameter_counts=self.parameter_counts,
            adapter=self.model.peft_config[self.model.active_adapter] if adapter else None,
            shared=getattr(self, "shared", False),
        )
        known = {
            "title": folder,
            "location": getattr(self, "hub_model_id", None) or folder,
            "base_model": getattr(policy.config, "_name_or_path", None),
            "adapter": adapter,
            "reads_images": policy.config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            "processor_class": "AutoProcessor" if hasattr(self.processing_class, "tokenizer") else "AutoTokenizer",
            **{name: getattr(args, name) for name in ("beta", "reward_shift", "nll_reduction", "label_smoothing")},
            "weights": args.weights,
            "reference": reference,
            "settings": settings,
            "log_history": state.log_history,
            "final_step": final["step"],
            "best_by": next(iter(final.get("best_by", {}).items()), None),
            "ema": final.get("ema"),
            "data": self.trained_pairs.by_source(),
        }
        return RunSummary(**{**known, **self.card_fields, **fields})
