"""Which of several teachers is asked next, learnt from how much the student gained under each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveFloat

from strategies.control import State
from strategies.core import Progress, Settings

CLIP = 3.0
"""Of an advantage, in units of its usual size."""


class ProgressSetting(Settings):
    """One teacher teaches alone from one evaluation to the next; whoever the student gains most under is drawn more often.

    Reinforced teacher selection (arXiv:2012.06048) without its network: a gradient bandit whose policy is softmax of one preference a
    teacher, and whose reward is by how much the held-out loss fell. Preferences move by `rate * advantage * (chosen - policy)`; the
    advantage is the reward less its moving average, over the moving average of its size, so that it does not fade as gains do.
    """

    metric: Annotated[str, Field(pattern="^eval/")] = "eval/cross_entropy"
    """The held-out loss, smaller is better: any metric of an evaluation."""
    rate: PositiveFloat = 0.5
    """How fast preferences move."""
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.7
    """Of the moving averages: the share of the past."""
    explore: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the draws that do not look at preferences."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws. The run's own seed leaves them alone."""


@dataclass(frozen=True)
class Chosen:
    """The controller of one teacher: 1 while it is the one that teaches, 0 while another does.

    The controllers of all teachers hear the same and draw the same, so that one of them says 1. State: `preference/<teacher>`, `chosen`
    and `round` as numbers, `loss` of the last evaluation, and the averages `gain` and `size`.
    """

    teacher: str
    among: tuple[str, ...]
    setting: ProgressSetting

    @property
    def hears(self) -> frozenset[str]:
        return frozenset({self.setting.metric})

    def begin(self) -> State:
        return self._drawn({**{f"preference/{name}": 0.0 for name in self.among}, "round": 0.0})

    def after_step(self, state: State, metrics: Mapping[str, float], progress: Progress) -> State:
        return state

    def after_evaluation(self, state: State, metrics: Mapping[str, float]) -> State:
        loss = metrics[self.setting.metric]
        if "loss" not in state:  # under whom it fell is known, by how much is not
            return self._drawn({**state, "loss": loss})
        gain = state["loss"] - loss
        return self._drawn({**state, **self._learnt(state, gain), "loss": loss})

    def value(self, state: State) -> float:
        return float(self.among[int(state["chosen"])] == self.teacher)

    def policy(self, state: State) -> Mapping[str, float]:
        """Probability of each teacher before exploring."""
        weights = {name: math.exp(state[f"preference/{name}"]) for name in self.among}
        return {name: w / sum(weights.values()) for name, w in weights.items()}

    def _learnt(self, state: State, gain: float) -> dict[str, float]:
        """What an interval's gain teaches."""
        if "gain" not in state:
            return {"gain": gain, "size": 0.0}
        kept, surprise = self.setting.memory, gain - state["gain"]
        size = kept * state["size"] + (1 - kept) * abs(surprise) if state["size"] else abs(surprise)
        advantage = max(-CLIP, min(CLIP, surprise / size)) if size else 0.0
        policy, chosen = self.policy(state), self.among[int(state["chosen"])]
        moved = {
            f"preference/{name}": state[f"preference/{name}"] + self.setting.rate * advantage * (float(name == chosen) - policy[name])
            for name in self.among
        }
        return {**moved, "gain": kept * state["gain"] + (1 - kept) * gain, "size": size}

    def _drawn(self, state: State) -> State:
        """The teacher of the next interval."""
        turn, policy = int(state["round"]), self.policy(state)
        random = np.random.default_rng((self.setting.seed, turn))
        explores, draw = random.random() < self.setting.explore, random.random()
        shares = np.full(len(self.among), 1 / len(self.among)) if explores else np.asarray([policy[name] for name in self.among])
        chosen = min(int(np.searchsorted(np.cumsum(shares), draw, side="right")), len(self.among) - 1)
        return {**state, "chosen": float(chosen), "round": float(turn + 1)}
