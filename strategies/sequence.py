"""Training on text that a teacher wrote: plain cross-entropy, on somebody else's words."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from strategies.core import Player, Sampling, Strategy, StrategyConfig, Term, lm_update
from strategies.objectives.likelihood import CrossEntropy
from strategies.schedule import constant
from strategies.stages.write import Authored, Judge, JudgeSetting, Write


class TeacherText(StrategyConfig):
    """What is common to strategies that learn a teacher's text. The teacher writes once, before training, into a text store."""

    teacher: str = "teacher"
    """Name of the endpoint that writes."""
    samples: PositiveInt = 1
    """Texts for each prompt."""
    temperature: NonNegativeFloat = 0.0
    """0 writes the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draws from the likeliest tokens that hold this much probability."""
    top_k: NonNegativeInt = 0
    """Draws from this many of the likeliest tokens; 0 from all."""
    max_new_tokens: PositiveInt = 256
    """Longest text, in tokens."""
    sampling_seed: NonNegativeInt = 0
    """Other texts from the same teacher. The run's own seed leaves them alone, so that runs of several seeds share them."""
    judge: JudgeSetting = Judge()
    """Which texts are right, by their final answer: none, exact, numeric, or {type: regex, pattern: ...}."""
    unfinished: Literal["keep", "drop"] = "keep"
    """What becomes of texts that met max_new_tokens before they ended."""
    per_prompt: PositiveInt | None = None
    """Most texts kept of one prompt."""

    def build(self) -> Strategy:
        sampling = Sampling(self.samples, self.temperature, self.top_p, self.top_k, self.max_new_tokens, self.sampling_seed)
        authored = Authored(Write(self.teacher, sampling), self.judge, self.unfinished, self.per_prompt)
        ce = Term("ce", CrossEntropy(), constant(1.0))
        return Strategy(players={"student": Player()}, updates=(lm_update(ce),), authors=(authored,))


class SeqKD(TeacherText):
    """Cross-entropy on one text of the teacher for each prompt: its likeliest one, decoded greedily.

    Sequence-level distillation of Kim & Rush (arXiv:1606.07947, section 3.2, eq. 9), with greedy decoding in the place of
    beam search. Does not read the teacher's probabilities, and learns nothing from the dataset's own completions.
    """

    type: Literal["seq-kd"] = "seq-kd"


class VerifiedCoT(TeacherText):
    """Cross-entropy on those of several sampled texts whose final answer is right, without duplicates.

    Rejection sampling as in arXiv:2308.01825, section 3.3 (RFT), with the teacher in the place of the student. Prompts whose
    every text is wrong are not learnt from, so the kept ones lean towards easy prompts.
    """

    type: Literal["verified-cot"] = "verified-cot"
    samples: PositiveInt = 4
    """Texts for each prompt."""
    temperature: NonNegativeFloat = 0.8
    """0 writes the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Draws from the likeliest tokens that hold this much probability."""
    max_new_tokens: PositiveInt = 512
    """Longest text, in tokens."""
    judge: JudgeSetting = Judge(type="numeric")
    """Which texts are right, by their final answer: exact, numeric, or {type: regex, pattern: ...}."""
    unfinished: Literal["keep", "drop"] = "drop"
    """What becomes of texts that met max_new_tokens before they ended."""
