"""Tiles that a loader's worker makes per second of CPU time: vlmpo against TRL's collator on the same pairs.

    python -m benchmarks.loader [--cases "7 tiles of 448" ...] [--repeats 7] [--shortcuts]

Timed is all that happens between a record and its batch: opening and decoding the image files, tiling, chat template,
tokens, collation; 2 or 3 pairs a batch, one thread. TRL 1.16 returns normalised float32, vlmpo bytes that the device
normalises; the arm "vlmpo, normalised" normalises too, on the CPU. The arms take turns. Seconds are those that the
process computed (``time.process_time``), so other work on the machine counts less. A first pass checks that the arms
make the same tiles, bit by bit. ``--shortcuts`` adds an arm without each of the loader's shortcuts, which shows what
the shortcut is worth. Writes ``benchmarks/results/loader.json`` and ``loader.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from vlmpo import Message, PreferencePair
from vlmpo.data.encode.encoder import EncodedPairs, PairEncoder
from vlmpo.data.encode.pixels import PixelScale
from vlmpo.data.encode.response_tokens import ResponseTokenizer
from vlmpo.testing.tiny import TinySize, build_processor, train_tokenizer
from vlmpo.train.batching import Batch, Collator, MicroBatch

RESULTS = Path(__file__).resolve().parent / "results"
VISONLYQA = Path(__file__).resolve().parents[2] / "shared" / "data" / "visonlyqa"
PEER, OURS, NORMALISED = "TRL 1.16", "vlmpo", "vlmpo, normalised"
MAX_TILES = 12
# Arms without a shortcut of the loader: the function that takes it, and what is called in its place.
SHORTCUTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "vlmpo, settings merged each time": ("fast_processor.with_settings_cache", lambda processor: processor),
    "vlmpo, image tokens one by one": ("fast_processor.with_fast_image_tokens", lambda processor: processor),
    "vlmpo, responses after whole prompts": ("encoder.response_tokenizer", lambda tokens, _: ResponseTokenizer(tokens)),
}


@dataclass(frozen=True)
class Case:
    """One case of the benchmark.

    Attributes:
        name: of the case in the table.
        tiles: number of an image's tiles, thumbnail included; 0 for the real pairs of ``visonlyqa``.
        side: pixels of a tile's edge; 28 x 28 pixels are a token.
        together: number of consecutive pairs with the same prompt.
        batch: number of pairs in a batch.
    """

    name: str
    tiles: int
    side: int = 448
    together: int = 1
    batch: int = 2


CASES = {
    case.name: case
    for case in (
        Case("visonlyqa", 0),
        Case("visonlyqa, 3 pairs a prompt", 0, together=3, batch=3),
        Case("1 tile of 448", 1),
        Case("7 tiles of 448", 7),
        Case("13 tiles of 448", 13),
        Case("1 tile of 224", 1, side=224),
        Case("7 tiles of 224", 7, side=224),
    )
}


def made_pairs(case: Case, count: int) -> list[PreferencePair]:
    """Return pairs on noise images, in memory, that the processor cuts into exactly ``case.tiles`` tiles."""
    random = np.random.default_rng(0)

    def words(number: int) -> str:
        return " ".join("".join(random.choice(list("abcdefghij"), size=2)) for _ in range(number))

    across = max(1, case.tiles - 1)  # more than one tile: a thumbnail joins
    pairs = []
    for _ in range(count):
        pixels = random.integers(0, 255, (case.side, case.side * across, 3), dtype=np.uint8)
        prompt = (Message("user", "<image>\n" + words(20)),)
        pairs.append(PreferencePair(prompt, (Image.fromarray(pixels),), words(101), words(101)))
    return pairs


def real_pairs(prompts: int, together: int) -> list[PreferencePair]:
    """Return ``together`` pairs of each of ``prompts`` prompts of ``visonlyqa``, no two prompts with the same image."""
    from vlmpo.data.dataset import open_pairs
    from vlmpo.data.readers.spec import SourceSpec

    by_prompt: dict[Any, list[PreferencePair]] = {}
    data = open_pairs([SourceSpec(str(VISONLYQA / "meta.json"))])
    for index in range(len(data)):
        by_prompt.setdefault((data[index].prompt, data[index].images), []).append(data[index])
    of_image = {images: pairs[:together] for (_, images), pairs in by_prompt.items() if len(pairs) >= together}
    return [pair for pairs in list(of_image.values())[:prompts] for pair in pairs]


def make_processor(case: Case, pairs: list[PreferencePair]) -> Any:
    """Return InternVL's processor at the case's tile size, its tokenizer trained on the pairs."""
    texts = [text for pair in pairs for text in (pair.prompt[0].text, pair.chosen, pair.rejected or "")]
    size = TinySize(image_size=case.side, patch_size=14, max_tiles=MAX_TILES)
    return build_processor(train_tokenizer(texts, vocab_size=2048), size)


def of_trl(pair: PreferencePair) -> dict[str, Any]:
    """Return the pair as TRL's collator takes it, its image files opened as ``datasets`` opens them."""
    return {
        "images": [image if isinstance(image, Image.Image) else Image.open(image) for image in pair.images],
        "prompt": [{"role": "user", "content": pair.prompt[0].text.replace("<image>", "").strip()}],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


Loading = Callable[[], Iterator[Any]]


def arms(case: Case, pairs: list[PreferencePair], shortcuts: bool = False) -> dict[str, Loading]:
    """Return a function for each arm that yields its batches; with ``shortcuts`` also the arms of ``SHORTCUTS``."""
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    processor = make_processor(case, pairs)
    collate, collate_trl = Collator(None, shared=True), DataCollatorForVisionPreference(processor)
    starts = range(0, len(pairs), case.batch)

    def make_encoder() -> PairEncoder:
        return PairEncoder(processor, max_tiles=MAX_TILES).for_loader()

    def ours(encoder: PairEncoder) -> Iterator[Batch]:
        data = EncodedPairs(pairs, encoder)
        for start in starts:
            yield collate([data[at] for at in range(start, start + case.batch)])

    def normalised(encoder: PairEncoder) -> Iterator[Batch]:
        assert encoder.pixel_scale is not None
        for batch in ours(encoder):
            yield Batch([normalise(part, encoder.pixel_scale) for part in batch.micro_batches], batch.dropped)

    def trl() -> Iterator[dict[str, Any]]:
        for start in starts:
            yield collate_trl([of_trl(pair) for pair in pairs[start : start + case.batch]])

    encoder = make_encoder()
    found: dict[str, Loading] = {PEER: trl, OURS: partial(ours, encoder), NORMALISED: partial(normalised, encoder)}
    for name, (function, substitute) in SHORTCUTS.items() if shortcuts else ():
        with mock.patch(f"vlmpo.data.encode.{function}", substitute):
            found[name] = partial(ours, make_encoder())
    return found


def normalise(micro_batch: MicroBatch, scale: PixelScale) -> MicroBatch:
    """Turn bytes into the processor's pixels, as the trainer does on the device."""
    return replace(micro_batch, rows=[replace(row, vision=scale.normalise(row.vision)) for row in micro_batch.rows])


def pixels_of(batch: Any) -> torch.Tensor:
    """Return ``[tiles, 3, side, side]`` of a batch of any arm."""
    named = batch.micro_batches[0].rows[0].vision if isinstance(batch, Batch) else batch
    return named["pixel_values"]


def check(loadings: dict[str, Loading]) -> tuple[int, dict[str, float]]:
    """Return the tiles of all pairs and the MiB of each arm's batches.

    Raises:
        SystemExit: the arms do not make the same tiles.
    """
    tiles, mib = 0, dict.fromkeys(loadings, 0.0)
    for batches in zip(*(loading() for loading in loadings.values()), strict=True):
        pixels = {name: pixels_of(batch) for name, batch in zip(loadings, batches, strict=True)}
        floats, count = pixels.pop(NORMALISED), len(pixels[OURS])
        halves = pixels[PEER].split(count)  # once for chosen, once for rejected
        same_bytes = all(torch.equal(pixels[OURS], other) for name, other in pixels.items() if name != PEER)
        if not same_bytes or len(halves) != 2 or not all(torch.equal(half, floats) for half in halves):
            raise SystemExit("the arms do not make the same tiles")
        tiles += count
        for name, values in {**pixels, NORMALISED: floats}.items():
            mib[name] += values.nbytes / 2**20
    return tiles, mib


def measure(case: Case, pairs: list[PreferencePair], repeats: int, shortcuts: bool) -> dict[str, Any]:
    """Time all arms over all pairs, taking turns; a first turn, which also checks, is not counted."""
    loadings = arms(case, pairs, shortcuts)
    tiles, mib = check(loadings)
    seconds: dict[str, list[float]] = {name: [] for name in loadings}
    for _ in range(repeats):
        for name, loading in loadings.items():
            started = time.process_time()
            for _ in loading():
                pass
            seconds[name].append(time.process_time() - started)
    speeds = {name: sorted(tiles / value for value in values) for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        name: {
            "tiles_per_second": medians[name],
            "min": values[0],
            "max": values[-1],
            "to_trl": medians[name] / medians[PEER],
            # Turn by turn: neighbours in time meet the same machine.
            "to_trl_turns": sorted(trl / arm for arm, trl in zip(seconds[name], seconds[PEER], strict=True)),
            "ms_a_pair": 1000 * tiles / medians[name] / len(pairs),
            "tiles_a_pair": tiles / len(pairs),
            "kib_a_tile": 1024 * mib[name] / tiles,
        }
        for name, values in speeds.items()
    }


def table(name: str, figures: dict[str, Any]) -> list[str]:
    """Return one case as lines of Markdown."""
    lines = [f"### {name}: {figures[PEER]['tiles_a_pair']:.1f} tiles a pair", ""]
    lines += ["| arm | tiles/s (min - max) | ms a pair | to TRL (turn by turn) | KiB a tile |", "|---|---|---|---|---|"]
    for arm, values in figures.items():
        spread = f"{values['tiles_per_second']:.0f} ({values['min']:.0f} - {values['max']:.0f})"
        turns = f"{values['to_trl']:.2f}x ({values['to_trl_turns'][0]:.2f} - {values['to_trl_turns'][-1]:.2f})"
        lines.append(f"| {arm} | {spread} | {values['ms_a_pair']:.2f} | {turns} | {values['kib_a_tile']:.0f} |")
    return [*lines, ""]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--shortcuts", action="store_true", help="add an arm without each of the loader's shortcuts")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in a worker
    results = {}
    for case in (CASES[name] for name in options.cases):
        if not case.tiles and not VISONLYQA.is_dir():
            print(f"{case.name}: skipped, {VISONLYQA.name} is not beside the checkout", flush=True)
            continue
        prompts = options.pairs // case.together
        pairs = made_pairs(case, prompts) if case.tiles else real_pairs(prompts, case.together)
        results[case.name] = measure(case, pairs, options.repeats, options.shortcuts)
        print("\n".join(table(case.name, results[case.name])), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    machine: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": 1,
    }
    machine |= {"torch": torch.__version__, "python": platform.python_version(), "load": os.getloadavg()[1]}
    options_used = {"repeats": options.repeats, "pairs": options.pairs}
    record = {"command": "python -m benchmarks.loader", "options": options_used, "machine": machine}
    (options.output / "loader.json").write_text(json.dumps({**record, "cases": results}, indent=1) + "\n")
    head = ["# Loader", "", f"`{record['command']}`, {options.repeats} turns of {options.pairs} pairs, one thread.", ""]
    lines = [line for name, figures in results.items() for line in table(name, figures)]
    (options.output / "loader.md").write_text("\n".join([*head, *lines]))


if __name__ == "__main__":
    main()
