"""Questions to responses: ``vlmpo sample``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vlmpo.data.readers.questions import read_questions
from vlmpo.data.records import Message, Question, Response
from vlmpo.errors import DataError, RecipeError, RecordError, RunError
from vlmpo.fileio import replace_json
from vlmpo.generate.keys import prompt_hash, seed_for
from vlmpo.generate.local import Engine, Generated, GenerationRequest, LocalEngine, Sampling
from vlmpo.generate.prompts import prompt_text
from vlmpo.generate.responses import PROMPT_HASH, RESPONSES_FILE, ResponseFile
from vlmpo.generate.server import ServerEngine
from vlmpo.log import Progress
from vlmpo.models.loading import load_model, load_processor
from vlmpo.recipe import BuildSection, Recipe

MANIFEST_FILE = "sample_manifest.json"
_EXAMPLES = 3  # records named under each reason
_HOPELESS = 20  # requests that fail before the first answer: it is not the records, then
_SUSPICIOUS = 8  # questions, each with nothing but identical answers, after which the user is told


@dataclasses.dataclass
class SampleReport:
    """What a run of ``vlmpo sample`` did.

    Attributes:
        questions: that can be asked, of ``read`` records.
        dropped: errors of the records that cannot be used or asked.
        before: responses that were there already; ``written`` were added.
        repaired: bytes of a line, cut off by a kill, that were taken off.
        finish_reasons: of the written responses.
        asked: questions that got two or more responses now; ``identical``: of these, those that got the same one only.
        seconds: spent on generating.
    """

    read: int = 0
    questions: int = 0
    dropped: list[RecordError] = dataclasses.field(default_factory=list)
    before: int = 0
    written: int = 0
    repaired: int = 0
    finish_reasons: Counter[str] = dataclasses.field(default_factory=Counter)
    asked: int = 0
    identical: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; dropped records by reason, with examples."""
        reasons: dict[str, list[str]] = {}
        for error in self.dropped:
            reasons.setdefault(error.reason, []).append(str(error))
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "dropped"},
            "finish_reasons": dict(self.finish_reasons),
            "dropped": {reason: len(all_) for reason, all_ in reasons.items()},
            "examples": {reason: all_[:_EXAMPLES] for reason, all_ in reasons.items()},
        }


def sample(recipe: Recipe) -> SampleReport:
    """Sample responses as the recipe's ``build`` section says, into ``responses.jsonl`` in ``build.output_dir``.

    The file is only appended to. Started again, it goes on with the responses that are missing: after a kill, with
    more ``samples``, or with more questions. With the local engine a run that was killed ends with the same responses
    as one that was not.

    Raises:
        RecipeError: no ``build`` section.
        DataError: questions that cannot be read, or none that can be asked.
        RunError: the folder holds responses sampled otherwise, or the server does not answer.
    """
    build = build_section(recipe)
    found = read_questions(build.questions, build.image_root, split=build.split, need_answer=False)
    report = SampleReport(read=len(found.questions) + len(found.dropped), dropped=list(found.dropped))
    folder = Path(str(build.output_dir))
    engine = None if build.engine == "local" else open_engine(recipe)
    name = recipe.model.path if engine is None else engine.name
    settings = sampling_settings(recipe)
    manifest = {"model": name, "weights": _weights_hash(recipe), "settings": settings, "build": build.model_dump()}
    with ResponseFile(folder / RESPONSES_FILE, name, settings) as responses:
        _check_weights(folder / MANIFEST_FILE, manifest, responses)
        _check_prompts(responses, found.questions, build.prompt)
        report.before = sum(len(indices) for indices in responses.done.values())
        report.repaired = responses.repaired
        replace_json(folder / MANIFEST_FILE, {**manifest, "status": "running", **report.to_json()})
        if not _is_done(responses, found.questions, build.samples):
            _sample_missing(recipe, engine or open_engine(recipe), found.questions, responses, report)
        report.questions = report.read - len(report.dropped)
    replace_json(folder / MANIFEST_FILE, {**manifest, "status": "finished", **report.to_json()})
    _show(Console(), report, build, responses)
    if not responses.done:
        first = f"; the first: {report.dropped[0]}" if report.dropped else ""
        raise DataError(f"{build.questions}: of {report.read} questions none could be asked{first}")
    return report


