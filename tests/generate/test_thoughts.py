"""Sampled text is recorded as it was sampled: thoughts that the prompt opens, special tokens of answers, cut ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chat_server import Reply, Seen, chat_server, says
from tests.tiny_models import SIZE
from tests.zoo.templates import ANSWER_TOKENS, OPENING, STYLES, processor
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.records import Message, PreferencePair, Question
from vlmpo.errors import RecordError
from vlmpo.evaluate import answer_questions
from vlmpo.generate.base import Generated, GenerationRequest, Sampling
from vlmpo.generate.local import LocalEngine
from vlmpo.generate.responses import open_responses, read_responses
from vlmpo.generate.server import ServerEngine
from vlmpo.testing.tiny import build_model

OTHER_STYLES = ["chatml", "llama3", "mistral"]


def request(prefix: str = "", in_thinking: bool = False, n: int = 1) -> GenerationRequest:
    return GenerationRequest((Message("user", "how many?"),), (), n, 3, prefix, "q:1", in_thinking)


def scripted(style: str, text: str) -> tuple[Any, list[int]]:
    """A model that writes ``text`` after any prompt, token by token, and the tokens."""
    tokens = processor(style).tokenizer
    ids = PairEncoder(processor(style)).ids_after_prompt(text)
    model = build_model(tokens, SIZE)
    start: list[int] = []

    def say(module: Any, arguments: Any, keywords: Any, output: Any) -> Any:
        """Put everything on the token that comes next after those already written."""
        position = keywords["cache_position"][-1].item() if keywords.get("cache_position") is not None else len(start)
        if not start:
            start.append(position)
        at = len(start) - 1
        start.append(position)
        output.logits[:, -1] = -1000.0
        output.logits[:, -1, ids[min(at, len(ids) - 1)]] = 1000.0
        return output

    model.register_forward_hook(say, with_kwargs=True)
    return model, ids


def sampled(style: str, text: str, prefix: str = "", new: int | None = None) -> Generated:
    model, ids = scripted(style, text)
    engine = LocalEngine(model, processor(style), Sampling(0.0, max_new_tokens=new or len(ids)))
    ((answer,),) = engine.generate([request(prefix)])
    return answer


# ---- this process ----


@pytest.mark.parametrize("style", [*OTHER_STYLES, *OPENING])
def test_special_tokens_of_answers_are_kept(style: str) -> None:
    text = f"red {' circle '.join(ANSWER_TOKENS)}<box>"
    answer = sampled(style, text + STYLES[style].end)
    assert (answer.text, answer.finish_reason) == (text, "stop")


@pytest.mark.parametrize(
    ("style", "token"), [("chatml", "<|im_start|>"), ("llama3", "<|start_header_id|>"), ("r1", "<|User|>")]
)
def test_control_tokens_are_left_out(style: str, token: str) -> None:
    """No text to train on may hold them."""
    assert sampled(style, f"red{token} circle{STYLES[style].end}").text == "red circle"


@pytest.mark.parametrize("style", [*OTHER_STYLES, *OPENING])
@pytest.mark.parametrize("text", ["I see.\n</think>\n\nThree", " red", "three circles, then", "\nred"])
def test_what_was_sampled_trains_as_it_was_sampled(style: str, text: str) -> None:
    """The tokens drawn are the tokens scored: finished with the end of turn, cut without."""
    end = STYLES[style].end
    finished, cut = sampled(style, text + end), sampled(style, text)
    assert (finished.finish_reason, cut.finish_reason) == ("stop", "length")
    pair = PreferencePair(
        (Message("user", "how many?"),), (), finished.text, f"{cut.text}", as_sampled=True, rejected_complete=False
    )
    encoded = PairEncoder(processor(style)).encode(pair)
    ids = PairEncoder(processor(style)).ids_after_prompt
    assert encoded.rejected_ids is not None
    assert encoded.chosen_ids.tolist() == ids(text + end)
    assert encoded.rejected_ids.tolist() == ids(text)


@pytest.mark.parametrize("style", OPENING)
def test_an_answer_within_the_thought_is_known_as_such(style: str) -> None:
    end = STYLES[style].end
    assert sampled(style, "the answer is 3").in_thought
    assert sampled(style, f"the answer is 3{end}").in_thought
    assert not sampled(style, f"I see.</think>3{end}").in_thought
    assert not sampled(style, f" and so on.</think>3{end}", prefix="I see").in_thought
    assert not sampled(style, f" 3{end}", prefix="I see.</think>").in_thought
    assert sampled(style, f" 3{end}", prefix="I see").in_thought


@pytest.mark.parametrize("style", OTHER_STYLES)
def test_without_an_opened_thought_there_is_none(style: str) -> None:
    assert not sampled(style, "the answer is 3").in_thought


@pytest.mark.parametrize("style", OPENING)
def test_no_answer_is_read_in_a_thought_in_evaluations(style: str) -> None:
    asked = [Question("q", (), "how many?", "3", "number")]

    def verdict(text: str) -> str:
        model, ids = scripted(style, text)
        engine = LocalEngine(model, processor(style), Sampling(0.0, max_new_tokens=len(ids)))
        ((answer,), _) = answer_questions(engine, asked, "{question}")
        return answer.verdict.status

    assert verdict("Final answer: 3") == "unparsed"
    assert verdict("I see.</think>Final answer: 3") == "correct"


@pytest.mark.parametrize("style", [*OTHER_STYLES, *OPENING])
def test_a_prefix_is_tokenised_as_in_training(style: str) -> None:
    """The model reads the prompt and the prefix as training reads the prompt and the response's beginning."""
    seen: list[torch.Tensor] = []
    model = build_model(processor(style).tokenizer, SIZE)
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True)
    engine = LocalEngine(model, processor(style), Sampling(0.0, max_new_tokens=1))
    for prefix in ("I see", " two", "I see.</think>\n\nThr", "\n"):
        if not prefix.strip():
            continue
        list(engine.generate([request(prefix)]))
        pair = PreferencePair((Message("user", "how many?"),), (), prefix, None, as_sampled=True, chosen_complete=False)
        encoded = PairEncoder(processor(style), need_rejected=False).encode(pair)
        assert seen[-1][0].tolist() == [*encoded.prompt_ids.tolist(), *encoded.chosen_ids.tolist()]


