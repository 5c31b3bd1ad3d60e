"""Who gets how many compute threads."""

from __future__ import annotations

import pytest

from cluster.config import ClusterConfig, EndpointConfig, FakeEndpoint, Resources, StoreEndpoint, TransformersEndpoint
from cluster.resources import Demand, Share, demands, together

TEACHER = TransformersEndpoint(model="owner/teacher")
STORE = StoreEndpoint(engine="store", folders=("a",))
FAKE = FakeEndpoint(engine="fake", vocabulary=9)


@pytest.mark.parametrize(
    ("endpoint", "threads"),
    [(TEACHER, {"worker": 2, "teacher": 2}), (STORE, {"worker": 4, "teacher": 1}), (FAKE, {"worker": 4, "teacher": 1})],
)
def test_threads_go_to_those_that_hold_a_network(endpoint: EndpointConfig, threads: dict[str, int]) -> None:
    found = {d.role: d.share.threads for d in demands(ClusterConfig(), {"teacher": endpoint}, 1, 4)}
    assert found == threads | {"reader": 1}


def test_a_teacher_that_works_alone_has_them_all() -> None:
    found = {d.role: d.share.threads for d in demands(ClusterConfig(), {"teacher": TEACHER}, 0, 4)}
    assert found["teacher"] == 4


def test_every_pool_of_an_endpoint_is_counted() -> None:
    two = TEACHER.model_copy(update={"actors": 2})
    found = demands(ClusterConfig(), {"teacher": two, "other": TEACHER}, 1, 12, {"teacher": 2, "reader": 2})
    assert {d.role: d.processes for d in found} == {"worker": 1, "teacher": 4, "other": 1, "reader": 2}
    assert {d.role: d.share.threads for d in found} == {"worker": 2, "teacher": 2, "other": 2, "reader": 1}


@pytest.mark.parametrize(
    ("cpus", "endpoints", "workers", "share"),
    [(2, 1, 1, 0.5), (2, 3, 1, 0.47), (2, 9, 1, 0.25), (4, 5, 2, 0.5), (8, 3, 1, 1.0), (16, 20, 4, 1.0)],
)
def test_processes_of_a_small_machine_share_what_there_is(cpus: int, endpoints: int, workers: int, share: float) -> None:
    found = demands(ClusterConfig(), {f"teacher{i}": TEACHER for i in range(endpoints)}, workers, cpus)
    assert {d.share.cpus for d in found if d.role != "reader"} == {share}


def test_what_the_settings_say_is_left_to_them() -> None:
    own = TEACHER.model_copy(update={"resources": Resources(cpus=1.2)})
    found = {d.role: d.share.cpus for d in demands(ClusterConfig(), {"own": own, "other": TEACHER}, 1, 2)}
    assert found == {"worker": 0.35, "own": 1.2, "other": 0.35, "reader": 0.1}


def test_what_a_cluster_lacks_is_named() -> None:
    held = together([Demand("worker", 2, Share(1.5, 1, 1)), Demand("teacher", 1, Share(1, 0, 1))])
    assert held == Share(4, 2, 0)
    assert held.short_of(Share(4, 2, 0)) == ""
    assert held.short_of(Share(2, 1, 0)) == "4 CPUs of 2 and 2 GPUs of 1"
