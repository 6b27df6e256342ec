"""What is read from a response, and what the verifiers say of it. Every verdict in the tables was judged by hand."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.paths import SHARED
from vlmpo.errors import RecipeError, RecordError
from vlmpo.verifiers.answer import parse_final_answer
from vlmpo.verifiers.verifiers import VERIFIERS, choose_verifier, verify

READ = [
    # "Final answer" lines
    ("Final answer: 3", "3"),
    ("2 + 1 = 3 . Final answer: 3 .", "3 "),  # the demo's own habit of spelling
    ("I count two.\nFinal answer: 2\nNo, there is another.\nFinal answer: 3", "3"),
    ("**Final Answer:** 3", "3"),
    ("**Final Answer: (b) 44169**", "(b) 44169"),
    ("## Final Answer\n\n42", "42"),
    ("FINAL ANSWER:\n7", "7"),
    ("The final answer is 12.", "12"),
    ("The final answer is: blue.", "blue"),
    ("final answer：７", "７"),
    ("Final answer: 3\r\nThanks", "3"),
    ("Final answer: $\\frac{1}{2}$", "\\frac{1}{2}"),
    ("Final answer: \\(x+1\\)", "x+1"),
    ("Final answer:", None),
    ("Final answer: 3\nFinal answer:", None),  # cut off before the last one: the earlier one is not what it meant
    ("The final answer is not 3.", None),
    ("The final answer isn't clear.", None),
    # boxed
    ("so \\boxed{3}", "3"),
    ("\\boxed{1} but then \\boxed{\\frac{3}{4}}", "\\frac{3}{4}"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed{\\text{(B) }x^{2^{3}}} is the answer", "\\text{(B) }x^{2^{3}}"),
    ("\\boxed{5} million people", "5 million people"),
    ("\\boxed{12", None),  # cut off
    ("\\boxed{}", None),
    ("\\fbox{7}", "7"),
    # the later mark wins
    ("\\boxed{4}\nFinal answer: 5", "5"),
    ("Final answer: 5. Hence \\boxed{4}", "4"),
    ("Final answer: $\\boxed{4}$", "4"),
    ("<answer>9</answer>", "9"),
    ("Final answer: 1\n<answer>9</answer>", "9"),
    # reasoning apart from the response
    ("<think>Final answer: 1</think>Final answer: 2", "2"),
    ("<think>Final answer: 1", None),
    ("<think>hm</think>\n\nred", "red"),
    # statements
    ("Answer: B", "B"),
    ("Therefore, the answer is (e) 46670.", "(e) 46670"),
    ("The correct answer is C. The red one is larger.", "C. The red one is larger"),
    ("The answer is 3. It was easy.", "3"),
    ("The answer is 3.5.", "3.5"),
    ("First the answer is 3. On second thought the answer is 4.", "4"),
    ("The answer is not b.", None),
    ("The answer is definitely not b.", None),
    ("The answer is b. The answer is not c.", None),  # the last statement denies; which one holds is not ours to guess
    ("If the answer is 3, I would be surprised.", None),
    ("So option C is correct, since it is larger.", "C"),
    ("Option C is not correct.", None),
    ("I would choose option (d).", "d"),
    ("I would not choose option (d).", None),
    ("(c) is the correct answer because it fits", "c"),
    ("The best option is A.", "A"),
    # nothing but the answer
    ("3", "3"),
    ("yes", "yes"),
    (" Yes. \n", "Yes"),
    ("(b) 44169", "(b) 44169"),
    ("option C.", "option C"),
    ("C. The red one is larger.", "C. The red one is larger"),
    ("**rectangle**", "rectangle"),
    ("University of California, San Diego", "University of California, San Diego"),
    ("There are 3 shapes.", None),
    ("I think 3", None),
    ("It is 3 or 4", None),
    ("The chart shows sales by year.\nIn 2008 they grew.", None),
    ("one two three four five six seven eight nine ten eleven twelve thirteen", None),
    ("", None),
    ("   \n ", None),
    ("*", "*"),
    ("Final answer: " + "x" * 1001, None),
]


@pytest.mark.parametrize(("text", "expected"), READ)
def test_what_is_read(text: str, expected: str | None) -> None:
    assert parse_final_answer(text) == (expected if expected is None else expected.strip())


F = "Let me see.\nFinal answer: "
# verifier, truth, response, verdict: c(orrect), w(rong), u(nparsed)
CASES = [
    # exact
    ("exact", "Paris", F + "paris", "c"),
    ("exact", "Paris", F + "  PARIS. ", "c"),
    ("exact", "Paris", F + '"Paris"', "c"),
    ("exact", "Paris", F + "Paris, France", "w"),
    ("exact", "New York", F + "new   york", "c"),
    ("exact", "3", F + "three", "w"),
    ("exact", "3", F + "３", "c"),
    ("exact", "café", F + "cafe\u0301", "c"),
    ("exact", "café", F + "cafe", "w"),
    ("exact", "red", F + "red, not blue", "c"),
    ("exact", "red", F + "not red", "w"),
    ("exact", "red", F + "red. I hope this helps!", "c"),
    ("exact", "red", F + "red. No, wait: blue.", "u"),
    ("exact", "a cat", F + "cat", "w"),
    ("exact", "red", "", "u"),
    ("exact", "red", "The picture has shapes. One of them is red.", "u"),
    ("exact", "red", F + "blue\nFinal answer: red", "c"),
    ("exact", "red", F + "red\nFinal answer: blue", "w"),
    ("exact", "red", F + "red\nFinal answer: ", "u"),
    # option
    ("option", "e", "e", "c"),
    ("option", "e", "E", "c"),
    ("option", "e", "(e)", "c"),
    ("option", "e", "b", "w"),
    ("option", "e", "(b) 44169", "w"),
    ("option", "e", "(e) 46670", "c"),
    ("option", "e", "Therefore, the answer is (e) 46670.", "c"),
    ("option", "e", "Therefore, the correct answer is (b) 44169.", "w"),
    ("option", "(e)", F + "E", "c"),
    ("option", "e) 46670", F + "e", "c"),
    ("option", "e) 46670", F + "(e) 46,670", "c"),
    ("option", "e) 46670", F + "46670", "c"),
    ("option", "e) 46670", F + "44169", "u"),  # no letter; that the value is another option's is not known here
    ("option", "e) 46670", F + "(b) 44169", "w"),
    ("option", "e) 46670", F + "(e) 44169", "u"),  # one's letter with another's text
    ("option", "e) 46670", F + "(b) 46670", "u"),
    ("option", "e", F + "46670", "u"),
    ("option", "B", "Answer: B", "c"),
    ("option", "B", "The answer is b", "c"),
    ("option", "B", "The answer is not b.", "u"),
    ("option", "B", F + "not B", "u"),
    ("option", "C", "option C.", "c"),
    ("option", "C", "So option C is correct.", "c"),
    ("option", "C", "So option C is wrong.", "u"),
    ("option", "C", F + "**C**", "c"),
    ("option", "C", F + "C. The red one", "c"),
    ("option", "C", F + "C: the red one", "c"),
    ("option", "C", F + "C - the red one", "c"),
    ("option", "C", F + "[C]", "c"),
    ("option", "C", F + "Option (C)", "c"),
    ("option", "C", "Thus $\\boxed{\\text{(C)}}$.", "c"),
    ("option", "C", "Thus \\boxed{C}", "c"),
    ("option", "C", "Thus \\boxed{D}", "w"),
    ("option", "C", F + "C, not B", "c"),
    ("option", "B", F + "C, not B", "w"),
    ("option", "B", F + "B or C", "u"),
    ("option", "B", F + "B, C", "u"),
    ("option", "B", F + "(b) and (c)", "u"),
    ("option", "a", F + "A dog", "u"),  # an article, not a letter
    ("option", "a", F + "(a) dog", "c"),
    ("option", "d", F + "(d) point B", "c"),
    ("option", "d", F + "(d) f(x)", "c"),
    ("option", "A", "A is larger than B in this picture, and C is hidden.", "u"),
    ("option", "(b) a red car", F + "the red car", "c"),
    ("option", "(b) a red car", F + "b", "c"),
    ("option", "(b) a red car", F + "a blue car", "u"),
    ("option", "b,c", F + "(b) and (c)", "c"),
    ("option", "b,c", F + "c, b", "c"),
    ("option", "b,c", F + "a, b, c", "w"),
    ("option", "b,c", F + "(b)", "w"),
    ("option", "b,c", F + "none of them", "u"),
    ("option", "b,c", F + "b or c", "u"),
    # number: 5 %
    ("number", "100", F + "105", "c"),
    ("number", "100", F + "95", "c"),
    ("number", "100", F + "105.1", "w"),
    ("number", "100", F + "94.9", "w"),
    ("number", "-100", F + "-104", "c"),
    ("number", "-100", F + "100", "w"),
    ("number", "0", F + "0", "c"),
    ("number", "0", F + "0.01", "w"),
    ("number", "0", F + "none", "c"),
    ("number", "2008", F + "2010", "w"),  # a year
    ("number", "2008", F + "2008", "c"),
    ("number", "2,008", F + "2010", "c"),  # written as an amount
    ("number", "12345", F + "12,345", "c"),
    ("number", "1234567", F + "1 234 567", "c"),
    ("number", "1234567", F + "1.234.567", "c"),
    ("number", "1234.5", F + "1.234,50", "c"),
    ("number", "1234567", F + "12,34,567", "c"),
    ("number", "1234", F + "1'234", "c"),
    ("number", "1.234", F + "1,234", "w"),  # a comma before three digits separates thousands
    ("number", "1.5", F + "1,5", "c"),
    ("number", "0.234", F + "0,234", "c"),
    ("number", "45%", F + "45", "c"),
    ("number", "45", F + "45 %", "c"),
    ("number", "0.45", F + "45%", "c"),
    ("number", "45%", F + "0.45", "c"),
    ("number", "45%", F + "0.45%", "w"),
    ("number", "0.45", F + "45", "w"),
    ("number", "45%", F + "about 45 percent", "c"),
    ("number", "45%", F + "45\\%", "c"),
    ("number", "45%", F + "45 percent of the people", "c"),
    ("number", "0.75", F + "3/4", "c"),
    ("number", "0.75", F + "\\frac{3}{4}", "c"),
    ("number", "1.75", F + "1 3/4", "c"),
    ("number", "2.5", F + "2½", "c"),
    ("number", "0.5", F + "-\\frac12", "w"),
    ("number", "3/4", F + "0.75", "c"),
    ("number", "1500", F + "1.5e3", "c"),
    ("number", "1500", F + "1.5 × 10^3", "c"),
    ("number", "1500", F + "1.5 \\times 10^{3}", "c"),
    ("number", "1500", F + "1.5·10³", "c"),
    ("number", "0.0015", F + "1.5 x 10⁻³", "c"),
    ("number", "3200000", F + "$3.2 million", "c"),
    ("number", "3200000", F + "3.2M", "c"),
    ("number", "3200000", F + "3.2", "w"),
    ("number", "2000000000", F + "2 billion dollars", "c"),
    ("number", "5000", F + "5k", "c"),
    ("number", "$5", F + "5 USD", "c"),
    ("number", "$5", F + "€5", "w"),
    ("number", "5 km", F + "5000 m", "c"),
    ("number", "5 km", F + "5 m", "w"),
    ("number", "5 km", F + "5", "c"),
    ("number", "5 km", F + "5 kg", "w"),
    ("number", "5", F + "5 cm", "c"),
    ("number", "90", F + "90°", "c"),
    ("number", "90", F + "90^\\circ", "c"),
    ("number", "90 degrees", F + "$90^{\\circ}$", "c"),
    ("number", "12", F + "x = 12", "c"),
    ("number", "12", F + "x = 12, y = 3", "u"),
    ("number", "12", F + "7 + 5 = 12", "c"),
    ("number", "12", F + "12 red circles", "c"),
    ("number", "12", F + "There are 12 circles.", "c"),
    ("number", "12", F + "There are not 12 circles.", "u"),
    ("number", "12", F + "not 12", "u"),
    ("number", "12", F + "12 or 13", "u"),
    ("number", "12", F + "12-13", "u"),
    ("number", "12", F + "between 12 and 13", "u"),
    ("number", "12", F + "at least 12", "u"),
    ("number", "12", F + "> 12", "u"),
    ("number", "12", F + "≈ 12", "c"),
    ("number", "12", F + "approximately 12.1", "c"),
    ("number", "12", F + "12 (or 13)", "u"),
    ("number", "12", F + "12 (six red and six blue)", "c"),
    ("number", "12", F + "twelve", "c"),
    ("number", "21", F + "twenty-one", "c"),
    ("number", "300", F + "three hundred", "c"),
    ("number", "205", F + "two hundred and five", "c"),
    ("number", "24", F + "2 dozen", "c"),
    ("number", "2", F + "one two", "u"),
    ("number", "3", F + "٣", "c"),
    ("number", "42", F + "४२", "c"),
    ("number", "7", F + "７", "c"),
    ("number", "3.5", F + "٣٫٥", "c"),
    ("number", "-5", F + "−5", "c"),
    ("number", "-5", F + "minus 5", "c"),
    ("number", "5", F + "−5", "w"),
    ("number", "5", F + "+5", "c"),
    ("number", "3", F + "cannot be determined", "u"),
    ("number", "3", F + "3. I hope this helps!", "c"),
    ("number", "3", F + "3. Actually, 4.", "u"),
    ("number", "3", F + "3, not 4", "c"),
    ("number", "4", F + "3, not 4", "w"),
    ("number", "0.5", F + "3/0", "u"),
    ("number", "3", "We see 3 shapes in the first row and then some more below.", "u"),
    ("number", "3", "3", "c"),
    ("number", "3", "Final answer: 2\nI must correct this.\nFinal answer: 3", "c"),
    ("number", "3", "Final answer: 3\nI must correct this.\nFinal answer: 2", "w"),
    ("number", "3", "\\boxed{3}", "c"),
    ("number", "3", "\\boxed{3", "u"),
    # anls
    ("anls", "hello world", F + "hello world", "c"),
    ("anls", "hello world", F + "helo wrld", "c"),
    ("anls", "hello world", F + "goodbye", "w"),
    ("anls", "abcd", F + "abxy", "u"),  # alike, but other words are as like
    ("anls", "abcd", F + "axyz", "w"),
    ("anls", "abcd", F + "wxyz", "w"),  # distance/length would be 1: the inverted score takes this for right
    ("anls", "Dr. John A. Smith", F + "Dr John A Smith", "c"),
    ("anls", "1998", F + "1999", "w"),
    ("anls", "invoice 1998", F + "invoce 1998", "c"),
    ("anls", "$1,234.50", F + "1234.50", "c"),
    ("anls", "approved", F + "not approved", "w"),
    ("anls", "yes", F + "no", "w"),
    ("anls", "University of California", F + "the University of California", "c"),
    ("anls", "Straße", F + "STRASSE", "c"),
    ("anls", "x", F + "x" * 900, "w"),
    ("anls", "total", "The document lists several items. The total stands below.", "u"),
    # vqa
    ("vqa", "rectangle", "rectangle", "c"),
    ("vqa", "rectangle", F + "A rectangle.", "c"),
    ("vqa", "rectangle", F + "triangle", "w"),
    ("vqa", "rectangle", F + "The shape is a rectangle.", "c"),
    ("vqa", "rectangle", F + "It is not a rectangle", "w"),
    ("vqa", "rectangle", F + "not a rectangle", "w"),
    ("vqa", "yes", "Yes", "c"),
    ("vqa", "yes", F + "yes, it does", "c"),
    ("vqa", "no", F + "No, there is none.", "c"),
    ("vqa", "yes", F + "yes and no", "w"),
    ("vqa", "yes", F + "no", "w"),
    ("vqa", "no", F + "no one", "w"),
    ("vqa", "2", F + "two", "c"),
    ("vqa", "two dogs", F + "2 dogs", "c"),
    ("vqa", "-3", F + "3", "w"),
    ("vqa", "1,000", F + "1000", "c"),
    ("vqa", "10:30", F + "1030", "w"),
    ("vqa", "t-shirt", F + "T shirt", "c"),
    ("vqa", "isn't", F + "isn’t", "c"),
    ("vqa", "don't walk", F + "dont walk", "c"),
    ("vqa", "U.S.", F + "US", "c"),
    ("vqa", "C++", F + "C", "w"),
    ("vqa", "5%", F + "5", "w"),
    ("vqa", "black and white", F + "black, white", "w"),
    ("vqa", "vitamin A", F + "vitamin", "w"),
    ("vqa", "vitamin A", F + "the vitamin A", "c"),
    ("vqa", "a dog and the cat", F + "dog and cat", "c"),
    ("vqa", "the", F + "a", "w"),
    ("vqa", "blue", "The picture shows a blue square.\nThere is also a circle.", "u"),
    # math
    ("math", "3", F + "3", "c"),
    ("math", "3", F + "3.0", "c"),
    ("math", "3", F + "three", "c"),
    ("math", "100", F + "101", "w"),  # no tolerance here
    ("math", "3", F + "not 3", "u"),
    ("math", "3", F + "3x", "w"),
    ("math", "3", F + "red", "u"),
    ("math", "\\frac{3}{4}", F + "0.75", "c"),
    ("math", "\\frac{3}{4}", F + "3/4", "c"),
    ("math", "\\frac{3}{4}", F + "\\dfrac{6}{8}", "c"),
    ("math", "\\frac{3}{4}", F + "4/3", "w"),
    ("math", "1/3", F + "0.33", "u"),  # rounded: is that what was asked for?
    ("math", "1/3", F + "0.34", "w"),
    ("math", "1/3", F + "0.333333", "c"),
    ("math", "\\frac12", "So \\boxed{0.5}.", "c"),
    ("math", "2\\sqrt{3}", F + "\\sqrt{12}", "c"),
    ("math", "2\\sqrt{3}", F + "$2\\sqrt{2}$", "w"),
    ("math", "\\sqrt{2}", F + "sqrt(2)", "c"),
    ("math", "x^2+1", F + "1 + x^2", "c"),
    ("math", "x^2+1", F + "x^2-1", "w"),
    ("math", "(x+1)^2", F + "x^2+2x+1", "c"),
    ("math", "\\pi/2", F + "\\frac{\\pi}{2}", "c"),
    ("math", "\\{1,2\\}", F + "\\{2,1\\}", "c"),
    ("math", "(1,2)", F + "(2,1)", "w"),
    ("math", "[0,1)", F + "[0,1]", "w"),
    ("math", "2^{10}", F + "1024", "c"),
    ("math", "50%", F + "1/2", "c"),
    ("math", "90^\\circ", F + "90 degrees", "c"),
    ("math", "10 cm", F + "10", "c"),
    ("math", "10 cm", F + "10\\text{ cm}", "c"),
    ("math", "10 cm", F + "100 mm", "c"),
    ("math", "\\text{red}", F + "red", "c"),
    ("math", "x=3", F + "3", "c"),
    ("math", "5", F + "9^{9^{9^{9}}}", "u"),  # nobody can wait for this one
    ("math", "5", F + "100000!", "u"),
    ("math", "5", F + "2+3", "c"),
    # auto
    ("auto", "b,c", F + "a, b, c", "w"),
    ("auto", "b,c", "(b), (c)", "c"),
    ("auto", "e", "(b) 44169", "w"),
    ("auto", "(b)", F + "B", "c"),
    ("auto", "3", "2 + 1 = 3 . Final answer: 3 .", "c"),
    ("auto", "3", "2 + 1 = 3 . Final answer: 4 .", "w"),
    ("auto", "20", F + "21", "w"),  # a count
    ("auto", "20.0%", F + "20.4 %", "c"),
    ("auto", "3.14", F + "3.1", "c"),
    ("auto", "3/4", F + "0.77", "w"),
    ("auto", "\\frac{3}{4}", F + "0.75", "c"),
    ("auto", "yes", "Yes, it does.", "c"),
    ("auto", "no", "Yes, it does.", "u"),  # a sentence without a mark
    ("auto", "yes", "yes", "c"),
    ("auto", "blue", F + "Blue", "c"),
    ("auto", "two", F + "2", "c"),
    ("auto", "Main Street", F + "main street.", "c"),
    ("vqa", "red", "\\boxed{\\mathbf{red}}", "c"),
    ("option", "(b) red", "\\boxed{a, \\text{b}}", "u"),  # two letters
]
STATUS = {"c": "correct", "w": "wrong", "u": "unparsed"}


@pytest.mark.parametrize(("verifier", "truth", "response", "expected"), CASES)
def test_the_verdict(verifier: str, truth: str, response: str, expected: str) -> None:
    verdict = verify(response, truth, verifier)
    assert verdict.status == STATUS[expected]
    assert (verdict.parsed is None) == (expected == "u")
    assert verdict.verifier in VERIFIERS[:-1]


def test_the_table_is_large_and_covers_every_verifier_and_verdict() -> None:
    assert len(set(CASES)) == len(CASES) >= 150
    counted = Counter((verifier, verdict) for verifier, _, _, verdict in CASES)
    assert all(counted[verifier, verdict] for verifier in VERIFIERS for verdict in "cwu")


@pytest.mark.parametrize(
    ("truth", "chosen"),
    [
        ("e", "option"),
        ("(e)", "option"),
        ("(e) 46670", "option"),
        ("e) 46670", "option"),
        ("b,c", "option"),
        ("a, b, and d", "option"),
        ("A. Smith", "vqa"),
        ("a dog", "vqa"),
        ("3", "math"),
        ("1,234", "math"),
        ("-7", "math"),
        ("3/4", "math"),
        ("x^2", "math"),
        ("\\frac{1}{2}", "math"),
        ("5 cm", "math"),
        ("3.5", "number"),
        ("45%", "number"),
        ("$3.20", "number"),
        ("3.2 million", "number"),
        ("rectangle", "vqa"),
        ("yes", "vqa"),
        ("two", "vqa"),
        ("3 red dogs", "vqa"),
        ("10:30", "vqa"),
        ("1/2/2020", "vqa"),
        ("3-4", "vqa"),
    ],
)
def test_the_form_of_the_truth_calls_for_a_verifier(truth: str, chosen: str) -> None:
    assert choose_verifier(truth) == chosen
    assert verify("Final answer: " + truth, truth).status == "correct"


def test_a_truth_that_is_not_what_the_verifier_is_for_is_refused() -> None:
    for verifier, truth in [("number", "cat"), ("number", "3 or 4"), ("option", "46670"), ("exact", "  ")]:
        with pytest.raises(RecordError) as refused:
            verify("Final answer: 3", truth, verifier)
        assert refused.value.reason == "truth_unreadable"
    with pytest.raises(RecipeError, match=r"numbr.*number"):
        verify("Final answer: 3", "3", "numbr")


def test_mathematics_outside_the_main_thread() -> None:
    """Formulas are compared without signals, which only the main thread can set."""
    found = []
    thread = threading.Thread(target=lambda: found.append(verify("Final answer: (x+1)^2", "x^2+2x+1", "math").status))
    thread.start()
    thread.join()
    assert found == ["correct"]


VISONLYQA = SHARED / "data" / "visonlyqa" / "annotations"


@pytest.mark.skipif(not VISONLYQA.exists(), reason="no ../shared/data/visonlyqa")
@pytest.mark.parametrize(("file", "least_read"), [("no_reasoning.jsonl", 0.95), ("reasoning.jsonl", 0.4)])
def test_real_responses_are_judged_as_their_authors_did(file: str, least_read: float) -> None:
    """Logged answers of real models to prompts that ask for no mark; chosen were right, rejected wrong to the authors.

    Of what is read, 99 in 100 must agree.
    """
    questions = [json.loads(line) for line in (VISONLYQA / "questions.jsonl").read_text().splitlines()]
    truths = {(q["image"], q["question"].strip()): q["answer"] for q in questions}
    texts = {image: [text for i, text in truths if i == image] for image, _ in truths}
    counts: Counter[str] = Counter()
    for line in (VISONLYQA / file).read_text().splitlines():
        pair = json.loads(line)
        asked = max((t for t in texts.get(pair["image"], []) if pair["question"].startswith(t)), key=len, default=None)
        if asked is None:
            continue
        for side, right in (("chosen", "correct"), ("rejected", "wrong")):
            status = verify(pair[side], truths[pair["image"], asked]).status
            counts["unparsed" if status == "unparsed" else "agrees" if status == right else "differs"] += 1
    read = counts["agrees"] + counts["differs"]
    assert counts.total() > 1000
    assert read / counts.total() >= least_read
    assert counts["agrees"] / read >= 0.99


# --- properties -------------------------------------------------------------------------------------------------------

MARKS = ("answer", "boxed", "fbox", "<think", "</think", "option", "choice", "choose", "chose", "select", "pick", "go ")
line = (
    st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=30)
    .filter(lambda text: bool(text.strip()) and not any(mark in text.lower() for mark in MARKS))
    .filter(lambda text: not re.search(r"[.!?]\s|[。！？]\S", text))
)  # several sentences are not one answer
whole = st.integers(-(10**9), 10**9)
number = st.one_of(
    whole.map(str),
    whole.map("{:,}".format),
    st.decimals(-10000, 10000, places=2).map(str),
    st.tuples(whole, st.integers(1, 999)).map("{0[0]}/{0[1]}".format),
    st.integers(0, 100).map("{}%".format),
    st.tuples(st.integers(1, 999), st.sampled_from(["cm", "kg", "million", "°", "dollars"])).map(
        "{0[0]} {0[1]}".format
    ),
)
letter = st.sampled_from("abcdefghijABCDEFGHIJ")
option = st.one_of(letter, letter.map("({})".format), st.tuples(letter, whole).map("{0[0]}) {0[1]}".format))
formula = st.one_of(number, st.sampled_from(["\\frac{1}{2}", "x^2+1", "\\sqrt{2}", "\\pi", "\\{1,2\\}", "\\text{red}"]))
TRUTHS = [("exact", line), ("vqa", line), ("anls", line), ("number", number), ("option", option), ("math", formula)]
TRUTHS += [("auto", truths) for truths in (line, number, option, formula)]


@pytest.mark.parametrize(("verifier", "truths"), TRUTHS)
def test_the_truth_always_verifies(verifier: str, truths: st.SearchStrategy[str]) -> None:
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(truths)
    def check(truth: str) -> None:
        verdict = verify(f"Some reasoning first.\nFinal answer: {truth}", truth, verifier)
        assert verdict.status == "correct", (truth, verdict)

    check()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(max_size=200), truth=st.one_of(line, number, option), verifier=st.sampled_from(VERIFIERS))
def test_a_verdict_is_whole_whatever_the_response(text: str, truth: str, verifier: str) -> None:
    """Unparsed if and only if nothing was read: never wrong or right without an answer."""
    try:
        choose_verifier(truth, verifier)
    except RecordError:
        assume(False)
    verdict = verify(text, truth, verifier)
    assert (verdict.status == "unparsed") == (verdict.parsed is None)
    if parse_final_answer(text) is None:
        assert verdict.status == "unparsed"
    assert verify(text, truth, verifier) == verdict


@settings(max_examples=100, deadline=None, derandomize=True)
@given(truth=st.one_of(number, option), verifier=st.sampled_from(["number", "option", "math", "vqa", "exact", "anls"]))
def test_a_denied_truth_never_verifies(truth: str, verifier: str) -> None:
    try:
        choose_verifier(truth, verifier)
    except RecordError:
        assume(False)
    for denial in (f"Final answer: not {truth}", f"The answer is not {truth}.", f"The final answer is not {truth}"):
        assert verify(denial, truth, verifier).status != "correct"
