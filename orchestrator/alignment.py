"""Teachers with another tokenizer: what the door tells the stages that align, and how much of the text it finds to align."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.authored import last_token
from orchestrator.checks.networks import Cast, conversations
from orchestrator.config import Job
from orchestrator.data import PreparedData, prepare
from orchestrator.errors import Refusal
from orchestrator.foreign import ForeignReader, foreign_reader, shared_ids
from orchestrator.rows import Rows
from orchestrator.token_bytes import unit_ids
from orchestrator.turns import Turns
from strategies.core import Columns, Stage, Strategy
from strategies.stages.align import NONE, Align, Reading, ScoreAligned, Spans, alignments, taught_spans
from strategies.stages.rollout import LONGEST_ROW

SAMPLED_ROWS = 256
"""Rows, evenly spread, on which alignment is measured."""
LONGEST_CONVERSATION = 8
"""Tokens of a teacher, for each of the student's, up to which it is shown a conversation."""
LEAST_ALIGNED = 0.5
"""Share of the bytes to be learnt that must lie in aligned spans; with less, what a teacher says is about something else."""


LAID_BYTES = 12
"""Of a token beside its states: its id, the one before it, and its span."""


@dataclass(frozen=True)
class Alignment:
    """How much of a sample of rows aligns with a teacher's own tokens; shares are of the bytes that are learnt."""

    endpoint: str
    rows: int
    aligned: float
    """In spans of any size."""
    one_to_one: float
    """In spans of one token on either side."""
    ours: float
    """Tokens of the student in a span, on average."""
    theirs: float
    shared: int
    """Tokens of the teacher that the student has, too."""
    expansion: float
    """Tokens that the teacher reads for each of the student's, of the row where they are most."""

    @property
    def line(self) -> str:
        """For a person."""
        return (
            f"{self.endpoint} reads the text in its own tokens: {self.aligned:.1%} of the bytes to learn lie in spans that both cover, "
            f"{self.one_to_one:.1%} in spans of one token each; {self.ours:.2f} of the student's tokens to {self.theirs:.2f} of its own "
            f"in a span ({self.rows:,} rows); {self.shared:,} tokens have the same bytes or role in both vocabularies"
        )


def told(job: Job, strategy: Strategy, people: Cast) -> Strategy:
    """The strategy whose stages that align know both tokenizers. `Refusal` for signals to be stored, which are of the student's tokens,
    and for tokenizers whose tokens are not bytes of text."""
    if not alignments(strategy.stages):
        return strategy
    if "missing" in job.run.signals.uses[job.run.signals.mode]:
        do = "Set signals=auto or signals=live; the teacher is asked while the student trains."
        got = f"{job.run.signals.mode!r}, and a teacher with a tokenizer of its own"
        raise Refusal("signals.mode", got, "auto or live, because stores hold answers about the student's tokens", do)
    readers = {
        s.of: foreign_reader(people.tokenizer, people.tokenizers[s.of], s.of, _positions(people, s.of))
        for s in alignments(strategy.stages)
        if s.of in people.tokenizers
    }

    def whole(stage: Stage) -> Stage:
        if isinstance(stage, Align) and stage.of in readers:
            return replace(stage, reader=readers[stage.of])
        if isinstance(stage, ScoreAligned) and stage.endpoint in readers and stage.request.kind == "topk":
            return replace(stage, shared=shared_ids(readers[stage.endpoint], last_token(job.run.data, people.tokenizer)))
        if isinstance(stage, ScoreAligned) and stage.endpoint in readers and stage.request.kind == "among":
            reader = readers[stage.endpoint]
            return replace(stage, units=(unit_ids(reader.student, people.tokenizer), unit_ids(reader.teacher, reader.tokenizer)))
        return stage

    return replace(strategy, stages=tuple(whole(s) for s in strategy.stages))


def units(strategy: Strategy) -> tuple[int, ...]:
    """The student's ids that begin a unit of text, where a stage that was told them asks about such."""
    return next((s.units[0] for s in strategy.stages if isinstance(s, ScoreAligned) and s.request.kind == "among"), ())


def _positions(people: Cast, name: str) -> int:
    """Of an endpoint's network; as good as no limit where it does not tell."""
    network = people.teachers.get(name)
    return (network.context if network else None) or LONGEST_ROW


