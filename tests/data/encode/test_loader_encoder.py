"""What a loader does once only: decode a prompt's images, read a run of image tokens, merge settings, and find out how
the template ends a turn."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ExifTags, Image

from tests.tiny_models import noise_image, processor, tokenizer
from tests.zoo import FAMILIES, Family
from vlmpo import Message, PreferencePair
from vlmpo.compat import settings_merger
from vlmpo.data.encode import encoder, prompt_cache
from vlmpo.data.encode.chat_template import ChatTemplate
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.encode.fast_processor import RunTokenizer, SettingsCache, with_fast_image_tokens
from vlmpo.data.encode.pixels import reads_alike
from vlmpo.errors import RecordError

# ---- images are decoded once ----


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every image that an encoder opens, in order."""
    found: list[Any] = []
    plain = encoder.open_image

    def listening(source: Any, origin: str = "") -> Any:
        found.append(source)
        return plain(source, origin)

    monkeypatch.setattr(encoder, "open_image", listening)
    return found


def files(folder: Path, count: int) -> list[str]:
    paths = [str(folder / f"{number}.png") for number in range(count)]
    for number, path in enumerate(paths):
        noise_image(112, 40, number).save(path)
    return paths


def pair(*images: Any, chosen: str = "red", question: str = "what is it?", tiles: int | None = None) -> PreferencePair:
    prompt = (Message("user", "<image>\n" * len(images) + question),)
    return PreferencePair(prompt, images, chosen, "blue", max_tiles=tiles)


def test_pairs_of_one_prompt_decode_its_images_once(tmp_path: Path, opened: list[Any]) -> None:
    one, two = files(tmp_path, 2)
    encoder = PairEncoder(processor())
    first, second = (encoder.encode(pair(one, two, chosen=text)) for text in ("red", "green"))
    assert opened == [one, two]
    assert first.vision["pixel_values"] is second.vision["pixel_values"]
    assert first.prompt_ids.tolist() == second.prompt_ids.tolist()
    assert first.chosen_ids.tolist() != second.chosen_ids.tolist()
    fresh = PairEncoder(processor()).encode(pair(one, two, chosen="green"))
    assert torch.equal(fresh.vision["pixel_values"], second.vision["pixel_values"])
    assert fresh.chosen_ids.tolist() == second.chosen_ids.tolist()


def test_whatever_changes_the_prompt_encodes_it_again(tmp_path: Path, opened: list[Any]) -> None:
    one, two = files(tmp_path, 2)
    encoder = PairEncoder(processor(), max_tiles=12)
    asked = [pair(one), pair(two), pair(one, question="which?"), pair(one, tiles=1), pair(one, one)]
    encoded = [encoder.encode(each) for each in asked]
    assert opened == [one, two, one, one, one, one]
    assert [each.tiles for each in encoded] == [4, 4, 4, 1, 8]
    assert not torch.equal(encoded[0].vision["pixel_values"], encoded[1].vision["pixel_values"])


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    (path,) = files(tmp_path, 1)
    encoder = PairEncoder(processor())
    before = encoder.encode(pair(path)).vision["pixel_values"]
    noise_image(112, 40, 9).save(path)
    os.utime(path, ns=(1, 1))  # whatever the file system's clock is worth
    assert not torch.equal(encoder.encode(pair(path)).vision["pixel_values"], before)
    os.remove(path)
    with pytest.raises(RecordError, match="does not exist"):
        encoder.encode(pair(path))


def test_images_in_memory_are_always_read(opened: list[Any]) -> None:
    """They may be drawn on between two pairs."""
    encoder, image = PairEncoder(processor()), noise_image(112, 40, 0)
    before = encoder.encode(pair(image)).vision["pixel_values"]
    image.paste((0, 0, 0), (0, 0, 60, 40))
    assert not torch.equal(encoder.encode(pair(image)).vision["pixel_values"], before)
    assert len(opened) == 2


def test_pictures_of_a_group_are_read_once_until_one_is_drawn_on(opened: list[Any]) -> None:
    """A picture is known by its content, whichever object holds it, and by how it is to be turned."""
    encoder, image = PairEncoder(processor()).for_loader(grouped=True), noise_image(112, 40, 0)
    first = encoder.encode(pair(image)).vision["pixel_values"]
    assert encoder.encode(pair(image.copy(), chosen="green")).vision["pixel_values"] is first
    assert len(opened) == 1
    image.putpixel((3, 3), (1, 2, 3))
    drawn_on = encoder.encode(pair(image)).vision["pixel_values"]
    assert torch.equal(drawn_on, PairEncoder(processor()).for_loader().encode(pair(image)).vision["pixel_values"])
    assert not torch.equal(drawn_on, first)
    image.getexif()[ExifTags.Base.Orientation] = 3
    upside_down = encoder.encode(pair(image)).vision["pixel_values"]
    assert not torch.equal(upside_down, drawn_on)


