"""Checks of a population before a trial begins: everybody trains at once, and whatever is searched can change in mid-run."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.config import Job
from orchestrator.errors import Refusal
from orchestrator.plan import Plan
from orchestrator.search.settings import SearchConfig
from orchestrator.search.space import extremes
from orchestrator.search.trial import Spec
from strategies.stages.replay import replays

PBT = "search.scheduler: pbt"
OTHERWISE = "Leave it out, or take another scheduler."


def comparison_steps(job: Job) -> int:
    """Steps from one comparison of a population to the next; 0 where the search has none."""
    assert job.search is not None
    told = job.search.scheduler
    if told.type != "pbt":
        return 0
    every = told.every_steps or job.run.evaluate.every_steps
    if every is None:
        do = "Set search.scheduler.every_steps to a part of the run's steps."
        raise Refusal(PBT, "no every_steps", "how many steps pass between two comparisons", do)
    return every


def check_population(config: SearchConfig, spec: Spec, plans: Sequence[Plan]) -> None:
    """`Refusal` names the first thing for which trials cannot go on from each other's checkpoints."""
    if not spec.every_steps:
        return
    steps = min(plan.steps for plan in plans)
    if spec.every_steps >= steps:
        do = "Set search.scheduler.every_steps to a part of them."
        raise Refusal(PBT, f"a first comparison after {spec.every_steps} of {steps} steps", "comparisons before the last step", do)
    if not 2 <= config.trials <= config.concurrent:
        got = f"{config.concurrent} of {config.trials} trials at once"
        do = f"Set search.concurrent={max(2, config.trials)}, or search.trials to as many as there is room for, two at least."
        raise Refusal("search.concurrent", got, "all trials at once, two at least: they are compared while they train", do)
    if any(replays(plan.strategy.stages) for plan in plans):
        do = "Take another scheduler."
        raise Refusal(
            PBT, "a student whose earlier texts are recalled", "runs that go on from another's weights: texts are a run's own", do
        )
    for path in config.space:
        _check_path(config, spec, path)


def _check_path(config: SearchConfig, spec: Spec, path: str) -> None:
    """The path may be a schedule, and is searched in every trial."""
    where, domain = f"search.space: {path}", config.space[path]
    if domain.when or domain.rescore:
        got = "a condition" if domain.when else "values that are scored anew"
        raise Refusal(where, got, "settings that all trials have and may exchange", OTHERWISE)
    first, last = extremes(domain)[0], extremes(domain)[-1]
    try:
        spec.job({**{p: extremes(d)[0] for p, d in config.space.items()}, path: {"steps": [[0, first], [spec.every_steps, last]]}})
    except Refusal as refused:
        expected = "numbers that may be schedules: weights, temperatures, train.lr"
        raise Refusal(where, "a setting that cannot change in mid-run", expected, OTHERWISE) from refused
