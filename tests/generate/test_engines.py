"""Engines: the same tokens as transformers' own generate, draws that depend on nothing else, a server that fails."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.chat_server import HANG_UP, Reply, Seen, chat_server, says
from tests.tiny_models import model, noise_image, processor
from vlmpo.data.records import Message
from vlmpo.errors import RecordError, RunError
from vlmpo.generate import local as engines
from vlmpo.generate import server
from vlmpo.generate.base import Generated, GenerationRequest, Result, Sampling
from vlmpo.generate.local import LocalEngine, draw_tokens
from vlmpo.generate.server import ServerEngine
from vlmpo.models.families import Family
from vlmpo.tree.forward import install

GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
MEDIA = ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"]
TILES = 2  # what tests.tiny_models' processor allows an image by itself


def request(text: str, *images: Any, n: int = 1, seed: int = 0, prefix: str = "", origin: str = "q:1") -> Any:
    return GenerationRequest((Message("user", text),), images, n, seed, prefix, origin)


def requests(n: int = 1) -> list[GenerationRequest]:
    """One image in three tiles, none, two images of a tile each, one image; every one with a seed of its own."""
    wide, small, other = noise_image(120, 56, 1), noise_image(50, 50, 2), noise_image(60, 60, 3)
    return [
        request("<image>\nwhat is it?", wide, n=n, seed=11),
        request("how many red shapes are in the picture?", n=n, seed=12),
        request("is <image>\n like <image>\n?", small, other, n=n, seed=13),
        request("look: <image>\n what colour is it?", small, n=n, seed=14),
    ]


def engine(policy: Any = None, sampling: Sampling = GREEDY, batch_size: int = 8) -> LocalEngine:
    return LocalEngine(
        model() if policy is None else policy, processor(), sampling, batch_size, max_tiles=TILES, name="tiny"
    )


def by_transformers(policy: Any, asked: GenerationRequest) -> str:
    """The answer of generate() to inputs made by the processor alone, one prompt at a time."""
    content: list[dict[str, str]] = []
    for part in asked.messages[0].text.replace("<image>\n", "|I|").split("|"):
        content += [{"type": "image"}] if part == "I" else [{"type": "text", "text": part}] if part else []
    text = processor().apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor()(
        text=[text + asked.prefix],
        images=list(asked.images) or None,
        images_kwargs={"max_patches": max(1, TILES // max(1, len(asked.images)))},
        return_tensors="pt",
    )
    media = processor().tokenizer.convert_tokens_to_ids(MEDIA)
    ids = policy.generate(**inputs, do_sample=False, max_new_tokens=GREEDY.max_new_tokens, suppress_tokens=media)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return processor().tokenizer.decode(new, skip_special_tokens=True)


def head_says(policy: Any, token: str, logit: float = 1000.0, tools: Any = None) -> Any:
    """``policy`` with ``logit`` added at one token, always."""
    bias = torch.zeros(policy.lm_head.out_features)
    bias[(tools or processor()).tokenizer.convert_tokens_to_ids(token)] = logit
    policy.lm_head.bias = torch.nn.Parameter(bias)
    return policy


# ---- the local engine, token for token ----


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_answers_are_those_of_plain_generate(batch_size, seed):
    policy = model(seed)
    expected = [by_transformers(policy, asked) for asked in requests()]
    assert len(set(expected)) == 4
    answers = engine(policy, batch_size=batch_size).generate(requests())
    assert [answer.text for (answer,) in answers] == expected


def test_every_family_can_generate(monkeypatch):
    """Families that are not on the list go prompt by prompt, inputs repeated: slower, and the same responses."""
    sampling = Sampling(max_new_tokens=8)
    expected = list(engine(sampling=sampling, batch_size=1).generate(requests(3)))
    monkeypatch.setattr(engines, "family_of", lambda config: Family(config.model_type))
    other = engine(sampling=sampling)
    assert other.batch_size == 1
    assert list(other.generate(requests(3))) == expected


def test_the_attention_for_branches_generates_the_same():
    expected = list(engine().generate(requests()))
    policy = model()
    install(policy, shared=True)
    assert list(engine(policy).generate(requests())) == expected


def test_a_lora_adapter_takes_part():
    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    merged = get_peft_model(model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    merged.load_state_dict(policy.state_dict())
    expected = [by_transformers(merged.merge_and_unload(), asked) for asked in requests()]
    assert [answer.text for (answer,) in engine(policy).generate(requests())] == expected
    assert expected != [answer.text for (answer,) in engine().generate(requests())]


def test_images_are_encoded_once_for_all_samples():
    policy = model()
    seen: list[int] = []
    policy.model.vision_tower.register_forward_hook(
        lambda _, __, kwargs, ___: seen.append(kwargs["pixel_values"].shape[0]), with_kwargs=True
    )
    answers = list(engine(policy, Sampling(max_new_tokens=6)).generate(requests(n=5)))
    assert [len(answer) for answer in answers] == [5, 5, 5, 5]
    assert seen == [3 + 2 + 1]  # two tiles and a thumbnail, two images, one image; not five times as many


def test_a_begun_turn_is_continued():
    asked = [request("<image>\nwhat is it?", noise_image(50, 50, 2), prefix="the answer is"), request("how many?")]
    policy = model()
    expected = [by_transformers(policy, one) for one in asked]
    assert [answer.text for (answer,) in engine(policy).generate(asked)] == expected
    assert expected[0] != by_transformers(policy, request("<image>\nwhat is it?", noise_image(50, 50, 2)))


def test_a_continuation_keeps_the_space_it_begins_with():
    """The demo's tokenizer writes a space between words and none before the first."""
    from vlmpo.demo.model import demo_model, demo_processor

    tools = demo_processor()
    policy = head_says(demo_model(tools, 0), "plus", tools=tools)
    begun = request("Count", prefix="Final answer: 3")
    ((answer,),) = LocalEngine(policy, tools, Sampling(0.0, max_new_tokens=2)).generate([begun])
    assert answer.text == " plus plus"


