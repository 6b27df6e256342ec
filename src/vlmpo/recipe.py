"""The recipe of a run: typed, strict, frozen. Imports neither torch nor transformers; vlmpo.recipe_yaml reads it.

A key that nothing reads is an error here, never ignored. Only the keys under ``training`` and ``model.lora`` belong to
other libraries: :func:`check_keys` compares them with the known ones once those libraries are loaded.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from vlmpo import settings
from vlmpo.errors import RecipeError
from vlmpo.foreign_keys import answers

# Keys that `training` accepts in addition to the fields of transformers.TrainingArguments.
EXTRA_TRAINING_KEYS = ("max_tokens_per_row", "learning_rates", "ema_decay", "precision", "deterministic")


def _check_weights(weights: dict[str, float]) -> dict[str, float]:
    for name, weight in weights.items():
        if name not in settings.LOSS_TERMS:
            raise ValueError(f"unknown term {name!r}{nearest(name, settings.LOSS_TERMS)}")
        if weight < 0:
            raise ValueError(f"the weight of {name} is {weight}; weights must not be negative")
    if not any(weight > 0 for weight in weights.values()):
        raise ValueError(
            f"no term has a weight above 0, so nothing would train (terms: {', '.join(settings.LOSS_TERMS)})"
        )
    return weights


def _check_prompt(prompt: str) -> str:
    if prompt not in settings.PROMPT_STYLES and settings.QUESTION_FIELD not in prompt:
        hint = nearest(prompt, settings.PROMPT_STYLES)
        raise ValueError(f"{prompt!r} is neither a style nor a template that contains {settings.QUESTION_FIELD}{hint}")
    return prompt


def _check_engine(engine: str) -> str:
    if engine != "local":
        settings.check_server_url(engine)
    return engine


NonEmpty = Annotated[str, Field(min_length=1)]
Prompt = Annotated[str, AfterValidator(_check_prompt)]


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSection(_Section):
    """The checkpoint, and which part of it trains.

    Attributes:
        path: a local folder or a Hub name.
        dtype: dtype of the trained weights.
        freeze: names of submodules that do not train.
        lora: fields of ``peft.LoraConfig``; None trains the whole model.
        quantize: keep the frozen base under an adapter in 4 or 8 bits (QLoRA).
        attention: ``separate`` gives every response its own row instead of sharing the prompt.
        kernels: ``off`` uses no fused kernels on CUDA.
        vision_memory: ``keep`` the vision tower's activations for the backward pass, or ``recompute`` them a few tiles
            at a time; ``auto`` measures what fits.
        trust_remote_code: run the Python files that come with the model, with all your rights. Only if you have read
            them.
    """

    path: NonEmpty
    dtype: Literal["float32", "bfloat16"] = "float32"
    # strict=False only accepts YAML's list for the tuple; its items stay strict
    freeze: tuple[str, ...] = Field(default=(), strict=False)
    lora: dict[str, Any] | None = None
    quantize: Literal["4bit", "8bit"] | None = None
    attention: settings.Attention = "auto"
    kernels: settings.Kernels = "auto"
    vision_memory: settings.VisionMemory = "auto"
    trust_remote_code: bool = False

    @field_validator("kernels", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads an unquoted `off` as false


class ReferenceSection(_Section):
    """The frozen model the policy is compared with: a copy of it, or the policy with its LoRA adapter disabled.

    ``cache`` stores its log-probs in ``cache_dir`` (by default in the user's cache folder) for later epochs and runs.
    """

    kind: settings.ReferenceKind = "auto"
    cache_dir: NonEmpty | None = None


class Source(_Section):
    """One data set: a file, a glob of Parquet files, a folder, or a Hub name.

    Attributes:
        repeat: how often each pair is used an epoch; below 1, a seeded part of the pairs.
        max_tiles: image tiles of one pair at most; None leaves it to ``data.max_tiles``.
        format: format of the records; ``auto`` detects it.
        split, subset: which part of a folder's or Hub data set to use; of a file, the records of this ``split``.
    """

    path: NonEmpty
    image_root: str | None = None
    repeat: float = Field(default=1.0, gt=0)
    max_tiles: int | None = Field(default=None, ge=1)
    name: str | None = None
    format: settings.DataFormat = "auto"
    split: NonEmpty | None = None
    subset: NonEmpty | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class DataSection(_Section):
    """The pairs. All fields but ``train``, ``eval``, ``hold_out`` and ``confine`` are fields of MPOConfig.

    Attributes:
        train, eval: data sets to train and to evaluate on.
        hold_out: fraction of the training pairs kept for evaluation; pairs of one image stay together.
        max_length: tokens of prompt + longer response at most; None sets no limit.
        max_tiles: image tiles of one pair at most; None: a data set's own number, or else what the model's processor
            allows one image.
        video_frames: frames read from one video at most.
        on_bad_record: ``skip`` (and count) or ``fail`` on a record that cannot be used.
        max_bad_share: share of records whose media may fail while training; more end the run.
        over_long: ``drop`` or ``cut`` pairs above ``max_length``.
        group_by_prompt: how many pairs of one prompt may share it at most; 0 does not group.
        balance_ranks: distribute the pairs of a step over ranks by the work they need.
        confine: refuse every image and video outside the image root of its data set, a link out of it too.
    """

    train: tuple[Source, ...] = Field(default=(), strict=False)
    eval: tuple[Source, ...] = Field(default=(), strict=False)
    hold_out: float = Field(default=0.0, ge=0, lt=1)
    max_length: int | None = Field(default=8192, ge=1)
    max_tiles: int | None = Field(default=None, ge=1)
    video_frames: int = Field(default=8, ge=1)
    on_bad_record: settings.OnBadRecord = "skip"
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    over_long: settings.OverLong = "drop"
    group_by_prompt: int = Field(default=0, ge=0)
    balance_ranks: bool = True
    confine: bool = False


class LossSection(_Section):
    """The objective; see :func:`vlmpo.loss.mpo_loss` for the meaning of each setting. All are fields of MPOConfig."""

    weights: Annotated[dict[str, float], AfterValidator(_check_weights)] = Field(
        default_factory=lambda: dict(settings.MPO_WEIGHTS)
    )
    beta: float = Field(default=0.1, gt=0)
    reward_shift: settings.ShiftMode = "previous"
    nll_reduction: settings.NllReduction = "sequence"
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)


class BuildSection(_Section):
    """From questions to pairs: ``vlmpo sample`` and ``vlmpo pair``.

    Attributes:
        questions: a JSON Lines file; ``split`` is the part of it to use.
        engine: ``local`` (the model of ``model.path``, run with transformers) or the URL of an OpenAI-compatible chat
            server, which then serves ``model``.
        samples: responses to each question.
        prompt: a style of settings.PROMPT_STYLES or a template.
        verifier: how responses are judged.
        max_pairs: pairs of one question at most.
        keep: the part of a response that DropoutNTP keeps.
        batch_size: questions the local engine reads at once.
        concurrency, timeout, retries: requests at once, seconds and repetitions of a request to a server.
    """

    questions: NonEmpty
    image_root: str | None = None
    split: str | None = None
    output_dir: NonEmpty | None = None
    engine: Annotated[str, AfterValidator(_check_engine)] = "local"
    model: str | None = None
    samples: int = Field(default=8, ge=1)
    prompt: Prompt = "cot"
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=1024, ge=1)
    seed: int = Field(default=0, ge=0)
    verifier: settings.Verifier = "auto"
    max_pairs: int = Field(default=15, ge=1)
    keep: float = Field(default=0.5, gt=0, lt=1)
    batch_size: int = Field(default=8, ge=1)
    concurrency: int = Field(default=8, ge=1)
    timeout: float = Field(default=120.0, gt=0)
    retries: int = Field(default=5, ge=0)


class EvaluateSection(_Section):
    """What ``vlmpo evaluate`` runs, and which questions training answers at each evaluation.

    Attributes:
        model: the model to evaluate; by default the run's final model in ``training.output_dir``.
        reference: the model its rewards on held-out pairs are computed against; by default ``model.path``.
        against: a second model that answers the same questions.
        questions, image_root, split: the questions.
        prompt, max_new_tokens, verifier: how they are asked and judged; answers are greedy.
    """

    model: NonEmpty | None = None
    reference: NonEmpty | None = None
    against: NonEmpty | None = None
    questions: NonEmpty | None = None
    image_root: str | None = None
    split: str | None = None
    prompt: Prompt = "direct"
    max_new_tokens: int = Field(default=256, ge=1)
    verifier: settings.Verifier = "auto"
    batch_size: int = Field(default=16, ge=1)
    output_dir: NonEmpty | None = None


class Recipe(_Section):
    """All settings of a run, as read by :func:`vlmpo.recipe_yaml.load_recipe`. Equal recipes compare equal.

    A recipe that trains has ``data.train``, one that makes pairs has ``build``; it may have both.
    """

    model: ModelSection
    reference: ReferenceSection = ReferenceSection()
    data: DataSection = DataSection()
    loss: LossSection = LossSection()
    build: BuildSection | None = None
    evaluate: EvaluateSection | None = None
    training: dict[str, Any] = Field(default_factory=dict)

    @field_validator("training")
    @classmethod
    def _training_values(cls, training: dict[str, Any]) -> dict[str, Any]:
        rows = training.get("max_tokens_per_row")
        if rows not in (None, "auto") and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise ValueError(f"max_tokens_per_row: expected a whole number of tokens above 0, or auto, got {rows!r}")
        # YAML reads an unquoted `no` as false, and `save_strategy: no` is what everyone writes.
        return {k: "no" if k.endswith("_strategy") and v is False else v for k, v in training.items()}

    @model_validator(mode="after")
    def _has_something_to_do(self) -> Recipe:
        if not self.data.train and self.build is None and self.evaluate is None:
            raise ValueError("data.train: names no data set; give at least one")
        return self

    @model_validator(mode="after")
    def _adapter_needs_lora(self) -> Recipe:
        if self.reference.kind == "adapter" and self.model.lora is None:
            raise ValueError(
                "reference.kind: 'adapter' disables the LoRA adapter, and there is none; "
                "set model.lora or use reference.kind: copy"
            )
        return self

    def trainer_settings(self) -> dict[str, Any]:
        """Return the values of the fields of :class:`vlmpo.train.config.MPOConfig`, ``training`` among them."""
        return {
            **self.training,
            **self.data.model_dump(exclude={"train", "eval", "hold_out", "confine"}),
            **self.loss.model_dump(exclude={"weights"}),
            "loss_weights": dict(self.loss.weights),
            "reference_kind": self.reference.kind,
            "reference_cache_dir": self.reference.cache_dir,
            "attention": self.model.attention,
            "kernels": self.model.kernels,
            "vision_memory": self.model.vision_memory,
        }


SECTIONS: dict[str, type[BaseModel]] = {
    "": Recipe,
    "model": ModelSection,
    "reference": ReferenceSection,
    "data": DataSection,
    "data.train": Source,
    "data.eval": Source,
    "build": BuildSection,
    "evaluate": EvaluateSection,
    "loss": LossSection,
}


def check_keys(section: str, given: Mapping[str, Any], known: Sequence[str], owner: str) -> None:
    """Raise RecipeError for keys of ``section`` that are not in ``known``, the fields of the class ``owner``."""
    if lines := unknown_keys(section, given, known, f", not a field of {owner}"):
        raise RecipeError("\n".join(lines))


def unknown_keys(section: str, given: Mapping[str, Any], known: Sequence[str], owner: str = "") -> list[str]:
    """Return a line for each key of ``section`` that is not in ``known``: what to write instead."""
    unknown = {str(key): value for key, value in given.items() if key not in known}
    told = answers(unknown)
    answered = {key for answer in told for key in answer.keys}
    lines = [f"{section}: {answer.named('key', in_file)}" for answer in told]
    rest = [key for key in unknown if key not in answered]
    return lines + [f"{section}.{key}: unknown key{owner}{nearest(key, known, section)}" for key in rest]


def in_file(key: str, value: Any) -> str:
    """Return a dotted key and its value as a message shows them for a file; without the value if it is None or long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = re.sub(r"(?<=\d)e-0(?=\d)", "e-", text)  # 1e-6, as everyone writes it
    return key if value is None or len(text) > 80 else f"{key}: {text}"


def nearest(name: str, known: Sequence[str], section: str = "") -> str:
    """Return "; did you mean ...?" with the known name nearest to ``name``, or else a list of the known names.

    The suggestion is a dotted key; a key of that name in another section is suggested too.
    """
    prefix = f"{section}." if section else ""
    elsewhere = places()
    if name in elsewhere and elsewhere[name] != prefix:  # the right key in the wrong section
        return f"; did you mean {elsewhere[name]}{name}?"
    if match := get_close_matches(name, known, n=1, cutoff=0.6):
        return f"; did you mean {prefix}{match[0]}?"
    if match := get_close_matches(name, list(elsewhere), n=1, cutoff=0.8):
        return f"; did you mean {elsewhere[match[0]]}{match[0]}?"
    if len(known) > 20:
        closest = get_close_matches(name, known, n=1, cutoff=0.0)
        return f"; the nearest known key is {prefix}{closest[0]}"
    return f"; known here: {', '.join(known)}"


@functools.cache
def places() -> Mapping[str, str]:
    """Return the section, as ``section.``, in which a key of each name is meant if none is given."""
    found = {key: f"{section}." for section in reversed(SECTIONS) if section for key in SECTIONS[section].model_fields}
    # `seed` is a key of build too, and training's is meant more often
    return {**found, **dict.fromkeys((*training_fields(), *EXTRA_TRAINING_KEYS), "training.")}


@functools.cache
def training_fields() -> frozenset[str]:
    """Return the fields of transformers.TrainingArguments, read from its source: importing it takes seconds."""
    found = importlib.util.find_spec("transformers")  # finds the folder, imports nothing
    if found is None or found.origin is None:
        return frozenset()
    source = Path(found.origin).parent.joinpath("training_args.py").read_text(encoding="utf-8")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    body = next((node.body for node in classes if node.name == "TrainingArguments"), [])
    lines = [line for line in body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)]
    return frozenset(line.target.id for line in lines if not line.target.id.startswith("_"))  # type: ignore[union-attr]
