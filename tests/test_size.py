"""Short tails: files, functions, classes and nesting that a reader can hold. What is longer carries its reason here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("orchestrator", "jobs", "strategies", "cluster", "tests")
LIMITS = {"file": 300, "test file": 500, "class": 150, "function": 50, "nesting": 3}
"""Lines of a file, class and function; depth of if, for, while, with, try and match in one function.
A test file is a list of sentences that are read one at a time, so it may be longer."""

REASONS: dict[tuple[str, str], str] = {}
"""`("file", "orchestrator/x.py")` or `("function", "orchestrator/x.py:Class.method")` -> why it is as long as it is."""

BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Size:
    kind: str
    where: str
    size: int

    @property
    def too_big(self) -> bool:
        return self.size > LIMITS[self.kind]


def sizes(path: str, source: str) -> Iterator[Size]:
    """Everything that is measured in one file."""
    yield Size("test file" if path.startswith("tests/") else "file", path, len(source.splitlines()))
    yield from _inside(ast.parse(source), f"{path}:")


def _inside(node: ast.AST, prefix: str) -> Iterator[Size]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, *FUNCTIONS)):
            where = prefix + child.name
            assert child.end_lineno is not None
            lines = child.end_lineno - child.lineno + 1
            yield Size("class" if isinstance(child, ast.ClassDef) else "function", where, lines)
            if not isinstance(child, ast.ClassDef):
                yield Size("nesting", where, depth(child))
            yield from _inside(child, f"{where}.")
        else:
            yield from _inside(child, prefix)


def depth(node: ast.AST) -> int:
    """Blocks inside blocks below `node`; `elif` goes no deeper, and functions inside are measured on their own."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, *FUNCTIONS)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse and len(node.orelse) == 1
        deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def measured() -> list[Size]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [size for path in paths for size in sizes(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))]


def test_what_is_too_long_has_a_reason() -> None:
    found = [s for s in measured() if s.too_big and (s.kind, s.where) not in REASONS]
    assert not found, "\n".join(f"{s.where}: {s.kind} of {s.size}, limit {LIMITS[s.kind]}" for s in found)


def test_no_reason_outlives_what_it_excuses() -> None:
    assert set(REASONS) <= {(s.kind, s.where) for s in measured() if s.too_big}


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("x = 1\n" * 301, "file"),
        ("class A:\n" + "    x = 1\n" * 150, "class"),
        ("def f():\n" + "    x = 1\n" * 50, "function"),
        ("class A:\n  def f(self):\n" + "    x = 1\n" * 50, "function"),
        ("async def f():\n  for a in b:\n    with c:\n      if d:\n        while e: pass", "nesting"),
    ],
)
def test_each_limit_is_noticed(source: str, kind: str) -> None:
    assert [s.kind for s in sizes("x.py", source) if s.too_big] == [kind]


@pytest.mark.parametrize(
    "source",
    [
        "x = 1\n" * 300,
        "def f():\n" + "    x = 1\n" * 49,
        "def f():\n  for a in b:\n    if c:\n      if d: pass\n      elif e: pass\n      elif g: pass",
        "def f():\n  for a in b:\n    if c:\n      def inner():\n        for d in e:\n          if g: pass",
    ],
)
def test_what_is_just_short_enough_passes(source: str) -> None:
    assert not [s for s in sizes("x.py", source) if s.too_big]
