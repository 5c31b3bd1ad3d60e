"""Write: somebody continues prompts; and what becomes of the texts before anybody learns from them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import BeforeValidator, model_validator

from strategies.core import Author, Columns, Endpoint, Sampling, Settings

WRITTEN = ("tokens", "lengths", "row_id", "sample", "finished", "logprobs")


@dataclass(frozen=True)
class Write:
    """Adds `written/<column>`: what `endpoint` writes after each row's tokens, and `written/seconds` (1,). An endpoint with a
    price adds `written/cost` (1,).

    The rows of a bundle are prompts; each gets `sampling.samples` texts, all samples of a row together, rows in order.
    """

    endpoint: str
    sampling: Sampling

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tokens", "lengths", "row_id"})

    @property
    def adds(self) -> frozenset[str]:
        return frozenset(f"written/{c}" for c in (*WRITTEN, "seconds"))

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns:
        if not isinstance(endpoint, Author):
            raise ValueError(f"stage Write needs an endpoint that writes; {self.endpoint!r} does not")
        began = time.perf_counter()
        written = endpoint.write(columns, self.sampling)
        seconds = np.asarray([time.perf_counter() - began], dtype=np.float32)
        return {**columns, **{f"written/{k}": v for k, v in written.items()}, "written/seconds": seconds}


class Judge(Settings):
    """How a written text's final answer is compared with the row's reference. Nothing is executed."""

    type: Literal["none", "exact", "numeric", "regex"] = "none"
    """`exact`: the same words; `numeric`: equal numbers; `regex`: the same words, found by `pattern` in the text."""
    pattern: str | None = None
    """`regex` only: a Python pattern whose first group is the answer; the last match counts."""

    @model_validator(mode="after")
    def _pattern_fits(self) -> Judge:
        if (self.type == "regex") != (self.pattern is not None):
            raise ValueError("pattern belongs to the type regex, which needs one")
        return self


JudgeSetting = Annotated[Judge, BeforeValidator(lambda v: {"type": v} if isinstance(v, str) else v)]


@dataclass(frozen=True)
class Authored:
    """Text that an endpoint writes for the prompts of the data, once and before training, and which of it is learnt from.

    A prompt's texts are looked at in the order of their samples: judged, then freed of duplicates, then at most `per_prompt` kept.
    """

    write: Write
    judge: Judge
    unfinished: Literal["keep", "drop"] = "keep"
    """What becomes of texts that met the limit of tokens before they ended."""
    per_prompt: int | None = None