def test_a_first_space_is_kept_by_tokenizers_that_drop_it() -> None:
    """As Llama's: a text decoded alone loses the space it begins with."""
    import copy

    from tokenizers import decoders

    own = copy.copy(processor("vicuna"))
    own.tokenizer = copy.deepcopy(own.tokenizer)
    own.tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    ids = PairEncoder(own).ids_after_prompt(" red</s>")
    assert own.tokenizer.decode(ids[:-1]) == "red"
    model, _ = scripted("vicuna", " red</s>")
    ((answer,),) = LocalEngine(model, own, Sampling(0.0, max_new_tokens=len(ids))).generate([request()])
    assert answer.text == " red"


# ---- the file of responses ----


def test_a_response_that_is_all_thought_is_marked_in_the_file(tmp_path: Path) -> None:
    path, settings = tmp_path / "responses.jsonl", {"prompt": "cot", "seed": 0}
    with open_responses(path, "m", settings) as file:
        file.append("q", [Generated("I see", "length", in_thought=True), Generated("I.</think>3", "stop")], "abc")
    first, second = read_responses(path)
    assert first.settings == {**settings, "prompt_hash": "abc", "in_thought": True}
    assert second.settings == {**settings, "prompt_hash": "abc"}
    with open_responses(path, "m", settings) as file:  # no other setting: the run goes on
        assert file.done == {"q": {0, 1}}
    assert json.loads(path.read_text().splitlines()[1])["settings"] == {**settings, "prompt_hash": "abc"}


# ---- a server ----


def served(url: str) -> ServerEngine:
    return ServerEngine(url, "m", Sampling(0.7, 0.9, 20), timeout=5.0)


def test_a_server_is_asked_for_special_tokens() -> None:
    with chat_server(lambda *_: says("<ref>a</ref>")) as there:
        engine = served(there.url)
        assert list(engine.generate([request()])) == [[Generated("<ref>a</ref>", "stop")]]
    assert there.seen[0].payload["skip_special_tokens"] is False
    assert engine.notices == []


@pytest.mark.parametrize(
    "refusal",
    [
        Reply({"detail": "Unexpected fields in the request: {'skip_special_tokens'}"}, 422),
        Reply({"error": {"message": "Unrecognized request argument supplied: skip_special_tokens"}}, 400),
        Reply({"detail": [{"type": "extra_forbidden", "loc": ["body", "skip_special_tokens"]}]}, 422),
    ],
)
def test_a_server_that_does_not_know_how_is_asked_without_and_told_of(refusal: Reply) -> None:
    def answer(seen: Seen, _: int) -> Reply:
        return refusal if "skip_special_tokens" in seen.payload else says("yes")

    with chat_server(answer) as there:
        engine = served(there.url)
        answers = list(engine.generate([request(n=2), request()]))
    assert answers == [[Generated("yes", "stop")] * 2, [Generated("yes", "stop")]]
    (notice,) = engine.notices
    assert "special tokens of its responses (of thoughts, tools, grounding) may be missing" in notice


@pytest.mark.parametrize("prefix", ["I see", "I see.</think>\n\nThree", "<think>I"])
def test_a_server_cannot_continue_a_turn_with_a_thought(prefix: str) -> None:
    with chat_server(lambda *_: says("yes")) as there:
        refused, answered = served(there.url).generate([request(prefix, in_thinking=True), request("I see")])
    assert isinstance(refused, RecordError)
    assert (refused.reason, refused.origin) == ("thought_on_server", "q:1")
    assert answered == [Generated("yes", "stop")]
    assert len(there.seen) == 1
