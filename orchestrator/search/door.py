"""Every check of a search before a trial begins: each corner of its space is a run that the door lets in, and trials can be compared."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.resources import Share, machine_cpus, together
from cluster.storage import Folder
from orchestrator.checks import machine
from orchestrator.checks.teaching import evaluation_metrics
from orchestrator.config import Job, load_job, read_content
from orchestrator.dotted import ABSENT, get, put
from orchestrator.errors import Refusal
from orchestrator.explain import nearest
from orchestrator.plan import Plan, make_plan
from orchestrator.rows import Rows
from orchestrator.search.folders import new_name
from orchestrator.search.population_door import check_population, comparison_steps
from orchestrator.search.sampler import propose
from orchestrator.search.settings import COSTS, SearchConfig
from orchestrator.search.sharing import Pooled, pooled, seated
from orchestrator.search.space import Probe, probes
from orchestrator.search.trial import Spec, taught

EVALUATIONS = "eval/"


@dataclass(frozen=True)
class Corner:
    """A probe and the run it stands for."""

    probe: Probe
    plan: Plan


@dataclass(frozen=True)
class SearchPlan:
    """A checked search."""

    name: str
    config: SearchConfig
    spec: Spec
    corners: tuple[Corner, ...]
    pooled: tuple[Pooled, ...] = ()
    """Teachers that answer live, loaded once for all trials."""

    @property
    def plan(self) -> Plan:
        """The run of the first corner, which stands for all."""
        return self.corners[0].plan

    @property
    def folder(self) -> Path:
        """The search's own small files."""
        return self.spec.own

    @property
    def tags(self) -> dict[str, str]:
        """Those of the recipe; its trials have one more."""
        return {str(key): str(value) for key, value in (self.spec.content.get("tags") or {}).items()}

    @property
    def cpus(self) -> float:
        """Most logical CPUs that one trial holds; the process that drives it waits, and holds none."""
        return max(together(c.plan.demands).cpus for c in self.corners)

    @property
    def gpus(self) -> float:
        """Most GPUs that one trial holds."""
        return max(sum(d.processes * d.share.gpus for d in c.plan.demands) for c in self.corners)

    @property
    def held(self) -> Share:
        """What the trials that run at once hold, and the teachers that all of them ask."""
        pools, trials = together(t.demand for t in self.pooled), self.config.concurrent
        return Share(pools.cpus + trials * self.cpus, pools.gpus + trials * self.gpus, 0)

    @property
    def memory(self) -> int:
        """Most bytes of this machine's memory that one trial's processes hold."""
        return max(sum(m.host * m.processes for m in c.plan.memory) for c in self.corners)

    @property
    def shared(self) -> tuple[Plan, ...]:
        """Runs whose stores all trials that ask the same read."""
        kept = [c.plan for c in self.corners if not any(self.config.space[p].rescore for p in c.probe.point)]
        return tuple(kept)

    @property
    def has_control(self) -> bool:
        """Whether some trial is taught by somebody, so that its control would not be the same run again."""
        return self.config.baseline and any(taught(c.plan.strategy) for c in self.corners)

    @property
    def first_evaluation(self) -> int:
        periods = (self.plan.job.run.evaluate.every_steps, self.plan.job.run.checkpoint.every_steps)
        return min(p for p in (*periods, self.plan.steps) if p)


