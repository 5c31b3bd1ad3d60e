"""Training state is sealed as it is written, and loaded only if it is what was sealed."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from ray.train import Checkpoint

from cluster.seal import Key
from cluster.storage import Folder
from orchestrator import checkpoint
from orchestrator.errors import RunFailed
from orchestrator.players import load_players
from tests.checkpoints import recipe, save_models

KEY = Key(b"k" * 32)
POSITION = checkpoint.Position(7, 1, {})


def test_what_is_sealed_is_restored_with_its_key_alone(tmp_path: Path) -> None:
    run = recipe(save_models(tmp_path))
    players = load_players(run, run.strategy.build().players, torch.device("cpu"))
    folder = tmp_path / checkpoint.name_of(POSITION.attempt, POSITION.step)
    shutil.move(checkpoint.save(players, POSITION, 0, key=KEY).path, folder)
    saved = Checkpoint.from_directory(folder)
    assert checkpoint.restore(players, saved, KEY).step == POSITION.step
    with pytest.raises(RunFailed, match="another key"):
        checkpoint.restore(players, saved, Key(b"j" * 32))
    (folder / checkpoint.PROGRESS).write_text("{}")
    with pytest.raises(RunFailed, match=f"{checkpoint.PROGRESS} was changed"):
        checkpoint.restore(players, saved, KEY)


def test_the_best_checkpoint_is_one_whose_metric_is_finite(tmp_path: Path) -> None:
    """Ray names those that it cannot rank first."""
    home, names = Folder(str(tmp_path)), [checkpoint.name_of(1, step) for step in (3, 1, 2)]
    for name, value in zip(names, (math.nan, 2.0, 1.0), strict=True):
        position = checkpoint.Position(1, 1, {"eval/cross_entropy": value}, (), {}, {})
        home.child(name).write(checkpoint.PROGRESS, json.dumps(dataclasses.asdict(position)).encode())
    results = [{"checkpoint_dir_name": name} for name in names]
    home.write(checkpoint.SNAPSHOT, json.dumps({"checkpoint_results": results, "latest_checkpoint_result": results[0]}).encode())
    best = checkpoint.best(home, "eval/cross_entropy")
    assert best is not None and best.root.endswith(names[2])
