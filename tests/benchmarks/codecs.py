"""Bytes a token against KL and gradient error of top-k codecs, ours and DistillKit's scheme, on the same distributions.

The distributions: `codec_material.py`. The errors: `codec_errors.py`. The peer: `codec_peer.py`. Bytes are counted as stored,
ours with 2 for the label's log-probability, which the peer does not keep. With `--folder`, a second call trains nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from cluster.codecs import Packed, codec_for
from strategies.core import ScoreRequest
from tests.benchmarks import BENCHMARKS
from tests.benchmarks.codec_errors import Errors, errors
from tests.benchmarks.codec_material import DEEPEST, Distributions, materials
from tests.benchmarks.codec_peer import BUDGET, RECOMMENDED, Peer, readings
from tests.benchmarks.figure import Figure, Settings, machine

SHOWN = (20, 32, 48, 64, 100, 128, 200, 256)
"""Ids a token in the table, beside the budgets."""
BUDGETS = (100, 300)


@dataclass(frozen=True)
class Row:
    """One codec at one k on one material."""

    codec: str
    k: int
    bytes_per_token: int
    kl: float
    gradient: float
    microseconds: tuple[float, float] = (0.0, 0.0)
    """CPU time to encode and to decode one token."""


def compare(name: str, settings: Settings, budget: int, peer: Peer) -> Figure:
    """Our KL error at most `budget` bytes over the peer's best reading of one setting, on the worse of both materials."""
    tables, ratios, gradients = {}, {}, {}
    for of in materials(settings):
        rows = list(table(of))
        show(of, rows)
        mine = packed(of, largest(of, budget))
        theirs = min((r for r in rows if r.codec.startswith("DistillKit") and r.k == min(peer.k, of.ids.shape[1])), key=lambda r: r.kl)
        ratios[of.name], gradients[of.name] = mine.kl / theirs.kl, mine.gradient / theirs.gradient
        tables[of.name] = {"about": of.about, "ours": asdict(mine), "theirs": asdict(theirs), "rows": [asdict(r) for r in rows]}
    return Figure(
        name=name,
        value=max(ratios.values()),
        unit="nats over nats",
        against=f"DistillKit's scheme from its description: k = {peer.k}, {peer.exact} exact, powers {peer.powers} and a root",
        target=BENCHMARKS[name].target,
        measured={**machine(), "smoke": settings.smoke, "ratios": ratios, "gradient_ratios": gradients, "materials": tables},
    )


def table(of: Distributions) -> Iterator[Row]:
    """Ours at round k and at the budgets, the unquantised top-k of the same, and the peer's settings."""
    ours = sorted({*(k for k in SHOWN if k <= of.ids.shape[1]), *(largest(of, budget) for budget in BUDGETS)})
    for k in ours:
        yield Row("exact (32 bits)", k, 8 * k + 4, **asdict(errors(of, of.ids[:, :k], of.logprobs[:, :k])))
        yield packed(of, k)
    for setting in (BUDGET, RECOMMENDED):
        for reading in readings(setting):
            k = reading.k
            found = errors(of, of.ids[:, :k], reading.round_trip(of.logprobs[:, :k]))
            label = f"DistillKit {str(reading.dtype)[6:]}, ranks from {reading.first}"
            yield Row(label, k, reading.bytes_per_token(of.vocabulary), **asdict(found))


def packed(of: Distributions, k: int) -> Row:
    """Our default codec, encoded and decoded."""
    codec = codec_for(Packed(), ScoreRequest("topk", top_k=k), of.vocabulary)
    answers = {"ids": of.ids[:, :k].ravel(), "logprobs": of.logprobs[:, :k].ravel(), "logprob": of.logprobs[:, 0]}
    marks = [time.process_time()]
    arrays = codec.encode(answers, len(of))
    marks.append(time.process_time())
    decoded = codec.decode(arrays)
    marks.append(time.process_time())
    found: Errors = errors(of, decoded["ids"].reshape(-1, k), decoded["logprobs"].reshape(-1, k))
    size = sum(a.nbytes for a in arrays.values()) // len(of)
    each = 1e6 / len(of)
    return Row("packed", k, size, found.kl, found.gradient, ((marks[1] - marks[0]) * each, (marks[2] - marks[1]) * each))


def largest(of: Distributions, budget: int) -> int:
    """The most ids that our default codec stores in `budget` bytes."""
    fitting = [k for k in range(1, min(DEEPEST, of.ids.shape[1]) + 1) if _size(of, k) <= budget]
    return max(fitting)


def _size(of: Distributions, k: int) -> int:
    return codec_for(Packed(), ScoreRequest("topk", top_k=k), of.vocabulary).bytes_per_token or 0


def show(of: Distributions, rows: list[Row]) -> None:
    """The table, sorted by bytes."""
    print(f"\n{of.name}: {of.about}")
    print(f"{'codec':34} {'k':>4} {'B/token':>8} {'KL error':>10} {'gradient error':>15} {'encode us':>10} {'decode us':>10}")
    for row in sorted(rows, key=lambda r: r.bytes_per_token):
        times = "".join(f" {t:10.1f}" if t else f" {'':10}" for t in row.microseconds)
        print(f"{row.codec:34} {row.k:4} {row.bytes_per_token:8} {row.kl:10.6f} {row.gradient:15.6f}{times}", flush=True)
