"""Tests for writing text in plain characters."""

from __future__ import annotations

import pytest

from vlmpo.verifiers.characters import shortened
from vlmpo.verifiers.verifiers import verify


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a   b", "a   b"),
        ("a" + " " * 300 + "b", "a   b"),
        ("a \t \n  b", "a\nb"),
        ("a" + " \n" * 500 + "b", "a\n\nb"),
        ("a" + "-" * 64 + "b", "a" + "-" * 64 + "b"),
        ("a" + "-" * 40 + "*" * 40 + "b", "a" + "-" * 32 + "*" * 32 + "b"),
        ("是" * 100, "是" * 100),
    ],
)
def test_long_runs_of_spaces_and_signs_are_cut(text: str, expected: str) -> None:
    assert shortened(text) == expected


@pytest.mark.parametrize("run", [" " * 5000, "\n" * 5000, "$" * 5000, "** " * 5000, " \n" * 5000, "\t-" * 5000])
@pytest.mark.parametrize("verifier", ["math", "vqa", "option"])
def test_long_runs_leave_the_verdict_as_it_is(run: str, verifier: str) -> None:
    """Patterns that try each way to divide a run would take hours."""
    truth = "B" if verifier == "option" else "3"
    response = f"I look.{run}\n\nFinal answer: {truth}"
    assert verify(response, truth, verifier).status == "correct"
