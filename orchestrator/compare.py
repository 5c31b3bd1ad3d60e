"""Saved models compared exactly on the same rows: cross-entropy, and against a teacher both KLs, agreement and mass.

One process and one device. Every distribution is over the usable vocabulary, the ids from 0 that all models predict, so that
padding of vocabularies enters nothing; a full `(tokens, vocabulary)` tensor never exists.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from cluster.answers import LOGITS_AT_ONCE
from cluster.causal_lm import backbone, compute_device, output_head
from cluster.config import Dtype
from orchestrator.comparable import check_models, positions_of
from orchestrator.errors import Refusal
from orchestrator.microbatch import MicroBatch, cut
from orchestrator.models import check_head
from orchestrator.reload import ADAPTER, load_saved, quiet_libraries
from orchestrator.rows import Rows
from strategies.core import Columns
from strategies.objectives.divergence import forward_kl, reverse_kl

AGREE_ON = 5
"""First choices that `top5_agreement` compares."""


@dataclass(frozen=True)
class Measuring:
    """How models are measured; the results do not depend on it beyond rounding, `top_k` and `dtype` apart."""

    top_k: int = 64
    """Teacher tokens per position whose mass is measured."""
    dtype: Dtype = "auto"
    """Dtype the weights are loaded in; `auto` is the saved one."""
    forward_tokens: int = 8192
    """Padded tokens of one forward."""
    rows_at_once: int = 256
    trust_remote_code: bool = False


@dataclass(frozen=True)
class ModelScores:
    """One model on the rows. Means over all loss tokens; natural logarithms; None where there is no teacher."""

    model: str
    parameters: int
    tokens: int
    """Loss tokens measured."""
    cross_entropy: float
    """Nats per token."""
    perplexity: float
    forward_kl: float | None
    """KL(teacher || model), nats per token, over the whole usable vocabulary."""
    reverse_kl: float | None
    """KL(model || teacher), nats per token, over the whole usable vocabulary."""
    top1_agreement: float | None
    """Share of tokens on which teacher and model prefer the same one."""
    top5_agreement: float | None
    """Mean share of the teacher's five first choices found among the model's five."""
    topk_mass: float | None
    """Mass that the model puts on the teacher's `top_k` first choices; in the teacher's line, the teacher's own."""
    seconds: float
    """Spent on this model's forwards and measures."""
    tokens_per_second: float
    """Tokens read, prompts included, without padding."""


def evaluate_models(
    models: Sequence[str],
    teacher: str | None,
    rows: Rows,
    indices: NDArray[np.int64] | None = None,
    measuring: Measuring | None = None,
) -> list[ModelScores]:
    """Scores of `models` in their order, then of the teacher, on the rows at `indices` (all when absent).

    Names are folders of saved models or adapters, or hub names. All models are held at once. The teacher runs once per
    forward for all of them. `Refusal` when a model is not there, does not share the tokenizer of the first one, or cannot
    read the rows.
    """
    how = measuring or Measuring()
    names = [*models, *([teacher] if teacher else [])]
    chosen = np.arange(len(rows)) if indices is None else indices
    usable = check_models(names, how.trust_remote_code)
    check_rows(names, rows, chosen, usable, how)
    return measure([(name, load_network(name, how)) for name in names], teacher is not None, rows, chosen, usable, how)


def load_network(name: str, how: Measuring) -> PreTrainedModel:
    """A saved model, an adapter merged into its base, ready to be measured. `Refusal` when its head is not understood."""
    with quiet_libraries():
        loaded: Any = load_saved(name, how.dtype, how.trust_remote_code)
    model: Any = loaded.merge_and_unload() if (Path(name).expanduser() / ADAPTER).is_file() else loaded
    check_head(model)
    moved: PreTrainedModel = model.to(compute_device())
    return moved


class Readable(Protocol):
    """Whatever rows are read from."""

    def read(self, indices: NDArray[np.int64]) -> Columns: ...


def measure(
    models: Sequence[tuple[str, PreTrainedModel]],
    compared: bool,
    rows: Readable,
    chosen: NDArray[np.int64],
    usable: int,
    how: Measuring,
) -> list[ModelScores]:
    """Scores of loaded models by name on the rows `chosen`; with `compared`, the last of them is the teacher."""
    networks = [_Network(name, model, usable) for name, model in models]
    tokens = 0
    with torch.inference_mode():
        for micro, read in _micros(rows, chosen, how):
            here = micro.to(networks[0].device)
            if not tokens:  # a first forward is slow and would be counted
                _ = [network.hidden(here) for network in networks]
            tokens += micro.loss_tokens
            _measure(networks, compared, here, read, min(how.top_k, usable))
    return [network.scores(tokens, compared) for network in networks]


def check_rows(names: Sequence[str], rows: Readable, chosen: NDArray[np.int64], usable: int, how: Measuring) -> None:
    """`Refusal` for rows without a loss token, with ids that a model lacks, or longer than a model reads."""
    longest, highest, loss_tokens = 0, 0, 0
    for part in _parts(chosen, how):
        columns = rows.read(part)
        longest = max(longest, int(columns["lengths"].max()))
        highest = max(highest, int(columns["tokens"].max()))
        loss_tokens += int(np.count_nonzero(columns["loss_mask"]))
    if not loss_tokens:
        raise Refusal("rows to evaluate on", "no token to predict", "at least one", "Give rows with text or completions.")
    if highest >= usable:
        do = "Compare models that share the tokenizer of the data."
        raise Refusal("rows to evaluate on", f"the id {highest}", f"less than the {usable} ids that every model predicts", do)
    for name in names:
        room = positions_of(name, how.trust_remote_code)
        if room and longest > room:
            do = f"Set data.max_length_tokens={room}."
            raise Refusal("rows to evaluate on", f"one of {longest} tokens", f"at most the {room} positions of {name!r}", do)


