"""Population-based training without Ray: who restarts from whom, what is kept for it, and the schedule that comes of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from cluster.storage import Folder
from orchestrator import checkpoint
from orchestrator.board import Entry
from orchestrator.errors import Refusal
from orchestrator.search import trial as trials_module
from orchestrator.search.book import Book, Move, Restart, Trial, run_name
from orchestrator.search.lineage import grown, schedules
from orchestrator.search.plan_text import search_text
from orchestrator.search.population import Member, Pointer, moves
from orchestrator.search.settings import Objective, SearchConfig
from orchestrator.search.space import Point
from orchestrator.search.trial import CHECKPOINT, GENERATION, OUTCOME, TIME, Hearing
from strategies.core import Progress
from strategies.schedule import ScheduleConfig, schedule
from tests.orchestrator.search_session import METRIC, Asked, Session
from tests.orchestrator.test_search_door import planned

LR: Point = {"train.lr": 1.0}
EVERY = 4


def test_a_lineage_is_a_schedule_that_says_at_every_step_what_was_trained_with() -> None:
    legs = grown(grown(((0, {"a": 1.0, "b": 5.0}),), 4, {"a": 2.0, "b": 5.0}), 8, {"a": 3.0, "b": 5.0})
    legs = grown(legs, 8, {"a": 4.0, "b": 5.0})  # what another made of the same step gives way
    wanted = {"a": [1.0] * 4 + [2.0] * 4 + [4.0] * 4, "b": [5.0] * 12}
    for path, value in schedules(legs).items():
        found = schedule(TypeAdapter(ScheduleConfig).validate_python(value))
        assert [found(Progress(step, 12)) for step in range(12)] == wanted[path]
    assert schedules(legs) == {"a": {"steps": [[0, 1.0], [4, 2.0], [8, 4.0]]}, "b": 5.0}


def config(**settings: Any) -> SearchConfig:
    space = {"a": {"uniform": [1, 10]}, "b": {"choice": [1, 2, 3]}, "c": {"log_uniform": [0.1, 10]}, "d": {"integer": [1, 10]}}
    return SearchConfig.model_validate({"space": space, "scheduler": {"type": "pbt", **settings}, "trials": 8, "concurrent": 8})


def members(count: int) -> list[Member]:
    return [Member(Pointer(n, f"/runs/{n}"), float(n), {"a": 10.0 - n, "b": 1 + n % 3, "c": 10.0, "d": 1}) for n in range(count)]


def test_the_worst_go_on_from_the_best_with_values_near_theirs_or_drawn_anew() -> None:
    found = moves(config(), 4, members(8))
    assert [(m.number in (6, 7), m.source in (0, 1), m.checkpoint == f"/runs/{m.source}") for m in found] == [(True, True, True)] * 2
    assert {m.number for m in found} == {6, 7}
    assert moves(config(), 4, members(8)) == found != moves(config(), 8, members(8))
    near = moves(config(resample=0), 4, members(2))
    assert near[0].point["a"] in (8.0, 10.0)  # 10 times 0.8, and 12 is outside
    assert near[0].point["c"] in (8.0, 10.0) and near[0].point["b"] in (1, 2) and near[0].point["d"] == 1


def test_a_larger_value_may_be_the_better_one_and_nan_is_nobodys() -> None:
    larger = SearchConfig.model_validate({**config().model_dump(exclude_defaults=True), "objective": "eval/accuracy"})
    assert [(m.number, m.source) for m in moves(larger, 4, members(2))] == [(0, 1)]
    lost = members(3)
    lost[0].value = float("nan")
    assert [(m.number, m.source) for m in moves(config(), 4, lost)] == [(2, 1)]
    assert moves(config(), 4, members(1)) == []


@pytest.mark.parametrize("seed", range(5))
def test_drawn_values_lie_in_their_domains_and_others_dice_are_left_alone(seed: int) -> None:
    search = config(resample=1, quantile=0.5).model_copy(update={"seed": seed})
    random.seed(3)
    for move in moves(search, 4, members(8)):
        a, b, c, d = (move.point[path] for path in "abcd")
        assert isinstance(a, float) and isinstance(c, float) and isinstance(d, int)
        assert 1 <= a <= 10 and b in (1, 2, 3) and 0.1 <= c <= 10 and 1 <= d <= 10
    assert random.random() == random.Random(3).random()


def test_the_book_knows_the_lineage_of_every_trial(tmp_path: Path) -> None:
    book = Book(tmp_path)
    for number, value in enumerate((1.0, 2.0)):
        book.propose(number, {"a": value})
    book.compare(4, [Move(1, 0, "/runs/0/at-4", {"a": 1.2})])
    book.compare(8, [Move(0, 1, "/runs/1/at-8", {"a": 1.5})])
    for known in (book, Book(tmp_path)):
        one, two = known.trials()
        assert one.settings == {"a": {"steps": [[0, 1.0], [4, 1.2], [8, 1.5]]}} and one.point == {"a": 1.5}
        assert two.settings == {"a": {"steps": [[0, 1.0], [4, 1.2]]}}
        assert (one.generation, two.restarts, known.compared_step) == (1, (Restart(4, 0, "/runs/0/at-4"),), 8)
    book.end(two)
    assert Book(tmp_path).trials()[1] == two


def committed(run: Folder, step: int, value: float) -> str:
    """A checkpoint of a run, as Ray Train's snapshot names it."""
    position = checkpoint.Position(step, 1, {METRIC: value})
    found = run.child(checkpoint.name_of(1, step))
    found.write(checkpoint.PROGRESS, json.dumps(vars(position)).encode())
    found.write("weights", b"1")
    snapshot = json.loads(run.read(checkpoint.SNAPSHOT) or b'{"checkpoint_results": []}')
    latest = {"checkpoint_dir_name": checkpoint.name_of(1, step)}
    content = {"checkpoint_results": [*snapshot["checkpoint_results"], latest], "latest_checkpoint_result": latest}
    run.write(checkpoint.SNAPSHOT, json.dumps(content).encode())
    return found.root


