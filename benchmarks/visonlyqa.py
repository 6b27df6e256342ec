"""One epoch of MPO on real preference pairs, with a tiny InternVL of random weights.

    python -m benchmarks.visonlyqa [--seeds 0 1 2] [--data ../shared/data/visonlyqa] [--output runs/visonlyqa]

The pairs are answers of real models to questions on charts and geometry, in MMPR format. A model without knowledge can
still learn from the reasoning pairs what a chosen answer looks like; from the direct answers ("a" against "b") it
cannot. For each seed it runs ``vlmpo train`` and reports reward accuracy by subset with 95 % intervals, over the last
quarter of the epoch (on pairs not trained on before) and on a held-out tenth of the images; counts what became of every
pair; and makes the saved model generate. Prints a table, writes ``benchmarks/results/visonlyqa.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from vlmpo.stats import wilson
from vlmpo.testing.tiny import TinySize, build_model, build_processor, train_tokenizer

REPO = Path(__file__).resolve().parent.parent
DATA = REPO.parent / "shared" / "data" / "visonlyqa"
RESULTS = REPO / "benchmarks" / "results" / "visonlyqa.json"
SIZE = TinySize(
    image_size=224,
    patch_size=28,
    vision_hidden=96,
    vision_layers=2,
    vision_heads=4,
    text_hidden=128,
    text_layers=3,
    text_heads=4,
    text_kv_heads=2,
    layer_scale=1.0,
    initializer_range=0.05,
    position_embedding_std=0.2,
    max_tiles=6,
    tie_word_embeddings=True,
)
BATCH = 8


def write_model(source: Path, folder: Path, seed: int) -> None:
    """Write a tiny InternVL and a processor whose tokenizer is trained on the pairs' text."""
    texts: list[str] = []
    for entry in json.loads((source / "meta.json").read_text()).values():
        file = source.parent / entry["annotation"]
        for line in file.read_text().splitlines():
            record = json.loads(line)
            texts += [record["question"], record["chosen"], record["rejected"]]
    tokenizer = train_tokenizer(texts, vocab_size=2048)
    build_processor(tokenizer, SIZE).save_pretrained(folder)
    build_model(tokenizer, SIZE, seed).save_pretrained(folder)


def write_recipe(source: Path, folder: Path, seed: int, **changes: Any) -> Path:
    """Write the recipe of the run; ``changes`` replace keys of a section, e.g. ``data={"hold_out": 0.0}``."""
    recipe: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "data": {"train": [str(source / "meta.json")], "max_length": 4096, "max_tiles": 6, "hold_out": 0.1},
        "training": {
            "output_dir": str(folder / "run"),
            "seed": seed,
            "num_train_epochs": 1,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1.0e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "weight_decay": 0.05,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    for section, keys in changes.items():
        recipe[section] |= keys
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def run(source: Path, folder: Path, seed: int, **changes: Any) -> dict[str, Any]:
    """Train with one seed in ``folder`` (emptied first) by ``vlmpo train``, and return the run's figures."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_model(source, folder / "model", seed)
    recipe = write_recipe(source, folder, seed, **changes)
    started = time.perf_counter()
    log = folder / "log.txt"
    with log.open("w") as out:
        code = subprocess.call(
            [sys.executable, "-m", "vlmpo", "train", str(recipe)], stdout=out, stderr=subprocess.STDOUT
        )
    if code != 0:
        raise RuntimeError(f"vlmpo train ended with {code}:\n{log.read_text()[-3000:]}")
    return {"seed": seed, "seconds": time.perf_counter() - started, **collect(folder / "run")}


def collect(run_folder: Path) -> dict[str, Any]:
    """Return the figures of a finished run folder."""
    manifest = json.loads((run_folder / "manifest.json").read_text())
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    tenth = max(1, len(steps) // 10)
    return {
        "sets": manifest["data"]["sets"],
        "steps": len(steps),
        "loss_first_tenth": sum(line["loss"] for line in steps[:tenth]) / tenth,
        "loss_last_tenth": sum(line["loss"] for line in steps[-tenth:]) / tenth,
        "last_quarter": last_quarter(steps),
        "held_out": held_out(manifest.get("evaluation", {})),
        "generated": generate(run_folder),
    }


def last_quarter(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the reward accuracy over the last quarter of the steps, by data set; every pair was new to the model."""
    accuracies: dict[str, Any] = {}
    quarter = steps[-(len(steps) // 4) :]
    sources = sorted({key.removeprefix("pairs/") for line in quarter for key in line if key.startswith("pairs/")})
    for source in sources:
        lines = [line for line in quarter if f"pairs/{source}" in line]
        pairs = sum(line[f"pairs/{source}"] for line in lines)
        right = round(sum(line[f"pairs/{source}"] * line[f"rewards/accuracies/{source}"] for line in lines))
        low, high = wilson(right, int(pairs))
        accuracies[source] = {"pairs": int(pairs), "accuracy": right / pairs, "low": low, "high": high}
    return accuracies


def held_out(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the reward accuracy on the held-out pairs, by data set."""
    metrics = evaluation.get("held_out", {})
    prefix = "held_out_pairs/"
    accuracies = {}
    for source in sorted(key.removeprefix(prefix) for key in metrics if key.startswith(prefix)):
        accuracy, low, high = (metrics[f"held_out_rewards/accuracies{end}/{source}"] for end in ("", "_low", "_high"))
        pairs = int(metrics[f"{prefix}{source}"])
        accuracies[source] = {"pairs": pairs, "accuracy": accuracy, "low": low, "high": high}
    return accuracies


def generate(run_folder: Path) -> int:
    """Return how many tokens the saved model generates, reloaded by transformers alone."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(run_folder)
    processor = AutoProcessor.from_pretrained(run_folder)
    content = [{"type": "image"}, {"type": "text", "text": "What does the chart show?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[Image.new("RGB", (300, 200), "white")], text=text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return int(output.shape[1] - inputs["input_ids"].shape[1])


def show(results: list[dict[str, Any]]) -> None:
    """Print a table of the runs."""
    for result in results:
        print(f"seed {result['seed']}: {result['steps']} steps in {result['seconds']:.0f} s; loss", end=" ")
        print(f"{result['loss_first_tenth']:.3f} -> {result['loss_last_tenth']:.3f}")
        for when in ("last_quarter", "held_out"):
            for source, f in result[when].items():
                print(f"  {when:12} {source:24} {f['accuracy']:.3f} [{f['low']:.3f}, {f['high']:.3f}] of {f['pairs']}")
        for source, counts in result["sets"].items():
            print(f"  pairs        {source:24} {counts}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--output", type=Path, default=REPO / "runs" / "visonlyqa")
    options = parser.parse_args()
    results = [run(options.data, options.output / str(seed), seed) for seed in options.seeds]
    show(results)
    command = "python -m benchmarks.visonlyqa --seeds " + " ".join(map(str, options.seeds))
    RESULTS.write_text(json.dumps({"command": command, "batch": BATCH, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