def _parts(chosen: NDArray[np.int64], how: Measuring) -> Iterator[NDArray[np.int64]]:
    return (chosen[start : start + how.rows_at_once] for start in range(0, len(chosen), how.rows_at_once))


def _micros(rows: Readable, chosen: NDArray[np.int64], how: Measuring) -> Iterator[tuple[MicroBatch, float]]:
    """Forwards over the rows, and the tokens that each of them really reads."""
    for part in _parts(chosen, how):
        columns = rows.read(part)
        micros = cut(columns, (), "bucketed", how.forward_tokens, how.forward_tokens)
        padded = sum(micro.padded_tokens for micro in micros) or 1
        yield from ((micro, len(columns["tokens"]) * micro.padded_tokens / padded) for micro in micros)


@dataclass(frozen=True)
class _TeacherView:
    """The teacher on a piece of n tokens."""

    log_p: Tensor
    """`(n, U)`."""
    first: Tensor
    """`(n, max(top_k, 5))` ids by falling probability."""
    top_k: int


class _Network:
    """One model with its running sums."""

    def __init__(self, name: str, model: PreTrainedModel, usable: int):
        self.name, self.device, self.usable = name, compute_device(), usable
        self.model: Any = model
        self.parameters = sum(p.numel() for p in model.parameters())
        self.sums = dict.fromkeys(("cross_entropy", "forward_kl", "reverse_kl", "top1", "top5", "mass"), 0.0)
        self.seconds, self.read = 0.0, 0.0

    def hidden(self, micro: MicroBatch) -> Tensor:
        """`(N, D)` hidden states that predict the loss tokens."""
        states: Tensor = backbone(self.model)(input_ids=micro.input_ids, use_cache=False).last_hidden_state
        return states.flatten(0, 1).index_select(0, micro.index)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """`(n, U)` float32 log-probabilities over the usable vocabulary."""
        return output_head(self.model).logits(hidden)[:, : self.usable].log_softmax(-1)

    def add(self, log_q: Tensor, labels: Tensor, teacher: _TeacherView | None) -> None:
        """Takes the measures of n tokens into the sums."""
        found = {"cross_entropy": -log_q.gather(-1, labels[:, None])}
        if teacher is not None:
            mine = log_q.topk(min(AGREE_ON, self.usable)).indices
            theirs = teacher.first[:, : mine.shape[-1]]
            found |= {
                "forward_kl": forward_kl(log_q, teacher.log_p),
                "reverse_kl": reverse_kl(log_q, teacher.log_p),
                "top1": mine[:, 0] == theirs[:, 0],
                "top5": (theirs[:, :, None] == mine[:, None, :]).any(-1).double().mean(-1),
                "mass": log_q.gather(-1, teacher.first[:, : teacher.top_k]).exp().sum(-1),
            }
        for name, values in found.items():
            self.sums[name] += float(values.double().sum())

    def scores(self, tokens: int, compared: bool) -> ModelScores:
        means = {name: value / tokens for name, value in self.sums.items()}
        versus = {name: value if compared else None for name, value in means.items()}
        return ModelScores(
            model=self.name,
            parameters=self.parameters,
            tokens=tokens,
            cross_entropy=means["cross_entropy"],
            perplexity=math.exp(min(means["cross_entropy"], 700.0)),
            forward_kl=versus["forward_kl"],
            reverse_kl=versus["reverse_kl"],
            top1_agreement=versus["top1"],
            top5_agreement=versus["top5"],
            topk_mass=versus["mass"],
            seconds=self.seconds,
            tokens_per_second=self.read / max(self.seconds, 1e-9),
        )


@contextmanager
def _timed(network: _Network) -> Iterator[None]:
    """Adds the wall time of the block to the network's seconds, with the device's work in it."""
    began = time.perf_counter()
    yield
    if network.device.type == "cuda":
        torch.cuda.synchronize(network.device)
    network.seconds += time.perf_counter() - began


def _measure(networks: Sequence[_Network], compared: bool, micro: MicroBatch, read: float, top_k: int) -> None:
    """One forward of every network, then their heads piece by piece; the teacher, when there is one, is the last."""
    hidden = []
    for network in networks:
        network.read += read
        with _timed(network):
            hidden.append(network.hidden(micro))
    room = LOGITS_AT_ONCE if micro.labels.device.type == "cpu" else 64 * LOGITS_AT_ONCE
    step = max(64, room // networks[0].usable)
    for start in range(0, micro.loss_tokens, step):
        piece = slice(start, start + step)
        view: _TeacherView | None = None
        if compared:
            with _timed(networks[-1]):
                log_p = networks[-1].log_probs(hidden[-1][piece])
                first = log_p.topk(min(max(top_k, AGREE_ON), log_p.shape[-1])).indices
                view = _TeacherView(log_p, first, top_k)
                networks[-1].add(log_p, micro.labels[piece], view)
        for network, states in zip(networks[: len(networks) - compared], hidden, strict=False):
            with _timed(network):
                network.add(network.log_probs(states[piece]), micro.labels[piece], view)
