"""Saved models measured by what they write: whether their answers are right, and how far they are from a teacher on their own text.

Prompts are those of the rows, and a row's own completion is the reference that an answer is judged by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from cluster.config import VerifierEndpoint
from cluster.endpoints import make_engine
from cluster.engines.slots import has_slots
from cluster.engines.transformers_write import write
from orchestrator.authored import stop_tokens
from orchestrator.comparable import check_models, positions_of, tokenizer_of, tokenizer_place
from orchestrator.compare import Measuring, Readable, check_rows, load_network, measure
from orchestrator.errors import Refusal
from strategies.core import Author, Columns, Sampling, Verifier
from strategies.stages.judge import PASSING, Reward
from strategies.stages.rollout import LONGEST_ROW, Rollout

JUDGE = "judge"


@dataclass(frozen=True)
class Writing:
    """How models write, and who judges."""

    judge: VerifierEndpoint | None = None
    """None: texts are only counted."""
    samples: int = 1
    """Texts for each prompt."""
    temperature: float = 0.0
    """0 writes the likeliest token each time."""
    max_new_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class WrittenScores:
    """One model on the prompts. Texts without a verdict are in no mean; None where nothing was judged, or there is no teacher."""

    model: str
    prompts: int
    """That were answered."""
    left_out: int
    """Prompts as long as the model's context, or its longest row."""
    texts: int
    tokens: float
    """Mean length of a text."""
    finished: float
    """Share of the texts that ended before `max_new_tokens`."""
    accuracy: float | None
    """Mean over prompts of the share of right texts: those with a reward of 0.5 or more."""
    accuracy_error: float | None
    """Its standard error over prompts."""
    pass_at_k: float | None
    """Share of the prompts with at least one right text among its `samples`."""
    unjudgeable: int
    """Texts whose row has no answer to compare with."""
    failed: int
    """Texts whose verifier threw, hung or died."""
    own_tokens: int
    """Tokens of the text that the following is measured on: the model's own, drawn at temperature 1 from all tokens."""
    own_forward_kl: float | None
    """KL(teacher || model), nats per token of that text, over the whole usable vocabulary."""
    own_reverse_kl: float | None
    """KL(model || teacher), likewise."""
    own_agreement: float | None
    """Share of its tokens at which both prefer the same one."""


def evaluate_written(
    models: Sequence[str],
    teacher: str | None,
    rows: Readable,
    indices: NDArray[np.int64],
    writing: Writing | None = None,
    measuring: Measuring | None = None,
) -> list[WrittenScores]:
    """Scores of `models` in their order, then of the teacher, on the prompts of the rows at `indices`.

    Names are as for `evaluate_models`, and so is what is refused before any model loads; besides texts that leave no room for a
    prompt, and a judge that cannot be made. One model is held at a time, beside the teacher.
    """
    how, asked = measuring or Measuring(), writing or Writing()
    names = [*models, *([teacher] if teacher else [])]
    usable = check_models(names, how.trust_remote_code)
    check_rows(names, rows, indices, usable, how)
    longest = min([LONGEST_ROW, *(room for name in names if (room := positions_of(name, how.trust_remote_code)))])
    _check(asked, longest)
    judge = judge_of(asked.judge, tokenizer_place(names[0]))
    stop = stop_tokens(tokenizer_of(names[0], how.trust_remote_code))
    guide = load_network(teacher, how) if teacher else None
    found = []
    for number, name in enumerate(names):
        is_teacher = teacher is not None and number == len(models)
        model = guide if is_teacher and guide is not None else load_network(name, how)
        author = ModelAuthor(model, usable, how.forward_tokens)

        def ask(sampling: Sampling, author: ModelAuthor = author) -> Columns:
            return written(author, rows, indices, replace(sampling, stop=stop), longest, how.rows_at_once)

        texts = ask(Sampling(asked.samples, asked.temperature, max_new_tokens=asked.max_new_tokens, seed=asked.seed))
        scores = scored(name, judged(texts, judge), asked.judge is not None)
        if guide is not None and not is_teacher:
            own = texts if asked.temperature == 1 else ask(Sampling(1, 1.0, max_new_tokens=asked.max_new_tokens, seed=asked.seed))
            scores = _beside(scores, (name, model), (str(teacher), guide), Bundle(own), usable, how)
        found.append(scores)
    return found


def judge_of(config: VerifierEndpoint | None, tokenizer: str) -> Verifier | None:
    """Who judges, with `tokenizer` unless the settings name one; `Refusal` when its function cannot be imported."""
    if config is None:
        return None
    try:
        engine = make_engine(config.with_tokenizer(tokenizer))
    except ValueError as error:
        raise Refusal(f"verifier {config.kind!r}", str(error), "one that can be made here", "Mend it, or name another.") from error
    assert isinstance(engine, Verifier)
    return engine


