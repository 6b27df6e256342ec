"""``vlmpo pair``: which pairs are made of which responses, that they train as they are, and what is counted."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.data import drop_reasons
from tests.paths import SHARED
from tests.tiny_models import model, noise_image, processor
from vlmpo.cli import app
from vlmpo.commands.pair import CONTINUATIONS_FILE
from vlmpo.commands.pair import CORRECTNESS_PAIRS as PAIRS_FILE
from vlmpo.commands.pair import CORRECTNESS_REPORT as REPORT_FILE
from vlmpo.data.dataset import open_pairs
from vlmpo.data.readers.questions import read_questions
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.data.records import Message, Question, Response
from vlmpo.errors import RecordError
from vlmpo.generate.base import Engine, Generated, GenerationRequest, Result, Sampling
from vlmpo.generate.local import LocalEngine
from vlmpo.generate.prompts import prompt_hash, prompt_text
from vlmpo.generate.responses import read_responses
from vlmpo.pairs.correctness import pair_correctness
from vlmpo.pairs.dropout_ntp import cut_words, pair_dropout_ntp
from vlmpo.recipe_yaml import load_recipe
from vlmpo.verifiers.verifiers import verify

NUMBERS = "one two three four five six seven eight nine ten".split()  # noqa: SIM905


def answers(question_id: str, *texts: str, **fields: Any) -> list[Response]:
    """Finished responses, or, where the text ends in ``...``, one that was cut off."""
    settings = {"prompt": "cot", **fields.pop("settings", {})}
    return [
        Response(question_id, i, text.removesuffix("..."), "length" if text.endswith("...") else "stop", "m", settings)
        for i, text in enumerate(texts)
    ]


def say(answer: str, thought: str = "I look.") -> str:
    return f"{thought}\nFinal answer: {answer}"


def made(records: Sequence[dict[str, Any]]) -> set[tuple[str, str, str]]:
    return {(record["chosen"], record["rejected"], record["kind"]) for record in records}


Q = Question("q", ("/images/a.png",), "<image>\nhow many?", "3")


# ---- correctness -----------------------------------------------------------------------------------------------------


def test_right_with_wrong_and_with_unreadable() -> None:
    responses = answers("q", say("3"), say("4"), say("3", "I count."), "I cannot say how many there are.")
    records, report = pair_correctness([Q], responses)
    expected = {(say("3", t), say("4"), "wrong") for t in ("I look.", "I count.")}
    expected |= {(say("3", t), responses[3].text, "format") for t in ("I look.", "I count.")}
    assert made(records) == expected
    assert report.to_json() == {
        "stage": "correctness",
        "questions": 1,
        "responses": 4,
        "parsed": 3,
        "verdicts": {"correct": 2, "unparsed": 1, "wrong": 1},
        "outcomes": {"paired": 1},
        "dropped": {},
        "dropped_questions": {},
        "skipped": {},
        "pairs": {"format": 2, "wrong": 2},
        "pairs_total": 4,
        "examples": {},
    }


def test_a_record_tells_where_it_comes_from() -> None:
    responses = answers("q", say("4"), say("3"), settings={"temperature": 1.0})
    records, _ = pair_correctness([Q], responses)
    assert records == [
        {
            "image": "/images/a.png",
            "question": prompt_text(Q, "cot"),
            "chosen": say("3"),
            "rejected": say("4"),
            "question_id": "q",
            "answer": "3",
            "chosen_parsed": "3",
            "rejected_parsed": "4",
            "kind": "wrong",
            "verifier": "math",
            "model": "m",
            "settings": {"prompt": "cot", "temperature": 1.0},
            "samples": [1, 0],
        }
    ]


def test_what_was_cut_off_is_never_chosen() -> None:
    responses = answers("q", say("3") + "...", say("4"), say("5") + "...", say("3", "I count."))
    records, report = pair_correctness([Q], responses)
    # "Final answer: 5" may have been going to be 50: what was cut off has no answer.
    assert made(records) == {
        (say("3", "I count."), say("4"), "wrong"),
        (say("3", "I count."), say("5"), "format"),
    }
    assert report.dropped == {"unfinished": 1}


def test_easy_hard_unreadable_and_unanswered_questions_are_kept_apart() -> None:
    questions = [dataclasses.replace(Q, id=name) for name in ("easy", "hard", "silent", "none", "mixed", "cut")]
    responses = [
        *answers("easy", say("3"), say("3", "Sure.")),
        *answers("hard", say("4"), "Many, I cannot say how many there are."),
        *answers("silent", "Many, I cannot say how many there are."),
        *answers("mixed", say("3"), say("3 circles and 4 squares, 3 or 4"), say("2")),
        *answers("cut", say("3") + "...", say("4")),
    ]
    _, report = pair_correctness(questions, responses)
    assert report.outcomes == {
        "easy": 1, "hard": 1, "unreadable": 1, "without_responses": 1, "paired": 1, "unpaired": 1
    }  # fmt: skip
    assert report.aside == {"easy": ["easy"], "hard": ["hard"]}


def test_a_rejected_answer_that_holds_the_right_one_is_skipped() -> None:
    red = dataclasses.replace(Q, question="<image>\ncolour?", answer="red")
    responses = answers("q", say("red"), say("red and blue"), say("not red"), say("dark red"), say("blue"))
    records, report = pair_correctness([red], responses)
    assert made(records) == {(say("red"), say("blue"), "wrong")}
    assert report.skipped["contained"] == 3
    # Whole words only: 3 is not in 13. And a text that goes on after the whole right one is no wrong answer.
    short = answers("q", "3", "13", "3 is what I see in the picture, and then some more")
    records, report = pair_correctness([Q], short)
    assert made(records) == {("3", "13", "wrong")}
    assert report.skipped["contained"] == 1
    # The reasoning may well name the truth; only the final answer tells.
    reasoned = answers("q", say("3"), say("4", "There are 3 red ones and a blue one."))
    assert made(pair_correctness([Q], reasoned)[0]) == {(say("3"), reasoned[1].text, "wrong")}


def test_responses_given_twice_count_once_and_empty_ones_never() -> None:
    responses = answers("q", say("3"), say("4"), say("3"), say("4"), "  ", say("4"))
    records, report = pair_correctness([Q], responses)
    assert len(records) == 1
    assert records[0]["samples"] == [0, 1]
    assert report.dropped == {"duplicate": 3, "empty": 1}


def test_only_responses_of_one_model_to_one_prompt_are_paired() -> None:
    other_model = [dataclasses.replace(response, model="n") for response in answers("q", say("4"))]
    other_prompt = answers("q", say("5"), settings={"prompt": "boxed"})
    records, report = pair_correctness([Q], [*answers("q", say("3")), *other_model, *other_prompt])
    assert records == []
    assert report.outcomes == {"unpaired": 1}


def test_what_cannot_be_judged_is_counted_and_named() -> None:
    questions = [
        dataclasses.replace(Q, id="a", answer="cat", verifier="number", origin="q.jsonl:1"),
        dataclasses.replace(Q, id="b", verifier="numbr", origin="q.jsonl:2"),
        dataclasses.replace(Q, id="c"),
    ]
    responses = [r for name in "abcd" for r in answers(name, say("3"), say("4"))]
    responses += answers("c", say("3", "Changed."), settings={"prompt_hash": "0123456789abcdef"})
    records, report = pair_correctness(questions, responses)
    assert [record["question_id"] for record in records] == ["c"]
    assert report.dropped_questions == {"truth_unreadable": 1, "unknown_verifier": 1}
    assert "q.jsonl:1" in report.examples["truth_unreadable"][0]
    assert "q.jsonl:2" in report.examples["unknown_verifier"][0]
    assert report.dropped == {"unknown_question": 2, "question_changed": 1}


def test_the_prompts_are_known_by_the_hash_that_sampling_stores() -> None:
    own = {"prompt_hash": prompt_hash(prompt_text(Q, "cot"))}
    records, report = pair_correctness([Q], answers("q", say("3"), say("4"), settings=own))
    assert len(records) == 1
    assert report.dropped == {}


def test_a_questions_own_verifier_goes_first() -> None:
    chart = dataclasses.replace(Q, answer="100")
    responses = answers("q", say("102"), say("200"))
    assert pair_correctness([chart], responses)[0] == []  # auto: a count, and neither is it
    own = dataclasses.replace(chart, verifier="number")
    assert made(pair_correctness([own], responses)[0]) == {(say("102"), say("200"), "wrong")}
    assert made(pair_correctness([chart], responses, verifier="number")[0]) == {(say("102"), say("200"), "wrong")}


def many(question_id: str = "q") -> list[Response]:
    right = [say("3", f"Thought {i}.") for i in range(8)]
    return answers(question_id, *right, *(say("4", f"Doubt {i}.") for i in range(8)))


def test_at_most_max_pairs_drawn_by_the_seed() -> None:
    records, report = pair_correctness([Q], many(), seed=1, max_pairs=15)
    assert len(made(records)) == len(records) == 15
    assert report.skipped["over_max_pairs"] == 64 - 15
    assert pair_correctness([Q], many(), seed=1, max_pairs=15)[0] == records
    assert made(pair_correctness([Q], many(), seed=2, max_pairs=15)[0]) != made(records)
    # The draw for one question does not depend on the others.
    other = dataclasses.replace(Q, id="p")
    both, _ = pair_correctness([Q, other], [*many("p"), *many()], seed=1, max_pairs=15)
    assert [record for record in both if record["question_id"] == "q"] == records


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(NUMBERS[:4]), st.booleans()), max_size=14), st.data())
def test_the_order_of_the_input_changes_nothing(drawn: list[tuple[str, str, bool]], data: Any) -> None:
    questions = [dataclasses.replace(Q, id=name) for name in "ab"]
    counts: Counter[str] = Counter()
    responses = []
    for name, word, is_cut in drawn:
        reason = "length" if is_cut else "stop"
        responses.append(Response(name, counts[name], say(word), reason, "m", {"prompt": "cot"}))
        counts[name] += 1
    first, report = pair_correctness(questions, responses, max_pairs=3)
    again, same = pair_correctness(
        data.draw(st.permutations(questions)), data.draw(st.permutations(responses)), max_pairs=3
    )
    assert again == first
    assert same.to_json() == report.to_json()
    for record in first:
        assert verify(record["chosen"], "3").status == "correct"
        assert verify(record["rejected"], "3").status != "correct"


# ---- as the trainer reads it -----------------------------------------------------------------------------------------


def write_run(folder: Path, responses: Sequence[Response], **build: Any) -> Path:
    """A recipe with three questions, the second of two images, the third without, and their ``responses.jsonl``."""
    (folder / "images").mkdir()
    for name in "abc":
        noise_image(50, 40, ord(name)).save(folder / "images" / f"{name}.png")
    questions = [
        {"id": "one", "image": "a.png", "question": "how many circles?", "answer": "3"},
        {"id": "two", "image": ["b.png", "c.png"], "question": "<image>\nand\n<image>\nhow many?", "answer": "3"},
        {"id": "text", "question": "what is two and one?", "answer": "3", "verifier": "number"},
        {"id": "gone", "image": "z.png", "question": "how many?", "answer": "3"},
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "out").mkdir()
    lines = (json.dumps(response.to_json()) + "\n" for response in responses)
    (folder / "out" / "responses.jsonl").write_text("".join(lines))
    section = {"questions": "q.jsonl", "image_root": "images", "output_dir": str(folder / "out"), **build}
    recipe = {"model": {"path": str(folder / "model")}, "data": {"max_tiles": 2}, "build": section}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "r.yaml"


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["pair", *map(str, arguments)])


def test_the_command_writes_what_the_trainer_reads(tmp_path: Path) -> None:
    responses = [r for name in ("one", "two", "text") for r in answers(name, say("3"), say("4"))]
    recipe = write_run(tmp_path, responses)
    result = call("correctness", recipe)
    assert result.exit_code == 0, result.output
    assert "3 pairs in" in result.stdout
    out = tmp_path / "out"
    pairs = open_pairs([SourceSpec(str(out / PAIRS_FILE))])
    assert drop_reasons(pairs) == []  # images included
    questions = {q.id: q for q in read_questions(tmp_path / "q.jsonl", tmp_path / "images").questions}
    for index in range(len(pairs)):
        pair = pairs[index]
        question = questions[pair.metadata["question_id"]]
        assert pair.prompt == (Message("user", prompt_text(question, "cot")),)  # as it was sampled
        assert pair.images == question.images
        assert (pair.chosen, pair.rejected) == (say("3"), say("4"))
    report = json.loads((out / REPORT_FILE).read_text())
    assert report["dropped_questions"] == {"missing_image": 1}
    assert report["pairs"] == {"wrong": 3}
    first = (out / PAIRS_FILE).read_bytes()
    assert call("correctness", recipe).exit_code == 0
    assert (out / PAIRS_FILE).read_bytes() == first


def test_questions_kept_aside_are_questions_again(tmp_path: Path) -> None:
    responses = [*answers("one", say("3"), say("3", "Sure.")), *answers("two", say("4")), *answers("text", "3", "5")]
    assert call("correctness", write_run(tmp_path, responses)).exit_code == 0
    before = {q.id: q for q in read_questions(tmp_path / "q.jsonl", tmp_path / "images").questions}
    for outcome, name in (("easy", "one"), ("hard", "two")):
        found = read_questions(tmp_path / "out" / f"{outcome}.jsonl")
        assert found.dropped == []
        assert [dataclasses.replace(q, origin="") for q in found.questions] == [
            dataclasses.replace(before[name], origin="")
        ]


def test_no_pair_is_an_error_that_says_why(tmp_path: Path) -> None:
    result = call("correctness", write_run(tmp_path, answers("one", say("3"))))
    assert result.exit_code == 2
    assert "no pair could be made" in result.stderr
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text())["outcomes"] == {"easy": 1, "without_responses": 2}


def test_no_responses_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    recipe = write_run(tmp_path, [])
    (tmp_path / "out" / "responses.jsonl").unlink()
    for stage in ("correctness", "dropout-ntp"):
        result = call(stage, recipe)
        assert result.exit_code == 2
        assert "run vlmpo sample first" in result.stderr


# ---- easy_vqa --------------------------------------------------------------------------------------------------------

EASY_VQA = SHARED / "data" / "easy_vqa" / "questions.jsonl"


@pytest.mark.long
@pytest.mark.skipif(not EASY_VQA.exists(), reason="no ../shared/data/easy_vqa")
def test_no_chosen_on_easy_vqa_holds_a_wrong_final_answer() -> None:
    """A quarter of the training questions, answers drawn from those the data know; the check reads in its own way."""
    rows = [json.loads(line) for line in EASY_VQA.read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "train"][::4]
    pool = sorted({row["answer"] for row in rows})
    draw = random.Random(0)
    questions, responses = [], []
    for number, row in enumerate(rows):
        questions.append(Question(f"q{number}", (row["image"],), row["question"], row["answer"]))
        said = [row["answer"], *draw.choices(pool, k=3)]
        texts = [
            draw.choice([f"It has a side.\nFinal answer: {a}", f"**Final answer:** {a.title()}.", a]) for a in said
        ]
        responses += answers(f"q{number}", *texts, "I see a picture and cannot tell what is in it.")
    records, report = pair_correctness(questions, responses, max_pairs=15)
    truth = {question.id: question.answer for question in questions}
    words = re.compile(r"[a-z]+")
    for record in records:
        right = truth[record["question_id"]]
        assert words.findall(record["chosen"].lower())[-1] == right
        assert record["kind"] == "format" or words.findall(record["rejected"].lower())[-1] != right
    assert max(Counter(record["question_id"] for record in records).values()) <= 15
    assert report.outcomes == {"paired": len(rows)}
    assert len(records) > 2 * len(rows)


# ---- DropoutNTP ------------------------------------------------------------------------------------------------------


class Recorder:
    """Passes requests on to an engine, or to a function of the kept part, and remembers them."""

    name = "recorder"
    batch_size = 4

    def __init__(self, inner: Engine | None = None, says: Any = None) -> None:
        self.inner, self.says = inner, says
        self.requests: list[GenerationRequest] = []
        self.notices: list[str] = []

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[Result]:
        self.requests += requests
        if self.inner is not None:
            yield from self.inner.generate(requests)
            return
        for request in requests:
            said = self.says(request.prefix)
            if isinstance(said, RecordError):
                yield said
            else:
                yield [Generated(said.removesuffix("..."), "length" if said.endswith("...") else "stop")]


@pytest.mark.parametrize(
    ("text", "keep", "kept"),
    [
        ("one two three four", 0.5, "one two"),
        ("one two three four five", 0.5, "one two"),
        ("one two three four", 0.25, "one"),
        ("one two three", 0.1, "one"),
        ("one two", 0.99, "one"),
        ("one,  two\nthree four.", 0.5, "one,  two"),
        ("naïve  Wörter\n\nbleiben ganz", 0.75, "naïve  Wörter\n\nbleiben"),
        ("图中有三个红色圆", 0.5, "图中有三"),
        ("one", 0.5, None),
        ("", 0.5, None),
    ],
)
def test_the_cut_is_between_words(text: str, keep: float, kept: str | None) -> None:
    assert cut_words(text, keep) == kept


def test_dropout_continues_the_first_half_without_the_image() -> None:
    engine = Recorder(says=lambda kept: " blue squares.")
    given = answers("q", "There are two red circles.", settings={"prompt": "{question} Describe."})
    records, report = pair_dropout_ntp([Q], given, engine)
    (request,) = engine.requests
    assert request.images == ()
    assert request.messages == (Message("user", "how many? Describe."),)
    assert request.prefix == "There are"
    (record,) = records
    assert record["chosen"] == "There are two red circles."
    assert record["rejected"] == "There are blue squares."
    assert record["question"] == "<image>\nhow many? Describe."
    assert (record["image"], record["kept"], record["kind"]) == ("/images/a.png", "There are", "dropout_ntp")
    assert (record["model"], record["continued_by"]) == ("m", "recorder")
    assert report.to_json()["pairs"] == {"dropout_ntp": 1}
    assert report.outcomes == {"paired": 1}


@pytest.mark.parametrize(
    ("text", "truth", "is_used"),
    [
        ("I see two circles. Answer: 2", "3", False),
        ("I see three circles. Answer: 3", "3", True),
        ("There are two red circles.", "3", True),  # nobody can tell what it answers
        ("I see it. Answer: B", "A", False),
        ("I see it. Answer: B", "", True),  # no answer is known
    ],
)
def test_dropout_drops_a_response_that_is_known_to_be_wrong(text: str, truth: str, is_used: bool) -> None:
    engine = Recorder(says=lambda kept: " blue squares.")
    question = Question("q", ("/images/a.png",), "<image>\nhow many?", truth)
    records, report = pair_dropout_ntp([question], answers("q", text), engine)
    assert [record["chosen"] for record in records] == [text] * is_used
    assert report.dropped == ({} if is_used else {"wrong_response": 1})
    assert len(engine.requests) == is_used


def test_dropout_counts_every_failure_by_its_reason() -> None:
    says = {
        "same same": " again again.",
        "empty empty": " \n",
        "cut cut": " and so on and...",
        "bad bad": RecordError("server_refused", "", "too long"),
        "good good": " but else.",
    }
    texts = [f"{kept} again again." for kept in says]
    given = [
        *answers("q", *texts, "Yes.", "It was going to be ...", texts[0]),
        *answers("t", "There are two red circles."),
        *answers("i", "There are two red circles.", settings={"prompt": "{question}"}),
    ]
    text_only = Question("t", (), "how many?", "3")
    image_only = Question("i", ("/images/a.png",), "<image>", "3")
    engine = Recorder(says=lambda kept: says[kept])
    records, report = pair_dropout_ntp([Q, text_only, image_only], given, engine)
    assert [record["rejected"] for record in records] == ["good good but else."]
    assert report.dropped == {
        "too_short": 1, "unfinished_response": 1, "duplicate": 1, "text_only": 1, "empty_prompt": 1
    }  # fmt: skip
    assert {k: n for k, n in report.skipped.items() if n} == {
        "identical": 1, "no_continuation": 1, "unfinished": 1, "server_refused": 1
    }  # fmt: skip
    assert report.outcomes == {"paired": 1, "unpaired": 2}
    accounted = report.pairs.total() + report.dropped.total() + report.skipped.total()
    assert accounted == report.responses == len(given)


def test_dropout_does_not_ask_for_what_is_there() -> None:
    given = [
        r for name in "abcdefgh" for r in answers(name, "There are two red circles.", "I see a blue square there.")
    ]
    questions = [dataclasses.replace(Q, id=name) for name in "abcdefgh"]
    kept: dict[str, Generated] = {}
    engine = Recorder(says=lambda prefix: f" {len(prefix)}.")
    records, _ = pair_dropout_ntp(questions, given, engine, save=kept.__setitem__)
    assert len(kept) == len(engine.requests) == len({request.seed for request in engine.requests}) == 16
    again = Recorder(says=lambda prefix: " other.")
    assert pair_dropout_ntp(questions, given[::-1], again, known=kept)[0] == records
    assert again.requests == []
    # With one missing its batch is asked as it was, and what was there stays.
    del kept[next(iter(kept))]
    last = Recorder(says=lambda prefix: f" {len(prefix)}.")
    assert pair_dropout_ntp(questions, given, last, known=kept)[0] == records
    assert last.requests == engine.requests[:4]


def test_dropout_takes_at_most_max_pairs_a_question() -> None:
    given = answers("q", *(f"There are {word} red circles." for word in NUMBERS))
    engine = Recorder(says=lambda kept: " nothing.")
    records, report = pair_dropout_ntp([Q], given, engine, max_pairs=3, seed=5)
    assert len(records) == len(engine.requests) == 3
    assert report.skipped["over_max_pairs"] == 7
    other, _ = pair_dropout_ntp([Q], given, Recorder(says=lambda kept: " nothing."), max_pairs=3, seed=6)
    assert [r["chosen"] for r in other] != [r["chosen"] for r in records]


def test_the_dropout_command_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [*answers("one", "There are two red circles."), *answers("two", "I see blue squares in both.")]
    recipe = write_run(tmp_path, given)
    engine = Recorder(says=lambda kept: " nothing at all.")
    monkeypatch.setattr("vlmpo.commands.pair.open_engine", lambda recipe: engine)
    result = call("dropout-ntp", recipe)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    pairs = open_pairs([SourceSpec(str(out / "pairs_dropout_ntp.jsonl"))])
    assert drop_reasons(pairs) == []
    assert [pairs[i].rejected for i in range(2)] == ["There are nothing at all.", "I see blue nothing at all."]
    assert len(pairs[1].images) == 2
    assert len(read_responses(out / CONTINUATIONS_FILE)) == len(engine.requests) == 2
    report = json.loads((out / "dropout_ntp_report.json").read_text())
    assert report["outcomes"] == {"paired": 2, "without_responses": 1}
    first = (out / "pairs_dropout_ntp.jsonl").read_bytes()
    assert call("dropout-ntp", recipe).exit_code == 0
    assert len(engine.requests) == 2
    assert (out / "pairs_dropout_ntp.jsonl").read_bytes() == first


VISONLYQA = SHARED / "data" / "visonlyqa" / "meta.json"


@pytest.mark.skipif(not VISONLYQA.exists(), reason="no ../shared/data/visonlyqa")
def test_dropout_on_real_images_and_responses() -> None:
    """Chosen responses of real pairs, continued by the tiny model, which is made to end its turns now and then."""
    pairs = open_pairs([SourceSpec(str(VISONLYQA))])
    real = {pairs[i].chosen: pairs[i] for i in range(0, len(pairs), 8)}
    questions = [Question(f"q{i}", p.images, p.prompt[0].text, "") for i, p in enumerate(real.values())]
    assert all(Path(path).is_file() for question in questions for path in question.images)
    given = [Response(f"q{i}", 0, text, "stop", "real", {}) for i, text in enumerate(real)]
    tiny = model()
    end = processor().tokenizer.eos_token_id
    head = tiny.get_output_embeddings().weight
    head.data = head.data.clone()  # not shared with the input embeddings
    tiny.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: logits + 4.0 * (logits.new_tensor(range(logits.shape[-1])) == end)
    )
    engine = Recorder(LocalEngine(tiny, processor(), Sampling(1.0, 1.0, 24), batch_size=16))
    records, report = pair_dropout_ntp(questions, given, engine, seed=3)
    assert len(records) >= 30
    assert all(request.images == () for request in engine.requests)
    assert all("<image>" not in request.messages[0].text for request in engine.requests)
    asked = {(request.prefix, request.messages[0].text.strip()) for request in engine.requests}
    for record in records:
        assert (record["kept"], record["question"].replace("<image>", "").strip()) in asked
        assert record["question"].startswith("<image>")
        assert record["rejected"].startswith(record["kept"])
        assert record["chosen"].startswith(record["kept"])
        assert len(record["kept"]) < len(record["chosen"])
        assert record["rejected"] != record["chosen"]
    accounted = report.pairs.total() + report.dropped.total() + report.skipped.total()
    assert accounted == len(given)
    assert report.dropped["too_short"] > 0  # the bare letters of the set without reasoning
    assert report.skipped["unfinished"] > 0


def test_the_recipe_knows_the_verifiers(tmp_path: Path) -> None:
    recipe = load_recipe(write_run(tmp_path, []), ["build.verifier=anls"])
    assert recipe.build is not None
    assert recipe.build.verifier == "anls"
