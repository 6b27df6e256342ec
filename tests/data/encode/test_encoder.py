"""Encoding against values worked out by hand, and against what the model's own processor gives."""

from __future__ import annotations

import copy
import functools
import pickle
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tokenizers import normalizers, processors
from transformers import AutoProcessor, CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from tests.tiny_models import CORPUS, noise_image, processor, tokenizer
from vlmpo.data.encode.chat_template import content_of
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.records import Message, PreferencePair
from vlmpo.errors import ModelError, RecipeError, RecordError
from vlmpo.testing.tiny import CHAT_TEMPLATE, TinySize, build_processor, train_tokenizer

# Sizes of tests.tiny_models.SIZE: 56 px tiles of patches of 14 px, halved by the pixel shuffle: 2 x 2 tokens a tile.
TOKENS_PER_TILE = 4
ASSISTANT = "<|im_start|>assistant\n"
USER = "<|im_start|>user\n"
END = "<|im_end|>"


def pair(
    question: str = "what is it?",
    chosen: str = "two red circles",
    rejected: str | None = "a blue square",
    images: tuple = (),
    **fields,
) -> PreferencePair:
    return PreferencePair((Message("user", question),), images, chosen, rejected, origin="pairs.jsonl:7", **fields)


def with_template(template: str | None, tokens: PreTrainedTokenizerFast | None = None):
    """The tiny processor under another chat template, or around another tokenizer."""
    if tokens is not None:
        other = build_processor(tokens, TinySize(image_size=56, max_tiles=2))
    else:
        other = copy.copy(processor())
    other.chat_template = template
    return other


def changed_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of its own, to be changed."""
    return copy.deepcopy(tokenizer())


def text_of(ids: torch.Tensor) -> str:
    return tokenizer().decode(ids)


def wide(seed: int = 0) -> Image.Image:
    """80x40: with at most two tiles, 2x1 of them and a thumbnail."""
    return noise_image(80, 40, seed)


def reason_of(encoder: PairEncoder, broken: PreferencePair) -> str:
    with pytest.raises(RecordError) as caught:
        encoder.encode(broken)
    assert caught.value.origin == "pairs.jsonl:7"
    assert str(caught.value).startswith("pairs.jsonl:7: ")
    return caught.value.reason


# ---- scored tokens ----


def test_responses_end_with_the_end_of_turn():
    encoded = PairEncoder(processor()).encode(pair(source="charts"))
    assert text_of(encoded.chosen_ids) == "two red circles" + END  # the template's newline after it is not there
    assert text_of(encoded.rejected_ids) == "a blue square" + END
    end = tokenizer().convert_tokens_to_ids(END)
    assert encoded.chosen_ids.tolist().count(end) == 1
    assert encoded.chosen_ids.dtype == encoded.prompt_ids.dtype == torch.long
    assert (encoded.source, encoded.origin, encoded.cut) == ("charts", "pairs.jsonl:7", False)
    assert encoded.num_tokens == len(encoded.prompt_ids) + len(encoded.chosen_ids) + len(encoded.rejected_ids)
    assert encoded.length == len(encoded.prompt_ids) + max(len(encoded.chosen_ids), len(encoded.rejected_ids))


def test_a_token_of_id_zero_is_scored_like_any_other():
    assert tokenizer().convert_tokens_to_ids("!") == 0
    end = tokenizer().convert_tokens_to_ids(END)
    encoded = PairEncoder(processor()).encode(pair(chosen="!", rejected="?!?"))
    question_mark = tokenizer().convert_tokens_to_ids("?")
    assert encoded.chosen_ids.tolist() == [0, end]
    assert encoded.rejected_ids.tolist() == [question_mark, 0, question_mark, end]


def test_responses_that_differ_in_their_first_token_only():
    encoded = PairEncoder(processor()).encode(pair(chosen="! is the answer", rejected="? is the answer"))
    assert encoded.chosen_ids[0] == 0
    assert encoded.rejected_ids[0] == tokenizer().convert_tokens_to_ids("?")
    assert encoded.chosen_ids[1:].tolist() == encoded.rejected_ids[1:].tolist()


@pytest.mark.parametrize("response", ["\nred", "\n\nred", " red", "red\n", "red ", "é ∑ 图\n\nline"])
def test_white_space_and_unicode_survive(response):
    encoder = PairEncoder(processor())
    assert text_of(encoder.encode(pair(chosen=response)).chosen_ids) == response + END
    assert encoder.notices == []


def test_a_token_that_would_span_prompt_and_response_is_not_used():
    """The prompt ends in a newline; with a token for two of them, the response's first one would be drawn into it."""
    tokens = train_tokenizer([text + "\n\nnext\n\n" for text in CORPUS], vocab_size=384)
    one, two = tokens.convert_tokens_to_ids(["Ċ", "ĊĊ"])
    assert tokens("\n\n\nnext").input_ids[:2] == [two, one]
    encoded = PairEncoder(with_template(CHAT_TEMPLATE, tokens)).encode(pair(chosen="\n\nnext"))
    assert encoded.prompt_ids[-1] == one
    assert encoded.chosen_ids[:2].tolist() == [one, one]
    assert tokens.decode(encoded.chosen_ids) == "\n\nnext" + END


