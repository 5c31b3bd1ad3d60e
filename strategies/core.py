"""The nouns of the project: stages, terms, players, updates and the strategy record that holds them.

Nothing here runs anything. A `Strategy` says what is taught; `orchestrator/` runs it without knowing its name.
Shape letters used throughout `strategies/`: N loss tokens, V vocabulary, D hidden width, K kept teacher tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.control import Controller
    from strategies.follow import Follow
    from strategies.head import TermSums, TokenBatch, TokenLogits
    from strategies.signals import Signal
    from strategies.sources import Source
    from strategies.stages.write import Authored
    from strategies.taps import StatesObjective

Columns = dict[str, NDArray[np.generic]]
"""One bundle: named flat arrays. `tokens` (S,) int32, `lengths` (R,) int32, `loss_mask` (S,) uint8, `row_id` (R,) int64."""
COUNT = "count/"
"""Begins the names of columns `(1,)` float32 that are summed over the bundles of a step and logged under the rest of their names."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands when a value is asked for."""

    step: int
    """Optimizer steps finished before this one; the first step sees 0."""
    steps: int
    """Optimizer steps of the whole run."""
    controls: Mapping[str, float] = field(default_factory=dict)
    """Values of the strategy's controllers."""

    @property
    def fraction(self) -> float:
        """Finished share of the run, 0 to 1."""
        return self.step / max(1, self.steps)


Schedule = Callable[[Progress], float]


@dataclass(frozen=True)
class ScoreRequest:
    """What is asked of a teacher about every loss token."""

    kind: Literal["topk", "dense", "sampled", "hidden", "per-token", "among"]
    top_k: int = 0
    """`topk`: ids kept."""
    draws: int = 0
    """`sampled`: ids drawn, with replacement."""
    exponent: float = 1.0
    """`sampled`: they are drawn from the probabilities to this power."""

    @property
    def answers(self) -> tuple[str, ...]:
        """Columns of the answer, for all N loss tokens in order."""
        own = {"topk": ("ids", "logprobs"), "sampled": ("ids", "logprobs", "weights"), "per-token": ()}.get(self.kind, (self.kind,))
        return own if self.kind == "hidden" else (*own, "logprob")


class Endpoint(Protocol):
    """Whoever answers a stage: a model in the stage's own process, a server, or a fake."""

    def score(self, columns: Columns, request: ScoreRequest) -> Columns:
        """Teacher numbers for every loss token, flat and in token order, in natural logarithms at temperature 1; U ids are usable.

        `topk`: `ids` (N*K,) int32 by falling probability, `logprobs` (N*K,) float32. `dense`: `dense` (N*U,) float32.
        `sampled`: `ids`, `logprobs` and `weights` (N*n,). `hidden`: `hidden` (N*D,) float32, or bfloat16 seen as int16. `among`: `among`
        (N,) float32 of all ids together that the column `wanted` (B,) int32 names.
        But for `hidden`, `logprob` (N,) float32 of the token itself. Always `dropped_mass` (1,) float32, and `cost` (1,) of priced ones."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How texts are written."""

    samples: int = 1
    """Texts for each prompt."""
    temperature: float = 0.0
    """0 writes the likeliest token each time."""
    top_p: float = 1.0
    """Draws from the likeliest tokens that hold this much probability."""
    top_k: int = 0
    """Draws from this many of the likeliest tokens; 0 from all."""
    max_new_tokens: int = 256
    seed: int = 0
    stop: tuple[int, ...] = ()
    """Token ids that end a text and are its last token; whoever runs the strategy knows them."""


@runtime_checkable
class Author(Protocol):
    """An endpoint that writes."""

    def write(self, columns: Columns, sampling: Sampling) -> Columns:
        """Texts after each row's tokens: `tokens` (S,) int32, `lengths`, `sample` (n,) int32, `row_id` (n,) int64, `finished`
        (n,) uint8, and `logprobs` (S,) float32 of the written tokens at temperature 1, NaN where it is not told them. `cost` (1,)
        float32 from one whose tokens have a price."""
        ...


@runtime_checkable
class Verifier(Protocol):
    """An endpoint that says whether texts are right."""

    def judge(self, columns: Columns) -> Columns:
        """Verdicts on the loss tokens of R rows, of a bundle with `reference` (Q,) int32, the ids of the rows' own completions, and
        `reference_lengths` (R,) int32: `reward` (R,) float32 from 0 to 1; `judged` (R,) uint8, 0 where no verdict was reached (its
        reward is 0); and of those `failed` (1,) int64, whose verifier gave way, and `unjudgeable` (1,) int64, without an answer
        to compare with."""
        ...


class Stage(Protocol):
    """Columns to columns, before the gradient. A stage never moves rows between bundles and has no side effects."""

    @property
    def needs(self) -> frozenset[str]: ...
    @property
    def adds(self) -> frozenset[str]: ...
    @property
    def endpoint(self) -> str | None:
        """Name of the endpoint that answers this stage; None when it needs nobody."""
        ...

    def __call__(self, columns: Columns, endpoint: Endpoint | None) -> Columns: ...


