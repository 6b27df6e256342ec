"""Seconds and memory to open a large MMPR data set, the first time and the second.

    python -m benchmarks.data_size [--lines 3000000] [--images 4000] [--line-bytes 1000]

Writes a data set in the layout of MMPR (meta.json, four .jsonl files, small images that many pairs share, some unusable
lines and images) and opens it twice, each time in a fresh process, the first time with an empty cache. Opening is all
that ``vlmpo train`` does before it loads the model: index the lines, filter the records, look for the images, hold 2 %
of the images out, find what both sides share by content. Both openings must find the same. Then two DataLoader workers
read pairs at random. Everything but ``benchmarks/results/data_size.json`` and ``data_size.md`` is deleted. The files
have just been written, so they are in the page cache if they fit; a first opening from a slow disk takes longer.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RESULTS = Path(__file__).resolve().parent / "results"
SETS = 4
READ_BY_WORKERS = 20_000
FREE_AFTER = 5 << 30  # bytes of disk to leave free
_TEXT = "the bar line chart shows which value is higher than in year of and a color highest label answer so"


# ---- the set ----


def write_set(folder: Path, lines: int, images: int, line_bytes: int) -> int:
    """Write meta.json, annotations and images; return the bytes of the annotations."""
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(images):
        buffer = io.BytesIO()
        height, width = generator.integers(8, 60, 2)  # few files have the same size, as in real data
        Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
        (folder / "images" / f"{number:06}.png").write_bytes(buffer.getvalue())
    meta = {}
    for part in range(SETS):
        name = f"part_{part}"
        count = lines // SETS + (part < lines % SETS)
        write_lines(folder / f"{name}.jsonl", part, count, images, line_bytes)
        meta[name] = {"root": str(folder / "images"), "annotation": str(folder / f"{name}.jsonl"), "repeat_time": 1}
    (folder / "meta.json").write_text(json.dumps(meta))
    return sum(path.stat().st_size for path in folder.glob("*.jsonl"))


def write_lines(path: Path, seed: int, count: int, images: int, line_bytes: int) -> None:
    """Write lines of about ``line_bytes``: 5 % text only, 1 in 5000 with a missing image, 1 in 7000 unusable."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(_TEXT.split(), k=60)) for _ in range(500)]
    fill = max(40, (line_bytes - 130) // 3)
    with path.open("w") as file:
        for number in range(count):
            question, chosen, rejected = ((text * (1 + fill // len(text)))[:fill] for text in draw.sample(texts, 3))
            record = {"question": f"{number} {question}", "chosen": chosen, "rejected": rejected}
            if number % 20:
                image = "gone" if number % 5000 == 1 else f"{draw.randrange(images):06}"
                record = {"image": f"{image}.png", **record}
                record["question"] = f"<image>\n{record['question']}"
            if number % 7000 == 3:
                record["rejected"] = record["chosen"]
            file.write(json.dumps(record) + "\n")


def write_recipe(folder: Path) -> Path:
    """Write a recipe that trains on the data set; return its path."""
    path = folder / "recipe.yaml"
    path.write_text(
        f"model:\n  path: none\ndata:\n  train: ['{folder / 'set' / 'meta.json'}']\n  hold_out: 0.02\n"
        f"training:\n  output_dir: '{folder / 'run'}'\n"
    )
    return path


# ---- one opening, in a process of its own ----


def peak_bytes(who: str = "self") -> int:
    """Return the peak memory of the process, pages of mapped files included."""
    lines = Path(f"/proc/{who}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def own_bytes() -> int:
    """Return the memory that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) * 1024


def cpu_seconds() -> float:
    """CPU time of this process and of those it started and waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def open_once(recipe_path: str) -> dict[str, Any]:
    """Open the recipe's data as ``vlmpo train`` does; return the figures and what was found."""
    started = time.perf_counter()
    from vlmpo.commands.run_data import open_run_data, overlaps_with_training
    from vlmpo.recipe_yaml import load_recipe

    recipe = load_recipe(recipe_path)
    result: dict[str, Any] = {"import_seconds": time.perf_counter() - started, "import_peak_bytes": peak_bytes()}
    started = time.perf_counter()
    data = open_run_data(recipe)
    opened = time.perf_counter()
    overlaps = overlaps_with_training(data)
    result |= {
        "seconds": time.perf_counter() - started,
        "overlap_seconds": time.perf_counter() - opened,
        "peak_bytes": peak_bytes(),
        "cpu_seconds": cpu_seconds(),
        "reader_peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }
    held_out = data.evaluation["held_out"]
    found = {
        "train": len(data.train),
        "held_out": len(held_out),
        "dropped": data.screened.reasons(),
        "examples": data.screened.examples,
        "overlap": {name: [o["items"], o["with_seen_image"], o["seen_whole"]] for name, o in overlaps.items()},
        "pairs": [data.train.fingerprint(), held_out.fingerprint()],
    }
    return result | {"found": found, "workers": read_in_workers(data.train)}


def read_in_workers(pairs: Any) -> dict[str, Any]:
    """Return the pairs a second of two DataLoader workers, and the peak memory of one of them."""
    from torch.utils.data import DataLoader

    order = np.random.default_rng(0).integers(0, len(pairs), READ_BY_WORKERS).tolist()
    started = time.perf_counter()
    loader = DataLoader(pairs, batch_size=100, sampler=order, num_workers=2, collate_fn=_weigh)
    seen = list(loader)
    return {
        "pairs_per_second": len(order) / (time.perf_counter() - started),
        "characters": sum(batch[0] for batch in seen),
        "peak_bytes": max(batch[1] for batch in seen),
        "own_bytes": max(batch[2] for batch in seen),
    }


def _weigh(batch: list[Any]) -> tuple[int, int, int]:
    return sum(len(pair.chosen) for pair in batch), peak_bytes(), own_bytes()


# ---- the command ----


def measure(folder: Path, lines: int, images: int, line_bytes: int) -> dict[str, Any]:
    """Write the data set, open it twice, and return the figures."""
    started = time.perf_counter()
    size = write_set(folder / "set", lines, images, line_bytes)
    print(f"{lines} lines, {size / 1e9:.2f} GB, written in {time.perf_counter() - started:.0f} s", flush=True)
    recipe = write_recipe(folder)
    (folder / "cache").mkdir()  # it stays empty if the files are too small to be worth it
    environment = {**os.environ, "VLMPO_CACHE": str(folder / "cache")}
    openings = {}
    for name in ("first", "second"):
        command = [sys.executable, "-m", "benchmarks.data_size", "--open", str(recipe)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        openings[name] = json.loads(done.stdout.splitlines()[-1])
        print(row(name, openings[name]), flush=True)
    if openings["first"]["found"] != openings["second"]["found"]:
        raise SystemExit(f"the two openings differ: {openings}")
    for opening in openings.values():
        del opening["found"]["examples"]  # they name the temporary folder
    return {
        "lines": lines,
        "images": images,
        "annotation_bytes": size,
        "cores": len(os.sched_getaffinity(0)),
        "cache_bytes": sum(path.stat().st_size for path in (folder / "cache").iterdir()),
        **openings,
    }


def row(name: str, opening: dict[str, Any]) -> str:
    """Return one opening as a row of the table."""
    workers = opening["workers"]
    figures = [
        f"{opening['seconds']:.1f} s",
        f"{opening['cpu_seconds']:.1f} s",
        f"{opening['peak_bytes'] / 1e9:.2f} GB",
        f"{opening['import_peak_bytes'] / 1e9:.2f} GB",
        f"{workers['peak_bytes'] / 1e9:.2f} GB, {workers['own_bytes'] / 1e9:.2f} GB its own",
        f"{workers['pairs_per_second']:.0f}",
    ]
    return f"| {name} | {' | '.join(figures)} |"


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    head = [
        "opening",
        "time",
        "CPU time, imports included",
        "peak memory",
        "of it, after imports",
        "DataLoader worker, peak",
        "pairs/s, 2 workers",
    ]
    return "\n".join(
        [
            f"{result['lines']:,} lines ({result['annotation_bytes'] / 1e9:.2f} GB) on {result['images']:,} images, "
            f"{result['cores']} cores, files in the page cache; the cache folder then holds "
            f"{result['cache_bytes'] / 1e9:.2f} GB. Made by `{result['command']}`.",
            "",
            f"| {' | '.join(head)} |",
            "|---" * len(head) + "|",
            *(row(name, result[name]) for name in ("first", "second")),
            "",
        ]
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=3_000_000)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--line-bytes", type=int, default=1000)
    parser.add_argument("--name", default="data_size", help="of the files of results")
    parser.add_argument("--open", metavar="RECIPE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(open_once(options.open)))
        return
    lines = options.lines
    with tempfile.TemporaryDirectory() as folder:
        room = shutil.disk_usage(folder).free - FREE_AFTER - options.images * 16384
        fits = max(0, room) // int(options.line_bytes * 1.4)
        if fits < lines:
            print(f"the disk has room for {fits} lines, not {lines}: measuring with {fits}", flush=True)
            lines = fits
        result = measure(Path(folder), lines, options.images, options.line_bytes)
    command = f"python -m benchmarks.data_size --lines {lines} --images {options.images}"
    result = {"command": f"{command} --line-bytes {options.line_bytes}", **result}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{options.name}.md").write_text(table(result))


if __name__ == "__main__":
    main()