def test_encoded_images_are_read_once_and_opened_files_are_left_to_pillow(opened: list[Any], tmp_path: Path) -> None:
    (path,) = files(tmp_path, 1)
    content = Path(path).read_bytes()
    encoder = PairEncoder(processor()).for_loader(grouped=True)
    kept = encoder.encode(pair(content)).vision["pixel_values"]
    assert encoder.encode(pair(bytes(bytearray(content)))).vision["pixel_values"] is kept
    assert len(opened) == 1
    for _ in range(2):
        assert torch.equal(encoder.encode(pair(Image.open(path))).vision["pixel_values"], kept)
    assert len(opened) == 3


def test_only_the_last_few_are_kept_and_none_is_sent_to_workers(tmp_path: Path, opened: list[Any]) -> None:
    paths = files(tmp_path, prompt_cache.KEPT + 1)
    encoder = PairEncoder(processor())
    for path in [*paths, *paths[1:], paths[0]]:  # the first one has gone when it is asked for again
        encoder.encode(pair(path))
    assert opened == [*paths, paths[0]]
    assert len(encoder._prompt_cache._prompts) == prompt_cache.KEPT
    assert not pickle.loads(pickle.dumps(encoder))._prompt_cache._prompts
    assert not encoder.for_loader()._prompt_cache._prompts  # its pixels are bytes


# ---- runs of image tokens ----

IMAGE = "<IMG_CONTEXT>"
TEXTS = [
    IMAGE,
    IMAGE * 7,
    f"{IMAGE * 3}what is it?",
    f"one <img>{IMAGE * 256}</img>\ntwo: <img>{IMAGE * 12}</img>{IMAGE}",
    f" {IMAGE} {IMAGE * 2}\n\n{IMAGE * 5}<|im_end|>{IMAGE}x",
    "no image at all",
    "",
]


def run_tokenizer() -> RunTokenizer:
    return RunTokenizer(tokenizer(), tokenizer().convert_tokens_to_ids(IMAGE))


@pytest.mark.parametrize("kind", [None, "pt", "np"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_of_runs_becomes_the_same_tokens(text: str, kind: str | None) -> None:
    plain, found = (
        each([text], return_tensors=kind, add_special_tokens=False) for each in (tokenizer(), run_tokenizer())
    )
    assert plain.keys() == found.keys()
    for name, values in plain.items():
        assert type(found[name]) is type(values)
        if kind is not None:
            assert found[name].dtype == values.dtype
            assert found[name].shape == values.shape
        assert [list(row) for row in found[name]] == [list(row) for row in values]


def test_several_texts_padding_and_cutting_are_the_tokenizers_own() -> None:
    texts = [f"a {IMAGE * 3}", f"{IMAGE * 9} b"]
    for settings in ({}, {"padding": True}, {"padding": "max_length", "max_length": 20}):
        assert run_tokenizer()(texts, **settings).data == tokenizer()(texts, **settings).data
    cut = {"truncation": True, "max_length": 4}
    assert run_tokenizer()(texts[:1], **cut).data == tokenizer()(texts[:1], **cut).data
    offsets = run_tokenizer()(texts[:1], return_offsets_mapping=True)
    assert offsets.data == tokenizer()(texts[:1], return_offsets_mapping=True).data
    assert run_tokenizer()(texts[0]).data == tokenizer()(texts[0]).data


def test_a_run_is_read_as_one_token() -> None:
    """That it is quicker is the benchmark's to show; here, that the tokenizer is given less to do."""
    asked: list[str] = []

    class Listening:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer(), name)

        def __call__(self, texts: list[str], **settings: Any) -> Any:
            asked.extend(texts)
            return tokenizer()(texts, **settings)

    found = RunTokenizer(Listening(), tokenizer().convert_tokens_to_ids(IMAGE))([f"a{IMAGE * 300}b{IMAGE * 2}"])
    assert asked == [f"a{IMAGE}b{IMAGE}"]
    assert found["input_ids"][0].count(tokenizer().convert_tokens_to_ids(IMAGE)) == 302


def test_it_is_its_tokenizer_in_every_other_respect() -> None:
    again = pickle.loads(pickle.dumps(run_tokenizer()))
    assert again.pad_token_id == run_tokenizer().pad_token_id == tokenizer().pad_token_id
    assert again.decode([1, 2, 3]) == tokenizer().decode([1, 2, 3])
    assert again(TEXTS[3:4]).data == tokenizer()(TEXTS[3:4]).data


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.images], ids=lambda family: family.name)
def test_families_read_runs_at_once(family: Family) -> None:
    """Idefics3's processor asks the encoding where characters came from, which a written-out one does not know."""
    encoder = PairEncoder(family.processor()).for_loader()
    assert isinstance(encoder.processor.tokenizer, RunTokenizer) == (family.name != "idefics3")
    assert type(family.processor().tokenizer) is not RunTokenizer  # the user's own is left as it was


