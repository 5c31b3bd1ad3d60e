"""Final answers: where they are found, when two are the same, and what nobody can say."""

from __future__ import annotations

from fractions import Fraction

import pytest

from cluster.verifiers.answers import final_answer, number, verdict


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 3 + 4 = 7.\n#### 7", "7"),
        ("#### 1\nNo: #### 2\n", "2"),
        ("#### 72 apples\nand more words", "72 apples"),
        ("so \\boxed{\\frac{1}{2}} holds", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("The answer is 12. Bye.", "12"),
        ("Answer: 3.5", "3.5"),
        ("<think>the answer is 4</think>\nI say #### 5", "5"),
        ("<think>#### 4</think> so", None),
        ("\\boxed{never closed", None),
        ("####", None),
        ("just words", None),
        ("", None),
    ],
)
def test_where_an_answer_is_found(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234,567.5", Fraction("1234567.5")),
        ("$ 3 / 4 each", Fraction(3, 4)),
        ("-7", Fraction(-7)),
        ("\u22127", Fraction(-7)),
        ("10 - 3", Fraction(3)),
        ("007", Fraction(7)),
        (".5", Fraction(1, 2)),
        ("2.50%", Fraction("2.5")),
        ("3/0", None),
        ("none", None),
    ],
)
def test_what_number_a_text_ends_with(text: str, value: Fraction | None) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "reference", "right", "reason"),
    [
        ("numeric", "that makes 1,000.0 dollars", "#### 1000", True, ""),
        ("numeric", "#### 12", "5 + 6 = 11\n#### 11", False, "wrong answer"),
        ("numeric", "I do not know", "#### 11", False, "no answer"),
        ("numeric", "#### 11", "nobody knows", None, "the reference has no answer"),
        ("numeric", "#### many", "#### 11", False, "no answer"),
        ("numeric", "0.5", "1/2", True, ""),
        ("exact", "Thus\n#### The  Moon.", "#### the moon", True, ""),
        ("exact", "hm\nParis", "Paris", True, ""),
        ("exact", "Rome", "Paris", False, "wrong answer"),
        ("exact", "   ", "Paris", False, "no answer"),
        ("regex", "choice (B), no: choice (C)", "#### C", True, ""),
        ("regex", "B", "choice (B)", False, "no answer"),
    ],
)
def test_who_is_right(kind: str, text: str, reference: str, right: bool | None, reason: str) -> None:
    assert verdict(kind, text, reference, r"choice \((\w)\)") == (right, reason)  # type: ignore[arg-type]
