"""Run folders made up for the tests of the report: small, with every kind of file, and hostile ones."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

from vlmpo.report.kept import KeptData, ScoredPair, ScoredResponse

STEPS = 80


def picture(colour: tuple[int, int, int] = (200, 30, 30), size: int = 64) -> str:
    """A PNG in base64."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def noise(size: int, seed: int) -> str:
    """A picture that hardly compresses, in base64."""
    import numpy as np

    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def logs(*, sources: tuple[str, ...] = ("charts", "shapes"), falling: bool = True) -> list[dict[str, Any]]:
    """What a run logs: every step, and an evaluation every 20."""
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        done = step / STEPS
        line = {
            **{"step": step, "loss": 2.0 - done, "grad_norm": 3.0 + math.sin(step), "learning_rate": 1e-6 * (1 - done)},
            **{"loss/sigmoid": 0.7 - 0.3 * done, "loss/bco_pair": 1.3 - 0.2 * done, "loss/nll": 1.1 - 0.5 * done},
            **{"rewards/chosen": -done if falling else done, "rewards/rejected": -3 * done, "rewards/accuracies": done},
            **{"rewards/margins": 2 * done, "reward_shift": -done, "logps/chosen": -20 - done, "logps/rejected": -22.0},
            **{"pairs_per_second": 12.0, "data_wait_share": 0.03, "memory_gib": 1.5},
            **{f"rewards/accuracies/{source}": done for source in sources},
            **{f"pairs/{source}": 4.0 for source in sources},
        }
        lines.append(line)
        if step % 20 == 0:
            pairs = {
                "eval_loss": 2.1 - done,
                "eval_rewards/accuracies": done,
                "eval_rewards/accuracies_low": done - 0.1,
            }
            pairs |= {"eval_rewards/accuracies_high": done + 0.1, "eval_answers/accuracy": 0.4, "eval_answers/low": 0.3}
            lines.append({"step": step, **pairs, "eval_answers/high": 0.5})
    lines.append({"step": STEPS, "train_runtime": 240.0, "train_loss": 1.5})
    return lines


def scored_pair(number: int, text: str = " word", *, kind: str = "largest", image: str | None = None) -> ScoredPair:
    """A pair whose chosen tokens rose and whose rejected ones fell."""

    def response(moved: float) -> ScoredResponse:
        tokens = [(text, -1.0 + moved * part, -1.0) for part in (0.01, 0.1, 0.5, 2.0, 4.0)]
        return ScoredResponse(tokens, 5, sum(token[1] for token in tokens), -5.0)

    return ScoredPair(
        origin=f"pairs.jsonl:{number}",
        source="charts",
        kind=kind,
        prompt=f"user: <image>\n{text}",
        images=[picture() if image is None else image],
        num_media=2,
        seen_step=70,
        seen_margin=0.5,
        margin=0.1 * number if kind == "largest" else -0.1 * number,
        chosen=response(1.0),
        rejected=response(-1.0),
    )


def write_run(folder: Path, *, text: str = " word", source: str = "charts", images: list[str] | None = None) -> Path:
    """Write a finished run with all its files; ``text`` and ``source`` come from its data."""
    folder.mkdir(parents=True)
    lines = logs(sources=(source, "shapes"))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    counts = {"read": 100, "used": 90, "held_out": 7, "dropped": {"missing_image": 3}, "not_reached": 0}
    metrics = {f"held_out_{name}": value for name, value in _held_out(source).items()}
    manifest = {
        "started": "2026-01-02T03:04:05+00:00",
        "status": "finished",
        "versions": {"python": "3.11", "vlmpo": "0.1.0", "torch": "2.13"},
        "seed": 7,
        "world_size": 1,
        "model": {"path": "models/tiny"},
        "data": {"sets": {source: counts}, "examples": {"missing_image": [text]}, "hashes": {"pairs.jsonl": "ab12"}},
        "evaluation": {"held_out": metrics},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    recipe = f"model: {{path: models/tiny}}\nloss: {{beta: 0.1}}\n# {json.dumps(text)}\n"
    (folder / "recipe.yaml").write_text(recipe, "utf-8")
    for name, status in (("answers_before.jsonl", "incorrect"), ("answers.jsonl", "correct")):
        answer = {"question_id": "q", "question": text, "truth": text, "text": text, "status": status}
        (folder / name).write_text(json.dumps(answer) + "\n", "utf-8")
    kept = KeptData()
    kept.plan(STEPS * 8)
    for step in range(1, STEPS + 1):
        kept.see(step, [(f"pairs.jsonl:{number}", step / 40 - number / 8) for number in range(8)])
    for at, image in enumerate(images if images is not None else [picture()] * 2):
        kept.pairs.append(scored_pair(at + 1, text, kind=("largest", "smallest")[at % 2], image=image))
    kept.write(folder)
    return folder


def _held_out(source: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for suffix in ("", f"/{source}"):
        found |= {f"pairs{suffix}": 7, f"rewards/accuracies{suffix}": 0.8, f"rewards/accuracies_low{suffix}": 0.5}
        found |= {f"rewards/accuracies_high{suffix}": 0.95, f"rewards/margins{suffix}": 1.5}
        found |= {f"rewards/margins_low{suffix}": 1.0, f"rewards/margins_high{suffix}": 2.0}
    return found


HOSTILE = (
    "<script>document.title = 'owned'</script></script><img src=x onerror=\"document.title='owned'\">"
    "{{ 7 * 7 }}{% raw %}${7*7}\x1b[31mred\x1b[0m\u202eevil \"quoted\" 'single' & $\\frac{1$ <b>bold</b>"
    "javascript:alert(1) --> <!-- ]]> \ud800"
)