def build_section(recipe: Recipe) -> BuildSection:
    """The recipe's ``build`` section, which holds a folder. Raises RecipeError where it does not."""
    if recipe.build is None:
        raise RecipeError("build: missing; give at least build.questions, the JSONL file of questions")
    if recipe.build.output_dir is None:
        raise RecipeError("build.output_dir: missing; name the folder for the responses")
    return recipe.build


def open_engine(recipe: Recipe, sampling: Sampling | None = None) -> Engine:
    """The engine of the recipe's ``build`` section. ``sampling``: in place of the section's own.

    The local model runs on the accelerator, where there is one, with weights of ``model.dtype``.

    Raises:
        ModelError: the local model cannot be loaded.
        RunError: the server cannot be reached.
    """
    build = build_section(recipe)
    sampling = sampling or Sampling(build.temperature, build.top_p, build.max_new_tokens)
    if build.engine != "local":
        return ServerEngine(build.engine, build.model, sampling, build.concurrency, build.timeout, build.retries)
    path = recipe.model.path
    processor = load_processor(path)
    model = load_model(path, recipe.model.dtype)
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        model.to(device)
    return LocalEngine(model, processor, sampling, build.batch_size, max_tiles=recipe.data.max_tiles, name=path)


def sampling_settings(recipe: Recipe) -> dict[str, Any]:
    """What a response depends on, beside model and question; stored with every response."""
    build = build_section(recipe)
    settings: dict[str, Any] = {
        "prompt": build.prompt,
        "temperature": build.temperature,
        "top_p": build.top_p,
        "max_new_tokens": build.max_new_tokens,
        "seed": build.seed,
    }
    if build.engine == "local":
        settings |= {"max_tiles": recipe.data.max_tiles, "dtype": recipe.model.dtype}
    return settings


def generation_request(question: Question, build: BuildSection) -> GenerationRequest:
    """``question`` as it is put to the model; its seed depends on the recipe's and on the question's id alone."""
    return GenerationRequest(
        messages=(Message("user", prompt_text(question, build.prompt)),),
        images=question.images,
        n=build.samples,
        seed=seed_for(build.seed, question.id),
        origin=question.origin,
    )


# ---- the run ----


def _is_done(responses: ResponseFile, questions: Sequence[Question], samples: int) -> bool:
    wanted = set(range(samples))
    return all(wanted <= responses.done.get(question.id, set()) for question in questions)


def _sample_missing(
    recipe: Recipe, engine: Engine, questions: Sequence[Question], responses: ResponseFile, report: SampleReport
) -> None:
    """Ask what has no answer yet, batch by batch as they lie in the file.

    A batch of which anything is missing is asked whole: in another company a response could differ in a rounding.
    """
    build = build_section(recipe)
    size = engine.batch_size
    batches = [questions[start : start + size] for start in range(0, len(questions), size)]
    asked = [question for batch in batches if not _is_done(responses, batch, build.samples) for question in batch]
    settings = sampling_settings(recipe)

    def on_bad(request: GenerationRequest, error: RecordError) -> None:
        report.dropped.append(error)
        if not report.written and len(report.dropped) >= _HOPELESS and not report.before:
            raise DataError(f"{_HOPELESS} requests failed and none succeeded; the last: {error}")

    started = time.perf_counter()
    with Progress("sampling", len(asked) * build.samples, "responses") as progress:
        answers = engine.generate([generation_request(question, build) for question in asked], on_bad)
        for question, texts in zip(asked, answers, strict=True):
            before = len(responses.done.get(question.id, ()))
            own = {**settings, PROMPT_HASH: _prompt_hash(question, build.prompt)}
            responses.append(
                [
                    Response(question.id, index, generated.text, generated.finish_reason, engine.name, own)
                    for index, generated in enumerate(texts)
                ]
            )
            report.written += len(responses.done.get(question.id, ())) - before
            report.finish_reasons.update(generated.finish_reason for generated in texts)
            _look_for_identical(texts, build, report, progress)
            progress.advance(build.samples)
    report.seconds = time.perf_counter() - started
    for remark in engine.notices:
        progress.notice(f"note: {remark}")


