"""Rows that the student writes during training: what the door adds to the stage that writes, and how large they may be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from orchestrator.authored import stop_tokens
from orchestrator.config import Job
from orchestrator.errors import Refusal
from strategies.core import Stage, Strategy
from strategies.stages.replay import Replay, replays
from strategies.stages.rollout import rollouts


def equipped(job: Job, strategy: Strategy, tokenizer: PreTrainedTokenizerBase) -> Strategy:
    """The strategy whose stage that writes knows the tokens that end a text, the longest row, and the run's seed.

    `Refusal` for more than one such stage, for texts that leave no room for a prompt, and for signals to be stored of rows that do
    not exist yet.
    """
    found = rollouts(strategy.stages)
    if not found:
        return strategy
    if len(found) > 1:
        raise Refusal(f"strategy.{job.run.strategy.type}", f"{len(found)} stages that write", "one", "Mend the strategy.")
    (stage,) = found
    if "missing" in job.run.signals.uses[job.run.signals.mode]:
        do = "Set signals=auto or signals=live; the teacher is asked while the student writes."
        raise Refusal("signals.mode", f"{job.run.signals.mode!r}, and rows that the student writes during training", "auto or live", do)
    longest, new = job.run.data.max_length_tokens, stage.sampling.max_new_tokens
    if new >= longest:
        do = f"Set data.max_length_tokens to more than {new}, by the length of a prompt, or lower strategy.max_new_tokens."
        raise Refusal("data.max_length_tokens", f"{longest} for prompts and {new} new tokens", "room for both", do)
    sampling = replace(stage.sampling, stop=stop_tokens(tokenizer), seed=job.run.seed)
    whole = replace(stage, sampling=sampling, longest_tokens=longest)

    def equal(other: Stage) -> Stage:
        if other is stage:
            return whole
        return replace(other, rollout=whole) if isinstance(other, Replay) else other

    return replace(strategy, stages=tuple(equal(s) for s in strategy.stages))


def longest_rows(strategy: Strategy, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths of the rows that may become of rows of the data, at most. In the place of any may come a text of another prompt, where
    texts are recalled."""
    for stage in rollouts(strategy.stages):
        if replays(strategy.stages):
            lengths = np.full_like(lengths, stage.longest_tokens)
        new = np.minimum(lengths + stage.sampling.max_new_tokens, stage.longest_tokens)
        lengths = np.repeat(np.maximum(lengths, new), stage.sampling.samples)
    return lengths
