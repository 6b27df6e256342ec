"""``vlmpo inspect``: the pair as the model reads it, the counts, the lengths, the steps."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.paths import SHARED
from vlmpo.commands import inspect as command
from vlmpo.commands import inspect_memory
from vlmpo.commands.inspect import (
    Encoded,
    PairSize,
    collapse_images,
    describe_steps,
    encode_pairs,
    inspect,
    is_shared,
    quantiles,
    row_line,
)
from vlmpo.commands.run_data import RunData, open_run_data
from vlmpo.errors import RecipeError, RecordError
from vlmpo.models.loading import load_processor
from vlmpo.recipe_yaml import load_recipe, parse_recipe
from vlmpo.testing.tiny import TinySize, build_model, build_processor, train_tokenizer

# 56 px tiles of 14 px patches: 4 x 4 patches, 2 x 2 after the pixel shuffle: 4 tokens a tile.
SIZE = TinySize(image_size=56)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Which colour is it?", "It is red.", "It is blue.", "one two three four"], 400)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return build_processor(tokenizer, SIZE)


@pytest.fixture
def recipe_file(tmp_path, processor) -> Path:
    """A run folder's worth: a processor, two images, five records of which three can be used."""
    processor.save_pretrained(tmp_path / "model")
    Image.new("RGB", (56, 56), "red").save(tmp_path / "one_tile.png")
    Image.new("RGB", (112, 112), "blue").save(tmp_path / "five_tiles.png")  # 2 x 2 and the thumbnail
    records = [
        {"image": "one_tile.png", "question": "Which colour is it?", "chosen": "It is red.", "rejected": "It is blue."},
        {"image": "five_tiles.png", "question": "<image>\nWhich?", "chosen": "It is blue.", "rejected": "red"},
        {"question": "one two", "chosen": "three", "rejected": "four"},
        {"question": "one two", "chosen": "same", "rejected": "same"},
        {"image": "gone.png", "question": "Which?", "chosen": "red", "rejected": "blue"},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "pairs.jsonl").write_text(lines, encoding="utf-8")
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {path: model}\ndata: {train: [pairs.jsonl]}\n"
        "training: {per_device_train_batch_size: 2, gradient_accumulation_steps: 1}\n",
        encoding="utf-8",
    )
    return path


def printed(recipe, pairs: int, card: float | None = None) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        inspect(recipe, pairs, card)
    return out.getvalue()


def encoded(recipe) -> tuple[Encoded, RunData]:
    data = open_run_data(recipe)
    return encode_pairs(recipe, data, load_processor(recipe.model.path), num_samples=0), data


def test_a_pair_is_shown_as_the_model_reads_it(recipe_file, tokenizer):
    text = printed(load_recipe(recipe_file), pairs=3)
    first, second, third = text.split("training pairs")[0].split("pair ")[1:]
    assert "| <img>[4 image tokens]</img>\n" in first
    assert "  | ‹It is red.<|im_end|>›\n" in first
    assert "  | ‹It is blue.<|im_end|>›\n" in first
    assert "| <img>[4 image tokens x 5 tiles = 20]</img>\n" in second
    assert "20 of them from images in 5 tiles" in second
    assert "image tokens" not in third
    assert third.splitlines()[4:] == [
        "  | <|im_start|>user",
        "  | one two<|im_end|>",
        "  | <|im_start|>assistant",
        "  | ",
        f"chosen, {len(tokenizer('three')['input_ids']) + 1} tokens scored:",
        "  | ‹three<|im_end|>›",
        f"rejected, {len(tokenizer('four')['input_ids']) + 1} tokens scored:",
        "  | ‹four<|im_end|>›",
        "",
    ]


def test_every_record_is_accounted_for(recipe_file):
    text = printed(load_recipe(recipe_file), pairs=0)
    header, row = (line.split() for line in text.split("training pairs")[1].splitlines()[1:3])
    assert header == ["data", "set", "read", "kept", "held", "out", "identical", "missing_image"]
    assert row == ["pairs", "5", "3", "0", "1", "1"]
    assert f"identical: {recipe_file.parent / 'pairs.jsonl'}:4" in text
    assert "gone.png" in text


def test_over_long_pairs_are_counted_too(recipe_file):
    recipe = load_recipe(recipe_file)
    five_tiles = encoded(recipe)[0].sizes[1]
    shorter, _ = encoded(load_recipe(recipe_file, [f"data.max_length={five_tiles.longer - 1}"]))
    assert len(shorter.sizes) == 2
    assert shorter.dropped.reasons() == {"over_long": 1}
    assert [size.tiles for size in shorter.sizes] == [1, 0]


def test_sizes_are_the_tokens_of_each_part(recipe_file, tokenizer):
    sizes = encoded(load_recipe(recipe_file))[0].sizes

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert sizes[2] == PairSize(count(turn.format("one two")), count("three") + 1, count("four") + 1, 0, 0)
    prompt = count(turn.format("<img></img>\nWhich colour is it?")) + 4
    assert sizes[0] == PairSize(prompt, count("It is red.") + 1, count("It is blue.") + 1, 4, 1)
    assert (sizes[1].image_tokens, sizes[1].tiles) == (20, 5)


