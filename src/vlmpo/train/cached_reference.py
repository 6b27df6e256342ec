"""The reference by what it said before: log-probs from a store on disk, a model only for what is not in it yet.

Whatever decides a log-prob is in its key: the reference's weights and config (a rope scaling is no weight), the token
ids, the image as the model reads it (its pixels after the processor, so the file's bytes and the processor's settings
too), the precision, and whether prompts are shared. A key that does not match is computed anew, never trusted. Once a
whole epoch is in the store the model is let go; a run that finds its data set complete from an earlier one does not
load a model at all.
"""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from vlmpo import compat
from vlmpo.data.index.store import cache_folder
from vlmpo.errors import RecordError, RunError
from vlmpo.fileio import replace_json
from vlmpo.log import logger
from vlmpo.models.adapters import is_peft, unwrap_peft
from vlmpo.models.loading import load_model
from vlmpo.train.batching import Batch, MicroBatch
from vlmpo.train.logps_store import ReferenceStore, Scored, content_key
from vlmpo.train.reference import CopyReference, Reference, freeze, weights_hash
from vlmpo.train.sharding import all_gather_object, passes_are_shared, prepare_frozen
from vlmpo.tree.layout import PackedRow

if TYPE_CHECKING:
    from vlmpo.train.trainer import MPOTrainer


# Of a config, what decides no log-prob: where the model is from, how it is stored, how it generates.
_IDLE_SETTINGS = frozenset(
    {"architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"}
)


class CachedReference:
    """Answers from a store, and from a model where the store has no answer.

    Args:
        store: the log-probs.
        weights: hash of the reference's weights.
        reading: how log-probs are read at present (config, precision, shared prompts): part of every key.
        build: makes the model; called when it is first needed.
        agree: whether some rank says yes: where passes are shared by ranks, all read what one of them lacks.

    Attributes:
        hits, misses: responses that were in the store, and that were not.
    """

    def __init__(
        self,
        store: ReferenceStore,
        weights: str,
        reading: Callable[[], str],
        build: Callable[[], Reference],
        agree: Callable[[bool], bool],
    ) -> None:
        self.store = store
        self.hits = self.misses = 0
        self._weights = weights
        self._reading = reading
        self._build = build
        self._agree = agree
        self._model: Reference | None = None
        self._stays = False

    def start_with(self, model: Reference, stays: bool) -> None:
        """Have ``model`` from the start; where it ``stays`` it is never let go, as it could not be had again."""
        self._model, self._stays = model, stays

    @property
    def model(self) -> Reference | None:
        """The model behind the store, while it is in memory."""
        return self._model

    def load(self) -> Reference:
        """The model behind the store.

        Raises:
            RunError: what is loaded is not what the log-probs in the store were taken from.
        """
        if self._model is None:
            logger.info(f"reference: some log-probs are not in {self.store.folder}; its model is loaded for them")
            self._model = self._build()
            if self._model.weights_hash() != self._weights:
                raise RunError(
                    "the reference cannot be had again: the weights where it was loaded from have changed since this "
                    "run began; start again with the initial model in its place"
                )
        return self._model

    def let_go(self) -> None:
        """Free the model's memory, where it can be had again for what is lacking after that."""
        if not self._stays and self._model is not None:
            self._model = None
            gc.collect()  # its modules hold methods bound to themselves: without this it is freed at some later time

    def context(self) -> bytes:
        """What every key starts from."""
        return content_key(self._weights.encode(), self._reading().encode())

    def response_logps(self, part: MicroBatch) -> Tensor:
        """``[responses]``, float64, without gradient."""
        context = self.context()
        keys = [content_key(context, key) for key in part.keys]
        known = [self.store.get(key) for key in keys]
        lacking = any(value is None for value in known)
        if self._agree(lacking):
            logps = self.load().response_logps(part).double()
            if lacking:
                said = zip(logps.tolist(), part.response_lengths, strict=False)  # idle responses have no key
                self.store.put(keys, [Scored(logp, tokens) for logp, tokens in list(said)[: len(keys)]])
            self.misses += sum(value is None for value in known)
            self.hits += sum(value is not None for value in known)
            return logps
        self.hits += len(keys)
        lengths = part.response_lengths
        for value, length in zip(known, lengths, strict=False):
            if value is not None and value.tokens != length:
                raise RunError(f"the reference's log-probs in {self.store.folder} are of other responses; remove it")
        values = [value.logp for value in known if value is not None]
        idle = [0.0] * (part.num_responses - len(values))
        return torch.tensor([*values, *idle], dtype=torch.float64, device=part.chosen.device)

    def token_logps(self, rows: Sequence[PackedRow]) -> Tensor:
        """``[scored of all rows]``: the store keeps sums, so this is always the model's."""
        return self.load().token_logps(rows)

    def weights_hash(self) -> str:
        """Tells one reference's weights from another's."""
        return self._weights


