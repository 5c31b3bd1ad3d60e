"""Checks of what a run is watched for: the metrics that its alarms compare are measured, and often enough."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.alarms import REWARD
from orchestrator.config import RunConfig
from orchestrator.errors import Refusal
from orchestrator.explain import nearest
from strategies.core import Strategy


def check_alarms(run: RunConfig, strategy: Strategy, evaluated: Sequence[str]) -> None:
    """`Refusal` for a golden metric that is not one of those `evaluated` on held-out rows, and for a proxy that nobody measures."""
    terms = [f"loss/{term.name}" for update in strategy.updates for term in update.terms]
    wanted = {
        "alarms.golden": (run.alarms.golden, evaluated),
        "alarms.golden_versus_proxy.proxy": (run.alarms.golden_versus_proxy.proxy, [*evaluated, REWARD, *terms]),
    }
    for where, (name, known) in wanted.items():
        if name is not None and name not in known:
            raise Refusal(where, repr(name), f"one of {', '.join(known)}", nearest(name, known) or "Correct the name.")


def about_alarms(run: RunConfig, steps: int, held_out_rows: int) -> list[str]:
    """A warning where the golden metric is measured too seldom for its alarm."""
    rule = run.alarms.golden_versus_proxy
    if run.alarms.golden is None or not (run.alarms.enabled and rule.enabled):
        return []
    periods = [p for p in (run.evaluate.every_steps, run.checkpoint.every_steps) if p]
    found = len({s for p in periods for s in range(p, steps + 1, p)} | {steps}) if held_out_rows else 0
    if found >= 2 * rule.evaluations:
        return []
    return [f"alarms.golden is measured {found} times and its alarm wants {2 * rule.evaluations}: set evaluate.every_steps."]