def written(author: Author, rows: Readable, indices: NDArray[np.int64], sampling: Sampling, longest: int, rows_at_once: int) -> Columns:
    """What `author` writes after the prompts of the rows at `indices`, as `strategies.stages.rollout.Rollout` lays it out: rows whose
    loss tokens are the text, beside `row_id`, `sample`, `finished`, and the rows' own completions as `reference`.

    `rollout/left_out` (1,) counts prompts that leave no room below `longest` tokens.
    """
    stage = Rollout(sampling, longest_tokens=longest)
    endpoint: Any = author  # a stage's endpoint scores; that of this one only writes
    parts = []
    for start in range(0, len(indices), rows_at_once):
        columns = rows.read(indices[start : start + rows_at_once])
        parts.append(stage({**columns, "step": np.ones(1, np.int32), "steps": np.ones(1, np.int32)}, endpoint))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name not in {"step", "steps"}}
    return {**joined, "rollout/left_out": joined["rollout/left_out"].sum(keepdims=True)}


def judged(texts: Columns, judge: Verifier | None) -> Columns:
    """Texts with `reward` and `judged` of each; as they are without a judge."""
    return texts if judge is None else Reward(JUDGE)(texts, judge)


def scored(model: str, texts: Columns, is_judged: bool) -> WrittenScores:
    """The scores of texts, of `is_judged` ones with their verdicts. `Refusal` when there is no text."""
    count = len(texts["lengths"])
    if not count:
        do = "Give shorter prompts or a smaller --max-new-tokens."
        raise Refusal("rows to evaluate on", "no prompt that leaves room for an answer", "at least one", do)
    right = _right(texts) if is_judged else []
    shares = np.asarray([part.mean() for part in right])
    return WrittenScores(
        model=model,
        prompts=len(np.unique(texts["row_id"])),
        left_out=int(texts["rollout/left_out"].sum()),
        texts=count,
        tokens=float(texts["loss_mask"].astype(np.int64).sum() / count),
        finished=float(texts["finished"].mean()),
        accuracy=float(shares.mean()) if len(shares) else None,
        accuracy_error=float(shares.std(ddof=1) / math.sqrt(len(shares))) if len(shares) > 1 else None,
        pass_at_k=float(np.mean([part.any() for part in right])) if len(shares) else None,
        unjudgeable=int(texts["judge/unjudgeable"].sum()) if is_judged else 0,
        failed=int(texts["judge/failed"].sum()) if is_judged else 0,
        own_tokens=0,
        own_forward_kl=None,
        own_reverse_kl=None,
        own_agreement=None,
    )


def _right(texts: Columns) -> list[NDArray[np.bool_]]:
    """Of every prompt with a verdict, whether each of its judged texts is right."""
    has_verdict = texts["judged"].astype(bool)
    right, prompt = texts["reward"][has_verdict] >= PASSING, texts["row_id"][has_verdict]
    return [right[prompt == number] for number in np.unique(prompt)]


def _beside(
    scores: WrittenScores,
    student: tuple[str, PreTrainedModel],
    teacher: tuple[str, PreTrainedModel],
    own: Bundle,
    usable: int,
    how: Measuring,
) -> WrittenScores:
    """The scores with how far the student is from the teacher on its `own` text."""
    found = measure([student, teacher], True, own, np.arange(len(own)), usable, how)[0]
    return replace(
        scores,
        own_tokens=found.tokens,
        own_forward_kl=found.forward_kl,
        own_reverse_kl=found.reverse_kl,
        own_agreement=found.top1_agreement,
    )


def _check(writing: Writing, longest: int) -> None:
    if writing.samples > 1 and writing.temperature == 0:
        do = "Add --temperature 1, or leave --samples out."
        raise Refusal("--samples", f"{writing.samples} of the likeliest text", "a temperature above 0, at which they differ", do)
    if writing.max_new_tokens >= longest:
        got, expected = f"{writing.max_new_tokens}, with {longest} positions of the models", "room for prompts too"
        raise Refusal("--max-new-tokens", got, expected, f"Set it below {longest}, by the length of a prompt.")


@dataclass(frozen=True)
class Bundle:
    """Rows that lie in memory."""

    columns: Columns

    def __len__(self) -> int:
        return len(self.columns["lengths"])

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.columns["lengths"].astype(np.int64))

    def read(self, indices: NDArray[np.int64]) -> Columns:
        """See `orchestrator.rows.Rows.read`."""
        lengths = self.columns["lengths"][indices]
        spans = [slice(int(end - size), int(end)) for end, size in zip(self._ends[indices], lengths, strict=True)]
        flat = {name: np.concatenate([self.columns[name][s] for s in spans]) for name in ("tokens", "loss_mask")}
        return {**flat, "lengths": lengths, "row_id": self.columns["row_id"][indices]}


@dataclass(frozen=True)
class ModelAuthor:
    """A loaded model as an endpoint that writes."""

    model: PreTrainedModel
    usable: int
    forward_tokens: int

    @cached_property
    def _in_slots(self) -> bool:
        return has_slots(self.model)

    def write(self, columns: Columns, sampling: Sampling) -> Columns:
        """See `cluster.engines.Writer.write`."""
        return write(self.model, columns, sampling, self.usable, self.forward_tokens, self._in_slots)
