"""A failed command starts again inside its job, and only a failed one."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def command(tmp_path: Path, *words: str) -> list[str]:
    """A Python program that first writes its words to a log."""
    code = f"open({str(tmp_path / 'log')!r}, 'a').write({words[0]!r} + '\\n'); {words[1]}"
    return [sys.executable, "-c", code]


FAILING = """
def look(self, name, exists=retrying.Folder.exists, left=[{hiccups}]):
    left[0] -= 1
    if left[0] >= 0:
        raise OSError("no\\nanswer")
    return exists(self, name)
retrying.Folder.exists = look
"""
"""Storage that does not answer so many times."""


def retrying(tmp_path: Path, retries: int, first: str, then: str, pause: float = 0, hiccups: int = 0) -> subprocess.Popen[str]:
    once, again = command(tmp_path, "first", first), command(tmp_path, "then", then)
    program = f"from cluster import retrying; import sys; retrying.PAUSE_SECONDS = {pause}; retrying.LOOK_SECONDS = {pause}\n"
    program += FAILING.format(hiccups=hiccups) if hiccups else ""
    program += f"sys.exit(retrying.main({retries}, {str(tmp_path / 'recipe.yaml')!r}, {once!r}, {again!r}))"
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def log(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().split()


@pytest.mark.parametrize(
    ("retries", "first", "then", "tries", "code"),
    [
        (2, "raise SystemExit(0)", "", ["first"], 0),
        (2, "raise SystemExit(1)", "", ["first", "first", "first"], 1),
        (2, "open('{recipe}', 'w'); raise SystemExit(1)", "raise SystemExit(0)", ["first", "then"], 0),
        (1, "open('{recipe}', 'w'); raise SystemExit(1)", "import os; os.kill(os.getpid(), 9)", ["first", "then"], 137),
        (2, "raise SystemExit(2)", "", ["first"], 2),
        (2, "raise SystemExit(3)", "", ["first"], 3),
        (2, "raise SystemExit(130)", "", ["first"], 130),
        (0, "raise SystemExit(1)", "", ["first"], 1),
    ],
)
def test_failures_are_tried_again_and_nothing_else(
    tmp_path: Path, retries: int, first: str, then: str, tries: list[str], code: int
) -> None:
    process = retrying(tmp_path, retries, first.replace("{recipe}", str(tmp_path / "recipe.yaml")), then or "pass")
    assert process.wait(60) == code
    assert log(tmp_path) == tries


def test_a_stopped_command_is_not_tried_again(tmp_path: Path) -> None:
    process = retrying(tmp_path, 5, "import time; time.sleep(2); raise SystemExit(1)", "pass")
    while not (tmp_path / "log").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 1
    assert log(tmp_path) == ["first"]


@pytest.mark.parametrize(("hiccups", "tries", "code", "words"), [(0, ["first"], 1, "Try 2"), (1, [], 130, "Looking again")])
def test_a_signal_between_tries_or_looks_starts_nothing_more(tmp_path: Path, hiccups: int, tries: list[str], code: int, words: str) -> None:
    (tmp_path / "log").touch()
    process = retrying(tmp_path, 5, "raise SystemExit(1)", "pass", pause=600, hiccups=hiccups)
    assert process.stdout is not None
    assert words in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == code
    assert log(tmp_path) == tries


def test_storage_that_does_not_answer_is_asked_again(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    process = retrying(tmp_path, 0, "pass", "pass", hiccups=4)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert said.count("(no answer). Looking again") == 4
    assert log(tmp_path) == ["then"]


def test_storage_that_never_answers_is_named_in_one_line(tmp_path: Path) -> None:
    process = retrying(tmp_path, 3, "pass", "pass", hiccups=99)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = said.splitlines()
    assert line.startswith(f"Cannot see whether {tmp_path}/recipe.yaml is there (no answer).") and "submit again" in line
    assert not (tmp_path / "log").exists()
