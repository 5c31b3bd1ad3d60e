"""Bytes and errors of stored hidden states and stored draws, on the teachers of the top-k codecs.

Hidden states are the trained teacher's. KL is of the p that its head makes of them to the p of the decoded ones, over the whole
vocabulary; the gradient is that of forward KL by the student's logits, `q - p`. Draws come from both teachers, and their errors are
the codec's alone: against the draws as they were. The gradient is again that of forward KL, which the draws estimate; how far off
the estimate is from `q - p` without any codec is told beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.answers import draw
from cluster.codecs import Exact, Packed, codec_for
from strategies.core import ScoreRequest
from tests.benchmarks.codec_errors import Errors
from tests.benchmarks.codec_material import Stated, fitted_pieces, stated
from tests.benchmarks.codec_teacher import train
from tests.benchmarks.figure import Settings

DRAWS = 64
EXPONENTS = (1.0, 0.5)
"""Of the proposal: 1 draws from p with equal weights, 0.5 reaches for the tail and weighs."""
FITTED_PIECES = 16
"""Of 64 tokens each: over 151,936 ids the arithmetic on whole rows takes its time."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class States:
    """Hidden states in one codec."""

    codec: str
    bytes_per_token: int
    kl: float
    gradient: float


@dataclass(frozen=True)
class Draws:
    """Draws in the packed codec."""

    material: str
    exponent: float
    bytes_per_token: int
    largest: float
    """Most that a log-probability is off, nats."""
    mean: float
    gradient: float
    """Against the same draws unquantised, relative."""
    drawing: float
    """Of the unquantised draws against the whole distribution, relative."""


def others(settings: Settings) -> dict[str, Any]:
    """The rows of both kinds, printed and by name."""
    models = train(settings.folder / "models", settings.data, settings.smoke)
    pieces = list(stated(models, settings.smoke))
    hidden = [states(name, pieces) for name in ("exact", "bfloat16", "packed")]
    drawn = [draws("trained", (((s.hidden @ s.head.T).log_softmax(-1), s.student) for s in pieces), exponent) for exponent in EXPONENTS]
    drawn += [draws("fitted", islice(fitted_pieces(settings.smoke)[1], FITTED_PIECES), exponent) for exponent in EXPONENTS]
    _show(hidden, drawn)
    return {"hidden": [asdict(row) for row in hidden], "sampled": [asdict(row) for row in drawn]}


def states(codec: str, pieces: Sequence[Stated]) -> States:
    """Of all pieces together. `bfloat16` is what a teacher in that dtype gives, stored as it is."""
    kl = np.zeros(0)
    wrong = right = 0.0
    size = 0
    for piece in pieces:
        back, size = _stored(codec, piece.hidden)
        log_p, log_hat = ((h @ piece.head.T).double().log_softmax(-1).numpy() for h in (piece.hidden, back))
        found = squares(log_p, log_hat, piece.student.double().numpy())
        kl, wrong, right = np.append(kl, found[0]), wrong + found[1], right + found[2]
    mean = Errors(float(kl.mean()), float(np.sqrt(wrong / right)))
    return States(codec, size, mean.kl, mean.gradient)


def squares(log_p: Floats, log_hat: Floats, log_q: Floats) -> tuple[Floats, float, float]:
    """KL(p || p_hat) of every token of `(n, V)`, and the squared norms of `p_hat - p` and of `q - p` over all of them."""
    p = np.exp(log_p)
    return (p * (log_p - log_hat)).sum(1), float(((np.exp(log_hat) - p) ** 2).sum()), float(((np.exp(log_q) - p) ** 2).sum())


def _stored(codec: str, hidden: Tensor) -> tuple[Tensor, int]:
    """`(n, D)` states as they come back, and bytes of a token."""
    if codec == "bfloat16":
        return hidden.bfloat16().float(), 2 * hidden.shape[1]
    way = codec_for(Packed() if codec == "packed" else Exact(), ScoreRequest("hidden"), 0)
    arrays = way.encode({"hidden": hidden.numpy().ravel()}, len(hidden))
    back = torch.from_numpy(way.decode(arrays)["hidden"].reshape(hidden.shape).astype(np.float32))
    return back, sum(a.nbytes for a in arrays.values()) // len(hidden)


def draws(material: str, pieces: Iterable[tuple[Tensor, Tensor]], exponent: float) -> Draws:
    """Of all `(n, V)` log p and log q together."""
    size = 0
    off: list[Floats] = []
    sums = np.zeros(4)
    for at, (log_p, log_q) in enumerate(pieces):
        request = ScoreRequest("sampled", draws=DRAWS, exponent=exponent)
        keys = torch.arange(at * len(log_p), (at + 1) * len(log_p))
        given = {name: values.numpy() for name, values in draw(log_p, keys, request).items()}
        codec = codec_for(Packed(), request, log_p.shape[1])
        arrays = codec.encode({**{n: a.ravel() for n, a in given.items()}, "logprob": given["logprobs"][:, 0]}, len(log_p))
        back = {name: values.reshape(len(log_p), -1) for name, values in codec.decode(arrays).items()}
        order = given["ids"].argsort(1, kind="stable")
        was = {name: np.take_along_axis(values, order, 1) for name, values in given.items()}
        if not np.array_equal(was["ids"], back["ids"]):
            raise ValueError("decoded ids are not the drawn ones")
        size = sum(a.nbytes for a in arrays.values()) // len(log_p)
        off.append(np.abs(was["logprobs"].astype(np.float64) - back["logprobs"]))
        sums += gradients(log_p, log_q, torch.from_numpy(was["ids"]).long(), was["weights"], back["weights"])
    whole = np.concatenate(off)
    relative = np.sqrt([sums[0] / sums[1], sums[2] / sums[3]])
    return Draws(material, exponent, size, float(whole.max()), float(whole.mean()), float(relative[0]), float(relative[1]))


def gradients(log_p: Tensor, log_q: Tensor, ids: Tensor, was: NDArray[np.generic], now: NDArray[np.generic]) -> Floats:
    """Squared norms of gradients by the student's logits, `sum_j w_j (q - e_j)` of draws j: of the difference that weights `now` make
    and of that of weights `was`; and of what `was` is off from `q - p`, and of that."""
    q, p = log_q.double().exp(), log_p.double().exp()
    before, after = (_estimate(q, ids, torch.from_numpy(w.astype(np.float64))) for w in (was, now))
    return np.asarray([float((g**2).sum()) for g in (after - before, before, before - (q - p), q - p)])


def _estimate(q: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return (q * weights.sum(1, keepdim=True)).scatter_add_(1, ids, -weights)


def _show(hidden: Sequence[States], drawn: Sequence[Draws]) -> None:
    print("\n".join(_lines(hidden, drawn)), flush=True)


def _lines(hidden: Sequence[States], drawn: Sequence[Draws]) -> Iterator[str]:
    yield f"\n{'hidden states, trained teacher':34} {'B/token':>8} {'KL error':>12} {'gradient error':>15}"
    yield from (f"{r.codec:34} {r.bytes_per_token:8} {r.kl:12.3e} {r.gradient:15.6f}" for r in hidden)
    yield f"\n{f'{DRAWS} draws, packed':34} {'B/token':>8} {'most off':>9} {'mean off':>9} {'gradient error':>15} {'of drawing':>11}"
    for r in drawn:
        name = f"{r.material}, from p^{r.exponent:g}"
        yield f"{name:34} {r.bytes_per_token:8} {r.largest:9.5f} {r.mean:9.5f} {r.gradient:15.6f} {r.drawing:11.4f}"