def population(folder: Path, trials: int = 2) -> Session:
    scheduler = {"type": "pbt", "every_steps": EVERY, "resample": 0}
    return Session.of(folder, every_steps=EVERY, scheduler=scheduler, trials=trials, concurrent=trials)


def reach(session: Session, judge: Any, trial: Asked, step: int, value: float, generation: int = 0) -> None:
    """A trial's run commits a checkpoint and reports it."""
    run = session.court.run(trial.config["number"], generation)
    session.report(judge, trial, step, value, **{GENERATION: generation, CHECKPOINT: committed(run, step, value)})


def test_the_worse_of_two_restarts_from_the_other_and_old_news_of_it_are_not_heard(tmp_path: Path) -> None:
    session = population(tmp_path)
    proposals, judge = session.sides()
    good, bad = (session.begin(proposals, judge, name) for name in ("a", "b"))
    reach(session, judge, good, 4, 1.0)
    reach(session, judge, good, 8, 0.9)  # it is ahead, and what counts at 4 is what it had at 4
    assert session.stopped == []
    reach(session, judge, bad, 4, 2.0)
    assert session.stopped == [1]
    trial = session.court.book.trials()[1]
    assert trial.restarts == (Restart(4, 0, str(tmp_path / "runs/find-000/checkpoint_001_00000004")),)
    assert trial.legs == ((0, {"train.lr": 1}), (4, trial.point)) and trial.point["train.lr"] in (1, 2)
    session.report(judge, bad, 5, 9.0, **{GENERATION: 0, OUTCOME: "finished"})
    assert session.court.book.trials()[1] == trial
    session.report(judge, bad, 6, 0.5, **{GENERATION: 1})
    assert session.court.book.trials()[1].metrics[METRIC] == 0.5
    assert session.court.folder(1).name == run_name("find", 1, 1) == "find-001-g1"


def test_nobody_waits_for_a_trial_that_has_ended_and_it_does_not_restart(tmp_path: Path) -> None:
    session = population(tmp_path, trials=3)
    proposals, judge = session.sides()
    good, bad, lost = (session.begin(proposals, judge, name) for name in ("a", "b", "c"))
    reach(session, judge, good, 4, 1.0)
    reach(session, judge, bad, 4, 2.0)
    session.report(judge, bad, 8, 1.5, **{GENERATION: 0, OUTCOME: "finished"})
    assert session.court.book.compared_step == 0
    session.report(judge, lost, 2, 9.0, **{GENERATION: 0, OUTCOME: "failed"})
    assert (session.court.book.compared_step, session.stopped) == (4, [])
    assert [t.generation for t in session.court.book.trials()] == [0, 0, 0]


