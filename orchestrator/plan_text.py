"""The plan as a person reads it: plain text of at most 100 columns, paths and warnings apart."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from cluster.resources import machine_cpus
from orchestrator.checks.machine import is_local, machine_memory
from orchestrator.checks.machine import text as size
from orchestrator.curricula import curriculum_text
from orchestrator.memory import Memory
from orchestrator.sketch import Network
from strategies.control import begun
from strategies.core import AnyTerm, Progress
from strategies.follow import Follow
from strategies.stages.repair import Repair
from strategies.stages.replay import Replay, replays
from strategies.stages.rollout import rollouts
from strategies.stages.view import behind

if TYPE_CHECKING:
    from orchestrator.plan import Plan
    from orchestrator.stores import Wanted

COLUMNS = 100
LABEL = 10
SHOWN_IDS = 16
SHOWN_CHARACTERS = 80
SHORT = 12
"""Digits of a fingerprint."""


def plan_text(plan: Plan) -> str:
    """Name, folder, what is taught, who takes part, data, order, resources, memory, disk, the first row, warnings."""
    sections = (
        ("Run", _run(plan)),
        ("Strategy", _strategy(plan)),
        ("Student", [_network(plan.cast.student, plan)]),
        ("Teachers", _teachers(plan)),
        ("Text", _text(plan)),
        ("Data", _data(plan)),
        ("Draws", _curriculum(plan)),
        ("Steps", _steps(plan)),
        ("Layout", _layout(plan)),
        ("CPUs", [_processors(plan)]),
        ("Memory", _memory(plan)),
        ("Disk", _disk(plan)),
        ("First row", _first_row(plan)),
        ("Warnings", [f"! {w}" for w in plan.warnings]),
    )
    return sections_text(sections)


def sections_text(sections: Iterable[tuple[str, Iterable[str]]]) -> str:
    """Labelled lines, the label before the first of each section."""
    return "\n".join(line for label, lines in sections for line in _section(label, list(lines)))


def _section(label: str, lines: Sequence[str]) -> Iterator[str]:
    for i, line in enumerate(lines):
        start = f"{label if i == 0 else '':<{LABEL}}"
        yield from textwrap.wrap(
            line, COLUMNS, initial_indent=start, subsequent_indent=" " * (LABEL + 2), break_long_words=False, break_on_hyphens=False
        )


def _run(plan: Plan) -> list[str]:
    done = plan.done_steps
    again = [f"goes on after step {done}" if done else "goes on from the start"] if plan.folder.exists() else []
    return [plan.name, f"in {plan.folder.root}", *again]


def _strategy(plan: Plan) -> Iterator[str]:
    stages = " -> ".join(f"{type(s).__name__}({s.endpoint})" if s.endpoint else type(s).__name__ for s in plan.strategy.stages)
    yield plan.job.run.strategy.type + (f": {stages} -> train" if stages else "")
    for stage in rollouts(plan.strategy.stages):
        age = f", {'at most' if stage.newest else 'exactly'} {stage.staleness} steps behind" if stage.follows else ""
        who, beside = "the student" if stage.follows else stage.endpoint, ", beside the data's own text" if stage.paired else ""
        yield f"{who} writes up to {stage.sampling.max_new_tokens} tokens after each prompt{age}{beside}"
    for mending in (s for s in plan.strategy.stages if isinstance(s, Repair)):
        yield f"{mending.endpoint} mends what is wrong of it in up to {mending.sampling.max_new_tokens} tokens"
    yield from (_recalled(s, plan.steps) for s in replays(plan.strategy.stages))
    for name, controller in plan.strategy.controllers.items():
        values = ", ".join(f"{key.removeprefix(name)} {v:.4g}".strip(" /") for key, v in begun({name: controller}).items())
        yield f"{name} begins at {values} and moves by {', '.join(sorted(controller.hears))}"
    for view in (s for s in behind(plan.strategy.stages) if s.context.text):
        yield f"{view.endpoint} reads {view.context.text!r} before each of these rows, and weighs none that has no reference or no room"
    for update in plan.strategy.updates:
        every = f" every {update.every} steps" if update.every > 1 else ""
        yield f"{update.player}{every} learns from " + ", ".join(_term(t, plan) for t in update.terms)


def _recalled(stage: Replay, steps: int) -> str:
    """How many of the student's rows are old ones."""
    first, last = stage.share(Progress(0, steps)), stage.share(Progress(max(0, steps - 1), steps))
    return f"{first:.0%} to {last:.0%} of its rows are recalled from the newest {stage.capacity_rows:,} texts, once there are as many"


def _term(term: AnyTerm, plan: Plan) -> str:
    begin, steps = begun(plan.strategy.controllers), plan.steps
    first, last = term.scale(Progress(0, steps, begin)), term.scale(Progress(max(0, steps - 1), steps, begin))
    weight = f"{first:g}" if first == last else f"{first:g} to {last:g}"
    signal = f" of {term.signal}" if term.signal else ""
    return f"{term.name} = {weight} x {type(term.objective).__name__}{signal}"


