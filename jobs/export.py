"""`distill export`."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from cluster.storage import Folder
from jobs.run import cluster_file
from orchestrator.display import console
from orchestrator.export import ExportDtype, export_from_run
from orchestrator.model_card import Manifest


def export_run(
    run_folder: str, to: Path | None, checkpoint: str, adapter: bool, dtype: ExportDtype = "trained", cluster: Path | None = None
) -> None:
    """Exports a run's student and says where it is, how large, how well it reloads, and what to do next."""
    home = Folder.of(run_folder)
    folder = export_from_run(home, to, checkpoint, adapter, dtype, cluster_file(cluster))
    made = Manifest.load(folder)
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    kind = "LoRA adapter" if made.adapter else "student"
    out = console()
    says = f": {kind} of {made.checkpoint}, {made.parameters:,} parameters in {made.dtype}, {megabytes:,.1f} MB"
    out.print(Text.assemble((str(folder), "bold"), says), soft_wrap=True)
    proof = f"Reloaded in a fresh process: logits differ by {made.difference:.2g} of the largest (at most {made.bound:g} passes)"
    out.print(proof, soft_wrap=True)
    rows = f"--recipe {home.root}/recipe.yaml" if home.local else "--data SOURCE"
    out.print(f"Next: distill evaluate {folder} {rows}", soft_wrap=True)