# ---- how a response ends, and what it may not hold ----


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_new_tokens=12)])
def test_why_a_response_ends(sampling):
    ends = head_says(model(), "<|im_end|>")
    assert next(iter(engine(ends, sampling).generate(requests(2)))) == [Generated("", "stop")] * 2
    never = head_says(model(), "<|im_end|>", -1000.0)
    (answer, _) = next(iter(engine(never, sampling).generate(requests(2))))
    assert answer.finish_reason == "length"
    assert answer.text


def test_the_template_ends_a_turn_even_where_the_models_settings_do_not_know():
    policy = head_says(model(), "<|im_end|>")
    policy.generation_config.eos_token_id = None
    assert next(iter(engine(policy).generate(requests()))) == [Generated("", "stop")]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("token", MEDIA)
def test_image_tokens_are_never_generated(token, temperature):
    sampling = Sampling(temperature, max_new_tokens=3)
    plain = list(engine(sampling=sampling).generate(requests(2)))
    assert list(engine(head_says(model(), token), sampling).generate(requests(2))) == plain


def test_the_models_own_generation_settings_are_left_out_and_left_alone():
    policy = model()
    policy.generation_config.update(repetition_penalty=5.0, max_length=3, top_k=1, temperature=0.01, do_sample=True)
    before = policy.generation_config.to_dict()
    for sampling in (GREEDY, Sampling(max_new_tokens=6)):
        expected = list(engine(sampling=sampling).generate(requests(2)))
        assert list(engine(policy, sampling).generate(requests(2))) == expected
    assert policy.generation_config.to_dict() == before


def test_training_goes_on_undisturbed():
    policy = model().train()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    list(engine(policy, Sampling(max_new_tokens=6)).generate(requests(2)))
    assert torch.equal(torch.rand(4), expected)
    assert policy.training
    assert policy.model.vision_tower.training


# ---- drawing ----


