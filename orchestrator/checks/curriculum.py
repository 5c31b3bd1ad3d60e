"""Checks of a curriculum: its domains are those of the data, and what moves it is measured."""

from __future__ import annotations

from orchestrator.config import Job
from orchestrator.curricula import feedback_lag
from orchestrator.data import PreparedData
from orchestrator.errors import Refusal
from orchestrator.evaluate import MOST_DOMAINS, TEACHER_CROSS_ENTROPY
from orchestrator.explain import nearest
from orchestrator.following import freshness, weight_sets
from strategies.core import Strategy
from strategies.curriculum import Curriculum, FixedMixture
from strategies.schedule import values_of
from strategies.stages.align import foreign

WHERE = "curriculum"


def check_curriculum(job: Job, strategy: Strategy) -> None:
    """What can be said before the data is read. `Refusal` for what it needs and the recipe does not have."""
    curriculum, data, train = job.run.curriculum, job.run.data, job.run.train
    if curriculum is None:
        return
    if train.batch_tokens is not None:
        do = "Set train.batch_rows, or leave the curriculum out."
        raise Refusal("train.batch_tokens", f"{train.batch_tokens} with a curriculum", "a number of rows, of which it takes shares", do)
    if curriculum.mixture and data.domain_column is None:
        do = "Name the column that tells the domain of a row in data.domain."
        raise Refusal(f"{WHERE}.mixture", "data without domains", "data with them", do)
    if curriculum.order and curriculum.order.by == "column" and data.score is None:
        do = "Name the column that tells how hard a row is in data.score, or set curriculum.order.by=length."
        raise Refusal(f"{WHERE}.order.by", "'column', and data without a score", "data with one", do)
    for name in sorted(curriculum.controllers().keys() & job.run.strategy.build().controllers.keys()):
        got = f"a controller {name!r} beside one of the strategy's that is called so, too"
        raise Refusal(WHERE, got, "controllers of names of their own", "Rename that of the strategy.")
    _check_gap(curriculum, strategy)
    _check_lag(job, curriculum, strategy)


def _check_gap(curriculum: Curriculum, strategy: Strategy) -> None:
    """Held-out losses that a mixture compares are of the same tokens: those of another tokenizer's spans leave out what does not align."""
    heard = {metric for c in curriculum.controllers().values() for metric in c.hears}
    for name in sorted(foreign(strategy.stages)):
        if any(metric.startswith(f"eval/{TEACHER_CROSS_ENTROPY}/{name}/") for metric in heard):
            got = f"{name!r}, whose tokenizer is another than the student's"
            expected = "a teacher with the student's tokenizer, because held-out losses of the same tokens are compared"
            raise Refusal(f"{WHERE}.mixture.teacher", got, expected, "Name another teacher, or take the mixture skills, by: loss.")


def _check_lag(job: Job, curriculum: Curriculum, strategy: Strategy) -> None:
    """The rows that a student writes are as old as it is."""
    given, where = curriculum.lag_steps, f"{WHERE}.lag_steps"
    if given is None:
        return
    if feedback_lag(job.run) is None:
        do = "Leave it out; it is for a pace, a mixture or a strategy that listens to training."
        raise Refusal(where, f"{given}, for a curriculum that is known before the run", "nothing", do)
    fresh = freshness(strategy, None)
    if weight_sets(strategy) and fresh is not None and given != fresh.staleness:
        do = "Leave it out, or set strategy.staleness."
        raise Refusal(where, f"{given}, where the student that writes is {fresh.staleness} steps old", f"{fresh.staleness}", do)


def check_rows(job: Job, data: PreparedData) -> list[str]:
    """What the data's rows tell; warnings. `Refusal` for domains that it does not have or the mixture does not name."""
    curriculum = job.run.curriculum
    if curriculum is None or curriculum.mixture is None:
        return []
    mixture, known, where = curriculum.mixture, data.train.domains, f"{WHERE}.mixture"
    listed = ", ".join(f"{name} ({count:,} rows)" for name, count in known.items())
    for name in mixture.domains:
        if name not in known:
            do = nearest(name, known) or "Correct the name, or leave it out."
            raise Refusal(where, f"the domain {name!r}, of which the data has no row to train on", f"domains of the data: {listed}", do)
    if len(set(mixture.domains)) < len(mixture.domains):
        raise Refusal(where, ", ".join(mixture.domains), "each domain once", "Drop what stands there twice.")
    for name in (n for n in known if n not in mixture.domains):
        do = "Name it too, with a weight of 0 if it is not to be learnt." if isinstance(mixture, FixedMixture) else "Name it too."
        raise Refusal(where, f"no domain {name!r}, of which the data has {known[name]:,} rows", "all domains of the data", do)
    heard = {metric for c in curriculum.controllers().values() for metric in c.hears}
    for name in mixture.domains:
        if f"eval/cross_entropy/{name}" in heard and not data.held_out.domains.get(name):
            do = "Raise data.held_out_rows, or name rows of every domain in data.held_out."
            raise Refusal(where, f"the domain {name!r} without held-out rows", "some of each, because the mixture moves by their loss", do)
    if any(metric.startswith("eval/") for metric in heard) and len(data.domains) > MOST_DOMAINS:
        do = "Give fewer domains, or shares that are known."
        raise Refusal(where, f"{len(data.domains)} domains, and one that moves by their losses", f"at most {MOST_DOMAINS}", do)
    if not isinstance(mixture, FixedMixture):
        return []
    never = [name for name, weight in mixture.shares.items() if not any(values_of(weight))]
    return [f"the domain {name!r} has weight 0 throughout: none of its rows is drawn." for name in never]
