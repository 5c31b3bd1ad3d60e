"""Rewards of written rows by a verifier, and what they are worth among the texts of the same prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strategies.core import Columns, Endpoint, Verifier

PASSING = 0.5
"""From this reward on, a text counts as right."""
SPREAD_FLOOR = 1e-6
"""Added to a group's standard deviation."""
_JUDGED_BY = {"tokens": "lengths", "loss_mask": "lengths", "reference": "reference_lengths"}
"""Columns that the endpoint is sent, and the lengths of their rows."""


@dataclass(frozen=True)
class Reward:
    """Adds what `endpoint` says of the rows whose `written` (R,) uint8 is 1: `reward` (R,) float32 from 0 to 1 and `judged` (R,)
    uint8; both are 0 for all other rows. Besides `judge/seconds` (1,) float32, and `judge/failed` and `judge/unjudgeable` (1,) int64,
    the rows without a verdict because the verifier gave way, or because their reference has no answer."""

    endpoint: str

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({*_JUDGED_BY, *_JUDGED_BY.values(), "written"})

    @property
    def adds(self) -> frozenset[str]:
        return frozenset({"reward", "judged", "judge/seconds", "judge/failed", "judge/unjudgeable"})

    def __call__(self, columns: Columns, endpoint: Endpoint | Verifier | None) -> Columns:
        if not isinstance(endpoint, Verifier):
            raise ValueError(f"stage Reward needs an endpoint that judges; {self.endpoint!r} does not")
        began = time.perf_counter()
        written = columns["written"].astype(bool)
        verdicts = endpoint.judge(_rows_of(columns, written))
        seconds = np.asarray([time.perf_counter() - began], dtype=np.float32)
        return {
            **columns,
            "reward": _spread(verdicts["reward"], written, np.float32),
            "judged": _spread(verdicts["judged"], written, np.uint8),
            "judge/failed": verdicts["failed"],
            "judge/unjudgeable": verdicts["unjudgeable"],
            "judge/seconds": seconds,
        }


@dataclass(frozen=True)
class GroupAdvantage:
    """Adds for each loss token, `(N,)` float32: `advantage`, A_i = (R_i - mean) / (std + 1e-6) of its row; `token_reward`, the reward
    of its row; `group_failed`, 1 where rows of its group were judged and none was right. And `group_pass_rate` (R,) float32, the share
    of the group's judged rows with a reward of 0.5 or more, 0 where none is.

    GRPO's outcome supervision (arXiv:2402.03300, section 4.1.2), with the population's standard deviation; without `scale` nothing
    is divided. Adjacent rows of equal `row_id` are a group; its mean and deviation are those of its written rows with a verdict.
    All others get an advantage of 0, and so does a group of equal rewards. Their `token_reward` is 1, because
    nobody knows them to be wrong. Whoever writes keeps a group in one bundle; here none is put together.
    """

    scale: bool = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reward", "judged", "written", "row_id", "lengths", "loss_mask"})

    @property
    def adds(self) -> frozenset[str]:
        return frozenset({"advantage", "token_reward", "group_failed", "group_pass_rate"})

    @property
    def endpoint(self) -> None:
        return None

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        rewards = columns["reward"].astype(np.float64)
        advantage, rate, failed, reward = (np.full_like(rewards, value) for value in (0.0, 0.0, 0.0, 1.0))
        for group, judged in groups(columns):
            if len(judged):
                reward[judged] = rewards[judged]
                advantage[judged] = advantages(rewards[judged], self.scale)
                rate[group] = np.mean(rewards[judged] >= PASSING)
                failed[group] = float(not np.any(rewards[judged] >= PASSING))
        counts = loss_counts(columns)
        per_token = {"advantage": advantage, "token_reward": reward, "group_failed": failed}
        found = {name: np.repeat(values, counts).astype(np.float32) for name, values in per_token.items()}
        return {**columns, **found, "group_pass_rate": rate.astype(np.float32)}


def advantages(rewards: NDArray[np.float64], scale: bool) -> NDArray[np.float64]:
    """`(n,)` of the n rewards of one group: without their mean, and in units of their standard deviation with `scale`."""
    centred = rewards - rewards.mean()  # exactly 0 for equal float32 rewards: float64 rounds neither their sum nor their mean
    return np.asarray(centred / (rewards.std() + SPREAD_FLOOR) if scale else centred)


def groups(columns: Columns) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For each run of rows with equal `row_id` and, where rows have one, rising `sample`: the numbers of its rows, and those of its
    written rows with a verdict; one empty run where there are no rows. Texts of one prompt that were recalled side by side stay apart."""
    row_id = columns["row_id"]
    new = np.diff(row_id) != 0
    if "sample" in columns:
        new |= np.diff(columns["sample"].astype(np.int64)) <= 0
    counts = columns["judged"].astype(bool) & columns["written"].astype(bool)
    rows = np.arange(len(row_id))
    for group in np.split(rows, np.flatnonzero(new) + 1):
        yield group, group[counts[group]]


def loss_counts(columns: Columns) -> NDArray[np.int64]:
    """`(R,)` loss tokens of each row."""
    before = np.concatenate([[0], np.cumsum(columns["loss_mask"].astype(np.int64))])
    lengths = columns["lengths"].astype(np.int64)
    ends = np.cumsum(lengths)
    return np.asarray(before[ends] - before[ends - lengths])


def _rows_of(columns: Columns, wanted: NDArray[np.bool_]) -> Columns:
    """The rows of a bundle that are `wanted` (R,), with the columns that a verifier reads."""
    parts = {name: columns[name][np.repeat(wanted, columns[by].astype(np.int64))] for name, by in _JUDGED_BY.items()}
    return parts | {name: columns[name][wanted] for name in set(_JUDGED_BY.values())}


def _spread(values: NDArray[np.generic], wanted: NDArray[np.bool_], dtype: type[np.generic]) -> NDArray[np.generic]:
    """One value for each wanted row, as one for each row. `ValueError` when there are not as many."""
    if values.shape != (int(wanted.sum()),):
        raise ValueError(f"verdicts: got {values.shape}; expected one for each of {int(wanted.sum())} written rows")
    spread = np.zeros(len(wanted), dtype=dtype)
    spread[wanted] = values
    return spread