class Completeness:
    """Which data sets are wholly in a store, noted beside its shards.

    A note is a hint alone: it decides whether the model is loaded at once. Log-probs are looked up by their keys.

    Args:
        trainer: its data set and settings name what is complete.
        reference: of the trainer.

    Attributes:
        here: whether this process has seen the training data complete.
    """

    def __init__(self, trainer: MPOTrainer, reference: CachedReference) -> None:
        self._trainer = trainer
        self._reference = reference
        self.here = False

    def _note(self) -> Path | None:
        """Where it is noted; None for a data set that cannot be told from another without reading it."""
        fingerprint = getattr(self._trainer.train_dataset, "fingerprint", None)
        if not callable(fingerprint):
            return None
        encoder = self._trainer.encoder
        settings = [encoder.max_length, encoder.over_long, encoder.max_tiles, encoder.video_frames]
        key = content_key(self._reference.context(), fingerprint().encode(), json.dumps(settings).encode())
        return self._reference.store.folder / f"complete-{key.hex()}.json"

    def known(self) -> bool:
        """Whether an earlier run read the whole data set."""
        note = self._note()
        return note is not None and note.is_file()

    def reached(self) -> None:
        """The whole data set has been read: note it, and let the model go."""
        trainer, store = self._trainer, self._reference.store
        store.sync()
        trainer.accelerator.wait_for_everyone()
        store.refresh()
        if trainer.accelerator.is_main_process:
            self._write_note()
        self.here = True
        had_model = self._reference.model is not None
        self._reference.let_go()
        if had_model and self._reference.model is None:
            told = f"{store.damaged} damaged entries were computed anew; " if store.damaged else ""
            logger.info(f"reference: its log-probs of all pairs are in {store.folder}; {told}the model is let go")

    def _write_note(self) -> None:
        note = self._note()
        if note is None or note.is_file():
            return
        try:
            replace_json(note, {"pairs": len(self._trainer.train_dataset)})
        except OSError as error:
            logger.info(
                f"reference.cache_dir: {note} cannot be written ({error}); the next run will load the reference"
            )

    def between_epochs(self) -> None:
        """Let the model go again, where an evaluation had it loaded after training needed it no more."""
        if self.here:
            self._reference.let_go()


class EpochWatch(TrainerCallback):
    """Notices when an epoch was read from its first pair to its last.

    Args:
        completeness: told so.
    """

    def __init__(self, completeness: Completeness) -> None:
        self._completeness = completeness
        self._from_its_start = False

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run resumed in mid-epoch has not read what came before."""
        self._from_its_start = float(state.epoch or 0.0).is_integer()
        self._completeness.between_epochs()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called as well where the steps end before the epoch does."""
        if self._from_its_start and float(state.epoch).is_integer() and not args.dataloader_drop_last:
            self._completeness.reached()


