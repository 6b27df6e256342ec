"""Whatever a record holds, it is read or refused with a reason: nothing else is raised, and no message is long."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from tests.data.formats.test_formats import SAME, swift_multimodal
from vlmpo.data.formats import FORMATS, RecordContext
from vlmpo.data.index.scan import _read_records
from vlmpo.errors import RecordError

LONG = "Ab3/" * 1000
CONTEXT = RecordContext("f:1", image_root="/root")
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 10**30, "", " ", "x", "\ud83d", "a\0b", "<image>", LONG),
    *("file://[bad", f"file://{LONG}", f"http://{LONG}", f"data:image/png;base64,{LONG}*", f"iVBORw0KGgo{LONG}"),
    *([], [None], [""], [1], [[]], [[1, 2]], [[["x"]]], [{}], ["a.png"], ["a.png", None]),
    *({}, {"a": 1}, {"bytes": None, "path": None}, {"bytes": LONG}, {"bytes": 1}, {"path": 3}, {"url": LONG}),
    *({"role": "user"}, {"role": LONG, "content": "x"}, [{"role": ["user"], "content": "x"}]),
    *([{"role": "user", "content": "x"}], [{"role": "user", "content": {"a": 1}}]),
    *([{"role": "user", "content": [{"type": LONG}]}], [{"role": "user", "content": [{"type": ["text"]}]}]),
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": [1]}}]}],
    *({"from": ["human"], "value": ["a", "b"]}, {"from": ["human", "gpt"], "value": ["a", "b"]}),
]
KEYS = [
    *("image", "images", "video", "image_path", "imgae", "prompt", "messages", "conversations", "history", "system"),
    *("tools", "label", "rejected_response", "rejected_messages", "rejected_images", "completion", "output", "text"),
    *("chosen_complete", "question_id", "kind", "settings", "extra", LONG, "\ud83d"),
]
RECORDS = {
    **{name.removesuffix(" strings"): record for name, record in SAME.items()},
    "swift": swift_multimodal(),
    "alpaca": {**SAME["alpaca"], "history": [["a", "b"]]},
}


class Source:
    """One record, as a scan reads it."""

    stamp = None
    settings = ()
    can_fork = False

    def __init__(self, record: dict[str, Any], name: str) -> None:
        self.record, self.parse = record, FORMATS[name].parse

    def __len__(self) -> int:
        return 1

    def pair(self, index: int) -> Any:
        return self.parse(self.record, CONTEXT)


def changed(value: Any, draw: random.Random) -> Any:
    """``value`` with something else at a random place."""
    if isinstance(value, dict | list) and value and draw.random() < 0.7:
        value = value.copy()
        at = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        value[at] = changed(value[at], draw)
        return value
    return draw.choice(VALUES)


@pytest.mark.parametrize("name", list(RECORDS))
def test_any_record_is_read_or_refused(name: str) -> None:
    draw = random.Random(0)
    outcomes, messages = set(), []
    for _ in range(600):
        record = dict(RECORDS[name])
        for key in draw.choices([*KEYS, *record, *record], k=draw.randint(1, 3)):
            record[key] = changed(record.get(key), draw)
        record = json.loads(json.dumps(record))
        _read_records(Source(record, name), np.array([0]))
        try:
            FORMATS[name].parse(record, CONTEXT)
            outcomes.add("read")
        except RecordError as error:
            outcomes.add(error.reason)
            messages.append(str(error))
    assert not any(LONG[:81] in message or "\n" in message for message in messages)
    "".join(messages).encode("utf-8")  # all can be printed
    assert outcomes >= {"read", "missing_field", "ambiguous_field"} if name != "rlhf_v" else {"read", "bad_json"}