def test_supervised_data_needs_no_rejected_response():
    encoder = PairEncoder(processor(), need_rejected=False)
    for rejected in (None, "", "two red circles"):
        encoded = encoder.encode(pair(rejected=rejected))
        assert encoded.rejected_ids is None
        assert text_of(encoded.chosen_ids) == "two red circles" + END
        assert encoded.num_tokens == encoded.length == len(encoded.prompt_ids) + len(encoded.chosen_ids)


# ---- the prompt ----


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("plain", ["plain"]),
        ("<image>\nwhat?", [None, "what?"]),
        ("<image>what?", [None, "what?"]),
        ("<image>\n\nwhat?", [None, "\nwhat?"]),
        ("first <image>\nthen <image> end", ["first ", None, "then ", None, " end"]),
        ("<image>\n<image>\n", [None, None]),
        ("", []),
    ],
)
def test_messages_become_content_items(text, items):
    expected = [{"type": "image"} if item is None else {"type": "text", "text": item} for item in items]
    assert content_of(text) == expected


def test_the_prompt_with_an_image():
    encoded = PairEncoder(processor(), max_tiles=2).encode(pair("<image>\nwhat is it?", images=(wide(),)))
    image = "<img>" + "<IMG_CONTEXT>" * 3 * TOKENS_PER_TILE + "</img>\n"
    assert text_of(encoded.prompt_ids) == f"{USER}{image}what is it?{END}\n{ASSISTANT}"
    assert (encoded.tiles, encoded.image_tokens) == (3, 12)
    assert encoded.vision.keys() == {"pixel_values"}
    assert encoded.vision["pixel_values"].shape == (3, 3, 56, 56)


def test_a_prompt_without_images():
    encoded = PairEncoder(processor()).encode(pair())
    assert text_of(encoded.prompt_ids) == f"{USER}what is it?{END}\n{ASSISTANT}"
    assert (encoded.vision, encoded.tiles, encoded.image_tokens) == ({}, 0, 0)


def test_images_stand_where_their_placeholders_are():
    """Two images in the middle of the text, over two turns, under a system message."""
    prompt = (
        Message("system", "be brief."),
        Message("user", "look: <image>\nwhat is it?"),
        Message("assistant", "a circle."),
        Message("user", "and <image> this?"),
    )
    one, two = noise_image(56, 56, 1), wide(2)
    encoded = PairEncoder(processor(), max_tiles=4).encode(replace(pair(images=(one, two)), prompt=prompt))

    def image(tiles: int) -> str:
        return "<img>" + "<IMG_CONTEXT>" * tiles * TOKENS_PER_TILE + "</img>\n"

    assert text_of(encoded.prompt_ids) == (
        f"<|im_start|>system\nbe brief.{END}\n{USER}look: {image(1)}what is it?{END}\n{ASSISTANT}a circle.{END}\n"
        f"{USER}and {image(3)} this?{END}\n{ASSISTANT}"
    )
    assert (encoded.tiles, encoded.image_tokens) == (4, 16)
    pixels = [processor().image_processor([i], crop_to_patches=True, max_patches=2).pixel_values for i in (one, two)]
    assert torch.equal(encoded.vision["pixel_values"], torch.cat([torch.stack(list(p)) for p in pixels]))


@pytest.mark.parametrize("images", [0, 1, 2])
def test_parity_with_the_processor_on_the_whole_conversation(images):
    """Prompt and response together are what the processor makes of the finished conversation, up to its end of turn."""
    pictures = tuple(wide(seed) for seed in range(images))
    encoded = PairEncoder(processor(), max_tiles=2 * max(images, 1)).encode(
        pair("<image>\n" * images + "how many are red?", chosen="three! look again", images=pictures)
    )
    content = [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": "how many are red?"}]
    conversation = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "three! look again"}]},
    ]
    whole = processor().apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"max_patches": 2}
    )
    ids = torch.cat([encoded.prompt_ids, encoded.chosen_ids])
    assert whole.input_ids[0, : len(ids)].tolist() == ids.tolist()
    assert text_of(whole.input_ids[0, len(ids) :]) == "\n"
    if images:
        assert torch.equal(whole.pixel_values, encoded.vision["pixel_values"])


