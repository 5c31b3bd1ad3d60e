"""Distillation from a teacher's inner states, computed by a frozen player beside the student, on the dataset's text or on text that the
student writes while it learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from strategies.control import AdaptiveShare
from strategies.core import AnyTerm, Player, StatesTerm, Strategy, Term, lm_update
from strategies.objectives.divergence import ForwardKL
from strategies.objectives.features import GramMatrices, HiddenStates, Layers
from strategies.objectives.filtered import FilteredLayers, FilterKind, FilterTask
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.relations import Relations
from strategies.on_policy import OnPolicy
from strategies.schedule import PositiveSchedule, ScheduleConfig, Steps, schedule, values_of
from strategies.sources import TakeTopK, Taught
from strategies.stages.rollout import RowsOf
from strategies.stages.score import Score
from strategies.taps import Layer

StatesSettings = Annotated[HiddenStates | GramMatrices | Relations, Field(discriminator="type")]
GUIDE = "guide"
"""The frozen player."""


class Guided(OnPolicy):
    """What is common to strategies in which every training worker holds the teacher, which reads what the student reads.

    With the defaults the rows are the data's own; with a `student_share` the student writes that share of them while it learns.
    """

    teacher: str = "teacher"
    """Name of the endpoint whose saved model every training worker loads."""
    student_share: ScheduleConfig | AdaptiveShare = 0.0
    """Share of the rows that the student writes; the others keep the data's own completions. A number, a schedule, such as
    `{steps: [[0, 0.0], [500, 1.0]]}` for a warm-up, or `{rise: 0.1}` to grow whenever the held-out loss has risen. Nobody writes
    where it is 0."""
    top_k: PositiveInt = 64
    """Teacher tokens kept per position for the forward KL; the rest become one bucket."""

    def guided(self, terms: tuple[AnyTerm, ...], given: tuple[str, ...]) -> Strategy:
        """`terms` on what the teacher shows and on what a scorer says; those called `given` count on the data's own completions."""
        take, writing = TakeTopK(top_k=self.top_k), self.writing()
        scored = tuple(t.signal for t in terms if isinstance(t, Term) and t.signal)
        scores, base = self.watched(*(Score(name, name, take.request) for name in scored))
        on_given = tuple(RowsOf(name, "given") for name in given if writing)
        return Strategy(
            players={"student": Player(), GUIDE: Player(model=self.teacher, trained=False)},
            stages=(*writing, *scores, *on_given),
            updates=(lm_update(*terms),),
            signals={name: Taught(take, endpoint=name) for name in scored},
            controllers=self.controllers(),
            base=base,
        )


class InnerStates(Guided):
    """Match what a teacher computes inside, beside its next-token distribution and the dataset's tokens.

    With the defaults the three losses of DistilBERT (arXiv:1910.01108, section 2) on causal text: cosine of the last hidden states,
    forward KL at temperature 2, cross-entropy. `objective` may instead compare layers by squared error (CoFi, arXiv:2204.00408),
    self-attention relations (MiniLMv2, arXiv:2012.15828) or Gram matrices. Every training worker holds the teacher; with a
    `kd_weight` a scorer holds it too. Does not copy the teacher's layers into the student, which is a job of its own.
    """

    type: Literal["inner-states"] = "inner-states"
    objective: StatesSettings = HiddenStates(distance="cosine")
    """How inner states are compared."""
    states_weight: ScheduleConfig = 1.0
    """Weight of `objective`."""
    kd_weight: ScheduleConfig = 5.0
    """Weight of the forward KL on scored rows; 0 asks no scorer."""
    ce_weight: ScheduleConfig = 2.0
    """Weight of the cross-entropy on the dataset's tokens."""
    temperature: PositiveSchedule = 2.0
    """Divides both sides' logits in the forward KL; its T^2 keeps the gradient's size."""

    def build(self) -> Strategy:
        states = StatesTerm("states", self.objective, schedule(self.states_weight), GUIDE)
        ce = Term("ce", CrossEntropy(), schedule(self.ce_weight))
        return self.guided((states, *_kd(self.teacher, self.kd_weight, self.temperature), ce), ("ce",))


class Ted(Guided):
    """Match filtered states of several layers: what filters, trained first, keep for predicting the tokens.

    TED (arXiv:2210.01351) in one run: for `filter_steps` only the filters of student and teacher learn, from the dataset's tokens,
    while the student moves by weight decay alone; then the student learns from filtered layers, forward KL and cross-entropy, and
    filters of the student with it. Filters read the teacher's head, not each network's own. Every training worker holds the
    teacher; with a `kd_weight` a scorer holds it too.
    """

    type: Literal["filtered-layers"] = "filtered-layers"
    filter_steps: PositiveInt
    """Steps in which only filters learn."""
    layers: Layers = (Layer(depth=0.25), Layer(depth=0.5), Layer(depth=0.75), Layer(depth=1.0))
    """Layers that are compared; one that stands for both networks, best by depth, or a pair."""
    filter: FilterKind = "linear"
    """`W h`, or `W gelu(h)`."""
    layers_weight: float = 10.0
    """Weight of the distance between filtered states, after `filter_steps`."""
    kd_weight: float = 1.0
    """Weight of the forward KL after `filter_steps`; 0 asks no scorer."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy on the dataset's tokens, after `filter_steps`."""
    temperature: PositiveSchedule = 2.0
    """Divides both sides' logits in the forward KL; its T^2 keeps the gradient's size."""

    def build(self) -> Strategy:
        learnt, compared = (kind(layers=self.layers, filter=self.filter) for kind in (FilterTask, FilteredLayers))
        task = StatesTerm("filters", learnt, Steps(steps=((0, 1.0), (self.filter_steps, 0.0))), GUIDE, filters="layers")
        match = StatesTerm("layers", compared, self._later(self.layers_weight), GUIDE)
        ce = Term("ce", CrossEntropy(), self._later(self.ce_weight))
        kd = _kd(self.teacher, self._later(self.kd_weight), self.temperature)
        return self.guided((task, match, *kd, ce), ("filters", "ce"))

    def _later(self, weight: float) -> Steps:
        return Steps(steps=((0, 0.0), (self.filter_steps, weight)))


def _kd(teacher: str, weight: ScheduleConfig, temperature: ScheduleConfig) -> tuple[Term, ...]:
    """The forward KL on scored rows, unless its weight is 0 throughout."""
    if not any(values_of(weight)):
        return ()
    return (Term("kd", ForwardKL(temperature=temperature), schedule(weight), signal=teacher),)
