"""Who answers a run's questions: which store is found, finished, refused, and what is read from it."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.endpoints import check_scores, make_engine
from cluster.engines.store import StoreEngine
from cluster.storage import Folder
from cluster.stores.files import MANIFEST, StoreFiles
from jobs.stores import show_stores
from orchestrator.bundle import from_table
from orchestrator.checks.resumed import SIGNALS
from orchestrator.config import to_yaml
from orchestrator.display import Display
from orchestrator.errors import Refusal, RunFailed
from orchestrator.filling import Filling, fill, read_parts
from orchestrator.plan import FACTS, Plan, make_plan, plan_text
from orchestrator.reading import read_bundles
from orchestrator.result import RECIPE
from orchestrator.rows import Rows
from strategies.core import ScoreRequest
from tests.orchestrator.bench import Bench, put
from tests.tiny import tiny_model

TOP = ScoreRequest("topk", top_k=8)


def fill_here(job: Filling, only: int | None = None) -> StoreFiles:
    """What `fill` does, in this process; only the first parts if `only` says so."""
    engine = make_engine(job.config, job.spec.key.vocabulary, threads=1)
    job.files.begin(job.spec)
    infos = []
    for table in read_parts(job.rows, job.spec.starts, range(job.spec.parts if only is None else only)):
        info, content = job.keep(job.stage(from_table(table), engine))
        job.files.keep(info, content)
        infos.append(info)
    if only is None:
        job.files.finish(infos, {})
    return StoreFiles(job.files.folder)


def filled(bench: Bench, *overrides: str, only: int | None = None) -> StoreFiles:
    (job,) = bench.plan("signals=store", *overrides).captures()
    return fill_here(job, only)


@pytest.fixture
def small(bench: Bench) -> Bench:
    """Parts of few rows."""
    put("signals", {"part_tokens": 200})(bench)
    return bench


def test_without_a_store_teachers_answer_live_and_the_plan_names_the_mode(small: Bench) -> None:
    plan = small.plan()
    assert plan.sources.answering == plan.endpoints and plan.captures() == [] and plan.sources.read == ()
    assert plan.fingerprints[SIGNALS + "teacher"] == "live"


def test_a_store_that_is_asked_for_is_filled_before_training(small: Bench) -> None:
    plan = small.plan("signals=store")
    (job,) = plan.captures()
    assert job.spec.parts > 2 and job.spec.rows == plan.data.train.rows + plan.data.held_out.rows
    assert f"is filled first, in {job.spec.parts} parts" in " ".join(plan_text(plan).split())
    assert not small.storage.joinpath("signals").exists()  # a plan writes nothing


def test_a_finished_store_is_found_and_read_instead_of_the_teacher(small: Bench) -> None:
    files = filled(small)
    plan = small.plan()
    assert plan.captures() == [] and [w.state for w in plan.sources.read] == ["finished"]
    assert plan.sources.answering["teacher"].engine == "store"
    assert plan.stream().endpoints == plan.sources.answering
    assert plan.fingerprints[SIGNALS + "teacher"] == files.spec.key.digest
    assert "is there whole: the teacher is not asked" in " ".join(plan_text(plan).split())
    assert small.plan("signals=live").sources.answering == plan.endpoints


def test_a_partial_store_is_finished_and_not_begun_again(small: Bench) -> None:
    filled(small, only=2)
    plan = small.plan()
    assert [w.state for w in plan.sources.captures] == ["partial"]
    assert "has 2 of" in plan_text(plan)
    assert plan.captures()[0].files.complete_parts() == StoreFiles(plan.captures()[0].files.folder).complete_parts()


@pytest.mark.parametrize(
    "change",
    ["data.split_seed=1", "strategy.top_k=4", "signals.codec=exact", "data.max_length_tokens=32", "endpoints.teacher.dtype=bfloat16"],
)
def test_what_answers_depend_on_makes_another_store(small: Bench, change: str) -> None:
    files = filled(small)
    plan = small.plan(change)
    assert plan.sources.answering == plan.endpoints
    (note,) = plan.sources.notes
    assert files.folder.root.rpartition("/")[2] in note and "differs in" in note


@pytest.mark.parametrize(
    "change", ["seed=5", "train.steps=9", "train.batch_rows=4", "strategy.temperature=2", "train.lr=1", "student.lora.r=4"]
)
def test_what_answers_do_not_depend_on_shares_the_store(small: Bench, change: str) -> None:
    filled(small)
    assert small.plan(change).sources.answering["teacher"].engine == "store"


def test_another_teacher_is_named(small: Bench) -> None:
    filled(small)
    other = small.copy("teacher", "other-teacher")
    tiny_model(other, vocab_size=512, width=48, seed=77)
    (note,) = small.plan(f"endpoints.teacher.model={other}").sources.notes
    assert "differs in teacher.weights" in note


def test_damage_is_refused_at_the_door(small: Bench) -> None:
    files = filled(small)
    (Path(files.folder.root) / "part-000001.arrow").unlink()
    with pytest.raises(Refusal, match=r"part-000001\.arrow: is missing.*distill stores prune"):
        small.plan()
    assert small.plan("signals=live").captures() == []


# A store named in the recipe


def named(bench: Bench, files: StoreFiles) -> dict[str, Any]:
    bench.recipe["endpoints"] = {"teacher": {"engine": "store", "folders": [files.folder.root]}}
    return bench.recipe


def test_a_named_store_teaches_without_the_teachers_files(small: Bench) -> None:
    files = filled(small)
    named(small, files)
    plan = small.plan()
    assert plan.sources.answering == plan.endpoints and plan.cast.teachers == {}


@pytest.mark.parametrize(
    ("change", "field"),
    [("data.split_seed=1", "data"), ("strategy.top_k=4", "request.top_k"), ("data.max_length_tokens=32", "data")],
)
def test_a_named_store_of_something_else_is_refused_with_the_field(small: Bench, change: str, field: str) -> None:
    named(small, filled(small))
    with pytest.raises(Refusal, match=rf"endpoints\.teacher\.folders: got a store whose {field} is"):
        small.plan(change)


def test_a_named_folder_must_hold_a_finished_store(small: Bench, tmp_path: Path) -> None:
    files = filled(small)
    named(small, files)
    (Path(files.folder.root) / MANIFEST).unlink()
    with pytest.raises(Refusal, match="which is not finished"):
        small.plan()
    named(small, StoreFiles(Folder(str(tmp_path / "nothing"))))
    with pytest.raises(Refusal, match=r"store\.json: is missing"):
        small.plan()


# Going on


def begun(bench: Bench, *overrides: str) -> Plan:
    plan = bench.plan("name=old", *overrides)
    plan.folder.write(RECIPE, to_yaml(plan.job.run).encode())
    plan.folder.write(FACTS, plan.facts.to_json())
    return plan


def test_a_run_that_began_live_goes_on_live(small: Bench) -> None:
    before = begun(small)
    filled(small)
    after = make_plan(small.job(), "recipe", resume=before.folder)
    assert after.sources.answering == after.endpoints and after.fingerprints == before.fingerprints


def test_a_run_that_began_with_a_store_goes_on_with_it(small: Bench) -> None:
    files = filled(small)
    before = begun(small)
    after = make_plan(small.job(), "recipe", resume=before.folder)
    assert after.sources.answering == before.sources.answering
    for path in Path(files.folder.root).iterdir():
        path.unlink()
    again = make_plan(small.job(), "recipe", resume=before.folder)  # it was pruned meanwhile: it is filled again
    assert [w.state for w in again.sources.captures] == ["missing"] and again.fingerprints == before.fingerprints


# What is read


def answered(bench: Bench, *overrides: str) -> tuple[Plan, StoreEngine]:
    filled(bench, *overrides)
    plan = bench.plan(*overrides)
    return plan, StoreEngine(plan.sources.answering["teacher"])


def test_every_bundle_of_the_stream_is_answered_as_the_teacher_would(small: Bench) -> None:
    plan, engine = answered(small, "signals.codec=exact")
    teacher = make_engine(plan.endpoints["teacher"], plan.vocabulary)
    bundles = [from_table(t) for t in read_bundles(plan.order, 0, 1, with_held_out=True)]
    assert {int(b["step"][0]) for b in bundles} == {0, 1, 2, 3, 4}
    for columns in bundles:
        got, wanted = engine.score(columns, TOP), teacher.score(columns, TOP)
        check_scores(columns, got, TOP, plan.vocabulary)
        assert got.keys() == wanted.keys()
        np.testing.assert_allclose(got["logprobs"], wanted["logprobs"], atol=2e-6)
        np.testing.assert_allclose(got["logprob"], wanted["logprob"], atol=2e-6)


def test_a_question_that_no_store_answers_is_refused(small: Bench) -> None:
    plan, engine = answered(small)
    columns = from_table(next(read_bundles(plan.order, 0, 1, with_held_out=False)))
    with pytest.raises(ValueError, match="expected one of that question"):
        engine.score(columns, ScoreRequest("topk", top_k=9))


def test_held_out_rows_have_numbers_of_their_own(small: Bench) -> None:
    plan = small.plan()
    bundles = [from_table(t) for t in read_bundles(plan.order, 0, 1, with_held_out=True)]
    held_out = np.concatenate([b["row_id"] for b in bundles if b["step"][0] == 0])
    train = len(Rows(plan.data.folder, "train"))
    assert sorted(held_out.tolist()) == list(range(train, train + plan.data.held_out.rows))


def test_parts_are_consecutive_rows_of_one_split_each(small: Bench) -> None:
    plan = small.plan("signals=store")
    starts, train = np.asarray(plan.captures()[0].spec.starts), plan.data.train.rows
    assert starts[0] == 0 and train in starts and starts[-1] == train + plan.data.held_out.rows
    assert (np.diff(starts) > 0).all()
    tokens = [int(Rows(plan.data.folder, "train").lengths[a:b].sum()) for a, b in itertools.pairwise(starts) if b <= train]
    assert max(tokens) <= 200 + 64 and len(tokens) == pytest.approx(plan.data.train.tokens / 200, abs=2)


# Listed, verified, removed


def test_stores_are_listed_verified_and_removed(small: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    finished, partial = filled(small), filled(small, "strategy.top_k=4", only=1)
    config = small.storage.parent / "ray_config.yaml"
    config.write_text(json.dumps(small.cluster))
    show_stores("list", [], config, unfinished=False)
    said = capsys.readouterr().out
    assert "finished" in said and f"1 of {partial.spec.parts} parts" in said and "topk top_k=8" in " ".join(said.split())
    show_stores("verify", [], config, unfinished=False)
    assert capsys.readouterr().out.count("sound, ") == 2
    path = Path(finished.folder.root) / "part-000000.arrow"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    name = finished.folder.root.rpartition("/")[2]
    with pytest.raises(Refusal, match=rf"1 damaged.*distill stores prune .*{name}"):
        show_stores("verify", [], config, unfinished=False)
    assert "part-000000.arrow: its bytes are not those that were written" in capsys.readouterr().out
    show_stores("prune", [], config, unfinished=False)
    assert "Nothing to remove" in capsys.readouterr().out
    show_stores("prune", [], config, unfinished=True)
    show_stores("prune", [name], config, unfinished=False)
    assert capsys.readouterr().out.count("Removed ") == 2 and not list((small.storage / "signals").iterdir())
    with pytest.raises(Refusal, match="which is no store"):
        show_stores("verify", [name], config, unfinished=False)


# Filling by Ray


@pytest.mark.usefixtures("ray_session")
def test_ray_fills_what_this_process_would(small: Bench, tmp_path: Path) -> None:
    small.cluster["address"] = "auto"
    (job,) = small.plan("signals=store").captures()
    by_hand = fill_here(replace(job, files=StoreFiles(Folder(str(tmp_path / "elsewhere")))))
    fill_here(job, only=2)
    filled_now = fill(job, Display())
    files = StoreFiles(job.files.folder)
    files.check()
    assert [p.checksum for p in files.parts] == [p.checksum for p in by_hand.parts]
    assert filled_now.tokens == sum(p.tokens for p in files.parts[2:])  # those of an earlier call are not scored again
    assert sorted(p.name for p in Path(files.folder.root).iterdir() if "part" not in p.name) == ["manifest.json", "store.json"]
    again = fill(job, Display())
    assert again.tokens == 0 and json.loads(files.manifest_text)["written"] <= time.strftime("%Y-%m-%dT%H:%M:%S%z")


@pytest.mark.usefixtures("ray_session")
def test_a_teacher_that_fails_is_told_in_words_and_its_parts_are_kept(small: Bench) -> None:
    small.cluster["address"] = "auto"
    put("endpoints", {"teacher": {"engine": "fake", "vocabulary": 512}})(small)
    (job,) = small.plan("signals=store").captures()
    fill_here(job, only=2)
    too_many = replace(job, config=job.config.model_copy(update={"vocabulary": 3}))
    with pytest.raises(RunFailed, match=r"asking 'teacher' for its signals failed: .*top_k: got 8.* Complete parts are kept in"):
        fill(too_many, Display())
    assert len(job.files.complete_parts()) == 2 and not job.files.finished