def measured(job: Job, strategy: Strategy, people: Cast, data: PreparedData, cache: Path) -> tuple[Strategy, tuple[Alignment, ...]]:
    """How the rows align, by endpoint, and the strategy that knows how long they become. Conversations are laid out once more for every
    teacher, by its own template, in `cache`.

    `Refusal` for a teacher with which less than `LEAST_ALIGNED` of the bytes to be learnt align, or that has no template.
    """
    if not alignments(strategy.stages):
        return strategy, ()
    if conversations(job.run.data):
        strategy = replace(strategy, stages=tuple(_with_turns(s, job, people, data, cache) for s in strategy.stages))
    stages = alignments(strategy.stages)
    rows = Rows(data.folder, "train")
    columns = rows.read(np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SAMPLED_ROWS)).astype(np.int64)))
    found = {stage.of: _measure(stage, columns) for stage in stages}
    for alignment in found.values():
        _refuse_noise(alignment)
    return replace(strategy, stages=tuple(_longer(s, found) for s in strategy.stages)), tuple(found.values())


def read_rows(stage: Align, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths of rows in tokens of a stage's teacher, at most, as far as was measured."""
    reader = stage.reader
    if not isinstance(reader, ForeignReader):
        return lengths
    longer: NDArray[np.int64] = np.ceil(lengths * reader.expansion).clip(max=reader.longest_tokens).astype(np.int64)
    return longer


def laid_bytes(strategy: Strategy, people: Cast, found: Sequence[Alignment]) -> int:
    """Bytes that a foreign teacher's states add to every loss token of the student, of the row where they are most."""
    each = {alignment.endpoint: ceil(alignment.expansion) for alignment in found}
    asked = [s.endpoint for s in strategy.stages if isinstance(s, ScoreAligned) and s.request.kind == "hidden"]
    return sum(each[n] * (people.teachers[n].hidden * people.teachers[n].dtype.itemsize + LAID_BYTES) for n in asked)


def _with_turns(stage: Stage, job: Job, people: Cast, data: PreparedData, cache: Path) -> Stage:
    """A stage that aligns, with what the teacher's template puts between the turns."""
    if not isinstance(stage, Align) or not isinstance(stage.reader, ForeignReader):
        return stage
    theirs = people.tokenizers[stage.of]
    if theirs.chat_template is None:
        do = "Choose an instruction-tuned teacher, or turn messages into prompt and completion."
        raise Refusal(f"endpoints.{stage.of}", "messages, and a tokenizer without a chat template", "a teacher that has one", do)
    longest = min(stage.reader.longest_tokens, LONGEST_CONVERSATION * job.run.data.max_length_tokens)
    settings = job.run.data.model_copy(update={"max_length_tokens": longest})
    turns = Turns.of(data, prepare(settings, theirs, settings.split_seed, cache))
    return replace(stage, reader=replace(stage.reader, turns=turns))


def _longer(stage: Stage, found: dict[str, Alignment]) -> Stage:
    if not isinstance(stage, Align) or not isinstance(stage.reader, ForeignReader):
        return stage
    return replace(stage, reader=replace(stage.reader, expansion=found[stage.of].expansion))


def _refuse_noise(found: Alignment) -> None:
    if found.aligned >= LEAST_ALIGNED:
        return
    raise Refusal(
        f"tokenizer of endpoint {found.endpoint!r}",
        f"{found.aligned:.0%} of the bytes to learn in spans that it reads as the student does",
        f"at least {LEAST_ALIGNED:.0%}, or the teacher would speak about another text",
        "Choose a teacher whose tokenizer has a token for every byte and does not change the text, or learn from the text that it writes.",
    )


def _measure(stage: Align, columns: Columns) -> Alignment:
    assert isinstance(stage.reader, ForeignReader), "the stage was told"
    reading = stage.reader.read(columns)
    mask = columns["loss_mask"]
    found = taught_spans(reading, mask)
    sizes = np.diff(reading.ours, prepend=0)
    inside = found.ours != NONE
    learnt = max(1, int(sizes[mask != 0].sum()))
    return Alignment(
        endpoint=stage.of,
        rows=len(columns["lengths"]),
        aligned=int(sizes[inside].sum()) / learnt,
        one_to_one=int(sizes[inside & _alone(found)].sum()) / learnt,
        ours=np.count_nonzero(inside) / max(1, found.count),
        theirs=np.count_nonzero(found.theirs != NONE) / max(1, found.count),
        shared=sum(i != NONE for i in shared_ids(stage.reader)),
        expansion=_expansion(reading, columns),
    )


def _alone(found: Spans) -> NDArray[np.bool_]:
    """Whether each of the student's tokens is in a span of one token on either side."""
    ours, theirs = (np.bincount(side[side != NONE], minlength=found.count + 1) for side in (found.ours, found.theirs))
    alone: NDArray[np.bool_] = ((ours == 1) & (theirs == 1))[np.where(found.ours == NONE, found.count, found.ours)]
    return alone


def _expansion(reading: Reading, columns: Columns) -> float:
    return float((reading.lengths / np.maximum(1, columns["lengths"])).max(initial=1.0))