def test_what_a_trial_begins_with_is_kept_and_what_nobody_needs_is_given_up(tmp_path: Path) -> None:
    session = population(tmp_path)
    proposals, judge = session.sides()
    good, bad = (session.begin(proposals, judge, name) for name in ("a", "b"))
    for step in (4, 8):
        reach(session, judge, good, step, 1.0 / step)
    reach(session, judge, bad, 4, 2.0)
    runs = [session.court.run(0), session.court.run(1, 0), session.court.run(1)]
    assert [len(checkpoint.kept(run)) for run in runs] == [2, 1, 0]
    reach(session, judge, bad, 8, 3.0, generation=1)
    assert session.court.book.trials()[1].generation == 2
    # The first trial's checkpoint after 4 steps was what its run is not best at, and the second began with it; it begins with 8 now.
    assert [len(checkpoint.kept(run)) for run in runs] == [1, 0, 1]
    assert Folder(str(tmp_path / "runs/find-001/checkpoint_001_00000004")).names() == [checkpoint.RELEASED]
    assert checkpoint.at(runs[0], 4) is None and checkpoint.at(runs[0], 8) is not None


def test_a_search_that_goes_on_knows_what_its_trials_had_reached(tmp_path: Path) -> None:
    first = population(tmp_path)
    proposals, judge = first.sides()
    good, bad = (first.begin(proposals, judge, name) for name in ("a", "b"))
    reach(first, judge, good, 4, 1.0)
    again = population(tmp_path)
    proposals, judge = again.sides()
    good, bad = (again.begin(proposals, judge, name) for name in ("a", "b"))
    reach(again, judge, bad, 4, 2.0)
    assert again.stopped == [1] and again.court.book.trials()[1].restarts[0].source == 0


def test_a_report_waits_for_its_checkpoint_and_later_ones_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(trials_module.tune, "report", told.append)
    run = Folder(str(tmp_path))
    hearing = Hearing((Objective(),), steps=12, step=4, begun=4, generation=1, every_steps=EVERY, folder=run)
    step = {"tokens": 10.0, "step_seconds": 0.5}
    old = [Entry("step", 1, 4, step), Entry("eval", 1, 4, {METRIC: 2.0})]
    hearing([*old, Entry("step", 1, 8, step), Entry("eval", 1, 8, {METRIC: 1.5}), Entry("eval", 1, 9, {METRIC: 1.4})])
    assert told == []
    pointer = committed(run, 8, 1.5)
    hearing([])
    assert [(t[TIME], t[GENERATION], t.get(CHECKPOINT), t["tokens"]) for t in told] == [(8, 1, pointer, 10.0), (9, 1, None, 10.0)]


PBT = {"scheduler": {"type": "pbt", "every_steps": 2}, "trials": 2, "concurrent": 2}
SPACE: dict[str, Any] = {"train.lr": {"log_uniform": [1e-4, 1e-2]}, "strategy.temperature": {"choice": [1.0, 2.0]}}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a model": ({"student.init": {"choice": ["random", "pretrained"]}}, {}, "student.init: got a setting that cannot change in mid-run"),
    "a number that is no schedule": ({"train.weight_decay": {"uniform": [0, 1]}}, {}, "weight_decay: got a setting that cannot change"),
    "the question": ({"strategy.top_k": {"choice": [4, 8], "rescore": True}}, {}, "values that are scored anew"),
    "a condition": ({"train.lr": {"uniform": [1, 2], "when": {"train.lr_schedule": "cosine"}}}, {}, "got a condition"),
    "some at a time": (SPACE, {"trials": 4}, "got 2 of 4 trials at once.*Set search.concurrent=4"),
    "one alone": (SPACE, {"trials": 1}, "two at least"),
    "no comparison": (SPACE, {"scheduler": "pbt"}, "no every_steps"),
    "none before the end": (SPACE, {"scheduler": {"type": "pbt", "every_steps": 4}}, "a first comparison after 4 of 4 steps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_on_from_another_is_refused(bench: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    space, settings, words = REFUSED[case]
    with pytest.raises(Refusal, match=words):
        planned(bench, space, **{**PBT, **settings})


def test_the_plan_of_a_population_says_how_often_it_is_compared(bench: Any) -> None:
    plan = planned(bench, SPACE, **PBT)
    assert plan.spec.every_steps == 2
    assert "pbt: compared every 2 steps, the worst 25% go on from checkpoints of the best" in " ".join(search_text(plan).split())
    run = plan.spec.job({"train.lr": {"steps": [[0, 1e-2], [2, 1e-3]]}}).run
    assert (run.checkpoint.every_steps, run.checkpoint.keep) == (2, trials_module.ALL)
    assert plan.spec.recipe({"train.lr": 1e-2}).checkpoint == plan.spec.recipe({}).checkpoint != run.checkpoint
    assert Trial(0, {"train.lr": 1e-2}).settings == {"train.lr": 1e-2}
