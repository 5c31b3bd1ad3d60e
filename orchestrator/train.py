"""The training worker: read this first.

`train_worker` runs in every Ray Train worker: ask for data, load players, restore, then bundle by bundle `train_step`,
and every so many steps evaluate and report a checkpoint. It never learns a strategy's name.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode

from cluster.causal_lm import bound_kernel_cache
from orchestrator import checkpoint, evaluate
from orchestrator.answers import Answering
from orchestrator.board import RankJournal
from orchestrator.bundle import scalar
from orchestrator.collective import gather, total, world_size
from orchestrator.config import RunConfig
from orchestrator.controls import Controls
from orchestrator.draws import CURRICULUM, cursor_of, drawn_metrics
from orchestrator.errors import RunFailed
from orchestrator.following import parcel
from orchestrator.layouts import Layout
from orchestrator.microbatch import MicroBatch, count_tokens, cut_bundle, dummy
from orchestrator.players import BoundPlayers, load_players
from orchestrator.remembering import Remembering, rollout_log
from orchestrator.step_metrics import gradient_shares, loss_metrics, stream_metrics
from orchestrator.stream import Stream
from orchestrator.teachers import Teachers, read_signals
from orchestrator.versions import Publisher, kept_versions
from orchestrator.wishes import Notice, Wish
from orchestrator.worker import WorkerJob
from strategies.core import Columns, Progress, Strategy, Update
from strategies.sources import read_sources
from strategies.stages.replay import replays

MOST_SKIPPED_STEPS = 10
"""Consecutive steps with a gradient that is not finite before the run fails."""


def train_worker(job: WorkerJob, stream: Stream) -> None:
    """Trains this worker's share of every step, from the newest checkpoint to the last step."""
    torch.set_num_threads(job.threads)
    bound_kernel_cache()
    rank = ray.train.get_context().get_world_rank()
    device = ray.train.torch.get_device()
    strategy = job.run.build()
    sources = {**job.measured, **strategy.signals}
    packed = job.run.train.batching == "packed"
    teachers = Teachers.load(strategy.players, sources, job.loaded, job.vocabulary, packed, device, job.units)
    players = load_players(job.run, strategy.players, device, strategy.updates, teachers.shown)
    resumed = ray.train.get_checkpoint() or (Checkpoint(job.begins.root) if job.begins else None)
    start = checkpoint.restore(players, resumed, job.key) if resumed else None
    journal = RankJournal(job.board, rank, start)
    step = start.step if start else 0
    if step >= job.steps:
        raise RunFailed(f"step {step} of {job.steps} is done: a finished run does not start again")
    controls = Controls(strategy.controllers, start.controls if start else {}, 1 + (job.freshness.staleness if job.freshness else 0))
    memory = next((Remembering(rollout_log(job.folder), stage, rank) for stage in replays(strategy.stages)), None)
    publisher = _publisher(job, next(iter(players.values())), rank)
    if memory:
        memory.begin(step)
    if publisher:  # before anything waits for the first rows, which wait for it
        controls.send_with(step)
        older = _kept_versions(resumed) if rank == 0 else {}  # who sends them out
        publisher.begin(ray.get(job.board.attempt.remote()), step, older, controls.versions)
    journal.begin(stream.attempt)
    if job.run.train.fewest_workers < job.run.train.most_workers:
        journal.note(f"{world_size()} of at most {job.run.train.most_workers} workers train after step {step}.")
    trainer = Trainer(job, strategy, Networks(players, teachers, device), journal, controls, publisher, memory)
    trainer.cursor = start.cursor if start else {}
    try:
        _train(job, stream, trainer, journal, step)
    finally:
        if publisher:
            publisher.end()


def _train(job: WorkerJob, stream: Stream, trainer: Trainer, journal: RankJournal, step: int) -> None:
    """Steps, versions and reports after `step`, to the last step or until a person asks to stop."""
    first = step + 1
    for bundles in stream.after(step, job.steps):
        step = scalar(bundles[0], "step")
        wish = trainer.step(step, bundles, stream.waited_seconds)
        if step == first:  # optimizer states exist from the first step on, and held-out rows follow it in the stream
            journal.held(trainer.held_bytes())
            trainer.measure(evaluate.held_out_rows(job, stream, journal.rank))
        if trainer.due(step) or wish:
            trainer.report(step, stream.attempt, wish)
        if wish == Wish.STOP:
            return
    if step != job.steps:
        raise RunFailed(f"the stream ended after step {step} of {job.steps}")


def _publisher(job: WorkerJob, student: Layout, rank: int) -> Publisher | None:
    """Who sends the student's versions out, or what controllers say; None where nobody waits for either."""
    if job.freshness is None:
        return None
    return Publisher(job.freshness.board, student, rank, job.freshness.staleness, parcel(job.run, job.freshness.transport))


