"""Files that version 0.1.0 wrote (tests/golden/files_of_0_1_0; model and image paths shortened) are read as they were.

A whole checkpoint is left out, as models are large; MPO's own state of one is there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vlmpo.data.dataset import open_pairs
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.errors import RunError
from vlmpo.generate.responses import read_responses
from vlmpo.loss import RewardShift
from vlmpo.train.checkpoint import STATE_FILE, check_rates, restore_state
from vlmpo.train.logps_store import ReferenceStore, Scored

OLD = Path(__file__).parent / "golden" / "files_of_0_1_0"
REFERENCE = "d3a73e93ad37ac62cdc1f968b6afd07d"


def test_a_reference_store(tmp_path: Path) -> None:
    shutil.copy(OLD / "shard-0.bin", tmp_path / "shard-0.bin")
    store = ReferenceStore(tmp_path)
    assert (len(store), store.damaged) == (32, 0)
    first, last = (
        bytes.fromhex(key) for key in ("c75c44e6ddbec32d561921169f80f29a", "94f21cc6bb3193bb49f1649eda1d69a6")
    )
    assert store.get(first) == Scored(-83.90190887451172, 12)
    assert store.get(last) == Scored(-77.84723663330078, 10)


def test_the_state_of_a_checkpoint() -> None:
    delta = RewardShift("previous")
    counts = restore_state(OLD, reward_shift=delta, reference_hash=REFERENCE)
    assert delta.value == 1.3679390251636505 / 12
    assert counts.to_json() == {"used": {"pairs": 6}, "dropped": {}, "examples": {}}
    check_rates(OLD, {"vision": 0.0005})
    with pytest.raises(RunError, match=r"was trained with training\.learning_rates \{'vision': 0\.0005\}"):
        check_rates(OLD, None)
    with pytest.raises(RunError, match="a different reference model"):
        restore_state(OLD, reward_shift=delta, reference_hash="0" * 32)
    assert STATE_FILE == "vlmpo_state.json"


def test_responses() -> None:
    responses = read_responses(OLD / "responses.jsonl")
    assert [(one.question_id, one.sample_index, one.text, one.finish_reason) for one in responses] == [
        ("q0", index, "red", "stop") for index in range(6)
    ]
    assert responses[0].settings["prompt_hash"] == "0739e7d0dc40e683"


def test_pairs() -> None:
    pairs = open_pairs([SourceSpec(path=str(OLD / "pairs_correctness.jsonl"))])
    assert len(pairs) == 2
    assert (pairs[0].chosen, pairs[0].rejected, len(pairs[0].images)) == ("blue", "theblue", 1)
    assert pairs[0].prompt[0].text.startswith("<image>\nwhat colour is picture 1?")
