"""Questions about videos are put to a model as pairs about them are trained on: as frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.encode.test_videos import video
from tests.tiny_models import model, processor
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.readers.questions import read_questions
from vlmpo.data.records import Message, PreferencePair
from vlmpo.errors import RecordError
from vlmpo.generate.base import Sampling
from vlmpo.generate.local import LocalEngine
from vlmpo.generate.prompts import prompt_text, request_for
from vlmpo.generate.server import _messages

pytest.importorskip("av", reason="the video extra is not installed")


@pytest.fixture
def question(tmp_path: Path):
    (tmp_path / "v.mp4").write_bytes(video(6))
    record = {"id": "q", "video": "v.mp4", "question": "What moves?", "answer": "a ball"}
    (tmp_path / "q.jsonl").write_text(json.dumps(record))
    return read_questions(tmp_path / "q.jsonl").questions[0]


def test_the_local_engine_reads_frames(question, monkeypatch) -> None:
    engine = LocalEngine(model(), processor(), Sampling(temperature=0, max_new_tokens=2), video_frames=3)
    pair = PreferencePair((Message("user", "<video>\nWhat moves?"),), (), "a", None, videos=question.videos)
    expected = PairEncoder(processor(), need_rejected=False, video_frames=3).encode(pair)
    seen = []
    encode = engine._encoder.encode
    monkeypatch.setattr(engine._encoder, "encode", lambda pair: seen.append(encode(pair)) or seen[-1])
    (answers,) = engine.generate([request_for(question, "{question}")])
    assert len(answers) == 1
    assert seen[0].prompt_ids.tolist() == expected.prompt_ids.tolist()


def test_a_server_is_sent_frames(question) -> None:
    (turn,) = _messages(request_for(question, "{question}"), video_frames=2)
    assert [item["type"] for item in turn["content"]] == ["text", "image_url", "text", "image_url", "text"]
    assert [item["text"].strip() for item in turn["content"] if item["type"] == "text"] == [
        "Frame1:",
        "Frame2:",
        "What moves?",
    ]


def test_a_broken_video_is_one_bad_question(question) -> None:
    Path(question.videos[0]).write_bytes(b"no video")
    engine = LocalEngine(model(), processor(), Sampling(temperature=0, max_new_tokens=2))
    (result,) = engine.generate([request_for(question, "direct")])
    assert isinstance(result, RecordError)
    assert result.reason == "undecodable_video"
    with pytest.raises(RecordError):
        _messages(request_for(question, "direct"), video_frames=2)


def test_videos_stay_in_front_of_the_prompt(question) -> None:
    assert prompt_text(question, "Think. {question}") == "<video>\nThink. What moves?"
