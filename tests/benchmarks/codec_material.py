"""What codecs are measured on: a trained teacher's distributions over 32,000 ids, and fitted ones over 151,936.

Kept of every token are the `DEEPEST` most likely ids and a few sums over the whole vocabulary; from these, KL and gradient
errors of any top-k codec follow exactly (`tests.benchmarks.codec_errors`), without a `(N, V)` array.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.benchmarks.codec_teacher import Trained, train
from tests.benchmarks.figure import Settings

DEEPEST = 512
"""Ids of which log-probabilities are kept: more than any measured codec stores."""
TOKENS = 4_096
FITTED_VOCABULARY, FITTED_ENTROPY, FITTED_TOP20 = 151_936, (0.8, 1.5), 0.97


@dataclass(frozen=True)
class Distributions:
    """A teacher's p and a student's q of N tokens over V ids, both at temperature 1."""

    name: str
    vocabulary: int
    ids: NDArray[np.int32]
    """`(N, K)` the teacher's most likely, falling."""
    logprobs: NDArray[np.float32]
    """`(N, K)` log p of them."""
    student: NDArray[np.float32]
    """`(N, K)` log q of them."""
    beyond: dict[str, NDArray[np.float64]]
    """Sums over the ids that are not among the K, `(N,)` each: `p`, `q`, `plogp`, `pp`, `pq`, `qq`."""
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ids)


def reduced(name: str, pieces: Iterator[tuple[Tensor, Tensor]], about: dict[str, Any]) -> Distributions:
    """From `(n, V)` log p and log q, a piece at a time; they are changed in place."""
    kept: dict[str, list[NDArray[Any]]] = {}
    vocabulary = 0
    for log_p, log_q in pieces:
        vocabulary = log_p.shape[-1]
        ids = _largest(log_p, min(DEEPEST, vocabulary))
        found = {"ids": ids.int(), "logprobs": log_p.gather(-1, ids), "student": log_q.gather(-1, ids)}
        for key, value in (found | _beyond(log_p.scatter_(-1, ids, -1e4), log_q.scatter_(-1, ids, -1e4))).items():
            kept.setdefault(key, []).append(value.numpy())
    whole = {key: np.concatenate(parts) for key, parts in kept.items()}
    logprobs = whole["logprobs"].astype(np.float64)
    entropy = -(np.exp(logprobs) * logprobs).sum(1) - whole["plogp"]
    about = {**about, "tokens": len(logprobs), "vocabulary": vocabulary, "mean_entropy": float(entropy.mean())}
    about["top20_mass"] = float(np.exp(logprobs[:, :20]).sum(1).mean())
    beyond = {key: whole[key].astype(np.float64) for key in ("p", "q", "plogp", "pp", "pq", "qq")}
    return Distributions(name, vocabulary, whole["ids"], whole["logprobs"], whole["student"], beyond, about)


