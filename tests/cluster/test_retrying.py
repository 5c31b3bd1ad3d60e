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


def retrying(tmp_path: Path, retries: int, first: str, then: str) -> subprocess.Popen[bytes]:
    once, again = command(tmp_path, "first", first), command(tmp_path, "then", then)
    program = "from cluster import retrying; import sys; retrying.PAUSE_SECONDS = 0; "
    program += f"sys.exit(retrying.main({retries}, {str(tmp_path / 'recipe.yaml')!r}, {once!r}, {again!r}))"
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)


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
