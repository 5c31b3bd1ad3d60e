"""What a step's own texts were like: enough to see a student that falls silent, rambles, repeats itself or loses its doubts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from strategies.core import Columns
from strategies.stages.judge import PASSING

WRITTEN = ("rows", "texts", "tokens", "finished", "surprise", "repeated", "places", "left_out", "seconds", "ages", "recalled")
"""What is summed over the bundles of a step in which the student writes."""
JUDGED = ("judged", "reward", "passed", "judge_failed", "unjudgeable", "judge_seconds")
"""The same of one in which a verifier judges."""
NGRAM = 4
"""Tokens of the pieces whose repetition within a text is counted."""


def rollout_sums(bundle: Columns) -> list[float]:
    """`WRITTEN` of a bundle, and `JUDGED` where there is a verifier; nothing of one in which nobody writes."""
    return [*_written(bundle), *_judged(bundle)] if "written" in bundle else []


def _judged(bundle: Columns) -> list[float]:
    if "judged" not in bundle:
        return []
    rewards = bundle["reward"][bundle["judged"].astype(bool)]
    counts = (bundle[f"judge/{name}"][0] for name in ("failed", "unjudgeable", "seconds"))
    return [float(len(rewards)), float(rewards.sum(dtype=np.float64)), float((rewards >= PASSING).sum()), *map(float, counts)]


def _written(bundle: Columns) -> list[float]:
    written = bundle["written"].astype(bool)
    lengths, mask = bundle["lengths"].astype(np.int64), bundle["loss_mask"].astype(bool)
    mine = np.repeat(written, lengths)[mask]
    texts = [row[loss] for row, loss, w in zip(_rows(bundle["tokens"], lengths), _rows(mask, lengths), written, strict=True) if w]
    pieces = [np.lib.stride_tricks.sliding_window_view(t, NGRAM) for t in texts if len(t) >= NGRAM]
    places = sum(len(p) for p in pieces)
    return [
        float(len(written)),
        float(written.sum()),
        float(mine.sum()),
        float(bundle["finished"][written].sum()),
        -float(np.nansum(bundle["behaviour"][mine], dtype=np.float64)),  # a server may not tell
        float(places - sum(len(np.unique(p, axis=0)) for p in pieces)),
        float(places),
        float(bundle["rollout/left_out"][0]),
        float(bundle["rollout/seconds"][0]),
        float(_ages(bundle).sum()),
        float(np.count_nonzero(written & (bundle["written_by"] != bundle.get("policy_version", bundle["written_by"])))),
    ]


def oldest_steps(bundle: Columns) -> float:
    """Age of the oldest text of a bundle; 0 without any."""
    return float(_ages(bundle).max(initial=0)) if "written" in bundle else 0.0


def _ages(bundle: Columns) -> NDArray[np.int64]:
    """Steps that each text's writer was behind, `(n,)`: 0 for the student that the step begins with."""
    return np.asarray(bundle["step"][0] - 1 - bundle["written_by"][bundle["written"].astype(bool)], dtype=np.int64)


def rollout_metrics(sums: Sequence[float], oldest: float) -> dict[str, float]:
    """Of a step over all ranks: `rollout/share` of the rows that the student wrote, `rollout/recalled` of those that it wrote for an
    earlier step, mean `age_steps` of the writers and that of the `oldest_steps`, mean `rollout/length` in tokens, share of
    `rollout/finished` texts, `rollout/surprise`, the mean -log q of written tokens at temperature 1, which estimates the student's
    entropy in nats, share of `rollout/repeated` four-token pieces, prompts `rollout/left_out`, and `write_seconds`.

    With a verifier also the mean `rollout/reward` of judged texts and the share that `rollout/passed`, texts without a verdict because
    it gave way (`rollout/judge_failed`) or because their rows have no answer (`rollout/unjudgeable`), and `judge_seconds`."""
    if not sums:
        return {}
    of = dict(zip((*WRITTEN, *JUDGED), sums, strict=False))
    texts, tokens = max(1.0, of["texts"]), max(1.0, of["tokens"])
    return {
        "rollout/share": of["texts"] / max(1.0, of["rows"]),
        "rollout/length": of["tokens"] / texts,
        "rollout/finished": of["finished"] / texts,
        "rollout/surprise": of["surprise"] / tokens,
        "rollout/repeated": of["repeated"] / max(1.0, of["places"]),
        "rollout/left_out": of["left_out"],
        "write_seconds": of["seconds"],
        "rollout/recalled": of["recalled"] / max(1.0, of["rows"]),
        "oldest_steps": oldest,
        **({"age_steps": of["ages"] / of["texts"]} if of["texts"] else {}),
        **(_verdicts(of) if "judged" in of else {}),
    }


def _verdicts(of: Mapping[str, float]) -> dict[str, float]:
    judged = max(1.0, of["judged"])
    return {
        "rollout/reward": of["reward"] / judged,
        "rollout/passed": of["passed"] / judged,
        "rollout/judge_failed": of["judge_failed"],
        "rollout/unjudgeable": of["unjudgeable"],
        "judge_seconds": of["judge_seconds"],
    }


def _rows(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []
