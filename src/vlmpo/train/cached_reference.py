"""The reference by what it answered before: log-probs from a store on disk, a model only for what is not in it yet.

Whatever decides a log-prob is in its key: the reference's weights and config (a rope scaling is no weight), the token
ids, the image as the model reads it (its pixels after the processor, so the file's bytes and the processor's settings
too), the precision, and whether prompts are shared. If a key does not match, the log-prob is computed anew. Once a
whole epoch is in the store the model is freed; a run that finds its data set complete from an earlier one does not load
a model at all.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from vlmpo import compat
from vlmpo.data.index.store import cache_folder
from vlmpo.errors import RunError
from vlmpo.fileio import replace_json
from vlmpo.log import logger
from vlmpo.models.adapters import is_peft, unwrap_peft
from vlmpo.models.loading import load_model
from vlmpo.train.batching import Batch, MicroBatch
from vlmpo.train.logps_store import ReferenceStore, Scored, content_key
from vlmpo.train.reference import CopyReference, Reference, freeze, weights_hash
from vlmpo.train.sharding import all_gather_object, passes_are_shared, prepare_frozen

# Of a config, what decides no log-prob: where the model is from, how it is stored, how it generates.
_IDLE_SETTINGS = frozenset(
    {"architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"}
)


class CachedReference:
    """Answers from a store, and from a model if the store has no answer.

    Args:
        store: the log-probs.
        weights: hash of the reference's weights.
        reading: returns how log-probs are read at present (config, precision, shared prompts): part of every key.
        build: makes the model; called when it is first needed.
        any_rank: returns whether some rank says yes: if ranks share their passes, all read what one of them lacks.

    Attributes:
        hits, misses: responses that were in the store, and that were not.
    """

    def __init__(
        self,
        store: ReferenceStore,
        weights: str,
        reading: Callable[[], str],
        build: Callable[[], Reference],
        any_rank: Callable[[bool], bool],
    ) -> None:
        self.store = store
        self.hits = self.misses = 0
        self._weights = weights
        self._reading = reading
        self._build = build
        self._any_rank = any_rank
        self._model: Reference | None = None
        self._pinned = False

    def start_with(self, model: Reference, pinned: bool) -> None:
        """Use ``model`` from the start. If ``pinned``, never free it: it cannot be reloaded."""
        self._model, self._pinned = model, pinned

    @property
    def model(self) -> Reference | None:
        """The model behind the store, while it is in memory."""
        return self._model

    def load(self) -> Reference:
        """Return the model behind the store.

        Raises:
            RunError: the loaded weights are not those that the log-probs in the store were taken from.
        """
        if self._model is None:
            logger.info(f"reference: some log-probs are not in {self.store.folder}; its model is loaded for them")
            self._model = self._build()
            if self._model.weights_hash() != self._weights:
                raise RunError(
                    "cannot reload the reference: its weights on disk have changed since this run began; start again "
                    "with the initial model in its place"
                )
        return self._model

    def free(self) -> None:
        """Free the model if it can be reloaded."""
        if not self._pinned and self._model is not None:
            self._model = None
            gc.collect()  # its modules hold methods bound to themselves: without this it is freed at some later time

    def context(self) -> bytes:
        """Return what every key starts from."""
        return content_key(self._weights.encode(), self._reading().encode())

    def response_logps(self, micro_batch: MicroBatch) -> Tensor:
        """Return ``[responses]``, float64, without gradient."""
        context = self.context()
        keys = [content_key(context, key) for key in micro_batch.keys]
        known = [self.store.get(key) for key in keys]
        incomplete = any(value is None for value in known)
        lengths = micro_batch.response_lengths
        if self._any_rank(incomplete):
            logps = self.load().response_logps(micro_batch).double()
            if incomplete:
                scored = zip(logps.tolist(), lengths, strict=False)  # dummy responses have no key
                self.store.put(keys, [Scored(logp, tokens) for logp, tokens in list(scored)[: len(keys)]])
            self.misses += sum(value is None for value in known)
            self.hits += sum(value is not None for value in known)
            return logps
        self.hits += len(keys)
        for value, length in zip(known, lengths, strict=False):
            if value is not None and value.tokens != length:
                raise RunError(f"the reference's log-probs in {self.store.folder} are of other responses; remove it")
        values = [value.logp for value in known if value is not None]
        dummies = [0.0] * (micro_batch.num_responses - len(values))
        return torch.tensor([*values, *dummies], dtype=torch.float64, device=micro_batch.chosen.device)

    def stop_sharing(self) -> None:
        """Pass it on to the model, if it is in memory; a model that is loaded later asks for itself."""
        if self._model is not None:
            self._model.stop_sharing()

    def tower_owner(self) -> Any | None:
        """Return None: the store reads no images."""
        return None

    def weights_hash(self) -> str:
        """Return a hash of the reference's weights."""
        return self._weights


