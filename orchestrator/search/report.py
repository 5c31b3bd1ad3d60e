"""The report of a search: one HTML page that needs nothing else, and the same pictures as PNG files beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from orchestrator.search.book import CONTROL, Trial, abreast, front, ranked
from orchestrator.search.court import Court
from orchestrator.search.door import SearchPlan
from orchestrator.search.figures import draw_cost, draw_curves, draw_front, draw_importance, draw_parallel
from orchestrator.search.plan_text import search_text, short
from orchestrator.search.result import Spent
from orchestrator.search.sampler import importance

BEST = "best_recipe.yaml"
"""The best trial's recipe, in the search's folder."""
REPORT = "report.html"
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}pre{background:#f6f6f6;padding:1em;overflow:auto}img{max-width:100%}"
)


def write_report(plan: SearchPlan, court: Court, spent: Spent) -> Path:
    """Writes pictures and page into the search's folder; returns the page."""
    trials, folder, objective = court.book.trials(), plan.folder, plan.config.objective[0]
    equals, step = abreast(trials, court.curve, objective)
    shares = importance(plan.config, equals)
    pictures = {
        "Learning curves": draw_curves(trials, court.curve, objective, folder / "curves.png"),
        "Parallel coordinates": draw_parallel(trials, plan.config.space, objective, folder / "parallel.png"),
        "Quality against cost": draw_front(trials, plan.config.objective, folder / "front.png"),
    }
    if shares:
        pictures["Importance"] = draw_importance(shares, f"{len(equals)} trials after {step:,} steps", folder / "importance.png")
    costs = cost_rows(plan, trials, spent)
    pictures["Cost against an unshared search"] = draw_cost(costs, folder / "cost.png")
    body = "\n".join(
        [
            f"<h1>Search {html.escape(plan.name)}</h1>",
            *_summary(plan, trials, spent),
            _table(plan, trials),
            *_restarts(trials),
            *(f"<h2>{html.escape(name)}</h2><img alt='{html.escape(name)}' src='{_data(path)}'>" for name, path in pictures.items()),
            "" if shares else "<p>Importance needs at least four trials that differ.</p>",
            f"<h2>Best recipe</h2><pre>{html.escape((folder / BEST).read_text(encoding='utf-8'))}</pre>",
            f"<h2>Plan</h2><pre>{html.escape(search_text(plan))}</pre>",
        ]
    )
    page = folder / REPORT
    page.write_text(
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(plan.name)}</title><style>{STYLE}</style>{body}", encoding="utf-8"
    )
    return page


def cost_rows(plan: SearchPlan, trials: Sequence[Trial], spent: Spent) -> dict[str, dict[str, float]]:
    """Seconds by part, of the search as it was and of one whose trials each ask the teachers."""
    own = [t for t in trials if t.number != CONTROL]
    steps = sum(t.metrics.get("seconds", 0.0) for t in own)
    rest = max(0.0, sum(t.wall_seconds for t in own) - steps)
    teachers = spent.teacher_seconds
    return {
        "this search": {"teachers": teachers, "training steps": steps, "start-up and the rest": rest},
        "unshared": {"teachers": teachers * len(own), "training steps": steps, "start-up and the rest": rest},
    }


def _summary(plan: SearchPlan, trials: Sequence[Trial], spent: Spent) -> Iterator[str]:
    objective = plan.config.objective[0]
    best = ranked(list(trials), objective)[0]
    control = next((t for t in trials if t.number == CONTROL), None)
    yield f"<p>Best: trial {best.label}, {objective.metric} {best.metrics[objective.metric]:.4f}.</p>"
    if control is not None and objective.metric in control.metrics:
        yield f"<p>The same student, rows and steps without a teacher: {control.metrics[objective.metric]:.4f}.</p>"
    if len(plan.config.objective) > 1:
        labels = ", ".join(t.label for t in front(list(trials), plan.config.objective))
        yield f"<p>Beaten by no other in everything: {labels}.</p>"
    own = [t for t in trials if t.number != CONTROL]
    read = f"{spent.teacher_tokens:,} tokens" if spent.teacher_tokens else "nothing: the stores were there"
    yield (
        f"<p>Teachers read {read} in {spent.teacher_seconds:,.1f} s for all {len(own)} trials; unshared, each trial would have had "
        f"that read again. The trials took {spent.seconds:,.1f} s.</p>"
    )


def _table(plan: SearchPlan, trials: Sequence[Trial]) -> str:
    names = [o.metric for o in plan.config.objective]
    heads = ["trial", *names, *plan.config.space, "step", "tokens", "seconds", "outcome", "why"]
    rows = [
        [
            t.label,
            *(f"{t.metrics[n]:.4f}" if n in t.metrics else "-" for n in names),
            *(short(t.point[p]) if p in t.point else "-" for p in plan.config.space),
            f"{t.step:,}",
            f"{t.metrics.get('tokens', 0):,.0f}",
            f"{t.metrics.get('seconds', 0):,.1f}",
            t.outcome,
            t.words,
        ]
        for t in trials
    ]
    return f"<table>{_row(heads, 'th')}{''.join(_row(row, 'td') for row in rows)}</table>"


def _restarts(trials: Sequence[Trial]) -> Iterator[str]:
    """Of a population: who went on from whom, and the values that its weights have been through."""
    rows = [(t, n, restart) for t in trials for n, restart in enumerate(t.restarts, start=1)]
    if rows:
        cells = [[t.label, str(n), f"{r.step:,}", f"{r.source:03d}", r.checkpoint] for t, n, r in rows]
        heads = ["trial", "restart", "after step", "from trial", "its checkpoint"]
        yield f"<h2>Restarts</h2><table>{_row(heads, 'th')}{''.join(_row(row, 'td') for row in cells)}</table>"
        settings = [[t.label, *(str(value) for value in t.settings.values())] for t in trials if t.legs]
        heads = ["trial", *next(t.settings for t in trials if t.legs)]
        yield f"<h2>Schedules</h2><table>{_row(heads, 'th')}{''.join(_row(row, 'td') for row in settings)}</table>"


def _row(cells: Iterable[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _data(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
