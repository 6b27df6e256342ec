"""The recipe of a run: typed, strict, frozen. Reads YAML and dotted overrides; imports neither torch nor transformers.

A key nobody reads is an error here, never silence. Only the keys under ``training`` and ``model.lora`` belong to other
libraries: :func:`check_training_keys` and :func:`check_lora_keys` hold them against the known ones once those
libraries are loaded.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vlmpo.errors import RecipeError

# Said here and in vlmpo.loss, vlmpo.build and vlmpo.data, which need more than a recipe may import; a test holds them
# equal.
LOSS_TERMS = ("sigmoid", "bco_pair", "nll")
MPO_WEIGHTS = {"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1.0}
DataFormat = Literal["auto", "mmpr", "rlaif_v", "rlhf_v", "trl", "trl_implicit", "sharegpt", "alpaca", "swift"]
Verifier = Literal["auto", "exact", "option", "number", "anls", "vqa", "math"]
# Ways to put a question; anything else is a template that holds QUESTION_FIELD. vlmpo.generate.prompts has their texts.
PROMPT_STYLES = ("direct", "cot", "boxed")
QUESTION_FIELD = "{question}"
# What `training` takes beside the fields of transformers.TrainingArguments.
OWN_TRAINING_KEYS = ("max_tokens_per_row", "learning_rates", "ema_decay")


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSection(_Section):
    """Which checkpoint, and which part of it trains.

    ``path`` is a local folder or a hub name; ``dtype`` that of the trained weights; ``freeze`` names submodules that
    do not train; ``lora`` holds fields of ``peft.LoraConfig``; ``quantize`` keeps the frozen base under an adapter in
    4 or 8 bits (QLoRA); ``attention`` "separate" gives every response its own row instead of sharing the prompt's.
    """

    path: str = Field(min_length=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    freeze: tuple[str, ...] = Field(
        default=(), strict=False
    )  # strict=False only lets YAML's list in; the items stay strict
    lora: dict[str, Any] | None = None
    quantize: Literal["4bit", "8bit"] | None = None
    attention: Literal["auto", "separate"] = "auto"


class ReferenceSection(_Section):
    """The frozen model the policy is held against: a copy of it, or the policy with its LoRA adapter switched off.

    ``cache`` keeps its log-probs in ``cache_dir`` (a folder of the user's by default), for other epochs and runs.
    """

    kind: Literal["auto", "copy", "adapter", "cache"] = "auto"
    cache_dir: str | None = Field(default=None, min_length=1)


class Source(_Section):
    """One data set: a file, a glob of Parquet files, a folder, or a Hub name.

    ``repeat`` below 1 takes a seeded part of it; ``max_tiles`` bounds the tiles of each pair; ``format`` is told by the
    records unless it is given; ``split`` and ``subset`` choose a part of a folder's or Hub data set.
    """

    path: str = Field(min_length=1)
    image_root: str | None = None
    repeat: float = Field(default=1.0, gt=0)
    max_tiles: int | None = Field(default=None, ge=1)
    name: str | None = None
    format: DataFormat = "auto"
    split: str | None = Field(default=None, min_length=1)
    subset: str | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class DataSection(_Section):
    """The pairs. ``hold_out`` is the fraction of the training pairs kept for evaluation, split off by image.

    ``max_length`` bounds the tokens of prompt + longer response (None: no bound), ``video_frames`` the images that a
    video becomes; ``over_long`` says what becomes of a pair above it, ``on_bad_record`` of a record that is no good.
    Up to ``group_by_prompt`` pairs of one prompt share its prompt. ``balance_ranks`` lets ranks share the pairs of a
    step by the work they make.
    """

    train: tuple[Source, ...] = Field(default=(), strict=False)
    eval: tuple[Source, ...] = Field(default=(), strict=False)
    hold_out: float = Field(default=0.0, ge=0, lt=1)
    max_length: int | None = Field(default=8192, ge=1)
    max_tiles: int = Field(default=12, ge=1)
    video_frames: int = Field(default=8, ge=1)
    on_bad_record: Literal["skip", "fail"] = "skip"
    over_long: Literal["drop", "cut"] = "drop"
    group_by_prompt: int = Field(default=0, ge=0)
    balance_ranks: bool = True


class LossSection(_Section):
    """The objective; see :func:`vlmpo.loss.mpo_loss` for the meaning of each setting."""

    weights: dict[str, float] = Field(default_factory=lambda: dict(MPO_WEIGHTS))
    beta: float = Field(default=0.1, gt=0)
    reward_shift: Literal["previous", "running", "none"] = "previous"
    nll_reduction: Literal["sequence", "token"] = "sequence"
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)

    @field_validator("weights")
    @classmethod
    def _known_terms(cls, weights: dict[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            if name not in LOSS_TERMS:
                raise ValueError(f"unknown term {name!r}{_nearest(name, LOSS_TERMS)}")
            if weight < 0:
                raise ValueError(f"the weight of {name} is {weight}; weights must not be negative")
        if not any(weight > 0 for weight in weights.values()):
            raise ValueError(f"no term has a weight above 0, so nothing would train (terms: {', '.join(LOSS_TERMS)})")
        return weights


class BuildSection(_Section):
    """From questions to pairs: ``vlmpo sample`` and ``vlmpo pair``.

    ``questions`` is a JSON Lines file, ``split`` the part of it to use. ``engine`` is ``local`` (the model of
    ``model.path``, through transformers) or the URL of an OpenAI-compatible chat server, whose ``model`` is asked.
    Each question gets ``samples`` responses under the style or template of ``prompt``. ``batch_size``: questions read
    together by the local engine; ``concurrency``, ``timeout`` (seconds) and ``retries`` are for servers. ``verifier``,
    ``max_pairs`` (per question) and ``keep`` (the part of a response DropoutNTP keeps) are for pairing.
    """

    questions: str = Field(min_length=1)
    image_root: str | None = None
    split: str | None = None
    output_dir: str | None = Field(default=None, min_length=1)
    engine: str = "local"
    model: str | None = None
    samples: int = Field(default=8, ge=1)
    prompt: str = "cot"
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=1024, ge=1)
    seed: int = Field(default=0, ge=0)
    verifier: Verifier = "auto"
    max_pairs: int = Field(default=15, ge=1)
    keep: float = Field(default=0.5, gt=0, lt=1)
    batch_size: int = Field(default=8, ge=1)
    concurrency: int = Field(default=8, ge=1)
    timeout: float = Field(default=120.0, gt=0)
    retries: int = Field(default=5, ge=0)

    @field_validator("engine")
    @classmethod
    def _local_or_url(cls, engine: str) -> str:
        if engine != "local" and not re.match(r"https?://[^/]", engine):
            raise ValueError(f"expected local or the http(s) URL of a chat server, got {engine!r}")
        return engine

    @field_validator("prompt")
    @classmethod
    def _style_or_template(cls, prompt: str) -> str:
        return _checked_prompt(prompt)


def _checked_prompt(prompt: str) -> str:
    if prompt not in PROMPT_STYLES and QUESTION_FIELD not in prompt:
        hint = _nearest(prompt, PROMPT_STYLES)
        raise ValueError(f"{prompt!r} is neither a style nor a template that holds {QUESTION_FIELD}{hint}")
    return prompt


class EvaluateSection(_Section):
    """What ``vlmpo evaluate`` asks, and what training asks at each evaluation.

    ``model`` is evaluated (by default the run's final model, ``training.output_dir``), ``reference`` is what its
    rewards on held-out pairs are taken against (by default ``model.path``), ``against`` a second model for the
    questions. ``questions``, ``image_root`` and ``split`` name the questions; ``prompt``, ``max_new_tokens`` and
    ``verifier`` say how they are put and judged; the answers are greedy.
    """

    model: str | None = Field(default=None, min_length=1)
    reference: str | None = Field(default=None, min_length=1)
    against: str | None = Field(default=None, min_length=1)
    questions: str | None = Field(default=None, min_length=1)
    image_root: str | None = None
    split: str | None = None
    prompt: str = "direct"
    max_new_tokens: int = Field(default=256, ge=1)
    verifier: Verifier = "auto"
    batch_size: int = Field(default=16, ge=1)
    output_dir: str | None = Field(default=None, min_length=1)

    @field_validator("prompt")
    @classmethod
    def _style_or_template(cls, prompt: str) -> str:
        return _checked_prompt(prompt)


class Recipe(_Section):
    """Everything a run is told. Made by :func:`load_recipe`; equal recipes compare equal.

    A recipe that trains names pairs under ``data.train``, one that makes pairs has a ``build`` section; both is fine.
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
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise ValueError(f"max_tokens_per_row: expected a whole number of tokens above 0, got {rows!r}")
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
                "reference.kind: 'adapter' switches the LoRA adapter off, and there is none; "
                "set model.lora or use reference.kind: copy"
            )
        return self

    def to_yaml(self) -> str:
        """The whole recipe, defaults included, as YAML that parses back to an equal recipe."""
        return yaml.dump(self.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_recipe(text: str, *, where: str = "recipe") -> Recipe:
    """Recipe from YAML text, paths left as written. ``where`` names the text in messages. Raises RecipeError."""
    return _validate(_read_mapping(text, where), where, overridden=())


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Recipe from a YAML file and ``key=value`` overrides, e.g. ``loss.beta=0.2``; values are YAML.

    Relative paths in the file (models, data, questions, ``image_root``) mean the file's own folder where they exist
    there, else the working directory; those in overrides mean the working directory. ``training.output_dir`` defaults
    to ``runs/<file name without suffix>``, ``build.output_dir`` to ``build`` in that folder.

    Raises RecipeError, naming the file, the dotted key, the value and what was expected.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"cannot read the recipe {path}: {reason}") from None
    raw = _anchor_paths(_read_mapping(text, str(path)), path.parent)
    overridden = [_override(raw, override) for override in overrides]
    if isinstance(training := raw.setdefault("training", {}), dict):
        training.setdefault("output_dir", os.path.join("runs", path.stem))
    if isinstance(build := raw.get("build"), dict) and build.get("output_dir") is None:
        build["output_dir"] = os.path.join("runs", path.stem, "build")
    return _validate(raw, str(path), overridden)


def check_training_keys(recipe: Recipe, known: Iterable[str]) -> None:
    """Raise RecipeError for a key under ``training`` that is in neither ``known`` nor OWN_TRAINING_KEYS.

    ``known``: the field names of transformers.TrainingArguments, passed in so that this module need not import it.
    """
    _check_keys("training", recipe.training, [*known, *OWN_TRAINING_KEYS], "transformers.TrainingArguments")


def check_lora_keys(recipe: Recipe, known: Iterable[str]) -> None:
    """Raise RecipeError for a key under ``model.lora`` that is not in ``known``, the fields of peft.LoraConfig."""
    _check_keys("model.lora", recipe.model.lora or {}, list(known), "peft.LoraConfig")


def _check_keys(section: str, given: Iterable[str], known: Sequence[str], owner: str) -> None:
    for key in given:
        if key not in known:
            hint = _nearest(key, known, section)
            raise RecipeError(f"{section}.{key}: unknown key, not a field of {owner}{hint}")


# --- reading YAML ---------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice (YAML would let the last one win in silence)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key_node.value} is given twice", problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what _Loader would read as a number."""


# YAML 1.1 reads `1e-6` as a string for want of a dot and of the exponent's sign; everyone means the number.
_SCIENTIFIC = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+.0123456789"))
# A date has no place in a recipe: `run_name: 2026-01-31` is a name.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number YAML recognises and Python cannot make
        raise RecipeError(f"{where}: not valid YAML: {error}") from None


def _read_mapping(text: str, where: str) -> dict[str, Any]:
    raw = _read_yaml(text, where)
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{where}: expected a mapping with the keys {', '.join(Recipe.model_fields)}, got {raw!r:.80}"
        )
    # `training:` with all its lines commented out is an empty section
    return {key: value for key, value in raw.items() if value is not None}


