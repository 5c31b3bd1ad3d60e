"""Score: a teacher's numbers on the loss tokens of a bundle."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from strategies.core import Columns, Endpoint, ScoreRequest


@dataclass(frozen=True)
class Score:
    """Adds a column group: what `endpoint` answers to `request`, as `<signal>/<column>`, besides `<signal>/seconds` (1,) and
    `<signal>/dropped_mass` (1,), the largest share of mass on ids that the student lacks. An endpoint with a price adds
    `<signal>/cost` (1,).

    Only loss tokens carry signals. The teacher sees exactly the token ids that the student will see.
    """

    signal: str
    endpoint: str
    request: ScoreRequest

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tokens", "lengths", "loss_mask"})

    @property
    def adds(self) -> frozenset[str]:
        return frozenset(f"{self.signal}/{c}" for c in (*self.request.answers, "dropped_mass", "seconds"))

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        if endpoint is None:
            raise ValueError(f"stage Score needs the endpoint {self.endpoint!r} and was given none")
        began = time.perf_counter()
        scores = endpoint.score(columns, self.request)
        seconds = np.asarray([time.perf_counter() - began], dtype=np.float32)
        return {**columns, **{f"{self.signal}/{k}": v for k, v in scores.items()}, f"{self.signal}/seconds": seconds}
