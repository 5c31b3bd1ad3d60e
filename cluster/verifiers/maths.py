"""Mathematical answers: equal as formulas and numbers, however they are written. Read and compared by math-verify."""

from __future__ import annotations

import logging
import re

from math_verify import parse, verify

from cluster.verifiers.answers import Verdict, final_answer

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that time limits are somebody else's duty; see `process.py`

_QUANTITY = re.compile(r"\$?\s*[-+]?[\d.,/ ]*\d\s+[A-Za-z]{3,}[A-Za-z ]*\.?$")
"""A number and its unit in words, which read as a formula would be a product of letters."""
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sqrt|sin|cos|tan|log|exp)(?![A-Za-z]))[A-Za-z]{3,}")
_FORMULA_MARKS = ("$", "\\(", "\\[", "\\boxed")


def math_verdict(text: str, reference: str) -> Verdict:
    """Whether the final answer of `text` equals that of `reference`: as numbers to 6 decimals, else as formulas that sympy
    finds equal; sets without order, tuples and intervals with it.

    The answer is the marked one (`cluster.verifiers.answers.final_answer`); a text without mark and words is an answer as a whole;
    of other texts it is the last formula or number. An answer in words is none. May take for ever on a formula that is made for
    it, so whoever calls it limits its time.
    """
    wanted = _formulas(reference)
    if not wanted:
        return Verdict(None, "the reference has no answer")
    got = _formulas(text)
    if not got:
        return Verdict(False, "no answer")
    right = verify(wanted, got, timeout_seconds=None)
    return Verdict(True, "") if right else Verdict(False, "wrong answer")


def _formulas(text: str) -> list[object]:
    """Readings of a text's final answer, none when it has no formula."""
    marked, said = final_answer(text), text.rpartition("</think>")[2].strip()
    answer = said if marked is None else marked
    prose = marked is None and _WORD.search(said)
    as_it_is = prose or _QUANTITY.match(answer) or any(mark in answer for mark in _FORMULA_MARKS)
    return list(parse(answer if as_it_is else f"${answer}$", parsing_timeout=None))