def search_plan(recipe_file: Path | Mapping[str, Any], overrides: Sequence[str], cluster: Mapping[str, Any], name: str = "") -> SearchPlan:
    """Checks a recipe with a `search:` block; `Refusal` names the first thing that cannot work. Loads no weights and begins nothing.

    With `name` it is a search that goes on. `cluster` is the content of a `ray_config.yaml`.
    """
    content = read_content(recipe_file, overrides)
    where = str(recipe_file) if isinstance(recipe_file, Path) else "recipe"
    job = load_job(content, (), cluster)
    if job.search is None:
        do = "Add `search: {space: {train.lr: {log_uniform: [1e-4, 1e-2]}}}`, or type `distill run`."
        raise Refusal(where, "no search block", "a recipe that says what to search", do)
    machine.check_storage(job.cluster.storage)
    stem = recipe_file.stem if isinstance(recipe_file, Path) else "search"
    own = name or new_name(job, stem)
    spec = _spec(own, content, cluster, job)
    corners = tuple(_corners(job.search, spec, own))
    _check_comparable(job.search, corners)
    teachers = pooled([c.plan for c in corners])
    spec = replace(spec, pooled=tuple(t.name for t in teachers))
    corners = tuple(replace(c, plan=seated(c.plan, spec.pooled, own, spec.at_once)) for c in corners)
    found = SearchPlan(own, job.search, spec, corners, teachers)
    _check_objectives(found)
    _check_scheduler(found)
    check_population(job.search, spec, [c.plan for c in corners])
    _check_resources(found)
    propose(job.search, spec.content, 0, (), {})  # a grid may refuse a domain
    return found


