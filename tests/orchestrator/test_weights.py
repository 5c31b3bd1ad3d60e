"""Weights out of a checkpoint: whatever layout wrote them, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from pyarrow import fs
from ray.train import Checkpoint

from cluster.storage import Folder
from orchestrator import weights
from orchestrator.errors import RunFailed
from orchestrator.models import load_student
from orchestrator.weights import load_weights
from tests.checkpoints import IDS, recipe, rewritten, save_models, trained


@pytest.fixture(autouse=True)
def checkpoints_go_with_the_test(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are written below the system's temporary folder, where nobody would remove them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("checkpoints")))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def test_flat_tensors_as_zero_saves_them_take_the_students_shape(models: Path) -> None:
    run = recipe(models, "untied")
    source, logits = trained(run)
    flat = rewritten(source, lambda state: state.update({n: t.flatten() for n, t in state.items()}))
    student = load_student(run.student, gradient_checkpointing=False, seed=0)
    load_weights(flat, "student", student)
    assert torch.equal(student(input_ids=IDS).logits, logits)


@pytest.mark.slow
def test_what_two_processes_saved_is_read_by_one(models: Path, tmp_path: Path) -> None:
    layouts = [{"type": "ddp"}, {"type": "fsdp2"}, *({"type": "deepspeed", "zero_stage": stage} for stage in (2, 3))]
    cases = {f"{name}{number}": (name, layout) for name in ("tied", "untied") for number, layout in enumerate(layouts)}
    recipes = {case: two_workers(models, name, layout) for case, (name, layout) in cases.items()}
    code = "import sys; from tests.checkpoints import save_shared as s; s(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
    ranks = [subprocess.Popen([sys.executable, "-c", code, json.dumps(recipes), str(tmp_path), str(rank)]) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    for case, (name, _) in cases.items():
        config = recipe(models, name, init="random").student
        student = load_student(config, gradient_checkpointing=False, seed=0)
        load_weights(Folder(str(tmp_path / case)), "student", student)
        wanted = load_student(config, gradient_checkpointing=False, seed=1).state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in student.state_dict().items()), case


def two_workers(models: Path, name: str, layout: dict[str, object]) -> dict[str, object]:
    """A recipe whose student starts from the fresh weights of seed 1."""
    run = recipe(models, name, init="random").model_dump(mode="json")
    return {**run, "seed": 1, "train": {"steps": 1, "layout": layout, "workers": 2}}


def test_one_name_of_a_tied_head_is_enough(models: Path) -> None:
    run = recipe(models)
    source, logits = trained(run)
    single = rewritten(source, lambda state: state.pop("student.model.model.lm_head.weight", None))
    student = load_student(run.student, gradient_checkpointing=False, seed=0)
    load_weights(single, "student", student)
    assert torch.equal(student(input_ids=IDS).logits, logits)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("content", [None, b"", b"PK garbage"])
def test_damaged_files_are_refused_in_one_sentence(models: Path, file: str, content: bytes | None) -> None:
    run = recipe(models)
    source, _ = trained(run)
    path = Path(source.root, file)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(RunFailed, match="cannot be read"):
        load_weights(source, "student", load_student(run.student, gradient_checkpointing=False, seed=0))


def test_a_player_that_is_not_there_is_named(models: Path) -> None:
    run = recipe(models)
    source, _ = trained(run)
    with pytest.raises(RunFailed, match="got the players student; expected 'critic'"):
        load_weights(source, "critic", load_student(run.student, gradient_checkpointing=False, seed=0))


def test_a_checkpoint_in_remote_storage_is_downloaded(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recipe(models)
    source, logits = trained(run)
    remote = fs.SubTreeFileSystem(source.root, fs.LocalFileSystem())
    monkeypatch.setattr(weights, "Checkpoint", lambda root: Checkpoint("/", filesystem=remote))
    student = load_student(run.student, gradient_checkpointing=False, seed=0)
    load_weights(Folder("s3://bucket/run/checkpoint"), "student", student)
    assert torch.equal(student(input_ids=IDS).logits, logits)