def test_a_tokenizer_to_which_neighbours_matter_is_left_alone() -> None:
    own = with_fast_image_tokens(processor())
    assert reads_alike(processor(), own)

    class Pairing(RunTokenizer):
        """A tokenizer that makes one token less of a run."""

        def __call__(self, text: Any = None, *args: Any, **settings: Any) -> Any:
            return super().__call__([text[0].replace(IMAGE * 2, IMAGE)], *args, **settings)

    own.tokenizer = Pairing(tokenizer(), tokenizer().convert_tokens_to_ids(IMAGE))
    assert not reads_alike(processor(), own)


# ---- settings are merged once ----


def test_settings_are_merged_as_the_processor_merges_them_and_once() -> None:
    merged: list[Any] = []
    own = processor()

    def listening(*args: Any, **given: Any) -> Any:
        merged.append(given)
        return settings_merger(own)(*args, **given)

    kept = SettingsCache(listening)
    asked = [{"images_kwargs": {"max_patches": tiles}, "return_tensors": "pt"} for tiles in (1, 2, 1, 2)]
    for settings in asked:
        found = kept(tokenizer_init_kwargs=own.tokenizer.init_kwargs, **settings)
        assert found == settings_merger(own)(tokenizer_init_kwargs=own.tokenizer.init_kwargs, **settings)
        assert found["images_kwargs"]["max_patches"] == settings["images_kwargs"]["max_patches"]
        found["images_kwargs"].clear()  # as processors do, which take out what they have read
        del found["text_kwargs"]
    assert len(merged) == 2


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.images], ids=lambda family: family.name)
def test_families_merge_their_settings_once(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of two numbers of tiles, each twice; ``test_pixels`` checks their pixels."""
    encoder = PairEncoder(family.processor()).for_loader()
    assert isinstance(settings_merger(encoder.processor), SettingsCache)
    asked = [pair(noise_image(112, 40, seed), tiles=tiles) for seed, tiles in enumerate((1, 4, 1, 4))]
    first = [encoder.encode(one) for one in asked]
    monkeypatch.setattr(settings_merger(encoder.processor), "_merge", None)  # nothing is left to merge
    sent = pickle.loads(pickle.dumps(encoder))
    for encoded, one in zip(first, asked, strict=True):
        again = sent.encode(one)
        assert again.prompt_ids.tolist() == encoded.prompt_ids.tolist()
        assert all(torch.equal(tensor, again.vision[name]) for name, tensor in encoded.vision.items())
    assert not isinstance(settings_merger(family.processor()), SettingsCache)  # the user's own is left as it was


# ---- the end of a turn is looked up once ----

TAILED = (  # the end of a turn depends on the question
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}"
    "{% for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ messages[0]['content'][-1]['text'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_ends_turns_in_several_ways_is_read_by_each() -> None:
    """Rendering alternates between endings, one of which is the end of another."""
    own = copy.copy(processor())
    own.chat_template = TAILED
    kept = ChatTemplate(own)
    for question in ("?", "", "? ?", " ?", "?"):
        message = [Message("user", f"x{question}")]
        found = kept.render(message, ["red", "7?"], "")
        assert found == ChatTemplate(own).render(message, ["red", "7?"], "")
        assert found.responses == ("red", "7?")
        assert found.end_of_turn == f"x{question}<|im_end|>"


def test_each_conversation_is_rendered_once_where_turns_end_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, rendered = ChatTemplate(processor()), []
    plain = kept._apply

    def listening(messages: Any, response: str | None, origin: str) -> str:
        rendered.append(response)
        return plain(messages, response, origin)

    monkeypatch.setattr(kept, "_apply", listening)
    kept.render([Message("user", "which?")], ["red", "blue"], "")
    assert rendered == [None, "red", "blue"]
    rendered.clear()
    assert kept.render([Message("user", "which?")], [f"red{kept._tail}"], "").responses == (f"red{kept._tail}",)
    assert rendered == [None, f"red{kept._tail}"]