def _spec(name: str, content: Mapping[str, Any], cluster: Mapping[str, Any], job: Job) -> Spec:
    """What trials are told. Signals come from stores that are filled first, unless the recipe wants them live."""
    assert job.search is not None
    kept = {key: value for key, value in content.items() if key not in ("search", "name", "baseline")}
    mode = get(kept, ["signals", "mode"])
    if mode in (ABSENT, "auto"):
        put(kept, ["signals", "mode"], "store")
    where = {**cluster, "storage": Folder.of(job.cluster.storage).root}
    if job.search.concurrent > 1 and job.cluster.resources.worker.threads is None:
        threads = max(1, machine_cpus() // (job.search.concurrent * job.run.train.most_workers))
        where["resources"] = {**_dict(cluster.get("resources"))}
        put(where, ["resources", "worker", "threads"], threads)
    return Spec(name, kept, where, os.getcwd(), job.search.objective, at_once=job.search.concurrent, every_steps=comparison_steps(job))


def _dict(value: Any) -> dict[str, Any]:
    return {k: dict(v) if isinstance(v, dict) else v for k, v in value.items()} if isinstance(value, Mapping) else {}


def _corners(config: SearchConfig, spec: Spec, name: str) -> list[Corner]:
    """The run of every corner of the space, each of them once."""
    found: list[Corner] = []
    for probe in probes(config.space, spec.content):
        if any(probe.point == c.probe.point and not config.space[probe.path].rescore for c in found):
            continue
        try:
            found.append(Corner(probe, make_plan(spec.job(probe.point), f"{name}-trial")))
        except Refusal as refused:
            values = ", ".join(f"{path} = {value!r}" for path, value in probe.point.items())
            same = refused.where.endswith(f" {probe.path}")
            where = f"search.space: {probe.path}" + ("" if same else f" ({refused.where})")
            raise Refusal(where, refused.got, refused.expected, f"{refused.do} (tried: {values})") from refused
    return found


def _check_comparable(config: SearchConfig, corners: Sequence[Corner]) -> None:
    """All trials are measured on the same rows; those that ask a teacher the same read one store."""
    first = _rows(corners[0].plan)
    for corner in corners:
        if _rows(corner.plan) != first:
            where, got = f"search.space: {corner.probe.path}", "values with other held-out rows"
            do = "Leave out what changes the data or the tokenizer, or name a held-out source that stays the same."
            raise Refusal(where, got, "the same rows for all trials, to compare them on", do)
    for path in dict.fromkeys(c.probe.path for c in corners):
        if not config.space[path].rescore:
            _check_store(path, [c for c in corners if c.probe.path == path])


def _check_store(path: str, corners: Sequence[Corner]) -> None:
    """The values of one path ask no teacher for more than one store, everything else being alike."""
    asked: dict[tuple[Any, str], str] = {}
    for corner in corners:
        rest = repr({p: v for p, v in corner.probe.point.items() if p != path})
        for wanted in corner.plan.sources.read:
            before = asked.setdefault((rest, wanted.spec.name), wanted.files.folder.root)
            if before != wanted.files.folder.root:
                field = wanted.spec.key.differences(_key(corners, before))[0][0]
                got = f"values that ask {wanted.spec.name!r} different questions ({field} differs)"
                do = "Say `rescore: true` beside the domain if each value is worth a store of its own, or leave the path out."
                raise Refusal(f"search.space: {path}", got, "one store of signals that all trials read", do)


def _key(corners: Sequence[Corner], root: str) -> Any:
    return next(w.spec.key for c in corners for w in c.plan.sources.read if w.files.folder.root == root)


def _rows(plan: Plan) -> str:
    """Digest of the held-out rows as the student reads them."""
    rows = Rows(plan.data.folder, "held_out")
    columns = rows.read(np.arange(len(rows)))
    return hashlib.sha256(b"".join(columns[name].tobytes() for name in ("lengths", "tokens", "loss_mask"))).hexdigest()


def _check_objectives(found: SearchPlan) -> None:
    for objective in found.config.objective:
        known = {*COSTS, *(set.intersection(*({*evaluation_metrics(c.plan.job, c.plan.strategy)} for c in found.corners)))}
        if objective.metric not in known:
            expected = f"a held-out metric that all trials have, or a cost: {', '.join(sorted(known))}"
            near = nearest(objective.metric, known) or "What is trained on changes from trial to trial; choose a held-out metric. "
            raise Refusal("search.objective", repr(objective.metric), expected, near.strip())
    if not found.plan.data.held_out.rows:
        raise Refusal("data.held_out_rows", "0", "rows to compare trials on", "Set data.held_out_rows.")


def _check_scheduler(found: SearchPlan) -> None:
    scheduler, steps = found.config.scheduler, min(c.plan.steps for c in found.corners)
    if scheduler.type == "none":
        return
    if not found.config.objective[0].metric.startswith(EVALUATIONS):
        do = "Put a held-out metric first, or set search.scheduler=none."
        raise Refusal("search.objective", found.config.objective[0].metric, "a held-out metric for the scheduler to look at", do)
    if scheduler.type == "pbt":
        return
    first = scheduler.first_steps or found.first_evaluation
    if found.first_evaluation >= steps or first >= steps:
        do = f"Set evaluate.every_steps to a part of the {steps} steps, or search.scheduler=none."
        got = f"a first look after {max(first, found.first_evaluation)} of {steps} steps"
        raise Refusal(f"search.scheduler: {scheduler.type}", got, "evaluations before the last step, to pause or stop trials at", do)


def _check_resources(found: SearchPlan) -> None:
    """As many trials as may run at once fit together."""
    if not machine.is_local(found.plan.job):
        return
    wanted, own = found.config.concurrent, [t.demand for t in found.pooled]
    there = machine_cpus() - sum(d.processes * d.share.cpus for d in own)
    beside = " beside the teachers that all of them ask" if own else ""
    fit = floor(there / found.cpus + 1e-9)
    if wanted > fit:
        got = f"{wanted} trials of {found.cpus:g} logical CPUs each"
        do = f"Set search.concurrent={max(1, fit)}, or lower resources.*.cpus in ray_config.yaml."
        raise Refusal("search.concurrent", got, f"at most the {there:g} of this machine{beside}", do)
    gpus = torch.cuda.device_count() - sum(d.processes * d.share.gpus for d in own)
    if wanted * found.gpus > gpus:
        got = f"{wanted} trials of {found.gpus:g} GPUs each"
        do = f"Set search.concurrent={max(1, floor(gpus / found.gpus))}."
        raise Refusal("search.concurrent", got, f"at most the {gpus:g} of this machine{beside}", do)
    memory = machine.machine_memory() - sum(t.memory.host * t.memory.processes for t in found.pooled)
    if wanted * found.memory > memory:
        got = f"{wanted} trials of {machine.text(found.memory)} each"
        do = f"Set search.concurrent={max(1, memory // found.memory)}."
        raise Refusal("search.concurrent", got, f"at most the {machine.text(memory)} of this machine{beside}", do)


def going_on(found: SearchPlan, parent: str) -> SearchPlan:
    """The same search, whose trials are children of an MLflow run."""
    return replace(found, spec=replace(found.spec, parent=parent))
