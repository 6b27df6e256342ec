"""``vlmpo sample``: from questions to responses."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from vlmpo.commands.guard import output_folder
from vlmpo.data.encode.processors import own_tiles
from vlmpo.data.readers.questions import read_questions
from vlmpo.errors import DataError, RecipeError, RunError, examples_by_reason, first_records, shorten
from vlmpo.fileio import replace_json
from vlmpo.generate.base import Engine, Sampling
from vlmpo.generate.local import LocalEngine
from vlmpo.generate.responses import RESPONSES_FILE, ResponseFile, open_responses
from vlmpo.generate.sample import SampleReport, check_prompts, identical_warning, is_complete, sample_missing
from vlmpo.generate.server import ServerEngine
from vlmpo.log import print_line
from vlmpo.models.loading import load_model, load_processor
from vlmpo.recipe import BuildSection, Recipe

MANIFEST_FILE = "sample_manifest.json"


def sample(recipe: Recipe) -> SampleReport:
    """Sample responses as the recipe's ``build`` section says, into ``responses.jsonl`` in ``build.output_dir``.

    The file is only appended to. A second run adds the responses that are missing: after a kill, with more
    ``samples``, or with more questions. With the local engine a run that was killed ends with the same responses as
    one that was not.

    Raises:
        RecipeError: there is no ``build`` section.
        DataError: the questions cannot be read, or none can be asked.
        RunError: the folder contains responses sampled otherwise, or the server does not answer.
    """
    build = build_section(recipe)
    folder = Path(str(build.output_dir))
    with output_folder(recipe, folder, "sample", "build.output_dir", (RESPONSES_FILE, MANIFEST_FILE)):
        return _sample(recipe, build, folder)


def _sample(recipe: Recipe, build: BuildSection, folder: Path) -> SampleReport:
    """Do what :func:`sample` does, in a folder that this process holds."""
    questions = read_questions(
        build.questions, build.image_root, split=build.split, need_answer=False, confine=recipe.data.confine
    )
    if questions.unread:
        print_line(f"note: {questions.unread_notice()}")
    report = SampleReport(read=len(questions.questions) + len(questions.dropped), dropped=list(questions.dropped))
    engine = None if build.engine == "local" else open_engine(recipe)
    name = recipe.model.path if engine is None else engine.name
    settings = sampling_settings(recipe)
    manifest = {"model": name, "weights": _weights_hash(recipe), "settings": settings, "build": build.model_dump()}
    with open_responses(folder / RESPONSES_FILE, name, settings) as file:
        _check_weights(folder / MANIFEST_FILE, manifest, file)
        check_prompts(file, questions.questions, build.prompt)
        report.before = sum(len(indices) for indices in file.done.values())
        report.repaired = file.repaired
        replace_json(folder / MANIFEST_FILE, {**manifest, "status": "running", **report.to_json()})
        if not is_complete(file, questions.questions, build.samples):
            sample_missing(
                engine or open_engine(recipe),
                questions.questions,
                file,
                report,
                style=build.prompt,
                samples=build.samples,
                seed=build.seed,
                identical_cause=_identical_cause(build),
            )
        report.questions = report.read - len(report.dropped)
    replace_json(folder / MANIFEST_FILE, {**manifest, "status": "finished", **report.to_json()})
    _show(report, build, file.path)
    if not file.done:
        first = f"; the first: {first_records(examples_by_reason(report.dropped))}" if report.dropped else ""
        raise DataError(f"{build.questions}: of {report.read} questions none could be asked{first}")
    return report


def build_section(recipe: Recipe) -> BuildSection:
    """Return the recipe's ``build`` section, whose ``output_dir`` is set. Raise RecipeError if there is none."""
    if recipe.build is None:
        raise RecipeError("build: missing; give at least build.questions, the JSONL file of questions")
    if recipe.build.output_dir is None:
        raise RecipeError("build.output_dir: missing; name the folder for the responses")
    return recipe.build


