"""Export: a checkpoint becomes a folder that loads elsewhere, or nothing at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster import seal
from cluster.storage import Folder
from orchestrator import checkpoint, export
from orchestrator.config import to_yaml
from orchestrator.errors import Refusal, RunFailed
from orchestrator.export import export_from_run, export_student, prove_export
from orchestrator.reload import load_saved
from orchestrator.result import RECIPE
from tests.checkpoints import IDS, PADDED, Change, recipe, rewritten, save_models, trained

LINEAGE = {"run": "tiny", "data": "nowhere"}


@pytest.fixture(autouse=True)
def checkpoints_go_with_the_test(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are written below the system's temporary folder, where nobody would remove them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("checkpoints")))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fresh process, which takes seconds, where another test has one."""
    monkeypatch.setattr(export, "prove_export", lambda *given: 0.0)


def test_a_merged_lora_student_reloads_in_a_fresh_process_with_its_logits(models: Path, tmp_path: Path) -> None:
    run = recipe(models, lora={"r": 4})
    source, logits = trained(run)
    folder = export_student(run, source, tmp_path / "deep" / "out", lineage=LINEAGE)
    made = json.loads((folder / "export.json").read_text())
    assert made["difference"] <= made["bound"] == 1e-5
    assert (made["step"], made["dtype"], made["adapter"]) == (7, "float32", False)
    torch.testing.assert_close(load_saved(str(folder))(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)
    with np.load(folder / "proof.npz") as proof:
        kept = {name: proof[name] for name in proof.files}
    np.savez(folder / "proof.npz", **{**kept, "logits": kept["logits"] * 1.001})
    with pytest.raises(RunFailed, match="reloaded logits differ by 0.001 of the largest; expected at most 1e-05"):
        prove_export(folder, adapter=False)


@pytest.mark.slow
def test_an_adapter_reloads_over_the_base_it_names(models: Path, tmp_path: Path) -> None:
    run = recipe(models, lora={"r": 4})
    source, logits = trained(run)
    folder = export_student(run, source, tmp_path / "out", merge_lora=False, lineage=LINEAGE)
    torch.testing.assert_close(load_saved(str(folder))(input_ids=IDS).logits, logits, rtol=1e-5, atol=1e-5)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(models / "tied")
    assert not (folder / "model.safetensors").exists()
    assert "library_name: peft" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_a_student_written_in_bfloat16_reloads(models: Path, tmp_path: Path) -> None:
    run = recipe(models)
    source, _ = trained(run)
    folder = export_student(run, source, tmp_path / "out", lineage=LINEAGE, dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "export.json").read_text())["bound"] == 0.02


@pytest.mark.slow
def test_a_folder_whose_weights_are_gone_is_not_proved(models: Path, tmp_path: Path) -> None:
    run = recipe(models, "untied")
    source, _ = trained(run)
    folder = export_student(run, source, tmp_path / "out", lineage=LINEAGE)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunFailed, match="logits differ"):
        prove_export(folder, adapter=False)
    (folder / "model.safetensors").unlink()
    with pytest.raises(RunFailed, match="a fresh process cannot load it"):
        prove_export(folder, adapter=False)


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize(("name", "init"), [("tied", "pretrained"), ("untied", "pretrained"), ("tied", "random")])
def test_a_whole_student_keeps_its_weights_tokenizer_and_settings(models: Path, tmp_path: Path, name: str, init: str) -> None:
    run = recipe(models, name, init=init)
    source, logits = trained(run)
    folder = export_student(run, source, tmp_path / "out", lineage=LINEAGE)
    assert torch.equal(load_saved(str(folder))(input_ids=IDS).logits, logits)
    config = json.loads((folder / "config.json").read_text())
    assert (config["use_cache"], config["vocab_size"], config["tie_word_embeddings"]) == (True, PADDED, name == "tied")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0
    assert (folder / "chat_template.jinja").read_text() == (models / name / "chat_template.jinja").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("unproved")
def test_a_student_that_was_cut_out_of_a_larger_network_leaves_as_a_model_of_its_own(models: Path, tmp_path: Path) -> None:
    run = recipe(models, truncate={"layers": [1], "intermediate_size": 48})
    source, logits = trained(run)
    folder = export_student(run, source, tmp_path / "out", lineage=LINEAGE)
    assert torch.equal(load_saved(str(folder))(input_ids=IDS).logits, logits)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"], config["use_cache"]) == (1, 48, True)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0


@pytest.mark.usefixtures("unproved")
def test_the_card_says_where_the_student_comes_from(models: Path, tmp_path: Path) -> None:
    run = recipe(models)
    source, _ = trained(run)
    lineage = {**LINEAGE, "teacher big": "org/big (abc)", "train tokens": 1234567, "MLflow run": "f00"}
    text = (export_student(run, source, tmp_path / "out", lineage=lineage) / "README.md").read_text()
    front = text.split("---\n")[1]
    for line in ("base_model: tied", "library_name: transformers", "- distillation", "- perplexity"):
        assert line in front
    for words in ("org/big (abc)", "1,234,567", "f00", "arXiv:1606.07947", "type: logits", "| perplexity | 12 |", "| torch |"):
        assert words in text


