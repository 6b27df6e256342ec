"""The encoding of every family, against its own processor on the whole conversation and against counts by hand."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, BatchFeature

from tests.tiny_models import noise_image, processor, tokenizer
from tests.zoo import FAMILIES, Family, idefics, llava, qwen
from vlmpo.data.encode.chat_template import ChatTemplate
from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.data.encode.processors import image_token_id, media_ids, tile_notice
from vlmpo.data.records import Message, PreferencePair
from vlmpo.errors import RecordError

ALL = list(FAMILIES.values())
SEEING = [family for family in ALL if family.images]
CHOSEN, REJECTED = "two red circles", "a blue square"
IMAGES = (noise_image(112, 40, 1), noise_image(40, 100, 2))


def by_name(family: Family) -> str:
    return family.name


def pair(question: str, *images: Any, chosen: str = CHOSEN, max_tiles: int | None = None) -> PreferencePair:
    prompt = (Message("user", question),)
    return PreferencePair(prompt, images, chosen, REJECTED, origin="pairs.jsonl:7", max_tiles=max_tiles)


def refused(encoder: PairEncoder, asked: PreferencePair) -> RecordError:
    with pytest.raises(RecordError) as caught:
        encoder.encode(asked)
    assert caught.value.origin == "pairs.jsonl:7"
    return caught.value


# ---- against the processor itself ----


def by_processor(own: Any, items: list[Any], answered: bool) -> Any:
    """What transformers makes of the question, ``items``, and its chosen answer or the request for one."""
    content: Any = [
        {"type": "text", "text": item} if isinstance(item, str) else {"type": "image", "image": item} for item in items
    ]
    answer: Any = [{"type": "text", "text": CHOSEN}]
    if not hasattr(own, "tokenizer"):
        content, answer = items[0], CHOSEN
    turns = [{"role": "user", "content": content}, *([{"role": "assistant", "content": answer}] if answered else [])]
    return own.apply_chat_template(
        turns, add_generation_prompt=not answered, tokenize=True, return_dict=True, return_tensors="pt"
    )


CONVERSATIONS = {
    "text only": ("what is it?", ["what is it?"]),
    "one image": ("<image>\nwhat is it?", [IMAGES[0], "what is it?"]),
    "between text": (
        "first <image>then <image>: which?",
        ["first ", IMAGES[0], "then ", IMAGES[1], ": which?"],
    ),
}


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in ALL for kind in CONVERSATIONS if family.images or kind == "text only"],
    ids=lambda value: value.name if isinstance(value, Family) else value,
)
def test_prompt_and_response_are_the_processors_own_conversation(family: Family, kind: str) -> None:
    question, items = CONVERSATIONS[kind]
    images = [item for item in items if not isinstance(item, str)]
    own = family.processor()
    # Two tiles: what the tiny InternVL's processor takes by itself. The others' settings are within twelve.
    encoded = PairEncoder(own, max_tiles=2 * max(len(images), 1) if "internvl" in family.name else 12).encode(
        pair(question, *images)
    )
    asked, whole = by_processor(own, items, answered=False), by_processor(own, items, answered=True)["input_ids"][0]
    assert asked["input_ids"][0].tolist() == encoded.prompt_ids.tolist()
    ids, after = torch.cat([encoded.prompt_ids, encoded.chosen_ids]), ""
    if family.name == "llava-1.5":  # its template ends no turn; the tokenizer's end is added
        assert ids[-1] == own.tokenizer.eos_token_id
        ids, after = ids[:-1], " "
    if family.name == "llava-onevision":  # its template asks for an answer by another text than it writes before one
        assert whole[-len(encoded.chosen_ids) :].tolist() == encoded.chosen_ids.tolist()
    else:
        assert whole[: len(ids)].tolist() == ids.tolist()
        rest = (own.tokenizer if hasattr(own, "tokenizer") else own).decode(whole[len(ids) :])
        assert rest in (after, "\n")
    text_keys = {"input_ids", "attention_mask"} | encoded.token_types.keys()
    assert asked.keys() - text_keys == encoded.vision.keys()
    assert all(torch.equal(torch.as_tensor(asked[key]), tensor) for key, tensor in encoded.vision.items())
    for key, types in encoded.token_types.items():
        assert torch.equal(torch.as_tensor(asked[key])[0], types)


@pytest.mark.parametrize("family", ALL, ids=by_name)
def test_saved_and_reloaded_it_encodes_the_same(family: Family, tmp_path: Path) -> None:
    from vlmpo.models.loading import load_processor

    family.processor().save_pretrained(tmp_path)
    reloaded = load_processor(str(tmp_path))
    if family.images:
        assert type(AutoProcessor.from_pretrained(tmp_path)) is type(family.processor())
    asked = pair("<image>" * min(family.images, 1) + "what?", *IMAGES[: min(family.images, 1)])
    here = PairEncoder(family.processor())
    first = here.encode(asked)
    for other in (PairEncoder(reloaded), pickle.loads(pickle.dumps(here))):
        again = other.encode(asked)
        assert again.prompt_ids.tolist() == first.prompt_ids.tolist()
        assert again.chosen_ids.tolist() == first.chosen_ids.tolist()
        assert again.vision.keys() == first.vision.keys()
        assert all(torch.equal(tensor, again.vision[key]) for key, tensor in first.vision.items())
        assert other.notices == here.notices


# ---- counts by hand: images of 112 x 40, and of 112 x 40 with 40 x 100 ----

COUNTS = {
    # tiles of 56 pixels and 4 tokens: 3 x 1 and a thumbnail; 1 x 3 (40 x 100) and a thumbnail
    "internvl": [(4, 16), (8, 32)],
    # one picture an image, 2 x 2 patches
    "llava-1.5": [(1, 4), (2, 8)],
    # 84 x 28 comes nearest: 3 patches and the whole; 4 + 2 rows of 6, each with a newline. 28 x 84, which a width of
    # 40/100 fills: 4 + 6 rows of 2, each with a newline
    "llava-next": [(4, 18), (8, 40)],
    # the same where an image is alone; one picture and a newline each where it is not
    "llava-onevision": [(4, 18), (2, 10)],
    # scaled to 56 and split by 28: 2 x 1 and the whole; 1 x 2 and the whole
    "idefics3": [(3, 12), (6, 24)],
    "smolvlm": [(3, 12), (6, 24)],
    # 56 x 28 in patches of 14; 22.4 x 56 goes up to 28 x 56
    "pixtral": [(1, 8), (2, 16)],
    # the same, 2 x 2 patches a token
    "mistral3": [(1, 2), (2, 4)],
    # 112 x 28 in tokens of 28 x 28; 28 x 112
    "qwen": [(1, 4), (2, 8)],
    "gemma3": [(1, 4), (2, 8)],
}


@pytest.mark.parametrize("family", SEEING, ids=by_name)
def test_tiles_and_image_tokens(family: Family) -> None:
    counts = next(found for name, found in COUNTS.items() if family.name.startswith(name))
    encoder = PairEncoder(family.processor(), max_tiles=12)
    for images, expected in zip((IMAGES[:1], IMAGES), counts, strict=True):
        encoded = encoder.encode(pair("<image>" * len(images), *images))
        assert (encoded.tiles, encoded.image_tokens) == expected
    none = encoder.encode(pair("what?"))
    assert (none.tiles, none.image_tokens, none.vision) == (0, 0, {})


# ---- max_tiles ----


def idefics_of(side: int) -> Any:
    """An Idefics3 processor that scales images to ``side`` tiles along the longer edge."""
    own = copy.copy(idefics.idefics_processor())
    own.image_processor = copy.deepcopy(own.image_processor)
    own.image_processor.size = {"longest_edge": side * idefics.SIDE}
    return own


@pytest.mark.parametrize(
    ("max_tiles", "of_pair", "images", "pictures"),
    [
        (12, None, 1, 13),  # 112 x 80 is 4 x 3 tiles of 28, and the whole
        (11, None, 1, 10),  # 84 x 60: 3 x 3
        (8, None, 1, 5),  # 56 x 40: 2 x 2
        (12, 4, 1, 5),
        (3, None, 1, 1),  # 2 x 2 would be four: one picture
        (1, None, 1, 1),
        (20, None, 2, 20),  # ten each: 3 x 3 and the whole
        (1, None, 2, 2),
    ],
)
def test_tiles_of_idefics(max_tiles: int, of_pair: int | None, images: int, pictures: int) -> None:
    encoder = PairEncoder(idefics_of(4), max_tiles=max_tiles)
    shown = [noise_image(112, 80, seed) for seed in range(images)]
    encoded = encoder.encode(pair("<image>" * images, *shown, max_tiles=of_pair))
    assert encoded.tiles == pictures
    assert encoded.image_tokens == 4 * pictures
    assert not [notice for notice in encoder.notices if "tiles" in notice]


def test_images_of_other_shapes_keep_within_their_share() -> None:
    """112 x 28 may take 4 x 1 of its four tiles; beside a square image both must do with 2 x 2."""
    encoder = PairEncoder(idefics_of(4), max_tiles=4)
    assert encoder.encode(pair("<image>", noise_image(112, 28, 0))).tiles == 5
    both = pair("<image><image>", noise_image(112, 28, 0), noise_image(90, 90, 1), max_tiles=8)
    assert PairEncoder(idefics_of(4), max_tiles=8).encode(both).tiles == (2 + 1) + (4 + 1)


def qwen_of(max_pixels: int) -> Any:
    own = copy.copy(qwen.processor("qwen2_5_vl"))
    own.image_processor = type(own.image_processor)(patch_size=14, min_pixels=56 * 56, max_pixels=max_pixels)
    return own


@pytest.mark.parametrize(
    ("max_tiles", "of_pair", "images", "tokens"),
    [
        (12, None, 1, 21 * 32),  # 600 x 900 to the nearest 28s: within four tiles' pixels, the processor's own bound
        (4, None, 1, 21 * 32),
        (2, None, 1, 18 * 27),  # both edges divided by sqrt(900 * 600 / (2 * 448 * 448)), down to 28s
        (2, 1, 1, 13 * 19),
        (2, None, 2, 2 * 13 * 19),
    ],
)
def test_pixels_of_a_model_that_reads_images_whole(
    max_tiles: int, of_pair: int | None, images: int, tokens: int
) -> None:
    encoder = PairEncoder(qwen_of(4 * 448 * 448), max_tiles=max_tiles)
    shown = [noise_image(900, 600, seed) for seed in range(images)]
    encoded = encoder.encode(pair("<image>" * images, *shown, max_tiles=of_pair))
    assert encoded.image_tokens == tokens
    assert int(encoded.vision["image_grid_thw"].prod(dim=1).sum()) == 4 * tokens
    told = [notice for notice in encoder.notices if "max_tiles" in notice]
    assert len(told) == (max_tiles < 4)
    if told:
        assert "max_tiles 2 bounds a prompt's images to 2 x 448 x 448 = 401408 pixels" in told[0]
        assert "802816" in told[0]


def test_a_setting_without_effect_gives_one_notice() -> None:
    """Six families have no setting for the number of tiles."""
    silent = {family.name: tile_notice(family.processor(), 12) for family in ALL}
    told = {name for name, notice in silent.items() if notice is not None}
    assert told == {"llava-1.5", "llava-next", "llava-onevision", "pixtral", "mistral3", "gemma3"}
    encoder = PairEncoder(llava.next_processor())
    for _ in range(2):
        encoder.encode(pair("<image>", IMAGES[0]))
    notices = [notice for notice in encoder.notices if "max_tiles" in notice]
    assert notices == [
        "max_tiles has no effect on this model: LlavaNextImageProcessor sizes its images by settings of its own"
    ]


# ---- image tokens ----


@pytest.mark.parametrize("family", SEEING, ids=by_name)
def test_no_response_holds_what_stands_for_an_image(family: Family) -> None:
    encoder = PairEncoder(family.processor())
    names = encoder._tokenizer.convert_ids_to_tokens(sorted(encoder.media_ids))
    assert image_token_id(family.processor()) in encoder.media_ids
    for name in names:
        assert refused(encoder, pair("what?", chosen=f"it is {name}")).reason == "control_token_in_text"


def test_the_tokens_around_images_are_known_too() -> None:
    def tokens(name: str) -> set[str]:
        own = FAMILIES[name].processor()
        return set(own.tokenizer.convert_ids_to_tokens(sorted(media_ids(own))))

    assert tokens("llava-1.5") == {"<image>"}
    assert tokens("pixtral") == {"[IMG]", "[IMG_BREAK]", "[IMG_END]"}
    assert tokens("gemma3") == {"<image_soft_token>", "<start_of_image>", "<end_of_image>"}
    assert tokens("qwen3-vl") == set(qwen.MEDIA)
    assert tokens("idefics3") == {*idefics.MEDIA, *idefics.ROWS}
    assert tokens("smolvlm") == set(idefics.MEDIA)


def test_the_image_token_is_the_one_features_replace() -> None:
    """Gemma 3's processor gives the name to the token before an image."""
    for family in SEEING:
        assert image_token_id(family.processor()) == family.model(0).config.image_token_id
    assert FAMILIES["gemma3"].processor().image_token_id != image_token_id(FAMILIES["gemma3"].processor())