def test_a_draw_by_hand():
    """Cumulated 0.5, 0.8, 1.0; at temperature 0.5 the squares 25, 9, 4 of 38; at top_p 0.75 the first two of 0.8."""
    scores = torch.tensor([[0.5, 0.3, 0.2]]).log()

    def drawn(number: float, *sampling: float) -> int:
        return int(draw_tokens(scores, torch.tensor([number], dtype=torch.float64), Sampling(*sampling)))

    assert [drawn(u, 1.0) for u in (0.0, 0.499, 0.501, 0.799, 0.801, 0.999)] == [0, 0, 1, 1, 2, 2]
    edges = (25 / 38, 34 / 38)
    assert [drawn(u, 0.5) for u in (edges[0] - 1e-6, edges[0] + 1e-6, edges[1] - 1e-6, edges[1] + 1e-6)] == [0, 1, 1, 2]
    assert [drawn(u, 1.0, 0.75) for u in (0.624, 0.626, 0.999)] == [0, 1, 1]
    assert [drawn(u, 1.0, 0.5) for u in (0.0, 0.999)] == [0, 0]


def test_what_has_no_probability_is_never_drawn():
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 4)
    numbers = torch.tensor([0.0, 0.5 - 1e-12, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(scores, numbers, Sampling()).tolist() == [1, 1, 3, 3]


def test_first_tokens_are_distributed_as_the_model_says():
    policy, count = model(), 6000
    asked = request("what is it?", n=count)
    texts = [a.text for a in next(iter(engine(policy, Sampling(0.7, max_new_tokens=1)).generate([asked])))]
    prompt = processor().apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "what is it?"}]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        logits = policy(**prompt).logits[0, -1].double() / 0.7
    logits[processor().tokenizer.convert_tokens_to_ids(MEDIA)] = -torch.inf
    expected: dict[str, float] = {}
    for token, probability in enumerate(logits.softmax(0).tolist()):
        text = processor().tokenizer.decode([token], skip_special_tokens=True)
        expected[text] = expected.get(text, 0.0) + probability
    distance = sum(abs(texts.count(text) / count - p) for text, p in expected.items()) / 2
    # A fair draw's own noise is about sum of sqrt(p (1 - p) / (2 pi count)), here some 0.07.
    noise = sum((p * (1 - p) / (2 * np.pi * count)) ** 0.5 for p in expected.values())
    assert distance < 1.3 * noise
    assert max(expected.values()) < 0.5


def test_a_questions_samples_depend_on_nothing_else():
    sampling = Sampling(max_new_tokens=10)
    alone = [next(iter(engine(sampling=sampling).generate([one]))) for one in requests(4)]
    assert list(engine(sampling=sampling).generate(requests(4))) == alone
    assert list(engine(sampling=sampling, batch_size=3).generate(requests(4)[::-1])) == alone[::-1]
    more = list(engine(sampling=sampling).generate(requests(6)))
    assert [texts[:4] for texts in more] == alone
    assert all(len({answer.text for answer in texts}) == 6 for texts in more)
    torch.manual_seed(99)
    assert list(engine(sampling=sampling).generate(requests(4))) == alone


def test_another_seed_draws_other_samples():
    asked = [request("what is it?", n=4, seed=seed) for seed in (1, 1, 2)]
    one, same, other = engine(sampling=Sampling(max_new_tokens=10)).generate(asked)
    assert one == same
    assert not {a.text for a in one} & {a.text for a in other}


def test_requests_of_different_numbers_of_samples_share_a_batch():
    asked = [request("what is it?", n=1, seed=1), request("how?", n=3, seed=2), request("who?", n=1, seed=3)]
    answers = list(engine(sampling=Sampling(max_new_tokens=5)).generate(asked))
    assert [len(texts) for texts in answers] == [1, 3, 1]
    assert answers == [next(iter(engine(sampling=Sampling(max_new_tokens=5)).generate([one]))) for one in asked]


# ---- requests that cannot be asked ----


def bad_requests() -> list[GenerationRequest]:
    good = requests()
    return [
        good[0],
        request("<image>\nwhat?", "no/such.png", origin="q:2"),
        request("<image>\nwhat?", b"no picture", origin="q:3"),
        request("<image>\nwhat?", origin="q:4"),
        good[1],
    ]


