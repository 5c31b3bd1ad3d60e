"""A rehearsal of a strategy's stages on one row of two tokens with deterministic answers: what they ask of their endpoints and what
they really add is known before any model loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cluster.config import EndpointConfig
from cluster.engines.fake import FakeEngine
from orchestrator.bundle import HELD_OUT_STEP
from orchestrator.checks.networks import Cast
from orchestrator.config import Job
from orchestrator.errors import Refusal
from strategies.core import Columns, Sampling, ScoreRequest, Stage, Strategy
from strategies.domains import DOMAIN


@dataclass(frozen=True)
class _Rehearsal:
    """Stands in for an endpoint: answers any question about two tokens that the endpoint could answer."""

    where: str
    name: str
    config: EndpointConfig | None
    """None for a stage that needs nobody."""
    vocabulary: int
    width: int
    """Of its hidden states; 0 for an endpoint without a network."""
    asked: list[ScoreRequest]
    """Everything that it was asked."""

    def write(self, columns: Columns, sampling: Sampling) -> Columns:
        """See `cluster.engines.Writer.write`."""
        self._can("writes", "one that writes", f"Name a saved model in endpoints.{self.name}.model, or a server (engine: openai).")
        return FakeEngine(self.vocabulary).write(columns, sampling)

    def score(self, columns: Columns, request: ScoreRequest) -> Columns:
        """See `cluster.engines.Engine.score`."""
        self._can("scores", "one that scores", f"Name a saved model in endpoints.{self.name}.model, or a server (engine: openai).")
        self.asked.append(request)
        if request.kind == "topk" and request.top_k > self.vocabulary:
            do = f"Set top_k to at most {self.vocabulary}; 64 is plenty."
            raise Refusal(
                f"{self.where}: top_k", str(request.top_k), f"at most the {self.vocabulary} ids that student and teacher share", do
            )
        if request.kind != "hidden":
            return FakeEngine(self.vocabulary).score(columns, request)
        if not self.width:
            do = "Name an endpoint with a saved model, or take topk or dense."
            raise Refusal(f"{self.where}: take hidden", "an endpoint without a network", "one whose hidden states can be read", do)
        tokens = np.count_nonzero(columns["loss_mask"])
        return {"hidden": np.zeros(tokens * self.width, np.float32), "dropped_mass": np.zeros(1, np.float32)}

    def recall(self, through: int, rows: int) -> Columns:
        """See `strategies.stages.replay.Recaller`: before the first step nobody has written."""
        return {}

    def judge(self, columns: Columns) -> Columns:
        """See `strategies.core.Verifier.judge`."""
        do = f"Set endpoints.{self.name}={{engine: verifier, kind: math}}, or another kind: exact, numeric, regex, callable, tests."
        self._can("judges", "one that judges", do)
        rows = len(columns["lengths"])
        nobody = np.zeros(1, np.int64)
        return {"reward": np.zeros(rows, np.float32), "judged": np.ones(rows, np.uint8), "failed": nobody, "unjudgeable": nobody}

    def _can(self, what: str, expected: str, do: str) -> None:
        if self.config is not None and not getattr(self.config, what):
            raise Refusal(f"{self.where}: endpoint {self.name!r}", f"the engine {self.config.engine!r}", expected, do)


def rehearse(
    job: Job, strategy: Strategy, endpoints: Mapping[str, EndpointConfig], people: Cast
) -> tuple[int, dict[str, list[ScoreRequest]]]:
    """Bytes that stages add to every loss token, and what they ask of each of `endpoints`.

    `Refusal` for an endpoint that cannot do what is asked of it, for more ids than there are, and for a stage that does not add what it
    says.
    """
    where = f"strategy.{job.run.strategy.type}"
    columns = _smallest_bundle(domains=job.run.data.domain_column is not None)
    before = set(columns)
    asked: dict[str, list[ScoreRequest]] = {}
    for stage in strategy.stages:
        name = stage.endpoint or ""
        network = people.teachers.get(name)
        width = network.hidden if network else 0
        actor = _Rehearsal(where, name, endpoints.get(name), people.usable(name), width, asked.setdefault(name, []))
        columns = _play(where, stage, columns, actor)
    return sum(values.nbytes for name, values in columns.items() if name not in before), asked


def _play(where: str, stage: Stage, columns: Columns, endpoint: _Rehearsal) -> Columns:
    after = stage(dict(columns), endpoint if stage.endpoint else None)
    missing = sorted(stage.adds - set(after))
    if missing:
        got = f"no column {missing[0]!r} after it ran"
        raise Refusal(f"{where}: stage {type(stage).__name__}", got, "every column that it says it adds", "Mend the stage.")
    return after


def _smallest_bundle(domains: bool) -> Columns:
    control: Mapping[str, int] = {"step": HELD_OUT_STEP, "bundle": 0, "attempt": 1, "rows_total": 1, "steps": 1}
    return {
        "tokens": np.asarray([0, 0], dtype=np.int32),
        "lengths": np.asarray([2], dtype=np.int32),
        "loss_mask": np.asarray([0, 1], dtype=np.uint8),
        "row_id": np.asarray([0], dtype=np.int64),
        **({DOMAIN: np.asarray([0], dtype=np.int64)} if domains else {}),
        **{name: np.asarray([value], dtype=np.int64) for name, value in control.items()},
    }