# ---- templates and processors that are in the way ----


def test_a_template_that_puts_images_first_gives_a_notice() -> None:
    told = {f.name for f in ALL if any("images before its text" in n for n in PairEncoder(f.processor()).notices)}
    assert told == {"llava-1.5", "llava-onevision"}


STRINGS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WRITES_LISTS = STRINGS.replace("m['content'] +", "(m['content'] | string) +")  # of a list: as Python writes it


def with_template(template: str) -> Any:
    own = copy.copy(processor())
    own.chat_template = template
    return own


@pytest.mark.parametrize("template", [STRINGS, WRITES_LISTS], ids=["fails on lists", "writes lists"])
def test_a_template_of_strings_around_a_model_that_sees(template: str) -> None:
    encoder = PairEncoder(with_template(template), max_tiles=1)
    encoded: EncodedPair = encoder.encode(pair("first <image>\nthen\n<image> which?", *IMAGES))
    image = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    assert tokenizer().decode(encoded.prompt_ids) == (
        f"<|im_start|>user\nfirst {image}\nthen\n{image} which?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer().decode(encoded.chosen_ids) == f"{CHOSEN}<|im_end|>"
    assert encoded.image_tokens == 8
    assert encoder.notices == []


def test_a_template_of_lists_around_a_text_only_model() -> None:
    own = copy.deepcopy(FAMILIES["llama-text"].processor())
    by_string = PairEncoder(own).encode(pair("what is it?"))
    own.chat_template = STRINGS.replace(
        "+ m['content'] +", "}}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{{"
    )
    assert ChatTemplate(own)._as_items
    by_list = PairEncoder(own).encode(pair("what is it?"))
    assert by_list.prompt_ids.tolist() == by_string.prompt_ids.tolist()
    assert by_list.chosen_ids.tolist() == by_string.chosen_ids.tolist()


ONE_IMAGE = (
    "{% set images = messages[0]['content'] | selectattr('type', 'equalto', 'image') | list %}"
    "{% if images | length > 1 %}{{ raise_exception('one image only') }}{% endif %}"
)


@pytest.mark.parametrize("family", SEEING, ids=by_name)
def test_a_template_that_takes_one_image(family: Family) -> None:
    own = copy.copy(family.processor())
    own.chat_template = ONE_IMAGE + own.chat_template
    encoder = PairEncoder(own)
    assert encoder.encode(pair("<image>", IMAGES[0])).image_tokens > 0
    error = refused(encoder, pair("<image><image>", *IMAGES))
    assert error.reason == "template_refused"
    assert "one image only" in error.detail


class Odd:
    """The tiny InternVL's processor, with a fault or an addition of its own."""

    def __init__(self, error: Exception | None = None, **extra: Any) -> None:
        self.__dict__.update(copy.copy(processor()).__dict__)
        self.error, self.extra = error, extra

    def __getattr__(self, name: str) -> Any:
        return getattr(processor(), name)

    def __call__(self, **arguments: Any) -> BatchFeature:
        if self.error is not None and len((arguments["images"] or [[]])[0]) > 1:
            raise self.error
        return BatchFeature({**processor()(**arguments), **self.extra})


@pytest.mark.parametrize("error", [ValueError("no"), TypeError("no"), IndexError("no"), KeyError("no")], ids=repr)
def test_a_processor_that_takes_one_image(error: Exception) -> None:
    encoder = PairEncoder(Odd(error))
    assert encoder.encode(pair("<image>", IMAGES[0])).image_tokens > 0
    assert refused(encoder, pair("<image><image>", *IMAGES)).reason == "processor_refused"


def test_what_is_no_tensor_is_not_given_to_the_model() -> None:
    odd = Odd(image_names=["a.png"], metadata=[{"fps": 2}], nothing=None, image_sizes=[[40, 112]])
    vision = PairEncoder(odd).encode(pair("<image>", IMAGES[0])).vision
    assert vision.keys() == {"pixel_values", "image_sizes"}
    assert vision["image_sizes"].tolist() == [[40, 112]]
    ragged = Odd(pixel_values=[torch.zeros(3, 2, 2), torch.zeros(3, 2, 4)])
    error = refused(PairEncoder(ragged), pair("<image>", IMAGES[0]))
    assert error.reason == "processor_refused"
    assert "pixel_values make no tensor" in error.detail


def test_an_image_of_one_token_is_refused_where_the_model_fails_on_it() -> None:
    small, larger = noise_image(28, 28, 0), noise_image(29, 28, 0)
    encoder = PairEncoder(FAMILIES["mistral3"].processor())
    error = refused(encoder, pair("<image>", small))
    assert error.reason == "image_too_small"
    model = FAMILIES["mistral3"].model(0)
    for images in ((larger,), (small, small)):
        encoded = encoder.encode(pair("<image>" * len(images), *images))
        assert encoded.image_tokens == 2
        model(input_ids=encoded.prompt_ids[None], **encoded.vision)
    # Pixtral reads such an image: its own processor, without merging.
    encoded = PairEncoder(FAMILIES["pixtral"].processor()).encode(pair("<image>", noise_image(14, 14, 0)))
    assert encoded.image_tokens == 1
    FAMILIES["pixtral"].model(0)(input_ids=encoded.prompt_ids[None], **encoded.vision)


def test_images_no_family_can_do_anything_with_are_records_not_crashes() -> None:
    """A pixel, and lines: every family encodes them, or refuses them by name."""
    reasons = set()
    for family in SEEING:
        encoder, model = PairEncoder(family.processor()), family.model(0)
        for shape in ((1, 1), (1, 500), (500, 1), (3, 2000)):
            try:
                encoded = encoder.encode(pair("<image>", noise_image(*shape, 0)))
            except RecordError as error:
                reasons.add(error.reason)
                continue
            with torch.no_grad():
                found = model.base_model.get_image_features(**encoded.vision).pooler_output
            parts = [found] if isinstance(found, torch.Tensor) else list(found)
            assert sum(part.reshape(-1, part.shape[-1]).shape[0] for part in parts) == encoded.image_tokens
    assert reasons == {"processor_refused", "image_too_small"}
