"""Distillation from several teachers at once, on given text or on the student's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, field_validator, model_validator

from strategies.aligned import TakeSpans
from strategies.choosing import Chosen, ProgressSetting
from strategies.control import Controlled, Controller
from strategies.core import AnyTerm, Player, Schedule, Settings, Stage, Strategy, Term, lm_update
from strategies.objectives import AnyObjective
from strategies.objectives.aligned import Distance, SpanLikelihood
from strategies.objectives.divergence import ForwardKL
from strategies.objectives.likelihood import CrossEntropy
from strategies.on_policy import StudentWrites
from strategies.schedule import ScheduleConfig, Share, schedule, values_of
from strategies.sequence import SeqKD, VerifiedCoT
from strategies.sources import Blended, Source, TakeDense, TakeTopK, Taught
from strategies.stages.align import Align, AlignedTokens, ScoreAligned
from strategies.stages.ask import Ask, OnFailure
from strategies.stages.panel import GATE, Choose, Gate, Member, OfDomains
from strategies.stages.rollout import RowsOf
from strategies.stages.support import SharedSupport

PANEL = "panel"
"""The one signal that is made of all teachers'."""
CHOICE = "choice/"
"""Before a teacher's name: the controller that says whether it teaches now."""
SPANS = TakeSpans()
"""What is asked of teachers with another tokenizer."""
ON_SPANS = "spans-"
"""Before such a teacher's name: its term."""
ON_SHARED = "panel/"
"""Before a teacher's name: its answers on the ids that all of them are blended on."""


class TeacherSetting(Settings):
    """One teacher among several. Its name is that of the endpoint that scores."""

    weight: ScheduleConfig = 1.0
    """Its share beside the others'. A schedule makes a sequence of teachers: `{steps: [[0, 1.0], [500, 0.0]]}` stops asking this one at
    step 500."""
    domains: tuple[str, ...] = ()
    """It teaches the rows of these domains alone (`data.domain`); all rows when left out."""

    @field_validator("weight")
    @classmethod
    def _shares(cls, weight: ScheduleConfig) -> ScheduleConfig:
        if any(value < 0 for value in values_of(weight)):
            raise ValueError("expected shares of 0 or more; the strategy `terms` blends with negative weights")
        return weight


class ForeignSetting(Settings):
    """A teacher with a tokenizer of its own, beside those that share the student's. Its name is that of the endpoint that scores."""

    weight: ScheduleConfig = 0.5
    """Weight of its term, which compares the likelihoods of spans of the same bytes (`alm`)."""
    domains: tuple[str, ...] = ()
    """It teaches the rows of these domains alone (`data.domain`); all rows when left out."""
    distance: Distance = "kl"
    """Between a span's likelihoods, each against its opposite: `kl`, `reverse-kl` or `total-variation`."""
    temperature: PositiveFloat = 100.0
    """Divides the log-probabilities of whole spans before they are compared."""


class GateSetting(Settings):
    """How much each teacher counts for a token, besides its weight and its domains."""

    by: Literal["weight", "cross-entropy", "entropy", "confidence", "progress"] = "weight"
    """`cross-entropy` prefers teachers to whom the token is likely, `entropy` those without doubts, `confidence` those whose first choice
    is likely; `weight` none. `progress` lets one of them teach from one evaluation to the next, and learns which (`progress`)."""
    sharpness: NonNegativeFloat = 1.0
    """How strongly: shares are multiplied by exp(sharpness * score)."""
    best: bool = False
    """The best teacher of each token teaches it alone; sharpness does not matter then."""
    progress: ProgressSetting = ProgressSetting()
    """How it is learnt who teaches, with `by: progress`. A teacher's own weight and schedule do not matter then."""

    @model_validator(mode="after")
    def _scored(self) -> GateSetting:
        if self.best and self.by in ("weight", "progress"):
            raise ValueError("expected by: cross-entropy, entropy or confidence beside best: true, and got nothing that says who is best")
        return self


def _by_name(value: Any) -> Any:
    """A plain list of names stands for teachers with the settings' defaults."""
    return {name: {} for name in value} if isinstance(value, list | tuple) else value


