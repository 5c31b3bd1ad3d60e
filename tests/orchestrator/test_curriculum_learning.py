"""Mixtures learn their toy: of two domains one is far behind the teacher, more of it is drawn, and less is left to learn in the end.

The student is a table of next-token logits, the teacher another, and rows are chains that the teacher draws. What a step draws, what
controllers hear and what they say is what a run does; only the network is small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.draws import Draws, drawn_metrics
from strategies.control import values_by_name
from strategies.curriculum import MIXTURE, Curriculum
from strategies.domains import domain_id
from tests.prepared import write_split

NAMES, WORDS, ROWS, LENGTH = ("near", "far"), 8, 40, 12
"""Words of each domain, and its rows."""
STEPS, BATCH, PERIOD, LR = 60, 8, 10, 2.0
DDK: dict[str, Any] = {"type": "ddk", "domains": NAMES, "teacher": "teacher"}
SKILLS: dict[str, Any] = {"type": "skills", "domains": NAMES, "by": "loss", "alpha": 1.0}


class Chains:
    """One training by a mixture. Rows 0 to 39 are `near`, where the student is almost its teacher; those after them are `far`."""

    def __init__(self, folder: Path, mixture: dict[str, Any], seed: int):
        draw = torch.Generator().manual_seed(seed)
        self.teacher = torch.full((2 * WORDS, 2 * WORDS), -20.0)
        for first in (0, WORDS):
            block = slice(first, first + WORDS)
            self.teacher[block, block] = 3.0 * torch.randn((WORDS, WORDS), generator=draw)
        self.student = self.teacher.clone()
        self.student[:WORDS] += 0.1 * torch.randn((WORDS, 2 * WORDS), generator=draw)
        self.student[WORDS:, WORDS:] = 0.0
        self.student.requires_grad_()
        self.rows, self.held_out = (torch.cat([self._chains(first, draw) for first in (0, WORDS)]) for _ in range(2))
        self.curriculum, self.seed, self.folder = Curriculum.model_validate({"mixture": mixture}), seed, str(folder)
        self.shares: list[float] = []

    def _chains(self, first: int, draw: torch.Generator) -> Tensor:
        tokens = [torch.randint(first, first + WORDS, (ROWS,), generator=draw)]
        for _ in range(LENGTH - 1):
            tokens.append(torch.multinomial(self.teacher[tokens[-1]].softmax(-1), 1, generator=draw)[:, 0])
        return torch.stack(tokens, -1)

    def metrics(self) -> dict[str, float]:
        """What an evaluation finds of each domain."""
        found = {}
        for number, name in enumerate(NAMES):
            rows = self.held_out[number * ROWS : (number + 1) * ROWS]
            for what, table in (("cross_entropy", self.student), ("teacher_cross_entropy/teacher", self.teacher)):
                given = table.detach().log_softmax(-1)[rows[:, :-1]].gather(-1, rows[:, 1:, None])
                found[f"eval/{what}/{name}"] = -float(given.mean())
        return found

    def gaps(self) -> dict[str, float]:
        """What is left to learn, in nats per token."""
        found = self.metrics()
        return {n: found[f"eval/cross_entropy/{n}"] - found[f"eval/teacher_cross_entropy/teacher/{n}"] for n in NAMES}

    def train(self) -> None:
        """All steps; `shares` are those of the domain `far` that each of them drew."""
        controllers = self.curriculum.controllers()
        states = {name: controller.begin() for name, controller in controllers.items()}
        shares = MIXTURE if controllers else np.full((1, 2), 0.5, np.float32)
        draws, cursor = Draws(NAMES, tuple(map(domain_id, NAMES)), shares), dict[str, float]()
        for step in range(1, STEPS + 1):
            rows, after = draws.take(self.folder, self.seed, step, BATCH, values_by_name(states, controllers), cursor)
            self.shares.append(drawn_metrics(cursor, after)["share/far"])
            cursor = after
            self._learn(self.rows[torch.from_numpy(rows)])
            if step % PERIOD == 0:
                states = {n: c.after_evaluation(states[n], self.metrics()) for n, c in controllers.items()}

    def _learn(self, rows: Tensor) -> None:
        before = rows[:, :-1].flatten()
        loss = -(self.teacher[before].softmax(-1) * self.student[before].log_softmax(-1)).sum(-1).mean()
        (gradient,) = torch.autograd.grad(loss, self.student)
        with torch.no_grad():
            self.student -= LR * gradient


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("chains")
    write_split(home, "train", np.full(2 * ROWS, LENGTH))
    np.save(home / "train" / "domain.npy", np.repeat([domain_id(n) for n in NAMES], ROWS))
    return home


@pytest.mark.parametrize("mixture", [DDK, SKILLS], ids=["ddk", "skills"])
@pytest.mark.parametrize("seed", range(3))
def test_more_is_drawn_of_the_domain_that_lags_and_less_is_left_to_learn(folder: Path, mixture: dict[str, Any], seed: int) -> None:
    led, even = Chains(folder, mixture, seed), Chains(folder, {"shares": dict.fromkeys(NAMES, 1.0)}, seed)
    begun = led.gaps()
    assert begun["far"] > 10 * begun["near"] and begun == even.gaps()
    led.train()
    even.train()
    assert led.shares[:PERIOD] == even.shares[:PERIOD] == [0.5] * PERIOD, "nothing is known before the first evaluation"
    assert np.mean(led.shares[PERIOD:]) > 0.55 and even.shares == [0.5] * STEPS
    left, otherwise = led.gaps(), even.gaps()
    assert left["far"] < 0.5 * begun["far"]
    weighed = [sum(begun[n] * gaps[n] for n in NAMES) for gaps in (left, otherwise)]
    assert weighed[0] < weighed[1]


def test_where_no_domain_lags_more_than_another_both_are_drawn_alike(folder: Path) -> None:
    chains = Chains(folder, DDK, 0)
    with torch.no_grad():
        chains.student.copy_(chains.teacher)
    chains.train()
    assert np.mean(chains.shares) == pytest.approx(0.5, abs=0.05)
