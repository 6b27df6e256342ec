"""MPOTrainer: transformers' Trainer, with the objective of Mixed Preference Optimization over shared prompts."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlmpo import compat, interrupt
from vlmpo.data.encode.encoder import EncodedPairs
from vlmpo.data.encode.processors import tokenizer_of, with_tiles
from vlmpo.errors import RecipeError, RecordError, RunError
from vlmpo.fileio import replace_text
from vlmpo.log import logger
from vlmpo.loss import LossOutput, RewardShift, mpo_loss, needs_reference
from vlmpo.models.adapters import is_peft, prepare_policy_adapter, put_adapter_on, unwrap_peft
from vlmpo.models.fit import check_features, check_processor
from vlmpo.models.masters import HALF, Masters
from vlmpo.models.recompute import free_inputs_of_gradients
from vlmpo.quiet import hold_back_noise
from vlmpo.train.batching import Batch, Collator, MicroBatch, merge
from vlmpo.train.cached_reference import CachedReference, open_cached_reference, precompute
from vlmpo.train.callbacks import BeforeFirstStep, MetricsFile, StepClock
from vlmpo.train.checkpoint import last_choices, load_weights, read_state, restore_state, settings_as_given, steps_done
from vlmpo.train.checkpoint_io import TRAINER_FILE, model_beside, rotate
from vlmpo.train.compiling import check_backend, compile_policy, compile_text_layers
from vlmpo.train.config import MPOConfig
from vlmpo.train.console import RunConsole
from vlmpo.train.counts import PairCounts
from vlmpo.train.delta import DeltaUpdates
from vlmpo.train.determinism import deterministic_run
from vlmpo.train.device_memory import pending_bytes
from vlmpo.train.ema import WeightAverage
from vlmpo.train.evaluation import evaluate_pairs
from vlmpo.train.host_weights import free_memory, make_room
from vlmpo.train.hub import hub_errors
from vlmpo.train.inputs import (
    check_arguments,
    encoder_for,
    load_named,
    pairs_of,
    refuse_shared_weights,
    refuse_unused,
    shares_prompts,
)
from vlmpo.train.kernel_choice import CHOSEN, choose_kernels
from vlmpo.train.launcher import one_of_several, refuse_unseen_ranks
from vlmpo.train.loaders import LoaderFactory
from vlmpo.train.memory import free_what_is_left
from vlmpo.train.memory_choice import fixed_tokens
from vlmpo.train.metrics import (
    StepSums,
    carried_on,
    leave_out_empty_steps,
    may_be_best,
    peak_memory,
    settle_best_metric,
    start_loss,
    window_metrics,
)
from vlmpo.train.model_card import (
    CARD_FILE,
    RunSummary,
    describe_adapter,
    describe_model,
    location_of,
    model_card,
    objective_fields,
    training_settings,
)
from vlmpo.train.opening import Opening, device_name, reference_words, sizes_of_some
from vlmpo.train.out_of_memory import explained
from vlmpo.train.pair_margins import PairMargins, decoder, score_pairs
from vlmpo.train.param_groups import PartRates, count_by_part
from vlmpo.train.precision import (
    choose_precision,
    is_sharded,
    precision_words,
    reads_masters,
    recorded_precision,
    without_sharding,
)
from vlmpo.train.provenance import Settings, pairs_hash, run_settings
from vlmpo.train.rank_sync import RankSync
from vlmpo.train.readers import choose_readers, cores_of_a_rank
from vlmpo.train.reference import CopyReference, Reference, online_reference, switch_dropout_off
from vlmpo.train.resume import refuse_damaged_best
from vlmpo.train.row_memory import RowsInMemory
from vlmpo.train.row_probe import RowProbe
from vlmpo.train.run_checkpoints import RunCheckpoints
from vlmpo.train.run_watch import RunWatch
from vlmpo.train.sampler import PairLoader
from vlmpo.train.sharding import (
    compute_dtype,
    configure_fsdp,
    full_tensor,
    no_gradient_sync,
    prepare_to_score,
    whole_state_dict,
)
from vlmpo.train.start_check import shared_rows_hold
from vlmpo.train.stopping import StopAtSignal, without_jit_checkpoint
from vlmpo.tree.features import share_features
from vlmpo.tree.forward import install, response_logps, response_logps_and_router_losses
from vlmpo.tree.ordered import Select
from vlmpo.tree.positions import ready_on_host
from vlmpo.tree.router_loss import add_router_loss, router_coefficient


class MPOTrainer(Trainer):
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

    Attributes:
        encoder: turns pairs into tokens and vision tensors, as the model reads them.
        loader_encoder: does the same in the loader's workers; pixels are normalised on the device.
        data_collator: turns encoded pairs into batches; its ``shared`` says whether rows share prompts.
        reference: answers with the frozen reference's log-probs; None if no term needs it.
        reward_shift: delta.
        kernels: the fused kernels that policy and reference are read by.
        ranks: collectives, and dummies that keep ranks in step.
        pair_counts: what became of the pairs of the first epoch so far, on this rank.
        average: of the weights, if ``ema_decay`` is set.
        precision: in which the model is read and trained; see vlmpo.train.precision.
        masters: reads it in bfloat16 over float32 weights; None: it is read otherwise.
        parameter_counts: numbers of (all, trained) parameters by part.
        console: shows how the run goes.
        extra_evaluations: called at every evaluation without a data set of its own; return further metrics.
        trained_pairs: what became of the pairs of all ranks, once training is over.
        read_pairs: of each data set ``read``, ``held_out`` and ``dropped``, if somebody has counted, for the opening.
        card_fields: fields of the model card's RunSummary that the trainer does not know, or not as well.
        given_settings: what the run is made by and the trainer does not know, by recipe key: kept in checkpoints.
        row_memory: sets what rows may hold, and whether the vision tower is computed again.
        checkpoints: finds and writes them; knows the run's history.
        watch: ends the run if its data or numbers are good for nothing.
        margins: keeps the margins of pairs for the run's report; None unless :meth:`keep_margins` is called.

    Raises:
        RecipeError: the reference that is asked for contradicts the model, or an argument is of the wrong kind.
        ModelError: the processor has no chat template or is another model's, or a checkpoint does not fit.
        DataError: records of no known format, or a streaming data set, which has no length.
        RecordError: a bad record under ``on_bad_record="fail"``.
        RunError: a checkpoint is incomplete, or was trained against another reference; a loss, a log-prob or a gradient
            is not finite.
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
        hold_back_noise(training=True)
        refuse_unused(data_collator=data_collator, compute_metrics=compute_metrics)
        args = args if args is not None else MPOConfig(output_dir="runs/mpo")
        check_arguments(args, peft_config)
        compat.use_expandable_segments()
        model, ref_model, processing_class = load_named(model, ref_model, processing_class)
        refuse_shared_weights(model, ref_model)
        if peft_config is not None:
            set_seed(args.seed)  # an adapter starts from random numbers: the seed's, not whatever came before
            model = put_adapter_on(model, peft_config)
        reentrant = bool((args.gradient_checkpointing_kwargs or {}).get("use_reentrant"))
        prepare_policy_adapter(model, reentrant_checkpointing=args.gradient_checkpointing and reentrant)
        dropouts = switch_dropout_off(model)
        if dropouts:
            logger.info(f"dropout switched off in {len(dropouts)} modules: policy and reference must read alike")
        shared = shares_prompts(args, unwrap_peft(model))
        install(unwrap_peft(model), shared)
        if not (is_sharded(args) or args.deepspeed):
            compat.undo_preparation(model)
        self.precision = self._choose_precision(args, model, will_open=train_dataset is not None)
        self.router_coefficient = router_coefficient(unwrap_peft(model).config)
        self.with_preferences = needs_reference(args.weights)
        self.encoder = encoder_for(args, processing_class, self.with_preferences, model, ref_model)
        probe = check_processor(model, self.encoder)
        if ref_model is not None:
            check_processor(ref_model, self.encoder)
        self.loader_encoder = self.encoder.for_loader(grouped=args.group_by_prompt > 1)
        self._start_counts(args)
        with without_jit_checkpoint(args):
            super().__init__(
                model=model,
                args=args,
                data_collator=Collator(
                    fixed_tokens(args.max_tokens_per_row, args.device),
                    shared,
                    keyed=args.reference_kind == "cache",
                    group=args.group_by_prompt,
                ),
                train_dataset=pairs_of(train_dataset, self.with_preferences, "train_dataset"),
                eval_dataset=pairs_of(eval_dataset, self.with_preferences, "eval_dataset"),
                processing_class=with_tiles(processing_class, args.max_tiles),  # as it is saved with the model
                callbacks=[*(callbacks or []), self.clock, self.metrics_file],
                optimizers=optimizers,
            )
        self.add_callback(self._at_start)
        self.masters = Masters(self.model) if reads_masters(args, self.precision) else None
        unwrap_peft(self.model)._vlmpo.masters = self.masters
        in_bf16 = self.precision == "bf16" or args.mixed_precision == "bf16"
        self.given_settings |= {"training.precision": self.precision, "training.bf16": in_bf16}
        self.pop_callback(PrinterCallback)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # they may hold parts of the weights only
            check_features(self.model, processing_class, probe)
        self.pop_callback(DEFAULT_PROGRESS_CALLBACK)  # a notebook's is another
        self.add_callback(self.console)
        self.ranks = RankSync(self.accelerator, self.encoder, self.data_collator)
        self._compose(args)
        every, trained = count_by_part(self.model), count_by_part(self.model, trained_only=True)
        self.parameter_counts = {part: (count, trained.get(part, 0)) for part, count in every.items()}
        self.part_rates = PartRates.for_run(
            args,
            self.model,
            self.optimizer,
            self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None,
        )
        self.average = WeightAverage.for_run(args.ema_decay, self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if self.average is not None:
            self.add_callback(self.average)
        if args.dataloader_num_workers is None:
            pairs = 0 if self.train_dataset is None else len(self.train_dataset)
            args.dataloader_num_workers = choose_readers(pairs, args.device.type, cores_of_a_rank())
        self.loaders = LoaderFactory(
            args,
            encoder=self.encoder,
            loader_encoder=self.loader_encoder,
            collator=self.data_collator,
            accelerator=self.accelerator,
            model=self.model,
        )
        if self.train_dataset is not None:
            self.loaders.check_steps(len(self.train_dataset), compat.batch_size_per_device(self))
        self.kernels = choose_kernels(
            args, self.model, ref_model, self.ranks.all_gather, rounded=self.masters is not None
        )
        self.reference = self._build_reference(ref_model, fresh_adapter=peft_config is not None)
        self._share_frozen_tower()

    def _choose_precision(self, args: MPOConfig, model: Any, *, will_open: bool) -> str:
        """Return the precision; the opening of a run says why, otherwise it is logged now."""
        self._precision_line: list[str] = []
        before = recorded_precision(args.output_dir, args.resume_from_checkpoint)
        return choose_precision(args, model, before, self._precision_line.append if will_open else None)

    def _start_counts(self, args: MPOConfig) -> None:
        """Start all that counts, sums and keeps while a run goes on."""
        self.reward_shift = RewardShift(args.reward_shift)  # type: ignore[arg-type]
        self.sums = StepSums()
        self.clock = StepClock()
        self.console = RunConsole()
        self.metrics_file = MetricsFile(args.output_dir)
        self.pair_counts = PairCounts()
        self.extra_evaluations: list[Callable[[], dict[str, float]]] = []
        self.card_fields: dict[str, Any] = {}
        self._given_to_card: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        self._evaluated: dict[int, dict[str, dict[str, float]]] = {}  # by step and name of the set
        self.read_pairs: dict[str, dict[str, Any]] = {}
        self.trained_pairs = PairCounts()
        self.given_settings: Settings = {}
        self._at_start = BeforeFirstStep()
        self.margins: PairMargins | None = None
        self._step_batches: list[Batch] = []  # of the step under way, on the host
        self._sums_before = self.sums.snapshot()  # when it began
        self._margins_before = 0
        self._steps_before = 0  # steps of the checkpoint that is resumed from
        self._loss_known = True  # whether the sum of the loss over all steps is known, of earlier sessions too
        self._scored_model: nn.Module | None = None  # the policy as prepared for an evaluation before training

    def _compose(self, args: MPOConfig) -> None:
        """Make what watches a run, moves delta, stops at signals, and keeps checkpoints, on all ranks together."""
        self.delta = DeltaUpdates(
            self.reward_shift, self.ranks, beta=args.beta, device=args.device, with_rewards=self.with_preferences
        )
        self.watch = RunWatch(args, self.ranks, counts=self.all_pair_counts, deepspeed=self.is_deepspeed_enabled)
        self.checkpoints = RunCheckpoints(
            args,
            self.ranks,
            made_by=self.settings,
            reuse=self._reuse_choices,
            reference_hash=self._reference_hash,
            deepspeed=self.is_deepspeed_enabled,
        )
        self.row_memory = RowsInMemory(args, model=self.model, collator=self.data_collator, ranks=self.ranks)
        self.stopping = StopAtSignal(self.ranks.all_gather, self.accelerator.wait_for_everyone)
        self.add_callback(self.stopping)

    @property
    def shared(self) -> bool:
        """Whether a prompt is read once for its responses."""
        return self.data_collator.shared

    # ---- set-up ----

    def create_accelerator_and_postprocess(self) -> None:
        """Do as transformers does; refuse wrappers that cannot be exact, and use one GPU a process.

        Raises:
            RecipeError: FSDP of version 1, a launcher whose processes do not see each other, or no compiler for
                torch_compile.
        """
        if self.args.n_gpu > 1:  # transformers would use all by DataParallel, which gives each the same rows
            use_all = f"torchrun --nproc_per_node {self.args.n_gpu} (docs/distributed.md)"
            logger.info(f"one of {self.args.n_gpu} GPUs is used; to use all, start with {use_all}")
            compat.use_one_gpu(self.args)
        check_backend(self.args)
        super().create_accelerator_and_postprocess()
        refuse_unseen_ranks(os.environ, self.accelerator.num_processes)
        if remark := one_of_several(os.environ):
            logger.info(f"note: {remark}")
        compile_policy(self.accelerator, self.model, self.args)
        configure_fsdp(self.accelerator, self.model, asked_for=bool(self.args.fsdp))
        without_sharding(self.args, self.accelerator, self.precision)

    def _build_reference(self, given: Any | None, fresh_adapter: bool) -> Reference | None:
        if not self.with_preferences:
            return None

        def online(kind: str) -> Reference:
            reference = online_reference(
                kind,
                policy=self.model,
                given=given,
                fresh_adapter=fresh_adapter,
                shared=self.shared,
                kernels=self.kernels,
                accelerator=self.accelerator,
                rounded=self.masters is not None,
            )
            if isinstance(reference, CopyReference):  # a copy of compiled layers is not compiled
                compile_text_layers(reference.tower_owner(), self.args)
            return reference

        if self.args.reference_kind != "cache":
            return online(self.args.reference_kind)
        encoder = self.encoder
        tiles = encoder.tiles_key(getattr(self.train_dataset, "tile_limits", ()))
        reference, self.completeness = open_cached_reference(
            self.args,
            source=self.model if given is None else given,
            online=lambda: online("auto"),
            pixel_scale=self.loader_encoder.pixel_scale,
            shared=lambda: self.shared,
            kernels=self.kernels,
            accelerator=self.accelerator,
            rounded=self.masters is not None,
            dataset=self.train_dataset,
            encoding=[encoder.max_length, encoder.over_long, tiles, encoder.video_frames],
            will_evaluate=self.eval_dataset is not None,
        )
        self.add_callback(self.completeness)
        return reference

    def _share_frozen_tower(self) -> None:
        """Let the policy take image features from its reference if its vision tower is frozen and equal.

        Not under FSDP or DeepSpeed, whose hooks would miss a tower that is called outside of its model's forward.
        Decided anew when other weights are loaded.
        """
        owner = None if self.reference is None else self.reference.tower_owner()
        if owner is not None:
            share_features(unwrap_peft(self.model), owner, share=not self.ranks.share_passes)

    def _make_room(self) -> None:
        """Let the reference rest in host memory between uses if the device would have too little room for rows.

        And keep nothing for gradients that no weight wants.
        """
        if self.args.activation_checkpointing and not self.args.activation_checkpointing_kwargs["use_reentrant"]:
            free_inputs_of_gradients(self.model)
        if self.reference is not None:
            make_room(self.reference, free_memory(self.args.device), pending_bytes(self.model, self.optimizer))

    def _check_rows(self) -> None:
        """Stop sharing prompts if shared rows differ from separate ones; see :func:`shared_rows_hold`."""
        policy = unwrap_peft(self.model)
        hold = shared_rows_hold(
            EncodedPairs(self.train_dataset, self.loader_encoder),
            policy,
            shared=self.shared,
            prepare=self._prepare_inputs,
            half=self.args.mixed_precision != "no",
            wrapped=self.model_wrapped if self.ranks.share_passes else None,
            reference=getattr(self.reference, "model", None),
            fail_on_bad=self._fail_on_bad,
            gather=self.ranks.all_gather,
        )
        if not hold:
            self.data_collator.shared = False
            install(policy, shared=False)
            if self.reference is not None:
                self.reference.stop_sharing()

    def row_probe(self) -> RowProbe:
        """Return what reads rows of a few training pairs before the first step; the model is prepared by then."""
        return RowProbe(
            EncodedPairs(self.train_dataset, self.loader_encoder),
            policy=unwrap_peft(self.model),
            wrapped=self.model_wrapped,
            shared=self.shared,
            with_router=self.router_coefficient is not None,
            prepare=self._prepare_inputs,
            pairs_at_once=compat.batch_size_per_device(self),
            accelerator=self.accelerator,
        )

    def _choose_rows(self, known: Settings) -> None:
        """Choose what rows hold; ``known``: the settings of the checkpoint that is resumed from."""
        self.row_memory.choose(
            known,
            done=self._steps_before,
            pairs_at_once=compat.batch_size_per_device(self),
            probe=self.row_probe,
            pending=functools.partial(pending_bytes, self.model, self.optimizer),
            reference=self.reference,
        )

    def _say_what_it_is(self) -> None:
        """Log the opening summary, on the first rank."""
        if not (self.console.with_opening and self.is_world_process_zero()):
            return
        args, model, held_out = self.args, self.model, self.eval_dataset
        per_device, counts = compat.batch_size_per_device(self), self.parameter_counts.values()
        per_epoch = len(self.train_dataset) / (per_device * args.world_size * args.gradient_accumulation_steps)
        sets = held_out if isinstance(held_out, dict) else {} if held_out is None else {"": held_out}
        opening = Opening(
            device=device_name(args.device),
            ranks=args.world_size,
            precision="".join(self._precision_line).removeprefix("precision: ") or precision_words(self.precision),
            parameters=(sum(every for every, _ in counts), sum(trained for _, trained in counts)),
            adapter=describe_adapter(model.peft_config[model.active_adapter]) if is_peft(model) else None,
            pairs=len(self.train_dataset),
            sets=self.read_pairs,
            sizes=sizes_of_some(EncodedPairs(self.train_dataset, self.encoder)),
            per_device=per_device,
            accumulation=args.gradient_accumulation_steps,
            steps=self.state.max_steps,
            epochs=round(self.state.max_steps / per_epoch, 2) if args.max_steps > 0 else args.num_train_epochs,
            done=self.state.global_step,
            reference=reference_words(self.reference),
            memory=self.row_memory.words,
            folder=args.output_dir,
            held_out={name: len(pairs) for name, pairs in sets.items()},
        )
        for line in opening.lines():
            logger.info(line)

    # ---- data ----

    def get_train_dataloader(self) -> PairLoader:
        """Return the batches of this rank, in an order that depends on seed and epoch alone."""
        return self._training_loader(self.args.dataloader_drop_last)

    def _training_loader(self, drop_last: bool) -> PairLoader:
        return self.loaders.training(self.train_dataset, compat.batch_size_per_device(self), drop_last)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> PairLoader:
        """Return the batches of this rank, in the data set's own order."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        return self.loaders.evaluation(self.eval_dataset[data] if isinstance(data, str) else data)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], dict[str, float]]:
        """Return the batches of one optimizer step and its denominators, summed over ranks before any forward."""
        self.clock.start()
        self.row_memory.begin_step(self.state.global_step + 1)
        if self.masters is not None:
            self.masters.moved()
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self.clock.fetched()
        self.watch.numbers.start()
        info = self.ranks.all_reduce(batches, self._count_pairs(batches), interrupt.requested())
        self.stopping.agree(info.signum)
        done = self.state.epoch or 0.0
        self.watch.see_data(info, self.pair_counts, step=self.state.global_step + 1, epoch=done)
        if self.average is not None:
            self.average.paused = self.watch.step_is_empty
        self._step_batches = []
        self._sums_before = self.sums.snapshot()
        self._margins_before = 0 if self.margins is None else self.margins.added
        counts = {"pairs": float(info.pairs), "chosen_tokens": float(info.chosen_tokens)}
        empty = not all(part.rows for batch in batches for part in batch.micro_batches)
        if empty or self.accelerator.num_processes > 1:
            batches = self.ranks.add_dummies(batches, info, self.model_wrapped)
        return batches, counts

    def _count_pairs(self, batches: list[Batch]) -> RecordError | None:
        """Count what became of the pairs; return the error of a bad record if it is to end the run."""
        first_epoch = (self.state.epoch or 0.0) < 1.0  # every pair comes once an epoch
        for batch in batches:
            self.encoder.add_notices(batch.notices)
            if self._fail_on_bad and batch.dropped:
                return batch.dropped[0].error
            for error in self.pair_counts.count(batch, first_epoch=first_epoch):
                logger.info(f"dropped: {error}")
        return None

    # ---- one step ----

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Run forward and backward of a batch; if a row is out of memory, of the whole step again in smaller ones.

        Raises:
            RunError: a row that cannot be smaller is out of memory.
        """
        self._step_batches.append(inputs)
        todo = [inputs]
        while todo:
            with self.row_memory.step_again.watched() as attempt:
                for batch in todo:
                    total = torch.zeros((), device=self.args.device)
                    micro_batches = self._micro_batches(batch)
                    for micro_batch in micro_batches:
                        attempt.reading = micro_batch
                        with self._one_pass(model, last=micro_batch is micro_batches[-1]):
                            total = total + super().training_step(model, micro_batch, num_items_in_batch)
            todo = [] if attempt.failure is None else self._step_batches
            if todo:
                self._undo_step(model)
        if self.accelerator.sync_gradients:
            self.ranks.drop_dummy_gradients(model)
        return total

    @contextlib.contextmanager
    def _one_pass(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Run the body, a forward and a backward pass; ``last``: of a batch."""
        due = contextlib.nullcontext() if last else no_gradient_sync(self.accelerator, model)
        with due, contextlib.nullcontext() if self.masters is None else self.masters.kept_for_backward():
            yield

    def _micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """Return what of a batch is read in one pass each, in rows as large as they may be by now.

        Under ``reward_shift: running`` all its rewards must be known before any backward: it is then one micro-batch.
        """
        if batch.bound != self.data_collator.bound:
            batch = self.data_collator.again(batch)
        return [merge(batch.micro_batches)] if self.reward_shift.mode == "running" else batch.micro_batches

    def _undo_step(self, model: nn.Module) -> None:
        """Put gradients and sums back to where they were when the optimizer step began."""
        for parameter in model.parameters():
            parameter.grad = None
        self.sums.restore(self._sums_before)
        if self.margins is not None:
            self.margins.forget_from(self._margins_before)
        self.delta.restart_step()
        self.watch.numbers.start()
        free_what_is_left()

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        """Move a micro-batch to the device; there, make the processor's pixels of those that came as bytes."""
        device, scale = self.args.device, self.loader_encoder.pixel_scale
        dtype = compute_dtype(self.accelerator) if self.masters is None else HALF
        policy, rows = unwrap_peft(self.model), []
        for on_host in inputs.rows:
            if self.shared:
                ready_on_host(policy, on_host)
            row = on_host.to(device)
            vision = row.vision if scale is None else scale.normalise(row.vision)
            if dtype is not None:
                vision = {name: t.to(dtype) if t.is_floating_point() else t for name, t in vision.items()}
            rows.append(replace(row, vision=vision))
        return replace(
            inputs,
            rows=rows,
            chosen=inputs.chosen.to(device, non_blocking=True),
            rejected=None if inputs.rejected is None else inputs.rejected.to(device, non_blocking=True),
            chosen_lengths=inputs.chosen_lengths.to(device, non_blocking=True),
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: dict[str, float] | None = None,
    ) -> Any:
        """Return this micro-batch's share of the global batch's loss, times the number of ranks.

        Gradients are averaged over ranks, and the denominators in ``num_items_in_batch`` are of all of them.
        """
        micro_batch, counts = inputs, num_items_in_batch or {}
        policy, reference, router_losses = self._response_logps(model, micro_batch, with_router=model.training)
        if model.training:
            self.delta.before_loss(micro_batch, policy, reference)
        output = self._loss(micro_batch, policy, reference, counts)
        if router_losses is not None and self.router_coefficient is not None:
            output = add_router_loss(
                output,
                router_losses,
                chosen=micro_batch.chosen,
                rejected=micro_batch.rejected,
                coefficient=self.router_coefficient,
                num_pairs=counts.get("pairs"),
            )
        loss = output.loss
        if model.training:
            self._record(micro_batch, policy.detach(), output)
            loss = self.watch.numbers.guarded(micro_batch, policy, reference, output)
        loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _response_logps(
        self, model: nn.Module, micro_batch: MicroBatch, with_router: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return log-probs of policy and reference, and router losses if the model trains by them, ``[responses]``."""
        reference = None if self.reference is None else self.reference.response_logps(micro_batch)
        router_losses = None
        if with_router and self.router_coefficient is not None:
            policy, router_losses = response_logps_and_router_losses(model, micro_batch.rows)
        else:
            policy = response_logps(model, micro_batch.rows)
        return policy, None if reference is None else reference.to(policy.dtype), router_losses

    def _loss(
        self, micro_batch: MicroBatch, policy: Tensor, reference: Tensor | None, counts: dict[str, float]
    ) -> LossOutput:
        chosen, rejected = micro_batch.chosen, micro_batch.rejected if reference is not None else None
        return mpo_loss(
            Select.apply(policy, chosen),
            None if rejected is None else Select.apply(policy, rejected),
            None if reference is None else reference[chosen],
            None if reference is None or rejected is None else reference[rejected],
            micro_batch.chosen_lengths,
            reward_shift=self.reward_shift.value,
            num_pairs=counts.get("pairs"),
            num_chosen_tokens=counts.get("chosen_tokens"),
            **self.args.loss_settings,
        )

    def _record(self, micro_batch: MicroBatch, policy: Tensor, output: LossOutput) -> None:
        """Add a micro-batch to the sums behind the log and behind delta."""
        with_rejected = micro_batch.rejected is not None and self.with_preferences
        self.sums.add(
            output,
            chosen_logps=policy[micro_batch.chosen],
            rejected_logps=policy[micro_batch.rejected] if with_rejected else None,
            sources=micro_batch.sources,
            num_tokens=micro_batch.num_tokens,
        )
        self.delta.add(output)
        if self.margins is not None:
            self.margins.add(micro_batch.origins, output)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the gradient, and let nothing move the weights that should not.

        transformers calls this between the backward pass and the optimizer's step, whether it clips or not. Here, once
        a step, the host waits for the device and reads whatever it needs to know.

        Raises:
            RunError: the norm, a loss or a log-prob is not finite; all ranks raise it.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, Tensor):
            norm = full_tensor(norm)
        if not self.watch.may_move(0.0 if norm is None else float(norm), self.state.global_step + 1):
            # Without a gradient an optimizer leaves weights and moments as they are: of zeros it would take momentum
            # and weight decay. (DeepSpeed has stepped already.)
            for parameter in model.parameters():
                parameter.grad = None
        self.delta.end_step()  # the losses of the optimizer step are all computed
        self.row_memory.end_step()
        self.sums.values["steps"] += 1
        self.sums.values["empty_steps"] += self.watch.step_is_empty
        return norm

    # ---- log and evaluation ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add MPO's metrics to a training log, and the rates of parts beside the base one."""
        if "loss" in logs:
            seconds, waited = self.clock.take()
            own = {**self.sums.values, "data_wait": waited, "peak_memory": peak_memory(self.args.device)}
            logs |= window_metrics(self.ranks.all_gather(own), seconds)
            if self.margins is not None:
                self.margins.collect(self.state.global_step, self.ranks.all_gather)
            self.sums = StepSums()
            leave_out_empty_steps(logs)
            if self.reference is not None:
                logs["reward_shift"] = self.reward_shift.value
                if self.state.global_step == 1 and "loss" in logs:
                    logs["start/expected_loss"] = start_loss(logs, self.args.weights, self.router_coefficient)
            self.watch.see_log(self.state.global_step, logs)
        if "train_loss" in logs:  # transformers divides the loss of this session by its steps
            steps = self.state.global_step - self.all_pair_counts().empty_steps
            if self._loss_known and steps:
                logs["train_loss"] = compat.loss_sums(self)["total"] / steps
            elif self.state.global_step == self._steps_before:
                del logs["train_loss"]
        if "learning_rate" in logs and self.part_rates is not None:
            logs |= self.part_rates.latest
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return loss, rewards and log-probs on held-out pairs, and whatever ``extra_evaluations`` add.

        Touches neither delta nor any other state of training.

        Raises:
            RecordError: some rank met a bad record under ``on_bad_record="fail"``; all of them raise it.
            RunError: the wrapper of the run cannot score before training.
        """
        with interrupt.at_once(), explained(), deterministic_run(self.args.deterministic):
            return self._evaluate_sets(eval_dataset, metric_key_prefix)

    def _evaluate_sets(self, eval_dataset: Any, metric_key_prefix: str) -> dict[str, float]:
        given = pairs_of(eval_dataset, self.with_preferences, "eval_dataset")
        data = self.eval_dataset if given is None else given
        sets = {f"_{name}": part for name, part in data.items()} if isinstance(data, dict) else {"": data}
        metrics: dict[str, float] = {}
        seen: dict[str, dict[str, float]] = {}
        model = self._model_to_score()

        def score(on_host: MicroBatch) -> tuple[Tensor, Tensor | None]:
            return self._response_logps(model, self._prepare_inputs(on_host))[:2]

        for name, part in sets.items():
            seen[f"{metric_key_prefix}{name.replace('_', ' ', 1)}"] = found = evaluate_pairs(
                self.ranks.in_step(self.get_eval_dataloader(part), model, self._fail_on_bad),
                model,
                score=functools.partial(self.row_memory.step_again.read_in_parts, read=score),
                gather=self.ranks.all_gather,
                loss_settings=self.args.loss_settings,
                reward_shift=self.reward_shift.value,
            )
            of_set = {f"{metric_key_prefix}{name}_{key}": value for key, value in found.items()}
            self._evaluated.setdefault(self.state.global_step, {})[f"{metric_key_prefix}{name}"] = of_set
            metrics |= of_set
        if eval_dataset is None:
            for extra in self.extra_evaluations:
                seen[f"{metric_key_prefix} questions"] = found = extra()
                metrics |= {f"{metric_key_prefix}_{key}": value for key, value in found.items()}
        self.log(metrics)
        self.console.evaluated(self.args, self.state, seen)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _model_to_score(self) -> nn.Module:
        """Return the policy as training calls it; before training it is under no wrapper, autocast or sharding yet."""
        if compat.is_prepared(self.model_wrapped):
            return self.model_wrapped
        if self._scored_model is None:
            self._scored_model = prepare_to_score(self.accelerator, self.model_wrapped)
        return self._scored_model

    def keep_margins(self) -> None:
        """Keep the margins that training will see in a small file of the output folder, for the run's report."""
        self.margins = PairMargins(self.args.output_dir, compat.batch_size_per_device(self))
        self.add_callback(self.margins)

    def score_kept_pairs(self, share: float) -> None:
        """Score the pairs with the largest and the most negative margins by token, for the run's report; on all ranks.

        Args:
            share: of the time of training that it may take, at most.
        """
        if self.margins is None or self.reference is None:
            return
        self.margins.collect(self.state.global_step, self.ranks.all_gather)
        with interrupt.at_once():
            self.margins.kept.pairs = score_pairs(
                self.margins.kept.extremes(),
                pairs=EncodedPairs(self.train_dataset, self.loader_encoder),
                dataset=self.train_dataset,
                policy=self._model_to_score(),
                reference=self.reference,
                prepare=self._prepare_inputs,
                gather=self.ranks.all_gather,
                shared=self.shared,
                keyed=self.data_collator.keyed,
                beta=self.args.beta,
                decode=decoder(tokenizer_of(self.encoder.processor)),
                seconds=self.margins.seconds_to_score(share),
            )
        self.margins.write(self.args.should_save)

    @property
    def _fail_on_bad(self) -> bool:
        return self.args.on_bad_record == "fail"

    def precompute_reference(self) -> dict[str, int]:
        """Put the reference's log-probs of all training and evaluation pairs into its store.

        Returns:
            How many responses were ``known`` and how many ``computed``, and evaluation pairs ``dropped``, over all
            ranks. What became of the training pairs is in ``pair_counts``.

        Raises:
            RecipeError: the reference has no store.
            DataError: no pair can be used.
            RunError: a log-prob is not finite.
        """
        reference = self.reference
        if not isinstance(reference, CachedReference):
            raise RecipeError("loss.weights: only nll is on, which needs no reference, so there is nothing to keep")
        # Which pairs an epoch leaves out under dataloader_drop_last depends on the seed: all of them are read.
        for line in self._precision_line:
            logger.info(line)
        loader = self._training_loader(drop_last=False)
        loader.last_epoch = None  # it is read once
        training = self.ranks.in_step(loader, self.model, self._fail_on_bad)
        evaluation = self.eval_dataset
        sets = evaluation.values() if isinstance(evaluation, dict) else [] if evaluation is None else [evaluation]
        loaders = itertools.chain.from_iterable(self.get_eval_dataloader(data) for data in sets)

        def score(on_host: MicroBatch) -> Tensor:
            return reference.response_logps(self._prepare_inputs(on_host))

        with explained(), deterministic_run(self.args.deterministic):
            counts = precompute(
                reference,
                training=map(self._counted, training),
                evaluation=self.ranks.in_step(loaders, self.model, self._fail_on_bad),
                score=functools.partial(self.row_memory.step_again.read_in_parts, read=score),
            )
        pair_counts = self.all_pair_counts()
        if not pair_counts.used.total():
            raise self.watch.nothing_left("nothing to train on: none of the pairs can be used")
        self.completeness.reach()
        ranks = self.ranks.all_gather(counts)
        return {name: sum(rank[name] for rank in ranks) for name in counts}

    def _counted(self, batch: Batch) -> Batch:
        self._count_pairs([batch])
        return batch

    # ---- optimizer ----

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return transformers' optimizer, its groups split by part if ``learning_rates`` is set."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if self.masters is not None:
            masters = self.masters
            optimizer.register_step_post_hook(lambda *_: masters.moved())
        if fresh and self.part_rates is not None:
            self.part_rates.split(optimizer, self.model if model is None else model)
        return optimizer

    def _get_learning_rate(self) -> float:
        """Return the base rate as scheduled, whichever group comes first."""
        rate = None if self.part_rates is None else self.part_rates.base_rate(self.optimizer)
        return super()._get_learning_rate() if rate is None else rate

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: transformers' estimate covers neither images nor shared rows."""
        return 0

    # ---- averaged weights, the best checkpoint ----

    def save_average(self, folder: str | os.PathLike[str]) -> None:
        """Save the model with the averaged weights, and the processor, as a model folder of its own."""
        if self.average is None or not self.average.averages:
            raise RunError("there is no average to save: set ema_decay, and train")
        with self.average.applied_to(self.model):
            self.save_model(os.fspath(folder), _internal_call=True)
        if self.args.should_save:
            (Path(folder) / CARD_FILE).unlink(missing_ok=True)  # PEFT's, which is a form to fill in

    def settle_best_metric(self) -> None:
        """Give ``metric_for_best_model`` its full name. Raises RecipeError if no evaluation will give it."""
        settle_best_metric(self.args, self.eval_dataset, self.extra_evaluations)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Do as transformers does, for evaluations whose weights are kept: one that is not saved cannot be loaded."""
        name, state = self.args.metric_for_best_model, self.state
        is_best = may_be_best(name, metrics, state.global_step) and self._keeps_weights()
        is_best = is_best and super()._determine_best_metric(metrics, trial)
        earlier = state.best_global_step and f"best so far: step {state.best_global_step} ({state.best_metric:.4f})"
        self.console.judged("best so far" if is_best else earlier or "")
        return is_best

    def _keeps_weights(self) -> bool:
        saves = self.args.save_strategy == "best" or self.control.should_save
        return bool(saves or not self.args.load_best_model_at_end)

    @property
    def final_step(self) -> int:
        """The optimizer step whose weights the model holds once training is over."""
        return self.state.global_step if self._best_checkpoint is None else self.state.best_global_step

    @property
    def _best_checkpoint(self) -> str | None:
        """The checkpoint that the model is loaded from once training is over; None: it is that of the last step."""
        return self.state.best_model_checkpoint if self.args.load_best_model_at_end else None

    def final_model(self) -> dict[str, Any]:
        """Return which weights the final model has, in plain JSON values."""
        final: dict[str, Any] = {"step": self.final_step, "checkpoint": None}
        if self._best_checkpoint is not None:
            final["checkpoint"] = Path(self._best_checkpoint).name
            final["best_by"] = {self.args.metric_for_best_model: self.state.best_metric}
        if self.average is not None:
            final["ema"] = {"decay": self.average.decay, "step": self.state.global_step}
        return final

    # ---- checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train. ``resume_from_checkpoint=True`` goes on from the newest sound checkpoint of the output folder.

        If there is none yet the run starts; if all its steps are done nothing is trained.

        Raises:
            RunError: no sound checkpoint, one of another reference, average, rates or settings, or a model that FSDP
                has sharded to evaluate it; a loss, a log-prob or a gradient is not finite.
            DataError: there is nothing, or too little, to train on.
            Interrupted: SIGTERM or Ctrl-C ended it, after a checkpoint; only under ``vlmpo train``, or if
                ``enable_jit_checkpoint`` is set.
        """
        checkpoint = self.checkpoints.choose(resume_from_checkpoint or None)
        self.checkpoints.forget_choice()  # the run will write others
        if checkpoint and self.is_deepspeed_enabled:  # its engine loads the weights by itself
            self._load_state(checkpoint)
        if self.is_fsdp_enabled and self._scored_model is not None:
            # accelerate finds the optimizer's weights only before sharding
            raise RunError(
                "under FSDP a model that was evaluated cannot be trained any more; "
                "to evaluate at the start set training.eval_on_start: true"
            )
        before_first_step: list[Callable[[], None]] = [self._make_room]
        if self.ranks.share_passes:  # the weights can be read only once they are wrapped
            before_first_step.insert(0, self._check_rows)
        else:
            with explained():
                self._check_rows()
        state = read_state(checkpoint) if checkpoint else {}
        before_first_step.append(functools.partial(self._choose_rows, state.get("settings") or {}))
        self.settle_best_metric()
        if self.average is not None:
            self.average.start_from(checkpoint)
        self._steps_before, self._loss_known = 0, True
        if checkpoint:
            self.row_memory.before = self.row_memory.before or last_choices(Path(checkpoint).parent)
            self._steps_before = steps_done(checkpoint) or 0
            self.metrics_file.kept = state.get("metrics_lines")
            before_first_step.append(functools.partial(self._go_on, state))
        before_first_step.append(self._say_what_it_is)
        self.remove_callback(self._at_start)  # of an earlier call, which may not have come so far
        self._at_start = BeforeFirstStep(*before_first_step)
        self.add_callback(self._at_start)
        self.watch.start()
        watched = self.stopping.watched(self.args.enable_jit_checkpoint)
        try:
            with watched, explained(), deterministic_run(self.args.deterministic):
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self.console.close()
            if isinstance(loader := self.callback_handler.train_dataloader, PairLoader):
                loader.close()
        self.watch.end_data(self.state.epoch or 0.0)
        self.trained_pairs = self.all_pair_counts()
        if self.args.load_best_model_at_end and self._best_checkpoint is None:
            logger.info(
                f"NOT the best checkpoint: none was kept with a {self.args.metric_for_best_model} to go by. "
                f"The model is that of the last step, {self.state.global_step}."
            )
        elif self._best_checkpoint is not None:
            value = f"{self.args.metric_for_best_model} {self.state.best_metric:.4g}"
            logger.info(f"best checkpoint: {self._best_checkpoint} ({value}); the model is that of its step")
        return output._replace(training_loss=output.metrics.get("train_loss", output.training_loss))

    def settings(self) -> Settings:
        """Return what the run is made by: JSON values by recipe key."""
        if "data.train.pairs" not in self.given_settings and self.train_dataset is not None:
            self.given_settings["data.train.pairs"] = pairs_hash(self.train_dataset)
        chosen = {CHOSEN: self.kernels.kinds, "chosen": self.row_memory.chosen()}
        return run_settings(self.args, self.model, {**self.given_settings, **chosen})

    def _reuse_choices(self, before: Settings) -> None:
        """Choose again what the run that is resumed chose, if it was asked for the same."""
        self.reuse_kernels(before.get(CHOSEN), before.get("model.kernels"))

    def reuse_kernels(self, kinds: list[str] | None, asked: Any) -> None:
        """Use the kernels that an earlier session of the run chose, if it was asked for the same."""
        if kinds is not None and asked == self.args.kernels:
            self.kernels.use(kinds)

    def planned_steps(self) -> int:
        """Return the optimizer steps of the whole run."""
        return int(super().set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Do as transformers does; leave no epoch to a run whose steps are done: it would make one more."""
        values = list(super().set_initial_training_values(args, dataloader))
        if 0 < values[-1] <= self._steps_before:
            logger.info(f"finished: all {values[-1]} steps are done; nothing is left to train")
            values[0] = min(values[0], self._steps_before // values[1])
        return tuple(values)

    def _go_on(self, state: dict[str, Any]) -> None:
        """Go on with the sums behind the next log and the final loss; log, save and evaluate as often as set now."""
        self.state.compute_steps(self.args, self.state.max_steps)
        window = state.get("window")
        self._loss_known = bool(window)
        if window:
            loss, sums = carried_on(window, self.args.process_index, self.args.world_size)
            compat.restore_loss_sums(self, **loss)
            self.sums.values.update(sums)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model whole, also if checkpoints hold shards: of those transformers would write nothing.

        It is written beside and put in its place file by file, so that none is ever cut short.

        Raises:
            RunError: a weight is not finite; nothing is written.
        """
        self.watch.check_weights(self.model, self.state.global_step)
        folder = Path(output_dir or self.args.output_dir)
        if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            super().save_model(output_dir, _internal_call)
            return
        with whole_state_dict(self.accelerator), model_beside(folder, self.args.should_save) as partial:
            super().save_model(os.fspath(partial), _internal_call=True)
        if not _internal_call:
            self._write_card(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def all_pair_counts(self) -> PairCounts:
        """Return what became of the pairs of the first epoch so far, over all ranks."""
        return PairCounts.merged(self.ranks.all_gather(self.pair_counts))

    def _get_output_dir(self, trial: Any) -> str:
        """Return the run folder; while a checkpoint is written, the folder beside in which it is."""
        return self.checkpoints.partial or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside; put it in its place when it is whole; only then remove older ones."""
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self.checkpoints.written_beside(checkpoint) as partial:  # there transformers finds nothing to remove
            super()._save_checkpoint(model, trial)
        self.checkpoints.note_best(self.state, folder)
        if self.args.should_save:
            self.state.save_to_json(os.fspath(partial / TRAINER_FILE))
            if self.average is not None:
                self.average.save(partial)
        window = self.ranks.all_gather({"loss": compat.loss_sums(self), "sums": dict(self.sums.values)})
        self.checkpoints.complete(
            checkpoint,
            reward_shift=self.reward_shift,
            pair_counts=self.all_pair_counts(),
            window=window if self._loss_known else None,
            metrics_lines=self.metrics_file.count_lines(),
        )
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.fspath(checkpoint))
        if self.args.should_save:
            rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _reference_hash(self) -> str | None:
        return None if self.reference is None else self.reference.weights_hash()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any | None = None) -> None:
        self._load_state(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model if model is None else model, resume_from_checkpoint)
        self._share_frozen_tower()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's moments and the schedule's count of steps; rates and decay stay as they are set now."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with settings_as_given(self.optimizer, self.lr_scheduler, checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_state(self, checkpoint: str) -> None:
        """Restore delta and pair counts; raise RunError if the checkpoint was trained against another reference."""
        first_hash = self.checkpoints.first_reference_hash()
        pair_counts = restore_state(checkpoint, reward_shift=self.reward_shift, reference_hash=first_hash)
        if self.accelerator.is_main_process:  # one rank carries the counts on, so that they add up
            self.pair_counts = pair_counts

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        refuse_damaged_best(best, self.checkpoints.damage_in(Path(best), to_resume=False))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_weights(self.model, best)
        # Delta as it was then: the evaluation of these weights comes out as it did.
        self.reward_shift.load_state_dict(read_state(best)["reward_shift"])

    # ---- the Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Do as transformers does. Raises RunError if the Hub cannot be reached or refuses."""
        with hub_errors(" (log in with `hf auth login`, or set HF_TOKEN)"):
            super().init_hf_repo(token=token, private=private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint once it is whole and in its place: transformers asks for it before."""
        if self.checkpoints.partial is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs: Any) -> Any:
        """Upload the run folder, its model card in it. Raises RunError if that fails; the folder is whole."""
        with hub_errors(f"; the model is in {self.args.output_dir}, push it from there"):
            return super().push_to_hub(commit_message, **kwargs)

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
        given = {"language": language, "license": license, "datasets": dataset_tags, "tags": tags}
        named = {name: value for name, value in (("title", model_name), ("base_model", finetuned_from)) if value}
        self._given_to_card = given, named
        self._write_card(Path(self.args.output_dir))

    def _write_card(self, folder: Path) -> None:
        """Write the card into a model's folder, with what was last given to :meth:`create_model_card`."""
        if not self.is_world_process_zero():
            return
        given, named = self._given_to_card
        elsewhere = {} if folder == Path(self.args.output_dir) else {"location": location_of(folder)}
        text = model_card(self.run_summary(**elsewhere, **named), given)
        replace_text(folder / CARD_FILE, text)

    def run_summary(self, **fields: Any) -> RunSummary:
        """Summarise the run for its model card; ``card_fields`` and ``fields`` go before what the trainer knows."""
        final = self.final_model()
        known = {
            **describe_model(self.model, self.processing_class, self.reference),
            "location": getattr(self, "hub_model_id", None) or location_of(self.args.output_dir),
            "results": self._evaluated.get(final["step"], {}),
            "settings": training_settings(
                self.args,
                per_device=compat.batch_size_per_device(self),
                state=self.state,
                model=self.model,
                parameter_counts=self.parameter_counts,
                shared=self.shared,
                tiles=self.encoder.max_tiles,
                precision=self.precision,
            ),
            "log_history": self.state.log_history,
            "final_step": final["step"],
            "best_by": next(iter(final.get("best_by", {}).items()), None),
            "ema": final.get("ema"),
            "data": self.trained_pairs.by_source(),
        }
        return RunSummary(**{**objective_fields(self.args), **known, **self.card_fields, **fields})
