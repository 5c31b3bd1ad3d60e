"""From a checkpoint to a Hugging Face folder that anybody can load, proved by loading it in a fresh process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cluster.causal_lm import probing
from cluster.seal import Key
from cluster.storage import Folder
from orchestrator import checkpoint
from orchestrator.config import RunConfig
from orchestrator.errors import Refusal, RunFailed
from orchestrator.lineage import LINEAGE, lineage_of, lineage_of_recipe
from orchestrator.model_card import Manifest, card, versions
from orchestrator.models import load_student, load_tokenizer
from orchestrator.plan import Plan
from orchestrator.reload import ADAPTER, PROOF, Reloaded, quiet_libraries, write_proof
from orchestrator.saved_run import saved_job
from orchestrator.sealing import sealing_key
from orchestrator.truncate import begins_as_saved
from orchestrator.weights import load_weights

BOUNDS = {"float32": 1e-5}
"""Largest logit difference after a reload, over the largest logit, by dtype of the weights."""
ROUNDED_BOUND = 0.02
"""The same for 16-bit weights, whose sums may be rounded another way in another process."""

ExportDtype = Literal["trained", "float32", "bfloat16"]


@dataclass(frozen=True)
class _Written:
    """What is known of a student once its files are written."""

    dtype: str
    parameters: int
    has_template: bool


def export_student(  # noqa: PLR0913 - each is named where it is called
    run: RunConfig,
    source: Folder,
    to: Path,
    *,
    player: str = "student",
    merge_lora: bool = True,
    lineage: Mapping[str, str | float],
    dtype: ExportDtype = "trained",
    key: Key | None = None,
) -> Path:
    """Writes the student of the checkpoint `source` as the new folder `to`, proves that it reloads, and returns `to`.

    Safetensors, tokenizer with chat template, generation settings, model card, `export.json` (`Manifest`) and the proof.
    A LoRA student is merged, or kept as an adapter over its base with `merge_lora=False`; `dtype` is that of the written
    weights; `key` that of the checkpoint's seal, which is not compared without one. Needs no process group. `Refusal` for what cannot
    be asked for; `RunFailed` for a damaged checkpoint or a failed proof. Whatever fails, `to` does not exist afterwards.
    """
    adapter = not merge_lora and run.student.lora is not None
    _check_request(run, to, adapter, dtype)
    position = _position(source)
    with _made_whole(to) as part, quiet_libraries():
        written = _write(run, source, part, player, adapter, dtype, key)
        manifest = Manifest(
            checkpoint=source.root.rstrip("/").rpartition("/")[2],
            step=position.step,
            player=player,
            adapter=adapter,
            dtype=written.dtype,
            parameters=written.parameters,
            difference=prove_export(part, adapter, run.student.trust_remote_code),
            bound=_bound(written.dtype),
            metrics=position.metrics,
            lineage=lineage,
            versions=versions(),
        )
        manifest.save(part)
        title = str(lineage.get("run") or run.name or "Distilled student")
        (part / "README.md").write_text(card(manifest, run, title, written.has_template), encoding="utf-8")
    return to


def export_checkpoint(plan: Plan, source: Folder, to: Path) -> Path:
    """Exports a checkpoint of a planned run, with LoRA merged, and keeps the run's lineage in its folder."""
    lineage = lineage_of(plan)
    plan.folder.write(LINEAGE, json.dumps(lineage, indent=1).encode())
    return export_student(plan.job.run, source, to, lineage=lineage, key=sealing_key(plan.job.cluster))


def export_from_run(
    home: Folder, to: Path | None, wanted: str, adapter: bool, dtype: ExportDtype, cluster: Path | Mapping[str, Any] | None = None
) -> Path:
    """Exports the checkpoint `wanted` (`best`, `last` or a name) of the run in `home`; `to` is `home/export` when absent. `cluster`, a
    `ray_config.yaml` or its content, says which key checkpoints are sealed with."""
    if to is None and home.local is None:
        raise Refusal("--to", "nothing, for a run in remote storage", "a new local folder", "Add --to FOLDER.")
    target = to or Path(home.root) / "export"
    job = saved_job(home, (), cluster)
    run = job.run
    if adapter and run.student.lora is None:
        raise Refusal("--adapter", "a student without LoRA", "a recipe with student.lora", "Leave --adapter out.")
    source = _chosen(home, run, wanted)
    content = home.read(LINEAGE)
    lineage = json.loads(content) if content else lineage_of_recipe(home, run)
    return export_student(run, source, target, merge_lora=not adapter, lineage=lineage, dtype=dtype, key=sealing_key(job.cluster))