@pytest.mark.usefixtures("unproved")
def test_settings_that_cannot_be_saved_are_mended(models: Path, tmp_path: Path) -> None:
    home = shutil.copytree(models / "tied", tmp_path / "models" / "tied")
    settings = json.loads((home / "generation_config.json").read_text())
    (home / "generation_config.json").write_text(json.dumps({**settings, "do_sample": False, "temperature": 0.6}))
    run = recipe(tmp_path / "models")
    source, _ = trained(run)
    folder = export_student(run, source, tmp_path / "out", lineage=LINEAGE)
    written = json.loads((folder / "generation_config.json").read_text())
    assert (written["do_sample"], written["temperature"]) == (True, 0.6)


NORM = "student.model.model.model.norm.weight"
DAMAGES: list[tuple[Change, str]] = [
    (lambda state: state.pop(NORM), "it lacks model.norm.weight. Expected"),
    (lambda state: state.update({NORM: torch.zeros(4)}), r"got model.norm.weight of shape \(4,\); expected \(32,\)"),
    (lambda state: state.update({"student.model.model.extra": torch.zeros(4)}), "it also has extra. Expected"),
    (lambda state: state.update({NORM: torch.full((32,), torch.nan)}), "not finite"),
]


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize(("change", "message"), DAMAGES, ids=["missing", "shape", "unexpected", "not finite"])
def test_damaged_weights_are_refused_and_leave_nothing(models: Path, tmp_path: Path, change: Change, message: str) -> None:
    run = recipe(models)
    source, _ = trained(run)
    with pytest.raises(RunFailed, match=message):
        export_student(run, rewritten(source, change), tmp_path / "out", lineage=LINEAGE)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_proof_leaves_nothing(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> float:
        raise RunFailed("differs")

    monkeypatch.setattr(export, "prove_export", fails)
    run = recipe(models)
    source, _ = trained(run)
    with pytest.raises(RunFailed, match="differs"):
        export_student(run, source, tmp_path / "out", lineage=LINEAGE)
    assert list(tmp_path.iterdir()) == []


def run_folder(models: Path, home: Path, key_env: str | None = None, **student: object) -> Folder:
    """A run with the checkpoints `one` and `two`, of which the first is the best."""
    run = recipe(models, **student)
    results = []
    for step, (name, loss) in enumerate((("one", 1.0), ("two", 2.0)), start=1):
        source, _ = trained(run)
        shutil.copytree(source.root, home / name)
        position = {"step": step, "attempt": 1, "metrics": {"eval/cross_entropy": loss}}
        (home / name / checkpoint.PROGRESS).write_text(json.dumps(position))
        seal.seal(home / name, name, 0, seal.key_of(seal.SealSettings(key_env=key_env)))
        results.append({"checkpoint_dir_name": name})
    (home / checkpoint.SNAPSHOT).write_text(json.dumps({"latest_checkpoint_result": results[-1], "checkpoint_results": results}))
    (home / RECIPE).write_text(to_yaml(run))
    return Folder(str(home))


@pytest.mark.usefixtures("unproved")
def test_a_run_exports_its_best_last_or_named_checkpoint(models: Path, tmp_path: Path) -> None:
    home = run_folder(models, tmp_path)
    best = export_from_run(home, None, "best", adapter=False, dtype="trained")
    last = export_from_run(home, tmp_path / "last", "last", adapter=False, dtype="trained")
    named = export_from_run(home, tmp_path / "named", "one", adapter=False, dtype="trained")
    assert best == tmp_path / "export"
    assert [json.loads((f / "export.json").read_text())["checkpoint"] for f in (best, last, named)] == ["one", "two", "one"]
    assert "sha256:" in (best / "README.md").read_text()


@pytest.mark.usefixtures("unproved")
def test_a_run_sealed_with_a_key_of_the_cluster_is_exported_with_it(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_KEY", "0f" * 32)
    home = run_folder(models, tmp_path / "run", "RUN_KEY")
    made = export_from_run(home, None, "best", False, "trained", {"seal": {"key_env": "RUN_KEY"}})
    assert (made / "model.safetensors").exists()
    with pytest.raises(RunFailed, match="another key"):
        export_from_run(home, tmp_path / "out", "best", False, "trained")


def test_what_cannot_be_exported_is_refused_at_the_door(models: Path, tmp_path: Path) -> None:
    def refused(home: Folder, to: Path | None, wanted: str, adapter: bool) -> str:
        with pytest.raises(Refusal) as caught:
            export_from_run(home, to, wanted, adapter, "trained")
        return str(caught.value)

    (tmp_path / "run").mkdir()
    assert "no recipe.yaml; expected the folder of a run" in refused(Folder(str(tmp_path)), None, "best", False)
    home = run_folder(models, tmp_path / "run", init="random", lora={"r": 2})
    assert "got 'three'; expected best, last or one of one, two" in refused(home, None, "three", False)
    assert "which exists; expected a new folder" in refused(home, tmp_path, "best", False)
    assert "a base of fresh or cut weights" in refused(home, None, "best", True)
    (tmp_path / "run" / checkpoint.SNAPSHOT).unlink()
    assert "no committed checkpoint" in refused(home, None, "best", False)
    assert "a new local folder" in refused(Folder("s3://bucket/run"), None, "best", False)
    (tmp_path / "run" / RECIPE).write_text(to_yaml(recipe(models)))
    assert "a student without LoRA" in refused(home, None, "best", True)
