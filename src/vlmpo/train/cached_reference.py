"""Read the reference's log-probs from a store on disk, and compute with a model only those that it lacks.

Whatever decides a log-prob is in its key: the reference's weights and config (a rope scaling is no weight), the token
ids, the image as the model reads it (its pixels after the processor, so the file's bytes and the processor's settings
too), the precision, the fused kernels, and whether prompts are shared. If no key matches, the log-prob is computed
anew. Once a whole epoch is in the store the model is freed, or moved to host memory if it was made in memory and cannot
be loaded again; a run whose data set an earlier run has completed makes no model at all, unless an evaluation may need
one.
"""

from __future__ import annotations

import gc
import json
import math
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
from vlmpo.hashing import content_key
from vlmpo.log import logger
from vlmpo.models.adapters import is_peft, unwrap_peft
from vlmpo.models.kernels import Kernels
from vlmpo.models.loading import load_model
from vlmpo.train.batching import Batch, MicroBatch
from vlmpo.train.compiling import compile_text_layers
from vlmpo.train.logps_store import ReferenceStore, Scored
from vlmpo.train.reference import Reference, copy_reference, freeze, weights_hash
from vlmpo.train.sharding import all_gather_object, passes_are_shared
from vlmpo.tree.ordered import sum_dtype

# Settings of a config that decide no log-prob: where the model is from, how it is stored, how it generates.
_IDLE_SETTINGS = frozenset(
    {"architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"}
)


class CachedReference:
    """Takes the reference's log-probs from a store, and from a model those that the store lacks.

    Args:
        store: the log-probs.
        weights: hash of the reference's weights.
        reading: returns how log-probs are read at present (config, precision, shared prompts): part of every key.
        reload: makes the model when it is needed.
        lasting: whether ``reload`` makes the same model at any time. If not, one that was made is never freed, but
            moved to host memory.
        any_rank: returns whether its argument is true on some rank: ranks that share their passes read the model
            together, or none of them does.

    Attributes:
        hits, misses: responses that were in the store, and that were not.
        model: the model behind the store, while it is in memory.
    """

    def __init__(
        self,
        store: ReferenceStore,
        weights: str,
        reading: Callable[[], str],
        reload: Callable[[], Reference],
        any_rank: Callable[[bool], bool],
        lasting: bool = True,
    ) -> None:
        self.store = store
        self.hits = self.misses = 0
        self.model: Reference | None = None
        self._weights = weights
        self._reading = reading
        self._reload = reload
        self._any_rank = any_rank
        self._lasting = lasting
        self._in_blocks = False

    def load(self) -> Reference:
        """Return the model behind the store; load it if it is not in memory.

        Raises:
            RunError: the weights are no longer those that the log-probs in the store were computed with.
        """
        if self.model is None:
            logger.info(f"reference: some log-probs are not in {self.store.folder}; its model is loaded for them")
            model = self._reload()
            if self._in_blocks:
                model.read_in_blocks(True)
            if model.weights_hash() != self._weights:
                raise RunError(
                    "cannot reload the reference: its weights on disk have changed since this run began; start again "
                    "with the initial model in its place"
                    if self._lasting
                    else f"some of the reference's log-probs are missing from {self.store.folder}, and its model, made "
                    "in memory, has been trained since; start again with another reference_cache_dir, or pass the "
                    "initial model a second time as ref_model"
                )
            self.model = model
        return self.model

    def free(self) -> str | None:
        """Free the device of the model; return what became of it, None if there was none or it stays."""
        if self.model is None:
            return None
        if not self._lasting:
            return "moved to host memory" if self.model.rest_on_host() else None
        self.model = None
        gc.collect()  # its modules hold methods bound to themselves: without this it is freed at some later time
        return "freed"

    def rest_on_host(self) -> bool:
        """Keep the model, if there is one, in host memory between uses; return whether that frees any memory."""
        return self.model is not None and self.model.rest_on_host()

    def context(self) -> bytes:
        """Hash what all keys have in common: the reference's weights and how log-probs are read."""
        return content_key(self._weights.encode(), self._reading().encode())

    def response_logps(self, micro_batch: MicroBatch) -> Tensor:
        """Return ``[responses]``, float64, without gradient.

        Raises:
            RunError: a response in the store has another number of tokens; or see :meth:`load`.
        """
        context = self.context()
        keys = [content_key(context, key) for key in micro_batch.keys]
        stored = [self._stored(key) for key in keys]
        missing = stored.count(None)
        lengths = micro_batch.response_lengths
        logps = self.load().response_logps(micro_batch) if self._any_rank(missing > 0) else None
        self.misses += missing
        self.hits += len(keys) - missing
        if logps is not None:
            if missing:  # dummy responses, the last ones, have no key
                scored = zip(keys, map(Scored, logps.tolist(), lengths), strict=False)
                sound = {key: score for key, score in scored if math.isfinite(score.logp)}
                self.store.put(list(sound), sound.values())
            return logps
        scores = [score for score in stored if score is not None]
        if any(score.tokens != length for score, length in zip(scores, lengths, strict=False)):
            raise RunError(f"the reference's log-probs in {self.store.folder} are of other responses; remove it")
        dummies = [0.0] * (micro_batch.num_responses - len(scores))
        logps_or_zeros = [*(score.logp for score in scores), *dummies]
        device = micro_batch.chosen.device
        return torch.tensor(logps_or_zeros, dtype=sum_dtype(device)).to(device, non_blocking=True)

    def token_logps(self, micro_batch: MicroBatch) -> None:
        """Return None: the store holds sums."""

    def _stored(self, key: bytes) -> Scored | None:
        """Return what the store has for ``key``; a log-prob that is not finite counts as missing."""
        score = self.store.get(key)
        return None if score is None or not math.isfinite(score.logp) else score

    def stop_sharing(self) -> None:
        """Read every response in a row of its own from now on; a model loaded later does so anyway."""
        if self.model is not None:
            self.model.stop_sharing()

    def read_in_blocks(self, on: bool) -> None:
        """Read images in blocks of tiles, as the policy does, with a model loaded later too; or not."""
        self._in_blocks = on
        if self.model is not None:
            self.model.read_in_blocks(on)

    def tower_owner(self) -> Any | None:
        """Return None: the store reads no images."""
        return None

    def weights_hash(self) -> str:
        """Return a hash of the reference's weights."""
        return self._weights