def test_a_bad_record_stops_it_under_fail(recipe_file):
    with pytest.raises(RecordError) as caught:
        inspect(load_recipe(recipe_file, ["data.on_bad_record=fail"]))
    assert caught.value.reason == "identical"
    assert caught.value.origin.endswith("pairs.jsonl:4")


def test_sft_needs_no_rejected_response(recipe_file):
    pairs, data = encoded(load_recipe(recipe_file, ["loss.weights={nll: 1}"]))
    assert [size.rejected for size in pairs.sizes] == [0, 0, 0, 0]  # "same" against "same" is a fine SFT example
    assert data.screened.reasons() == {"missing_image": 1}


def test_many_pairs_are_sampled_and_it_is_said(recipe_file, monkeypatch):
    monkeypatch.setattr(command, "MAX_ENCODED", 2)
    text = printed(load_recipe(recipe_file), pairs=0)
    assert "a seeded sample, 2 of 3 pairs" in text
    assert "tokens and tiles of 2 pairs" in text


def test_unknown_training_keys_are_refused(recipe_file):
    with pytest.raises(RecipeError, match=r"did you mean training\.learning_rate\?"):
        inspect(load_recipe(recipe_file, ["training.lerning_rate=1e-6"]))


# --- the parts ---


def test_runs_of_image_tokens_collapse(processor, tokenizer):
    image = processor.image_token_id
    one, two = tokenizer("one")["input_ids"], tokenizer(" two")["input_ids"]
    assert collapse_images([*one, *[image] * 8, *two], processor) == "one[4 image tokens x 2 tiles = 8] two"
    assert collapse_images([*[image] * 4, *one], processor) == "[4 image tokens]one"
    assert collapse_images([*[image] * 6], processor) == "[6 image tokens]"  # no whole number of tiles
    assert collapse_images(one, processor) == "one"
    assert collapse_images([], processor) == ""


def test_quantiles_are_values_that_occur():
    assert quantiles(list(range(1, 21))) == [1, 5, 10, 15, 19, 20]
    assert quantiles([7]) == [7] * 6
    assert quantiles([3, 1, 2]) == [1, 1, 2, 3, 3, 3]


def test_lengths_and_tiles_are_listed(recipe_file):
    lines = printed(load_recipe(recipe_file), pairs=0).split("tokens and tiles of 3 pairs\n")[1].splitlines()
    assert lines[0].split() == ["min", "p25", "median", "p75", "p95", "max"]
    assert lines[4].split() == ["image", "tokens", "0", "0", "4", "20", "20", "20"]
    assert lines[7].split() == ["tiles", "0", "0", "1", "5", "5", "5"]


MINIMAL = "model: {path: m}\ndata: {train: [a]}\n"


