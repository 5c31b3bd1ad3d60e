"""Checks of a strategy: its parts name each other, its stages find their columns, and something is learnt."""

from __future__ import annotations

from collections.abc import Container, Iterable

import numpy as np

from cluster.config import EndpointConfig
from orchestrator import evaluate
from orchestrator.checks.alarms import check_alarms
from orchestrator.checks.curriculum import check_curriculum
from orchestrator.checks.following import check_following
from orchestrator.config import Job
from orchestrator.errors import Refusal
from orchestrator.explain import nearest
from orchestrator.rollout_metrics import FAILED
from strategies.control import CONTROL, begun
from strategies.core import AnyTerm, ObjectiveSettings, Progress, StatesTerm, Strategy, Term
from strategies.domains import DOMAIN
from strategies.schedule import values_of
from strategies.sources import Taught, scored_columns

ROW_COLUMNS = frozenset({"tokens", "lengths", "loss_mask", "row_id"})
CONTROL_COLUMNS = frozenset({"step", "bundle", "attempt", "rows_total", "steps"})
SAMPLED_STEPS = 257
READS = {
    "expectation": "averages under the teacher",
    "pair": "whole distributions",
    "label": "the teacher's log-probability of the given token",
    "acted": "what is known of tokens that a policy wrote",
    "spans": "likelihoods of aligned spans",
    "foreign": "next tokens of another tokenizer",
}
"""What an objective reads, in words."""


def check_strategy(job: Job, strategy: Strategy, steps: int | None) -> list[str]:
    """The record by itself. `steps` is None while epochs have not been counted."""
    where = f"strategy.{job.run.strategy.type}"
    _check_parts(where, strategy)
    _check_columns(where, strategy, ROW_COLUMNS | ({DOMAIN} if job.run.data.domain_column else set()))
    check_following(job, strategy)
    _check_best_metric(job, strategy)
    check_curriculum(job, strategy)
    check_alarms(job.run, strategy, evaluation_metrics(job, strategy))
    warnings = _check_weights(where, strategy, steps or 1000) + _check_controllers(where, job, strategy)
    frozen = {p.model for p in strategy.players.values() if not p.trained}
    judge = {job.run.evaluate.answers.verifier} if job.run.evaluate.answers else set()
    order = job.run.curriculum.order if job.run.curriculum else None
    sorter = {order.endpoint} if order else set()
    asked = {s.endpoint for s in strategy.stages} | {a.write.endpoint for a in strategy.authors} | frozen | judge | sorter
    unused = sorted(set(job.run.endpoints) - asked)
    warnings += [f"endpoint {name!r} of the recipe is used by no stage of the strategy." for name in unused]
    if job.run.baseline and not strategy.signals and not strategy.stages and not frozen:
        warnings.append(_same_again(job, strategy))
    return warnings


def _same_again(job: Job, strategy: Strategy) -> str:
    """What to say of a control that is its run. `Refusal` where it looks like one: a teacher's text is there, and both learn it."""
    if not strategy.authors:
        return "baseline: true trains the same again, because the strategy has no teacher."
    got = f"true, for {job.run.strategy.type}, which learns a teacher's text by cross-entropy as its control would: the same run twice"
    do = (
        "Drop it. What the text is worth shows beside a run of strategy=cross-entropy, which learns the data's own completions; "
        "name data.held_out, so that both are measured on the same rows."
    )
    raise Refusal("baseline", got, "a strategy whose loss asks a teacher", do)


def used_endpoints(job: Job, strategy: Strategy) -> dict[str, EndpointConfig]:
    """The endpoints that stages name. `Refusal` for one that nothing defines."""
    return named_endpoints(job, {s.endpoint for s in strategy.stages if s.endpoint})


def named_endpoints(job: Job, wanted: Iterable[str]) -> dict[str, EndpointConfig]:
    """Endpoints by name. `Refusal` for one that nothing defines."""
    wanted = set(wanted)
    for name in sorted(wanted - set(job.endpoints)):
        known = sorted(job.endpoints)
        raise Refusal(
            f"strategy.{job.run.strategy.type}",
            f"the endpoint {name!r}, which nothing defines",
            f"one of {', '.join(known) or 'the endpoints of ray_config.yaml or the recipe (none are defined)'}",
            f"{nearest(name, known)}Add endpoints.{name}.model to the recipe or to ray_config.yaml.",
        )
    return {name: job.endpoints[name] for name in sorted(wanted)}


