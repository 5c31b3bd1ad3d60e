"""Controllers in a run: what they hear, what goes out with a student's version, and how it reaches the rows of a step."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.board import Board
from orchestrator.bundle import from_table
from orchestrator.controls import Controls
from orchestrator.order import Order
from orchestrator.reading import read_bundles
from orchestrator.versions import Parcel, Publisher
from strategies.control import AdaptiveShare, told
from strategies.core import Progress
from strategies.objectives.taid import TaidController, TaidPace
from tests.prepared import write_split

LISTENING = {"share": AdaptiveShare(start=0.2, tolerance=-9.0), "taid": TaidController(TaidPace(rate=0.2, inertia=0.5), "kd")}
STEPS = 8


def walk(controls: Controls, steps: range) -> list[dict[str, float]]:
    """Trains on losses that fall, evaluating every second step; values of each step."""
    found = []
    for step in steps:
        found.append(controls.values)
        controls.after_step({"skipped": 0.0, "loss/kd": 5.0 / step}, Progress(step - 1, STEPS))
        controls.send_with(step)
        if step % 2 == 0:
            controls.after_evaluation({"eval/cross_entropy": 3.0})
    return found


def begin() -> Controls:
    controls = Controls(LISTENING, {}, versions=3)
    controls.send_with(0)
    return controls


def test_a_run_that_goes_on_has_the_values_of_one_that_never_stopped() -> None:
    whole, first = begin(), begin()
    expected = walk(whole, range(1, STEPS + 1))
    values = walk(first, range(1, 5))
    again = Controls(LISTENING, json.loads(json.dumps(first.to_json())), versions=3)
    again.send_with(4)  # the version that it sends out again, with what it went out with before the evaluation after step 4
    assert again.versions == first.versions and list(first.versions) == [2, 3, 4]
    assert again.versions[4] != again.values
    assert values + walk(again, range(5, STEPS + 1)) == expected
    assert again.versions == whole.versions
    assert len({v["taid"] for v in expected}) > 3 and len({v["share"] for v in expected}) == 3


def test_a_skipped_step_and_nobody_who_listens_leave_nothing() -> None:
    controls = begin()
    before = controls.to_json()
    controls.after_step({"skipped": 1.0, "loss/kd": float("nan")}, Progress(0, STEPS))
    assert controls.to_json() == before and set(controls.metrics) == {"control/share", "control/taid"}
    assert Controls({}, {}, 1).to_json() == {} and Controls({}, {}, 1).values == {}


def test_a_step_gets_the_values_of_the_version_that_is_due() -> None:
    async def scene() -> None:
        board = Board()
        board.begin(1, 0, 0.0)
        await board.publish(1, {2: ["two"], 3: ["three"]}, {2: {"share": 0.1}, 3: {"share": 0.2}})
        assert await board.wait_for_version(1, 2) == {"share": 0.1}
        assert await board.wait_for_version(1, 3) == {"share": 0.2}
        await board.publish(1, {4: ["four"]})
        assert await board.wait_for_version(1, 4) == {}

    asyncio.run(scene())


def test_the_reader_writes_them_beside_the_rows(tmp_path: Path) -> None:
    for split in ("train", "held_out"):
        write_split(tmp_path, split, np.random.default_rng(0).integers(4, 30, 12))  # type: ignore[arg-type]
    order = Order(str(tmp_path), seed=3, steps=3, bundles_per_step=2, batch_rows=4)
    bundles = [from_table(t) for t in read_bundles(order, 0, 1, True, lambda attempt, step: {"share": step / 4})]
    assert {(int(b["step"][0]), told(b)["share"]) for b in bundles if b["step"][0]} == {(1, 0.25), (2, 0.5), (3, 0.75)}
    assert len({frozenset(b) for b in bundles}) == 1, "all bundles have the same columns"


def test_a_step_that_was_skipped_or_taught_nothing_is_not_told() -> None:
    controls = begin()
    controls.after_step({"skipped": 0.0, "loss/kd": 5.0}, Progress(0, STEPS))
    before = controls.to_json()["states"]
    controls.after_step({"skipped": 1.0, "loss/kd": float("nan")}, Progress(1, STEPS))
    controls.after_step({"skipped": 0.0, "micro_batches": 0.0, "loss/kd": 0.0}, Progress(2, STEPS))
    assert controls.to_json()["states"] == before


class Told:
    """A board that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[int, Any], dict[int, dict[str, float]]]] = []
        self.publish = self

    def remote(self, attempt: int, versions: dict[int, Any], values: dict[int, dict[str, float]]) -> None:
        self.told.append((attempt, versions, values))


def test_values_go_out_without_weights_where_nobody_follows_and_those_that_are_due_are_repeated(tmp_path: Path) -> None:
    board = Told()
    publisher = Publisher(board, None, 0, 2, Parcel(weights=False))  # type: ignore[arg-type]
    controls = Controls(LISTENING, {"versions": {"5": {"share": 0.1}, "6": {"share": 0.2}, "7": {"share": 0.3}}}, versions=3)
    publisher.begin(4, 7, {}, controls.versions)
    attempt, versions, values = board.told[-1]
    assert attempt == 4 and {n: v for n, v in values.items() if n >= 0} == {5: {"share": 0.1}, 6: {"share": 0.2}, 7: {"share": 0.3}}
    assert all(sets == {} for sets in versions.values())
    controls.send_with(8)
    publisher.publish(8)
    publisher.settled()
    publisher.publish(9)
    publisher.end()
    assert sorted(board.told[-1][1]) == [7, 8, 9] and board.told[-1][2][8] == controls.versions[8]
    publisher.keep(tmp_path)
    assert not list(tmp_path.iterdir())