def _kept_versions(checkpoint: Checkpoint | None) -> dict[int, dict[str, dict[str, torch.Tensor]]]:
    if checkpoint is None:
        return {}
    with checkpoint.as_directory() as folder:
        return kept_versions(Path(folder))


@dataclass(frozen=True)
class Networks:
    """What a worker computes with."""

    players: Mapping[str, Layout]
    """The trained ones."""
    teachers: Teachers
    device: torch.device


class Trainer:
    """One worker's players with what steps, evaluates and reports them."""

    def __init__(
        self,
        job: WorkerJob,
        strategy: Strategy,
        networks: Networks,
        journal: RankJournal,
        controls: Controls,
        publisher: Publisher | None = None,
        memory: Remembering | None = None,
    ):
        self._job, self._strategy, self._networks = job, strategy, networks
        self._journal, self._controls, self._publisher, self._memory = journal, controls, publisher, memory
        self.held_out = evaluate.HeldOut([], [], 0)
        """Nothing until the first step is over (`measure`)."""
        self.cursor: Mapping[str, float] = {}
        """What the curriculum has drawn so far."""
        self._terms, self._answering = evaluate.evaluation_terms(job.measured, job.domains), Answering(job.answers)
        self._skipped, self._notice = 0, Notice()

    def step(self, step: int, bundles: Sequence[Columns], waited_seconds: float) -> Wish:
        """One optimizer step on this rank's bundles; returns what all ranks are to do after it."""
        began = time.perf_counter()
        progress = Progress(step - 1, self._job.steps, self._controls.values)
        torch.manual_seed(hash((self._job.run.seed, step, self._journal.rank)) & 0x7FFFFFFF)
        wish = Wish.STOP if self._journal.stop else Wish.SAVE if self._notice.fresh else Wish.NOTHING
        wish, metrics = train_step(self._strategy, self._networks, bundles, progress, self._job.run, wish)
        self._count_skipped(metrics)
        metrics |= stream_metrics(bundles, self._strategy, began, waited_seconds, self._job.domains)
        metrics |= self._controls.metrics | self._drew(bundles[-1])
        self._journal.step(scalar(bundles[0], "attempt"), step, metrics)
        self._controls.after_step(metrics, progress)
        if self._publisher and step < self._job.steps:
            self._send(self._publisher, step, bundles)
        return wish

    def _drew(self, bundle: Columns) -> dict[str, float]:
        """What is logged of the rows that the step drew, and remembered of them."""
        before, self.cursor = self.cursor, cursor_of(bundle)
        return {CURRICULUM + name: value for name, value in drawn_metrics(before, self.cursor).items()}

    def _send(self, publisher: Publisher, step: int, bundles: Sequence[Columns]) -> None:
        """The student after `step` steps, once what it is to be read with is there: the step's own texts, and controllers' values."""
        if self._memory:
            self._memory.write(step, bundles)
        self._controls.send_with(step)
        publisher.publish(step)

    def measure(self, held_out: evaluate.HeldOut) -> None:
        """Evaluates these rows from now on, which are scored."""
        self.held_out = held_out
        if self._publisher:
            self._publisher.settled()

    def held_bytes(self) -> dict[str, int]:
        """What this rank holds of the first player."""
        return next(iter(self._networks.players.values())).held_bytes()

    def _count_skipped(self, metrics: dict[str, float]) -> None:
        self._skipped = self._skipped + 1 if metrics["skipped"] else 0
        if self._skipped >= MOST_SKIPPED_STEPS:
            raise RunFailed(f"the gradient was not finite for {self._skipped} steps in a row; lower train.lr or check the data")

    def due(self, step: int) -> bool:
        """Whether a step ends with an evaluation or a checkpoint."""
        periods = (self._job.run.evaluate.every_steps, self._job.run.checkpoint.every_steps)
        return step == self._job.steps or any(p and step % p == 0 for p in periods)

    def report(self, step: int, attempt: int, wish: Wish) -> None:
        """Held-out metrics, and a checkpoint unless this step is only for evaluation. A checkpoint in haste goes without metrics."""
        metrics: dict[str, float] = {}
        if wish == Wish.SAVE:
            self._notice.hear()
            self._journal.note(f"A node is about to be taken back: a checkpoint is written after step {step}.")
        if self.held_out.rounds and (wish == Wish.STOP or self.due(step)):
            student = next(iter(self._networks.players.values()))
            micros, rounds = self.held_out.micros, self.held_out.rounds
            metrics = evaluate.evaluate(student, micros, self._terms, rounds, self._networks.teachers, self._networks.device)
            metrics |= evaluate.teacher_cross_entropy(self.held_out.bundles, self._job.measured, self._job.domains)
            metrics |= self._answering.measure(student, self.held_out.bundles)
            self._journal.evaluated(attempt, step, metrics)
            if self.due(step):  # and not where a person stopped the run, so that one that goes on is as one that never stopped
                self._controls.after_evaluation(metrics)
        if not (wish or step == self._job.steps or self._checkpoint_due(step)):
            return
        more = self._publisher.keep if self._publisher else None
        journal = tuple(dataclasses.asdict(e) for e in self._journal.recent)
        position = checkpoint.Position(step, attempt, metrics, journal, self._controls.to_json(), self.cursor)
        unranked = {self._job.run.checkpoint.best_metric: float("nan")}  # Ray ranks what lacks a metric above all where small is good
        ray.train.report(
            metrics or unranked,
            checkpoint=checkpoint.save(self._networks.players, position, self._journal.rank, more, self._job.key),
            checkpoint_dir_name=checkpoint.name_of(attempt, step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        )
        if self._memory:
            self._memory.forget(self._job.folder)

    def _checkpoint_due(self, step: int) -> bool:
        period = self._job.run.checkpoint.every_steps
        return bool(period and step % period == 0)


def train_step(
    strategy: Strategy,
    networks: Networks,
    bundles: Sequence[Columns],
    progress: Progress,
    run: RunConfig,
    wish: Wish,
) -> tuple[Wish, dict[str, float]]:
    """Every due update of one step: count, agree, forward with scales, backward, step.

    Counts of every term are summed over all ranks before the first forward, because gradients are made in the forward. An update for
    which nothing counts is left out whole, so that momentum and weight decay do not move a student that had nothing to learn.
    Returns the largest wish of any rank, and the step's metrics over all ranks.
    """
    metrics: dict[str, float] = {"skipped": 0.0}
    read = read_sources(strategy.signals, read_signals((t for u in strategy.updates for t in u.terms), strategy.signals))
    micros = [micro for bundle in bundles for micro in cut_bundle(run, bundle, read, strategy.rows_together)]
    asked = Wish.NOTHING
    for update in strategy.updates:
        if progress.step % update.every:
            continue
        counts, rounds, asked = _agree(update, bundles, len(micros), wish)
        lr = run.train.learning_rate(progress)
        if not any(counts.values()):
            metrics |= _idle(update, counts, progress) | {"lr": lr}
            continue
        scales = {t.name: t.scale(progress) * world_size() / max(1.0, counts[t.name]) for t in update.terms}
        sums = torch.zeros(2, len(update.terms), dtype=torch.float64)  # of the terms, and of their squared pulls
        layout = networks.players[update.player]
        for micro, last in _rounds(micros, rounds):
            with layout.micro(last):
                result = update.loss(BoundPlayers(networks.players, micro.to(networks.device), scales, progress, networks.teachers))
                layout.backward(result.loss)
            sums += torch.stack([torch.stack([kind[t.name] for t in update.terms]) for kind in (result.sums, result.pulls)]).double().cpu()
        norm = layout.step(lr)
        values, squares = total(sums).tolist()
        metrics |= loss_metrics(update, values, counts, progress) | gradient_shares(update, squares)
        metrics |= {"grad_norm": norm, "lr": lr, "micro_batches": float(rounds)}
        metrics["skipped"] += float(not torch.isfinite(torch.tensor(norm)))
    return asked, metrics


def _idle(update: Update, counts: Mapping[str, float], progress: Progress) -> dict[str, float]:
    """What is logged of an update that was left out."""
    nothing = [0.0] * len(update.terms)
    return loss_metrics(update, nothing, counts, progress) | gradient_shares(update, nothing) | {"grad_norm": 0.0, "micro_batches": 0.0}


def _agree(update: Update, bundles: Sequence[Columns], micros: int, wish: Wish) -> tuple[dict[str, float], int, Wish]:
    """Global mask count of each term, the largest number of micro-batches of any rank, and the largest wish."""
    mine = [float(sum(count_tokens(bundle, t.name) for bundle in bundles)) for t in update.terms]
    ranks = gather([*mine, float(micros), float(wish)])
    counts = {t.name: float(ranks[:, i].sum()) for i, t in enumerate(update.terms)}
    return counts, max(1, int(ranks[:, -2].max())), Wish(int(ranks[:, -1].max()))


def _rounds(micros: list[MicroBatch], rounds: int) -> Iterator[tuple[MicroBatch, bool]]:
    """This rank's micro-batches, then empty ones until every rank has run `rounds`; the flag marks the last."""
    for i in range(rounds):
        yield micros[i] if i < len(micros) else dummy(), i == rounds - 1
