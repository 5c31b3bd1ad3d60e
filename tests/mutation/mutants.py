"""The faults: one operator, number, name or statement of a file replaced by another, found in its syntax tree."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.Pow: "*",
    ast.BitAnd: "|",
    ast.BitOr: "&",
    ast.MatMult: "*",
    ast.FloorDiv: "/",
}
OTHER_NAMES = {
    "exp": "expm1",
    "expm1": "exp",
    "log": "log1p",
    "log1p": "log",
    "sum": "mean",
    "mean": "sum",
    "amax": "amin",
    "amin": "amax",
    "maximum": "minimum",
    "minimum": "maximum",
    "clamp_min": "clamp_max",
    "clamp_max": "clamp_min",
    "clamp_min_": "clamp_max_",
    "log_softmax": "softmax",
    "softmax": "log_softmax",
    "logaddexp": "maximum",
    "cumsum": "cumprod",
    "sub_": "add_",
    "add_": "sub_",
    "mul_": "div_",
    "abs": "neg",
    "abs_": "neg_",
    "zeros": "ones",
    "ones": "zeros",
    "any": "all",
    "all": "any",
    "max": "min",
    "min": "max",
}
DROPPED_CALLS = {"detach", "clone", "float", "double", "contiguous"}
"""Methods without arguments that a mutant leaves out."""


@dataclass(frozen=True)
class Mutant:
    """One replacement in one file."""

    path: str
    """From the root of the repository."""
    scope: str
    """Qualified name of the outermost function around it; empty at the level of the module or of a class."""
    start: int
    stop: int
    """UTF-8 bytes of the source that are replaced."""
    by: str

    def apply(self, source: str) -> str:
        data = source.encode()
        return (data[: self.start] + self.by.encode() + data[self.stop :]).decode()

    def diff(self, source: str) -> tuple[int, str, str]:
        """Number of the line, and the stripped line before and after."""
        data = source.encode()
        number = data[: self.start].count(b"\n")
        return number + 1, source.splitlines()[number].strip(), self.apply(source).splitlines()[number].strip()


def sample(root: Path, paths: Iterable[str], count: int, seed: int) -> list[Mutant]:
    """`count` mutants of these files, each as likely as any other; all of them when there are fewer."""
    found = [m for path in sorted(paths) for m in mutants(path, (root / path).read_text(encoding="utf-8"))]
    return found if len(found) <= count else sorted(random.Random(seed).sample(found, count), key=lambda m: (m.path, m.start, m.by))


def mutants(path: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a file that still compiles, in order of place."""
    seen: set[tuple[int, int, str]] = set()
    lines = [0]
    for line in source.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    for scope, node in _nodes(ast.parse(source), ""):
        for start, stop, by in sorted(_replacements(node, source, lines)):
            mutant = Mutant(path, scope, start, stop, by)
            if (start, stop, by) not in seen and _compiles(mutant.apply(source)):
                seen.add((start, stop, by))
                yield mutant


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _nodes(tree: ast.AST, scope: str, named: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Every node that runs, with the function it is in; annotations, decorators, imports and doc strings do not count."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if not isinstance(node, ast.AST) or isinstance(node, (ast.Import, ast.ImportFrom)) or _is_text(node):
                continue
            yield scope, node
            inner = f"{named}.{node.name}".lstrip(".") if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else named
            yield from _nodes(node, inner if isinstance(node, ast.FunctionDef) and not scope else scope, inner)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _replacements(node: ast.AST, source: str, lines: list[int]) -> Iterator[tuple[int, int, str]]:
    """(start, stop, text) in bytes of every replacement at a node."""
    place = _Place(source.encode(), lines)
    if isinstance(node, ast.Constant):
        yield from ((*place.of(node), by) for by in _other_constants(node.value))
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        yield place.between(node.left, node.comparators[0], COMPARISONS[type(node.ops[0])])
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield place.between(node.left, node.right, ARITHMETIC[type(node.op)])
    elif isinstance(node, ast.BoolOp):
        yield place.between(node.values[0], node.values[1], "or" if isinstance(node.op, ast.And) else "and")
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)) and not _is_last(node):
        yield (*place.of(node), place.text(node.operand))
    elif isinstance(node, ast.Call):
        yield from _other_calls(node, place)
    elif isinstance(node, (ast.If, ast.IfExp)) and not _is_typing(node.test):
        yield from ((*place.of(node.test), by) for by in ("True", "False"))
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)):
        yield (*place.of(node), "pass")


def _is_last(node: ast.UnaryOp) -> bool:
    """Whether it is a number such as -1, the last dimension: of an `(N, M)` tensor, 1 names the same."""
    return isinstance(node.operand, ast.Constant)


def _is_typing(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def _other_constants(value: object) -> Iterator[str]:
    if isinstance(value, bool):
        yield str(not value)
    elif isinstance(value, (int, float)):
        yield repr(value + 1)
        if value == -1 or value > 1:
            yield repr(type(value)(0))


def _other_calls(node: ast.Call, place: _Place) -> Iterator[tuple[int, int, str]]:
    name = node.func
    if isinstance(name, ast.Attribute):
        _, stop = place.of(name)
        if name.attr in OTHER_NAMES:
            yield stop - len(name.attr), stop, OTHER_NAMES[name.attr]
        if name.attr in DROPPED_CALLS and not node.args and not node.keywords:
            yield (*place.of(node), place.text(name.value))
        if name.attr == "where" and len(node.args) == 3:
            yield (*place.of(node), place.text(node.args[1]))
    elif isinstance(name, ast.Name) and name.id in OTHER_NAMES:
        yield (*place.of(name), OTHER_NAMES[name.id])


class _Place:
    """Bytes of nodes in the source."""

    def __init__(self, data: bytes, lines: list[int]):
        self.data, self.lines = data, lines

    def of(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.lines[node.lineno - 1] + node.col_offset, self.lines[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr) -> str:
        start, stop = self.of(node)
        return f"({self.data[start:stop].decode()})"

    def between(self, left: ast.expr, right: ast.expr, by: str) -> tuple[int, int, str]:
        """The operator between two operands, without the brackets and spaces around it."""
        start, stop = self.of(left)[1], self.of(right)[0]
        gap = self.data[start:stop].decode()
        before = len(gap) - len(gap.lstrip(" )\n"))
        after = len(gap) - len(gap.rstrip(" (\n"))
        return start + before, stop - after, by