# ---- tiles ----


@functools.cache
def full_size_processor():
    """448 px tiles of 256 tokens, as InternVL's."""
    return build_processor(tokenizer(), TinySize(image_size=448, patch_size=14, max_tiles=12))


@pytest.mark.parametrize(("width", "height", "tiles"), [(800, 600, 13), (1920, 1080, 9), (640, 640, 5), (448, 448, 1)])
def test_tiles_of_448_pixels(width, height, tiles):
    encoded = PairEncoder(full_size_processor()).encode(
        pair("<image>\nwhat?", images=(Image.new("RGB", (width, height), "red"),))
    )
    assert encoded.tiles == tiles
    assert encoded.image_tokens == 256 * tiles
    assert encoded.vision["pixel_values"].shape == (tiles, 3, 448, 448)


@pytest.mark.parametrize(
    ("of_encoder", "of_pair", "images", "tiles"),
    [
        (6, None, 1, 7),  # 240x160 is 3x2 tiles and a thumbnail, more than the processor's own two
        (6, 2, 1, 3),  # 2x1 comes nearest, and a thumbnail
        (2, 6, 1, 3),
        (1, None, 1, 1),  # one tile: no thumbnail
        (12, None, 2, 14),
        (12, 5, 2, 6),  # two tiles each
        (2, None, 3, 3),  # fewer tiles than images: one each
    ],
)
def test_tiles_are_shared_by_the_images(of_encoder, of_pair, images, tiles):
    asked = pair("<image>" * images, images=tuple(noise_image(240, 160, i) for i in range(images)), max_tiles=of_pair)
    encoded = PairEncoder(processor(), max_tiles=of_encoder).encode(asked)
    assert encoded.tiles == tiles
    assert encoded.image_tokens == tiles * TOKENS_PER_TILE


# ---- what is refused ----


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("placeholder_mismatch", {"question": "<image><image>", "images": (wide(),)}),
        ("placeholder_mismatch", {"question": "what?", "images": (wide(),)}),
        ("placeholder_mismatch", {"question": "<image>"}),
        ("control_token_in_text", {"question": "<image>\nwhat is <IMG_CONTEXT>?", "images": (wide(),)}),
        ("control_token_in_text", {"question": "what is <IMG_CONTEXT>?"}),
        ("control_token_in_text", {"question": "what is a <video>?"}),
        ("control_token_in_text", {"chosen": "it is <IMG_CONTEXT>"}),
        ("control_token_in_text", {"rejected": "<img>"}),
        ("control_token_in_text", {"rejected": f"red{END}"}),
        ("empty_response", {"chosen": ""}),
        ("empty_response", {"rejected": " \n"}),
        ("empty_response", {"rejected": None}),
        ("identical", {"chosen": "a blue square"}),
        ("missing_image", {"question": "<image>", "images": ("no/such/image.png",)}),
        ("undecodable_image", {"question": "<image>", "images": (b"no image",)}),
    ],
)
def test_a_bad_record_is_refused_by_name(reason, changes):
    assert reason_of(PairEncoder(processor()), pair(**changes)) == reason


def test_the_placeholder_itself_may_stand_in_a_response():
    """To this model `<image>` is plain text."""
    assert text_of(PairEncoder(processor()).encode(pair(chosen="an <image>")).chosen_ids) == f"an <image>{END}"


def test_a_response_without_tokens_is_empty():
    tokens = changed_tokenizer()
    tokens.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    encoder = PairEncoder(with_template(CHAT_TEMPLATE, tokens))
    assert reason_of(encoder, pair(chosen="~~")) == "empty_response"
    assert tokens.decode(encoder.encode(pair(chosen="~red~")).chosen_ids) == "red" + END


def test_different_texts_of_the_same_tokens_are_identical():
    tokens = changed_tokenizer()
    tokens.backend_tokenizer.normalizer = normalizers.Lowercase()
    encoder = PairEncoder(with_template(CHAT_TEMPLATE, tokens))
    assert reason_of(encoder, pair(chosen="RED", rejected="red")) == "identical"