class Completeness(TrainerCallback):
    """Notes that a whole data set is in a store, in a file beside its shards, and frees the model then.

    The note only decides whether a later run loads the model at its start. Log-probs are looked up by their keys.

    Args:
        reference: the reference with the store.
        dataset: the training pairs.
        encoding: the settings that decide how pairs are encoded.
        accelerator: of the run.
    """

    def __init__(self, reference: CachedReference, dataset: Any, encoding: Sequence[Any], accelerator: Any) -> None:
        self._reference = reference
        self._dataset = dataset
        self._encoding = list(encoding)
        self._accelerator = accelerator
        self._reached = False
        self._whole_epoch = False  # whether the epoch under way is read from its first pair

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

    def settle(self) -> None:
        """Know from the start that the whole data set is in the store: the model stays only while it is read."""
        self._reached = True
        self._reference.free()

    def reach(self) -> None:
        """Note that the whole data set has been read, and free the model."""
        store = self._reference.store
        store.sync()
        self._accelerator.wait_for_everyone()
        store.refresh()
        note = self._note() if self._accelerator.is_main_process else None
        if note is not None and not note.is_file():
            try:
                replace_json(note, {"pairs": len(self._dataset)})
            except OSError as error:
                logger.info(
                    f"reference.cache_dir: {note} cannot be written ({error}); the next run will load the reference"
                )
        self._reached = True
        became = self._reference.free()
        if became is not None:
            damage = f"{store.damaged} damaged entries were computed anew; " if store.damaged else ""
            logger.info(f"reference: its log-probs of all pairs are in {store.folder}; {damage}the model is {became}")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Free the model again if some pair needed it since; note whether the epoch is read whole.

        One that a resumed run enters in the middle is not.
        """
        self._whole_epoch = float(state.epoch or 0.0).is_integer()
        self.on_evaluate(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Free the model again if the evaluation loaded it after training no longer needed it."""
        if self._reached:
            self._reference.free()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the data set if the epoch was read whole; also called if the steps end before the epoch does."""
        if self._whole_epoch and float(state.epoch).is_integer() and not args.dataloader_drop_last:
            self.reach()


def config_hash(config: Any) -> str:
    """Hash the settings that decide what a model computes; a copy saved elsewhere has the same hash."""

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
    kernels: Kernels,
    accelerator: Any,
    rounded: bool,
    dataset: Any,
    encoding: Sequence[Any],
    will_evaluate: bool,
) -> tuple[CachedReference, Completeness]:
    """Open the store that the settings name, and load the reference's model if the store may lack some log-probs.

    Args:
        args: MPOConfig of the run.
        source: the model whose weights the reference has: one given by the user, or the initial policy.
        online: makes the reference as it would be without a store, from the policy as it is now.
        pixel_scale: normalises pixels that are bytes, so it is part of every key.
        shared: returns whether rows share prompts at present.
        kernels: of the run.
        accelerator: of the run.
        rounded: whether the weights are read in bfloat16 over float32 masters.
        dataset, encoding: see :class:`Completeness`.
        will_evaluate: whether there are evaluation pairs, whose log-probs may be missing when training's are all there.

    Returns:
        The reference, and the callback that notes when all of the data set is in its store.
    """
    base = unwrap_peft(source)
    mixed = "rounded" if rounded else f"bf16={args.mixed_precision == 'bf16'} fp16={args.mixed_precision == 'fp16'}"
    precision = f"{next(base.parameters()).dtype} {mixed} {args.device.type} {pixel_scale}"
    precision += " compiled" * args.torch_compile  # its sums are of another order
    config = config_hash(base.config)
    dtype = str(base.dtype).removeprefix("torch.")
    name = compat.name_or_path(base.config)
    ran_code = type(base).__module__.startswith("transformers_modules.")  # the user allowed the model's own code

    def reload() -> Reference:  # holds no model
        model = load_model(str(name), dtype, trust_remote_code=ran_code)
        compile_text_layers(model, args)
        return copy_reference(freeze(model, shared(), kernels), accelerator, rounded)

    def reading() -> str:
        by = f" kernels={kernels.key}" if kernels.key else ""
        return f"{precision} shared={shared()}{by} config={config}"

    def any_rank(value: bool) -> bool:
        return any(all_gather_object(accelerator, value)) if passes_are_shared(accelerator) else value

    # A model under an adapter cannot be reloaded by its base's name, and one made in memory has no name.
    adapted, lasting = is_peft(source), bool(name) and not is_peft(source)
    model = online() if adapted else None
    reference = CachedReference(
        store=ReferenceStore(args.reference_cache_dir or cache_folder() / "reference"),
        weights=weights_hash(base, None) if model is None else model.weights_hash(),
        reading=reading,
        reload=reload if lasting else online,
        any_rank=any_rank,
        lasting=lasting,
    )
    reference.model = model
    completeness = Completeness(reference, dataset, encoding, accelerator)
    if any_rank(not completeness.known()):
        reference.model = model or online()
        return reference, completeness
    if not lasting and will_evaluate:  # of the initial weights, while they are there
        reference.model = model or online()
    completeness.settle()
    where = "no model is loaded" if reference.model is None else "its model stays for evaluation"
    logger.info(f"reference: its log-probs of all pairs are in {reference.store.folder}; {where}")
    return reference, completeness


def precompute(
    reference: CachedReference,
    *,
    training: Iterable[Batch],
    evaluation: Iterable[Batch],
    score: Callable[[MicroBatch], Iterable[tuple[MicroBatch, Tensor]]],
) -> dict[str, int]:
    """Put the reference's log-probs of training and evaluation pairs into its store.

    Args:
        reference: the reference with the store.
        training, evaluation: batches of this rank, as many as the other ranks have.
        score: yields the reference's log-probs for a micro-batch, or for parts of it.

    Returns:
        How many responses were ``known`` and how many ``computed``, and evaluation pairs ``dropped``, on this rank.

    Raises:
        RunError: a log-prob is not finite.
    """
    dropped = 0

    def read(batch: Batch) -> None:
        for micro_batch in batch.micro_batches:
            for part, logps in score(micro_batch):
                _refuse_non_finite(part, logps)

    with torch.no_grad():
        for batch in training:
            read(batch)
        for batch in evaluation:
            dropped += len(batch.dropped)
            read(batch)
    return {"known": reference.hits, "computed": reference.misses, "dropped": dropped}


def _refuse_non_finite(micro_batch: MicroBatch, logps: Tensor) -> None:
    """Raise RunError if the log-prob of a pair's response, of ``[responses]``, is not finite; name the pairs."""
    bad = ~torch.isfinite(logps.cpu())
    of_pair = bad[micro_batch.chosen.cpu()]
    if micro_batch.rejected is not None:
        of_pair = of_pair | bad[micro_batch.rejected.cpu()]
    origins = [micro_batch.origins[at] for at in torch.nonzero(of_pair).flatten().tolist()]
    if origins:
        error = RunError(
            f"the reference's log-probs are not finite for {', '.join(origins[:8])}; they are not stored. Look at "
            "these records, and at the reference's weights and dtype (model.path, model.dtype)"
        )
        error.met_by = "rank"
        raise error