def test_steps_and_rows(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ten = [PairSize(prompt=6, chosen=3, rejected=1, image_tokens=0, tiles=0)] * 10  # 10 tokens when shared

    def lines(bound: int | str, sizes: list[PairSize], shared: bool | None) -> list[str]:
        batch = f"per_device_train_batch_size: 2, gradient_accumulation_steps: 2, max_tokens_per_row: {bound}"
        return describe_steps(parse_recipe(f"{MINIMAL}training: {{{batch}}}"), 10, sizes, shared)

    def rows(bound: int | str, sizes: list[PairSize], shared: bool | None) -> str:
        return lines(bound, sizes, shared)[1].removeprefix("rows per optimizer step: ")

    # 2 x 2 x 2 = 8 pairs a step, so 10 pairs are 2 steps; 4 micro-batches a step over all devices
    assert lines(20, ten, True)[0] == "\npairs per optimizer step: 8 (2 a device x 2 accumulated x 2 device(s))"
    assert lines(20, ten, True)[2] == "optimizer steps per epoch: 2"
    assert rows(20, ten, True) == "about 4.0 (prompts shared)"
    assert rows(19, ten, True) == "about 8.0 (prompts shared)"  # two pairs do not fit into one row
    assert rows("null", ten, True) == "about 4.0 (prompts shared)"
    assert rows(20, ten, False) == "about 16.0 (one response a row)"
    assert rows(20, ten, None) == "not known, the model's config cannot be read"
    assert rows(20, [PairSize(6, 3, 0, 0, 0)] * 10, False) == "about 8.0 (one response a row)"


def test_a_batch_size_of_0_is_refused_before_anything_is_read():
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        with pytest.raises(RecipeError, match=rf"training\.{name}: expected a whole number above 0, got 0"):
            inspect(parse_recipe(MINIMAL + f"training: {{{name}: 0}}"))


def test_rows_are_estimated_if_the_model_is_there(recipe_file, tokenizer):
    recipe = load_recipe(recipe_file)
    assert is_shared(recipe) is None
    assert "rows per optimizer step: not known" in printed(recipe, pairs=0)
    build_model(tokenizer, SIZE).config.save_pretrained(recipe.model.path)
    assert is_shared(recipe) is True
    text = printed(recipe, pairs=0)
    assert "pairs per optimizer step: 2 (2 a device x 1 accumulated x 1 device(s))" in text
    # 3 pairs as 2 + 1: two rows for three pairs, 4/3 of a row for the two of a step
    assert "rows per optimizer step: about 1.3 (prompts shared)" in text
    assert "optimizer steps per epoch: 2" in text
    assert "tokens read at once: at most 2048 (training.max_tokens_per_row); the longest pair here has " in text
    assert is_shared(load_recipe(recipe_file, ["model.attention=separate"])) is False


@pytest.mark.parametrize(
    ("overrides", "precision", "bytes_a_weight"),
    [
        ([], "bf16", 4 + 2 + 2 + 4 + 8),  # masters, what is read, the reference as it is read, gradients, AdamW
        (["training.precision=float32"], "float32", 4 + 4 + 4 + 8),
        (["training.bf16=false", "reference.kind=cache"], "float32", 4 + 4 + 8),
        (["training.precision=autocast"], "autocast", 4 + 4 + 4 + 8),
        (["training.bf16=true", "training.optim=sgd"], "bf16", 4 + 2 + 2 + 4),
        (["model.dtype=bfloat16"], "float32", 2 + 2 + 2 + 4),  # read as they are
    ],
)
def test_memory_beside_rows_is_that_of_the_runs_precision(recipe_file, overrides, precision, bytes_a_weight):
    recipe = load_recipe(recipe_file, overrides)
    model = torch.nn.Linear(10, 10, bias=False, device="meta")
    assert inspect_memory._precision(recipe, 80.0) == precision
    assert inspect_memory._resident(recipe, model, precision)[0] == 100 * bytes_a_weight


def test_memory_is_estimated_for_a_card_that_is_not_there(recipe_file, tokenizer):
    recipe = load_recipe(recipe_file)
    assert "memory:" not in printed(recipe, pairs=0)  # there is no config to estimate from
    build_model(tokenizer, SIZE).config.save_pretrained(recipe.model.path)
    here = printed(recipe, pairs=0)
    assert " GiB that are free here for weights, gradients, optimizer states and the reference" in here
    assert "tokens read at once: at most 2048 " in here

    def on_card(*overrides: str) -> str:
        return printed(load_recipe(recipe_file, list(overrides)), pairs=0, card=80.0)

    text = " ".join(on_card().split())
    assert " MiB of the 78 GiB of the card for weights, gradients, optimizer states and the ref" in text
    assert "memory, estimated: rows of up to " in text
    assert "tokens read at once: at most 2048 " not in text
    assert "and the reference" not in " ".join(on_card("reference.kind=cache").split())
    assert "computed again, a few tiles at a time" in " ".join(on_card("model.vision_memory=recompute").split())
    fixed = on_card("training.max_tokens_per_row=100", "training.gradient_checkpointing=true", "training.bf16=true")
    assert "memory, estimated: the largest pair here takes about " in " ".join(fixed.split())
    adapted = on_card("model.lora={r: 4}", "model.freeze=[vision_tower]")
    assert "memory, estimated: rows of up to " in " ".join(adapted.split())


def test_a_pair_that_does_not_fit_is_said(recipe_file, tokenizer, monkeypatch):
    recipe = load_recipe(recipe_file)
    build_model(tokenizer, SIZE).config.save_pretrained(recipe.model.path)
    monkeypatch.setattr(inspect_memory, "_CONTEXT", 80 * 2**30 - 300_000)  # 300 kB are left of the card
    text = " ".join(printed(recipe, pairs=0, card=80.0).split())
    assert "memory: the largest pair here (" in text
    assert " does not fit: it takes about " in text


def test_what_decides_the_memory():
    start = "tokens read at once: at most 100 (training.max_tokens_per_row); the longest pair here has "
    assert row_line(100, 40) == f"{start}40; a bound of 40 would use the least memory and change no number"
    assert row_line(100, 100) == f"{start}100"
    assert row_line(100, 140) == f"{start}140 and gets a row of its own"
    assert row_line(None, 40) == "tokens read at once: a whole micro-batch; the longest pair here has 40"


def test_real_pairs_have_the_published_tile_counts(tmp_path):
    """At 448 px and 256 tokens a tile the image tokens are 256 for each tile, for every real pair looked at."""
    meta = SHARED / "data" / "visonlyqa" / "meta.json"
    if not meta.exists():
        pytest.skip("the shared data set visonlyqa is not beside this checkout")
    size = TinySize(image_size=448)
    build_processor(train_tokenizer(["some text to begin with"], 300), size).save_pretrained(tmp_path / "model")
    recipe = parse_recipe(f"model: {{path: {tmp_path / 'model'}}}\ndata: {{train: [{meta}], max_tiles: 6}}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "MAX_ENCODED", 12)
        pairs, data = encoded(recipe)
    assert len(pairs.sizes) + pairs.dropped.num_dropped == 12
    assert all(size.image_tokens == 256 * size.tiles for size in pairs.sizes)
    assert all(1 <= size.tiles <= 7 for size in pairs.sizes)
    assert data.read == {"visonlyqa_reasoning": 1047, "visonlyqa_no_reasoning": 570}
