"""Every format of preference data, as its documentation writes it, into the pair it means; what does not fit."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from trl import extract_prompt
from trl.data_utils import prepare_multimodal_messages

from tests.data import drop_reasons
from tests.tiny_models import noise_image, processor
from vlmpo import settings
from vlmpo.data.dataset import PairDataset, open_pairs
from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.data.formats import AUTO, FORMATS, RecordPairs, as_pairs, recognise
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.data.records import Message, PreferencePair
from vlmpo.errors import DataError, RecordError

USER = Message("user", "<image>\nWhich shape is red?")


def open_text(folder: Path, text: str, name: str = "pairs.json", **options: Any) -> PairDataset:
    """The data set in a file that holds ``text``, beside the images a.png and b.png."""
    for number, image in enumerate(("a.png", "b.png")):
        noise_image(60, 50, number).save(folder / image)
    (folder / name).write_text(text, encoding="utf-8")
    need_rejected = options.pop("need_rejected", True)
    return open_pairs([SourceSpec(str(folder / name), **options)], need_rejected=need_rejected)


def open_records(folder: Path, *records: dict[str, Any], **options: Any) -> PairDataset:
    """The same of records, one a line."""
    return open_text(folder, "\n".join(map(json.dumps, records)), "pairs.jsonl", **options)


def only(data: PairDataset) -> PreferencePair:
    assert len(data) == 1
    return data[0]


def format_of(data: PairDataset) -> str:
    return data.infos[0].format


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def refused(data: PairDataset, index: int = 0) -> tuple[str, str]:
    with pytest.raises(RecordError) as caught:
        data[index]
    assert caught.value.origin == data.origin(index)
    return caught.value.reason, caught.value.detail


# --- LLaMA-Factory


SHAREGPT = """[
  {
    "conversations": [
      {
        "from": "human",
        "value": "<image>human instruction"
      },
      {
        "from": "gpt",
        "value": "model response"
      },
      {
        "from": "human",
        "value": "and then?"
      }
    ],
    "chosen": {
      "from": "gpt",
      "value": "chosen answer"
    },
    "rejected": {
      "from": "gpt",
      "value": "rejected answer"
    },
    "images": [
      "a.png"
    ],
    "system": "Be brief."
  }
]
"""


def test_llamafactory_sharegpt(tmp_path: Path) -> None:
    data = open_text(tmp_path, SHAREGPT)
    assert only(data) == PreferencePair(
        prompt=(
            Message("system", "Be brief."),
            Message("user", "<image>human instruction"),
            Message("assistant", "model response"),
            Message("user", "and then?"),
        ),
        images=(f"{tmp_path}/a.png",),
        chosen="chosen answer",
        rejected="rejected answer",
        source="pairs",
        origin=f"{tmp_path}/pairs.json:2",
    )
    assert data.infos[0].why == (
        "has `conversations` (messages), `system` (text), `chosen` (a message), `rejected` (a message), "
        "`images` (text, a list)"
    )
    assert (data.infos[0].container, data.infos[0].title) == ("JSON array", "LLaMA-Factory, ShareGPT")


def test_a_system_turn_of_the_conversation_goes_before_the_key(tmp_path: Path) -> None:
    record = json.loads(SHAREGPT)[0]
    record["conversations"].insert(0, {"from": "system", "value": "Be long."})
    pair = only(open_records(tmp_path, record))
    assert [message.text for message in pair.prompt if message.role == "system"] == ["Be long."]


def test_llamafactory_with_openai_messages(tmp_path: Path) -> None:
    record = {
        "messages": [said("system", "Be brief."), said("user", "Hi")],
        "chosen": said("assistant", "Hello"),
        "rejected": said("assistant", "Go"),
    }
    data = open_records(tmp_path, record)
    assert format_of(data) == "sharegpt"
    assert only(data).prompt == (Message("system", "Be brief."), Message("user", "Hi"))
    assert (only(data).chosen, only(data).rejected) == ("Hello", "Go")


def test_llava_conversations_are_fine_tuning_data(tmp_path: Path) -> None:
    text = """[
{"id": "000000033471", "image": "a.png", "conversations": [
  {"from": "human", "value": "<image>\\nWhat are the colors of the bus?"},
  {"from": "gpt", "value": "White and red."},
  {"from": "human", "value": "What is on the back of it?"},
  {"from": "gpt", "value": "An advertisement."}]}
]"""
    data = open_text(tmp_path, text, need_rejected=False)
    pair = only(data)
    assert [message.role for message in pair.prompt] == ["user", "assistant", "user"]
    assert (pair.chosen, pair.rejected, pair.images) == ("An advertisement.", None, (f"{tmp_path}/a.png",))
    assert (pair.metadata, pair.origin) == ({"id": "000000033471"}, f"{tmp_path}/pairs.json:2")
    assert data.infos[0].why.endswith("; the last assistant's turn alone is scored")
    # for preference training it lacks what is needed, and says so
    assert refused(open_text(tmp_path, text)) == ("missing_field", "`chosen` is missing")


ALPACA = """[
  {
    "instruction": "Describe <image>",
    "input": "in one word",
    "chosen": "chosen answer (required)",
    "rejected": "rejected answer (required)",
    "system": "Be brief.",
    "history": [
      ["human instruction in the first round", "model response in the first round"]
    ],
    "images": ["b.png"]
  },
  {
    "instruction": "Hi",
    "input": "",
    "chosen": "Hello",
    "rejected": "Go"
  }
]"""


def test_llamafactory_alpaca(tmp_path: Path) -> None:
    data = open_text(tmp_path, ALPACA)
    assert format_of(data) == "alpaca"
    assert data[0] == PreferencePair(
        prompt=(
            Message("system", "Be brief."),
            Message("user", "human instruction in the first round"),
            Message("assistant", "model response in the first round"),
            Message("user", "Describe <image>\nin one word"),
        ),
        images=(f"{tmp_path}/b.png",),
        chosen="chosen answer (required)",
        rejected="rejected answer (required)",
        source="pairs",
        origin=f"{tmp_path}/pairs.json:2",
    )
    assert (data[1].prompt, data[1].origin) == ((Message("user", "Hi"),), f"{tmp_path}/pairs.json:13")


def test_alpaca_fine_tuning_scores_the_output(tmp_path: Path) -> None:
    record = {"instruction": "Hi", "input": "you", "output": "Hello"}
    data = open_records(tmp_path, record, need_rejected=False)
    assert (only(data).prompt, only(data).chosen) == ((Message("user", "Hi\nyou"),), "Hello")


# --- ms-swift


def test_swift_rejected_response(tmp_path: Path) -> None:
    record = {
        "messages": [
            said("system", "You are a useful and harmless math calculator"),
            said("user", "What is 1 + 1?"),
            said("assistant", "It equals 2"),
            said("user", "What about adding 1?"),
            said("assistant", "It equals 3"),
        ],
        "rejected_response": "I don't know",
    }
    data = open_records(tmp_path, record)
    assert format_of(data) == "swift"
    assert only(data) == PreferencePair(
        prompt=(
            Message("system", "You are a useful and harmless math calculator"),
            Message("user", "What is 1 + 1?"),
            Message("assistant", "It equals 2"),
            Message("user", "What about adding 1?"),
        ),
        images=(),
        chosen="It equals 3",
        rejected="I don't know",
        source="pairs",
        origin=f"{tmp_path}/pairs.jsonl:1",
    )


def swift_multimodal(**changes: Any) -> dict[str, Any]:
    record = {
        "messages": [said("user", "<image>What is it, <video>?"), said("assistant", "A kitten.")],
        "images": ["a.png"],
        "videos": ["/elsewhere/x.mp4"],
        "rejected_messages": [said("user", "<image>What is it, <video>?"), said("assistant", "A puppy.")],
        "rejected_images": ["a.png"],
    }
    return record | changes


def test_swift_rejected_messages_with_image_and_video(tmp_path: Path) -> None:
    pair = only(open_records(tmp_path, swift_multimodal()))
    assert pair.prompt == (Message("user", "<image>What is it, <video>?"),)
    assert (pair.images, pair.videos) == ((f"{tmp_path}/a.png",), ("/elsewhere/x.mp4",))
    assert (pair.chosen, pair.rejected, pair.metadata) == ("A kitten.", "A puppy.", {})


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"rejected_images": ["b.png"]}, "prompts_differ", "`rejected_images` are not `images`"),
        ({"rejected_messages": [said("assistant", "A puppy.")]}, "prompts_differ", "differ from turn 1 on"),
        (
            {"rejected_messages": [said("user", "<image>And it, <video>?"), said("assistant", "A puppy.")]},
            "prompts_differ",
            "the prompts of `messages` and `rejected_messages` differ from turn 1 on",
        ),
        ({"rejected_messages": None}, "missing_field", "`rejected_response` is missing"),
        ({"messages": [said("user", "Hi")]}, "bad_conversation", "the last turn of `messages` is the user's"),
        (
            {"messages": [said("assistant", "Hi")], "rejected_messages": [said("assistant", "Ho")]},
            "bad_conversation",
            "the prompt has no turn",
        ),
        ({"videos": []}, "placeholder_mismatch", "1 <video> for 0 videos"),
        ({"objects": {"bbox": [[1, 2]]}}, "unsupported_field", "`objects` is not supported"),
    ],
)
def test_swift_refused(tmp_path: Path, changes: dict[str, Any], reason: str, detail: str) -> None:
    found = refused(open_records(tmp_path, swift_multimodal(), swift_multimodal(**changes)), 1)
    assert found[0] == reason
    assert detail in found[1]


def test_messages_alone_are_fine_tuning_data(tmp_path: Path) -> None:
    record = {"messages": [said("user", "Hi"), said("assistant", "Hello")], "images": ["a.png", "b.png"]}
    data = open_records(tmp_path, record, need_rejected=False)
    # as in ms-swift, images without placeholders stand before the first user's text
    assert (only(data).prompt[0].text, only(data).chosen) == ("<image>\n<image>\nHi", "Hello")
    unlearned = {**record, "messages": [said("user", "Hi"), {**said("assistant", "Hello"), "loss": False}]}
    assert refused(open_records(tmp_path, unlearned, need_rejected=False))[0] == "unsupported_field"
    marked_bad = {**record, "label": False}
    assert refused(open_records(tmp_path, marked_bad, need_rejected=False))[0] == "unpaired_feedback"
    assert only(open_records(tmp_path, {**record, "label": True}, need_rejected=False)).chosen == "Hello"


# --- TRL


def test_trl_explicit_prompt_in_messages(tmp_path: Path) -> None:
    record = {
        "images": ["a.png", "b.png"],
        "prompt": [said("system", "Be brief."), said("user", "What is this?")],
        "chosen": [said("assistant", "This is a cat.")],
        "rejected": [said("assistant", "This is a dog.")],
        "id": 3,
    }
    data = open_records(tmp_path, record)
    assert data.infos[0].why == (
        "has `prompt` (messages), `chosen` (messages), `rejected` (messages), `images` (text, a list)"
    )
    assert only(data) == PreferencePair(
        prompt=(Message("system", "Be brief."), Message("user", "<image>\n<image>\nWhat is this?")),
        images=(f"{tmp_path}/a.png", f"{tmp_path}/b.png"),
        chosen="This is a cat.",
        rejected="This is a dog.",
        source="pairs",
        origin=f"{tmp_path}/pairs.jsonl:1",
        metadata={"id": 3},
    )
    assert (format_of(data), data.infos[0].title) == ("trl", "TRL, explicit prompt")


def test_trl_content_items_say_where_images_stand(tmp_path: Path) -> None:
    content = [
        {"type": "text", "text": "Compare "},
        {"type": "image"},
        {"type": "text", "text": "\nwith "},
        {"type": "image", "image": "b.png"},
        {"type": "video", "video": "v.mp4"},
        {"type": "text", "text": "?"},
    ]
    record = {
        "image": "a.png",
        "prompt": [said("user", content)],
        "chosen": [said("assistant", [{"type": "text", "text": "Same"}, {"type": "text", "text": "."}])],
        "rejected": [said("assistant", "Other.")],
    }
    pair = only(open_records(tmp_path, record))
    # one newline after a placeholder belongs to it, so the text's own newline stays
    assert pair.prompt == (Message("user", "Compare <image>\n\nwith <image>\n<video>\n?"),)
    assert pair.images == (f"{tmp_path}/a.png", f"{tmp_path}/b.png")
    assert (pair.videos, pair.chosen) == ((f"{tmp_path}/v.mp4",), "Same.")


def test_trl_plain_text_prompt_is_the_users_turn(tmp_path: Path) -> None:
    record = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    data = open_records(tmp_path, record)
    assert (only(data).prompt, only(data).chosen) == ((Message("user", "The sky is"),), " blue.")
    assert data.infos[0].why.endswith("; the prompt is put as the user's turn")


def implicit(chosen: list[dict[str, Any]], rejected: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"chosen": chosen, "rejected": rejected, **more}


SKY = [said("user", "What color is the sky?")]


def test_trl_implicit_prompt(tmp_path: Path) -> None:
    record = implicit(
        [*SKY, said("assistant", "Blue."), said("user", "Sure?"), said("assistant", "Yes.")],
        [*SKY, said("assistant", "Blue."), said("user", "Sure?"), said("assistant", "No.")],
        images=["a.png"],
        prompt="What color is the sky?",  # as some data sets have it, beside the whole conversations
    )
    data = open_records(tmp_path, record)
    assert format_of(data) == "trl_implicit"
    pair = only(data)
    assert pair.prompt == (
        Message("user", "<image>\nWhat color is the sky?"),
        Message("assistant", "Blue."),
        Message("user", "Sure?"),
    )
    assert (pair.chosen, pair.rejected) == ("Yes.", "No.")
    theirs = extract_prompt(record)
    assert [message.text.removeprefix("<image>\n") for message in pair.prompt] == [
        m["content"] for m in theirs["prompt"]
    ]
    assert ([said("assistant", pair.chosen)], [said("assistant", pair.rejected)]) == (
        theirs["chosen"],
        theirs["rejected"],
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason", "detail"),
    [
        ([*SKY], [*SKY, said("assistant", "No.")], "bad_conversation", "the last turn of `chosen` is the user's"),
        ([*SKY, said("assistant", "Yes.")], [*SKY], "bad_conversation", "the last turn of `rejected` is the user's"),
        (
            [*SKY, said("assistant", "Yes.")],
            [said("user", "Why?"), said("assistant", "No.")],
            "prompts_differ",
            "differ from turn 1 on; only the last turn may",
        ),
        (
            [*SKY, said("assistant", "Blue."), said("user", "Sure?"), said("assistant", "Yes.")],
            [*SKY, said("assistant", "Green."), said("user", "Sure?"), said("assistant", "Yes.")],
            "prompts_differ",
            "differ from turn 2 on",
        ),
        ([*SKY, said("assistant", "Yes.")], [*SKY, said("assistant", "Yes.")], "identical", "are the same"),
        ([*SKY, said("assistant", " ")], [*SKY, said("assistant", "Yes.")], "empty_response", "`chosen` is empty"),
        (
            [*SKY, said("tool", "4"), said("assistant", "4")],
            [*SKY, said("assistant", "5")],
            "bad_conversation",
            "'tool'",
        ),
        (
            [*SKY, {**said("assistant", ""), "tool_calls": [{"name": "f"}]}],
            [*SKY, said("assistant", "5")],
            "bad_conversation",
            "`chosen[1]` holds `tool_calls`, which is not supported",
        ),
        ([*SKY, said("assistant", None)], [*SKY, said("assistant", "5")], "bad_conversation", "its content is null"),
        ([*SKY, "Blue."], [*SKY, said("assistant", "5")], "bad_conversation", "`chosen[1]` must be a message"),
        ([], [*SKY, said("assistant", "5")], "missing_field", "`chosen` must be a list of messages, not empty"),
    ],
)
def test_trl_implicit_refused(tmp_path: Path, chosen: Any, rejected: Any, reason: str, detail: str) -> None:
    good = implicit([*SKY, said("assistant", "Yes.")], [*SKY, said("assistant", "No.")])
    found = refused(open_records(tmp_path, good, implicit(chosen, rejected)), 1)
    assert found[0] == reason
    assert detail in found[1]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "rest"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is", (" blue.", " green.")),
        ("Q?\nYes.", "Q?\nNo.", "Q?\n", ("Yes.", "No.")),
        ("The sky is blue.", "The sky is black.", "The sky is", (" blue.", " black.")),  # TRL: " is bl", "ue.", "ack."
        ("Say it", "Say it loud", "Say", (" it", " it loud")),
    ],
)
def test_trl_implicit_prompt_in_plain_text(
    tmp_path: Path, chosen: str, rejected: str, prompt: str, rest: tuple[str, str]
) -> None:
    pair = only(open_records(tmp_path, {"chosen": chosen, "rejected": rejected}))
    assert (pair.prompt, (pair.chosen, pair.rejected)) == ((Message("user", prompt),), rest)
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    if "black" not in rejected and "loud" not in rejected:  # where TRL does not cut a word in two
        assert (theirs["prompt"], theirs["chosen"], theirs["rejected"]) == (prompt, *rest)


def test_plain_texts_without_a_common_beginning(tmp_path: Path) -> None:
    good = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    data = open_records(tmp_path, good, {"chosen": "Yes.", "rejected": "No."}, {"chosen": "Yes.", "rejected": "Yes."})
    assert refused(data, 1)[0] == "prompts_differ"
    assert refused(data, 2)[0] == "identical"


def trl_record(**changes: Any) -> dict[str, Any]:
    return {"prompt": [said("user", "Q?")], "chosen": [said("assistant", "Yes.")], "rejected": "No."} | changes


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"prompt": None}, "missing_field", "`prompt` is missing"),
        ({"prompt": []}, "missing_field", "`prompt` must be a list of messages, not empty"),
        ({"prompt": 3}, "missing_field", "`prompt` must be a list of messages, not empty"),
        ({"prompt": ""}, "missing_field", "the prompt is empty and there is no image"),
        ({"prompt": [said("assistant", "Hi")]}, "bad_conversation", "the prompt ends with the assistant's turn"),
        ({"prompt": [said("developer", "Hi")]}, "bad_conversation", "`prompt[0]` is a turn of 'developer'"),
        ({"prompt": [said("user", [{"type": "audio"}])]}, "bad_conversation", "is of type 'audio'"),
        ({"prompt": [said("user", [{"type": "text"}])]}, "bad_conversation", "`prompt[0].content[0]` has no text"),
        ({"prompt": [said("user", "\ud83d")]}, "bad_json", "half of a surrogate pair"),
        ({"prompt": [said("user", [{"type": "image"}])]}, "placeholder_mismatch", "1 <image> for 0 images"),
        ({"prompt": [said("user", "<image>")], "images": ["a", "b"]}, "placeholder_mismatch", "1 <image> for 2"),
        ({"chosen": None}, "missing_field", "`chosen` is missing"),
        ({"chosen": 3}, "missing_field", "`chosen` must be a text or a message, not a number"),
        ({"chosen": [said("user", "Yes.")]}, "bad_conversation", "the last turn of `chosen` is the user's"),
        ({"chosen": [said("assistant", "A"), said("assistant", "B")]}, "bad_conversation", "`chosen` holds 2 messages"),
        (
            {"chosen": [said("assistant", [{"type": "image"}])]},
            "bad_conversation",
            "is of type 'image' in an assistant's turn",
        ),
        ({"rejected": None}, "missing_field", "`rejected` is missing"),
        ({"rejected": "Yes."}, "identical", "are the same"),
        ({"images": [3]}, "missing_field", "`images` must be a path, encoded bytes"),
        ({"images": ["data:image/png;base64,AA*A"]}, "undecodable_image", "`images` is not valid base64"),
        ({"tools": "[{}]"}, "unsupported_field", "`tools` is not supported"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "unsupported_field", "`chat_template_kwargs`"),
    ],
)
def test_trl_refused(tmp_path: Path, changes: dict[str, Any], reason: str, detail: str) -> None:
    data = open_records(tmp_path, trl_record(), trl_record(**changes), trl_record(tools=[], chat_template_kwargs=None))
    found = refused(data, 1)
    assert found[0] == reason
    assert detail in found[1]
    assert data[2].rejected == "No."


def test_trl_prompt_and_completion_are_fine_tuning_data(tmp_path: Path) -> None:
    record = {"prompt": [said("user", "Q?")], "completion": [said("assistant", "Yes.")]}
    data = open_records(tmp_path, record, need_rejected=False)
    assert (only(data).prompt, only(data).chosen, only(data).rejected) == ((Message("user", "Q?"),), "Yes.", None)


# --- RLAIF-V, RLHF-V


def test_rlhf_v_holds_the_pair_as_json_in_text(tmp_path: Path) -> None:
    inner = {"question": "Q?", "chosen": "good", "rejected": "bad"}
    record = {"ds_name": "RLHF-V", "image": {"path": "a.png"}, "text": json.dumps(inner), "idx": 5}
    data = open_records(tmp_path, record, {**record, "text": "{"}, {**record, "text": None}, {**record, "text": "3"})
    assert format_of(data) == "rlhf_v"
    assert data[0] == PreferencePair(
        prompt=(Message("user", "<image>\nQ?"),),
        images=(f"{tmp_path}/a.png",),
        chosen="good",
        rejected="bad",
        source="pairs",
        origin=f"{tmp_path}/pairs.jsonl:1",
        metadata={"ds_name": "RLHF-V", "idx": 5},
    )
    assert [refused(data, index)[0] for index in (1, 2, 3)] == ["bad_json", "missing_field", "missing_field"]


@pytest.mark.parametrize("name", ["mmpr", "trl", "trl_implicit"])
def test_a_system_key_is_not_lost(tmp_path: Path, name: str) -> None:
    pair = only(open_records(tmp_path, {"system": "Be brief.", **SAME[name]}))
    assert pair.prompt == (Message("system", "Be brief."), Message("user", f"<image>\n{QUESTION}"))
    assert refused(open_records(tmp_path, {"system": 3, **SAME[name]}))[0] == "missing_field"


def test_a_response_without_a_prompt_is_refused_with_a_system_prompt_too(tmp_path: Path) -> None:
    answer = [{"role": "assistant", "content": "Yes."}]
    record = {"system": "Be brief.", "chosen": answer, "rejected": [{**answer[0], "content": "No."}]}
    reason, detail = refused(open_records(tmp_path, record, format="trl_implicit"))
    assert (reason, "the prompt ends with the system's turn" in detail) == ("bad_conversation", True)


def test_messages_as_older_datasets_hold_them(tmp_path: Path) -> None:
    record = {
        "conversations": {"from": ["human", "gpt", "human"], "value": ["Hi", "Hello", "And?"]},
        "chosen": {"from": "gpt", "value": "Well."},
        "rejected": {"from": "gpt", "value": "No."},
    }
    pair = only(open_records(tmp_path, record))
    assert pair.prompt == (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "And?"))


# --- recognition


def test_a_data_set_of_no_known_format_is_told_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_records(tmp_path, {"query": "Q?", "win": "good"}, {"lose": "bad", "win": None})
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path}/pairs.jsonl: its first records hold `query`, `win`, `lose`, which fits no format"
    )
    for name in FORMATS:
        assert f"{name} (" in message


def test_the_format_can_be_named(tmp_path: Path) -> None:
    record = {"question": "from MMPR", "prompt": "from TRL", "chosen": "good", "rejected": "bad"}
    assert only(open_records(tmp_path, record)).prompt[0].text == "from TRL"
    data = open_records(tmp_path, record, format="mmpr")
    assert only(data).prompt[0].text == "from MMPR"
    assert data.infos[0].why == "named under `format`"
    assert refused(open_records(tmp_path, record, format="swift")) == ("missing_field", "`messages` is missing")


def test_one_odd_record_at_the_start_does_not_decide(tmp_path: Path) -> None:
    good = trl_record(prompt="Q?")
    data = open_text(tmp_path, "\n".join(["{", json.dumps({"note": 1}), json.dumps(good)]), "pairs.jsonl")
    assert format_of(data) == "trl"
    assert drop_reasons(data) == ["bad_json", "missing_field"]


def test_recognition_looks_at_the_first_records_only() -> None:
    class Rows:
        looked_at: list[int] = []  # noqa: RUF012

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> dict[str, Any]:
            self.looked_at.append(index)
            return trl_record()

    rows = Rows()
    as_pairs(rows)
    assert rows.looked_at == list(range(8))


def test_the_recipe_names_the_same_formats() -> None:
    assert get_args(settings.DataFormat) == (AUTO, *FORMATS)


def test_nothing_readable_is_taken_for_mmpr() -> None:
    found = recognise([], AUTO, "x")
    assert (found.format.name, "none of its first records could be read" in found.why) == ("mmpr", True)


# --- the same pair in every format is the same tokens and pixels


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


QUESTION, GOOD, BAD = "what colour is it?", "the colour is green", "not blue"

SAME = {
    "mmpr": {"image": "a.png", "question": QUESTION, "chosen": GOOD, "rejected": BAD},
    "trl": {
        "images": ["a.png"],
        "prompt": [said("user", [{"type": "image"}, {"type": "text", "text": QUESTION}])],
        "chosen": [said("assistant", [{"type": "text", "text": GOOD}])],
        "rejected": [said("assistant", BAD)],
    },
    "trl strings": {"image": "a.png", "prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "trl_implicit": {
        "image": "a.png",
        "chosen": [said("user", QUESTION), said("assistant", GOOD)],
        "rejected": [said("user", QUESTION), said("assistant", BAD)],
    },
    "rlhf_v": {"image": "a.png", "text": json.dumps({"question": QUESTION, "chosen": GOOD, "rejected": BAD})},
    "sharegpt": {
        "conversations": [{"from": "human", "value": f"<image>{QUESTION}"}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
        "images": ["a.png"],
    },
    "alpaca": {"instruction": f"<image>{QUESTION}", "input": "", "chosen": GOOD, "rejected": BAD, "images": ["a.png"]},
    "swift": {
        "messages": [said("user", f"<image>{QUESTION}"), said("assistant", GOOD)],
        "rejected_response": BAD,
        "images": [{"bytes": None, "path": "a.png"}],
    },
}


def assert_encoded_alike(one: EncodedPair, other: EncodedPair) -> None:
    assert torch.equal(one.prompt_ids, other.prompt_ids)
    assert torch.equal(one.chosen_ids, other.chosen_ids)
    assert one.rejected_ids is not None
    assert torch.equal(one.rejected_ids, other.rejected_ids)
    assert one.vision.keys() == other.vision.keys() == {"pixel_values"}
    assert torch.equal(one.vision["pixel_values"], other.vision["pixel_values"])


@pytest.mark.parametrize("name", list(SAME))
def test_encoded_as_the_same_pair_in_mmpr(tmp_path: Path, name: str) -> None:
    encoder = PairEncoder(processor(), max_tiles=2)
    expected = encoder.encode(only(open_records(tmp_path, SAME["mmpr"])))
    assert (expected.image_tokens > 0, expected.tiles > 0) == (True, True)
    data = open_records(tmp_path, SAME[name])
    assert format_of(data) == name.removesuffix(" strings")
    assert_encoded_alike(encoder.encode(only(data)), expected)


@pytest.mark.parametrize(
    "prompt",
    [
        [said("system", "look again"), said("user", QUESTION)],
        [said("user", QUESTION), said("assistant", "red"), said("user", "not blue?")],
        [
            said(
                "user",
                [
                    {"type": "text", "text": "in "},
                    {"type": "image"},
                    {"type": "text", "text": "\nand "},
                    {"type": "image"},
                ],
            )
        ],
    ],
)
def test_a_prompt_is_what_trl_makes_of_it(prompt: list[dict[str, Any]]) -> None:
    images = [noise_image(60, 50, seed) for seed in range(2)]
    record = {
        "prompt": prompt,
        "images": images,
        "chosen": [said("assistant", GOOD)],
        "rejected": [said("assistant", BAD)],
    }
    ours = PairEncoder(processor(), max_tiles=2).encode(as_pairs([record])[0])
    messages = prepare_multimodal_messages(prompt, images=images)
    text = processor().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    theirs = processor()(text=text, images=images, images_kwargs={"max_patches": 1}, return_tensors="pt")
    assert torch.equal(ours.prompt_ids, theirs["input_ids"][0])
    assert torch.equal(ours.vision["pixel_values"], theirs["pixel_values"])


# --- whatever a trainer is given


def test_a_list_of_dicts_with_images_in_memory(tmp_path: Path) -> None:
    image = noise_image(60, 50, 0)
    encoder = PairEncoder(processor(), max_tiles=2)
    expected = encoder.encode(only(open_records(tmp_path, SAME["mmpr"])))
    for held in (
        image,
        png(image),
        {"bytes": png(image), "path": "a.png"},
        tmp_path / "a.png",
        f"file://{tmp_path}/a.png",
    ):
        items = [{**SAME["trl"], "images": [held]}] * 3
        pairs = as_pairs(items)
        assert isinstance(pairs, RecordPairs)
        assert (len(pairs), pairs[2].origin, pairs[-1].origin) == (3, "train_dataset[2]", "train_dataset[2]")
        assert_encoded_alike(encoder.encode(pairs[0]), expected)
    inline = [said("user", [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}])]
    pairs = as_pairs([{"prompt": inline, "chosen": GOOD, "rejected": BAD}])
    assert_encoded_alike(encoder.encode(pairs[0]), expected)


def test_as_pairs_reports_bad_items_and_the_end() -> None:
    pairs = as_pairs([trl_record(), trl_record(rejected="Yes."), 3], name="eval_dataset", source="mine")
    assert (pairs[0].source, pairs.source(0)) == ("mine", "mine")
    for index, reason in ((1, "identical"), (2, "bad_json")):
        with pytest.raises(RecordError) as caught:
            pairs[index]
        assert (caught.value.reason, caught.value.origin) == (reason, f"eval_dataset[{index}]")
    with pytest.raises(IndexError):
        pairs[3]
    assert pickle.loads(pickle.dumps(pairs))[0] == pairs[0]


def test_as_pairs_without_rejected() -> None:
    assert as_pairs([{"prompt": "Q?", "completion": "Yes."}], need_rejected=False)[0].rejected is None


def test_pairs_pass_through(tmp_path: Path) -> None:
    pair = PreferencePair((Message("user", "Q?"),), (), "a", "b")
    assert as_pairs(pairs := [pair]) is pairs
    assert as_pairs(empty := []) is empty
    data = open_text(tmp_path, '{"question": "Q?"}\n{"question": "Q?", "chosen": "a", "rejected": "b"}', "p.jsonl")
    assert as_pairs(data) is data  # though its first record is bad


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"train": [], "test": []}, r"train_dataset: holds several data sets \(train, test\)"),
        (iter([1]), "train_dataset: list_iterator has no length"),
        ([{"a": 1}], "train_dataset: its first records hold `a`, which fits no format"),
    ],
)
def test_what_is_no_data_set_of_pairs(dataset: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_pairs(dataset)
