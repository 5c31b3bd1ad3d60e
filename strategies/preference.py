"""Preferences: the text that is to be learnt against the text that the student would have written."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from strategies.core import AnyTerm, Player, Sampling, Stage, Strategy, StrategyConfig, Term, lm_update
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.preference import DPO, REDI, SimPO
from strategies.schedule import PositiveSchedule, ScheduleConfig, constant, schedule
from strategies.sources import TakePerToken, Taught
from strategies.stages.judge import Reward
from strategies.stages.pairs import PairWeights
from strategies.stages.rollout import BASE, Rollout, RowsOf
from strategies.stages.score import Score
from strategies.stages.write import Authored, Judge, JudgeSetting, Write


class SODA(StrategyConfig):
    """Prefer the given text to what the student wrote before it learnt anything (DPO), pair by pair.

    *SODA: Semi On-Policy Black-Box Distillation for Large Language Models*, with DPO as in arXiv:2305.18290, eq. 7: of every prompt, the
    chosen text is the data's own completion, or one that `teacher` writes before training, and the rejected one is drawn from the student's
    first weights, the same in every epoch. Those weights are the reference, too, so the loss begins at log 2. No probabilities of a
    teacher are read, unless `reference` names one: then its opinion is what the student's is compared with (LLaVA-MoD's second
    stage), which wants `length_normalised`. Logs -log q per token of both sides as `loss/chosen` and `loss/rejected`: DPO alone may
    let both rise. `without_reference` prefers by the texts' own likelihoods (arXiv:2405.14734, arXiv:2505.24850). Does not
    refresh the rejected texts.
    """

    type: Literal["soda"] = "soda"
    teacher: str | None = None
    """Name of the endpoint that writes the chosen texts, once and before training; the data's own completions when absent."""
    base: str = BASE
    """Name of the endpoint that writes the rejected texts. `base` is the student as it begins, unless the recipe says otherwise."""
    reference: str | None = None
    """Name of the endpoint whose log-probabilities the student's are compared with; that of `base` when absent."""
    verifier: str | None = None
    """Name of an endpoint that judges the rejected texts: pairs whose rejected text it does not find wrong are left out."""
    without_reference: (
        Annotated[SimPO | REDI, Field(discriminator="type"), BeforeValidator(lambda v: {"type": v} if isinstance(v, str) else v)] | None
    ) = None
    """Takes DPO's place, and asks nobody: `simpo`, or `redi`, which wants a student that has learnt the chosen texts already."""
    beta: PositiveSchedule = 0.1
    """Inverse temperature of DPO's preference, per nat."""
    length_normalised: bool = False
    """Whether each side's log-ratio is divided by its tokens."""
    dpo_weight: ScheduleConfig = 1.0
    """Weight of the preference, a mean over pairs."""
    sft_weight: ScheduleConfig = 0.0
    """Weight of the cross-entropy on the chosen texts, a mean over their tokens."""
    sample_temperature: PositiveFloat = 1.0
    """At which the rejected texts are drawn."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draws from the likeliest tokens that hold this much probability."""
    teacher_temperature: NonNegativeFloat = 0.0
    """At which the teacher writes; 0 writes the likeliest token each time."""
    max_new_tokens: PositiveInt = 256
    """Longest text of either, in tokens."""
    prompt_tokens: PositiveInt = 32
    """Of a row without a prompt, such as plain text, the first so many tokens are one."""
    sampling_seed: NonNegativeInt = 0
    """Other texts from the same teacher."""
    judge: JudgeSetting = Judge()
    """Which of the teacher's texts are right, by their final answer: none, exact, numeric, or {type: regex, pattern: ...}."""

    @model_validator(mode="after")
    def _one_preference(self) -> SODA:
        kept = type(self).model_fields
        given = [name for name in ("reference", "beta", "length_normalised") if getattr(self, name) != kept[name].default]
        if self.without_reference is not None and given:
            raise ValueError(f"expected without_reference alone, with settings of its own, and got {given[0]}, which is DPO's")
        return self

    def build(self) -> Strategy:
        reference, take = self.reference or self.base, TakePerToken()
        preference: DPO | SimPO | REDI = self.without_reference or DPO(beta=self.beta, length_normalised=self.length_normalised)
        asked = () if self.without_reference else (Score(reference, reference, take.request),)
        terms: tuple[AnyTerm, ...] = (
            Term(preference.type, preference, schedule(self.dpo_weight), signal=reference if asked else None),
            Term("chosen", CrossEntropy(), schedule(self.sft_weight), watched=True),
            Term("rejected", CrossEntropy(), constant(0.0), watched=True),
        )
        judges: tuple[Stage, ...] = () if self.verifier is None else (Reward(self.verifier),)
        weighed = (PairWeights(preference.type, judged=bool(judges)), RowsOf("chosen", "given"), RowsOf("rejected", "written"))
        return Strategy(
            players={"student": Player()},
            stages=(self._contrast(), *asked, *judges, *weighed),
            updates=(lm_update(*terms),),
            signals={reference: Taught(take, endpoint=reference)} if asked else {},
            authors=self._authors(),
        )

    def _contrast(self) -> Rollout:
        """The stage that writes the rejected texts."""
        sampling = Sampling(1, self.sample_temperature, self.top_p, max_new_tokens=self.max_new_tokens)
        return Rollout(sampling, prompt_tokens=self.prompt_tokens, paired=True, redrawn=False, endpoint=self.base)

    def _authors(self) -> tuple[Authored, ...]:
        """Who writes the chosen texts."""
        if self.teacher is None:
            return ()
        sampling = Sampling(1, self.teacher_temperature, max_new_tokens=self.max_new_tokens, seed=self.sampling_seed)
        return (Authored(Write(self.teacher, sampling), self.judge),)
