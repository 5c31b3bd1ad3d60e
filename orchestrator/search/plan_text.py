"""A checked search as a person reads it: what is tried, what trials share, what one of them costs."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import JsonValue

from cluster.resources import machine_cpus
from orchestrator.checks.machine import text as size
from orchestrator.plan_text import sections_text
from orchestrator.search.door import SearchPlan
from orchestrator.search.settings import Domain
from orchestrator.stores import LIVE

SHOWN = 60
RUNGS = 12
"""Most rungs that a person is told of."""


def search_text(plan: SearchPlan) -> str:
    """Name, space, judging, budget, what is shared, a trial's cost, the whole's."""
    config = plan.config
    aims = " and ".join(f"{o.metric} ({o.direction})" for o in config.objective)
    return sections_text(
        (
            ("Search", [plan.name, f"in {plan.folder}"]),
            ("Space", [_domain(path, domain) for path, domain in config.space.items()]),
            ("Sampler", [f"{config.sampler}, seed {config.seed}", f"scheduler: {_scheduler(plan)}", f"judged by {aims}"]),
            ("Shared", _shared(plan)),
            ("A trial", _trial(plan)),
            ("In all", _whole(plan)),
            ("Warnings", [f"! {warning}" for warning in dict.fromkeys(w for c in plan.corners for w in c.plan.warnings)]),
        )
    )


def _domain(path: str, domain: Domain) -> str:
    values = getattr(domain, domain.kind)
    shown = " | ".join(short(v) for v in values) if domain.choice is not None else f"{values[0]:g} to {values[1]:g}"
    when = ", ".join(f"{p} = {short(v)}" for p, v in domain.when.items())
    return (
        f"{path}: {domain.kind} {shown}" + (f", when {when}" if when else "") + (", scored anew for each value" if domain.rescore else "")
    )


def short(value: JsonValue) -> str:
    """A value of a domain in a few characters."""
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."


def _scheduler(plan: SearchPlan) -> str:
    told = plan.config.scheduler
    if told.type == "none":
        return "none: every trial trains to its end"
    if told.type == "pbt":
        every = plan.spec.every_steps
        return f"pbt: compared every {every} steps, the worst {told.quantile:.0%} go on from checkpoints of the best, where they lie"
    if told.type == "asha":
        last = max(c.plan.steps for c in plan.corners)
        steps = dict.fromkeys(told.rung_steps(n, plan.first_evaluation) for n in range(RUNGS))
        rungs = [f"{step:,}" for step in steps if step < last]
        more = ", ..." if len(rungs) == len(steps) else ""
        return f"asha: trials pause at step {', '.join(rungs)}{more}, until they are among the best 1 in {told.reduction:g} that came there"
    return f"{told.type}, which may stop trials from step {told.first_steps or plan.first_evaluation} on"


def _shared(plan: SearchPlan) -> Iterator[str]:
    run, trials = plan.plan, plan.config.trials
    yield f"prepared rows: {run.data.train.rows:,} to learn from, {run.data.held_out.rows:,} to be compared on"
    stores = {w.files.folder.root: w for p in plan.shared for w in p.sources.read}
    tokens = run.data.train.tokens + run.data.held_out.tokens
    for wanted in stores.values():
        yield f"signals of {wanted.spec.name} from {wanted.files.folder.root}, which {wanted.status}"
    if stores:
        yield f"a teacher reads {tokens:,} tokens once; unshared, {trials} trials would have it read {trials * tokens:,}"
    live = {name for c in plan.corners for name, digest in c.plan.sources.digests.items() if digest == LIVE}
    for t in plan.pooled:
        yield f"{t.name} answers all trials live and in turns: {t.demand.processes} in memory once, {size(t.memory.host)} each"
    live -= {t.name for t in plan.pooled}
    if live:
        yield f"not shared: {', '.join(sorted(live))}, answering every trial live"
    yield from ["no teacher is asked or loaded by the trials"] if stores and not live and not plan.pooled else []


def _trial(plan: SearchPlan) -> Iterator[str]:
    run = plan.plan
    steps = sorted({c.plan.steps for c in plan.corners})
    rows = run.job.run.train
    batch = f"{rows.batch_tokens:,} tokens" if rows.batch_tokens else f"{rows.batch_rows:,} rows"
    listed = " or ".join(f"{s:,}" for s in steps) if len(steps) < 4 else f"{steps[0]:,} to {steps[-1]:,}"
    yield f"{listed} steps of {batch}, about {_tokens(plan):,.0f} tokens, measured from step {plan.first_evaluation} on"
    held = f"{size(plan.memory)} of memory, {size(run.disk.needed)} of disk"
    yield f"up to {plan.cpus:g} logical CPUs, {held}"


def _tokens(plan: SearchPlan) -> float:
    """Tokens that the longest trial trains on."""
    run = plan.plan
    mean = run.data.train.tokens / run.data.train.rows
    train = run.job.run.train
    return max(c.plan.steps for c in plan.corners) * (train.batch_tokens or train.batch_rows * mean)


def _whole(plan: SearchPlan) -> Iterator[str]:
    config = plan.config
    control = " and a control without a teacher" if plan.has_control else ""
    held = f"{config.concurrent * plan.cpus:g} of {machine_cpus()} CPUs"
    yield f"at most {config.trials} trials{control}, {config.concurrent} at once, {held}"
    limits = [f"{config.tokens:,} tokens" if config.tokens else "", f"{config.seconds:,g} seconds" if config.seconds else ""]
    yield f"about {config.trials * _tokens(plan):,.0f} tokens of training" + "".join(f", no more than {limit}" for limit in limits if limit)
