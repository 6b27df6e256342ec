"""Keep the margins that training sees, for the run's report, and score a few pairs token by token at its end."""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import TrainerCallback

from vlmpo.data.encode.encoder import EncodedPair, EncodedPairs
from vlmpo.data.encode.images import open_image
from vlmpo.data.records import PreferencePair
from vlmpo.errors import RecordError
from vlmpo.fileio import writing
from vlmpo.log import logger
from vlmpo.loss import LossOutput
from vlmpo.models.mode import in_mode
from vlmpo.report.kept import KeptData, ScoredPair, ScoredResponse, read_kept
from vlmpo.train.batching import MicroBatch, lay_out
from vlmpo.train.memory import if_it_fits
from vlmpo.train.reference import Reference
from vlmpo.tree.forward import sum_by_response

_PROMPT_SHOWN = 2000  # characters
_TOKENS_SHOWN = 400  # of a response
_IMAGES_SHOWN = 4  # of a pair
_THUMBNAIL = 320  # pixels of the longer side
_MOST_READ = 20_000  # records, in search of a pair
_MIN_SECONDS = 1.0  # of scoring pairs again, however short the run

Scored = tuple[ScoredResponse, ScoredResponse]  # the chosen and the rejected response of a pair


class PairMargins(TrainerCallback):
    """Collects the margins of all ranks, and keeps them in a small file of the run folder.

    Args:
        folder: the run folder.
        per_device: pairs in a batch of one rank.

    Attributes:
        kept: what is kept so far; the same on all ranks.
    """

    def __init__(self, folder: str, per_device: int) -> None:
        self.kept = KeptData()
        self._folder = Path(folder)
        self._per_device = per_device
        self._fresh: list[tuple[list[str], Tensor]] = []
        self._started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start with nothing, or with what was kept up to the checkpoint that is resumed from."""
        self._started = time.perf_counter()
        self.kept = (read_kept(self._folder) if state.global_step else None) or KeptData()
        self.kept.forget_after(state.global_step)
        self.kept.plan(state.max_steps * self._per_device * args.gradient_accumulation_steps * args.world_size)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the file beside each checkpoint."""
        self.write(args.should_save)

    def write(self, is_first: bool) -> None:
        """Write the file, on the first rank."""
        if is_first:
            with writing(self._folder):
                self.kept.write(self._folder)

    def add(self, origins: list[str], output: LossOutput) -> None:
        """Add the pairs of a micro-batch; nothing is read from the device yet."""
        if output.chosen_rewards is not None and output.rejected_rewards is not None:
            self._fresh.append((origins, (output.chosen_rewards - output.rejected_rewards).detach()))

    @property
    def added(self) -> int:
        """How many micro-batches were added since :meth:`collect`."""
        return len(self._fresh)

    def forget_from(self, number: int) -> None:
        """Forget the micro-batches that were added after the first ``number``: their step is made again."""
        del self._fresh[number:]

    def collect(self, step: int, gather: Callable[[Any], list[Any]]) -> None:
        """Take in what all ranks have added since the last call; all of them call it together."""
        names = [origin for origins, _ in self._fresh for origin in origins]
        values = torch.cat([margins for _, margins in self._fresh]).tolist() if self._fresh else []
        self._fresh = []
        for of_rank in gather(list(zip(names, values, strict=True))):
            self.kept.see(step, of_rank)

    def seconds_to_score(self, share: float) -> float:
        """Return how long pairs may be scored again: ``share`` of the time since training began, at least a second."""
        return max(_MIN_SECONDS, share * (time.perf_counter() - self._started))


def score_pairs(
    extremes: Sequence[tuple[str, str, int, float]],
    *,
    pairs: EncodedPairs,
    dataset: Any,
    policy: nn.Module,
    reference: Reference,
    prepare: Callable[[MicroBatch], MicroBatch],
    gather: Callable[[Any], list[Any]],
    shared: bool,
    keyed: bool,
    beta: float,
    decode: Callable[[list[int]], str],
    seconds: float,
) -> list[ScoredPair]:
    """Score pairs by policy and reference, token by token. All ranks call this together and score the same pairs.

    A pair that is out of memory on some rank is left out.

    Args:
        extremes: origin, kind, and step and margin when last seen; as many are scored as ``seconds`` allow.
        pairs: encodes the pairs of ``dataset``.
        dataset: the training pairs.
        policy: as training calls it.
        reference: the frozen one.
        prepare: moves a micro-batch to the device.
        gather: returns the object that each rank gives.
        shared: whether rows share prompts.
        keyed: whether the reference looks responses up by their keys.
        beta: of the rewards.
        decode: returns the text of token ids.
        seconds: how long it may take.
    """

    def score(on_host: MicroBatch) -> Scored:
        return score_responses(prepare(on_host), policy, reference, decode)

    index = find_pairs(dataset, {origin for origin, *_ in extremes})
    found = []
    started = time.perf_counter()
    with torch.no_grad(), in_mode(policy, training=False):
        for done, (origin, kind, step, margin) in enumerate(extremes):
            encoded = pairs[index[origin]] if origin in index else None
            usable = isinstance(encoded, EncodedPair) and encoded.rejected_ids is not None
            ranks = gather((usable, time.perf_counter() - started))
            if done and ranks[0][1] * (done + 1) / done > seconds:
                break
            if not all(of_rank for of_rank, _ in ranks):
                continue
            assert isinstance(encoded, EncodedPair)
            scored, reason = if_it_fits(partial(score, lay_out([encoded], shared, keyed)))
            # A rank that went on alone would leave the others waiting for it.
            if reasons := [text for text in gather(reason) if text]:
                logger.info(f"note: {origin} is not among the report's single pairs: out of memory ({reasons[0]})")
                continue
            assert scored is not None
            chosen, rejected = scored
            record = dataset[index[origin]]
            difference = (chosen.policy - chosen.reference) - (rejected.policy - rejected.reference)
            found.append(
                ScoredPair(
                    origin=origin,
                    source=encoded.source,
                    kind=kind,
                    prompt="\n".join(f"{turn.role}: {turn.text}" for turn in record.prompt)[:_PROMPT_SHOWN],
                    images=thumbnails(record),
                    num_media=len(record.images) + len(record.videos),
                    seen_step=step,
                    seen_margin=margin,
                    margin=beta * difference,
                    chosen=chosen,
                    rejected=rejected,
                )
            )
    return [pair for pair in found if math.isfinite(pair.margin)]


