"""`distill evaluate`: what it prints of answers that models write, and what it refuses before any model loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.evaluate import Generate, show_evaluation
from orchestrator.errors import Refusal
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher, and questions of which every second one has an answer."""
    folder = tmp_path_factory.mktemp("evaluate")
    for seed, name in enumerate(("student", "teacher")):
        tiny_tokenizer(folder / name)
        tiny_model(folder / name, max_length_tokens=64, seed=seed)
    rows = [{"prompt": f"return {n}? ", "completion": f"#### {n}" if n % 2 else "none"} for n in range(9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shown(home: Path, generate: Generate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.chdir(home)
    monkeypatch.setenv("COLUMNS", "160")
    show_evaluation(["student"], "teacher", "rows.jsonl", None, (), 8, generate)
    return capsys.readouterr().out


def test_judged_answers_are_shown_beside_the_figures_on_the_data(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(home, Generate(verifier="numeric", samples=2, max_new_tokens=8), monkeypatch, capsys)
    for line in ("cross-entropy", "right answers", "standard error", "right at least once in 2", "own text: KL(model ‖ teacher)"):
        assert line in text
    assert "8 prompts, 16 texts" in text
    assert "texts whose row has no answer" in text


def test_without_a_judge_texts_are_only_counted_and_without_being_asked_none_is_written(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = shown(home, Generate(wanted=True, max_new_tokens=8), monkeypatch, capsys)
    assert "finished answers" in counted
    assert "right answers" not in counted
    assert "finished answers" not in shown(home, Generate(), monkeypatch, capsys)


@pytest.mark.parametrize(
    ("generate", "words"),
    [
        (Generate(samples=4), "--samples: got neither --generate nor --verifier"),
        (Generate(max_new_tokens=4), "--max-new-tokens: got neither"),
        (Generate(wanted=True, pattern="a"), "--verifier: kind: got nothing"),
        (Generate(verifier="regex"), "pattern"),
        (Generate(verifier="numerical"), "'math', 'exact', 'numeric'"),
        (Generate(verifier="numeric", samples=4, temperature=0.0), "a temperature above 0"),
        (Generate(verifier="numeric", max_new_tokens=64), "room for prompts too"),
    ],
)
def test_settings_that_make_no_sense_are_refused(home: Path, generate: Generate, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr("orchestrator.written.load_network", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("orchestrator.compare.load_network", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(Refusal, match=words):
        show_evaluation(["student"], "teacher", "rows.jsonl", None, (), 8, generate)


def test_several_answers_are_drawn_at_temperature_1_unless_one_is_named() -> None:
    def temperature(generate: Generate) -> float:
        writing = generate.writing()
        assert writing is not None
        return writing.temperature

    assert temperature(Generate(wanted=True)) == 0
    assert temperature(Generate(wanted=True, samples=3)) == 1
    assert temperature(Generate(wanted=True, samples=3, temperature=0.5)) == 0.5
