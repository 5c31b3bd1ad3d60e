"""What a run will hold: peak memory of every process, and disk. Estimates from shapes alone, meant to be within 20 %.

Sizes are bytes. Constants of a process without a network were measured with the CPU build of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.answers import LOGITS_AT_ONCE
from cluster.config import EndpointConfig, SavedModel
from cluster.forwards import group_by_length
from cluster.resources import Demand
from orchestrator.config import RunConfig
from orchestrator.data import PreparedData
from orchestrator.layouts import layout_facts
from orchestrator.order import Order
from orchestrator.rows import Rows
from orchestrator.sketch import Network, saved_bytes_per_forward
from strategies.cut import cut_for

MIB = 1 << 20
WORKER_BYTES = 640 * MIB
"""A training worker before it loads anything: torch, transformers, Ray."""
SCORER_BYTES = 560 * MIB
READER_BYTES = 385 * MIB
DRIVER_BYTES = 2000 * MIB
"""The driver, Ray Train's controller, the stream's coordinator and Ray's own daemons together."""
HEAD_COPIES = 6
"""float32 copies of a piece of logits alive at once: without the kept tokens, shares, log-probabilities, gradients."""
SCORE_COPIES = 4
"""The same for a teacher's piece of logits."""
FLOAT = 4
CACHE_COPIES = 2
"""Keys and values of past tokens while they grow: the old ones and the new."""
SAMPLED_STEPS = 16
TASKS_IN_FLIGHT = 4
"""Bundles that Ray Data holds around each actor besides those the workers read ahead."""
ROW_TOKEN_BYTES = 5
"""Token id and mask."""
QUANTIZED_BYTES = {"int8": 1.1, "int4": 0.6}
"""Per parameter; embeddings and the head stay as they are."""


@dataclass(frozen=True)
class Memory:
    """Estimated peak of one process of a role, by what holds it."""

    role: str
    processes: int
    parts: Mapping[str, int]
    on_gpu: bool = False
    """Whether everything but `process` and `bundles` lives in GPU memory."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def host(self) -> int:
        """The part in the machine's own memory."""
        return sum(v for k, v in self.parts.items() if not self.on_gpu or k in ("process", "bundles"))

    @property
    def device(self) -> int:
        """The part in GPU memory."""
        return self.total - self.host


@dataclass(frozen=True)
class Work:
    """The largest pieces that processes meet: padded forwards `(rows, tokens)` and one bundle."""

    micro: tuple[int, int]
    micros: int
    """Forwards of one worker in one step."""
    forward_tokens: Mapping[str, int]
    """Padded tokens of one forward by endpoint."""
    bundle_bytes: int
    steps: int


def largest_work(
    run: RunConfig,
    order: Order,
    endpoints: Mapping[str, EndpointConfig],
    signal_bytes: int,
    become: Callable[[NDArray[np.int64]], NDArray[np.int64]] = lambda lengths: lengths,
    together: int = 1,
    read: Callable[[str, NDArray[np.int64]], NDArray[np.int64]] = lambda endpoint, lengths: lengths,
) -> Work:
    """Measured on the bundles of some steps of the real order. `signal_bytes` are what stages add to every loss token, `become` says
    how long the rows are that may become of rows of the data, `together` how many of those the student reads in one forward, and `read`
    how long an endpoint reads them."""
    rows = Rows(order.folder, "train")
    steps = np.unique(np.linspace(1, order.steps, min(order.steps, SAMPLED_STEPS)).astype(np.int64))
    bundles = [become(np.asarray(rows.lengths[b], dtype=np.int64)) for s in steps.tolist() for b in order.example(s) if len(b)]
    limit = run.train.micro_batch_tokens
    micros = [_groups(b, limit, together) for b in bundles]
    largest = max((g for groups in micros for g in groups), key=lambda g: g[0] * g[1])
    tokens = max(int(b.sum()) for b in bundles)
    models = {name: saved for name, config in endpoints.items() if (saved := config.saved_model)}
    return Work(
        micro=largest,
        micros=max(len(groups) for groups in micros),
        forward_tokens={n: max(r * t for b in bundles for r, t in _groups(read(n, b), m.forward_tokens)) for n, m in models.items()},
        bundle_bytes=tokens * (ROW_TOKEN_BYTES + signal_bytes),
        steps=order.steps,
    )


