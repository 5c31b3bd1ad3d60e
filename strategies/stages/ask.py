"""Ask: one of several teachers is asked about the rows that it is meant for, and what becomes of them when it does not answer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from strategies.control import CONTROL, Controlled, told
from strategies.core import COUNT, Columns, Endpoint, Progress, Schedule
from strategies.domains import DOMAIN, domain_id
from strategies.schedule import constant
from strategies.stages.judge import loss_counts
from strategies.stages.score import Score

PATIENCE_SECONDS = (1.0, 60.0)
"""First and longest pause before somebody who did not answer is asked again."""
CONTROL_NAMES = ("step", "steps", "bundle", "attempt", "rows_total", "policy_version")
"""Columns of one number that say what a bundle is for."""
OnFailure = Literal["stop", "wait", "reweight"]


@dataclass(frozen=True)
class Ask(Score):
    """Score by one of several teachers: only of rows that it is meant for, and only at steps at which it has a weight.

    Adds what `Score` adds, where a teacher that was not asked about a row is taken to know nothing, `<signal>/answered` (R,) uint8, and
    `count/unanswered/<signal>` (1,), rows that it should have answered and did not. Held-out rows (`step` 0) are asked of everybody.
    For requests of kind `topk` and `dense`.
    """

    domains: tuple[str, ...] = ()
    """Rows of these alone; of all without any."""
    weight: Schedule = constant(1.0)
    """Nothing is asked at steps at which it is 0."""
    on_failure: OnFailure = "stop"
    """When nobody answers (`ConnectionError`): the error is raised; or the same is asked again until somebody does; or the rows go on
    without this teacher, but for held-out ones, which wait."""

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"row_id", "step", "steps"} | read_columns(self.weight, self.domains)

    @property
    def adds(self) -> frozenset[str]:
        return super().adds | {f"{self.signal}/answered", f"{COUNT}unanswered/{self.signal}"}

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        if endpoint is None:
            raise ValueError(f"stage Ask needs the endpoint {self.endpoint!r} and was given none")
        held_out = is_held_out(columns)
        asked = np.ones(len(columns["lengths"]), dtype=bool) if held_out else self._asked(columns)
        began = time.perf_counter()
        answers = self._answers(rows_of(columns, asked), endpoint, held_out) if asked.any() else None
        answered = asked if answers is not None else np.zeros_like(asked)
        found = self._whole(answers or {}, np.repeat(answered, loss_counts(columns)))
        found |= {"seconds": _one(time.perf_counter() - began), "answered": answered.astype(np.uint8)}
        lacking = _one(int(np.count_nonzero(asked & ~answered)))
        return {**columns, **{f"{self.signal}/{n}": v for n, v in found.items()}, f"{COUNT}unanswered/{self.signal}": lacking}

    def _asked(self, columns: Columns) -> NDArray[np.bool_]:
        """Rows `(R,)` that it is to answer for."""
        return is_of(columns, self.domains) & (self.weight(progress_of(columns)) != 0)

    def _answers(self, columns: Columns, endpoint: Endpoint, held_out: bool) -> Columns | None:
        """None where the rows go on without an answer."""
        pause, longest = PATIENCE_SECONDS
        while True:
            try:
                return endpoint.score(columns, self.request)
            except ConnectionError:
                if self.on_failure == "stop":
                    raise
                if self.on_failure == "reweight" and not held_out:
                    return None
                time.sleep(pause)
                pause = min(2 * pause, longest)

    def _whole(self, answers: Columns, places: NDArray[np.bool_]) -> Columns:
        """Answers about some loss tokens, those at `places` (N,), as answers about all."""
        tokens = len(places)
        width = self.request.top_k or (len(answers["dense"]) // max(1, int(places.sum())) if answers else 1)
        even = -np.log(width + (self.request.kind == "topk"))  # the rest counts as one more token
        blank: Columns = {"logprob": np.full(tokens, even, np.float32)}
        if self.request.kind == "topk":
            ids = np.broadcast_to(np.arange(width, dtype=np.int32), (tokens, width)).copy()
            blank |= {"ids": ids, "logprobs": np.full((tokens, width), even, np.float32)}
        else:
            blank["dense"] = np.full((tokens, width), even, np.float32)
        for name, values in blank.items():
            if answers:
                values[places] = answers[name].reshape(-1, *values.shape[1:])
        more = {name: answers[name] for name in ("cost",) if name in answers}
        return {n: v.ravel() for n, v in blank.items()} | more | {"dropped_mass": answers.get("dropped_mass", _one(0.0))}


def is_held_out(columns: Columns) -> bool:
    return int(columns["step"][0]) == 0


def progress_of(columns: Columns) -> Progress:
    """Where the run stands that a bundle is made for; its beginning for held-out rows."""
    return Progress(max(0, int(columns["step"][0]) - 1), int(columns["steps"][0]), told(columns))


def read_columns(weight: Schedule, domains: tuple[str, ...]) -> frozenset[str]:
    """Columns that a member's weight and domains are read from."""
    moved = {CONTROL + weight.control} if isinstance(weight, Controlled) else set()
    return frozenset(moved | ({DOMAIN} if domains else set()))


def is_of(columns: Columns, domains: tuple[str, ...]) -> NDArray[np.bool_]:
    """Rows `(R,)` of some domains; all where there are none."""
    if not domains:
        return np.ones(len(columns["lengths"]), dtype=bool)
    return np.isin(columns[DOMAIN], [domain_id(name) for name in domains])


def rows_of(columns: Columns, wanted: NDArray[np.bool_]) -> Columns:
    """The rows of a bundle that are `wanted` (R,), as an endpoint reads them, with its columns of one number."""
    by_token = np.repeat(wanted, columns["lengths"].astype(np.int64))
    flat = {name: columns[name][by_token] for name in ("tokens", "loss_mask")}
    control: Columns = {name: columns[name] for name in CONTROL_NAMES if name in columns}
    return {**flat, **{name: columns[name][wanted] for name in ("lengths", "row_id")}, **control}


def _one(value: float) -> NDArray[np.float32]:
    return np.asarray([value], dtype=np.float32)
