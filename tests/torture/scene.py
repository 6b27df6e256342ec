"""A tiny model, drawn pairs and questions, and the recipes that are killed, damaged and starved of disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlmpo.train.checkpoint import STATE_FILE

STEPS, SAVE_STEPS = 12, 3  # of every recipe: two epochs of six steps, the first checkpoint in mid-epoch
PAIRS, IMAGES, QUESTIONS = 24, 4, 10
RESUME = "training.resume_from_checkpoint=true"

# Changes to the plain recipe. Ranks of `sharded` hold parts of the weights (FSDP2) and write shards.
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "limited": {"training": {"save_total_limit": 1}, "loss": {"reward_shift": "running"}},
    "lora": {
        "model": {"lora": {"r": 4, "lora_dropout": 0.1}},
        "training": {"save_total_limit": 1, "learning_rate": 1e-2},
    },
    "ema": {"training": {"ema_decay": 0.9}},
    "cached": {"reference": {"kind": "cache"}},
    "workers": {"training": {"dataloader_num_workers": 1}},
    "best": {
        "data": {"eval": True},
        "training": {
            "eval_strategy": "steps",
            "eval_steps": SAVE_STEPS,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "save_total_limit": 1,
        },
    },
    "ranks": {"training": {"ddp_backend": "gloo", "save_total_limit": 1, "gradient_accumulation_steps": 1}},
    "sharded": {
        "training": {
            "ddp_backend": "gloo",
            "fsdp": True,
            "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"},
            "gradient_accumulation_steps": 1,
        }
    },
}
TWO_RANKS = ("ranks", "sharded")
LIMITED = tuple(name for name, changes in RECIPES.items() if "save_total_limit" in changes.get("training", {}))


@dataclass(frozen=True)
class Scene:
    """The folder in which everything lies; each case has one of its own below ``cases``."""

    folder: Path

    def recipe(self, name: str) -> Path:
        return self.folder / f"{name}.yaml"

    def whole(self, name: str) -> Path:
        """The folder of an uninterrupted run of a recipe or a building command."""
        return self.folder / "whole" / name

    def case(self, name: str) -> Path:
        return self.folder / "cases" / name

    def build(self) -> None:
        """Write the model, the data and the recipes."""
        from tests.tiny_models import model, noise_image, processor, random_pair, tokenizer

        made = model()
        made.save_pretrained(self.folder / "model")
        made.generation_config.eos_token_id = list(range(0, len(tokenizer()), 8))  # so that random words come to an end
        made.save_pretrained(self.folder / "writer")
        for name in ("model", "writer"):
            processor().save_pretrained(self.folder / name)
        for seed in range(IMAGES):
            noise_image(60 + 20 * seed, 60, seed).save(self.folder / f"{seed}.png")
        pairs = [random_pair(seed) for seed in range(PAIRS + 6)]
        records = [
            {
                "image": f"{seed % IMAGES}.png",
                "question": pair.prompt[0].text.removeprefix("<image>\n"),
                "chosen": pair.chosen,
                "rejected": pair.rejected,
            }
            for seed, pair in enumerate(pairs)
        ]
        write_lines(self.folder / "pairs.jsonl", records[:PAIRS])
        write_lines(self.folder / "eval.jsonl", records[PAIRS:])
        questions = [
            {"id": f"q{seed}", "image": f"{seed % IMAGES}.png", "question": f"what is it, {seed}?", "answer": "red"}
            for seed in range(QUESTIONS)
        ]
        write_lines(self.folder / "questions.jsonl", questions)
        self._write_responses()
        for name, changes in RECIPES.items():
            self.recipe(name).write_text(yaml.safe_dump(self._settings(changes)))
        self.recipe("build").write_text(yaml.safe_dump(self._build_settings()))

    def _settings(self, changes: dict[str, Any]) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "model": {"path": str(self.folder / "model")},
            "data": {"train": [str(self.folder / "pairs.jsonl")], "max_tiles": 2},
            "training": {
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "num_train_epochs": 2,
                "learning_rate": 1e-3,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 2,
                "logging_steps": 1,
                "save_strategy": "steps",
                "save_steps": SAVE_STEPS,
                "disable_tqdm": True,
                "use_cpu": True,
            },
        }
        for section, keys in changes.items():
            settings[section] = settings.get(section, {}) | keys
        if settings["data"].get("eval"):
            settings["data"]["eval"] = [str(self.folder / "eval.jsonl")]
        return settings

    def _build_settings(self) -> dict[str, Any]:
        build = {
            "questions": str(self.folder / "questions.jsonl"),
            "samples": 2,
            "max_new_tokens": 24,
            "batch_size": 1,
            "prompt": "direct",
        }
        return {"model": {"path": str(self.folder / "writer")}, "data": {"max_tiles": 2}, "build": build}

    def _write_responses(self) -> None:
        """Responses to pair: half of them right."""
        texts = ["red", "blue, as the sky is on a clear day, not green and not two", "red", "green"]
        responses = [
            {
                "question_id": f"q{seed}",
                "sample_index": index,
                "text": text,
                "finish_reason": "stop",
                "model": "drawn",
                "settings": {},
            }
            for seed in range(QUESTIONS)
            for index, text in enumerate(texts)
        ]
        write_lines(self.folder / "responses.jsonl", responses)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, the oldest first."""
    found = [path for path in run.glob("checkpoint-*") if (path / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))
