"""Which point is tried next, by Optuna: a function of the search's seed, the trial's number and what earlier trials reached.

The study is made anew for every question, so that nothing has to be saved: a search that goes on proposes what it would have.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from orchestrator.search.book import CONTROL, EARLY, Trial
from orchestrator.search.settings import Domain, SearchConfig
from orchestrator.search.space import Content, Point, grid, walk

if TYPE_CHECKING:
    import optuna

LEAST_TRIALS = 4
"""Trials below which nothing is said of what matters."""


def propose(config: SearchConfig, content: Content, number: int, past: Sequence[Trial], curves: Mapping[int, dict[int, float]]) -> Point:
    """The point of trial `number`. `past` are all earlier trials, `curves` the first objective by step of those
    that ended early, or go on after a pause."""
    if config.sampler == "grid":
        return grid(config.space, content)[number]
    study = _study(config, number, past, curves)
    trial = study.ask()
    return walk(config.space, content, lambda path, domain: _SUGGEST[domain.kind](trial, path, domain))


def importance(config: SearchConfig, trials: Sequence[Trial]) -> dict[str, float]:
    """Share of the first objective's variation that each path explains (fANOVA), of paths that every trial has; empty when too few finished
    trials or too little variation say anything."""
    import optuna

    done = [t for t in trials if t.outcome == "finished" and t.number != CONTROL and t.scores(config.objective[:1])]
    paths = [p for p in config.space if all(p in t.point for t in done) and len({_text(t.point[p]) for t in done}) > 1]
    if len(done) < LEAST_TRIALS or not paths or len({t.scores(config.objective[:1]) for t in done}) < 2:
        return {}
    study = _study(config.model_copy(update={"objective": config.objective[:1]}), 0, done, {})
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=config.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator, params=paths, target=lambda t: float(t.values[0])))


def _study(config: SearchConfig, number: int, past: Sequence[Trial], curves: Mapping[int, dict[int, float]]) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = zlib.crc32(f"{config.seed}/{number}".encode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = _SAMPLERS[config.sampler](config, seed)
        study = optuna.create_study(sampler=sampler, directions=["minimize"] * len(config.objective))
        study.add_trials([_frozen(config, t, curves.get(t.number, {})) for t in past if t.number != CONTROL])
    return study


def _frozen(config: SearchConfig, trial: Trial, curve: Mapping[int, float]) -> optuna.trial.FrozenTrial:
    """A trial as Optuna knows it. One that has a curve tells what it had reached by step, of a single objective."""
    from optuna.trial import TrialState, create_trial

    domains = {path: config.space[path] for path in trial.point}
    scores = trial.scores(config.objective)
    state = {"running": TrialState.RUNNING, "failed": TrialState.FAIL}.get(trial.outcome, TrialState.COMPLETE)
    pruned = trial.outcome in (*EARLY, "running") and len(config.objective) == 1 and bool(curve)
    if pruned:
        state, scores = TrialState.PRUNED, None
    elif state == TrialState.COMPLETE and scores is None:
        state = TrialState.FAIL
    sign = config.objective[0].sign
    return create_trial(
        state=state,
        values=list(scores) if scores is not None and state == TrialState.COMPLETE else None,
        params={path: _inner(domain, trial.point[path]) for path, domain in domains.items()},
        distributions={path: _distribution(domain) for path, domain in domains.items()},
        intermediate_values={step: value * sign for step, value in curve.items()} if pruned else {},
    )


def _inner(domain: Domain, value: JsonValue) -> Any:
    """Optuna's own value: of a choice the number, since strategies and lists are no values to it."""
    return domain.choice.index(value) if domain.choice is not None else value


def _text(value: JsonValue) -> str:
    return repr(value)


def _choose(trial: optuna.Trial, path: str, domain: Domain) -> JsonValue:
    assert domain.choice is not None
    return domain.choice[trial.suggest_categorical(path, list(range(len(domain.choice))))]


def _random(config: SearchConfig, seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    return optuna.samplers.RandomSampler(seed=seed)


def _tpe(config: SearchConfig, seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=config.random_trials, multivariate=True, group=True)


_SAMPLERS: Mapping[str, Callable[[SearchConfig, int], optuna.samplers.BaseSampler]] = {"random": _random, "grid": _random, "tpe": _tpe}

_SUGGEST: Mapping[str, Callable[[optuna.Trial, str, Domain], JsonValue]] = {
    "choice": _choose,
    "uniform": lambda trial, path, domain: trial.suggest_float(path, *domain.bounds),
    "log_uniform": lambda trial, path, domain: trial.suggest_float(path, *domain.bounds, log=True),
    "integer": lambda trial, path, domain: trial.suggest_int(path, int(domain.bounds[0]), int(domain.bounds[1])),
}


def _distribution(domain: Domain) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if domain.choice is not None:
        return CategoricalDistribution(list(range(len(domain.choice))))
    low, high = domain.bounds
    if domain.integer is not None:
        return IntDistribution(int(low), int(high))
    return FloatDistribution(low, high, log=domain.log_uniform is not None)
