"""``vlmpo inspect``: the pair as the model reads it, the counts, the distributions, the plan of the steps."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from tests.paths import SHARED
from vlmpo.commands import inspect as room
from vlmpo.commands.inspect import (
    PairSize,
    StepPlan,
    collapse_images,
    histogram,
    inspect,
    plan_steps,
    row_line,
    summary,
)
from vlmpo.errors import RecipeError, RecordError
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


def printed(recipe, pairs: int) -> str:
    out = io.StringIO()
    inspect(recipe, pairs, Console(file=out, width=200))
    return out.getvalue()


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
    five_tiles = room.examine(recipe, _load(recipe), 0).sizes[1]
    found = room.examine(load_recipe(recipe_file, [f"data.max_length={five_tiles.longer - 1}"]), _load(recipe), 0)
    assert len(found.sizes) == 2
    assert found.dropped.reasons() == {"over_long": 1}
    assert [size.tiles for size in found.sizes] == [1, 0]


def _load(recipe):
    return room.load_processor(recipe)


def test_sizes_are_the_tokens_of_each_part(recipe_file, tokenizer):
    recipe = load_recipe(recipe_file)
    sizes = room.examine(recipe, _load(recipe), 0).sizes

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
    recipe = load_recipe(recipe_file, ["loss.weights={nll: 1}"])
    found = room.examine(recipe, _load(recipe), 0)
    assert [size.rejected for size in found.sizes] == [0, 0, 0, 0]  # "same" against "same" is a fine SFT example
    assert found.data.screened.reasons() == {"missing_image": 1}


def test_many_pairs_are_sampled_and_it_is_said(recipe_file, monkeypatch):
    monkeypatch.setattr(room, "MAX_EXAMINED", 2)
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


def test_summary_gives_values_that_occur():
    assert summary(list(range(1, 21))) == (1, 10, 19, 20)
    assert summary([7]) == (7, 7, 7, 7)
    assert summary([3, 1, 2]) == (1, 2, 3, 3)


def test_histogram_counts_every_value():
    # width = ceil(10 / 8) = 2; bars: 40 for the tallest, ceil(40 / 3) for a third of it
    assert histogram([1, 1, 2, 10]) == [
        "   1 - 2 | " + "#" * 40 + " 3",
        "   3 - 4 |  0",
        "   5 - 6 |  0",
        "   7 - 8 |  0",
        "  9 - 10 | " + "#" * 14 + " 1",
    ]
    assert histogram([5, 5]) == ["  5 | " + "#" * 40 + " 2"]


def plan(text: str, sizes: list[PairSize], shared: bool | None) -> StepPlan:
    return plan_steps(parse_recipe(text), 10, sizes, shared)


MINIMAL = "model: {path: m}\ndata: {train: [a]}\n"


def test_steps_and_rows(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ten = [PairSize(prompt=6, chosen=3, rejected=1, image_tokens=0, tiles=0)] * 10  # 10 tokens when shared
    batch = "training: {per_device_train_batch_size: 2, gradient_accumulation_steps: 2, max_tokens_per_row: %s}"
    # 2 x 2 x 2 = 8 pairs a step, so 10 pairs are 2 steps; 4 micro-batches a step over all devices
    assert plan(MINIMAL + batch % 20, ten, True) == StepPlan(2, 2, 2, 2, 4.0, True)
    assert plan(MINIMAL + batch % 19, ten, True).rows_per_step == 8.0  # two pairs do not fit into one row
    assert plan(MINIMAL + batch % "null", ten, True).rows_per_step == 4.0
    assert plan(MINIMAL + batch % 20, ten, False).rows_per_step == 16.0
    assert plan(MINIMAL + batch % 20, ten, None).rows_per_step is None
    sft = [PairSize(6, 3, 0, 0, 0)] * 10
    assert plan(MINIMAL + batch % 20, sft, False).rows_per_step == 8.0
    assert plan(MINIMAL + batch % 20, ten, True).pairs_per_step == 8


def test_a_batch_size_that_is_none_is_refused():
    with pytest.raises(RecipeError, match=r"training\.per_device_train_batch_size: expected a whole number above 0"):
        plan(MINIMAL + "training: {per_device_train_batch_size: 0}", [], True)


def test_rows_are_told_when_the_model_is_there(recipe_file, tokenizer):
    recipe = load_recipe(recipe_file)
    assert room.is_shared(recipe) is None
    assert "rows per optimizer step: not known" in printed(recipe, pairs=0)
    build_model(tokenizer, SIZE).config.save_pretrained(recipe.model.path)
    assert room.is_shared(recipe) is True
    text = printed(recipe, pairs=0)
    assert "pairs per optimizer step: 2 (2 a device x 1 accumulated x 1 device(s))" in text
    # 3 pairs as 2 + 1: two rows for three pairs, 4/3 of a row for the two of a step
    assert "rows per optimizer step: about 1.3 (prompts shared)" in text
    assert "optimizer steps per epoch: 2" in text
    assert "tokens read at once: at most 1536 (training.max_tokens_per_row); the longest pair here takes " in text
    assert room.is_shared(load_recipe(recipe_file, ["model.attention=separate"])) is False


def test_what_decides_the_memory():
    told = "tokens read at once: at most 100 (training.max_tokens_per_row); the longest pair here takes "
    assert (
        row_line(100, 40) == f"{told}40; with a bound of that much it alone decides the memory, and no number changes"
    )
    assert row_line(100, 100) == f"{told}100"
    assert row_line(100, 140) == f"{told}140, in a row by itself"
    assert row_line(None, 40) == "tokens read at once: all of a micro-batch; the longest pair here takes 40"


def test_real_pairs_tell_the_published_tile_counts(tmp_path):
    """At 448 px and 256 tokens a tile the image tokens are 256 for each tile, for every real pair looked at."""
    meta = SHARED / "data" / "visonlyqa" / "meta.json"
    if not meta.exists():
        pytest.skip("the shared data set visonlyqa is not beside this checkout")
    size = TinySize(image_size=448)
    build_processor(train_tokenizer(["some text to begin with"], 300), size).save_pretrained(tmp_path / "model")
    recipe = parse_recipe(f"model: {{path: {tmp_path / 'model'}}}\ndata: {{train: [{meta}], max_tiles: 6}}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "MAX_EXAMINED", 12)
        found = room.examine(recipe, room.load_processor(recipe), 1)
    assert found.num_examined == 12
    assert all(s.image_tokens == 256 * s.tiles for s in found.sizes)
    assert all(1 <= s.tiles <= 7 for s in found.sizes)
    counts = found.data.read
    assert counts == {"visonlyqa_reasoning": 1047, "visonlyqa_no_reasoning": 570}
