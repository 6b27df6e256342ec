"""Tiles a loader's worker makes per second of its processor's time: vlmpo against TRL's collator on the same pairs.

    python -m benchmarks.loader [--cases "7 tiles of 448" ...] [--repeats 7]

What is timed is all that happens between a record and the batch that is handed over: opening and decoding the image
files, tiling, chat template, tokens, collation; 2 or 3 pairs a batch, one thread. TRL 1.16 hands over normalised
float32, vlmpo bytes that the device normalises; the arm "vlmpo, normalised" does that too, on the processor. The arms
take turns. Seconds are those the process computed (``time.process_time``), so other work on the machine counts less.
Before it times, it checks that all arms come to the same tiles, bit by bit. Writes ``benchmarks/results/loader.json``
and ``loader.md``.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmpo import Message, PreferencePair
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.encode.pixels import PixelScale
from vlmpo.testing.tiny import TinySize, build_processor, train_tokenizer
from vlmpo.train.batching import Batch, Collator, EncodedPairs, MicroBatch

RESULTS = Path(__file__).resolve().parent / "results"
VISONLYQA = Path(__file__).resolve().parents[2] / "shared" / "data" / "visonlyqa"
PEER, OURS, WHOLE = "TRL 1.16", "vlmpo", "vlmpo, normalised"
MAX_TILES = 12


@dataclass(frozen=True)
class Case:
    """One case of the benchmark.

    Attributes:
        name: as in the table.
        tiles: of each image, thumbnail included; 0: the real pairs of ``visonlyqa``.
        side: of a tile in pixels; 28 x 28 of them are a token.
        together: pairs of one prompt behind one another.
        batch: pairs a batch.
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
    """Pairs on noise images, in memory, that the processor cuts into just ``case.tiles`` tiles."""
    random = np.random.default_rng(0)

    def words(number: int) -> str:
        return " ".join("".join(random.choice(list("abcdefghij"), size=2)) for _ in range(number))

    across = max(1, case.tiles - 1)  # more than one tile: a thumbnail joins
    found = []
    for _ in range(count):
        pixels = random.integers(0, 255, (case.side, case.side * across, 3), dtype=np.uint8)
        prompt = (Message("user", "<image>\n" + words(20)),)
        found.append(PreferencePair(prompt, (Image.fromarray(pixels),), words(101), words(101)))
    return found


def real_pairs(prompts: int, together: int) -> list[PreferencePair]:
    """``together`` pairs each of ``prompts`` prompts of ``visonlyqa``, each prompt with an image of its own."""
    from vlmpo.data.dataset import open_pairs
    from vlmpo.data.readers.spec import SourceSpec

    by_prompt: dict[Any, list[PreferencePair]] = {}
    data = open_pairs([SourceSpec(str(VISONLYQA / "meta.json"))])
    for index in range(len(data)):
        by_prompt.setdefault((data[index].prompt, data[index].images), []).append(data[index])
    of_image = {images: pairs[:together] for (_, images), pairs in by_prompt.items() if len(pairs) >= together}
    return [pair for pairs in list(of_image.values())[:prompts] for pair in pairs]


def make_processor(case: Case, pairs: list[PreferencePair]) -> Any:
    """InternVL's processor at the case's tile size, its tokenizer trained on the pairs."""
    texts = [text for pair in pairs for text in (pair.prompt[0].text, pair.chosen, pair.rejected or "")]
    size = TinySize(image_size=case.side, patch_size=14, max_tiles=MAX_TILES)
    return build_processor(train_tokenizer(texts, vocab_size=2048), size)