def find_pairs(dataset: Any, origins: set[str]) -> dict[str, int]:
    """Return where in ``dataset`` the pairs of these origins are; records that cannot be read are passed over."""
    found: dict[str, int] = {}
    # A data set knows most origins without reading; a PreferencePair given to the trainer may have its own.
    ways: list[Callable[[int], str]] = [lambda index: str(dataset[index].origin)]
    if callable(known := getattr(dataset, "origin", None)):
        ways.insert(0, known)
    for origin_of in ways:
        for index in range(len(dataset)):
            if len(found) == len(origins):
                return found
            with suppress(RecordError):
                origin = origin_of(index)
                if origin in origins:
                    found.setdefault(origin, index)
        if len(dataset) > _MOST_READ:
            break
    return found


def score_responses(
    micro_batch: MicroBatch, policy: nn.Module, reference: Reference, decode: Callable[[list[int]], str]
) -> Scored:
    """Return the chosen and the rejected response of the one pair in ``micro_batch``, as both models score them."""
    rows = micro_batch.rows
    of_policy: Tensor = policy(packed_rows=rows)  # [scored]
    of_reference = reference.token_logps(micro_batch)
    sums = (
        reference.response_logps(micro_batch) if of_reference is None else sum_by_response(of_reference, rows)
    ).tolist()
    response_of = []
    before = 0
    for row in rows:
        response_of.append(row.response_index + before)
        before += row.num_responses
    which = torch.cat(response_of)
    targets = torch.cat([row.targets for row in rows])
    responses = []
    assert micro_batch.rejected is not None
    for response in (int(micro_batch.chosen[0]), int(micro_batch.rejected[0])):
        mine = which == response
        known = None if of_reference is None else of_reference[mine].tolist()
        logps = of_policy[mine].tolist()
        shown = pieces(targets[mine].tolist()[:_TOKENS_SHOWN], logps, known, decode)
        responses.append(
            ScoredResponse(
                tokens=shown,
                num_tokens=len(shown) + max(len(logps) - _TOKENS_SHOWN, 0),
                policy=sum(logps),
                reference=sums[response],
            )
        )
    return responses[0], responses[1]


def pieces(
    ids: Sequence[int], policy: Sequence[float], reference: Sequence[float] | None, decode: Callable[[list[int]], str]
) -> list[tuple[str, float, float | None]]:
    """Return the text of each token with its log-probs; tokens that make one character together are one piece.

    A token's text is what it adds to that of the token before: alone, some tokenizers leave its space out.
    """
    found: list[tuple[str, float, float | None]] = []
    before: list[int] = []
    start = 0
    for end in range(1, len(ids) + 1):
        group = list(ids[start:end])
        whole, known = decode([*before, *group]), decode(before) if before else ""
        text = whole[len(known) :] if whole.startswith(known) else decode(group)
        if text.endswith("\ufffd") and end - start < 4 and end < len(ids):
            continue  # a character of several bytes, one token each
        sums = [None if part is None else round(sum(part[start:end]), 4) for part in (policy, reference)]
        found.append((text, sums[0] or 0.0, sums[1]))
        before, start = group, end
    return found


def thumbnails(pair: PreferencePair) -> list[str]:
    """Return the pair's first images, shrunk, in base64; those that cannot be read any more are left out."""
    found = []
    for source in pair.images[:_IMAGES_SHOWN]:
        with suppress(RecordError):
            image = open_image(source)
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            found.append(base64.b64encode(encoded_image(image)).decode())
    return found


def encoded_image(image: Image.Image) -> bytes:
    """Return an RGB image as PNG or JPEG, whichever is smaller."""
    files = []
    for kind, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 75})):
        file = io.BytesIO()
        image.save(file, kind, **options)
        files.append(file.getvalue())
    return min(files, key=len)


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Return how token ids become text, special tokens and spaces as they are."""
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
