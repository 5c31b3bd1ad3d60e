"""Going on with a run: only what leaves its result alone may have changed."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cluster.config import FakeEndpoint
from cluster.endpoints import make_engine
from cluster.engines.fake_server import FakeServer
from orchestrator.checks import resumed
from orchestrator.config import to_yaml
from orchestrator.errors import Refusal
from orchestrator.journal import Heartbeat
from orchestrator.plan import FACTS, Plan, make_plan, plan_text
from orchestrator.result import RECIPE
from tests.orchestrator.bench import TEXT, Bench, both, machine_of, put
from tests.tiny import tiny_model


def begun(bench: Bench, *overrides: str) -> Plan:
    """A run's folder as the driver leaves it after its first moments."""
    plan = bench.plan("name=old", *overrides)
    plan.folder.write(RECIPE, to_yaml(plan.job.run).encode())
    plan.folder.write(FACTS, plan.facts.to_json())
    return plan


@pytest.mark.parametrize(
    "override",
    [
        "train.workers=2",
        "train.max_failures=9",
        "endpoints.teacher.actors=2",
        "endpoints.teacher.resources.cpus=0.2",
        "tags.a=b",
        "alarms.stop=true",
    ],
)
def test_a_run_goes_on_with_other_resources(bench: Bench, override: str) -> None:
    machine_of()(bench)
    before = begun(bench, "train.layout=ddp")
    after = make_plan(bench.job("train.layout=ddp", override), "recipe", resume=before.folder)
    assert (after.name, after.folder, after.done_steps) == ("old", before.folder, 0)
    assert after.fingerprints == before.fingerprints and "goes on from the start" in plan_text(after)


def test_a_teacher_of_the_cluster_stays_what_it_was(bench: Bench) -> None:
    """The recipe says nothing of it, and its weights are the same."""
    del bench.recipe["endpoints"]
    bench.cluster["endpoints"] = {"teacher": {"model": str(bench.folder / "teacher"), "attention": "sdpa"}}
    before = begun(bench)
    bench.cluster["endpoints"]["teacher"]["attention"] = "eager"
    with pytest.raises(Refusal, match=r"another endpoints\.teacher\.answers"):
        make_plan(bench.job(), "recipe", resume=before.folder)


def test_a_served_teacher_may_stand_elsewhere(bench: Bench) -> None:
    machine_of()(bench)
    engine = make_engine(FakeEndpoint(engine="fake", vocabulary=512))
    with FakeServer(engine) as first, FakeServer(engine) as second:
        given = {"engine": "openai", "base_url": first.url, "model": "fake", "vocabulary": 512, "tokenizer": str(bench.folder / "teacher")}
        put("endpoints.teacher", given)(bench)
        before = begun(bench)
        after = make_plan(bench.job(f"endpoints.teacher.base_url={second.url}"), "recipe", resume=before.folder)
    assert after.fingerprints == before.fingerprints


def test_a_run_that_began_before_a_fact_was_kept_goes_on(bench: Bench) -> None:
    before = begun(bench)
    facts = json.loads(before.folder.read(FACTS) or b"")
    del facts["fingerprints"]["endpoints.teacher.answers"]
    before.folder.write(FACTS, json.dumps(facts).encode())
    assert make_plan(bench.job(), "recipe", resume=before.folder).name == "old"


def test_a_run_that_is_being_driven_is_refused(bench: Bench) -> None:
    before, parent = begun(bench), psutil.Process(os.getppid())
    home = Path(before.folder.root)
    Heartbeat(socket.gethostname(), parent.pid, parent.create_time(), time.time()).save(home)
    with pytest.raises(Refusal, match=f"process {parent.pid} of .* is driving"):
        make_plan(bench.job(), "recipe", resume=before.folder)
    Heartbeat("elsewhere", 1, 0.0, time.time() - 60).save(home)
    assert make_plan(bench.job(), "recipe", resume=before.folder).name == "old"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr=0.1", ["train.lr = 0.1", "2e-05"]),
        ("strategy.top_k=4", ["strategy.top_k = 4", "8"]),
        ("train.steps=5", ["train.steps = 5"]),
        ("seed=3", ["seed = 3"]),
        ("endpoints.teacher.dtype=bfloat16", ["endpoints.teacher.dtype = 'bfloat16'"]),
        ("strategy=cross-entropy", ["strategy."]),
    ],
)
def test_a_run_does_not_go_on_as_another(bench: Bench, override: str, words: list[str]) -> None:
    before = begun(bench)
    with pytest.raises(Refusal) as caught:
        make_plan(bench.job(override), "recipe", resume=before.folder)
    assert [w for w in [*words, "start a new run"] if w not in str(caught.value)] == [], str(caught.value)


def changed_rows(bench: Bench) -> None:
    path = Path(bench.recipe["data"]["train"])
    path.write_text(path.read_text() + json.dumps({"text": TEXT}) + "\n")


def changed_teacher(bench: Bench) -> None:
    tiny_model(bench.recipe["endpoints"]["teacher"]["model"], width=48, seed=9)


@pytest.mark.parametrize(("change", "name"), [(changed_rows, "data"), (changed_teacher, "endpoints.teacher")])
def test_a_run_does_not_go_on_with_other_files(bench: Bench, change: Callable[[Bench], None], name: str) -> None:
    own = bench.copy("teacher", "own-teacher")
    rows = bench.rows(*[{"text": TEXT.format(i)} for i in range(30)])
    both(put("endpoints.teacher.model", str(own)), put("data.train", rows))(bench)
    before = begun(bench)
    change(bench)
    with pytest.raises(Refusal, match=f"another {name}"):
        make_plan(bench.job(), "recipe", resume=before.folder)


def test_a_layout_that_keeps_its_world_refuses_another(bench: Bench) -> None:
    machine_of()(bench)
    before = begun(bench, "train.layout=ddp")
    bench.patch.setattr(resumed, "layout_facts", lambda config: SimpleNamespace(resumes_any_world=False))
    with pytest.raises(Refusal, match=r"2 workers.*Set train.workers=1"):
        make_plan(bench.job("train.layout=ddp", "train.workers=2"), "recipe", resume=before.folder)


def test_a_finished_run_does_not_go_on(bench: Bench) -> None:
    before = begun(bench)
    before.folder.write("result.json", b"{}")
    with pytest.raises(Refusal, match="a finished run"):
        make_plan(bench.job(), "recipe", resume=before.folder)


def test_a_folder_without_a_recipe_is_no_run(bench: Bench, tmp_path: Path) -> None:
    before = begun(bench)
    os.remove(Path(before.folder.root) / "recipe.yaml")
    with pytest.raises(Refusal, match="no recipe.yaml"):
        make_plan(bench.job(), "recipe", resume=before.folder)
