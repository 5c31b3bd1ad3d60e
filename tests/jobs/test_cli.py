"""The command: help, listings and exit codes, without starting Ray."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from jobs import generate as generating
from jobs.cli import app, main
from jobs.settings import meaning
from jobs.submit import COMMANDS
from orchestrator.config import RunConfig
from orchestrator.display import Display, comparison_table, console
from orchestrator.explain import models_in
from orchestrator.generate import Generated
from orchestrator.result import Row
from orchestrator.search.settings import SearchConfig
from strategies import STRATEGIES

ROOT = Path(__file__).parents[2]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, columns: int = 120) -> int:
    """Exit code of `distill ARGUMENTS`."""
    monkeypatch.setattr("sys.argv", ["distill", *arguments])
    monkeypatch.setenv("COLUMNS", str(columns))
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    "command", ["plan", "run", "evaluate", "export", "strategies", "task", "quickstart", "submit", "doctor", "jobs", "cluster"]
)
def test_every_command_explains_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run(monkeypatch, command, "--help") == 0
    assert "Usage" in capsys.readouterr().out


def leaves(command: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below one, by the words that call it."""
    if not hasattr(command, "commands"):
        yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from leaves(inner, *words, name)


@pytest.mark.parametrize(("words", "command"), [pytest.param(w, c, id=" ".join(w)) for w, c in leaves(typer.main.get_command(app))])
def test_all_that_is_said_of_an_option_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], command: Any
) -> None:
    assert command.help
    assert run(monkeypatch, *words, "--help", columns=1000) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for param in command.params:
        assert param.help and param.help in printed, param.name
        assert not isinstance(param.show_default, str) or f"[default: ({param.show_default})]" in printed, param.name
    assert (command.epilog or "") in printed
    assert all((ROOT / path).is_file() for path in re.findall(r"jobs/recipes/\S+?\.yaml", printed))


@pytest.mark.parametrize("name", ["plan", "run", "search", "generate", "evaluate", "export", "submit"])
def test_a_main_command_shows_how_it_is_called(name: str) -> None:
    command: Any = typer.main.get_command(app)
    assert command.commands[name].epilog.startswith(f"For example: distill {name} ")


def test_submit_names_every_command_that_it_takes() -> None:
    command: Any = typer.main.get_command(app)
    said = next(param.help for param in command.commands["submit"].params if param.name == "command")
    assert set(re.findall(r"\w+", said)) - {"or"} == set(COMMANDS)


def test_the_list_of_strategies_names_each_and_one_shows_its_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "strategies") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in STRATEGIES)
    assert run(monkeypatch, "strategies", "logits") == 0
    shown = capsys.readouterr().out
    assert "strategy.temperature" in shown
    assert "arXiv:1606.07947" in shown
    assert run(monkeypatch, "strategies", "multi-teacher") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("multi-teacher\n") and "a list of" in shown and "{type: seq-kd," in " ".join(shown.split())


def sections(model: type[BaseModel], found: list[type[BaseModel]]) -> list[type[BaseModel]]:
    """All classes of settings below one."""
    if model not in found:
        found.append(model)
        for info in model.model_fields.values():
            for inner in models_in(info.annotation):
                sections(inner, found)
    return found


@pytest.mark.parametrize(
    "model",
    [m for m in sections(RunConfig, sections(SearchConfig, [])) if not m.__module__.startswith("strategies.")],
    ids=lambda m: m.__name__,
)
def test_every_setting_has_a_sentence(model: type[BaseModel]) -> None:
    fields = [f for f in model.model_fields if f not in ("engine", "type")]
    assert [field for field in fields if not meaning(model, field)] == []


def test_settings_are_found_by_their_path(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for path in ("", "train", "student.lora", "train.steps", "endpoints", "endpoints.vllm", "search.space", "strategy", "strategy.gkd"):
        assert run(monkeypatch, "settings", *path.split(), columns=200) == 0
        shown[path] = " ".join(capsys.readouterr().out.split())
    assert all(f"see distill settings {section} " in shown[""] for section in ("train", "student", "strategy", "endpoints"))
    assert "train.gradient_checkpointing" in shown["train"] and "May be a schedule." in shown["train"]
    assert "student.lora.target_modules" in shown["student.lora"]
    assert shown["train.steps"] == shown["train"]
    assert "openai" in shown["endpoints"] and "endpoints.vllm.tensor_parallel" in shown["endpoints.vllm"]
    assert "search.space.log_uniform" in shown["search.space"]
    assert "what it does" in shown["strategy"] and "strategy.staleness" in shown["strategy.gkd"]
    assert run(monkeypatch, "settings", "train.layuot") == 2
    assert "Did you mean 'layout'" in capsys.readouterr().err


def test_a_refusal_exits_with_2_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("student: x\nstrategy: logits\ndata: rows.jsonl\ntrain: {steps: 3}\n")
    assert run(monkeypatch, "plan", str(recipe), "train.learning_rate=1e-4") == 2
    told = capsys.readouterr().err
    assert "train.learning_rate" in told
    assert "expected" in told
    assert run(monkeypatch, "plan", str(tmp_path / "missing.yaml")) == 2
    assert run(monkeypatch, "strategies", "logit") == 2
    assert "Did you mean 'logits'" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_brackets_of_others_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "plan", "data/[a-c]*.[vllm] [/x] :key:.yaml") == 2
    assert "data/[a-c]*.[vllm] [/x] :key:.yaml: got " in capsys.readouterr().err
    Display().say("runs/[red]x[/red]")
    assert capsys.readouterr().err == "runs/[red]x[/red]\n"
    console().print(comparison_table([Row("[/x] [a]", 1.0, 0.0, 0.0, 1, 1.0, 1.0)]))
    assert "[/x] [a]" in capsys.readouterr().out


def test_plans_go_to_standard_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("student: x\nstrategy: cross-entropy\ndata: rows.jsonl\ntrain: {steps: 3}\n")
    monkeypatch.setattr("orchestrator.plan.make_plan", lambda *_: None)
    monkeypatch.setattr("orchestrator.plan.plan_text", lambda _: "what a run would do [/x]")
    monkeypatch.setattr("orchestrator.search.door.search_plan", lambda *_: None)
    monkeypatch.setattr("orchestrator.search.plan_text.search_text", lambda _: "what a search would do [/x]")
    assert run(monkeypatch, "plan", str(recipe)) == run(monkeypatch, "search", "--plan", str(recipe)) == 0
    assert capsys.readouterr() == ("what a run would do [/x]\nwhat a search would do [/x]\n", "")


def test_what_to_type_after_generate_can_be_typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(generating, "generate", lambda *_: Generated((), (), None))
    generating.run_generate(Path("my recipe.yaml"), ["strategy.teachers=[a, b]", "train.lr=1e-3"], None, False)
    typed = capsys.readouterr().out.removeprefix("Next     ")
    assert shlex.split(typed) == ["distill", "run", "my recipe.yaml", "strategy.teachers=[a, b]", "train.lr=1e-3"]


def test_wrong_usage_of_the_command_exits_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "run") == 2
    assert run(monkeypatch, "nonsense") == 2
    assert "nonsense" in capsys.readouterr().err