def open_engine(recipe: Recipe) -> Engine:
    """Open the engine of the recipe's ``build`` section.

    A local model runs on the accelerator, if there is one, with weights of ``model.dtype``.

    Raises:
        ModelError: the local model cannot be loaded.
        RunError: the server cannot be reached.
    """
    build = build_section(recipe)
    sampling = Sampling(build.temperature, build.top_p, build.max_new_tokens)
    if build.engine != "local":
        return ServerEngine(
            build.engine,
            build.model,
            sampling,
            build.concurrency,
            build.timeout,
            build.retries,
            video_frames=recipe.data.video_frames,
        )
    path = recipe.model.path
    processor = load_processor(path, trust_remote_code=recipe.model.trust_remote_code)
    model = load_model(path, recipe.model.dtype, trust_remote_code=recipe.model.trust_remote_code)
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        model.to(device)
    settings = recipe.data.model_dump(include={"max_tiles", "video_frames"})
    engine = LocalEngine(model, processor, sampling, build.batch_size, name=path, **settings)
    engine.check_vision()
    return engine


def sampling_settings(recipe: Recipe) -> dict[str, Any]:
    """Return what a response depends on beside model and question; stored with every response."""
    build = build_section(recipe)
    settings = build.model_dump(include={"prompt", "temperature", "top_p", "max_new_tokens", "seed"})
    if build.engine == "local":
        tiles = recipe.data.max_tiles
        # The number, whoever set it: responses sampled before with the same one go on.
        tiles = own_tiles(load_processor(recipe.model.path)) if tiles is None else tiles
        settings |= {"max_tiles": tiles, "dtype": recipe.model.dtype}
    return settings


def _identical_cause(build: BuildSection) -> str | None:
    """Return why all responses to a question may be identical; None at temperature 0, where they always are."""
    if build.temperature == 0:
        return None
    cause = "is the model that sure of itself?"
    if build.engine != "local":
        cause = "does the server ignore it (transformers serve needs do_sample in the model's generation_config)?"
    return f"though build.temperature is {build.temperature:g}: {cause}"


def _weights_hash(recipe: Recipe) -> str | None:
    """Hash the weight files of a local model; None for a server's or one from the hub."""
    folder = Path(recipe.model.path)
    if build_section(recipe).engine != "local" or not folder.is_dir():
        return None
    whole = hashlib.blake2b(digest_size=16)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with file.open("rb") as content:
            whole.update(hashlib.file_digest(content, "blake2b").digest())
    return whole.hexdigest()


def _check_weights(manifest_file: Path, manifest: dict[str, Any], file: ResponseFile) -> None:
    """Raise RunError if the responses were sampled from other weights under the same path."""
    if not file.done or not manifest_file.exists():
        return
    try:
        weights = dict(json.loads(manifest_file.read_text(encoding="utf-8"))).get("weights")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunError(
            f"{manifest_file} cannot be read ({shorten(error)}), so the weights that the responses beside it were "
            "sampled from are not known; name another folder in build.output_dir, or remove it if they are the same"
        ) from error
    if weights != manifest["weights"]:
        raise RunError(
            f"the responses in {file.path} were sampled from other weights than {manifest['model']} has now; "
            "name another folder in build.output_dir"
        )


def _show(report: SampleReport, build: BuildSection, path: Path) -> None:
    print_line(f"questions: {report.read} read, {report.questions} used, {len(report.dropped)} dropped")
    for messages in examples_by_reason(report.dropped).values():
        for message in messages:
            print_line(f"  {message}")
    for reason, count in Counter(error.reason for error in report.dropped).items():
        print_line(f"  dropped as {reason}: {count}")
    if report.repaired:
        print_line(f"the file's last line was cut off and has been removed ({report.repaired} bytes)")
    total = report.before + report.written
    rate = f", {report.written / report.seconds:.1f} a second" if report.written and report.seconds else ""
    print_line(f"responses: {report.before} were there, {report.written} written{rate}; {total} in {path}")
    if cut := report.finish_reasons["length"]:
        print_line(f"cut off at {build.max_new_tokens} tokens: {cut} (build.max_new_tokens)")
    cause = _identical_cause(build)
    if report.identical and cause is not None:
        print_line(f"warning: {identical_warning(report, build.samples, cause)}")
