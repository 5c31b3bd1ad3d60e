"""Comparison of saved models: exact numbers against a naive float64 reference, and what cannot be compared."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.comparable import check_models
from orchestrator.compare import Measuring, evaluate_models
from orchestrator.comparison_rows import rows_of_recipe, rows_of_source, saved_student
from orchestrator.errors import Refusal
from orchestrator.rows import Rows, RowWriter
from tests.tiny import tiny_model, tiny_tokenizer

VOCABULARY = 512
LENGTHS = [9, 17, 4, 30, 12, 1]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models `a`, `b` and a larger `teacher`, whose vocabularies are padded differently."""
    home = tmp_path_factory.mktemp("models")
    for seed, (name, rows, width) in enumerate((("a", 512, 32), ("b", 520, 24), ("teacher", 540, 48))):
        tiny_tokenizer(home / name)
        model = tiny_model(home / name, vocab_size=rows, width=width, tied=name != "b", seed=seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 8.0 if parameter.ndim == 2 else 1.0  # away from uniform predictions
        model.save_pretrained(home / name)
    return home


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Rows with uneven masks."""
    home = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    mask = (rng.random(sum(LENGTHS)) < 0.6).astype(np.uint8)
    mask[np.cumsum([0, *LENGTHS[:-1]])] = 0
    with RowWriter(home / "held_out") as writer:
        tokens = rng.integers(0, VOCABULARY, sum(LENGTHS)).astype(np.int32)
        writer.write(tokens, mask, np.asarray(LENGTHS, dtype=np.int32), np.arange(len(LENGTHS)))
    return Rows(str(home), "held_out")


def all_log_probs(model: Path, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """`(N, V)` float64 log-probabilities of every loss token from whole logits, one row at a time, and the tokens."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    found, labels = [], []
    for row in range(len(rows)):
        columns = rows.read(np.asarray([row]))
        ids = torch.from_numpy(columns["tokens"].astype(np.int64))
        at = torch.from_numpy(np.flatnonzero(columns["loss_mask"]))
        with torch.no_grad():
            found.append(network(input_ids=ids[None]).logits[0, at - 1, :VOCABULARY].log_softmax(-1))
        labels.append(ids[at])
    return torch.cat(found), torch.cat(labels)


def reference(model: Path, teacher: Path, rows: Rows, top_k: int) -> dict[str, float]:
    """The same measures straight from their definitions."""
    (log_q, labels), (log_p, _) = all_log_probs(model, rows), all_log_probs(teacher, rows)
    q, p = log_q.exp(), log_p.exp()
    loss = float(-log_q[torch.arange(len(labels)), labels].mean())
    fives = [set(a.tolist()) & set(b.tolist()) for a, b in zip(q.topk(5).indices, p.topk(5).indices, strict=True)]
    return {
        "cross_entropy": loss,
        "perplexity": math.exp(loss),
        "forward_kl": float((p * (log_p - log_q)).sum(-1).mean()),
        "reverse_kl": float((q * (log_q - log_p)).sum(-1).mean()),
        "top1_agreement": float((q.argmax(-1) == p.argmax(-1)).double().mean()),
        "top5_agreement": sum(len(shared) for shared in fives) / 5 / len(fives),
        "topk_mass": float(q.gather(-1, p.topk(top_k).indices).sum(-1).mean()),
    }


def test_scores_are_those_of_a_naive_float64_reference(models: Path, rows: Rows) -> None:
    names = [str(models / name) for name in ("a", "b")]
    scores = evaluate_models(names, str(models / "teacher"), rows, measuring=Measuring(top_k=7, forward_tokens=32, rows_at_once=4))
    assert [score.model for score in scores] == [*names, str(models / "teacher")]
    for score in scores:
        wanted = reference(Path(score.model), models / "teacher", rows, top_k=7)
        assert {name: value for name, value in asdict(score).items() if name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        assert score.tokens == sum(int(rows.read(np.asarray([r]))["loss_mask"].sum()) for r in range(len(rows)))
        assert score.parameters == AutoModelForCausalLM.from_pretrained(score.model).num_parameters()
    assert 0.0 < scores[0].forward_kl != scores[0].reverse_kl > 0.0  # type: ignore[operator]


def test_a_model_agrees_with_itself_exactly(models: Path, rows: Rows) -> None:
    student, teacher = evaluate_models([str(models / "b")], str(models / "b"), rows)
    for score in (student, teacher):
        assert (score.forward_kl, score.reverse_kl, score.top1_agreement, score.top5_agreement) == (0.0, 0.0, 1.0, 1.0)
    assert student.cross_entropy == teacher.cross_entropy


def test_the_number_of_models_and_the_forwards_change_nothing(models: Path, rows: Rows) -> None:
    together = evaluate_models([str(models / "a"), str(models / "b")], None, rows)
    alone = evaluate_models([str(models / "a")], None, rows, measuring=Measuring(forward_tokens=8, rows_at_once=1))
    assert together[0].cross_entropy == pytest.approx(alone[0].cross_entropy, rel=1e-5)
    assert together[0].forward_kl is None
    assert together[0].topk_mass is None


def test_only_the_chosen_rows_are_measured(models: Path, rows: Rows) -> None:
    parts = [evaluate_models([str(models / "a")], None, rows, np.asarray(part))[0] for part in ([0, 2], [1, 3, 4, 5])]
    whole = evaluate_models([str(models / "a")], None, rows)[0]
    assert sum(part.tokens for part in parts) == whole.tokens
    assert sum(part.tokens * part.cross_entropy for part in parts) == pytest.approx(whole.tokens * whole.cross_entropy, rel=1e-5)


def test_one_vocabulary_padded_differently_is_usable_up_to_the_smallest(models: Path) -> None:
    assert check_models([str(models / name) for name in ("teacher", "b")]) == 520


def test_another_tokenizer_is_refused(models: Path, rows: Rows, tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "other", vocab_size=400)
    tiny_model(tmp_path / "other", vocab_size=512)
    with pytest.raises(Refusal, match=r"tokenizer of .*other.*another vocabulary \(397 learnt tokens against 509\)"):
        evaluate_models([str(models / "a")], str(tmp_path / "other"), rows)


def test_a_special_token_of_another_meaning_is_refused(models: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "renamed")
    tokenizer.save_pretrained(tmp_path / "renamed")
    file = tmp_path / "renamed" / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_end|>", "<|end|>"))
    tiny_model(tmp_path / "renamed")
    with pytest.raises(Refusal, match="'<|end|>' for the id 2"):
        check_models([str(models / "a"), str(tmp_path / "renamed")])


def test_added_tokens_that_only_one_model_has_do_not_matter(models: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "chat")
    tokenizer.add_tokens(["<think>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "chat")
    tiny_model(tmp_path / "chat", vocab_size=513)
    assert check_models([str(models / "a"), str(tmp_path / "chat")]) == 512


def test_rows_that_a_model_cannot_read_are_refused(models: Path, rows: Rows, tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "short")
    tiny_model(tmp_path / "short", max_length_tokens=16)
    with pytest.raises(Refusal, match="one of 30 tokens; expected at most the 16 positions"):
        evaluate_models([str(tmp_path / "short")], None, rows)
    with pytest.raises(Refusal, match="no token to predict"):
        evaluate_models([str(models / "a")], None, rows, np.asarray([5]))


def test_rows_come_from_a_source_or_from_a_recipes_held_out_rows(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [{"text": f"def f{n}(x):\n    return x + {n}\n"} for n in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    chosen = rows_of_source(str(tmp_path / "d.jsonl"), [str(models / "a")], 16, tmp_path / "cache")
    assert len(chosen.indices) == 16
    assert evaluate_models([str(models / "a")], None, chosen.rows, chosen.indices)[0].cross_entropy > 0
    recipe = {"student": str(models / "a"), "strategy": "logits", "data": {"train": str(tmp_path / "d.jsonl"), "held_out_rows": 4}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    held_out = rows_of_recipe(tmp_path / "r.yaml", ["data.held_out_rows=6"], {"storage": str(tmp_path / "runs")})
    assert len(held_out.indices) == 6
    assert (tmp_path / "runs" / "data").is_dir()


def test_a_run_means_its_exported_student(tmp_path: Path) -> None:
    assert saved_student(str(tmp_path)) == str(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(Refusal, match="a run without an exported student"):
        saved_student(str(tmp_path))
    (tmp_path / "student").mkdir()
    assert saved_student(str(tmp_path)) == str(tmp_path / "student")
