"""The text of the recipe that ``vlmpo init`` writes: YAML with comments, placeholders for what is not known."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import yaml

from vlmpo.commands.init_fit import Fit, devices
from vlmpo.commands.pair import CORRECTNESS_PAIRS, DROPOUT_PAIRS
from vlmpo.errors import RecipeError, shorten
from vlmpo.log import shown

MODEL, PAIRS, IMAGES = "PATH-OF-YOUR-MODEL", "PATH-OF-YOUR-PAIRS.jsonl", "FOLDER-OF-YOUR-IMAGES"
_PLAIN = re.compile(r"[A-Za-z/][\w./-]*", re.ASCII)
_WIDTH = 110  # of the comments above the recipe


def recipe_text(fit: Fit, model: str | None, recipe: Path) -> str:
    """Return the recipe as YAML.

    Args:
        fit: what was settled.
        model: a folder or a Hub name; None for a placeholder.
        recipe: the file it will be in, which paths below its folder are written relative to.

    Raises:
        RecipeError: a path has bytes that no recipe can hold.
    """
    run = os.path.join("runs", recipe.stem)
    parts = [_head(fit), _model(fit, model, recipe), _data(fit, recipe, run), _loss(fit), _questions(fit, recipe)]
    lines = [line for part in [*parts, _training(fit, run)] for line in part]
    return "\n".join(lines) + "\n"


def _head(fit: Fit) -> Iterator[str]:
    yield "# Written by vlmpo init. All keys: docs/training.md of vlmpo; `vlmpo inspect` shows what the model will see."
    for note in fit.notes:
        yield from (f"# {line}" for line in textwrap.wrap(_in_comment(note), _WIDTH, subsequent_indent="  "))
    yield ""


def _model(fit: Fit, model: str | None, recipe: Path) -> Iterator[str]:
    yield "model:"
    if model is None:
        yield f"  path: {MODEL} # fill in: a checkpoint's folder, or its name on the Hub"
    else:
        yield f"  path: {_path(model, recipe)}"
    if fit.lora:
        yield "  dtype: bfloat16 # of the frozen base"
        yield "  lora: {r: 16, lora_alpha: 32} # on all linear layers; without this line all weights are trained"
    else:
        yield "  dtype: float32 # of the weights: steps of 1e-6 vanish in bfloat16; passes are bf16 if that is fast"
        yield "  # lora: {r: 16, lora_alpha: 32} # trains an adapter, for less memory"
    if fit.supervised:
        return
    if fit.cache:
        yield "reference: {kind: cache} # log-probs on disk, by `vlmpo cache`: a second model would not fit"
    else:
        yield "reference: {kind: auto} # cache keeps its log-probs on disk, for several epochs or runs"


def _data(fit: Fit, recipe: Path, run: str) -> Iterator[str]:
    yield "data:"
    yield "  train:"
    if fit.questions is not None:
        made = os.path.join(run, "build", CORRECTNESS_PAIRS if fit.with_answers else DROPOUT_PAIRS)
        yield f"    - path: {_scalar(made)} # made by `vlmpo sample` and `vlmpo pair`"
    elif fit.train is None:
        yield f"    - path: {PAIRS} # fill in: .jsonl, .json, .parquet, a folder or a Hub name"
    else:
        yield from _source(fit.train, fit.needs_root, recipe)
    if fit.eval is not None:
        yield "  eval:"
        yield from _source(fit.eval, False, recipe)
    if fit.eval is None:
        yield f"  hold_out: {fit.hold_out:g} # {fit.remarks['hold_out']}"
    yield f"  max_length: {fit.max_length} # {fit.remarks.get('max_length', 'tokens of prompt and longer response')}"
    if fit.max_tiles is not None:
        yield f"  max_tiles: {fit.max_tiles} # of the images of a pair together; {fit.remarks['max_tiles']}"
    yield "  on_bad_record: skip # and count; fail stops at the first"


def _source(source: dict[str, str], needs_root: bool, recipe: Path) -> Iterator[str]:
    yield f"    - path: {_path(source['path'], recipe)}"
    if needs_root:
        yield f"      image_root: {IMAGES} # fill in: the folder that the images' paths start from"
    elif "image_root" in source:
        yield f"      image_root: {_path(source['image_root'], recipe)}"


def _loss(fit: Fit) -> Iterator[str]:
    yield "loss:"
    if fit.supervised:
        yield "  weights: {nll: 1.0} # supervised fine-tuning; MPO needs rejected responses"
        return
    yield "  weights: {sigmoid: 0.8, bco_pair: 0.2, nll: 1.0} # MPO; {sigmoid: 1} is DPO"
    yield "  beta: 0.1"


def _questions(fit: Fit, recipe: Path) -> Iterator[str]:
    if fit.questions is None or fit.train is None:
        return
    path = _path(fit.train["path"], recipe)
    root = [f"  image_root: {_path(fit.train['image_root'], recipe)}"] if "image_root" in fit.train else []
    if fit.needs_root:
        root = [f"  image_root: {IMAGES} # fill in: the folder that the images' paths start from"]
    yield from ("build:", f"  questions: {path}", *root)
    if fit.splits is not None:
        yield f"  split: {fit.splits[0]}"
    yield "  samples: 8 # responses to each question"
    if not fit.with_answers:
        yield "  prompt: direct"
    yield "  max_new_tokens: 1024"
    if fit.splits is not None:
        yield from ("evaluate:", f"  questions: {path}", *root, f"  split: {fit.splits[1]}")


def _training(fit: Fit, run: str) -> Iterator[str]:
    steps = fit.steps
    yield "training: # any field of transformers.TrainingArguments"
    yield f"  output_dir: {_scalar(run)}"
    yield f"  per_device_train_batch_size: {fit.per_device}"
    yield (
        f"  gradient_accumulation_steps: {fit.accumulation} # {fit.pairs_per_step} pairs a step: {fit.per_device} x "
        f"{fit.accumulation} x {devices()} process{'es' if devices() > 1 else ''}"
    )
    of_steps = "" if steps is None else f" # {steps} steps in all"
    yield f"  num_train_epochs: {fit.epochs}{of_steps}"
    yield f"  learning_rate: {'1e-5' if fit.lora or fit.supervised else '1e-6'}"
    yield "  lr_scheduler_type: cosine"
    yield "  warmup_steps: 0.03 # below 1: a part of all steps"
    yield "  weight_decay: 0.05"
    yield f"  activation_checkpointing: {str(fit.checkpointing).lower()} # true takes less memory and more time"
    yield f"  logging_steps: {1 if steps is not None and steps <= 100 else 10}"
    evaluates = fit.eval is not None or fit.hold_out > 0
    by_steps = fit.epochs == 1 and steps is not None and steps >= 20
    for name in ("eval", "save") if evaluates else ("save",):
        yield f"  {name}_strategy: {'steps' if by_steps else 'epoch'}"
        if by_steps:
            yield f"  {name}_steps: {max((steps or 0) // 10, 1)}"
    yield "  save_total_limit: 2"
    yield "  seed: 42"


# ---- values ----


def _path(path: str, recipe: Path) -> str:
    """Return a path as YAML: relative if it is below the recipe's folder; a Hub name as it is."""
    folder = os.path.abspath(recipe.parent)
    below = os.path.isabs(path) and path.startswith(os.path.join(folder, ""))
    return _scalar(os.path.relpath(path, folder) if below else path)


def _scalar(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecipeError(
            f"{shorten(shown(text))}: its name is not UTF-8 text, which no recipe can hold; rename it"
        ) from None
    if _PLAIN.fullmatch(text) and yaml.safe_load(text) == text:  # `no` is no text to YAML
        return text
    quoted = yaml.safe_dump(text, default_style='"', allow_unicode=True, width=1 << 20)
    return str(quoted).strip()


def _in_comment(text: str) -> str:
    """Return data's words on one line, as a comment can hold them."""
    return shown(" ".join(text.split()))