def _network(network: Network, plan: Plan) -> str:
    trained = f", {network.trained:,} of them trained" if network.trained != network.parameters else ""
    fresh = ", fresh weights" if network is plan.cast.student and plan.job.run.student.init == "random" else ""
    cut = f" ({network.origin})" if network.origin else ""
    return (
        f"{network.source}: {network.architecture}, {network.parameters:,} parameters{trained}{cut}{fresh}, "
        f"{_dtype(network.dtype)}, vocabulary {network.vocabulary:,}, context {network.context or 'unknown'}, "
        f"{_short(network.fingerprint)}"
    )


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(fingerprint: str) -> str:
    return fingerprint.rpartition(":")[2][:SHORT]


def _teachers(plan: Plan) -> Iterator[str]:
    writing = {stage.endpoint for stage in rollouts(plan.strategy.stages) if stage.follows}
    own = writing | set(plan.strategy.follows)
    for name, config in plan.endpoints.items():
        network, offer = plan.cast.teachers.get(name), plan.offers.get(name)
        described = _network(network, plan) if network and name not in own else offer.line if offer else ""
        about = ", writes with the weights in training" if name in writing else _following(plan.strategy.follows.get(name))
        yield f"{name} ({config.engine}, {config.actors} {'actor' if config.actors == 1 else 'actors'}{about}) {described}".rstrip()
    yield from _authors(plan)
    yield from (_stored(w) for w in plan.sources.read)
    yield from plan.sources.notes
    for name in plan.frozen:
        yield f"{name} (frozen in every training worker) {_network(plan.cast.teachers[name], plan)}"
    yield from (a.line for a in plan.alignments)
    if set(plan.endpoints) - set(plan.cast.foreign) or plan.frozen:
        yield f"{plan.vocabulary:,} token ids are shared by all" + (" others" if plan.cast.foreign else "")


def _following(follow: Follow | None) -> str:
    """Whose weights an endpoint has."""
    if follow is None:
        return ""
    if not follow.moves:
        return ", the student as it begins"
    return f", an average of the student at rate {follow.rate:g}" if follow.averages else ", the weights in training"


def _authors(plan: Plan) -> Iterator[str]:
    """Who writes before training."""
    if plan.text is None:
        return
    for name in (w.spec.name for w in plan.text.stores):
        network, offer = plan.cast.teachers.get(name), plan.text.offers.get(name)
        described = _network(network, plan) if network else offer.line if offer else ""
        yield f"{name} ({plan.job.endpoints[name].engine}, writes) {described}".rstrip()


def _stored(wanted: Wanted) -> str:
    """Whose answers are read, and how much of the store is there."""
    return f"signals of {wanted.spec.name} from {wanted.files.folder.root}, which {wanted.status}"


def _text(plan: Plan) -> Iterator[str]:
    """What is written before training, by whom, and what is kept of it."""
    if plan.text is None:
        return
    prompts = plan.text.prompts
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in prompts.left_out.items())
    yield f"{prompts.rows:,} prompts of {plan.job.run.data.train}, {prompts.tokens:,} tokens" + (
        f" (left out: {left_out})" if left_out else ""
    )
    for wanted in plan.text.stores:
        sampling, judge = wanted.authored.write.sampling, wanted.authored.judge.type
        how = f"at temperature {sampling.temperature:g}" if sampling.temperature else "greedily"
        yield (
            f"{wanted.spec.name} writes {sampling.samples} of up to {sampling.max_new_tokens:,} tokens for each, {how}, judge {judge}, "
            f"unfinished ones: {wanted.authored.unfinished}"
        )
        yield f"text of {wanted.spec.name} from {wanted.files.folder.root}, which {wanted.status}"
        yield from [wanted.nearest] if wanted.nearest else []
    if (selected := plan.text.selected) is not None:
        rejected = ", ".join(f"{count:,} {reason}" for reason, count in selected.rejected.items()) or "none"
        right = f", {selected.right:,} right" if selected.right is not None else ""
        yield f"{selected.kept:,} of {selected.written:,} texts are kept{right}, of {selected.prompts:,} prompts, in {selected.rows_file}"
        yield f"rejected: {rejected}, listed in {selected.rejected_file}"


def _data(plan: Plan) -> Iterator[str]:
    data, run = plan.data, plan.job.run.data
    source = ", ".join(run.sources) if plan.text is None else "the kept texts" if plan.text.selected else "stand-ins of the greatest length"
    yield f"{source}: {data.train.rows:,} rows, {data.train.tokens:,} tokens ({data.train.loss_tokens:,} learnt)"
    if plan.text:
        yield f"held out: {data.held_out.rows:,} rows, {data.held_out.tokens:,} tokens, {plan.text.prompts.held_out_by}"
    given = run.held_out if isinstance(run.held_out, str) else ", ".join((run.held_out or {}).values())
    by = {"source": f"from {given}"}.get(data.held_out_by, f"set aside as {data.held_out_by} of the same source")
    if not plan.text:
        yield f"held out: {data.held_out.rows:,} rows, {data.held_out.tokens:,} tokens, {by}"
    if data.train.domains:
        rows = ", ".join(f"{name} {count:,} + {data.held_out.domains.get(name, 0):,}" for name, count in data.train.domains.items())
        yield f"domains by {run.domain or 'source'}, rows to train on + held out: {rows}"
    if (asked := plan.job.run.evaluate.answers) is not None:
        count = min(asked.rows, data.held_out.rows)
        yield f"{count:,} held-out prompts are answered each time, in up to {asked.max_new_tokens:,} tokens; {asked.verifier} judges"
    longest = max(data.train.longest_tokens, data.held_out.longest_tokens)
    dropped = f", {data.dropped_rows:,} rows in neither split" if data.dropped_rows else ""
    yield f"longest row {longest:,} tokens (limit {run.max_length_tokens:,}){dropped}, {_short(data.fingerprint)}"
    if data.quarantined:
        reasons = ", ".join(f"{count} {reason}" for reason, count in data.quarantined.items())
        bad = sum(data.quarantined.values())
        yield f"bad and left out: {bad:,} of {data.records:,} records ({reasons}), listed in {data.quarantine_file}"


