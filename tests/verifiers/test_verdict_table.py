"""The table of verdicts: no right answer called wrong, no wrong one called right, and few left unread."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import pytest

from tests.paths import SHARED
from tests.verifiers.verdict_table import COLUMNS, TABLE, count, main, read_table, status
from vlmpo.data.records import Question, Response
from vlmpo.errors import RecordError
from vlmpo.pairs.correctness import pair_correctness
from vlmpo.verifiers.verifiers import VERIFIERS, verify

LINES = read_table()
VISIBLE = SHARED / "reports" / "verdicts.jsonl"
LANGUAGES = {"en", "zh", "ja", "es", "fr", "de", "pt", "ru", "other"}
MOST_UNPARSED = 0.1  # of the lines that allow `correct`; a verifier that never answers is no verifier


def outside(lines: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(found, line) for line in lines if (found := status(line)) not in line["may_be"]]


def test_the_table_covers_every_kind_and_language() -> None:
    assert len(LINES) >= 500
    assert len({(line["response"], line["truth"], line.get("verifier")) for line in LINES}) == len(LINES)
    assert {line["language"] for line in LINES} == LANGUAGES
    kinds = count(LINES)
    assert min(counted["lines"] for counted in kinds.values()) >= 10
    assert {
        "formula_part",
        "structure",
        "retraction",
        "hedge",
        "letter_with_text",
        "names",
        "remark",
        "full_width",
    } <= (kinds.keys())
    assert all(set(line["may_be"]) <= {"correct", "wrong", "unparsed"} and line["may_be"] for line in LINES)


def test_every_line_of_the_table_gets_a_verdict_it_may_have() -> None:
    assert outside(LINES) == []


@pytest.mark.skipif(not VISIBLE.exists(), reason="no ../shared/reports/verdicts.jsonl")
def test_every_reported_line_gets_a_verdict_it_may_have() -> None:
    lines = read_table(VISIBLE)
    assert len(lines) == 33
    assert outside(lines) == []


def test_few_right_answers_are_left_unparsed() -> None:
    counts = count(LINES)
    unparsed = sum(counted["unparsed of these"] for counted in counts.values())
    assert unparsed <= MOST_UNPARSED * sum(counted["allow correct"] for counted in counts.values())


def test_the_counts_are_printed_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(TABLE)])
    head, *rows = capsys.readouterr().out.splitlines()
    assert all(column in head for column in COLUMNS)
    printed = {row.split()[0]: [int(number) for number in row.split()[1:]] for row in rows}
    assert printed["all"][:3] == [len(LINES), 0, 0]
    assert sum(numbers[0] for kind, numbers in printed.items() if kind != "all") == len(LINES)


def test_a_table_with_faults_is_counted_as_such() -> None:
    faults = [
        {"kind": "a", "response": "Final answer: 3", "truth": "3", "may_be": ["wrong"]},
        {"kind": "a", "response": "Final answer: 3", "truth": "4", "may_be": ["correct"]},
        {"kind": "a", "response": "Final answer: 3 or 4", "truth": "4", "may_be": ["correct"]},
    ]
    assert count(faults)["a"] == {
        "lines": 3, "outside": 3, "false correct": 1, "false wrong": 1, "allow correct": 2, "unparsed of these": 1
    }  # fmt: skip


def test_no_pair_has_a_wrong_response_chosen() -> None:
    """The table as questions and their responses, beside a plainly right and a plainly wrong response to each."""
    by_question: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in LINES:
        by_question[line["truth"], line.get("verifier", "auto")].append(line)
    questions, responses, may_be = [], [], {}
    for i, ((truth, verifier), lines) in enumerate(by_question.items()):
        questions.append(Question(f"q{i}", ("/images/a.png",), f"<image>\nquestion {i}?", truth, verifier=verifier))
        texts = {line["response"]: line["may_be"] for line in lines}
        texts |= {
            f"I look.\nFinal answer: {truth}": ["correct"],
            "I look.\nFinal answer: 987654": ["wrong", "unparsed"],
        }
        may_be[f"q{i}"] = texts
        responses += [Response(f"q{i}", j, text, "stop", "m", {"prompt": "cot"}) for j, text in enumerate(texts)]
    records, report = pair_correctness(questions, responses, max_pairs=50)
    assert len(records) > 1000
    assert not report.dropped_questions
    chosen_wrong = [r for r in records if "correct" not in may_be[r["question_id"]][r["chosen"]]]
    rejected_right = [r for r in records if may_be[r["question_id"]][r["rejected"]] == ["correct"]]
    assert chosen_wrong == []
    assert rejected_right == []


LONG = 100_000
HOSTILE = {
    "marks": "the answer is " * (LONG // 14),
    "colons": "Answer: " * (LONG // 8),
    "open boxes": r"\boxed{" * (LONG // 7),
    "boxes": r"\boxed{1} " * (LONG // 10),
    "brackets": "Final answer: " + "(" * LONG,
    "spaces": " " * LONG + "a",
    "lines": "\n" * LONG,
    "nothing but no": "Final answer: B\n" + "no " * (LONG // 3),
    "commas": "Final answer: " + "1," * 450,
    "nested": "Final answer: " + "(1," * 240 + ")" * 240,
    "Chinese": "答案是" * (LONG // 3),
    "characters": "红色" * (LONG // 2),
    "words": "the answer to the " * (LONG // 18),
    "power": "Final answer: 9^{9999}^{9999}",
    "factorials": "Final answer: 999!^{999!}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_response_takes_no_more_than_a_second(kind: str) -> None:
    for truth in ("3", "(1, 2)", "blue", "B"):
        started = time.process_time()
        verify(HOSTILE[kind], truth)
        assert time.process_time() - started < 1


def test_an_ordinary_verdict_takes_about_a_millisecond() -> None:
    cases = [("Final answer: B", "B"), ("I see three.\nFinal answer: 3", "3"), ("The answer is blue, as shown.", "red")]
    for response, truth in cases:
        verify(response, truth)
        started = time.process_time()
        for _ in range(50):
            verify(response, truth)
        assert (time.process_time() - started) / 50 < 0.005  # with room for a busy machine


# What takes an answer back, or leaves it open, does so whatever the verifier.
ANSWERS = {
    "exact": "blue",
    "vqa": "blue",
    "anls": "blue",
    "option": "B",
    "number": "3.5",
    "math": "3√2",
    "auto": "(2, 3)",
}
DOUBTS = [
    "{}. No, wait, 7.", "{}. Actually, it's 7.", "{}, or maybe 7", "{}. Correction: 7 or 8", "{}? Not sure.",
    "{}. Scratch that.", "{}. On second thought, 7.", "{}, but it could be 7", "either {} or 7", "{}\nNo, it is 7.",
    "{}. 不对，是7。", "{}。いや、7です。", "{}. No, espera, es 7.", "{}. Non, pardon, 7.", "{}. Nein, doch 7.",
    "{}. Não, desculpe, é 7.", "{}. Нет, подождите, 7.", "maybe {}", "{} (I am not certain)",
]  # fmt: skip
HARMLESS = [
    "{}, not 7", "{}, without doubt", "{}. There are no other bars that tall.", "{}. The other options do not fit.",
    "{}, because it is shown in the legend", "{}\n\nI hope this helps!", "{}\nExplanation: the tallest bar has it.",
]  # fmt: skip


@pytest.mark.parametrize("verifier", ANSWERS)
def test_one_rule_of_doubt_for_every_verifier(verifier: str) -> None:
    assert set(ANSWERS) == set(VERIFIERS)
    answer = ANSWERS[verifier]
    for doubt in DOUBTS:
        assert verify("Final answer: " + doubt.format(answer), answer, verifier).status == "unparsed", doubt
    for tail in HARMLESS:
        assert verify("Final answer: " + tail.format(answer), answer, verifier).status == "correct", tail


REMARKS = [
    "The answer is clear from the chart.", "The answer can be found by counting.", "Let's think step by step.",
    "I need to look at the legend.", "Final answer: I need to look at the legend", "The answer is shown below.",
    "答案很明显。", "答えは図から明らかです。", "La respuesta está en la leyenda.", "Die Antwort steht in der Legende.",
]  # fmt: skip


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_remark_is_no_answer_to_any_verifier(verifier: str) -> None:
    for truth in ("clear", "legend", "3", "B", "明显", "Legende"):
        for remark in REMARKS:
            try:
                assert verify(remark, truth, verifier).status == "unparsed", (remark, truth)
            except RecordError:
                break  # no truth of this verifier's kind


@pytest.mark.parametrize("verifier", ["exact", "vqa", "anls", "math"])
def test_no_verifier_calls_a_line_right_that_is_not(verifier: str) -> None:
    """Whatever verifier a question names: only `number` has a tolerance by which other values are right."""
    found = []
    for line in LINES:
        try:
            verdict = verify(line["response"], line["truth"], verifier)
        except RecordError:
            continue  # no truth of this verifier's kind
        if verdict.status == "correct" and "correct" not in line["may_be"]:
            found.append(line)
    assert found == []
