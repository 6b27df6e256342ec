"""MPOTrainer: transformers' Trainer, with the objective of Mixed Preference Optimization over shared rows."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, set_seed

from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.errors import RunError
from vlmpo.log import logger
from vlmpo.loss import LossOutput, RewardShift, expected_start, mpo_loss, needs_reference
from vlmpo.models.families import support_for
from vlmpo.train.adapters import add_frozen_adapter, check_policy_adapter, choose_kind, put_adapter_on
from vlmpo.train.batching import (
    Batch,
    Collator,
    EncodedPairs,
    MicroBatch,
    lay_out,
    merge,
)
from vlmpo.train.cached_reference import CachedReference, cached_reference
from vlmpo.train.checkpoint import last_complete_checkpoint, load_weights, read_state, write_state
from vlmpo.train.config import MPOConfig
from vlmpo.train.counts import PairCounts
from vlmpo.train.evaluation import evaluate_pairs
from vlmpo.train.features import share_if_frozen
from vlmpo.train.feeding import FeedingTrainer
from vlmpo.train.inputs import load_named, pairs_of, refuse_unused
from vlmpo.train.metrics import StepSums, add_up, training_metrics
from vlmpo.train.progress import MetricsFile, ShortPrinter, ShortProgress, StepClock
from vlmpo.train.rank_sync import AtTrainBegin, RankSync
from vlmpo.train.reference import (
    AdapterReference,
    CopyReference,
    Reference,
    freeze,
    frozen_copy,
    switch_dropout_off,
    unwrap_peft,
)
from vlmpo.train.router_term import add_router_loss, read_policy
from vlmpo.train.sharding import no_gradient_sync, passes_are_shared, prepare_frozen, refuse_if_scored, to_compute_dtype
from vlmpo.tree.forward import install
from vlmpo.tree.router_loss import router_coefficient
from vlmpo.tree.self_check import check_rows


class MPOTrainer(FeedingTrainer):
    """Trains a vision-language model by MPO, or by any subset of its terms.

    Args:
        model: the policy, a transformers model (or one under a PEFT adapter), or its name or path.
        ref_model: the frozen reference; None: a copy of ``model`` as given, or the model with its adapter off.
        args: the settings.
        train_dataset: pairs, or records of any format vlmpo reads: a ``datasets.Dataset``, a list of dicts, anything
            with ``len()`` and items by number.
        eval_dataset: the same, or a dict of them by name.
        processing_class: the model's own processor, with its chat template; None: loaded from where the model was.
        peft_config: put a fresh adapter on the policy; its ``lora_dropout`` is forced to 0.

    Raises:
        RecipeError: the reference that is asked for contradicts the model.
        ModelError: the processor has no chat template, or a checkpoint does not fit.
        DataError: records of no known format, or a streaming data set, which has no length.
        RecordError: a bad record under ``on_bad_record="fail"``.
        RunError: a checkpoint is incomplete, or was trained against another reference.
    """

    # The loss is divided by the global batch's own denominators; Trainer must not divide it by accumulation steps.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        ref_model: Any | None = None,
        args: MPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        data_collator: Any = None,
        compute_metrics: Any = None,
    ) -> None:
        refuse_unused(data_collator=data_collator, compute_metrics=compute_metrics)
        args = args if args is not None else MPOConfig(output_dir="runs/mpo")
        model, ref_model, processing_class = load_named(model, ref_model, processing_class)
        if peft_config is not None:
            set_seed(args.seed)  # an adapter starts from random numbers: the seed's, not whatever came before
            model = put_adapter_on(model, peft_config)
        check_policy_adapter(model, args)
        switched_off = switch_dropout_off(model)
        if switched_off:
            logger.info(f"dropout switched off in {len(switched_off)} modules: policy and reference must read alike")
        self.shared = self._choose_rows(args, unwrap_peft(model))
        install(unwrap_peft(model), self.shared)
        self.router_coefficient = router_coefficient(unwrap_peft(model).config)
        self.with_preferences = needs_reference(args.weights)
        self.encoder = PairEncoder(
            processing_class,
            max_length=args.max_length,
            over_long=args.over_long,  # type: ignore[arg-type]
            max_tiles=args.max_tiles,
            need_rejected=self.with_preferences,
            video_frames=args.video_frames,
        )
        self.loader_encoder = self.encoder.for_loader()
        self.reward_shift = RewardShift(args.reward_shift)  # type: ignore[arg-type]
        self.sums = StepSums()
        self.clock = StepClock()
        self.pair_counts = PairCounts()
        self._step_rewards = [0.0, 0.0]  # sum and count of the optimizer step under way, this rank
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(
                args.max_tokens_per_row, self.shared, args.reference_kind == "cache", args.group_by_prompt
            ),
            train_dataset=pairs_of(train_dataset, self.with_preferences, "train_dataset"),
            eval_dataset=pairs_of(eval_dataset, self.with_preferences, "eval_dataset"),
            processing_class=processing_class,
            callbacks=[*(callbacks or []), self.clock, MetricsFile(args.output_dir)],
            optimizers=optimizers,
        )
        self.pop_callback(PrinterCallback)
        self.add_callback(ShortProgress if self.pop_callback(ProgressCallback) else ShortPrinter)
        self.check_steps()
        self.rank_sync = RankSync(self.accelerator, self.encoder, self.data_collator)
        self.reference = self._build_reference(ref_model, peft_config is not None)
        share_if_frozen(self)

    # ---- set-up ----

    @staticmethod
    def _choose_rows(args: MPOConfig, model: Any) -> bool:
        support = support_for(model.config)
        if args.attention == "auto" and not support.shared:
            logger.info(
                f"NOT sharing the prompt between responses: {support.reason}. Each is read in a row of its own."
            )
        return args.attention == "auto" and support.shared

    def _check_rows(self) -> None:
        """Read one real pair as the run does and as the model does; where shared rows differ, share no more.

        Raises ModelError where even separate rows are not what the model itself says.
        """
        data = EncodedPairs(self.train_dataset, self.loader_encoder)
        usable = (item for item in map(data.__getitem__, range(len(data))) if isinstance(item, EncodedPair))
        pair = max(itertools.islice(usable, 8), key=lambda item: bool(item.vision), default=None)  # an image, if any
        if pair is None:
            return
        rows, parts = (self._prepare_inputs(lay_out([pair], shared)).rows for shared in (True, False))
        half = self.args.bf16 or self.args.fp16
        wrapped = self.model_wrapped if passes_are_shared(self.accelerator) else None
        difference = check_rows(unwrap_peft(self.model), rows if self.shared else None, parts, half, wrapped)
        if difference is None:
            return
        logger.info(
            f"NOT sharing the prompt between responses: on {pair.origin or 'the first pair'} shared and separate rows "
            f"differ by {difference:.3g} nats a token. Each response is read in a row of its own."
        )
        self.shared = self.data_collator.shared = False
        install(unwrap_peft(self.model), shared=False)
        reference = self.reference.model if isinstance(self.reference, CachedReference) else self.reference
        if isinstance(reference, CopyReference):
            install(unwrap_peft(self.accelerator.unwrap_model(reference.model)), shared=False)

    def _build_reference(self, given: Any | None, fresh_adapter: bool) -> Reference | None:
        if not self.with_preferences:
            return None
        if self.args.reference_kind == "cache":
            return cached_reference(self, given, lambda: self._online_reference("auto", given, fresh_adapter))
        return self._online_reference(self.args.reference_kind, given, fresh_adapter)

    def _online_reference(self, kind: str, given: Any | None, fresh_adapter: bool) -> Reference:
        kind = choose_kind(kind, self.model, given, fresh_adapter)
        if kind != "copy":
            return AdapterReference(self.model, add_frozen_adapter(self.model) if kind == "frozen_adapter" else None)
        frozen = frozen_copy(self.model) if given is None else freeze(given, self.shared)
        return CopyReference(prepare_frozen(self.accelerator, frozen))

    # ---- one step ----

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch, part by part.

        In ``running`` mode all its rewards must be known before any backward, so it is read in one part.
        """
        parts = [merge(inputs.parts)] if self.reward_shift.mode == "running" else inputs.parts
        total = torch.zeros((), device=self.args.device)
        for part in parts[:-1]:
            with no_gradient_sync(self.accelerator, model):
                total = total + super().training_step(model, part, num_items_in_batch)
        total = total + super().training_step(model, parts[-1], num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.rank_sync.drop_dummy_gradients(model)
            self._end_step()
        return total

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        part = inputs.to(self.args.device).with_pixels(self.loader_encoder.pixel_scale)
        return to_compute_dtype(self.accelerator, part)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This part's share of the global batch's loss, times the number of ranks, whose gradients are averaged."""
        policy, reference, router = self._read(model, inputs, self.router_coefficient is not None and model.training)
        if self.reward_shift.mode == "running" and model.training:
            self._observe_micro_batch(inputs, policy, reference)
        output = self._loss(inputs, policy, reference, num_items_in_batch)
        output = add_router_loss(
            output, router, inputs, self.router_coefficient, (num_items_in_batch or {}).get("pairs")
        )
        if model.training:
            self._record(inputs, policy, output)
        loss = output.loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def response_logps(self, model: nn.Module, part: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each response of ``part``, ``[responses]``: policy's, and reference's where needed."""
        return self._read(model, part, False)[:2]

    def _read(self, model: nn.Module, part: MicroBatch, router: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        reference = None if self.reference is None else self.reference.response_logps(part)
        policy, router_losses = read_policy(model, part, router)
        return policy, None if reference is None else reference.to(policy.dtype), router_losses

    def _loss(
        self, part: MicroBatch, policy: Tensor, reference: Tensor | None, counts: dict[str, float] | None
    ) -> LossOutput:
        counts = counts or {}
        rejected = part.rejected if reference is not None else None
        return mpo_loss(
            policy[part.chosen],
            None if rejected is None else policy[rejected],
            None if reference is None else reference[part.chosen],
            None if reference is None or rejected is None else reference[rejected],
            part.chosen_lengths,
            reward_shift=self.reward_shift.value,
            num_pairs=counts.get("pairs"),
            num_chosen_tokens=counts.get("chosen_tokens"),
            **self.args.loss_settings,
        )

    def _observe_micro_batch(self, part: MicroBatch, policy: Tensor, reference: Tensor | None) -> None:
        """``running``: this micro-batch's mean reward, averaged over the ranks that have one, enters delta at once."""
        if reference is None or part.rejected is None:
            return
        rewards = self.args.beta * (policy.detach() - reference)[torch.cat([part.chosen, part.rejected])]
        mine = [float(rewards.mean()), 1.0] if rewards.numel() else [0.0, 0.0]
        total, ranks = self._over_ranks(mine, self.args.device)
        self.reward_shift.observe(total, ranks)

    def _record(self, part: MicroBatch, policy: Tensor, output: LossOutput) -> None:
        logps = policy.detach()
        rejected = logps[part.rejected] if part.rejected is not None and self.with_preferences else None
        self.sums.add(
            output,
            chosen_logps=logps[part.chosen],
            rejected_logps=rejected,
            sources=part.sources,
            num_tokens=part.num_tokens,
        )
        if output.chosen_rewards is not None and output.rejected_rewards is not None:
            self._step_rewards[0] += float(output.chosen_rewards.sum()) + float(output.rejected_rewards.sum())
            self._step_rewards[1] += 2.0 * len(part)

    def _end_step(self) -> None:
        """The optimizer step's losses are all computed: now delta may move, once, by the rewards of all ranks."""
        if self.reward_shift.mode == "previous" and self.reference is not None:
            self.reward_shift.observe(*self._over_ranks(self._step_rewards, self.args.device))
        self.reward_shift.step()
        self._step_rewards = [0.0, 0.0]
        self.sums.values["steps"] += 1

    # ---- log ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add MPO's metrics to a training log."""
        if "loss" in logs:
            logs |= self._take_metrics()
            if self.state.global_step == 1:
                self._show_start(logs)
        super().log(logs, start_time)

    def _take_metrics(self) -> dict[str, float]:
        seconds, waited = self.clock.take()
        total = add_up(self._gathered({**self.sums.values, "data_wait": waited}))
        waited = total.pop("data_wait") / self.accelerator.num_processes
        steps = max(total.pop("steps", 0.0) / self.accelerator.num_processes, 1.0)
        self.sums = StepSums()
        logs = training_metrics(total, steps)
        logs["step_seconds"] = seconds / steps
        if seconds > 0:
            logs["data_wait_share"] = waited / seconds
            logs["pairs_per_second"] = total.get("pairs", 0.0) / seconds
            logs["tokens_per_second"] = total.get("tokens", 0.0) / seconds
        if self.reference is not None:
            logs["reward_shift"] = self.reward_shift.value
        return logs

    def _show_start(self, logs: dict[str, float]) -> None:
        """Beside the first measured loss, the one expected while policy and reference are the same."""
        if self.reference is None:
            return
        offset = expected_start(self.args.weights, 0.0)
        nll = self.args.weights.get("nll", 0.0) * logs.get("loss/nll", 0.0)
        router = (self.router_coefficient or 0.0) * logs.get("loss/router_aux", 0.0)
        logs["start/expected_loss"] = expected = offset + nll + router
        parts = f"{offset:.4f} + nll {nll:.4f}" + (f" + router {router:.4f}" if router else "")
        logger.info(f"first loss {logs['loss']:.4f}; expected {parts} = {expected:.4f}")

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, rewards and log-probs on held-out pairs, and whatever ``extra_evaluations`` add.

        Touches neither delta nor any other state of training.
        """
        given = pairs_of(eval_dataset, self.with_preferences, "eval_dataset")
        data = self.eval_dataset if given is None else given
        sets = {f"_{name}": part for name, part in data.items()} if isinstance(data, dict) else {"": data}
        metrics: dict[str, float] = {}
        for name, part in sets.items():
            found = evaluate_pairs(self, self.get_eval_dataloader(part))
            metrics |= {f"{metric_key_prefix}{name}_{key}": value for key, value in found.items()}
        if eval_dataset is None:
            for extra in self.extra_evaluations:
                metrics |= {f"{metric_key_prefix}_{key}": value for key, value in extra().items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; ``resume_from_checkpoint=True`` goes on from the newest complete checkpoint of the output folder."""
        if resume_from_checkpoint is True:
            found = last_complete_checkpoint(self.args.output_dir)
            if found is None:
                raise RunError(
                    f"there is no complete checkpoint in {self.args.output_dir} to resume from; "
                    "leave training.resume_from_checkpoint out to start anew"
                )
            resume_from_checkpoint = str(found)
        if resume_from_checkpoint and self.is_deepspeed_enabled:  # its engine loads the weights by itself
            self._take_state(str(resume_from_checkpoint))
        refuse_if_scored(self.accelerator, self.model_wrapped)
        if passes_are_shared(self.accelerator):  # the weights can be read only once they are wrapped
            self.add_callback(AtTrainBegin(self._check_rows))
        else:
            self._check_rows()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        state = self._mpo_state()
        if self.args.should_save:
            write_state(f"{self._get_output_dir(trial)}/checkpoint-{self.state.global_step}", state)

    def _mpo_state(self) -> dict[str, Any]:
        return {
            "reward_shift": self.reward_shift.state_dict(),
            "reference_hash": None if self.reference is None else self.reference.weights_hash(),
            "accounts": self.all_pair_counts().to_json(),
            "learning_rates": self.args.learning_rates or None,
        }

    def all_pair_counts(self) -> PairCounts:
        """What became of the pairs of the first epoch so far, over all ranks."""
        return PairCounts.merged(self._gathered(self.pair_counts))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any | None = None) -> None:
        self._take_state(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model if model is None else model, resume_from_checkpoint)
        share_if_frozen(self)

    def _take_state(self, resume_from_checkpoint: str) -> None:
        """Delta and accounts of a checkpoint; refused where it was trained against another reference."""
        state = read_state(resume_from_checkpoint)
        mine = None if self.reference is None else self.reference.weights_hash()
        if state["reference_hash"] != self._gathered(mine)[0]:
            raise RunError(
                f"{resume_from_checkpoint} was trained against another reference than this run has; start from the "
                "same initial model (a resumed policy must not become its own reference)"
            )
        try:
            self.reward_shift.load_state_dict(state["reward_shift"])
        except ValueError as error:
            raise RunError(f"{resume_from_checkpoint}: {error}") from error
        if self.accelerator.is_main_process:  # one rank carries the counts on, so that they add up
            self.pair_counts = PairCounts.from_json(state["accounts"])

    def _load_best_model(self) -> None:
        self.accelerator.wait_for_everyone()  # the first rank may still be writing the last checkpoint
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_weights(self.model, self.state.best_model_checkpoint)
        # Delta as it was then: the evaluation of these weights comes out as it did.
        self.reward_shift.load_state_dict(read_state(self.state.best_model_checkpoint)["reward_shift"])

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: transformers' estimate knows neither images nor shared rows."""
        return 0