def _check_parts(where: str, strategy: Strategy) -> None:
    trained = sorted(name for name, p in strategy.players.items() if p.trained)
    frozen = sorted(set(strategy.players) - set(trained))
    for update in strategy.updates:
        if update.player not in trained:
            known = ", ".join(trained) or "none"
            raise Refusal(where, f"an update of the player {update.player!r}", f"a trained player of it: {known}", "Mend the strategy.")
        names = [t.name for t in update.terms]
        if len(set(names)) < len(names):
            raise Refusal(where, f"terms named {', '.join(names)}", "a name of its own for each", "Mend the strategy.")
        for term in update.terms:
            shown = [*frozen, *(name for name, s in strategy.signals.items() if "states" in s.gives)]
            known_signals = shown if isinstance(term, StatesTerm) else list(strategy.signals)
            if term.signal is not None and term.signal not in known_signals:
                kind = "frozen players" if isinstance(term, StatesTerm) else "signals"
                expected = f"one of its {kind}: {', '.join(known_signals) or 'none'}"
                raise Refusal(where, f"the term {term.name!r} reading the signal {term.signal!r}", expected, "Mend the strategy.")
            if isinstance(term, Term):
                _check_reads(where, term, strategy)


def _check_reads(where: str, term: Term, strategy: Strategy) -> None:
    """The objective gets what it reads."""
    given = strategy.signals[term.signal].gives if term.signal else frozenset({"nothing"})
    also = term.objective.also_reads() if isinstance(term.objective, ObjectiveSettings) else frozenset()
    wanted = {term.objective.reads, *also} - {"nothing"}
    if wanted <= given:
        _check_temperature(where, term, given)
        return
    having = f"with the signal {term.signal!r}" if term.signal else "without a signal"
    got = f"the term {term.name!r}, which reads {' and '.join(READS[reads] for reads in sorted(wanted))}, {having}"
    fitting = [name for name, source in strategy.signals.items() if wanted <= source.gives]
    expected = f"a signal that gives it: {', '.join(fitting) or 'none of the strategy does'}"
    raise Refusal(where, got, expected, "Name another signal, or take more of the teacher: `distill strategies terms` lists what.")


def _check_temperature(where: str, term: Term, given: Container[str]) -> None:
    """What is told of single tokens, or of draws alone, is told at temperature 1 and cannot be made warmer."""
    reads, temperature = term.objective.reads, getattr(term.objective, "temperature", 1.0)
    told_at_one = reads == "label" or (reads == "expectation" and "pair" not in given)
    if told_at_one and any(value != 1.0 for value in values_of(temperature)):
        got = f"the term {term.name!r} at temperature {temperature}, which reads {READS[reads]} with the signal {term.signal!r}"
        do = "Leave its temperature out, or take an objective and a signal of whole distributions."
        raise Refusal(where, got, "temperature 1, at which such a signal is told", do)


def _check_columns(where: str, strategy: Strategy, rows: frozenset[str]) -> None:
    """Stages and signals find their columns, those of `rows` among them."""
    there = rows | CONTROL_COLUMNS | {CONTROL + name for name in begun(strategy.controllers)}
    for stage in strategy.stages:
        missing = sorted(stage.needs - there)
        if missing:
            raise Refusal(
                f"{where}: stage {type(stage).__name__}",
                f"no column {missing[0]!r}",
                f"a column of the rows or of an earlier stage: {', '.join(sorted(there))}",
                "Name the column of the data in data.domain." if missing[0] == DOMAIN else "Put a stage that adds it before this one.",
            )
        there = there | stage.adds
    for column in scored_columns(strategy.signals):
        if column not in there:
            do = "Add a stage that scores the rows, or drop the signal."
            raise Refusal(where, f"the signal column {column!r}, which no stage adds", "a stage that adds it", do)
    if strategy.base is not None and not {"written", f"{strategy.base}/logprob"} <= there:
        got = f"the base {strategy.base!r}, of which no stage adds log-probabilities of written tokens"
        raise Refusal(where, got, f"stages that add 'written' and '{strategy.base}/logprob'", "Mend the strategy.")
    for term in (t for u in strategy.updates for t in u.terms):
        if getattr(term.objective, "pairs", False) and f"weights/{term.name}" not in there:
            got = f"the term {term.name!r}, which compares rows in pairs, and rows that come one by one"
            expected = f"a stage that adds the column 'weights/{term.name}' to chosen and rejected rows in turn"
            raise Refusal(where, got, expected, "Write such a stage in Python; a recipe's data has no preferences yet.")


