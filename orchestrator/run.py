"""The front door: `distill` and `resume`. Imports little, so that Ray starts while the rest is imported and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cluster import session
from cluster.config import ClusterConfig
from cluster.resources import Share, together
from cluster.storage import Folder
from orchestrator.config import Job, load_job
from orchestrator.display import Display
from orchestrator.errors import Refusal
from orchestrator.result import RunResult
from orchestrator.saved_run import saved_job

if TYPE_CHECKING:
    from orchestrator.filling import Filled
    from orchestrator.plan import Plan

P = TypeVar("P")


def distill(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    cluster: str | Path | Mapping[str, Any] | None = None,
    display: Display | None = None,
) -> RunResult:
    """Runs a recipe to its end and returns what it left.

    `recipe` and `cluster` are YAML files or mappings; `overrides` are dotted, such as `train.lr=2e-5`. Raises
    `Refusal` before anything is created, `RunFailed` or `Interrupted` afterwards.
    """
    source = Path(recipe) if isinstance(recipe, str) else recipe
    job = load_job(source, overrides, Path(cluster) if isinstance(cluster, str) else cluster)
    name = source.stem if isinstance(source, Path) else "run"

    def planned(job: Job) -> Plan:
        from orchestrator.plan import make_plan

        return make_plan(job, name)

    return _run(job, planned, display or Display())


def resume(
    folder: str | Path,
    overrides: Sequence[str] = (),
    cluster: str | Path | Mapping[str, Any] | None = None,
    display: Display | None = None,
) -> RunResult:
    """Goes on with an unfinished run from its last committed checkpoint. `folder` may be a URI.

    The recipe is the run's own; `overrides` may change only what does not change its result, such as `train.workers`.
    """
    home = Folder.of(str(folder))
    base = saved_job(home, overrides, Path(cluster) if isinstance(cluster, str) else cluster)
    storage, _, name = home.root.rpartition("/")
    job = Job(run=base.run, cluster=base.cluster.model_copy(update={"storage": storage}))

    def planned(job: Job) -> Plan:
        from orchestrator.plan import make_plan

        return make_plan(job, name, resume=home)

    return _run(job, planned, display or Display())


def _run(job: Job, planned: Callable[[Job], Plan], display: Display) -> RunResult:
    plan = planned_with_ray(job.cluster, lambda: planned(job), display)
    tell_of_room("The run", together(plan.demands), display)
    plan, _ = with_texts(plan, planned, display)
    from orchestrator.driver import drive

    return drive(plan, display)


def tell_of_room(who: str, held: Share, display: Display) -> None:
    """Says what the cluster lacks for what is held for good. More nodes may be on their way, so this is no refusal, but without them the
    run waits for ever."""
    if lacks := held.short_of(session.room()):
        display.alarm(f"{who} holds {lacks} that the cluster has now: it waits until nodes join.")


def with_texts(plan: Plan, planned: Callable[[Job], Plan], display: Display) -> tuple[Plan, dict[str, Filled]]:
    """The plan, made anew on the texts of its teachers once they are written, and what writing took by store; what fails here
    leaves the parts that are there."""
    writings = plan.writings()
    if not writings:
        return plan, {}
    from orchestrator.filling import fill
    from orchestrator.plan import plan_text

    display.plan(plan_text(plan))
    took = {}
    for each in writings:
        took[each.files.folder.root] = fill(each, display)
    named = plan.job.run.model_copy(update={"name": plan.name})
    return planned(plan.job.model_copy(update={"run": named})), took


def check_address(cluster: ClusterConfig) -> None:
    """`Refusal` for an address that takes jobs and no drivers."""
    if (address := cluster.ray_address).startswith(("http://", "https://")):
        do = "distill submit run RECIPE sends it there; to run here, set address: local."
        raise Refusal("address", f"the Jobs URL {address}", "local, auto, host:port or ray://host:port for a run that starts here", do)


def planned_with_ray(cluster: ClusterConfig, planned: Callable[[], P], display: Display) -> P:
    """A checked plan, and Ray. The checks import and read for seconds in a thread of their own, while Ray starts in this one:
    Ray's processes end with the thread that started them."""
    check_address(cluster)
    with ThreadPoolExecutor(1) as pool:
        planning = pool.submit(planned)
        started_here = session.start(cluster, display.verbose)
        try:
            plan = planning.result()
        except BaseException:
            if started_here:
                session.stop()
            raise
    return plan