def reasons(results: Iterable[Result]) -> list[tuple[str, str]]:
    return [(error.origin, error.reason) for error in results if isinstance(error, RecordError)]


REASONS = [("q:2", "missing_image"), ("q:3", "undecodable_image"), ("q:4", "placeholder_mismatch")]


def test_bad_requests_are_reported_and_the_others_answered():
    first, *bad, last = engine().generate(bad_requests())
    assert [first, last] == list(engine().generate([bad_requests()[0], bad_requests()[-1]]))
    assert reasons(bad) == REASONS
    assert str(bad[0]).startswith("q:2: image no/such.png does not exist")
    assert reasons(engine().generate(bad_requests()[1:4])) == REASONS
    assert reasons(engine().generate([request("what is <IMG_CONTEXT>?")])) == [("q:1", "control_token_in_text")]


# ---- the server engine ----


@pytest.fixture(autouse=True)
def quick_tries(monkeypatch):
    monkeypatch.setattr(server, "_FIRST_DELAY", 0.01)


def served(url: str, sampling: Sampling | None = None, **settings: Any) -> ServerEngine:
    return ServerEngine(url, "m", sampling or Sampling(0.7, 0.9, 20), **{"timeout": 5.0, **settings})


def test_what_a_server_is_asked(monkeypatch):
    monkeypatch.setenv("VLMPO_API_KEY", "secret")
    picture, other = noise_image(30, 20, 1), noise_image(10, 10, 2)
    asked = request("see <image>\nand <image>\n: same?", picture, other, n=3, seed=5, prefix="They")
    with chat_server(lambda seen, number: says(f"{seen.payload['seed']}", "length")) as there:
        (answers,) = served(there.url + "/v1/").generate([asked])
    seeds = [seen.payload.pop("seed") for seen in there.seen]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sorted(answer.text for answer in answers) == sorted(map(str, seeds))
    assert {answer.finish_reason for answer in answers} == {"length"}
    first = there.seen[0]
    assert first.path == "/v1/chat/completions"
    assert first.headers["Authorization"] == "Bearer secret"
    (turn, begun) = first.payload.pop("messages")
    assert first.payload == {
        "model": "m",
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 20,
        "skip_special_tokens": False,
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    assert begun == {"role": "assistant", "content": "They"}
    kinds = [item["type"] for item in turn["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    assert [item["text"] for item in turn["content"] if item["type"] == "text"] == ["see ", "and ", ": same?"]
    sent = [item["image_url"]["url"] for item in turn["content"] if item["type"] == "image_url"]
    for url, image in zip(sent, (picture, other), strict=True):
        head, data = url.split(",")
        assert head == "data:image/png;base64"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), np.asarray(image))


def test_a_prompt_without_images_is_plain_text():
    with chat_server(lambda *_: says("yes")) as there:
        assert list(served(there.url).generate([request("well?")])) == [[Generated("yes", "stop")]]
    assert there.seen[0].payload["messages"] == [{"role": "user", "content": "well?"}]
    assert "Authorization" not in there.seen[0].headers


def test_seeds_do_not_depend_on_what_else_is_asked():
    def ask(count: int) -> set[int]:
        with chat_server(lambda *_: says("yes")) as there:
            list(served(there.url).generate([request("well?", n=2, seed=s) for s in range(count)]))
        return {seen.payload["seed"] for seen in there.seen}

    few, many = ask(3), ask(6)
    assert len(few) == 6
    assert few < many


@pytest.mark.parametrize(
    "failure",
    [Reply("busy", 503), Reply("slow down", 429, {"Retry-After": "0"}), Reply("broken", 500), HANG_UP],
    ids=["503", "429", "500", "hang-up"],
)
def test_what_may_pass_is_tried_again(failure):
    with chat_server(lambda _, number: failure if number < 3 else says("at last")) as there:
        assert list(served(there.url, retries=3).generate([request("well?")])) == [[Generated("at last", "stop")]]
    assert len(there.seen) == 4
    assert len({seen.payload["seed"] for seen in there.seen}) == 1


def test_a_silent_server_is_tried_again():
    def answer(_: Seen, number: int) -> Reply:
        if number == 0:
            time.sleep(1.0)
        return says(f"{number}")

    with chat_server(answer) as there:
        assert list(served(there.url, timeout=0.2).generate([request("well?")])) == [[Generated("1", "stop")]]


def test_a_server_that_stays_away():
    busy = r"in 3 tries \(the last: status 503: .*still loading.*start again"
    with chat_server(lambda *_: Reply("still loading", 503)) as there, pytest.raises(RunError, match=busy):
        list(served(there.url, retries=2).generate([request("well?")]))
    with pytest.raises(RunError, match=r"in 2 tries \(the last: .*refused"):
        list(served(there.url, retries=1).generate([request("well?")]))


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply({"error": "no key"}, 401), "status 401: .*no key.*; check VLMPO_API_KEY"),
        (Reply({"error": "no such model"}, 404), "no such model.*; check build.engine and build.model"),
        (Reply(b"<html>"), "does not answer in JSON"),
        (Reply({"hello": 1}), "is not an OpenAI-compatible chat server: it answered {'hello': 1}"),
        (says("3", reasoning_content="so it must be"), "without a reasoning parser"),
    ],
)
def test_what_no_further_try_can_mend(reply, words):
    with chat_server(lambda *_: reply) as there, pytest.raises(RunError, match=words):
        list(served(there.url).generate([request("well?")]))
    assert len(there.seen) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_the_server_refuses_is_that_records_fault(status):
    def answer(seen: Seen, _: int) -> Reply:
        is_long = "long" in seen.payload["messages"][0]["content"]
        return Reply({"message": "context is 8192"}, status) if is_long else says("yes")

    asked = [request("one?"), request("long", n=2, origin="q:2"), request("three?")]
    with chat_server(answer) as there:
        first, bad, last = served(there.url).generate(asked)
    assert first == last == [Generated("yes", "stop")]
    assert reasons([bad]) == [("q:2", "server_refused")]
    assert str(bad).startswith("q:2: ")
    assert "context is 8192" in str(bad)