def test_what_the_processor_refuses_is_a_record_too():
    """A template that writes no image token for an image: the processor counts and complains."""
    encoder = PairEncoder(with_template(CHAT_TEMPLATE.replace("<IMG_CONTEXT>\n", "")))
    assert reason_of(encoder, pair("<image>\nwhat?", images=(wide(),))) == "processor_refused"


# ---- over-long pairs ----

LONG = pair(chosen="a blue square", rejected="two red circles, not three")


def lengths() -> tuple[int, int, int]:
    """Tokens of prompt, chosen and rejected of LONG, whose rejected response is the longer one."""
    encoded = PairEncoder(processor()).encode(LONG)
    prompt, chosen, rejected = (len(ids) for ids in (encoded.prompt_ids, encoded.chosen_ids, encoded.rejected_ids))
    assert 2 < chosen < rejected
    return prompt, chosen, rejected


def test_an_over_long_pair_is_dropped_with_its_numbers():
    prompt, _, rejected = lengths()
    limit = prompt + rejected
    assert not PairEncoder(processor(), max_length=limit).encode(LONG).cut
    with pytest.raises(RecordError, match=rf"{prompt} \+ {rejected} = {limit} tokens of {limit - 1};") as caught:
        PairEncoder(processor(), max_length=limit - 1).encode(LONG)
    assert caught.value.reason == "over_long"


def test_an_over_long_pair_is_cut_at_its_responses_ends():
    whole = PairEncoder(processor()).encode(LONG)
    prompt, chosen, _ = lengths()
    cut = PairEncoder(processor(), max_length=prompt + chosen, over_long="cut").encode(LONG)
    assert cut.cut
    assert cut.length == prompt + chosen
    assert cut.prompt_ids.tolist() == whole.prompt_ids.tolist()
    assert cut.chosen_ids.tolist() == whole.chosen_ids.tolist()  # this one still fits, end of turn included
    assert cut.rejected_ids.tolist() == whole.rejected_ids[:chosen].tolist()
    assert tokenizer().convert_tokens_to_ids(END) not in cut.rejected_ids
    fits = PairEncoder(processor(), max_length=whole.length, over_long="cut").encode(LONG)
    assert not fits.cut
    assert fits.rejected_ids.tolist() == whole.rejected_ids.tolist()


def test_the_rejected_response_does_not_count_in_supervised_training():
    prompt, chosen, _ = lengths()
    assert not PairEncoder(processor(), max_length=prompt + chosen, need_rejected=False).encode(LONG).cut


def test_a_prompt_is_never_cut():
    prompt, _, _ = lengths()
    assert reason_of(PairEncoder(processor(), max_length=prompt, over_long="cut"), LONG) == "over_long"
    one_token = PairEncoder(processor(), max_length=prompt + 1, over_long="cut").encode(LONG)
    assert (len(one_token.chosen_ids), len(one_token.rejected_ids)) == (1, 1)
    with_image = pair("<image>\nwhat?", images=(wide(),))
    assert reason_of(PairEncoder(processor(), max_length=12, over_long="cut"), with_image) == "over_long"


def test_what_a_cut_makes_alike_is_identical():
    alike = pair(chosen="! then blue", rejected="! then red")
    prompt = len(PairEncoder(processor()).encode(alike).prompt_ids)
    assert reason_of(PairEncoder(processor(), max_length=prompt + 1, over_long="cut"), alike) == "identical"


# ---- templates ----

_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}@TEXT@{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)


def template(text: str = "{{ c['text'] }}", generation: str = ASSISTANT) -> str:
    """A template that writes text items by ``text`` and opens the answer by ``generation``."""
    return _TURNS.replace("@TEXT@", text) + "{% if add_generation_prompt %}" + generation + "{% endif %}"


STRIPS_THINKING = template("{{ c['text'].split('</think>')[-1] }}")
THINKS = "<think>\nred or blue\n</think>\n\nred"


def test_a_template_that_strips_reasoning_must_not_eat_the_response():
    encoder = PairEncoder(with_template(STRIPS_THINKING))
    assert reason_of(encoder, pair(chosen=THINKS)) == "template_lost_response"
    assert reason_of(encoder, pair(rejected=THINKS)) == "template_lost_response"
    assert text_of(encoder.encode(pair(chosen="red")).chosen_ids) == "red" + END
    assert encoder.notices == []
    keeps = PairEncoder(with_template(template()))
    assert text_of(keeps.encode(pair(chosen=THINKS)).chosen_ids) == THINKS + END


