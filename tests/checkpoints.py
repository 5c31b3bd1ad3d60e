"""Checkpoints of tiny students for tests of what reads them, written by the layouts themselves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from cluster.storage import Folder
from orchestrator import checkpoint
from orchestrator.config import RunConfig, load_job
from orchestrator.players import load_players
from tests.tiny import tiny_model, tiny_tokenizer

PADDED = 520
"""Vocabulary rows of the models; their tokenizer has 512 ids."""
IDS = torch.arange(24).reshape(2, 12) * 5 % 512
Change = Callable[[dict[str, torch.Tensor]], object]


def save_models(home: Path) -> Path:
    """A folder with the saved models `tied` and `untied`."""
    for name in ("tied", "untied"):
        tiny_tokenizer(home / name)
        tiny_model(home / name, vocab_size=PADDED, tied=name == "tied")
    return home


def recipe(models: Path, name: str = "tied", **student: object) -> RunConfig:
    content = {"student": {"model": str(models / name), **student}, "strategy": "logits", "data": "x"}
    return load_job({**content, "train": {"steps": 10, "layout": "single"}}).run


def trained(run: RunConfig) -> tuple[Folder, torch.Tensor]:
    """A checkpoint of a student whose trained weights have moved, and its logits."""
    players = load_players(run, run.strategy.build().players, torch.device("cpu"))
    network = players["student"].module
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        logits = network.eval().model(input_ids=IDS).logits
    saved = checkpoint.save(players, checkpoint.Position(7, 1, {"eval/cross_entropy": 2.5, "eval/perplexity": 12.0}), 0)
    return Folder(saved.path), logits


def rewritten(source: Folder, change: Change) -> Folder:
    """A checkpoint with the same position whose model tensors `change` has been at."""
    names = dcp.FileSystemReader(source.root).read_metadata().state_dict_metadata
    state = {n: torch.zeros(e.size) for n, e in names.items() if n.startswith("student.model.")}
    dcp.load(state, storage_reader=dcp.FileSystemReader(source.root), no_dist=True)
    change(state)
    folder = Path(source.root + "-rewritten")
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    shutil.copy(Path(source.root, checkpoint.PROGRESS), folder)
    return Folder(str(folder))


def save_shared(recipes: str, folder: str, rank: int) -> None:
    """Body of one of two processes that share untrained students, one after the other, and save them under `recipes`' names."""
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    for name, content in json.loads(recipes).items():
        run = load_job(content).run
        players = load_players(run, run.strategy.build().players, torch.device("cpu"))
        part = checkpoint.save(players, checkpoint.Position(1, 1, {}), rank)
        shutil.copytree(part.path, f"{folder}/{name}", dirs_exist_ok=True)  # as Ray Train merges them
    dist.destroy_process_group()