class MultiTeacher(StudentWrites):
    """One divergence to several teachers, which are mixed, multiplied, added up, routed by the rows' domains, or chosen token by token.

    `mixture` is sum_k g_k p_k (averaged predictions, as BabyLlama-2, arXiv:2409.17312, has them with equal g), `product` is
    softmax(sum_k g_k log p_k), `sum` a term for each teacher. g_k are the teacher's shares of a token and add up to 1 over those that
    answer for its row (`gate`). Where one teacher alone counts, by `domains` that do not overlap or by `gate: {best: true}`, its own top-k
    tokens teach; else a mixture or a product of top-k answers is on the ids of all of them, and what one of them did not name has an even
    part of its rest. A term of `sum` is divided by the count of tokens for which its teacher counts. Teachers with another tokenizer are
    `foreign`, and teach the likelihoods of spans that cover the same bytes. With `student_share` above 0 all of this is on text that the
    student writes while it learns.
    """

    type: Literal["multi-teacher"] = "multi-teacher"
    teachers: Annotated[dict[str, TeacherSetting], BeforeValidator(_by_name), Field(min_length=1)]
    """Endpoints that score, each with its weight and domains; or a list of their names."""
    foreign: Annotated[dict[str, ForeignSetting], BeforeValidator(_by_name)] = Field(default_factory=dict)
    """Endpoints that score in tokens of their own, each a term of its own beside what the others say together; or a list of their names."""
    combine: Literal["mixture", "product", "sum"] = "mixture"
    """What becomes of their answers to one token."""
    gate: Annotated[GateSetting, BeforeValidator(lambda v: {"by": v} if isinstance(v, str) else v)] = GateSetting()
    """What a teacher's share of a token depends on besides."""
    on_failure: OnFailure = "stop"
    """What becomes of rows for which a server of `teachers` does not answer, after all repetitions: the run stops, waits until it does, or
    goes on with the others. A foreign one stops the run."""
    text: Annotated[SeqKD | VerifiedCoT, Field(discriminator="type")] | None = None
    """A teacher that writes before training instead of scoring: `{type: seq-kd, teacher: writer}`. The rows are then its texts, and the
    other teachers score them."""
    take: Annotated[
        TakeTopK | TakeDense, Field(discriminator="type"), BeforeValidator(lambda v: {"type": v} if isinstance(v, str) else v)
    ] = TakeTopK()
    """What is asked of every teacher."""
    objective: Annotated[AnyObjective, BeforeValidator(lambda v: {"type": v} if isinstance(v, str) else v)] = ForwardKL()
    """The divergence from what the teachers say."""
    kd_weight: ScheduleConfig = 0.9
    """Weight of the divergence."""
    ce_weight: ScheduleConfig = 0.1
    """Weight of the cross-entropy on text that the student did not write."""
    student_share: Share = 0.0
    """Share of the rows that the student writes. A number or a schedule."""

    @field_validator("teachers")
    @classmethod
    def _named(cls, teachers: dict[str, TeacherSetting]) -> dict[str, TeacherSetting]:
        if PANEL in teachers:
            raise ValueError(f"expected another name for the endpoint {PANEL!r}, which means all teachers together")
        return teachers

    @model_validator(mode="after")
    def _apart(self) -> MultiTeacher:
        if both := sorted(self.teachers.keys() & self.foreign.keys()):
            raise ValueError(
                f"expected {both[0]!r} among teachers, if it has the student's tokenizer, or among foreign ones, and not in both"
            )
        return self

    @model_validator(mode="after")
    def _reads_distributions(self) -> MultiTeacher:
        if self.objective.reads not in ("pair", "expectation"):
            raise ValueError(f"expected an objective that compares distributions, such as forward-kl, and got {self.objective.type!r}")
        return self

    @model_validator(mode="after")
    def _whole_answers(self) -> MultiTeacher:
        if isinstance(self.take, TakeTopK) and self.take.tail != "bucket":
            raise ValueError(f"expected take.tail: bucket, because answers are blended with their rest, and got {self.take.tail!r}")
        return self

    def build(self) -> Strategy:
        writing = self.writing()
        weights = self._weights()
        asks = [Ask(n, n, self.take.request, t.domains, weights[n], self.on_failure) for n, t in self.teachers.items()]
        scores, base = self.watched(*asks)
        terms = self._terms()
        gate = Gate(
            {name: Member(weights[name], t.domains) for name, t in self.teachers.items()},
            "weight" if self.gate.by == "progress" else self.gate.by,
            self.gate.sharpness,
            self.gate.best,
            terms=() if self.combine == "sum" else tuple(terms),
            member_terms={name: term for term, name in terms.items()} if self.combine == "sum" else {},
        )
        ce: tuple[AnyTerm, ...] = () if self.ce_weight == 0 else (Term("ce", CrossEntropy(), schedule(self.ce_weight)),)
        on_given = tuple(RowsOf(term.name, "given") for term in ce if writing)
        divergence: Any = self.objective  # its protocol follows from what it reads
        kd = tuple(Term(term, divergence, schedule(self.kd_weight), signal) for term, signal in terms.items())
        return Strategy(
            players={"student": Player()},
            stages=(*writing, *scores, gate, *self._combining(), *_foreign_stages(self.foreign), *on_given),
            updates=(lm_update(*kd, *_foreign_terms(self.foreign), *ce),),
            signals=self._signals() | {name: Taught(SPANS, endpoint=name) for name in self.foreign},
            authors=self.text.build().authors if self.text else (),
            controllers={**self.controllers(), **self._choices()},
            base=base,
        )

    def _weights(self) -> dict[str, Schedule]:
        """Of each teacher, before the gate."""
        if self.gate.by == "progress":
            return {name: Controlled(CHOICE + name) for name in self.teachers}
        return {name: schedule(teacher.weight) for name, teacher in self.teachers.items()}

    def _choices(self) -> dict[str, Controller]:
        """Who teaches next, where that is learnt."""
        names = tuple(self.teachers)
        return {CHOICE + n: Chosen(n, names, self.gate.progress) for n in names} if self.gate.by == "progress" else {}

    @property
    def _alone(self) -> bool:
        """Whether one teacher at most counts for a token."""
        named = [domain for teacher in self.teachers.values() for domain in teacher.domains]
        apart = all(t.domains for t in self.teachers.values()) and len(set(named)) == len(named)
        return self.gate.best or self.gate.by == "progress" or apart or len(self.teachers) == 1

    @property
    def _on_shared_ids(self) -> bool:
        return not self._alone and isinstance(self.take, TakeTopK)

    def _terms(self) -> dict[str, str]:
        """Terms of the loss and the signals that they read."""
        return {f"kd-{name}": name for name in self.teachers} if self.combine == "sum" else {"kd": PANEL}

    def _combining(self) -> tuple[Stage, ...]:
        """The stages behind the gate that make one answer of several, as far as that is done before training."""
        members = tuple(self.teachers)
        if self.combine == "sum":
            return ()
        if self._alone:
            return (Choose(PANEL, members, (*self.take.columns, "logprob")),)
        return (SharedSupport(members, ON_SHARED),) if self._on_shared_ids else ()

    def _signals(self) -> dict[str, Source]:
        own: dict[str, Source] = {name: Taught(self.take, endpoint=name) for name in self.teachers}
        if self.combine == "sum":
            return own
        if self._alone:
            return {**own, PANEL: Taught(self.take)}
        prefix = ON_SHARED if self._on_shared_ids else ""
        shared: dict[str, Source] = {prefix + name: Taught(self.take) for name in self.teachers} if prefix else {}
        blend = Blended({prefix + name: GATE + name for name in self.teachers}, self.combine, self.take.gives)
        return {**own, **shared, PANEL: blend}


def _foreign_terms(foreign: Mapping[str, ForeignSetting]) -> tuple[Term, ...]:
    """A term for each teacher with another tokenizer."""
    return tuple(
        Term(ON_SPANS + name, SpanLikelihood(distance=t.distance, temperature=t.temperature), schedule(t.weight), signal=name)
        for name, t in foreign.items()
    )


def _foreign_stages(foreign: Mapping[str, ForeignSetting]) -> tuple[Stage, ...]:
    """What shows those teachers the rows in their own tokens."""
    found: list[Stage] = []
    for name, teacher in foreign.items():
        term = ON_SPANS + name
        found += [Align(name, of=name), AlignedTokens(term, name)]
        found += [OfDomains(term, teacher.domains)] if teacher.domains else []
        found.append(ScoreAligned(name, name, SPANS.request))
    return tuple(found)