def _curriculum(plan: Plan) -> Iterator[str]:
    curriculum, fresh = plan.job.run.curriculum, plan.freshness(None)
    if curriculum is not None:
        listens = fresh.staleness if fresh is not None and curriculum.controllers() else None
        yield from curriculum_text(curriculum, plan.data, plan.steps, listens)


def _steps(plan: Plan) -> Iterator[str]:
    train = plan.job.run.train
    batch = f"{train.batch_tokens:,} tokens" if train.batch_tokens else f"{train.batch_rows:,} rows"
    mean = plan.data.train.tokens / plan.data.train.rows
    epochs = plan.steps * (train.batch_tokens / mean if train.batch_tokens else train.batch_rows) / plan.data.train.rows
    how = "drawn" if plan.order.draws else "shuffled"
    rate = f"{train.lr:g}" if isinstance(train.lr, float) else str(train.lr.model_dump(exclude_defaults=True))
    yield f"{plan.steps:,} of {batch}, about {epochs:.2g} passes over the data, {how} by seed {plan.job.run.seed}"
    yield (
        f"AdamW {rate}, {train.lr_schedule} after {train.warmup_steps} steps of warm-up, clip {train.clip_norm:g}, "
        f"{train.precision}, micro-batches of {train.micro_batch_tokens:,} tokens, {train.batching}"
    )


def _layout(plan: Plan) -> list[str]:
    train, share = plan.job.run.train, plan.shares["worker"]
    device = f"{share.gpus:g} GPU each" if share.gpus else "on CPUs"
    few, most = train.fewest_workers, train.most_workers
    workers = "1 worker" if most == 1 else f"{most} workers" if few == most else f"{few} to {most} workers"
    threads = "1 thread" if share.threads == 1 else f"{share.threads} threads"
    return [f"{train.layout.type}, {workers} of {threads} {device}, up to {train.max_failures} restarts"]


def _processors(plan: Plan) -> str:
    total = sum(d.processes * d.share.cpus for d in plan.demands)
    listed = " + ".join(f"{d.role} {d.processes} x {d.share.cpus:g}" for d in plan.demands)
    where = f"the {machine_cpus()} of this machine" if is_local(plan.job) else f"those of the cluster at {plan.job.cluster.ray_address}"
    return f"{listed} = {total:g} logical, of {where}"


def _memory(plan: Plan) -> Iterator[str]:
    yield from (_process(m) for m in plan.memory)
    total = sum(m.host * m.processes for m in plan.memory)
    yield f"{size(total)} in all" + (f", of the {size(machine_memory())} of this machine" if is_local(plan.job) else "")


def _process(memory: Memory) -> str:
    parts = ", ".join(f"{name} {size(value)}" for name, value in memory.parts.items() if value >= 1 << 20)
    gpu = f", {size(memory.device)} of it on its GPU" if memory.on_gpu else ""
    return f"{memory.role} {memory.processes} x {size(memory.total)}{gpu} ({parts})"


def _disk(plan: Plan) -> list[str]:
    disk = plan.disk
    return [
        f"{size(disk.needed)} to write: checkpoints {disk.checkpoints} x {size(disk.checkpoint)}, student {size(disk.export)}, "
        f"held-out scores {size(disk.held_out)}; prepared data {size(disk.prepared)} in {plan.data.folder}"
    ]


def _first_row(plan: Plan) -> Iterator[str]:
    first = plan.data.first_row
    shown = first.text[:SHOWN_CHARACTERS]
    yield repr(shown) + (" ..." if len(first.text) > len(shown) else "")
    yield f"student's ids {_ids(first.tokens)}"
    for name, tokenizer in plan.cast.tokenizers.items():
        ids = tokenizer(first.text, add_special_tokens=False)["input_ids"]
        ours = plan.cast.tokenizer(first.text, add_special_tokens=False)["input_ids"]
        same = "the same text alike" if ids == ours else f"the same text as {_ids(ids)}"
        yield f"{name} would read {same}"


def _ids(ids: Sequence[int]) -> str:
    return " ".join(str(i) for i in ids[:SHOWN_IDS]) + (" ..." if len(ids) > SHOWN_IDS else "")