def _look_for_identical(
    texts: Sequence[Generated], build: BuildSection, report: SampleReport, progress: Progress
) -> None:
    if len(texts) < 2:
        return
    report.asked += 1
    report.identical += len({generated.text for generated in texts}) == 1
    if report.asked == report.identical == _SUSPICIOUS and build.temperature > 0:
        progress.notice(f"warning: {_identical_text(report, build)}")


def _identical_text(report: SampleReport, build: BuildSection) -> str:
    cause = "is the model that sure of itself?"
    if build.engine != "local":
        cause = "does the server ignore it (transformers serve needs do_sample in the model's generation_config)?"
    return (
        f"{report.identical} of {report.asked} questions got {build.samples} identical answers though "
        f"build.temperature is {build.temperature:g}: {cause} Identical answers make no pairs"
    )


# ---- what a response depends on ----


def _prompt_hash(question: Question, style: str) -> str:
    return prompt_hash(prompt_text(question, style))


def _check_prompts(responses: ResponseFile, questions: Sequence[Question], style: str) -> None:
    for question in questions:
        stored = responses.prompt_hashes.get(question.id)
        if stored is not None and stored != _prompt_hash(question, style):
            raise RunError(
                f"{question.origin}: question {question.id!r} read otherwise when its responses in {responses.path} "
                "were sampled; give the new one another id, or name another folder in build.output_dir"
            )


def _weights_hash(recipe: Recipe) -> str | None:
    """Of the weight files of a local model; None for a server's or one from the hub."""
    folder = Path(recipe.model.path)
    if build_section(recipe).engine != "local" or not folder.is_dir():
        return None
    whole = hashlib.blake2b(digest_size=16)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with file.open("rb") as content:
            whole.update(hashlib.file_digest(content, "blake2b").digest())
    return whole.hexdigest()


def _check_weights(file: Path, manifest: dict[str, Any], responses: ResponseFile) -> None:
    """Two checkpoints may have lain under one path, one after the other."""
    if not responses.done or not file.exists():
        return
    if json.loads(file.read_text(encoding="utf-8")).get("weights") != manifest["weights"]:
        raise RunError(
            f"{responses.path} holds responses of other weights than {manifest['model']} has now; "
            "name another folder in build.output_dir"
        )


# ---- what the user is told ----


def _show(console: Console, report: SampleReport, build: BuildSection, responses: ResponseFile) -> None:
    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    line(f"questions: {report.read} read, {report.questions} used, {len(report.dropped)} dropped")
    shown: Counter[str] = Counter()
    for error in report.dropped:
        shown[error.reason] += 1
        if shown[error.reason] <= _EXAMPLES:
            line(f"  {error}")
    for reason, count in shown.items():
        line(f"  dropped as {reason}: {count}")
    if report.repaired:
        line(f"the file's last line had been cut off and was taken out ({report.repaired} bytes)")
    total = report.before + report.written
    rate = f", {report.written / report.seconds:.1f} a second" if report.written and report.seconds else ""
    line(f"responses: {report.before} were there, {report.written} written{rate}; {total} in {responses.path}")
    if cut := report.finish_reasons["length"]:
        line(f"cut off at {build.max_new_tokens} tokens: {cut} (build.max_new_tokens)")
    if report.identical and build.temperature > 0:
        line(f"warning: {_identical_text(report, build)}")