def of_trl(pair: PreferencePair) -> dict[str, Any]:
    """The pair as TRL's collator takes it, its image files opened as ``datasets`` opens them."""
    return {
        "images": [image if isinstance(image, Image.Image) else Image.open(image) for image in pair.images],
        "prompt": [{"role": "user", "content": pair.prompt[0].text.replace("<image>", "").strip()}],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


Loading = Callable[[], Iterator[Any]]


def arms(case: Case, pairs: list[PreferencePair]) -> dict[str, Loading]:
    """By name, what gives the batches of an arm, vision tensors last."""
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    processor = make_processor(case, pairs)
    encoder = PairEncoder(processor, max_tiles=MAX_TILES).for_loader()
    assert encoder.pixel_scale is not None
    data, collate = EncodedPairs(pairs, encoder), Collator(None, shared=True)
    theirs = DataCollatorForVisionPreference(processor)
    starts = range(0, len(pairs), case.batch)

    def ours() -> Iterator[Batch]:
        for start in starts:
            yield collate([data[at] for at in range(start, start + case.batch)])

    def whole() -> Iterator[Batch]:
        for batch in ours():
            yield Batch([normalised(part, encoder.pixel_scale) for part in batch.micro_batches], batch.dropped)

    def trl() -> Iterator[dict[str, Any]]:
        for start in starts:
            yield theirs([of_trl(pair) for pair in pairs[start : start + case.batch]])

    return {PEER: trl, OURS: ours, WHOLE: whole}


def normalised(micro_batch: MicroBatch, scale: PixelScale | None) -> MicroBatch:
    """Make the processor's pixels of bytes, as the trainer does on the device."""
    if scale is None:
        return micro_batch
    return replace(micro_batch, rows=[replace(row, vision=scale.restored(row.vision)) for row in micro_batch.rows])


def pixels_of(batch: Any) -> torch.Tensor:
    """``[tiles, 3, side, side]`` of a batch of any arm."""
    named = batch.micro_batches[0].rows[0].vision if isinstance(batch, Batch) else batch
    return named["pixel_values"]


def check(found: dict[str, Loading]) -> tuple[int, dict[str, float]]:
    """Tiles of all pairs, and MiB each arm hands over; ends where the arms do not come to the same tiles."""
    tiles, mib = 0, dict.fromkeys(found, 0.0)
    for theirs, ours, whole in zip(*(found[name]() for name in (PEER, OURS, WHOLE)), strict=True):
        count = len(pixels_of(whole))
        both = pixels_of(theirs)  # once for chosen, once for rejected
        if not all(torch.equal(part, pixels_of(whole)) for part in (both[:count], both[count:])):
            raise SystemExit("the arms do not come to the same tiles")
        tiles += count
        for name, batch in ((PEER, theirs), (OURS, ours), (WHOLE, whole)):
            mib[name] += pixels_of(batch).nbytes / 2**20
    return tiles, mib


def measure(case: Case, pairs: list[PreferencePair], repeats: int) -> dict[str, Any]:
    """All arms over all pairs, taking turns; a first turn, which also checks, is not counted."""
    found = arms(case, pairs)
    tiles, mib = check(found)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, loading in found.items():
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
            "to_trl_turns": sorted(mine / peer for peer, mine in zip(seconds[name], seconds[PEER], strict=True)),
            "ms_a_pair": 1000 * tiles / medians[name] / len(pairs),
            "tiles_a_pair": tiles / len(pairs),
            "kib_a_tile": 1024 * mib[name] / tiles,
        }
        for name, values in speeds.items()
    }


def table(name: str, found: dict[str, Any]) -> list[str]:
    """One case as Markdown."""
    lines = [f"### {name}: {found[PEER]['tiles_a_pair']:.1f} tiles a pair", ""]
    lines += ["| arm | tiles/s (min - max) | ms a pair | to TRL (turn by turn) | KiB a tile |", "|---|---|---|---|---|"]
    for arm, values in found.items():
        spread = f"{values['tiles_per_second']:.0f} ({values['min']:.0f} - {values['max']:.0f})"
        turns = f"{values['to_trl']:.2f}x ({values['to_trl_turns'][0]:.2f} - {values['to_trl_turns'][-1]:.2f})"
        lines.append(f"| {arm} | {spread} | {values['ms_a_pair']:.2f} | {turns} | {values['kib_a_tile']:.0f} |")
    return [*lines, ""]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=24)
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
        results[case.name] = measure(case, pairs, options.repeats)
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
    lines = [line for name, found in results.items() for line in table(name, found)]
    (options.output / "loader.md").write_text("\n".join([*head, *lines]))


if __name__ == "__main__":
    main()
