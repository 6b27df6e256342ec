"""Responses read after the end of their prompt alone become the same tokens as after all of it."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import CORPUS, processor, tokenizer
from tests.zoo import FAMILIES, Family
from vlmpo import Message, PreferencePair
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.encode.response_tokens import ResponseTokenizer, response_tokenizer

START, END = "<|im_start|>", "<|im_end|>"
PROMPT = f"{START}user\nhow many red shapes?{END}\n{START}assistant\n"
PIECES = [
    START,
    END,
    "<|im",
    "_start|>",
    "<s>",
    "\n",
    " ",
    "  ",
    "\t",
    "red",
    "Red",
    "the",
    "\u00e9",
    "\u7ea2",
    "7",
    ":",
    "!",
]
texts = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@functools.cache
def made(kind: str) -> PreTrainedTokenizerFast:
    """Tokenizers whose treatment of a text's start, of white space and of neighbours differs."""
    built = Tokenizer(models.BPE(unk_token="<unk>") if kind != "unigram" else models.Unigram())
    if kind == "bytes":
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind == "llama":  # no words at all: one text, its spaces written as marks
        built.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        built.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if kind == "unigram" else "first")
    special = ["<unk>", "<s>", START, END]
    if kind == "unigram":
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=special, show_progress=False)
    built.train_from_iterator([*CORPUS, "\n\t:\u00e9\u7ea2 Red"], trainer)
    built.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", built.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token=END, unk_token="<unk>", pad_token="<unk>"
    )


KINDS = ["bytes", "llama", "first", "unigram"]


@pytest.mark.parametrize("kind", KINDS)
@given(before=texts, prompt_end=texts, responses=st.lists(texts, min_size=1, max_size=3), adds=st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_text_becomes_the_same_tokens(
    kind: str, before: str, prompt_end: str, responses: list[str], adds: bool
) -> None:
    """Also if the prompt ends in half a token, or a response begins with the other half."""
    tokenize = response_tokenizer(made(kind), PROMPT)
    assert tokenize.fast
    prompt = f"{before}{START}{prompt_end}"
    assert tokenize(prompt, responses, adds) == ResponseTokenizer(made(kind))(prompt, responses, adds)


def test_a_token_that_spans_prompt_and_response_is_found() -> None:
    """ "red" after "the " of the prompt: with an ordinary tokenizer a space goes with the word that follows it."""
    words = tokenizer()
    prompt, responses = f"{START}user\nred{END}\n{START}the ", ["red", "\n"]
    plain, fast = ResponseTokenizer(words), response_tokenizer(words, PROMPT)
    assert plain(prompt, responses, False)[0] is None
    assert fast(prompt, responses, False) == plain(prompt, responses, False)


def test_only_the_prompts_end_is_read_again() -> None:
    """The benchmark shows that it is faster; here, that the tokenizer gets less to read."""
    read: list[str] = []

    def listening(texts: list[str], **settings: Any) -> Any:
        read.extend(texts)
        return tokenizer()(texts, **settings)

    ResponseTokenizer(listening, seam=START)(PROMPT, ["red", "blue"], True)
    end = f"{START}assistant\n"
    assert read == [end, f"{end}red", f"{end}blue"]


def test_a_prompt_without_the_seam_is_read_whole() -> None:
    plain, fast = ResponseTokenizer(tokenizer()), ResponseTokenizer(tokenizer(), fast=True, seam=START)
    assert fast("how many? ", ["two", "three"], True) == plain("how many? ", ["two", "three"], True)


def test_padding_and_cutting_of_other_calls_have_no_effect_and_are_kept() -> None:
    words = made("first")
    cutting: dict[str, Any] = {"padding": "max_length", "max_length": 6, "truncation": True}
    padded = words(["red", PROMPT], **cutting).data
    plain = ResponseTokenizer(made("first"))(PROMPT, ["red"], True)
    words(["red"], **cutting)
    assert ResponseTokenizer(words, fast=True, seam=START)(PROMPT, ["red"], True) == plain
    assert words(["red", PROMPT], **cutting).data == padded


# ---- tokenizers that are left alone ----


class Contextual(PreTrainedTokenizerFast):
    """Reads what follows by what it has read long before."""

    def _encode_plus(self, text: Any, *args: Any, **settings: Any) -> Any:
        return super()._encode_plus(
            [one.replace("red", "blue") if "user" in one else one for one in text], *args, **settings
        )


def test_a_tokenizer_that_depends_on_earlier_text_reads_whole_prompts() -> None:
    odd = Contextual(tokenizer_object=tokenizer().backend_tokenizer, eos_token=END, pad_token="<|endoftext|>")
    assert response_tokenizer(odd, PROMPT) == ResponseTokenizer(odd)


def test_tokens_that_may_be_missed_are_no_seam() -> None:
    """One that is found between words only does not cut "x<end>y"."""
    built = Tokenizer.from_str(tokenizer().backend_tokenizer.to_str())
    built.add_tokens([AddedToken("<end>", single_word=True, normalized=False), AddedToken("<low>", normalized=True)])
    words = PreTrainedTokenizerFast(tokenizer_object=built, eos_token=END, pad_token="<|endoftext|>")
    fast = response_tokenizer(words, f"{START}user\nred?{END}\n<end> <low> ")
    assert (fast.fast, fast.seam) == (True, END)
    prompt, unmarked = "red? <end> ", response_tokenizer(words, "red? <end> ")
    assert (unmarked.fast, unmarked.seam) == (True, None)
    assert unmarked(prompt, ["blue", "<end>red"], True) == ResponseTokenizer(words)(prompt, ["blue", "<end>red"], True)


# ---- in the encoder ----


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
@given(
    response=texts.filter(lambda text: text.strip() and "<" not in text), question=texts.filter(lambda t: "<" not in t)
)
@settings(max_examples=10, deadline=None)
def test_families_read_responses_fast_and_alike(family: Family, response: str, question: str) -> None:
    plain, fast = encoders(family.name)
    assert not plain._tokenize_responses.fast
    assert fast._tokenize_responses.fast
    pair = PreferencePair((Message("user", f"what? {question}"),), (), f" {response}", f"{response}\nno")
    one, other = (encoder.encode(pair) for encoder in (plain, pickle.loads(pickle.dumps(fast))))
    assert one.chosen_ids.tolist() == other.chosen_ids.tolist()
    assert one.rejected_ids is not None
    assert other.rejected_ids is not None
    assert one.rejected_ids.tolist() == other.rejected_ids.tolist()


@functools.cache
def encoders(family: str) -> tuple[PairEncoder, PairEncoder]:
    plain, fast = (PairEncoder(FAMILIES[family].processor()) for _ in range(2))
    plain._tokenize_responses = ResponseTokenizer(plain._tokenizer)
    return plain, fast


def test_it_reads_through_the_users_tokenizer() -> None:
    assert PairEncoder(processor())._tokenize_responses.tokenizer is processor().tokenizer