def part_work(work: Work, endpoints: Mapping[str, EndpointConfig], part_tokens: int, signal_bytes: int) -> Work:
    """The same while stores are filled: whole forwards, and bundles of one part each."""
    forwards = {name: saved.forward_tokens for name, config in endpoints.items() if (saved := config.saved_model)}
    return replace(work, forward_tokens=forwards, bundle_bytes=part_tokens * (ROW_TOKEN_BYTES + signal_bytes))


def _groups(lengths: NDArray[np.int64], limit: int, together: int = 1) -> list[tuple[int, int]]:
    return [(len(g), int(lengths[g].max())) for g in group_by_length(lengths, limit, together)]


def worker_memory(run: RunConfig, student: Network, work: Work, workers: Demand) -> Memory:
    """One training worker under the run's layout."""
    held = layout_facts(run.train.layout).held(run.train.layout, workers.processes)
    bf16 = run.train.precision == "bfloat16"
    moments = 2 * student.trained * FLOAT * held.moments + student.trained * FLOAT * held.exact
    gradients = student.trained * FLOAT * held.gradients
    activations = saved_bytes_per_forward(student, run.student, *work.micro, bf16, run.train.gradient_checkpointing)
    head = _head_bytes(student, work.micro[0] * work.micro[1], "cuda" if workers.share.gpus > 0 else "cpu")
    if work.micros == 1:  # gradients grow while activations are freed; the head's own gradient is there before
        activations, gradients = max(activations, int(gradients) - student.vocabulary * student.hidden * FLOAT), 0
    buckets = int(student.trained * FLOAT * held.buckets)
    offloaded = run.train.layout.offload_optimizer
    parts = {
        "process": WORKER_BYTES + (int(moments) if offloaded else 0),
        "weights": int(student.parameters * student.dtype.itemsize * held.weights),
        "gathered": _gathered_bytes(student) if held.weights < 1 else 0,
        "gradients": int(gradients) + buckets,
        "optimizer": 0 if offloaded else int(moments),
        "activations": activations,
        "head": head,
        "bundles": work.bundle_bytes * min(run.train.read_ahead_bundles + 1, work.steps),
    }
    return Memory(workers.role, workers.processes, parts, on_gpu=workers.share.gpus > 0)


def with_averages(worker: Memory, student: Network, averages: int) -> Memory:
    """A training worker whose rank 0 keeps moving averages of the student; counted for every worker."""
    return replace(worker, parts={**worker.parts, "averages": averages * student.parameters * FLOAT}) if averages else worker


def following_memory(scorer: Memory, student: Network) -> Memory:
    """An actor that takes published weights: they are put together beside those that they replace."""
    return replace(scorer, parts={**scorer.parts, "published": student.parameters * student.dtype.itemsize})


def published_bytes(student: Network, versions: int, averages: int) -> int:
    """What the versions that may be asked for hold of Ray's object store."""
    return versions * student.parameters * (student.dtype.itemsize + averages * FLOAT)


COMPARED_COPIES = 4
"""float32 copies of what a frozen player shows alive at once: its own, the student's mapped to it, difference, gradient."""


def with_frozen(
    worker: Memory, teachers: Iterable[tuple[Network, SavedModel, int]], heads: Iterable[Network], filters: int, work: Work
) -> Memory:
    """A training worker that also holds frozen players, each with what width it shows of a token, and teachers' output heads,
    and trains `filters` numbers beside the student. Filters are counted whole, though some layouts shard them."""
    tokens = work.micro[0] * work.micro[1]
    weights = shown = forward = 0
    for network, saved, width in teachers:
        weights += _frozen_bytes(network, saved)
        shown += tokens * width * (network.dtype.itemsize + FLOAT * COMPARED_COPIES)
        forward = max(forward, _forward_bytes(network, tokens))
    beside = max(0, forward - worker.parts["activations"])  # it runs before the student's forward and leaves only what it shows
    whole = sum(n.vocabulary * n.hidden * n.dtype.itemsize for n in heads)
    parts = {"frozen players": weights + shown + beside, "teachers' heads": whole, "filters": filters * FLOAT * 4}
    return replace(worker, parts={**worker.parts, **{name: size for name, size in parts.items() if size}})


def _frozen_bytes(network: Network, saved: SavedModel) -> int:
    return int(network.parameters * QUANTIZED_BYTES.get(saved.quantization, network.dtype.itemsize))


def _forward_bytes(network: Network, tokens: int) -> int:
    """What a forward without gradients holds at once."""
    return tokens * (3 * network.widest + 4 * network.hidden) * network.dtype.itemsize


