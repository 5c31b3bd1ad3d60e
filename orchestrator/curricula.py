"""A recipe's order and curriculum laid out for its run: what each step reads, as far as it is known before, and how far feedback lags
behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from orchestrator.draws import ALL, BY_CHANCE, NOT_SORTED, Draws
from orchestrator.order import Order
from strategies.control import CONTROL
from strategies.core import Progress
from strategies.curriculum import MIXTURE, PACE, Curriculum, FixedMixture, Ordered
from strategies.domains import domain_id
from strategies.paces import StalledShare
from strategies.schedule import schedule

if TYPE_CHECKING:
    from orchestrator.config import RunConfig
    from orchestrator.data import PreparedData

SORTED_BY = {"length": "lengths", "column": "score"}
LAG_STEPS = 8
"""Steps that are read, scored and held ready ahead of training, where a recipe does not say how many."""


def make_order(run: RunConfig, data: PreparedData, losses: str = "") -> Order:
    """The order in which a run reads its rows; `losses` as `draws` takes it."""
    train, curriculum = run.train, run.curriculum
    order = Order(
        folder=data.folder,
        seed=run.seed,
        steps=train.steps or 1,
        bundles_per_step=train.most_workers,
        elastic=train.most_workers > train.fewest_workers,
        batch_rows=0 if train.batch_tokens else train.batch_rows,
        batch_tokens=train.batch_tokens or 0,
    )
    if train.epochs is not None:
        last = None if train.batch_tokens or curriculum else round(train.epochs * data.train.rows)
        order = replace(order, steps=order.count_steps(train.epochs), last_row=last)
    return replace(order, draws=draws(curriculum, data, order.steps, losses)) if curriculum else order


def draws(curriculum: Curriculum, data: PreparedData, steps: int, losses: str = "") -> Draws:
    """What the steps of a run draw; `losses` is the file of those that order its rows, where losses do."""
    order, mixture = curriculum.order, curriculum.mixture
    shares: NDArray[np.float32] | str = ""
    if mixture is not None:
        if curriculum.control == "random":
            counts = np.asarray([[data.train.domains[name] for name in mixture.domains]], dtype=np.float64)
            shares = (counts / counts.sum()).astype(np.float32)
        else:
            shares = _tabulated(mixture.at, steps).astype(np.float32) if isinstance(mixture, FixedMixture) else MIXTURE
    return Draws(
        pools=mixture.domains if mixture else (ALL,),
        domains=tuple(domain_id(name) for name in mixture.domains) if mixture else (),
        shares=shares,
        open=None if order is None else _pace(order, steps),
        sort_by=_sorted_by(order, curriculum.control == "random", losses),
        descending=order is not None and order.descending,
    )


def _sorted_by(order: Ordered | None, by_chance: bool, losses: str) -> str:
    if order is None:
        return NOT_SORTED
    return BY_CHANCE if by_chance else SORTED_BY.get(order.by, losses)


def _pace(order: Ordered, steps: int) -> NDArray[np.float64] | str:
    if isinstance(order.pace, StalledShare):
        return PACE
    pace = schedule(order.pace) if isinstance(order.pace, float | int) else order.pace
    return _tabulated(pace, steps)


def _tabulated(at: Callable[[Progress], float | tuple[float, ...]], steps: int) -> NDArray[np.float64]:
    """Values of all steps, or of one where all have the same."""
    table = np.asarray([at(Progress(step, steps)) for step in range(steps)], dtype=np.float64)
    return table[:1] if (table == table[:1]).all() else table


def feedback_lag(run: RunConfig) -> int | None:
    """Steps by which the rows of a run lag behind what controllers say; None where no controller decides about them, which rows a step
    draws or what a stage makes of them. Where the student writes, it is as old as that student instead."""
    curriculum = run.curriculum
    listening = any(column.startswith(CONTROL) for stage in run.build().stages for column in stage.needs)
    if not listening and not (curriculum and curriculum.controllers()):
        return None
    return LAG_STEPS if curriculum is None or curriculum.lag_steps is None else curriculum.lag_steps


def curriculum_text(curriculum: Curriculum, data: PreparedData, steps: int, lag: int | None) -> Iterator[str]:
    """What the plan says of it."""
    order, mixture, by_chance = curriculum.order, curriculum.mixture, curriculum.control == "random"
    laid = draws(curriculum, data, steps)
    if order is not None:
        first = "the largest" if order.descending else "the smallest"
        what = "an order by chance, as a control" if by_chance else f"{first} {_score(order)} first"
        if isinstance(laid.open, str):
            pace = f"{PACE} says what share of the rows is open"
        else:
            pace = f"{laid.open_at(1, {}):.0%} of the rows are open at first, {laid.open_at(steps, {}):.0%} at last"
        yield f"order: {what}; {pace}"
    if mixture is not None:
        shares = f"moved by {mixture.type}" if isinstance(laid.shares, str) else _shares_text(laid, steps)
        yield f"mixture: {', '.join(mixture.domains)}; {shares}{', the own shares of the data, as a control' if by_chance else ''}"
    if lag is not None:
        yield f"feedback: the rows of step t depend on what was known after step t - {lag + 1}"


def _score(order: Ordered) -> str:
    """What rows are sorted by, in words."""
    if order.endpoint is not None:
        return f"loss of {order.endpoint}"
    return "data.score" if order.by == "column" else order.by


def _shares_text(laid: Draws, steps: int) -> str:
    first, last = (", ".join(f"{share:.0%}" for share in laid.shares_at(step, {})) for step in (1, steps))
    return first if first == last else f"{first} at first, {last} at last"