def _override(raw: dict[str, Any], override: str) -> str:
    """Set one ``a.b=value`` in ``raw``; returns ``a.b``."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override {override!r}: expected key=value, e.g. loss.beta=0.2")
    value = _read_yaml(text, f"override {override!r}")
    if keys[:2] == ["loss", "weights"] and len(keys) > 2:
        # One weight of an objective the file leaves at its default: the other terms stay on.
        loss = raw.setdefault("loss", {})
        if isinstance(loss, dict):
            loss.setdefault("weights", dict(MPO_WEIGHTS))
    section: Any = raw
    for depth, key in enumerate(keys[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise RecipeError(f"override {override!r}: {'.'.join(keys[:depth])} holds {section!r}, not keys of its own")
    section[keys[-1]] = value
    return ".".join(keys)


def _anchor_paths(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``raw`` with the relative paths that exist below ``folder`` made absolute. Wrong types are left to validation."""

    def anchored(value: Any) -> Any:
        if not isinstance(value, str) or not value:
            return value
        beside = folder / os.path.expanduser(value)
        return os.path.abspath(beside) if beside.exists() or _matches(beside) else os.path.expanduser(value)

    def source(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: anchored(v) if k in ("path", "image_root") else v for k, v in value.items()}
        return anchored(value)

    model, data, build = raw.get("model"), raw.get("data"), raw.get("build")
    if isinstance(model, dict) and "path" in model:
        raw["model"] = {**model, "path": anchored(model["path"])}
    if isinstance(build, dict):
        raw["build"] = {k: anchored(v) if k in ("questions", "image_root") else v for k, v in build.items()}
    if isinstance(evaluate := raw.get("evaluate"), dict):
        paths = ("model", "reference", "against", "questions", "image_root")
        raw["evaluate"] = {k: anchored(v) if k in paths else v for k, v in evaluate.items()}
    if isinstance(data, dict):
        lists = {k: [source(v) for v in data[k]] for k in ("train", "eval") if isinstance(data.get(k), list)}
        raw["data"] = {**data, **lists}
    return raw


