"""A teacher that vLLM runs at the door: what it needs and what it cannot give is said before anything loads, and without vLLM."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

from cluster.config import TransformersEndpoint, VllmEndpoint
from cluster.endpoints import longest_scored
from cluster.engines import vllm_door
from orchestrator.errors import Refusal
from orchestrator.plan import plan_text
from tests.orchestrator.bench import Bench, both, data_of, files, gpus, machine_of, put
from tests.orchestrator.test_authored import questions
from tests.orchestrator.test_plan_served import terms

Change = Callable[[Bench], None]


def package(there: bool) -> Change:
    def pretend(bench: Bench) -> None:
        bench.patch.setattr(vllm_door, "find_spec", lambda name: (object() if there else None) if name == "vllm" else find_spec(name))

    return pretend


def endpoint(**settings: Any) -> Change:
    return both(*(put(f"endpoints.teacher.{name}", value) for name, value in settings.items()))


def taking(take: str) -> Change:
    return lambda bench: terms(take)(bench, None)  # type: ignore[arg-type]


@pytest.fixture
def running(bench: Bench) -> Bench:
    """The good recipe with a teacher that vLLM runs, on a machine with one GPU and the package."""
    given = {"engine": "vllm", "model": str(bench.folder / "teacher"), "resources": {"gpus": 1}}
    both(machine_of(), package(True), gpus(1), put("endpoints.teacher", given))(bench)
    return bench


WRITES = both(data_of(*questions()), put("strategy", {"type": "seq-kd", "max_new_tokens": 12}), put("data.held_out_rows", 4))

CASES: dict[str, tuple[Change, list[str]]] = {
    "no package": (package(False), ["endpoints.teacher.engine", "no package 'vllm'", "pip install -e '.[vllm]'"]),
    "no GPU": (endpoint(resources={"gpus": 0}), ["endpoints.teacher.resources.gpus", "got 0", "resources.gpus=1"]),
    "too few GPUs": (endpoint(tensor_parallel=4, resources={"gpus": 2}), ["got 2", "split over 4", "resources.gpus=4"]),
    "a machine without": (gpus(0), ["resources", "1 GPUs (teacher 1 x 1)", "at most the 0 of this machine"]),
    "fewer ids": (endpoint(max_logprobs=5), ["endpoints.teacher.max_logprobs", "got 5", "the 8 of top_k", "Raise it to 8"]),
    "whole distributions": (taking("dense"), ["endpoints.teacher.max_logprobs", "got 256", "the 512 ids of a whole", "-1 for all"]),
    "hidden states": (taking("hidden"), ["endpoints.teacher.engine", "'hidden'", "per-token or topk", "engine to transformers"]),
    "draws": (taking("sampled"), ["endpoints.teacher.engine", "'sampled'", "per-token or topk"]),
    "a short context": (endpoint(context_tokens=20), ["endpoints.teacher.context_tokens", "got 20", "one more", "=19 or less"]),
    "a writer without the package": (both(WRITES, package(False)), ["endpoints.teacher.engine", "no package 'vllm'"]),
    "a writer with a short context": (both(WRITES, endpoint(context_tokens=20)), ["endpoints.teacher.context_tokens", "prompts and texts"]),
    "rows at once": (endpoint(rows_at_once=9999), ["rows_at_once", "got 9999", "forward_tokens"]),
}


@pytest.mark.parametrize("case", CASES)
def test_an_endpoint_that_cannot_teach_is_refused_in_words(running: Bench, case: str) -> None:
    spoil, words = CASES[case]
    spoil(running)
    with pytest.raises(Refusal) as caught:
        running.plan()
    refusal = caught.value
    assert [word for word in words if word not in str(refusal)] == [], str(refusal)
    assert all((refusal.where, refusal.got, refusal.expected, refusal.do))
    assert {path for path in files(running.storage) if path.split("/")[0] != "data"} == set()


def test_a_good_one_is_planned_like_any_saved_model(running: Bench) -> None:
    plan = running.plan()
    assert isinstance(plan.endpoints["teacher"], VllmEndpoint)
    assert "teacher (vllm, 1 actor)" in plan_text(plan)


def test_whole_distributions_are_given_where_all_ids_may_be_asked_for(running: Bench) -> None:
    both(taking("dense"), endpoint(max_logprobs=-1))(running)
    assert running.plan().sources.asked == ("teacher",)


def test_one_that_writes_is_planned(running: Bench) -> None:
    WRITES(running)
    (job,) = running.plan().writings()
    assert isinstance(job.config, VllmEndpoint)


@pytest.mark.parametrize("temperature", [2.5, 0.001])
def test_a_student_that_vllm_runs_draws_only_as_vllm_can(running: Bench, temperature: float) -> None:
    student = {"engine": "vllm", "model": running.recipe["student"]["model"], "follows_student": True}
    put("strategy", {"type": "gkd", "teacher": "teacher", "max_new_tokens": 8, "sample_temperature": temperature})(running)
    both(gpus(2), put("endpoints.student", student))(running)
    with pytest.raises(Refusal, match=f"endpoints.student.engine: got one that writes at temperature {temperature:g}"):
        running.plan()


def test_a_row_that_is_scored_needs_one_token_of_the_context_more() -> None:
    given = VllmEndpoint(engine="vllm", model="m", context_tokens=64)
    assert longest_scored(given, 512) == 63
    assert longest_scored(given.model_copy(update={"context_tokens": None}), 512) == 511
    assert longest_scored(given.model_copy(update={"context_tokens": None}), None) is None
    assert longest_scored(TransformersEndpoint(model="m"), 512) == 512
