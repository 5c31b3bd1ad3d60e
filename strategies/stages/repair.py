"""Repair: an endpoint mends what the student got wrong, and what was mended becomes rows to learn from."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from strategies.core import COUNT, Author, Columns, Endpoint, Sampling
from strategies.domains import DOMAIN
from strategies.stages.judge import PASSING
from strategies.stages.lines import ATTEMPT, LINE_COLUMNS, ROWS, Line, lines_of, replaced, split
from strategies.stages.rollout import LONGEST_ROW, drawn_at

Variant = Literal["direct", "refine", "combine"]
_KEPT = {"direct": slice(0, 1), "refine": slice(1, 2), "combine": slice(0, 2)}
"""Which of a repair's two rows are lessons."""
_JUDGED = frozenset({"reward", "judged"})
_ATTEMPTS = (ROWS | LINE_COLUMNS | _JUDGED) - {"reference", "reference_lengths"}
_TOLD = _ATTEMPTS | {DOMAIN}
_REPAIRED = frozenset({"lead", "lead_lengths", "changed"})


@dataclass(frozen=True)
class Repair:
    """Replaces written rows by what `endpoint` writes of those that a verifier found wrong.

    The endpoint reads a row's prompt, the attempt without the token that ends it, and `feedback`; its text then stands right behind the
    prompt, in the attempt's place. Written rows that were found right, or were not judged, are dropped: unknown is not wrong. So is an
    attempt that leaves no room for a repair. Rows that nobody wrote stay as they are. Stands between two judgements.

    Adds of each row `lead` (Q,) int32 and `lead_lengths` (R,) int32, what the endpoint read, empty where nobody wrote, and `changed`
    (R,) float32, the share of tokens that are not the attempt's. The rows as they came, without references, stay as `attempt/<column>`,
    and so do the numbers of their judgement, for whoever looks at what the student writes. And (1,) float32 `count/repair/attempts`,
    `count/repair/passed`, `count/repair/unjudged`, `count/repair/failed`, `count/repair/left_out`, those of the failed without room, and
    `count/repair/seconds` and `count/repair/cost` of the endpoint.
    """

    endpoint: str
    sampling: Sampling
    feedback_text: str = ""
    """What is said of a wrong attempt, in words; whoever runs the strategy makes ids of it."""
    feedback: tuple[int, ...] = ()
    longest_tokens: int = LONGEST_ROW
    """Of what is read with what is written; whoever runs the strategy knows it."""

    @property
    def needs(self) -> frozenset[str]:
        return ROWS | LINE_COLUMNS | _JUDGED | {"step"}

    @property
    def adds(self) -> frozenset[str]:
        kept = {ATTEMPT + name for name in _ATTEMPTS}
        return (
            _REPAIRED | kept | {f"{COUNT}repair/{n}" for n in ("attempts", "passed", "unjudged", "failed", "left_out", "seconds", "cost")}
        )

    def longest_rows(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Lengths at most of the rows that may become of rows with these, whatever lessons are made of them."""
        longest = np.minimum(lengths + len(self.feedback) + self.sampling.max_new_tokens, self.longest_tokens)
        return np.asarray(np.maximum(lengths, longest))

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        if not isinstance(endpoint, Author):
            raise ValueError(f"stage Repair needs an endpoint that writes; {self.endpoint!r} does not")
        rows, judged = lines_of(columns), columns["judged"].astype(bool)
        written = columns["written"].astype(bool)
        passed = written & _right(columns)
        failed = written & judged & ~passed
        wrong = [_Wrong(rows[i], self._lead(rows[i])) for i in np.flatnonzero(failed)]
        able = [w for w in wrong if len(w.lead) < self.longest_tokens]
        began = time.perf_counter()
        repaired, cost = self._repairs(able, int(columns["step"][0]), endpoint)
        counts = {
            "attempts": written.sum(),
            "passed": passed.sum(),
            "unjudged": (written & ~judged).sum(),
            "failed": failed.sum(),
            "left_out": len(wrong) - len(able),
            "seconds": time.perf_counter() - began,
            "cost": cost,
        }
        given = [row for row in rows if not row.written]
        return {
            **{name: values for name, values in replaced(columns, [*given, *repaired]).items() if name not in _JUDGED},
            **{ATTEMPT + name: values for name, values in columns.items() if name in _TOLD or name.startswith("judge/")},
            "lead": np.concatenate([np.zeros(0, np.int32), *(w.lead for w in able)]),
            "lead_lengths": np.asarray([0] * len(given) + [len(w.lead) for w in able], dtype=np.int32),
            "changed": np.asarray([0] * len(given) + [w.changed(r) for w, r in zip(able, repaired, strict=True)], dtype=np.float32),
            **{f"{COUNT}repair/{name}": _one(n) for name, n in counts.items()},
        }

    def _lead(self, row: Line) -> NDArray[np.int32]:
        """What the endpoint reads of a wrong attempt."""
        ends = len(_text(row)) > 0 and int(_text(row)[-1]) in self.sampling.stop
        return np.concatenate([row.tokens[: len(row.tokens) - ends], np.asarray(self.feedback, dtype=np.int32)]).astype(np.int32)

    def _repairs(self, wrong: list[_Wrong], step: int, author: Author) -> tuple[list[Line], float]:
        """Rows with the endpoint's text in the attempt's place, and what they cost."""
        if not wrong:
            return [], 0.0
        lengths = np.asarray([len(w.lead) for w in wrong], dtype=np.int32)
        questions: Columns = {
            "tokens": np.concatenate([w.lead for w in wrong]),
            "lengths": lengths,
            "row_id": np.asarray([w.row.row_id for w in wrong], dtype=np.int64),
            "max_new_tokens": np.minimum(self.longest_tokens - lengths, self.sampling.max_new_tokens).astype(np.int32),
        }
        found = author.write(questions, drawn_at(step, self.sampling))
        texts = split(found["tokens"], found["lengths"])
        rows = [w.repaired(text, bool(ended)) for w, text, ended in zip(wrong, texts, found["finished"], strict=True)]
        return rows, float(found["cost"][0]) if "cost" in found else 0.0


@dataclass(frozen=True)
class Lessons:
    """Keeps of the repaired rows those that a verifier found right, as rows to learn from.

    `direct` predicts the repair from the prompt; `refine` from what its author read, the attempt included, none of which is predicted;
    `combine` makes both rows. A repair of which more than the share `most_changed` of the tokens is not the attempt's is dropped: its
    author has not mended anything. Rows that nobody wrote stay. Behind it, nothing is known of who wrote what.

    Adds (1,) float32 `count/repair/repaired`, the repairs that are kept, and `count/repair/changed`, the sum of their `changed`.
    """

    variant: Variant
    most_changed: float = 1.0

    endpoint = None

    @property
    def needs(self) -> frozenset[str]:
        return ROWS | LINE_COLUMNS | _JUDGED | _REPAIRED

    @property
    def adds(self) -> frozenset[str]:
        return frozenset({f"{COUNT}repair/repaired", f"{COUNT}repair/changed"})

    def longest_rows(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Lengths at most of the rows that may become of rows with these, in order."""
        return np.repeat(lengths, 2 if self.variant == "combine" else 1)

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        right = _right(columns) & (columns["changed"].astype(np.float64) <= self.most_changed)
        found: list[Line] = []
        for row, lead, kept in zip(lines_of(columns), split(columns["lead"], columns["lead_lengths"]), right, strict=True):
            if not row.written:
                found.append(row)
            elif kept:
                found += [row, _behind(lead, _text(row), row)][_KEPT[self.variant]]
        mended = right & columns["written"].astype(bool)
        rows = {name: values for name, values in replaced(columns, found).items() if name in ROWS | {DOMAIN}}
        counts = {"repaired": mended.sum(), "changed": columns["changed"][mended].sum()}
        return {
            **{name: values for name, values in columns.items() if name not in self.needs},
            **rows,
            **{f"{COUNT}repair/{name}": _one(n) for name, n in counts.items()},
        }


@dataclass(frozen=True)
class _Wrong:
    """A wrong attempt, and what is read of it."""

    row: Line
    lead: NDArray[np.int32]

    def repaired(self, text: NDArray[np.generic], finished: bool) -> Line:
        """The row with another's text in the attempt's place."""
        return replace(_behind(self.row.tokens[: int(np.argmax(self.row.loss_mask))], text, self.row), finished=finished)

    def changed(self, repaired: Line) -> float:
        """The share of tokens of both texts that the other does not have in its place."""
        return 1.0 - SequenceMatcher(None, _text(self.row).tolist(), _text(repaired).tolist(), autojunk=False).ratio()


def _right(columns: Columns) -> NDArray[np.bool_]:
    """Which rows were judged and found right, `(R,)`."""
    return np.asarray(columns["judged"].astype(bool) & (columns["reward"].astype(np.float64) >= PASSING))


def _text(row: Line) -> NDArray[np.generic]:
    """What is predicted of a row."""
    return np.asarray(row.tokens[row.loss_mask.astype(bool)])


def _behind(lead: NDArray[np.generic], text: NDArray[np.generic], row: Line) -> Line:
    """A row of the same prompt with another text behind what is read, whose log-probabilities nobody knows."""
    mask = np.concatenate([np.zeros(len(lead), np.uint8), np.ones(len(text), np.uint8)])
    return replace(row, tokens=np.concatenate([lead, text]), loss_mask=mask, behaviour=np.zeros(len(text), np.float32))


def _one(value: float) -> NDArray[np.float32]:
    return np.asarray([value], dtype=np.float32)
