"""Every text of two tokens, weighed by its probability: what horizons of sampled estimators are compared on exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from strategies.acted import Acted
from strategies.signals import Dense
from tests.strategies import reference
from tests.strategies import reference_sampled as exact
from tests.strategies.chunking import Tokens, floats, given_tokens, run

V = 4


@dataclass(frozen=True)
class TwoSteps:
    """Logits of the first token `(V,)` and of the second `(V, V)` by the first, of a student and of a teacher."""

    first: np.ndarray
    second: np.ndarray
    teacher_first: np.ndarray
    teacher_second: np.ndarray

    @classmethod
    def of(cls, seed: int) -> TwoSteps:
        shapes = [(V,), (V, V), (V,), (V, V)]
        return cls(*(np.random.default_rng(seed + i).normal(0, 1.5, shape).astype(np.float32) for i, shape in enumerate(shapes)))

    @property
    def divergence(self) -> tuple[float, np.ndarray, np.ndarray]:
        """KL(q || p) of whole texts, and its gradients with respect to the student's first and second logits."""
        leaves = [torch.from_numpy(z).double().requires_grad_() for z in (self.first, self.second)]
        p1, p2 = (torch.from_numpy(z).double().softmax(-1) for z in (self.teacher_first, self.teacher_second))
        value = exact.sequence_kl(leaves[0].softmax(-1), leaves[1].softmax(-1), p1, p2)
        by1, by2 = torch.autograd.grad(value, leaves)
        return value.item(), by1.numpy(), by2.numpy()

    def estimate(
        self, objective: Any, dense: bool = False, chunk_tokens: int = 5, acted: bool = False, writer: TwoSteps | None = None
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """The same of an objective over all texts; it reads the tokens' log-probabilities, or the `dense` teacher, or what is known of
        tokens `acted` by `writer`, the student unless given."""
        z, teacher, tokens = self._texts(writer or self)
        given = replace(tokens, signal=Dense(floats(teacher))) if dense else tokens
        if acted:
            behaviour = exact.label_logprobs((writer or self)._logits(), tokens.labels)
            given = replace(tokens, signal=Acted(floats(behaviour), floats(exact.label_logprobs(teacher, tokens.labels))))
        value, gradient = run(objective, z, given, chunk_tokens)
        by2 = np.zeros((V, V))
        np.add.at(by2, np.asarray(tokens.labels)[::2], gradient[1::2].astype(np.float64))
        return value, gradient[::2].astype(np.float64).sum(0), by2

    def _logits(self) -> np.ndarray:
        """The student's logits `(2 V^2, V)` of the tokens of all texts."""
        return np.stack([np.tile(self.first, (V * V, 1)), self.second[np.repeat(np.arange(V), V)]], 1).reshape(-1, V)

    def _texts(self, writer: TwoSteps) -> tuple[np.ndarray, np.ndarray, Tokens]:
        """Student's and teacher's logits `(2 V^2, V)` of the tokens of all texts, and those tokens, as often as `writer` writes them."""
        first, second = (a.ravel() for a in np.meshgrid(np.arange(V), np.arange(V), indexing="ij"))
        teacher = replace(self, first=self.teacher_first, second=self.teacher_second)._logits()
        labels = np.stack([first, second], 1).ravel()
        probability = reference.softmax(writer.first)[first] * reference.softmax(writer.second)[first, second]
        signal = given_tokens(exact.label_logprobs(teacher, labels))
        return self._logits(), teacher, Tokens(labels, signal, np.repeat(probability, 2), np.repeat(np.arange(V * V), 2))
