"""Rows that the student writes during training: what the door adds to the stages that write and read them, and how large they may
be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from orchestrator.authored import stop_tokens
from orchestrator.checks.networks import adds_before
from orchestrator.config import Job
from orchestrator.errors import Refusal
from strategies.core import Strategy
from strategies.stages.rollout import rollouts
from strategies.stages.view import REFERENCE, Context, behind


def equipped(
    job: Job, strategy: Strategy, tokenizer: PreTrainedTokenizerBase, positions: Mapping[str, int | None] = MappingProxyType({})
) -> Strategy:
    """The strategy whose stage that writes knows the tokens that end a text, the longest row, and the run's seed, and whose contexts
    are ids. `positions` are those that the endpoints' networks have.

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
    stop = stop_tokens(tokenizer)
    whole = replace(stage, sampling=replace(stage.sampling, stop=stop, seed=job.run.seed), longest_tokens=longest)
    stages = tuple(whole if s is stage else s for s in strategy.stages)
    known = {id(s): replace(s, context=read_context(s.context, tokenizer, stop, positions.get(s.endpoint))) for s in behind(stages)}
    return replace(strategy, stages=tuple(known.get(id(s), s) for s in stages))


def read_context(context: Context, tokenizer: PreTrainedTokenizerBase, stop: tuple[int, ...], positions: int | None) -> Context:
    """A context as ids, for a teacher that has so many `positions`."""
    first, _, second = context.text.partition(REFERENCE)
    before, between = (tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (first, second))
    opening = tuple(adds_before(tokenizer))
    longest = context.longest_tokens if positions is None else positions
    return replace(context, before=before, between=between, opening=opening, endings=stop, longest_tokens=longest)


def longest_rows(strategy: Strategy, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths of the rows that may become of rows of the data, at most."""
    for stage in rollouts(strategy.stages):
        new = np.minimum(lengths + stage.sampling.max_new_tokens, stage.longest_tokens)
        lengths = np.repeat(np.maximum(lengths, new), stage.sampling.samples)
    return lengths


def read_rows(strategy: Strategy, endpoint: str, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths of rows as an endpoint reads them, at most: behind their contexts. No reference is longer than its row may become."""
    for stage in (s for s in behind(strategy.stages) if s.endpoint == endpoint and s.context.text):
        context = stage.context
        longer = lengths * (1 + context.shows_reference) + len(context.before) + len(context.between)
        lengths = np.maximum(lengths, np.minimum(longer, context.longest_tokens))
    return lengths