def test_a_template_that_changes_the_response_is_seen():
    encoder = PairEncoder(with_template(template("{{ c['text'] | replace('colour', 'color') }}")))
    assert reason_of(encoder, pair(chosen="no colour")) == "template_lost_response"


def test_a_prompt_that_is_rendered_differently_gives_one_notice():
    generation = ASSISTANT + "<think>\n\n</think>\n\n"
    encoder = PairEncoder(with_template(template(generation=generation)))
    for _ in range(2):
        encoded = encoder.encode(pair())
        assert text_of(encoded.prompt_ids) == f"{USER}what is it?{END}\n{generation}"
        assert text_of(encoded.chosen_ids) == "two red circles" + END
    assert len(encoder.notices) == 1
    assert r"'<think>\n\n</think>\n\n' where the model is to answer, '' where the answer is given" in encoder.notices[0]


def test_the_notice_quotes_only_what_differs():
    encoder = PairEncoder(with_template(template(generation="<|im_start|>model\n")))
    assert text_of(encoder.encode(pair()).prompt_ids).endswith("<|im_start|>model\n")
    assert len(encoder.notices) == 1
    assert "'model' where the model is to answer, 'assistant' where the answer is given" in encoder.notices[0]


ADDS_THINKING = template(
    "{% if m['role'] == 'assistant' and '<think>' not in c['text'] %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ c['text'] }}"
)


def test_what_the_template_writes_before_a_response_is_scored():
    """As Qwen3's: empty reasoning is added to an answer without any, and the model has to write it."""
    encoder = PairEncoder(with_template(ADDS_THINKING))
    encoded = encoder.encode(pair(rejected=THINKS))
    assert text_of(encoded.prompt_ids) == f"{USER}what is it?{END}\n{ASSISTANT}"
    assert text_of(encoded.chosen_ids) == f"<think>\n\n</think>\n\ntwo red circles{END}"
    assert text_of(encoded.rejected_ids) == THINKS + END
    assert len(encoder.notices) == 1
    assert r"'<think>\n\n</think>\n\n' between the prompt and a response" in encoder.notices[0]


def test_reasoning_that_the_prompt_opens_is_not_opened_twice():
    """As Qwen3-Thinking's: the prompt ends in `<think>`, with which the response begins too."""
    generation = ASSISTANT + "<think>\n"
    encoder = PairEncoder(with_template(ADDS_THINKING.replace(ASSISTANT, generation)))
    encoded = encoder.encode(pair(chosen=THINKS))
    assert text_of(encoded.prompt_ids).endswith(generation)
    assert text_of(encoded.chosen_ids) == f"red or blue\n</think>\n\nred{END}"


def test_a_template_that_trims_responses_gives_a_notice():
    encoder = PairEncoder(with_template(template("{{ c['text'] | trim }}")))
    assert text_of(encoder.encode(pair(chosen=" red\n")).chosen_ids) == "red" + END
    assert reason_of(encoder, pair(chosen="red\n", rejected=" red")) == "identical"
    assert encoder.notices == ["the chat template trims white space around responses; they are scored trimmed"]


def test_trimming_where_the_prompt_differs_too():
    encoder = PairEncoder(with_template(template("{{ c['text'] | trim }}", ASSISTANT + "<think></think>")))
    assert text_of(encoder.encode(pair(chosen=" red\n")).chosen_ids) == "red" + END
    assert len(encoder.notices) == 2


