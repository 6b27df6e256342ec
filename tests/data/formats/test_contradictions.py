"""Records that say one thing twice: fine if both say the same, else refused by name. What they say of completeness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.formats.test_formats import SAME, format_of, only, open_records, open_text, refused, said
from tests.paths import REPO
from vlmpo.data.formats import FORMATS, RecordContext, as_pairs
from vlmpo.errors import RecordError

CONTEXT = RecordContext("f:1")
TURNS = [said("system", "Be brief."), said("user", "Q?"), said("assistant", "Hm?"), said("user", "And?")]


def reason(name: str, record: dict[str, Any], **context: Any) -> str:
    with pytest.raises(RecordError) as caught:
        FORMATS[name].parse(record, RecordContext("f:1", **context))
    return caught.value.reason


# --- prompts


def whole(name: str, **more: Any) -> dict[str, Any]:
    """A record whose conversation is whole, with answers "good" and "bad"."""
    good, bad = said("assistant", "good"), said("assistant", "bad")
    return {
        "trl": {"chosen": [*TURNS, good], "rejected": [*TURNS, bad]},
        "trl_implicit": {"chosen": [*TURNS, good], "rejected": [*TURNS, bad]},
        "sharegpt": {"conversations": TURNS, "chosen": good, "rejected": bad},
        "swift": {"messages": [*TURNS, good], "rejected_response": "bad"},
    }[name] | more


@pytest.mark.parametrize("name", ["trl", "trl_implicit", "sharegpt", "swift"])
def test_a_prompt_that_agrees_is_fine(name: str) -> None:
    expected = FORMATS[name].parse(whole(name), CONTEXT)
    for prompt in (None, "", "Q?", " And?\n", "<image>\nQ?", TURNS, TURNS[1:], "Q? And?", "Be brief.\nQ?\nHm?\nAnd?"):
        assert FORMATS[name].parse(whole(name, prompt=prompt), CONTEXT) == expected


@pytest.mark.parametrize("name", ["trl", "trl_implicit", "sharegpt", "swift"])
@pytest.mark.parametrize(
    "prompt", ["other thing entirely", "Hm?", TURNS[:2], [said("user", "Why?")], said("user", "Why?"), "Q"]
)
def test_a_prompt_that_contradicts_is_refused(name: str, prompt: Any) -> None:
    assert reason(name, whole(name, prompt=prompt)) == "prompts_differ"


def test_a_prompt_of_another_kind_is_refused() -> None:
    assert reason("trl_implicit", whole("trl_implicit", prompt=3)) == "missing_field"
    texts = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert FORMATS["trl_implicit"].parse({**texts, "prompt": "The sky is"}, CONTEXT).chosen == " blue."
    assert reason("trl_implicit", {**texts, "prompt": "The sea is"}) == "prompts_differ"


def test_messages_as_prompt_beside_whole_conversations(tmp_path: Path) -> None:
    data = open_records(tmp_path, whole("trl_implicit", prompt=TURNS), whole("trl_implicit", prompt=TURNS[:1]))
    assert (format_of(data), data[0].chosen, data[0].rejected) == ("trl_implicit", "good", "bad")
    assert refused(data, 1)[0] == "prompts_differ"


def test_ultrafeedback_is_read() -> None:
    question = said("user", "Q?")
    record = {
        "prompt": "Q?",
        "prompt_id": "17",
        "chosen": [question, said("assistant", "good")],
        "rejected": [question, said("assistant", "bad")],
        "messages": [question, said("assistant", "good")],
        "score_chosen": 8.0,
        "score_rejected": 2.0,
    }
    pair = as_pairs([record])[0]
    assert ([turn.text for turn in pair.prompt], pair.chosen, pair.rejected) == (["Q?"], "good", "bad")


# --- two fields for one thing


@pytest.mark.parametrize(
    ("name", "more", "keys"),
    [
        ("trl", {"completion": "other"}, "`chosen` and `completion`"),
        ("trl", {"rejected_response": "other"}, "`rejected` and `rejected_response`"),
        ("trl_implicit", {"completion": [said("assistant", "other")]}, "`chosen` and `completion`"),
        ("alpaca", {"output": "other"}, "`chosen` and `output`"),
        ("mmpr", {"completion": "other"}, "`chosen` and `completion`"),
        ("sharegpt", {"messages": [said("user", "Why?")]}, "`conversations` and `messages`"),
        ("sharegpt", {"rejected_response": "other"}, "`rejected` and `rejected_response`"),
        (
            "swift",
            {"rejected_messages": [said("user", "<image>what colour is it?"), said("assistant", "other")]},
            "`rejected_response` and `rejected_messages`",
        ),
        ("swift", {"rejected": "other"}, "`rejected` and `rejected_response`"),
        ("mmpr", {"images": ["b.png"]}, "`image` and `images`"),
        ("rlhf_v", {"chosen": "other"}, "`chosen` beside `text` and in it"),
    ],
)
def test_two_fields_that_differ_are_refused(name: str, more: dict[str, Any], keys: str) -> None:
    with pytest.raises(RecordError) as caught:
        FORMATS[name].parse({**SAME[name], **more}, CONTEXT)
    assert (caught.value.reason, keys in caught.value.detail) == ("ambiguous_field", True)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("trl", {"completion": "the colour is green"}),
        ("trl", {"completion": [said("assistant", "the colour is green")]}),
        ("alpaca", {"output": "the colour is green"}),
        ("alpaca", {"output": ""}),
        ("sharegpt", {"messages": [said("user", "<image>what colour is it?")]}),
        ("swift", {"rejected_messages": [said("user", "<image>what colour is it?"), said("assistant", "not blue")]}),
        ("mmpr", {"output": {"tokens": 3}}),
    ],
)
def test_two_fields_that_say_the_same_are_fine(name: str, more: dict[str, Any]) -> None:
    pair = FORMATS[name].parse({**SAME[name], **more}, CONTEXT)
    assert (pair.chosen, pair.rejected) == ("the colour is green", "not blue")


def test_in_fine_tuning_the_rejected_response_may_contradict_itself() -> None:
    record = {**SAME["trl"], "rejected_response": "other"}
    assert FORMATS["trl"].parse(record, RecordContext("f:1", need_rejected=False)).rejected is None
    assert reason("trl", {**record, "completion": "other"}, need_rejected=False) == "ambiguous_field"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"question": "Q?", "question": "R?", "chosen": "a", "rejected": "b"}', "question"),
        ('{"question": "Q?", "chosen": "a", "rejected": "b", "chosen": "a"}', "chosen"),
        ('{"question": "Q?", "chosen": "a", "rejected": "b", "meta": {"n": [{"k": 1, "k": 2}]}}', "k"),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path: Path, line: str, key: str) -> None:
    good = '{"question": "Q?", "chosen": "a", "rejected": "b", "note": "{\\"k\\": 1, \\"k\\": 2}"}'
    for text, name in ((f"{good}\n{line}", "p.jsonl"), (f"[{good},\n{line}]", "p.json")):
        data = open_text(tmp_path, text, name)
        assert data[0].chosen == "a"
        assert refused(data, 1) == ("ambiguous_field", f"the key '{key}' is given twice; leave the one that is meant")


def test_a_key_given_twice_in_rlhf_v() -> None:
    assert reason("rlhf_v", {"text": '{"question": "Q?", "chosen": "a", "chosen": "b", "rejected": "c"}'}) == (
        "ambiguous_field"
    )


# --- other faults of single records


@pytest.mark.parametrize("history", [1, "x", {"a": 1}, [1], [["a"]], [["a", 2]], True])
def test_a_bad_history_is_one_bad_record(history: Any) -> None:
    record = {"instruction": "Q?", "input": "", "chosen": "a", "rejected": "b"}
    assert reason("alpaca", {**record, "history": history}) in ("bad_conversation", "missing_field")
    for nothing in (None, [], ""):
        assert FORMATS["alpaca"].parse({**record, "history": nothing}, CONTEXT).chosen == "a"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "bot", "content": "x"}, "is a turn of 'bot', which is not supported; known roles are system, user"),
        ({"role": "Human", "content": "x"}, "is a turn of 'Human'"),
        ({"role": "x" * 500, "content": "x"}, "is a turn of 'xxx"),
        ({"speaker": "human", "text": "x"}, "names no `role` or `from`, it holds `speaker`, `text`"),
    ],
)
def test_unknown_speakers_are_named(message: dict[str, Any], words: str) -> None:
    with pytest.raises(RecordError) as caught:
        FORMATS["trl"].parse({"prompt": [message], "chosen": "a", "rejected": "b"}, CONTEXT)
    assert (caught.value.reason, words in caught.value.detail) == ("bad_conversation", True)
    assert "x" * 81 not in caught.value.detail


def test_columns_of_messages_must_be_of_one_length() -> None:
    columns = {"from": ["human", "gpt", "human"], "value": ["Hi", "Hello"]}
    assert reason("sharegpt", {"conversations": columns, "chosen": "a", "rejected": "b"}) == "missing_field"


def test_a_swift_record_with_the_key_of_others_is_told() -> None:
    record = {"messages": [said("user", "Q?"), said("assistant", "red")], "rejected": "blue"}
    with pytest.raises(RecordError, match="`rejected_response` is missing; rename `rejected`"):
        FORMATS["swift"].parse(record, CONTEXT)


# --- completeness


@pytest.mark.parametrize("name", list(SAME))
def test_records_may_say_that_a_response_is_cut_off(tmp_path: Path, name: str) -> None:
    pair = only(open_records(tmp_path, {**SAME[name], "chosen_complete": True, "rejected_complete": False}))
    assert (pair.chosen_complete, pair.rejected_complete, pair.metadata) == (True, False, {})
    pair = only(open_records(tmp_path, {**SAME[name], "chosen_complete": None}))
    assert (pair.chosen_complete, pair.rejected_complete, pair.as_sampled) == (None, None, False)


@pytest.mark.parametrize("value", ["false", 0, 1.0, [], {}])
@pytest.mark.parametrize("key", ["chosen_complete", "rejected_complete"])
def test_completeness_is_true_or_false(key: str, value: Any) -> None:
    with pytest.raises(RecordError, match=f"`{key}` must be true or false") as caught:
        FORMATS["mmpr"].parse({**SAME["mmpr"], key: value}, CONTEXT)
    assert caught.value.reason == "missing_field"


def test_pair_files_hold_what_a_model_wrote(tmp_path: Path) -> None:
    written = (REPO / "tests" / "golden" / "files_of_0_1_0" / "pairs_correctness.jsonl").read_text().splitlines()
    data = open_text(tmp_path, "\n".join(written), "p.jsonl")
    assert all(data[index].as_sampled for index in range(len(data)))
    whole = {"question_id": "q1", "kind": "wrong", "settings": {}}
    for changes in ({"question_id": None}, {"kind": 3}, {"settings": "x"}, {"settings": None}):
        assert not only(open_records(tmp_path, {**SAME["mmpr"], **whole, **changes})).as_sampled
    assert only(open_records(tmp_path, {**SAME["mmpr"], **whole})).as_sampled
