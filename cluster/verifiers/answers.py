"""Final answers of written texts, found by the marks that writers leave, and compared with a reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, NamedTuple

Kind = Literal["exact", "numeric", "regex"]

_NUMBER = re.compile(r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?(?!\d)|[-+\u2212]?\.\d+")
_SAID = re.compile(r"answer\s*(?:is|:|=)\s*:?\s*(.+?)\s*(?:$|\.(?:\s|$)|\n)", re.IGNORECASE)
_THOUGHT_ENDS = "</think>"


class Verdict(NamedTuple):
    """What came of a comparison."""

    right: bool | None
    """None: nobody can say, because the reference has no answer."""
    reason: str
    """Why it is not right; empty when it is."""


def verdict(kind: Kind, text: str, reference: str, pattern: str | None = None) -> Verdict:
    """Whether the final answer of `text` is that of `reference`. `pattern` (kind `regex`) finds it in the text by its first
    group; in the reference too if it matches there, else the reference's own marks do."""
    find = _FINDERS[kind](pattern)
    wanted = find(reference)
    if wanted is None and kind == "regex":
        wanted = _plain(final_answer(reference) or reference)
    if wanted is None:
        return Verdict(None, "the reference has no answer")
    got = find(text)
    if got is None:
        return Verdict(False, "no answer")
    return Verdict(True, "") if got == wanted else Verdict(False, "wrong answer")


def final_answer(text: str) -> str | None:
    """What a text gives as its answer after its thoughts: behind the last `####`, in the last `\\boxed{}`, or after the last
    "answer is" or "answer:". None where there is no such mark."""
    said = text.rpartition(_THOUGHT_ENDS)[2]
    _, mark, rest = said.rpartition("####")
    if mark:
        return rest.strip().split("\n")[0].strip() or None
    boxed = _boxed(said)
    if boxed is not None:
        return boxed
    matches = _SAID.findall(said)
    return matches[-1] if matches else None


def number(text: str) -> Fraction | None:
    """The last number in a text, exactly: thousands commas, decimals and fractions are understood, units are passed over.

    None where there is none, it divides by 0, or it has more digits than Python reads (4300)."""
    found = _NUMBER.findall(text.replace("\\!", "").replace("\\,", ""))
    if not found:
        return None
    try:
        return Fraction(re.sub(r"[,\s]", "", found[-1]).replace("\u2212", "-"))
    except (ZeroDivisionError, ValueError):
        return None


def _boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` whose braces close."""
    _, mark, rest = text.rpartition("\\boxed{")
    depth = 1
    for i, character in enumerate(rest if mark else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:i].strip()
    return None


def _numeric(text: str) -> Fraction | None:
    """The number of the marked answer, else the last number of all."""
    marked = final_answer(text)
    return number(marked if marked is not None else text.rpartition(_THOUGHT_ENDS)[2])


def _exact(text: str) -> str | None:
    """The marked answer, else the last line."""
    lines = [line for line in text.rpartition(_THOUGHT_ENDS)[2].strip().splitlines() if line.strip()]
    answer = final_answer(text) or (lines[-1] if lines else None)
    return None if answer is None else _plain(answer)


def _matched(pattern: str | None) -> Callable[[str], str | None]:
    compiled = re.compile(pattern or "")

    def find(text: str) -> str | None:
        found = [m.group(1) if m.re.groups else m.group() for m in compiled.finditer(text)]
        return _plain(found[-1]) if found and found[-1] is not None else None

    return find


def _plain(answer: str) -> str:
    """Without case, surplus white space and the full stop at the end."""
    return " ".join(answer.casefold().split()).rstrip(".").strip("$ ")


_FINDERS: dict[Kind, Callable[[str | None], Callable[[str], object]]] = {
    "exact": lambda _: _exact,
    "numeric": lambda _: _numeric,
    "regex": _matched,
}