def test_a_server_gets_no_bad_request():
    with chat_server(lambda *_: says("yes")) as there:
        first, *bad, last = served(there.url).generate(bad_requests())
    assert first == last == [Generated("yes", "stop")]
    assert len(bad) == 3
    assert reasons(bad) == REASONS
    assert len(there.seen) == 2


def test_answers_come_in_order_and_so_many_at_a_time():
    running, most, lock = 0, 0, threading.Lock()

    def answer(seen: Seen, number: int) -> Reply:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.2 if number == 0 else 0.02)
        with lock:
            running -= 1
        return says(seen.payload["messages"][0]["content"])

    with chat_server(answer) as there:
        asked = [request(f"{number}") for number in range(20)]
        answers = served(there.url, concurrency=4).generate(asked)
        assert [texts[0].text for texts in answers] == [str(number) for number in range(20)]
    assert most == 4


def test_a_server_is_not_flooded():
    """One slow answer holds the others back: what is done but not handed over stays little."""
    gate = threading.Event()

    def answer(_: Seen, number: int) -> Reply:
        if number == 0:
            gate.wait(5.0)
        return says("yes")

    with chat_server(answer) as there:
        answers = served(there.url, concurrency=2).generate([request("well?") for _ in range(50)])
        threading.Timer(0.5, gate.set).start()
        next(iter(answers))
        assert len(there.seen) <= 6
        assert len(list(answers)) == 49


def test_the_only_model_of_a_server():
    def models(*names: str) -> Any:
        return lambda *_: Reply({"data": [{"id": name} for name in names]})

    with chat_server(models("some/vlm")) as there:
        assert ServerEngine(there.url, None, GREEDY).name == "some/vlm"
    assert there.seen[0].path == "/v1/models"
    with chat_server(models("a", "b")) as there, pytest.raises(RunError, match=r"it has a, b; set build\.model"):
        ServerEngine(there.url, None, GREEDY)