def _gathered_bytes(network: Network) -> int:
    """Whole weights that a sharded layout puts together for a moment: the embedding, the head, and two layers."""
    ends = network.vocabulary * network.hidden
    return FLOAT * (ends + 2 * max(0, network.parameters - ends) // network.layers)


def _head_bytes(network: Network, tokens: int, device: str) -> int:
    """Logits of one block, a piece of them in several copies, and the gradients that the forward makes."""
    cut = cut_for(network.vocabulary, device)
    logits = network.vocabulary * (min(tokens, cut.block_tokens) + HEAD_COPIES * min(tokens, cut.piece_tokens))
    return FLOAT * (logits + network.vocabulary * network.hidden + tokens * network.hidden)


def scorer_memory(teacher: Network, saved: SavedModel, work: Work, demand: Demand) -> Memory:
    """One actor of an endpoint that loads `saved`."""
    tokens = work.forward_tokens[demand.role]
    on_gpu = demand.share.gpus > 0
    piece = (64 if on_gpu else 1) * LOGITS_AT_ONCE
    parts = {
        "process": SCORER_BYTES,
        "weights": _frozen_bytes(teacher, saved),
        "activations": _forward_bytes(teacher, tokens),
        "head": FLOAT * SCORE_COPIES * min(tokens * teacher.vocabulary, max(piece, 64 * teacher.vocabulary)),
        "bundles": 2 * work.bundle_bytes,
    }
    return Memory(demand.role, demand.processes, parts, on_gpu)


def author_memory(teacher: Network, saved: SavedModel, demand: Demand) -> Memory:
    """One actor of an endpoint that writes: keys and values of every layer for as many tokens as one batch may hold."""
    config: Any = teacher.config.get_text_config()
    queries = max(1, int(getattr(config, "num_attention_heads", 1)))
    heads = int(getattr(config, "num_key_value_heads", 0) or queries)
    width = int(getattr(config, "head_dim", 0) or teacher.hidden // queries)
    tokens = saved.forward_tokens
    parts = {
        "process": SCORER_BYTES,
        "weights": _frozen_bytes(teacher, saved),
        "activations": _forward_bytes(teacher, tokens),
        "cache": 2 * CACHE_COPIES * tokens * teacher.layers * heads * width * teacher.dtype.itemsize,
    }
    return Memory(demand.role, demand.processes, parts, demand.share.gpus > 0)


def small_process(demand: Demand) -> Memory:
    """A process without a network: a reader, or an endpoint that loads nothing."""
    return Memory(demand.role, demand.processes, {"process": READER_BYTES})


def surroundings(versions: int = 0) -> Memory:
    """What runs beside the roles on the driver's machine, with the bytes of published versions."""
    return Memory("driver and Ray", 1, {"process": DRIVER_BYTES, **({"versions": versions} if versions else {})})


def stream_bytes(run: RunConfig, work: Work, demands: tuple[Demand, ...]) -> int:
    """Bundles under way at once over the whole stream: what Ray's object store must have room for."""
    actors = sum(d.processes for d in demands if d.role in work.forward_tokens)
    most = run.train.most_workers * (run.train.read_ahead_bundles + 1) + TASKS_IN_FLIGHT * (actors + 1)
    return work.bundle_bytes * min(most, work.steps * run.train.most_workers)


@dataclass(frozen=True)
class Disk:
    """What a run writes."""

    checkpoint: int
    checkpoints: int
    """Most that lie on disk at once, one being written included."""
    export: int
    held_out: int
    """Scored held-out rows."""
    prepared: int
    """Prepared data, already there."""

    @property
    def needed(self) -> int:
        """Bytes still to be written."""
        return self.checkpoint * self.checkpoints + self.export + self.held_out


def disk(run: RunConfig, student: Network, data: PreparedData, steps: int, signal_bytes: int) -> Disk:
    """Estimate for one training of the run."""
    period = run.checkpoint.every_steps
    written = ceil(steps / period) if period else 1
    rows = data.held_out
    prepared = sum(s.tokens * ROW_TOKEN_BYTES + s.rows * 20 for s in (data.train, data.held_out))
    return Disk(
        checkpoint=(student.trained + student.tied) * student.dtype.itemsize + 2 * student.trained * FLOAT,
        checkpoints=min(written, run.checkpoint.keep + 2),
        export=student.parameters * student.dtype.itemsize,
        held_out=rows.tokens * ROW_TOKEN_BYTES + rows.loss_tokens * signal_bytes,
        prepared=prepared,
    )
