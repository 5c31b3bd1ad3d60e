"""Rollout: the student continues prompts, and what it wrote takes the place of the data's own completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from strategies.control import CONTROL, Controlled, told
from strategies.core import Author, Columns, Endpoint, Progress, Sampling, Schedule, Stage
from strategies.schedule import constant
from strategies.stages.lines import LINE_COLUMNS, ROWS, Line, lines_of, replaced

STUDENT = "student"
"""The endpoint that has the weights of the student in training."""
BASE = "base"
"""The endpoint that has those with which the student began, and keeps them."""
LONGEST_ROW = 1 << 30


@dataclass(frozen=True)
class Rollout:
    """Replaces rows by texts that `endpoint` writes after their prompts: loss tokens are then what it wrote.

    A row's prompt ends before its first loss token; a row without one, such as plain text, lends its first `prompt_tokens`. One token
    is no prompt: nobody predicts a row's first token, so plain text looks just like that.
    `share` of the rows are written, drawn row by row from seed, step and row (GKD's lambda, arXiv:2306.13649, algorithm 1);
    the others stay as they are, as do held-out rows (`step` 0). A prompt that leaves no room for a single token is left out and
    counted. Texts of one row follow each other under its `row_id`. Rows that a stage before has from an earlier student pass. `paired`
    puts the row itself before each text, with the same prompt unpredicted on both sides: chosen and rejected in turn, as objectives that
    compare rows in pairs want them. Then `share` is 1, and a row without loss tokens is left out, too, as is one whose text is empty.

    Adds for R rows with N loss tokens: `written` (R,) uint8, `sample` (R,) int32, `finished` (R,) uint8, 1 for a row that ends
    as it should; `written_by` (R,) int64, the finished steps of the student that wrote it, -1 for the data's own: the bundle's
    `policy_version` where it has one; `behaviour` (N,) float32, log-probabilities of written tokens at temperature 1 under the
    weights that wrote them, 0 for others; `reference` (Q,) int32 and `reference_lengths` (R,) int32, the rows' own completions;
    `rollout/seconds` and `rollout/left_out` (1,).
    """

    sampling: Sampling
    share: Schedule = constant(1.0)
    prompt_tokens: int = 32
    staleness: int = 0
    """Step t is written by the student of t - 1 - staleness finished steps, the first ones by the student as it began."""
    newest: bool = False
    """By the newest student instead, at most that old: faster where steps are uneven, and not repeatable."""
    paired: bool = False
    redrawn: bool = True
    """Whether a row of a later epoch is written anew; else a text depends on row and sample alone."""
    endpoint: str = STUDENT
    longest_tokens: int = LONGEST_ROW
    """Of a prompt with its text; whoever runs the strategy knows it."""

    @property
    def needs(self) -> frozenset[str]:
        return ROWS | {"step", "steps"} | ({CONTROL + self.share.control} if isinstance(self.share, Controlled) else set())

    @property
    def adds(self) -> frozenset[str]:
        return LINE_COLUMNS | {"rollout/seconds", "rollout/left_out"}

    @property
    def follows(self) -> bool:
        """Whether the weights in training write, and not some that stay as they are."""
        return self.endpoint == STUDENT

    def longest_rows(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Lengths at most of the rows that may become of rows with these, in order."""
        written = np.minimum(lengths + self.sampling.max_new_tokens, self.longest_tokens)
        one = np.stack([lengths, written], -1) if self.paired else np.maximum(lengths, written)[:, None]
        return np.tile(one, self.sampling.samples).flatten()

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        if not isinstance(endpoint, Author):
            raise ValueError(f"stage Rollout needs an endpoint that writes; {self.endpoint!r} does not")
        before = lines_of(columns)
        rows = [_row(line, self.prompt_tokens) for line in before]
        recalled = np.asarray([line.written for line in before], dtype=bool)
        drawn, room = self.drawn(columns) & ~recalled, self.longest_tokens - np.asarray([len(r.prompt) for r in rows], dtype=np.int64)
        able = (room > 0) & np.asarray([not self.paired or r.predicts for r in rows], dtype=bool)
        asked = np.flatnonzero(drawn & able)
        began = time.perf_counter()
        texts = dict(zip(asked.tolist(), self._texts([rows[i] for i in asked], room[asked], columns, endpoint), strict=True))
        seconds = time.perf_counter() - began
        found: list[Line] = []
        left_out = int(np.count_nonzero(drawn & ~able))
        for i, row in enumerate(rows):
            if not drawn[i]:
                found.append(before[i] if recalled[i] else row.given())
            for text in texts.get(i, []):
                if not self.paired:
                    found.append(text)
                elif len(text.behaviour):
                    found += [row.chosen(text.sample), text]
                else:
                    left_out += 1
        return {**replaced(columns, found), "rollout/seconds": _one(seconds), "rollout/left_out": _one(left_out)}

    def drawn(self, columns: Columns, of_share: float = 1.0) -> NDArray[np.bool_]:
        """Rows whose number u, drawn by seed, step and row, is below `of_share` of the share that is written, `(R,)`; none of held-out
        ones. A smaller `of_share` finds some of the same rows."""
        step, row_ids = int(columns["step"][0]), columns["row_id"]
        if step == 0:
            return np.zeros(len(row_ids), dtype=bool)
        share = self.share(Progress(step - 1, int(columns["steps"][0]), told(columns)))
        draws = [np.random.default_rng((self.sampling.seed, step, int(r))).random() for r in row_ids]
        return np.asarray(draws, dtype=np.float64) < share * of_share

    def _texts(self, rows: list[_Row], room: NDArray[np.int64], columns: Columns, author: Author) -> list[list[Line]]:
        """The texts of each row."""
        if not rows:
            return []
        prompts = {
            "tokens": np.concatenate([r.prompt for r in rows]),
            "lengths": np.asarray([len(r.prompt) for r in rows], dtype=np.int32),
            "row_id": np.asarray([r.row_id for r in rows], dtype=np.int64),
            "max_new_tokens": np.minimum(room, self.sampling.max_new_tokens).astype(np.int32),
        }
        sampling = drawn_at(int(columns["step"][0]), self.sampling) if self.redrawn else self.sampling
        written = author.write(prompts, sampling)
        lengths = written["lengths"].astype(np.int64)
        ends = np.cumsum(lengths)
        version = self._version(columns)
        found: list[list[Line]] = [[] for _ in rows]
        for n, (size, end) in enumerate(zip(lengths, ends, strict=True)):
            row = rows[n // self.sampling.samples]
            part = slice(int(end - size), int(end))
            sample, finished = int(written["sample"][n]), bool(written["finished"][n])
            line = row.continued(written["tokens"][part], written["logprobs"][part], sample, finished, version)
            found[n // self.sampling.samples].append(line)
        return found

    def _version(self, columns: Columns) -> int:
        """Finished steps of the student that writes."""
        if not self.follows:
            return 0
        return int(columns["policy_version"][0]) if "policy_version" in columns else int(columns["step"][0]) - 1


def drawn_at(step: int, sampling: Sampling) -> Sampling:
    """Draws of their own for every step, so that a row of a later epoch is written anew."""
    seed = int(np.random.SeedSequence((sampling.seed, step)).generate_state(1, np.uint64)[0] >> 2)
    return replace(sampling, seed=seed)


@dataclass(frozen=True)
class RowsOf:
    """Lets `term` count on some rows only: those that the student wrote, or the data's own. Adds `weights/<term>` (N,) float32."""

    term: str
    rows: Literal["written", "given"]

    endpoint = None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"written", "lengths", "loss_mask"})

    @property
    def adds(self) -> frozenset[str]:
        return frozenset({f"weights/{self.term}"})

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        chosen = columns["written"] == (self.rows == "written")
        mask = columns["loss_mask"].astype(bool)
        weights = np.repeat(chosen, columns["lengths"].astype(np.int64))[mask].astype(np.float32)
        return {**columns, f"weights/{self.term}": weights}


@dataclass(frozen=True)
class _Row:
    """One row as it came."""

    tokens: NDArray[np.generic]
    loss_mask: NDArray[np.generic]
    row_id: int
    domain: int
    prompt_length: int

    @property
    def prompt(self) -> NDArray[np.generic]:
        return self.tokens[: self.prompt_length]

    @property
    def reference(self) -> NDArray[np.generic]:
        return self.tokens[self.prompt_length :]

    @property
    def predicts(self) -> bool:
        """Whether it has loss tokens after its prompt."""
        return bool(self.loss_mask[self.prompt_length :].any())

    def given(self) -> Line:
        behaviour = np.zeros(int(np.count_nonzero(self.loss_mask)), dtype=np.float32)
        return Line(self.tokens, self.loss_mask, self.row_id, behaviour, self.reference, domain=self.domain)

    def chosen(self, sample: int) -> Line:
        """The row as it came, of whose prompt nothing is predicted."""
        mask = self.loss_mask.copy()
        mask[: self.prompt_length] = 0
        return replace(replace(self, loss_mask=mask).given(), sample=sample)

    def continued(self, text: NDArray[np.generic], logprobs: NDArray[np.generic], sample: int, finished: bool, version: int) -> Line:
        tokens = np.concatenate([self.prompt, text])
        mask = np.concatenate([np.zeros(self.prompt_length, np.uint8), np.ones(len(text), np.uint8)])
        return Line(tokens, mask, self.row_id, logprobs, self.reference, sample, finished, version, self.domain)


def rollouts(stages: Sequence[Stage]) -> list[Rollout]:
    """Those of `stages` in which the student writes."""
    return [s for s in stages if isinstance(s, Rollout)]


def _row(line: Line, prompt_tokens: int) -> _Row:
    mask = line.loss_mask
    first = int(np.argmax(mask)) if mask.any() else len(mask)
    prompt = first if first > 1 else min(prompt_tokens, max(1, len(mask) - 1))
    return _Row(line.tokens, mask, line.row_id, line.domain, prompt)


def _one(value: float) -> NDArray[np.float32]:
    return np.asarray([value], dtype=np.float32)
