"""The door for runs in which the student's own network teaches it."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.checks import following
from orchestrator.config import load_job
from orchestrator.errors import Refusal
from orchestrator.plan import plan_text
from orchestrator.rollouts import read_rows
from orchestrator.versions import Freshness
from strategies.stages.view import behind
from tests.orchestrator.bench import Bench

OPSD = ("strategy={type: opsd, max_new_tokens: 16}", "endpoints={}")
TAKES_NOTHING = ["endpoints.self.engine", "'openai', which takes no weights", "transformers, or vllm"]
SDFT = ("strategy={type: sdft, max_new_tokens: 16, staleness: 1}", "endpoints={}")


def settings(bench: Bench, *overrides: str) -> Any:
    return bench.plan(*overrides).endpoints["self"]


def test_the_plan_says_whose_weights_teach_and_what_they_read(bench: Bench) -> None:
    said = " ".join(plan_text(bench.plan(*SDFT)).split())
    assert "Rollout(student) -> ScoreBehind(self)" in said
    assert "self (transformers, 1 actor, an average of the student at rate 0.05)" in said
    assert "self reads 'Here is an example" in said and "can only teach it to stay" not in said
    assert "the student as it begins" in " ".join(plan_text(bench.plan(*OPSD)).split())


def test_a_teacher_of_the_students_own_network_has_its_settings(bench: Bench) -> None:
    frozen = settings(bench, *OPSD)
    assert (frozen.model, frozen.dtype, frozen.follows_student) == (bench.recipe["student"]["model"], "float32", False)
    moving = settings(bench, SDFT[0], "endpoints={self: {actors: 2}}")
    assert (moving.model, moving.actors, moving.follows_student) == (frozen.model, 2, True)
    job = load_job(bench.recipe, [SDFT[0], "endpoints={self: {actors: 2}}"])
    assert load_job(job.run.model_dump(mode="json")).run == job.run


def test_a_frozen_teacher_takes_no_version_and_a_moving_one_its_own(bench: Bench) -> None:
    freshness = Freshness(1, False, None)
    still, moving = (bench.plan(*which).stream(freshness) for which in (OPSD, SDFT))
    assert still.followers("self") is None and still.followers("student") == freshness
    found = moving.followers("self")
    assert found is not None and (found.weights, found.staleness) == ("self", 1)


def test_the_context_becomes_ids_that_end_no_text_and_fit_the_teacher(bench: Bench) -> None:
    plan = bench.plan(OPSD[0], "strategy.context=So: {reference}. Now", "endpoints={}")
    (stage,) = behind(plan.strategy.stages)
    tokenizer = plan.cast.tokenizer
    assert tokenizer.decode(stage.context.before) == "So: " and tokenizer.decode(stage.context.between) == ". Now"
    assert tokenizer.eos_token_id in stage.context.endings and stage.context.longest_tokens == 512


def test_what_averages_and_versions_hold_is_told(bench: Bench) -> None:
    def parts(role: str, *overrides: str) -> dict[str, int]:
        return dict(next(m for m in bench.plan(*overrides).memory if m.role == role).parts)

    size = 4 * bench.plan(*OPSD).cast.student.parameters
    assert "averages" not in parts("worker", *OPSD) and parts("worker", *SDFT)["averages"] == size
    assert parts("self", *SDFT)["published"] == size and "published" not in parts("self", *OPSD)
    assert parts("driver and Ray", *SDFT)["versions"] == 3 * 2 * size


def test_a_teacher_reads_longer_rows_than_the_student(bench: Bench) -> None:
    import numpy as np

    strategy = bench.plan(*OPSD).strategy
    (stage,) = behind(strategy.stages)
    fixed = len(stage.context.before) + len(stage.context.between)
    assert read_rows(strategy, "self", np.asarray([10, 500])).tolist() == [20 + fixed, 512]
    assert read_rows(strategy, "student", np.asarray([10])).tolist() == [10]


def test_weights_may_travel_past_the_object_store_where_the_package_is(bench: Bench) -> None:
    def there(name: str) -> object:
        return name

    assert (found := bench.plan(*SDFT).freshness(None)) is not None and found.transport is None
    bench.cluster["weights_transport"] = "nixl"
    bench.patch.setattr(following, "find_spec", lambda name: None)
    with pytest.raises(Refusal, match="weights_transport: got no package 'nixl'"):
        bench.plan(*SDFT)
    bench.patch.setattr(following, "find_spec", there)
    assert (found := bench.plan(*SDFT).freshness(None)) is not None and found.transport == "nixl"
    assert bench.plan().freshness(None) is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((*OPSD, "student.init=random"), ["student.init", "'random'", "strategy.weights=average"]),
        ((*SDFT, "student.lora={publish: adapter}"), ["student.lora.publish", "'merged'"]),
        ((SDFT[0], "endpoints={self: {engine: openai, base_url: 'http://h/v1', model: m, vocabulary: 512}}"), TAKES_NOTHING),
        ((OPSD[0], "endpoints={student: {engine: store, folders: [a]}}"), ["endpoints.student.engine", "'store'"]),
        ((OPSD[0], "strategy.weights=live", "endpoints={self: {engine: store, folders: [a]}}"), ["endpoints.self.engine", "'store'"]),
        ((SDFT[0], "endpoints={self: {quantization: int8}}"), ["endpoints.self.quantization", "'int8'", "'none'"]),
        ((SDFT[0], "endpoints={self: {engine: transformers, model: m}}"), ["endpoints.self.follows_student", "true"]),
    ],
)
def test_what_cannot_follow_is_refused(bench: Bench, overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(Refusal) as caught:
        bench.plan(*overrides)
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)
