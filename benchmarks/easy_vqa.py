"""From questions to a better model on real data: easy-VQA, a tiny model from scratch, four arms, the test images.

    python -m benchmarks.easy_vqa [--seeds 0 1 2] [--data ../shared/data/easy_vqa] [--output runs/easy_vqa]

For each seed: a warm-up on training questions with their answers; 8 responses to each of fresh training questions,
sampled, verified and paired (the stages of ``vlmpo sample`` and ``vlmpo pair correctness``); then, each from the
warm-up and for the same number of steps on the same pairs, SFT on the chosen responses, DPO, and MPO. All four models
answer the same questions on the official test images, greedily. Settings were chosen on held-out training images with
seed 7. Prints a table and writes ``benchmarks/results/easy_vqa.json`` and ``easy_vqa.md``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from vlmpo import Message, MPOConfig, MPOTrainer, PreferencePair
from vlmpo.commands.pair import CORRECTNESS_PAIRS, correctness
from vlmpo.commands.sample import sample
from vlmpo.data.dataset import open_pairs
from vlmpo.data.readers.questions import read_questions
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.data.records import Question
from vlmpo.evaluate import answer_questions, compare, summarise
from vlmpo.generate.base import Sampling
from vlmpo.generate.local import LocalEngine
from vlmpo.generate.prompts import prompt_text
from vlmpo.models.loading import load_model, load_processor
from vlmpo.recipe_yaml import load_recipe
from vlmpo.testing.tiny import TinySize, build_model, build_processor, train_tokenizer

REPO = Path(__file__).resolve().parent.parent
DATA = REPO.parent / "shared" / "data" / "easy_vqa"
RESULTS = REPO / "benchmarks" / "results"
ARMS = {
    "sft_on_chosen": {"nll": 1.0},
    "dpo": {"sigmoid": 1.0},
    "mpo": {"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1.0},
}
SIZE = TinySize(
    image_size=64,
    patch_size=8,
    vision_hidden=96,
    vision_layers=2,
    vision_heads=4,
    text_hidden=96,
    text_layers=3,
    text_heads=4,
    text_kv_heads=4,
    layer_scale=1.0,
    initializer_range=0.08,
    position_embedding_std=0.2,
    crop_to_patches=False,
    tie_word_embeddings=True,
)
SETTINGS: dict[str, Any] = {
    "batch": 32,
    "warm_up_steps": 500,
    "warm_up_rate": 2e-3,
    "sampled_questions": 1500,
    "samples": 8,
    "temperature": 1.0,
    "max_pairs": 2,
    "steps": 150,
    "rate": 3e-4,
    "beta": 0.1,
    "held_out_pairs": 300,
    "test_questions": 2000,
}
STYLE = "direct"


def supervised(question: Question) -> PreferencePair:
    """Return the question with its true answer, as fine-tuning data."""
    prompt = (Message("user", prompt_text(question, STYLE)),)
    return PreferencePair(prompt, question.images, question.answer, None, "easy_vqa", question.origin)


def train(folder: Path, name: str, model: Any, processor: Any, data: Any, **settings: Any) -> MPOTrainer:
    """Run one training stage and save the model to ``folder/name``."""
    defaults = {
        "output_dir": str(folder / f"log_{name}"),
        "per_device_train_batch_size": SETTINGS["batch"],
        "per_device_eval_batch_size": SETTINGS["batch"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "adam_beta2": 0.99,
        "logging_steps": 50,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_num_workers": 1,
        "beta": SETTINGS["beta"],
    }
    trainer = MPOTrainer(
        model=model, args=MPOConfig(**{**defaults, **settings}), train_dataset=data, processing_class=processor
    )
    trainer.train()
    trainer.save_model(str(folder / name))
    return trainer


def draw(data: Path, split: str, seed: int, count: int) -> list[Question]:
    """Return ``count`` questions of a split, shuffled by ``seed``."""
    questions = read_questions(data / "questions.jsonl", split=split).questions
    random.Random(seed).shuffle(questions)
    return questions[:count]


def run(data: Path, folder: Path, seed: int, validate: bool = False) -> dict[str, Any]:
    """Run all stages for one seed; with ``validate`` on held-out training questions instead of the test's."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.perf_counter()
    warm = SETTINGS["batch"] * SETTINGS["warm_up_steps"]
    train_questions = draw(data, "train", seed, warm + SETTINGS["sampled_questions"] + 2000)
    lessons, fresh = train_questions[:warm], train_questions[warm : warm + SETTINGS["sampled_questions"]]
    questions = train_questions[-2000:] if validate else draw(data, "test", 0, SETTINGS["test_questions"])
    tokenizer = train_tokenizer([prompt_text(q, STYLE) + " " + q.answer for q in lessons], vocab_size=512)
    processor = build_processor(tokenizer, SIZE)
    model = build_model(tokenizer, SIZE, seed)
    steps, rate = SETTINGS["warm_up_steps"], SETTINGS["warm_up_rate"]
    pairs_for_lessons = [supervised(question) for question in lessons]
    train(folder, "warm_up", model, processor, pairs_for_lessons, max_steps=steps, learning_rate=rate, seed=seed,
          loss_weights={"nll": 1.0})  # fmt: skip
    pairs, report = make_pairs(folder, fresh, seed)
    answers = {"warm_up": ask(folder / "warm_up", questions)}
    results: dict[str, Any] = {"seed": seed, "pairs": report, "arms": {}}
    reader = MPOTrainer(model=model, args=MPOConfig(output_dir=str(folder / "log"), use_cpu=True, disable_tqdm=True,
                        per_device_eval_batch_size=SETTINGS["batch"]), processing_class=processor)  # fmt: skip
    chosen: dict[str, dict[str, Any]] = {
        "warm_up": {"logps/chosen": reader.evaluate(pairs["held_out"])["eval_logps/chosen"]}
    }
    for name, weights in ARMS.items():
        policy = load_model(str(folder / "warm_up"))
        trainer = train(folder, name, policy, processor, pairs["train"], max_steps=SETTINGS["steps"],
                        learning_rate=SETTINGS["rate"], seed=seed, loss_weights=weights)  # fmt: skip
        metrics = trainer.evaluate(pairs["held_out"])
        chosen[name] = {key: metrics.get(f"eval_{key}") for key in ("logps/chosen", "rewards/accuracies")}
        answers[name] = ask(folder / name, questions)
    for name, given in answers.items():
        figures = summarise(given, lambda text: len(tokenizer(text)["input_ids"]))
        results["arms"][name] = {
            **figures,
            **chosen.get(name, {}),
            "against_warm_up": compare(given, answers["warm_up"]),
        }
    results["seconds"] = time.perf_counter() - started
    return results