class Completeness:
    """Remembers which data sets are wholly in a store, by a note beside its shards.

    A note is a hint alone: it decides whether the model is loaded at once. Log-probs are looked up by their keys.

    Args:
        reference: whose store it is.
        dataset: the training pairs.
        encoding: the settings that decide how pairs are encoded.
        accelerator: of the run.

    Attributes:
        reached: whether this process has seen the training data complete.
    """

    def __init__(self, reference: CachedReference, dataset: Any, encoding: Sequence[Any], accelerator: Any) -> None:
        self.reached = False
        self._reference = reference
        self._dataset = dataset
        self._encoding = list(encoding)
        self._accelerator = accelerator

    def _note(self) -> Path | None:
        """Return the note's path; None for a data set that has no fingerprint."""
        fingerprint = getattr(self._dataset, "fingerprint", None)
        if not callable(fingerprint):
            return None
        key = content_key(self._reference.context(), fingerprint().encode(), json.dumps(self._encoding).encode())
        return self._reference.store.folder / f"complete-{key.hex()}.json"

    def known(self) -> bool:
        """Return whether an earlier run read the whole data set."""
        note = self._note()
        return note is not None and note.is_file()

    def reach(self) -> None:
        """Note that the whole data set has been read, and free the model."""
        store = self._reference.store
        store.sync()
        self._accelerator.wait_for_everyone()
        store.refresh()
        if self._accelerator.is_main_process:
            self._write_note()
        self.reached = True
        had_model = self._reference.model is not None
        self._reference.free()
        if had_model and self._reference.model is None:
            damage = f"{store.damaged} damaged entries were computed anew; " if store.damaged else ""
            logger.info(f"reference: its log-probs of all pairs are in {store.folder}; {damage}the model is freed")

    def _write_note(self) -> None:
        note = self._note()
        if note is None or note.is_file():
            return
        try:
            replace_json(note, {"pairs": len(self._dataset)})
        except OSError as error:
            logger.info(
                f"reference.cache_dir: {note} cannot be written ({error}); the next run will load the reference"
            )

    def free_between_epochs(self) -> None:
        """Free the model again, if an evaluation loaded it after training had no more need of it."""
        if self.reached:
            self._reference.free()


class EpochWatch(TrainerCallback):
    """Notices when an epoch was read from its first pair to its last, and then marks the data set complete."""

    def __init__(self, completeness: Completeness) -> None:
        self._completeness = completeness
        self._from_its_start = False

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run resumed in mid-epoch has not read what came before."""
        self._from_its_start = float(state.epoch or 0.0).is_integer()
        self._completeness.free_between_epochs()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Also called if the steps end before the epoch does."""
        if self._from_its_start and float(state.epoch).is_integer() and not args.dataloader_drop_last:
            self._completeness.reach()


def config_hash(config: Any) -> str:
    """Hash what a model computes with its weights; the same for a copy saved elsewhere."""

    def deciding(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {str(name): part for name, part in value.items() if name not in _IDLE_SETTINGS}
            return {name: deciding(part) for name, part in kept.items() if not name.startswith("_")}
        return [deciding(part) for part in value] if isinstance(value, list | tuple) else value

    text = json.dumps(deciding(config.to_dict()), sort_keys=True, default=str)
    return content_key(text.encode()).hex()


def open_cached_reference(
    args: Any,
    *,
    source: Any,
    online: Callable[[], Reference],
    pixel_scale: Any,
    shared: Callable[[], bool],
    accelerator: Any,
    dataset: Any,
    encoding: Sequence[Any],
) -> tuple[CachedReference, Completeness]:
    """Open the reference behind the store that the settings name.

    Args:
        args: MPOConfig of the run.
        source: the model whose weights the reference has: one given by the user, or the initial policy.
        online: makes the reference as it would be without a store, from the policy as it is now.
        pixel_scale: what is done to pixels that come as bytes: it decides log-probs as they do.
        shared: returns whether rows share prompts at present.
        accelerator: of the run.
        dataset, encoding: see :class:`Completeness`.
    """
    base = unwrap_peft(source)
    precision = f"{next(base.parameters()).dtype} bf16={args.bf16} fp16={args.fp16} {args.device.type} {pixel_scale}"
    config = config_hash(base.config)
    # An adapter's model cannot be reloaded by a name: it stays in memory.
    name = None if is_peft(source) else compat.name_or_path(base.config)
    dtype = str(base.dtype).removeprefix("torch.")

    def reload() -> Reference:  # holds no model
        return CopyReference(prepare_frozen(accelerator, freeze(load_model(str(name), dtype), shared())))

    def any_rank(value: bool) -> bool:
        return any(all_gather_object(accelerator, value)) if passes_are_shared(accelerator) else value

    pinned = None if name else online()
    reference = CachedReference(
        store=ReferenceStore(args.reference_cache_dir or cache_folder() / "reference"),
        weights=weights_hash(base, None) if pinned is None else pinned.weights_hash(),
        reading=lambda: f"{precision} shared={shared()} config={config}",
        build=reload,
        any_rank=any_rank,
    )
    completeness = Completeness(reference, dataset, encoding, accelerator)
    # Ranks that load a model to share its passes do so together, or none of them does.
    if pinned is not None or any_rank(not completeness.known()):
        reference.start_with(pinned or online(), pinned=pinned is not None)
    else:
        logger.info(f"reference: its log-probs of all pairs are in {reference.store.folder}; no model is loaded")
    return reference, completeness


def precompute(
    reference: CachedReference,
    *,
    training: Iterable[Batch],
    evaluation: Iterable[Batch],
    prepare: Callable[[MicroBatch], MicroBatch],
) -> dict[str, int]:
    """Put the reference's log-probs of training and evaluation pairs into its store.

    Args:
        reference: to be filled.
        training, evaluation: the pairs; batches come in step with the other ranks.
        prepare: moves a micro-batch to the device.

    Returns:
        How many responses were ``known`` and how many ``computed``, and evaluation pairs ``dropped``, on this rank.
    """
    dropped = 0
    with torch.no_grad():
        for batch in training:
            for micro_batch in batch.micro_batches:
                reference.response_logps(prepare(micro_batch))
        for batch in evaluation:
            dropped += len(batch.dropped)
            for micro_batch in batch.micro_batches:
                reference.response_logps(prepare(micro_batch))
    return {"known": reference.hits, "computed": reference.misses, "dropped": dropped}
