"""How often the student is right while it trains: training workers let it answer held-out prompts, and a verifier judges.

The students of all workers are the same, so each answers the prompts of its own held-out rows. A worker keeps keys and values of as many
tokens as a micro-batch has, and judges in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from cluster.config import VerifierEndpoint
from cluster.endpoints import make_engine
from orchestrator.collective import total
from orchestrator.layouts import Layout
from orchestrator.models import StudentModule
from strategies.core import Columns, Sampling, Verifier
from strategies.stages.judge import PASSING

ACCURACY = "eval/accuracy"
JUDGED = "eval/judged"


@dataclass(frozen=True)
class Answers:
    """Which prompts are answered, how, and who judges."""

    judge: VerifierEndpoint
    sampling: Sampling
    first_row: int
    """`row_id` of the first prompt; the others follow it."""
    rows: int
    longest_tokens: int
    """Of a prompt with its answer."""
    usable: int
    """Token ids, from 0, that may be written."""
    forward_tokens: int


class Answering:
    """A training worker's part of it."""

    def __init__(self, answers: Answers | None):
        self._answers = answers

    def measure(self, layout: Layout, bundles: Sequence[Columns]) -> dict[str, float]:
        """`eval/accuracy`, the share of the judged answers that are right, and `eval/judged`, that of the answers that were judged;
        nothing where nobody asked. `bundles` are this rank's held-out rows. Collective.

        Where no verdict was reached accuracy is 0, and `eval/judged` says why.
        """
        if self._answers is None:
            return {}
        parts = [self._counts(layout, self._answers, b, rows) for b in bundles if len(rows := _wanted(self._answers, b))]
        right, verdicts, texts = total(torch.tensor(np.sum([[0.0] * 3, *parts], axis=0))).tolist()
        return {ACCURACY: right / max(1.0, verdicts), JUDGED: verdicts / max(1.0, texts)}

    def _counts(self, layout: Layout, answers: Answers, bundle: Columns, rows: NDArray[np.int64]) -> list[float]:
        """Right answers, verdicts and answers to the prompts of these rows."""
        from orchestrator.written import Bundle, ModelAuthor, judged, written  # takes a second, which the first step must not wait for

        layout.module.eval()
        author = ModelAuthor(_plain(layout), answers.usable, answers.forward_tokens)
        texts = written(author, Bundle(bundle), rows, answers.sampling, answers.longest_tokens, len(rows))
        layout.module.train()
        found = judged(texts, self._judge)
        has_verdict = found["judged"].astype(bool)
        return [float((found["reward"][has_verdict] >= PASSING).sum()), float(has_verdict.sum()), float(len(found["lengths"]))]

    @cached_property
    def _judge(self) -> Verifier:
        assert self._answers is not None
        engine = make_engine(self._answers.judge)
        assert isinstance(engine, Verifier)
        return engine


def _wanted(answers: Answers, bundle: Columns) -> NDArray[np.int64]:
    """Places in a bundle of the rows whose prompts are answered."""
    number = bundle["row_id"].astype(np.int64) - answers.first_row
    return np.flatnonzero((number >= 0) & (number < answers.rows))


def _plain(layout: Layout) -> PreTrainedModel:
    """The student's network, with its adapter if it has one, out of whatever wraps it."""
    model = next(m for m in layout.module.modules() if isinstance(m, StudentModule)).model
    base = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base