def config_hash(config: Any) -> str:
    """Tells the function that a model computes with its weights from another's; the same for a copy saved elsewhere."""

    def deciding(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {str(name): part for name, part in value.items() if name not in _IDLE_SETTINGS}
            return {name: deciding(part) for name, part in kept.items() if not name.startswith("_")}
        return [deciding(part) for part in value] if isinstance(value, list | tuple) else value

    told = json.dumps(deciding(config.to_dict()), sort_keys=True, default=str)
    return content_key(told.encode()).hex()


def cached_reference(trainer: MPOTrainer, given: Any | None, online: Callable[[], Reference]) -> CachedReference:
    """The reference of ``trainer`` behind the store its settings name.

    Args:
        trainer: set up, its model not yet trained.
        given: a reference model of the user's; None: the initial policy.
        online: makes the reference as it would be without a store, from the policy as it is now.
    """
    args, source = trainer.args, unwrap_peft(trainer.model if given is None else given)
    # Pixels may come as bytes: what is then done to them decides as they do.
    pixels = trainer.loader_encoder.pixel_scale
    precision = f"{next(source.parameters()).dtype} bf16={args.bf16} fp16={args.fp16} {args.device.type} {pixels}"
    config = config_hash(source.config)
    name = None if is_peft(trainer.model if given is None else given) else compat.name_or_path(source.config)

    dtype = str(source.dtype).removeprefix("torch.")

    def again() -> Reference:  # holds no model
        model = freeze(load_model(str(name), dtype), trainer.shared)
        return CopyReference(prepare_frozen(trainer.accelerator, model))

    def agree(lacking: bool) -> bool:
        if not passes_are_shared(trainer.accelerator):
            return lacking
        return any(all_gather_object(trainer.accelerator, lacking))

    first = None if name else online()  # an adapter's model cannot be had again by a name: it stays
    found = CachedReference(
        store=ReferenceStore(args.reference_cache_dir or cache_folder() / "reference"),
        weights=weights_hash(source, None) if first is None else first.weights_hash(),
        reading=lambda: f"{precision} shared={trainer.shared} config={config}",
        build=again,
        agree=agree,
    )
    completeness = Completeness(trainer, found)
    # Ranks that load a model to share its passes do so together, or none of them does.
    if first is not None or agree(not completeness.known()):
        found.start_with(first or online(), stays=first is not None)
    else:
        logger.info(f"reference: its log-probs of all pairs are in {found.store.folder}; no model is loaded")
    trainer.add_callback(EpochWatch(completeness))
    return found


def precompute(trainer: MPOTrainer) -> dict[str, int]:
    """Put the reference's log-probs of all training pairs into the store, and those of the evaluation pairs.

    Returns:
        How many responses were ``known`` and how many ``computed``, on this rank, and evaluation pairs ``dropped``.
        What became of the training pairs is in the trainer's pair counts.
    """
    reference = trainer.reference
    assert isinstance(reference, CachedReference)
    evaluation = trainer.eval_dataset
    sets = evaluation.values() if isinstance(evaluation, dict) else [] if evaluation is None else [evaluation]
    dropped = 0
    with torch.no_grad():
        for batch in trainer.loader_of_training(drop_last=False):  # which pairs it would be depends on the seed
            _read(trainer, batch, trainer._account([batch]))
        for batch in itertools.chain.from_iterable(trainer.get_eval_dataloader(part) for part in sets):
            dropped += len(batch.dropped)
            fatal = batch.dropped[0].error if trainer.args.on_bad_record == "fail" and batch.dropped else None
            _read(trainer, batch, fatal)
    Completeness(trainer, reference).reached()
    return {"known": reference.hits, "computed": reference.misses, "dropped": dropped}


def _read(trainer: MPOTrainer, batch: Batch, error: RecordError | None) -> None:
    """Have the reference answer for a micro-batch, in step with the other ranks."""
    assert trainer.reference is not None
    (level,) = trainer.rank_sync.level([batch], trainer.rank_sync.agree([batch], error), trainer.model)
    for part in level.parts:
        trainer.reference.response_logps(trainer._prepare_inputs(part))
