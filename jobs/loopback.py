"""`distill cluster up`, `status` and `down`."""

from __future__ import annotations

from rich.table import Table

from cluster import loopback
from orchestrator.display import console
from orchestrator.errors import Refusal


def start(name: str, nodes: int, cpus: int, gpus: int, object_store_mib: int) -> None:
    """Starts a cluster on this machine and says how to use it."""
    out = console()
    out.print(f"Starting {nodes} nodes; this takes some ten seconds ...")
    size = loopback.NodeSize(cpus, gpus, object_store_mib)
    try:
        cluster = loopback.up(loopback.folder_of(name), [size] * nodes)
    except loopback.LoopbackError as error:
        do = "`distill cluster status` shows what runs; `distill cluster down` ends it."
        raise Refusal("distill cluster up", str(error), "nodes that start", do) from error
    join = " ".join(f"{key}={value}" for key, value in cluster.environment.items())
    out.print(f"Nodes    {', '.join(cluster.alive())}, each {cpus} CPUs" + (f", {gpus} GPUs" if gpus else ""))
    out.print(f"Jobs     {cluster.dashboard}")
    out.print(f"Token    {cluster.folder}/{loopback.TOKEN}", soft_wrap=True)
    out.print("Submit   distill submit run RECIPE", soft_wrap=True)
    out.print(f"Join     {join} distill run RECIPE", soft_wrap=True)
    out.print(f"End      distill cluster down{'' if name == 'loopback' else f' --name {name}'}", soft_wrap=True)


def show() -> None:
    """The clusters of this machine, with what of them is alive."""
    out = console()
    found = loopback.running()
    if not found:
        out.print("No cluster runs here. `distill cluster up --nodes 3` starts one.")
        return
    table = Table(title="Clusters on this machine", title_justify="left")
    for column in ("name", "nodes alive", "jobs", "address", "processes"):
        table.add_column(column, overflow="fold")
    for cluster in found:
        alive = f"{_alive(cluster)} of {len(cluster.nodes)}"
        name = cluster.folder.rpartition("/")[2]
        table.add_row(name, alive, cluster.dashboard, cluster.address, str(len(loopback.processes(cluster))))
    out.print(table)


def end(name: str) -> None:
    """Ends a cluster and removes its folder."""
    cluster = loopback.find(loopback.folder_of(name))
    if cluster is None:
        raise Refusal("distill cluster down", f"no cluster named {name!r}", "one that `up` started", "`distill cluster status` lists them.")
    ended = loopback.down(cluster)
    console().print(f"Ended {len(ended)} processes of {name}.")


def _alive(cluster: loopback.Loopback) -> str:
    try:
        return str(len(cluster.alive()))
    except OSError:  # its dashboard starts or has ended
        return "?"
