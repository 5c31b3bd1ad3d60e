"""The vetted settings: a default that moves must move here, too, and in the table of `strategies/README.md`."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from strategies.objectives import OBJECTIVES
from strategies.objectives.adakd import LATF
from strategies.objectives.taid import TaidPace

DEFAULTS: dict[str, dict[str, Any]] = {
    "adakd": {
        "divergence": {"type": "reverse-kl", "temperature": 1.0, "t_scale": "auto"},
        "keep_share": 1.0,
        "temperature": 1.0,
        "strength": 0.5,
    },
    "adakd-absolute": {
        "divergence": {"type": "reverse-kl", "temperature": 1.0, "t_scale": "auto"},
        "threshold": 0.0,
        "centre": 0.3,
        "temperature": 1.0,
        "strength": 0.5,
    },
    "adaptive-kl": {"temperature": 1.0, "t_scale": "auto", "head_mass": 0.5},
    "alpha": {"temperature": 1.0, "t_scale": "auto", "alpha": 0.5},
    "atkd": {"easy_weight": 0.2, "quantile": 0.5, "direction": "forward"},
    "atkd-absolute": {"easy_weight": 0.2, "threshold": 0.5, "direction": "forward"},
    "cross-entropy": {"smoothing": 0.0},
    "dpo": {"beta": 0.1, "length_normalised": False},
    "entropy": {"quantile": 0.1},
    "filter-task": {"filter": "linear"},
    "filtered-layers": {"filter": "linear"},
    "forward-kl": {"temperature": 1.0, "t_scale": "auto"},
    "forward-kl-k3": {"temperature": 1.0, "clip": None},
    "gram-matrices": {"layers": ("output",)},
    "hidden-states": {"layers": ("output",), "distance": "mse", "filter": "linear"},
    "jeffreys": {"temperature": 1.0, "t_scale": "auto"},
    "jsd": {"temperature": 1.0, "t_scale": "auto", "beta": 0.5, "rescale": True},
    "plackett-luce": {"candidates": 10, "entropy_share": 0.1},
    "policy-gradient": {
        "outcome_weight": 0.0,
        "teacher_weight": 1.0,
        "switch_after": None,
        "teacher_mask": "all",
        "teacher_form": "advantage",
        "clip_advantage": None,
        "extrapolation": 1.0,
        "clip_ratio": None,
        "ratio_anchor": 1.0,
        "importance_cap": None,
    },
    "redi": {"alpha": 0.8},
    "relations": {
        "layer": {"number": None, "depth": 1.0},
        "teacher_layer": None,
        "heads": 16,
        "query_weight": 1.0,
        "key_weight": 1.0,
        "value_weight": 1.0,
    },
    "shared-tokens": {"beta": 0.5},
    "span-likelihood": {"temperature": 100.0, "distance": "kl"},
    "aligned-uld": {"without_shared": False},
    "renyi": {"temperature": 1.0, "t_scale": "auto", "alpha": 0.5},
    "reverse-kl": {"temperature": 1.0, "t_scale": "auto"},
    "reverse-kl-policy-gradient": {"temperature": 1.0, "clip": None},
    "reverse-kl-reward-to-go": {
        "temperature": 1.0,
        "clip": None,
        "discount": 1.0,
        "later_only": False,
        "length_normalised": False,
        "teacher_share": 0.0,
        "importance_cap": None,
    },
    "reverse-kl-squared": {"temperature": 1.0, "clip": None},
    "selected-tokens": {
        "divergence": {"type": "forward-kl", "temperature": 1.0, "t_scale": "auto"},
        "by": "student-entropy",
        "keep": "above",
        "quantile": 0.5,
        "softness": None,
        "average": "mask",
    },
    "selected-tokens-absolute": {
        "divergence": {"type": "forward-kl", "temperature": 1.0, "t_scale": "auto"},
        "by": "entropy-gap",
        "keep": "above",
        "threshold": 0.0,
        "softness": None,
    },
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "sinkhorn": {"tokens_at_once": 64, "temperature": 2.0, "t_scale": "auto", "regularisation": 0.1, "iterations": 20, "debias": False},
    "skew-kl": {"temperature": 1.0, "t_scale": "auto", "skew": 0.1},
    "skew-reverse-kl": {"temperature": 1.0, "t_scale": "auto", "skew": 0.1, "detach_mix": False},
    "taid": {"temperature": 1.0, "t_scale": "auto", "progress_share": {"ramp": (0.3, 1.0), "over_steps": None, "from_step": 0}},
    "total-variation": {"temperature": 1.0, "t_scale": "auto"},
    "uld": {"temperature": 1.0, "t_scale": "auto"},
}


def defaults(settings: type[BaseModel]) -> dict[str, Any]:
    """Of every field that has one, the type left out."""
    given = {name: field.default for name, field in settings.model_fields.items() if name != "type" and not field.is_required()}
    return {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in given.items()}


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_objective_has_the_vetted_defaults(name: str) -> None:
    assert defaults(OBJECTIVES[name]) == DEFAULTS[name]


def test_no_objective_is_left_out() -> None:
    assert {name for name in OBJECTIVES if name not in DEFAULTS} == {"reverse-kl-k1"}


def test_controllers_have_the_defaults_of_their_released_code() -> None:
    assert defaults(LATF) == {"tolerance": 0.05, "step": 0.05, "decay": 0.99, "warmup_updates": 100, "smallest": 0.1}
    assert defaults(TaidPace) == {"start": 0.3, "end": 1.0, "rate": 5e-4, "inertia": 0.99}
