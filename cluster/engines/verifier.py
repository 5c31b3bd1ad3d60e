"""An engine that judges: whether what was written in a row has the answer of the row's own completion. No model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cluster.config import VerifierEndpoint
from cluster.engines import Columns, Request
from cluster.verifiers import Judged, VerifierFailed
from cluster.verifiers.process import JudgeProcess
from cluster.verifiers.sandbox import run_tests


class VerifierEngine:
    """Judges rows one after another, each in at most the endpoint's time: tests in a sandbox, everything else in a process that is
    kept. A verifier that throws, hangs or dies costs its row the verdict and nothing else."""

    def __init__(self, config: VerifierEndpoint):
        """`ValueError` when nobody named a tokenizer, or the function cannot be imported."""
        if config.tokenizer is None:
            raise ValueError(f"tokenizer of the {config.kind} verifier: got none; expected a folder or hub name, such as the student's")
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(config.tokenizer)
        self._seconds = config.timeout_seconds
        settings = {"kind": config.kind, "pattern": config.pattern, "function": config.function}
        self._process = None if config.kind == "tests" else JudgeProcess(settings, config.timeout_seconds)

    def score(self, columns: Columns, request: Request) -> NoReturn:
        """`ValueError`: it knows no probabilities."""
        raise ValueError(f"{request.kind}: got a verifier, which only judges; expected an endpoint that scores")

    def judge(self, columns: Columns) -> Columns:
        """Verdicts on the loss tokens of R rows. Besides the columns of a bundle: `reference` (Q,) int32 ids of the rows' own
        completions, `reference_lengths` (R,) int32; no length where a row has none.

        `reward` (R,) float32 from 0 to 1; `judged` (R,) uint8: 1 where a verdict was reached, 0 where not, with reward 0. Of the
        latter, `failed` (1,) int64 counts those whose verifier threw, hung or died, and `unjudgeable` (1,) int64 those whose
        reference has no answer. For tests, code that hangs or dies is wrong, which is a verdict. Special tokens are not read.
        `ValueError` when the bundle is malformed.
        """
        found = [self._judged(text, reference) for text, reference in zip(*self._texts(columns), strict=True)]
        rewards = [None if verdict is None else verdict.reward for verdict in found]
        failed = sum(verdict is None for verdict in found)
        return {
            "reward": np.asarray([reward or 0.0 for reward in rewards], dtype=np.float32),
            "judged": np.asarray([reward is not None for reward in rewards], dtype=np.uint8),
            "failed": np.asarray([failed], dtype=np.int64),
            "unjudgeable": np.asarray([rewards.count(None) - failed], dtype=np.int64),
        }

    def _texts(self, columns: Columns) -> tuple[list[str], list[str]]:
        """What was written in each row, and its reference."""
        lengths, written = columns["lengths"], columns["loss_mask"].astype(bool)
        if len(columns["reference_lengths"]) != len(lengths) or len(written) != len(columns["tokens"]):
            raise ValueError(
                f"a bundle of {len(lengths)} rows and {len(columns['tokens'])} tokens: got {len(columns['reference_lengths'])} references "
                f"and {len(written)} mask values"
            )
        rows = zip(_cut(columns["tokens"], lengths, "tokens"), _cut(written, lengths, "loss_mask"), strict=True)
        references = _cut(columns["reference"], columns["reference_lengths"], "reference")
        return [self._decoded(tokens[mask]) for tokens, mask in rows], [self._decoded(tokens) for tokens in references]

    def _decoded(self, tokens: NDArray[np.generic]) -> str:
        return str(self._tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    def _judged(self, text: str, reference: str) -> Judged | None:
        """None when the verifier failed."""
        if not reference.strip():
            return Judged(None, "no reference")
        try:
            return self._process.judge(text, reference) if self._process else run_tests(text, reference, self._seconds)
        except VerifierFailed:
            return None


def _cut(values: NDArray[np.generic], lengths: NDArray[np.generic], name: str) -> Iterator[NDArray[np.generic]]:
    """The part of each row. `ValueError` when the lengths do not add up."""
    ends = np.cumsum(lengths.astype(np.int64))
    total = int(ends[-1]) if len(ends) else 0
    if total != len(values):
        raise ValueError(f"{name}: got {len(values)} values; expected the {total} of the rows' lengths")
    return iter(np.split(values, ends[:-1])) if len(ends) else iter(())