def _beyond(log_p: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    p, q = log_p.exp(), log_q.exp_()
    sums = {"p": p, "q": q, "plogp": p * log_p, "pp": p * p, "pq": p * q, "qq": q * q}
    return {name: terms.sum(-1) for name, terms in sums.items()}


def _largest(values: Tensor, count: int) -> Tensor:
    """Places of the largest of every row, falling, `(n, count)` int64."""
    places = torch.from_numpy(np.argpartition(values.numpy(), values.shape[-1] - count, axis=-1)[:, values.shape[-1] - count :])
    return places.gather(-1, values.gather(-1, places).sort(dim=-1, descending=True, stable=True).indices)


def materials(settings: Settings) -> tuple[Distributions, Distributions]:
    """Both, made once per folder."""
    sources = {
        "trained": lambda: trained(settings.folder / "models", settings.data, settings.smoke),
        "fitted": lambda: fitted(settings.smoke),
    }
    found = {}
    for name, make in sources.items():
        path = settings.folder / f"{name}.npz"
        if not path.exists():
            _save(path, make())
        found[name] = _load(path, name)
    return found["trained"], found["fitted"]


def _save(path: Path, of: Distributions) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sums = {f"beyond/{name}": column for name, column in of.beyond.items()}
    about = np.frombuffer(json.dumps(of.about).encode(), np.uint8)
    np.savez(path, ids=of.ids, logprobs=of.logprobs, student=of.student, about=about, **sums)  # type: ignore[arg-type]


def _load(path: Path, name: str) -> Distributions:
    with np.load(path) as file:
        about = json.loads(file["about"].tobytes())
        beyond = {key.partition("/")[2]: file[key] for key in file.files if key.startswith("beyond/")}
        return Distributions(name, about["vocabulary"], file["ids"], file["logprobs"], file["student"], beyond, about)


def trained(folder: Path, data: Path | None, smoke: bool) -> Distributions:
    """What a teacher says about held-out text, beside a smaller student; both are trained once per `folder`."""
    models = train(folder, data, smoke)
    pieces = ((s.hidden @ s.head.T, s.student) for s in stated(models, smoke))
    return reduced("trained", ((logits.log_softmax(-1), log_q) for logits, log_q in pieces), models.about)


@dataclass(frozen=True)
class Stated:
    """What the trained teacher says about n tokens, as its output head reads it, and the student's log q."""

    hidden: Tensor
    """`(n, D)` float32."""
    head: Tensor
    """`(V, D)`."""
    student: Tensor
    """`(n, V)`."""


def stated(models: Trained, smoke: bool) -> Iterator[Stated]:
    """A row of held-out text at a time."""
    teacher, student = (AutoModelForCausalLM.from_pretrained(models.folder / name).eval() for name in ("teacher", "student"))
    for row in models.held_out[: -(-(64 if smoke else TOKENS) // models.held_out.shape[1])]:
        with torch.no_grad():
            hidden = teacher.model(input_ids=row[None]).last_hidden_state[0].float()
            log_q = student(input_ids=row[None]).logits[0].float().log_softmax(-1)
            yield Stated(hidden, teacher.lm_head.weight.detach().float(), log_q)


def fitted(smoke: bool, seed: int = 0) -> Distributions:
    """Power laws of rank with noise, of uneven exponents, so that mean entropy and top-20 mass are those of large models.

    Ids are in no order: no codec gains by frequent ids being small ones. The student's logits are the teacher's with noise.
    """
    scale, pieces = fitted_pieces(smoke, seed)
    return reduced("fitted", pieces, {"exponent_scale": scale})


def fitted_pieces(smoke: bool, seed: int = 0) -> tuple[float, Iterator[tuple[Tensor, Tensor]]]:
    """The scale of the exponents, and `(64, V)` log p and log q at a time."""
    vocabulary, tokens = (2_000, 64) if smoke else (FITTED_VOCABULARY, TOKENS)
    generator = torch.Generator().manual_seed(seed)
    scale = _fit(vocabulary, generator)

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(tokens // 64):
            order = torch.randperm(vocabulary, generator=generator)
            logits = _logits(64, vocabulary, scale, generator)[:, order]
            student = 0.9 * logits + 0.7 * torch.randn(logits.shape, generator=generator)
            yield logits.log_softmax(-1), student.log_softmax(-1)

    return scale, pieces()


def _logits(tokens: int, vocabulary: int, scale: float, generator: torch.Generator) -> Tensor:
    """`(n, V)`: `-a log(1 + rank)` with an exponent `a` of each token's own around `scale`, and noise on every id."""
    exponents = scale * (0.45 * torch.randn((tokens, 1), generator=generator)).exp().clamp_min(0.75)
    rank = torch.arange(1, vocabulary + 1, dtype=torch.float32).log()
    return -exponents * rank + torch.randn((tokens, vocabulary), generator=generator)


def _fit(vocabulary: int, generator: torch.Generator) -> float:
    """The scale whose mean entropy is in the middle of `FITTED_ENTROPY`."""
    low, high, state = 1.0, 6.0, generator.get_state()
    for _ in range(12):
        middle = (low + high) / 2
        generator.set_state(state)
        log_p = _logits(256, vocabulary, middle, generator).log_softmax(-1)
        entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
        low, high = (middle, high) if entropy > sum(FITTED_ENTROPY) / 2 else (low, middle)
    return middle