class Settings(BaseModel):
    """Base of every typed setting: unknown keys are errors, values are frozen, the text under a field is its doc."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


Reads = Literal["nothing", "expectation", "pair", "label", "acted", "spans", "foreign", "states"]
"""What an objective asks of its signal: nothing (it has none); `expect`, an average under the teacher, which draws can give too; `pair`,
whole aligned distributions; `label`, the teacher's log-probability of the given token; `acted`, what is known of tokens that a policy
wrote; `spans` and `foreign`, likelihoods of spans and next tokens of another tokenizer; `states`, inner ones (`StatesTerm`)."""


class Objective(Protocol):
    """A pure function of student outputs and a signal: a **sum** over weighted tokens, never a mean. `outputs` are the student's logits of
    n loss tokens, `weights` `(n,)` float32 the term's weight of each."""

    reads: ClassVar[Reads]

    def __call__(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress) -> Tensor: ...


@runtime_checkable
class TwoPass(Protocol):
    """An objective that looks at every loss token of a micro-batch before its gradient: whole sequences, batch statistics.

    The head calls `survey` for each chunk of n tokens without gradient, `settle` once with all N of them, and `settled`
    for each chunk again, with gradient. No more than the `(N, S)` and `(N, M)` numbers is kept in between.
    """

    reads: ClassVar[Reads]

    def survey(self, outputs: TokenLogits, signal: Signal | None, progress: Progress) -> Tensor:
        """`(n, S)` float32 numbers of each token."""
        ...

    def settle(self, surveyed: Tensor, batch: TokenBatch, weights: Tensor, progress: Progress) -> Tensor:
        """`(N, M)` float32 numbers for each token, made from those of all: `(N, S)`. Carries no gradient."""
        ...

    def settled(self, outputs: TokenLogits, signal: Signal | None, weights: Tensor, progress: Progress, numbers: Tensor) -> Tensor:
        """The sum over a chunk, whose tokens have `numbers` `(n, M)`. Its value adds up to the objective's over chunks,
        and its gradient is the objective's."""
        ...


class ObjectiveSettings(Settings):
    """Base of the objectives: their settings are their fields, so that a recipe's term is the objective itself."""

    reads: ClassVar[Reads] = "pair"
    pairs: ClassVar[bool] = False
    """Whether it compares rows 2i and 2i + 1, so that they must come together, with the weight column that says so."""
    type: str

    def also_reads(self) -> frozenset[Reads]:
        """What it needs of its signal beside `reads`."""
        return frozenset()


@dataclass(frozen=True)
class Term:
    """One summand of a loss. `signal` names the column group it reads (`<signal>/ids`, ...); `scale` is its weight."""

    name: str
    objective: Objective | TwoPass
    scale: Schedule
    signal: str | None = None
    watched: bool = False
    """Whether it stands there to be measured, so that a weight of 0 is meant."""


@dataclass(frozen=True)
class StatesTerm:
    """A summand computed on inner states instead of logits. `signal` names the frozen player, or the signal of states, that is compared
    with; the objective's filters join the optimizer of the player whose update carries the term."""

    name: str
    objective: StatesObjective
    scale: Schedule
    signal: str
    filters: str | None = None
    """What its filters are kept as: terms that name the same share them. Its own name when absent."""
    filters_lr: float | None = None
    """Peak; the student's when absent."""

    @property
    def filters_name(self) -> str:
        return self.filters or self.name


AnyTerm = Term | StatesTerm


@dataclass(frozen=True)
class Player:
    """A network inside the training job: a `trained` one has an optimizer and is the recipe's own; of a frozen one `model` is the endpoint
    whose saved model every training worker loads."""

    model: str = "student"
    trained: bool = True


class Players(Protocol):
    """What an update may ask of the running networks."""

    def forward(self, player: str, terms: tuple[AnyTerm, ...]) -> TermSums:
        """Loss sums of `terms` on the micro-batch in hand, through the wrapped module of `player`."""
        ...


@dataclass(frozen=True)
class Update:
    """One optimizer step of one player, every `every` steps."""

    player: str
    terms: tuple[AnyTerm, ...]
    loss: Callable[[Players], TermSums]
    every: int = 1


@dataclass(frozen=True)
class Strategy:
    """A method of distillation, as data. `signals` say where what the terms read comes from; those that an endpoint scores are
    measured on held-out rows too."""

    players: Mapping[str, Player]
    updates: tuple[Update, ...]
    stages: tuple[Stage, ...] = ()
    signals: Mapping[str, Source] = field(default_factory=dict)
    authors: tuple[Authored, ...] = ()
    """Text that is written before training; the rows are then the kept texts, of all authors, instead of the data's own."""
    controllers: Mapping[str, Controller] = field(default_factory=dict)
    """Numbers that move by what training reports, by the name under which objectives and stages find their values."""
    follows: Mapping[str, Follow] = field(default_factory=dict)
    """Endpoints that have the student's own network, and how their weights follow it. The endpoint of a stage that writes while
    the student learns need not be named."""
    base: str | None = None
    """Signal of a stage that adds `<base>/logprob`, of the network that the student comes from or its teacher came from. Measured
    only: how far the tokens that the student writes have moved away from it."""

    @property
    def rows_together(self) -> int:
        """How many rows in a row belong in one forward: 2 where an objective compares them in pairs."""
        return 2 if any(getattr(term.objective, "pairs", False) for update in self.updates for term in update.terms) else 1


def lm_update(*terms: AnyTerm, player: str = "student", every: int = 1) -> Update:
    """One forward of `player` with every term computed on it; most strategies need only this."""
    return Update(player=player, terms=terms, loss=lambda players: players.forward(player, terms), every=every)


class StrategyConfig(Settings):
    """Base of every strategy's typed settings. Class defaults are the vetted setting."""

    type: str

    def build(self) -> Strategy:
        """The strategy record these settings describe."""
        raise NotImplementedError