def measured(strategy: Strategy) -> dict[str, Taught]:
    """The signals measured on held-out rows: of each endpoint that a stage asks, the first whole distribution, else the first."""
    scored = [(name, s) for name, s in strategy.signals.items() if isinstance(s, Taught) and s.endpoint]
    best = sorted(scored, key=lambda pair: "pair" not in pair[1].gives)
    return {name: s for i, (name, s) in enumerate(best) if s.endpoint not in {t.endpoint for _, t in best[:i]}}


def _check_best_metric(job: Job, strategy: Strategy) -> None:
    given, known = job.run.checkpoint.best_metric, evaluation_metrics(job, strategy)
    if given not in known:
        do = nearest(given, known) or "Correct the name."
        raise Refusal("checkpoint.best_metric", repr(given), f"one of {', '.join(known)}", do)


def _check_controllers(where: str, job: Job, strategy: Strategy) -> list[str]:
    """What controllers listen to is measured."""
    terms = ["loss", *(f"loss/{t.name}" for u in strategy.updates for t in u.terms), *_failures(job, strategy)]
    evaluations = evaluation_metrics(job, strategy)
    for name, controller in strategy.controllers.items():
        for metric in sorted(controller.hears - {*terms, *evaluations}):
            expected = f"one of {', '.join([*evaluations, *terms])}"
            do = nearest(metric, [*evaluations, *terms]) or "Correct the name."
            raise Refusal(f"{where}: {name}", f"the metric {metric!r}, which nobody measures", expected, do)
    listening = sorted(n for n, c in strategy.controllers.items() if c.hears & {*evaluations})
    if listening and job.run.data.held_out is None and not job.run.data.held_out_rows:
        do = "Set data.held_out_rows, or give a number or a schedule."
        raise Refusal(f"{where}: {listening[0]}", "no held-out rows", "some, because it moves by evaluations", do)
    seldom = not (job.run.evaluate.every_steps or job.run.checkpoint.every_steps)
    return [f"{n!r} moves by evaluations, and there is none before the end: set evaluate.every_steps." for n in listening if seldom]


def _failures(job: Job, strategy: Strategy) -> list[str]:
    """Names of what steps find of each domain that the recipe names, where texts are judged."""
    judged = any("judged" in stage.adds for stage in strategy.stages)
    return [FAILED + d for d in job.run.curriculum.domains] if judged and job.run.curriculum else []


def evaluation_metrics(job: Job, strategy: Strategy) -> list[str]:
    """Names of what evaluations find of a strategy's student, also on each domain that the recipe names."""
    found, domains = measured(strategy), job.run.curriculum.domains if job.run.curriculum else ()
    terms = [f"eval/{t.name}" for t in evaluate.evaluation_terms(found)]
    answered = ["eval/accuracy"] if job.run.evaluate.answers else []
    return [*terms, "eval/perplexity", *evaluate.domain_metrics(found, domains), *answered]


def _check_weights(where: str, strategy: Strategy, steps: int) -> list[str]:
    """Some term has a weight at some step. Negative weights are fine: only sums that are always zero teach nothing."""
    begin = begun(strategy.controllers)
    points = [Progress(int(s), steps, begin) for s in np.unique(np.linspace(0, steps - 1, SAMPLED_STEPS).astype(int))]
    idle: list[AnyTerm] = []
    for update in strategy.updates:
        never = [t for t in update.terms if not any(t.scale(p) for p in points)]
        if len(never) == len(update.terms):
            names = ", ".join(t.name for t in never)
            do = "Give one of them a weight, negative ones included."
            raise Refusal(where, f"weight 0 at every step for all of its terms ({names})", "at least one term that teaches", do)
        idle += [t for t in never if isinstance(t, StatesTerm) or not t.watched]
    return [f"the term {t.name!r} has weight 0 throughout" + (f"; {t.signal!r} is asked for nothing." if t.signal else ".") for t in idle]
