"""Dual-space distillation from a teacher with another tokenizer, on the dataset's text or on text that the student writes."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from strategies.core import ScoreRequest, StatesTerm, Strategy
from strategies.cross_tokenizer import CrossTokenizer
from strategies.objectives.dual_space import Alignment, StudentSpace, StudentSpaceTask, TeacherSpace
from strategies.schedule import PositiveSchedule, ScheduleConfig, schedule
from strategies.sources import ForeignStates
from strategies.stages.align import Which

FILTERS = "spaces"
"""What the three terms' filters are kept as."""


class DSKD(CrossTokenizer):
    """Compare distributions of both networks in the space of either, beside cross-entropy.

    Dual-space knowledge distillation (arXiv:2406.17328, arXiv:2504.11426): the teacher's last hidden states go through a trained filter
    and the student's output head, the student's through one and the teacher's head. Tokens of different tokenizers meet by cross-model
    attention, or where both have the very same bytes. The teacher's states travel, and every training worker holds its output head and
    its input embeddings, so it must be a saved model. Filters begin as the identity between equal widths, else at random, and are not
    fitted to the heads beforehand. The cross-entropy beside them is what teaches the student's own output head at first: with
    `ce_weight: 0` a student that knows nothing does not learn to predict.
    """

    type: Literal["dskd"] = "dskd"
    alignment: Alignment = "attention"
    """`attention` between all tokens of a row; `exact` compares tokens of the same bytes alone, which needs vocabularies that are alike."""
    task_weight: ScheduleConfig = 1.0
    """Weight of the cross-entropy of the teacher's states in the student's space, from which the filters learn."""
    student_space_weight: ScheduleConfig = 1.0
    """Weight of the forward KL in the student's space, where the teacher's states are right there."""
    teacher_space_weight: ScheduleConfig = 1.0
    """Weight of the forward KL in the teacher's space."""
    temperature: PositiveSchedule = 1.0
    """Divides both sides' logits in both spaces; its T^2 keeps the gradient's size."""
    filters_lr: PositiveFloat = 1e-3
    """Peak learning rate of the filters, which moves as the student's does."""

    def build(self) -> Strategy:
        terms = (
            ("task", StudentSpaceTask(alignment=self.alignment), self.task_weight),
            ("student-space", StudentSpace(alignment=self.alignment, temperature=self.temperature), self.student_space_weight),
            ("teacher-space", TeacherSpace(alignment=self.alignment, temperature=self.temperature), self.teacher_space_weight),
        )
        made = [StatesTerm(name, o, schedule(weight), self.teacher, FILTERS, self.filters_lr) for name, o, weight in terms]
        which: Which = "one" if self.alignment == "exact" else "all"
        return self.aligned(ForeignStates(self.teacher), ScoreRequest("hidden"), *((term, which) for term in made))
