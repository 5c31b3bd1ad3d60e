"""Rows that the student writes during training: what the door adds to the stages that write and read them, and how large they may
be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from orchestrator import alignment
from orchestrator.authored import stop_tokens
from orchestrator.chat import ChatTemplate
from orchestrator.checks.networks import adds_before, conversations
from orchestrator.config import Job
from orchestrator.errors import Refusal
from orchestrator.pieces import Bad
from strategies.core import Sampling, Stage, Strategy
from strategies.stages.align import alignments
from strategies.stages.repair import Lessons, Repair
from strategies.stages.replay import Replay
from strategies.stages.rollout import Rollout, rollouts
from strategies.stages.view import REFERENCE, Context, ScoreBehind, behind

SHORTEST_ROW = 2
"""Tokens of a row of which one is predicted."""


def equipped(job: Job, strategy: Strategy, tokenizer: PreTrainedTokenizerBase) -> Strategy:
    """The strategy whose stages that write know the tokens that end a text, the longest row, and the run's seed, and whose contexts
    are ids.

    `Refusal` for more than one stage that continues prompts, for texts that leave no room for a prompt, and for signals to be stored of
    rows that do not exist yet.
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
    return _told(job, strategy, stage, tokenizer)


def _told(job: Job, strategy: Strategy, stage: Rollout, tokenizer: PreTrainedTokenizerBase) -> Strategy:
    """The strategy with what only a run knows in its stages, of which `stage` continues prompts."""
    stop, longest = stop_tokens(tokenizer), job.run.data.max_length_tokens

    def drawn(given: Sampling) -> Sampling:
        return replace(given, stop=stop, seed=job.run.seed)

    writer = replace(stage, sampling=drawn(stage.sampling), longest_tokens=longest)

    def whole(given: Stage) -> Stage:
        match given:
            case Rollout():
                return writer
            case Replay():
                return replace(given, rollout=writer)
            case Repair():
                feedback = _feedback(job, given.feedback_text, tokenizer)
                return replace(given, sampling=drawn(given.sampling), longest_tokens=longest, feedback=feedback)
            case ScoreBehind():
                return replace(given, context=read_context(given.context, tokenizer, stop))
        return given

    return replace(strategy, stages=tuple(whole(s) for s in strategy.stages))


def live_authors(strategy: Strategy) -> dict[str, Sampling]:
    """How endpoints write during training, by name."""
    return {s.endpoint: s.sampling for s in strategy.stages if isinstance(s, Rollout | Repair)}


def _feedback(job: Job, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids between a wrong attempt and its repair: the user's next turn where the data are conversations, else the text as it is."""
    turn = text
    if conversations(job.run.data):
        asked, attempt = [{"role": "user", "content": "a"}], {"role": "assistant", "content": "b"}
        template = ChatTemplate(tokenizer, "student.tokenizer")
        before, whole = template.opening(asked), template.opening([*asked, attempt, {"role": "user", "content": text.strip()}])
        if isinstance(before, Bad) or isinstance(whole, Bad) or not whole.startswith(f"{before}b"):
            got = "a chat template that renders a message differently once others follow"
            raise Refusal("student.tokenizer", got, "one to which a turn can be added", "Give rows as prompt and completion strings.")
        turn = whole.removeprefix(f"{before}b")
    return tuple(int(i) for i in tokenizer(turn, add_special_tokens=False)["input_ids"])


def read_context(context: Context, tokenizer: PreTrainedTokenizerBase, stop: tuple[int, ...]) -> Context:
    """A context as ids."""
    first, _, second = context.text.partition(REFERENCE)
    before, between = (tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (first, second))
    return replace(context, before=before, between=between, opening=tuple(adds_before(tokenizer)), endings=stop)


def within(strategy: Strategy, rooms: Mapping[str, int | None]) -> Strategy:
    """The strategy whose teachers leave out rows that are too long behind their contexts: `rooms` has the longest row that an endpoint
    scores, None where nobody knows. `Refusal` for a context that leaves no room for any row."""

    def fitted(stage: Stage) -> Stage:
        room = rooms.get(stage.endpoint or "")
        if not isinstance(stage, ScoreBehind) or room is None:
            return stage
        shown = len(stage.context.before) + len(stage.context.between)
        if shown + SHORTEST_ROW > room:
            do = "Shorten it, or choose a teacher with a longer context."
            raise Refusal("strategy.context", f"{shown} tokens", f"fewer than the {room} that endpoints.{stage.endpoint} reads", do)
        return replace(stage, context=replace(stage.context, longest_tokens=room))

    return replace(strategy, stages=tuple(fitted(s) for s in strategy.stages))


def longest_read(strategy: Strategy, endpoint: str, longest: int) -> int:
    """Tokens of the longest row as an endpoint with another tokenizer reads it; of all others it is `longest`."""
    own = [s for s in alignments(strategy.stages) if s.of == endpoint]
    return int(alignment.read_rows(own[0], np.asarray([longest]))[0]) if own else longest


def longest_rows(strategy: Strategy, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths of the rows that may become of rows of the data, at most. In the place of any may come a text of another prompt, where
    texts are recalled."""
    for stage in strategy.stages:
        if isinstance(stage, Replay):
            lengths = np.full_like(lengths, stage.rollout.longest_tokens)
        lengths = stage.longest_rows(lengths) if isinstance(stage, Rollout | Repair | Lessons) else lengths
    return lengths


def read_rows(strategy: Strategy, endpoint: str, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths of rows as an endpoint reads them, at most: behind their contexts, or in tokens of its own. No reference is longer than its
    row may become."""
    if own := next((s for s in alignments(strategy.stages) if s.of == endpoint), None):
        return alignment.read_rows(own, lengths)
    for stage in (s for s in behind(strategy.stages) if s.endpoint == endpoint and s.context.text):
        context = stage.context
        longer = lengths * (1 + context.shows_reference) + len(context.before) + len(context.between)
        lengths = np.maximum(lengths, np.minimum(longer, context.longest_tokens))
    return lengths