def make_pairs(folder: Path, questions: list[Question], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sample, verify and pair as the commands do; return training and held-out pairs, and the report."""
    lines = [
        {
            "id": f"{q.id}-{i}",
            "image": q.images[0],
            "question": q.question.removeprefix("<image>\n"),
            "answer": q.answer,
        }
        for i, q in enumerate(questions)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    build = {
        "questions": str(folder / "questions.jsonl"),
        "output_dir": str(folder / "build"),
        "samples": SETTINGS["samples"],
        "temperature": SETTINGS["temperature"],
        "max_pairs": SETTINGS["max_pairs"],
        "prompt": STYLE,
        "max_new_tokens": 8,
        "verifier": "exact",
        "seed": seed,
        "batch_size": 32,
    }
    recipe_file = folder / "build.yaml"
    recipe_file.write_text(yaml.safe_dump({"model": {"path": str(folder / "warm_up")}, "build": build}))
    recipe = load_recipe(recipe_file)
    sample(recipe)
    report = correctness(recipe)
    pairs = open_pairs([SourceSpec(str(folder / "build" / CORRECTNESS_PAIRS))], seed=seed)
    wrong = [pair.origin for pair in (pairs[i] for i in range(len(pairs))) if not _is_right(pair)]
    if wrong:
        raise AssertionError(f"{len(wrong)} pairs whose chosen response is not the truth, e.g. {wrong[0]}")
    aside = min(SETTINGS["held_out_pairs"], len(pairs) // 4)
    return {"train": pairs.select(range(aside, len(pairs))), "held_out": pairs.select(range(aside))}, report.to_json()


def _is_right(pair: PreferencePair) -> bool:
    """Return whether the chosen response alone is the true answer, by plain comparison."""
    truth = str(pair.metadata["answer"]).lower()
    return pair.chosen.strip().lower().rstrip(".") == truth and str(pair.rejected).strip().lower().rstrip(".") != truth


def ask(folder: Path, questions: list[Question]) -> list[Any]:
    """Return the greedy answers of a saved model."""
    greedy = Sampling(temperature=0.0, max_new_tokens=8)
    engine = LocalEngine(load_model(str(folder)), load_processor(str(folder)), greedy, batch_size=64)
    return answer_questions(engine, questions, STYLE, "exact")[0]


def table(results: list[dict[str, Any]]) -> str:
    """Return the accuracy by arm and seed, as Markdown."""
    lines = ["| seed | arm | accuracy [95 %] | minus warm-up [95 %] | unparsed | chosen log-prob | reward accuracy |"]
    lines.append("|---|---|---|---|---|---|---|")
    for result in results:
        for name, f in result["arms"].items():
            gain = f["against_warm_up"]
            lines.append(
                f"| {result['seed']} | {name} | {f['accuracy']:.3f} [{f['low']:.3f}, {f['high']:.3f}] | "
                f"{gain['difference']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}] | {f['unparsed']:.1%} | "
                f"{_number(f.get('logps/chosen'))} | {_number(f.get('rewards/accuracies'))} |"
            )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--output", type=Path, default=REPO / "runs" / "easy_vqa")
    parser.add_argument("--validate", action="store_true", help="ask held-out training questions; write no results")
    options = parser.parse_args()
    results = [run(options.data, options.output / str(seed), seed, options.validate) for seed in options.seeds]
    print(table(results))
    if options.validate:
        return
    command = "python -m benchmarks.easy_vqa --seeds " + " ".join(map(str, options.seeds))
    RESULTS.mkdir(exist_ok=True)
    whole = {"command": command, "settings": SETTINGS, "runs": results}
    (RESULTS / "easy_vqa.json").write_text(json.dumps(whole, indent=1) + "\n")
    (RESULTS / "easy_vqa.md").write_text(f"`{command}`\n\n{table(results)}\n")


if __name__ == "__main__":
    main()