def test_the_end_of_turn_where_the_template_writes_none():
    """The tokenizer's end-of-sequence token then ends the response, with a notice."""
    plain = (
        "{% for m in messages %}{{ m['role'] + ':' }}{% for c in m['content'] %}{{ ' ' + c['text'] }}{% endfor %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    encoder = PairEncoder(with_template(plain))
    encoded = encoder.encode(pair())
    assert text_of(encoded.prompt_ids) == "user: what is it?\nassistant:"
    assert text_of(encoded.chosen_ids) == f" two red circles{END}"
    assert encoder.notices == [
        "the chat template writes no end-of-turn token after a response; the tokenizer's '<|im_end|>' is scored there"
    ]
    tokens = changed_tokenizer()
    tokens.eos_token = None
    with pytest.raises(ModelError, match="no token ends a response"):
        PairEncoder(with_template(plain, tokens))


def test_a_template_that_refuses_a_conversation():
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + template()
    encoder = PairEncoder(with_template(refuses))
    broken = replace(pair(), prompt=(Message("system", "be brief"), Message("user", "what?")))
    assert reason_of(encoder, broken) == "template_refused"
    assert text_of(encoder.encode(pair()).chosen_ids) == "two red circles" + END


@pytest.mark.parametrize("tail", ["", "<|endoftext|>"], ids=["tokenizer", "template"])
def test_the_start_token_stands_once(tail):
    """Written by the tokenizer, or by a template although the tokenizer would write it too."""
    tokens = changed_tokenizer()
    tokens.bos_token = "<|endoftext|>"
    bos = tokens.bos_token_id
    tokens.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    assert tokens("red").input_ids[0] == bos
    encoded = PairEncoder(with_template(tail + CHAT_TEMPLATE, tokens)).encode(pair("<image>\nwhat?", images=(wide(),)))
    assert encoded.prompt_ids.tolist().count(bos) == 1
    assert encoded.prompt_ids[0] == bos
    assert bos not in encoded.chosen_ids
    assert tokens.decode(encoded.chosen_ids) == "two red circles" + END


# ---- other processors ----

LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def llava_processor() -> LlavaProcessor:
    """28 px images of patches of 14 px: four tokens an image. Its image token is written as our placeholder is."""
    tokens = changed_tokenizer()
    tokens.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 28, "width": 28}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=tokens,
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_TEMPLATE,
    )


def test_a_llava_processor():
    llava = llava_processor()
    encoder = PairEncoder(llava)
    encoded = encoder.encode(pair("<image>\nwhat?<image>", images=(wide(1), wide(2))))
    images = ("<image>" * 4 + "\n") * 2
    assert llava.tokenizer.decode(encoded.prompt_ids) == f"USER: {images}what? ASSISTANT:"
    assert llava.tokenizer.decode(encoded.chosen_ids) == f" two red circles{END}"
    assert (encoded.tiles, encoded.image_tokens) == (2, 8)
    assert encoded.vision["pixel_values"].shape == (2, 3, 28, 28)
    # Its template writes no end of turn and all images first; its images are one size each.
    assert [notice.split()[0] for notice in encoder.notices] == ["the", "the", "max_tiles"]
    assert reason_of(encoder, pair(chosen="an <image>")) == "control_token_in_text"


# ---- the encoder itself ----


def test_a_pickled_encoder_encodes_the_same(tmp_path):
    asked = pair("<image>\nwhat?", images=(wide(),))
    encoder = PairEncoder(with_template(ADDS_THINKING), max_tiles=1)
    here, there = encoder.encode(asked), pickle.loads(pickle.dumps(encoder)).encode(asked)
    processor().save_pretrained(tmp_path)
    again = PairEncoder(with_template(ADDS_THINKING), max_tiles=1)
    again.processor = AutoProcessor.from_pretrained(tmp_path)
    for other in (there, again.encode(asked)):
        assert torch.equal(here.prompt_ids, other.prompt_ids)
        assert torch.equal(here.chosen_ids, other.chosen_ids)
        assert torch.equal(here.rejected_ids, other.rejected_ids)
        assert torch.equal(here.vision["pixel_values"], other.vision["pixel_values"])
        assert (here.tiles, here.image_tokens) == (other.tiles, other.image_tokens) == (1, TOKENS_PER_TILE)


def test_the_notices_are_known_before_any_pair_is_read():
    """A data loader's workers hold copies, whose notices would never be shown."""
    generation = ASSISTANT + "<think></think>"
    assert len(PairEncoder(with_template(template("{{ c['text'] | trim }}", generation))).notices) == 2


@pytest.mark.parametrize(
    ("unfit", "message"),
    [
        (lambda: with_template(None), "no chat template"),
        (lambda: tokenizer(), "no chat template"),
        (lambda: None, "no processor of text and images"),
        (lambda: with_template("{% for m in messages %}{{ m['role'] }}{% endfor %}"), "leaves responses out"),
        (lambda: with_template("{% for m in messages %}{{ 1 + m['content'] }}{% endfor %}"), "cannot render"),
        (
            lambda: with_template("{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}"),
            "it does not write the question",
        ),
        (lambda: with_template({"tool_use": CHAT_TEMPLATE}), "none of them are named"),
    ],
)
def test_an_unfit_processor_is_refused_at_once(unfit, message):
    with pytest.raises(ModelError, match=message):
        PairEncoder(unfit())


def test_an_unknown_way_with_over_long_pairs_is_refused():
    with pytest.raises(RecipeError, match="over_long must be drop or cut, not 'Drop'"):
        PairEncoder(processor(), over_long="Drop")
