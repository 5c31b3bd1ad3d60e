"""Score: a teacher's numbers on the loss tokens of a bundle."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from strategies.core import Columns, Endpoint


@dataclass(frozen=True)
class Score:
    """Adds `<teacher>/ids`, `<teacher>/logprobs` (both N*K), `<teacher>/logprob` (N,), `<teacher>/seconds` (1,) and
    `<teacher>/dropped_mass` (1,), the largest share of mass on ids that the student lacks.

    Only loss tokens carry signals. The teacher sees exactly the token ids that the student will see.
    """

    teacher: str
    top_k: int

    @property
    def endpoint(self) -> str:
        return self.teacher

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tokens", "lengths", "loss_mask"})

    @property
    def adds(self) -> frozenset[str]:
        return frozenset(f"{self.teacher}/{c}" for c in ("ids", "logprobs", "logprob", "dropped_mass", "seconds"))

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        if endpoint is None:
            raise ValueError(f"stage Score needs the endpoint {self.teacher!r} and was given none")
        began = time.perf_counter()
        scores = endpoint.score(columns, self.top_k)
        seconds = np.asarray([time.perf_counter() - began], dtype=np.float32)
        return {**columns, **{f"{self.teacher}/{k}": v for k, v in scores.items()}, f"{self.teacher}/seconds": seconds}