def _matches(pattern: Path) -> bool:
    """Whether it is a glob that a file matches."""
    return glob.has_magic(str(pattern)) and any(True for _ in glob.iglob(str(pattern), recursive=True))


# --- messages -------------------------------------------------------------------------------------------------------

_SECTIONS: dict[str, type[BaseModel]] = {
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
_EXPECTED = {
    "model_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "tuple_type": "a list",
    "string_too_short": "a name or path",
}


def _validate(raw: dict[str, Any], where: str, overridden: Sequence[str]) -> Recipe:
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    lines = []
    for problem in problems:
        dotted = ".".join(str(part) for part in problem["loc"])
        by_hand = any(dotted == key or dotted.startswith(f"{key}.") for key in overridden)
        lines.append(f"{'command line' if by_hand else where}: {_explain(dotted, problem)}")
    raise RecipeError("\n".join(lines))


def _explain(dotted: str, problem: Any) -> str:
    """One line for one pydantic error at the key ``dotted``."""
    kind = problem["type"]
    if kind == "extra_forbidden":
        parts = [part for part in problem["loc"] if isinstance(part, str)]
        section = ".".join(parts[:-1])
        known = list(_SECTIONS[section].model_fields)
        return f"{dotted}: unknown key{_nearest(parts[-1], known, section)}"
    if kind == "missing":
        return f"{dotted}: missing; the recipe must give it"
    if kind == "value_error":  # our own validators speak for themselves
        return f"{dotted}: {problem['ctx']['error']}" if dotted else str(problem["ctx"]["error"])
    expected = _EXPECTED.get(kind, problem["msg"].removeprefix("Input should be "))
    return f"{dotted}: expected {expected}, got {problem['input']!r:.80}"


def _nearest(name: str, known: Sequence[str], section: str = "") -> str:
    """ "; did you mean ...?" for the nearest known name, its section before it; else the names there are."""
    prefix = f"{section}." if section else ""
    elsewhere = {key: f"{place}." for place in reversed(_SECTIONS) if place for key in _SECTIONS[place].model_fields}
    if name in elsewhere:  # the right key in the wrong section
        return f"; did you mean {elsewhere[name]}{name}?"
    if match := get_close_matches(name, known, n=1, cutoff=0.6):
        return f"; did you mean {prefix}{match[0]}?"
    if match := get_close_matches(name, list(elsewhere), n=1, cutoff=0.8):
        return f"; did you mean {elsewhere[match[0]]}{match[0]}?"
    if len(known) > 20:
        closest = get_close_matches(name, known, n=1, cutoff=0.0)
        return f"; the nearest known key is {prefix}{closest[0]}"
    return f"; known here: {', '.join(known)}"