def prove_export(folder: Path, adapter: bool, trust_remote_code: bool = False) -> float:
    """Reloads the student of `folder` in a fresh process and returns by how much its logits on a fixed batch differ from
    those it gave in memory, over the largest logit.

    `RunFailed` when it does not load, differs by more than float32 rounding explains (1e-5; 0.02 for 16-bit weights), or has
    another tokenizer or chat template.
    """
    if adapter != (folder / ADAPTER).is_file():
        raise RunFailed(f"export {folder}: got {'no' if adapter else 'an'} {ADAPTER}; expected {'one' if adapter else 'a whole model'}.")
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    command = [sys.executable, "-m", "orchestrator.reload", str(folder.absolute())]
    command += ["--trust-remote-code"] if trust_remote_code else []
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RunFailed(f"export {folder}: a fresh process cannot load it ({said[-1] if said else f'exit {done.returncode}'}).")
    found = Reloaded(**json.loads(done.stdout.strip().splitlines()[-1]))
    bound = _bound(proved_dtype(folder))
    if not found.difference <= bound:
        raise RunFailed(f"export {folder}: reloaded logits differ by {found.difference:.2g} of the largest; expected at most {bound:g}.")
    if not (found.same_tokens and found.same_template):
        what = "chat template" if found.same_tokens else "tokenizer"
        raise RunFailed(f"export {folder}: the reloaded {what} is not the one that was saved.")
    return found.difference


def proved_dtype(folder: Path) -> str:
    """Dtype of an exported student's weights; `RunFailed` when the folder carries no proof."""
    if not (folder / PROOF).is_file():
        raise RunFailed(f"export {folder}: got no {PROOF}; expected a student written by `distill export`.")
    with np.load(folder / PROOF, allow_pickle=False) as proof:
        return str(proof["dtype"])


def _check_request(run: RunConfig, to: Path, adapter: bool, dtype: ExportDtype) -> None:
    if to.exists():
        raise Refusal("export folder", f"{str(to)!r}, which exists", "a new folder", "Name another one with --to, or remove it.")
    if adapter and not begins_as_saved(run.student):
        do = "Export it merged: leave --adapter out."
        raise Refusal("export of an adapter", "a base of fresh or cut weights, which is saved nowhere", "a saved base model", do)
    if adapter and dtype != "trained":
        raise Refusal("export of an adapter", f"dtype {dtype}", "the dtype it was trained in", "Leave --dtype out, or merge it.")


def _position(source: Folder) -> checkpoint.Position:
    try:
        return checkpoint.read_position(source)
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise RunFailed(f"checkpoint {source.root}: {error}. Expected a committed checkpoint of a run.") from error


def _chosen(home: Folder, run: RunConfig, wanted: str) -> Folder:
    kept = checkpoint.kept(home)
    names = [f.root.rpartition("/")[2] for f in kept]
    if not kept:
        do = "Let the run reach its first checkpoint: distill run --resume " + home.root
        raise Refusal(f"run folder {home.root!r}", "no committed checkpoint", "at least one", do)
    if wanted == "best":
        return checkpoint.best(home, run.checkpoint.best_metric) or kept[-1]
    if wanted == "last":
        return checkpoint.committed(home) or kept[-1]
    if wanted not in names:
        raise Refusal("--checkpoint", repr(wanted), f"best, last or one of {', '.join(names)}", "Choose one that is kept.")
    return home.child(wanted)


@contextmanager
def _made_whole(to: Path) -> Iterator[Path]:
    """A folder next to `to` that takes its name once the block has ended well, and is removed otherwise."""
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.parent / f".{to.name}.{os.getpid()}.part"
    part.mkdir()
    try:
        yield part
        part.rename(to)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(run: RunConfig, source: Folder, part: Path, player: str, adapter: bool, dtype: ExportDtype, key: Key | None) -> _Written:
    """Everything but the manifest and the card. The network is gone when this returns."""
    tokenizer = load_tokenizer(run.student)
    model: Any = load_student(run.student, gradient_checkpointing=False, seed=run.seed)
    load_weights(source, player, model, key)
    if isinstance(model, PeftModel) and not adapter:
        model = model.merge_and_unload()
    if dtype != "trained":
        model = model.to(getattr(torch, dtype))
    if adapter:
        _name_base(model, run)
        model.save_pretrained(str(part), save_embedding_layers=False)
    else:
        _ready_to_generate(model, tokenizer, run)
        model.save_pretrained(str(part))
    tokenizer.save_pretrained(str(part))
    weights = str(model.get_base_model().dtype if adapter else model.dtype).removeprefix("torch.")
    with probing(model):
        write_proof(part, model, tokenizer, weights)
    _check_finite(part, source)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad or not adapter)
    return _Written(weights, parameters, tokenizer.chat_template is not None)


def _check_finite(part: Path, source: Folder) -> None:
    with np.load(part / PROOF, allow_pickle=False) as proof:
        if not np.isfinite(proof["logits"]).all():
            raise RunFailed(f"checkpoint {source.root}: the student's logits are not finite. Use an earlier checkpoint.")


def _name_base(model: PeftModel, run: RunConfig) -> None:
    """Tells the adapter where its base is; a local one by its whole path, so that the folder may be opened from anywhere."""
    local = Path(run.student.model).expanduser()
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(local.absolute()) if local.is_dir() else run.student.model
        config.revision = run.student.revision


def _ready_to_generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: RunConfig) -> None:
    """Settings for those who generate: the cache that training switches off, and the student's own generation settings."""
    model.config.use_cache = True
    folder = Path(run.student.model).expanduser()
    if run.student.init == "random" and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    settings: Any = model.generation_config
    settings.use_cache = True
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    try:
        settings.validate(strict=True)
    except ValueError:  # published models name a temperature and forget do_sample, and then nothing could be saved
        settings.do_sample = True


def _bound(dtype: str) -> float:
    return BOUNDS.get(dtype, ROUNDED_BOUND)
