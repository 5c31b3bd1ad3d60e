"""What a step's own texts were like: enough to see a student that falls silent, rambles, repeats itself or loses its doubts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from strategies.core import COUNT, Columns, Strategy
from strategies.domains import DOMAIN, domain_id
from strategies.stages.judge import PASSING, groups
from strategies.stages.lines import ATTEMPT
from strategies.stages.view import behind

NGRAM = 4
"""Tokens of the pieces whose repetition within a text is counted."""
FAILED = "rollout/failed/"
"""Before a domain: the share of its judged texts that failed."""
_MEANS = {
    "rollout/share": ("texts", "rows"),
    "rollout/recalled": ("recalled", "rows"),
    "rollout/length": ("tokens", "texts"),
    "rollout/finished": ("finished", "texts"),
    "rollout/surprise": ("surprise", "tokens"),
    "rollout/repeated": ("repeated", "places"),
    "rollout/kl_to_base": ("to_base", "tokens"),
    "rollout/judged": ("judged", "texts"),
    "rollout/reward": ("reward", "judged"),
    "rollout/passed": ("passed", "judged"),
    "rollout/equal_rewards": ("equal", "groups"),
    "age_steps": ("ages", "texts"),
}
_TOTALS = {
    "rollout/left_out": "left_out",
    "write_seconds": "seconds",
    "rollout/judge_failed": "judge_failed",
    "rollout/unjudgeable": "unjudgeable",
    "judge_seconds": "judge_seconds",
}


def as_written(bundle: Columns) -> Columns:
    """The bundle with the student's own texts, where stages have put others in their place."""
    return {**bundle, **{name.removeprefix(ATTEMPT): values for name, values in bundle.items() if name.startswith(ATTEMPT)}}


def rollout_sums(bundle: Columns, base: str | None = None, domains: Sequence[str] = ()) -> dict[str, float]:
    """What is summed over the bundles of a step, alike for all of a run; nothing of those in which nobody writes. `base` is the
    signal that has the base's `logprob`; verdicts are also counted of each of the `domains` of rows."""
    if "written" not in bundle:
        return {}
    written = bundle["written"].astype(bool)
    lengths, mask = bundle["lengths"].astype(np.int64), bundle["loss_mask"].astype(bool)
    mine = np.repeat(written, lengths)[mask]
    texts = [row[loss] for row, loss, w in zip(_rows(bundle["tokens"], lengths), _rows(mask, lengths), written, strict=True) if w]
    pieces = [np.lib.stride_tricks.sliding_window_view(t, NGRAM) for t in texts if len(t) >= NGRAM]
    places = sum(len(p) for p in pieces)
    surprise = -float(np.nansum(bundle["behaviour"][mine], dtype=np.float64))  # a server may not tell
    sums = {
        "rows": float(len(written)),
        "texts": float(written.sum()),
        "tokens": float(mine.sum()),
        "finished": float(bundle["finished"][written].sum()),
        "surprise": surprise,
        "repeated": float(places - sum(len(np.unique(p, axis=0)) for p in pieces)),
        "places": float(places),
        "left_out": float(bundle["rollout/left_out"][0]),
        "seconds": float(bundle["rollout/seconds"][0]),
        "ages": float(_ages(bundle).sum()),
        "recalled": float(np.count_nonzero(written & (bundle["written_by"] != bundle.get("policy_version", bundle["written_by"])))),
    }
    if base is not None:
        sums["to_base"] = -surprise - float(bundle[f"{base}/logprob"][mine].sum(dtype=np.float64))
    return sums | (_judged_sums(bundle, domains) if "judged" in bundle else {})


def fates(strategy: Strategy) -> tuple[str, ...]:
    """Names of the metrics that say what became of a step's rows: what stages count, and what was left out."""
    counted = {name.removeprefix(COUNT) for stage in strategy.stages for name in stage.adds if name.startswith(COUNT)}
    return ("rollout/left_out", *sorted(counted), *sorted({f"left_out/{stage.endpoint}" for stage in behind(strategy.stages)}))


def oldest_steps(bundle: Columns) -> float:
    """Age of the oldest text of a bundle; 0 without any."""
    return float(_ages(bundle).max(initial=0)) if "written" in bundle else 0.0


def _ages(bundle: Columns) -> NDArray[np.int64]:
    """Steps that each text's writer was behind, `(n,)`: 0 for the student that the step begins with."""
    return np.asarray(bundle["step"][0] - 1 - bundle["written_by"][bundle["written"].astype(bool)], dtype=np.int64)


def _judged_sums(bundle: Columns, domains: Sequence[str]) -> dict[str, float]:
    """Of the verdicts on texts."""
    judged = bundle["judged"].astype(bool) & bundle["written"].astype(bool)
    rewards = bundle["reward"][judged].astype(np.float64)
    several = [bundle["reward"][of] for _, of in groups(bundle) if len(of) > 1]
    of_domain = {d: judged & (bundle[DOMAIN] == domain_id(d)) for d in domains}
    failed = {d: np.count_nonzero(bundle["reward"][own] < PASSING) for d, own in of_domain.items()}
    return {
        "judged": float(judged.sum()),
        "reward": float(rewards.sum()),
        "passed": float(np.count_nonzero(rewards >= PASSING)),
        "judge_failed": float(bundle["judge/failed"][0]),
        "unjudgeable": float(bundle["judge/unjudgeable"][0]),
        "judge_seconds": float(bundle["judge/seconds"][0]),
        "groups": float(len(several)),
        "equal": float(sum(np.ptp(rewards) == 0 for rewards in several)),
        **{f"judged/{d}": float(own.sum()) for d, own in of_domain.items()},
        **{f"failed/{d}": float(count) for d, count in failed.items()},
    }


def rollout_metrics(sums: Mapping[str, float], oldest: float) -> dict[str, float]:
    """Of a step over all ranks: `rollout/share` of the rows that the student wrote, `rollout/recalled` of those that it wrote for an
    earlier step, mean `age_steps` of the writers and that of the `oldest_steps`, mean `rollout/length` in tokens, share of
    `rollout/finished` texts, `rollout/surprise`, the mean -log q of written tokens at temperature 1, which estimates the student's
    entropy in nats, share of `rollout/repeated` four-token pieces, prompts `rollout/left_out`, and `write_seconds`.

    With a base b: `rollout/kl_to_base`, the mean log q - log b of written tokens under the weights that wrote them. Of text drawn at
    temperature 1 from all tokens its expectation is the KL(q, b) of a token at the student's own prefixes (the estimator k1: unbiased,
    so that the value of a step may be below 0); of other text it is no KL.

    With verdicts: share of texts that were `rollout/judged`, of those the mean `rollout/reward` and the share that `rollout/passed`;
    texts without one because the verifier gave way (`rollout/judge_failed`) or lacked an answer (`rollout/unjudgeable`), share of
    `rollout/equal_rewards` among groups of several verdicts, which teach nothing by comparison, `judge_seconds`, and of each domain
    the share of its judged texts that `rollout/failed`.

    Means over nothing are left out.
    """
    if not sums:
        return {}
    found = {name: sums[of] / sums[by] for name, (of, by) in _MEANS.items() if of in sums and sums[by]}
    of_domain = [name.removeprefix("judged/") for name, count in sums.items() if name.startswith("judged/") and count]
    found |= {FAILED + d: sums[f"failed/{d}"] / sums[f"judged/{d}"] for d in of_domain}
    return found | {name: sums[of] for name, of in _TOTALS.items() if of in sums} | {"oldest_steps": oldest}


def _rows(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []
