"""Where a line of code may live, read from the source without importing it. Each rule is also shown a line that breaks it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest

from cluster import config as cluster_config
from orchestrator.config import LayoutConfig
from strategies import STRATEGIES

ROOT = Path(__file__).parents[1]
PACKAGES = ("orchestrator", "jobs", "strategies", "cluster")
MAY_IMPORT = {
    "jobs": {"jobs", "orchestrator", "strategies", "cluster"},
    "orchestrator": {"orchestrator", "strategies", "cluster"},
    "strategies": {"strategies"},
    "cluster": {"cluster"},
}
PURE_LIBRARIES = {"torch", "numpy", "pydantic"}
"""All that `strategies/` builds on besides the standard library."""
OUTSIDE_WORLD = {
    "glob",
    "http",
    "io",
    "multiprocessing",
    "os",
    "pathlib",
    "shutil",
    "socket",
    "sqlite3",
    "subprocess",
    "tempfile",
    "urllib",
}
"""Standard modules through which code meets files, processes or a network."""
FILE_CALLS = {"open", "read_text", "write_text", "read_bytes", "write_bytes", "save", "load_file", "fromfile", "tofile", "memmap"}
RAY_STARTERS = {"init", "shutdown"}
ONLY_IN = {
    "mlflow": ("orchestrator/track.py", "orchestrator/delivery.py"),
    "yaml": ("cluster/yaml_text.py", "orchestrator/config.py"),
}
PRINTER = "orchestrator/display.py"
GRADIENT_HOMES = ("orchestrator/layouts/", "orchestrator/train.py")

Rule = Callable[[str, ast.Module], Iterator[str]]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def calls(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Line, receiver and name of every call: `ray.init()` is (n, "ray", "init"), `open()` is (n, "", "open")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.lineno, ast.unparse(node.func.value), node.func.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.lineno, "", node.func.id


def imports_go_one_way(path: str, tree: ast.Module) -> Iterator[str]:
    package = path.split("/", maxsplit=1)[0]
    for line, name in imports(tree):
        top = name.split(".", maxsplit=1)[0]
        if top == "tests" or (top in PACKAGES and top not in MAY_IMPORT[package]):
            yield f"{path}:{line} imports {name}; {package} may import {', '.join(sorted(MAY_IMPORT[package]))}"
        if not top:
            yield f"{path}:{line} imports relatively; write the whole name"


def strategies_stay_pure(path: str, tree: ast.Module) -> Iterator[str]:
    if not path.startswith("strategies/"):
        return
    for line, name in imports(tree):
        top = name.split(".", maxsplit=1)[0]
        if top in OUTSIDE_WORLD or top not in {"strategies", *PURE_LIBRARIES, *sys.stdlib_module_names}:
            yield f"{path}:{line} imports {name}; strategies know torch, numpy and pydantic, no Ray and no files"
    for line, _, name in calls(tree):
        if name in FILE_CALLS:
            yield f"{path}:{line} calls {name}(); strategies touch no files"


def ray_starts_in_cluster_only(path: str, tree: ast.Module) -> Iterator[str]:
    if path.startswith("cluster/"):
        return
    for line, receiver, name in calls(tree):
        if receiver == "ray" and name in RAY_STARTERS:
            yield f"{path}:{line} calls ray.{name}(); cluster/session.py starts and leaves Ray"


def libraries_stay_in_their_rooms(path: str, tree: ast.Module) -> Iterator[str]:
    for line, name in imports(tree):
        homes = ONLY_IN.get(name.split(".", maxsplit=1)[0])
        if homes and path not in homes:
            yield f"{path}:{line} imports {name}; only {', '.join(homes)} may"


def gradients_are_applied_in_the_train_step_only(path: str, tree: ast.Module) -> Iterator[str]:
    if path.startswith(GRADIENT_HOMES):
        return
    for line, receiver, name in calls(tree):
        if name == "backward" or (name == "step" and receiver.split(".")[-1].lstrip("_") in {"optimizer", "opt"}):
            yield f"{path}:{line} calls {receiver}.{name}(); only {' and '.join(GRADIENT_HOMES)} may"


def the_orchestrator_asks_for_no_name(path: str, tree: ast.Module) -> Iterator[str]:
    if not path.startswith("orchestrator/"):
        return
    names = known_names()
    for node in ast.walk(tree):
        sides = compared(node)
        for side in sides:
            for name in sorted(names & set(literals(side))):
                yield f"{path}:{side.lineno} compares with {name!r}; put the difference on the record that carries the name"


def compared(node: ast.AST) -> list[ast.expr]:
    """Both sides of a comparison, or the pattern of a `case`."""
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    return [node.value] if isinstance(node, ast.MatchValue) else []


def literals(node: ast.expr) -> Iterator[str]:
    """Strings written in an expression, alone or in a tuple, list or set."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        for inner in node.elts:
            yield from literals(inner)


def known_names() -> set[str]:
    """Every strategy, layout and engine."""
    layouts = get_args(LayoutConfig.model_fields["type"].annotation)
    models = [m for m in vars(cluster_config).values() if isinstance(m, type) and "engine" in getattr(m, "model_fields", {})]
    engines = [name for m in models for name in get_args(m.model_fields["engine"].annotation)]
    return {*STRATEGIES, *layouts, *engines}


def printing_has_one_home(path: str, tree: ast.Module) -> Iterator[str]:
    for line, _, name in calls(tree):
        if name == "Console" and path != PRINTER:
            yield f"{path}:{line} makes a Console; {PRINTER} makes those that print brackets as they are"


RULES: list[Rule] = [
    imports_go_one_way,
    strategies_stay_pure,
    ray_starts_in_cluster_only,
    libraries_stay_in_their_rooms,
    gradients_are_applied_in_the_train_step_only,
    the_orchestrator_asks_for_no_name,
    printing_has_one_home,
]


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule: Rule) -> None:
    broken = [message for path in sources() for message in rule(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8")))]
    assert not broken, "\n".join(broken)


def test_every_strategy_has_its_row_in_the_table() -> None:
    table = (ROOT / "strategies" / "README.md").read_text("utf-8")
    missing = [name for name in STRATEGIES if f"| `{name}` |" not in table]
    assert not missing, f"strategies/README.md says nothing of {', '.join(missing)}"


def test_every_module_opens_with_what_it_is_for() -> None:
    silent = [str(path.relative_to(ROOT)) for path in sources() if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert not silent


BREACHES: list[tuple[Rule, str, str]] = [
    (imports_go_one_way, "strategies/x.py", "from cluster.config import Dtype"),
    (imports_go_one_way, "cluster/x.py", "import strategies.core"),
    (imports_go_one_way, "cluster/x.py", "def late():\n    from orchestrator import plan"),
    (imports_go_one_way, "orchestrator/x.py", "import jobs.cli"),
    (imports_go_one_way, "orchestrator/x.py", "from tests.tiny import tiny_model"),
    (imports_go_one_way, "orchestrator/x.py", "from . import plan"),
    (strategies_stay_pure, "strategies/x.py", "import ray"),
    (strategies_stay_pure, "strategies/x.py", "from transformers import AutoModel"),
    (strategies_stay_pure, "strategies/x.py", "from pathlib import Path"),
    (strategies_stay_pure, "strategies/stages/x.py", "rows = open('rows.jsonl')"),
    (strategies_stay_pure, "strategies/x.py", "import torch\ntorch.save({}, 'x')"),
    (ray_starts_in_cluster_only, "orchestrator/x.py", "import ray\nray.init()"),
    (ray_starts_in_cluster_only, "jobs/x.py", "import ray\nray.shutdown()"),
    (libraries_stay_in_their_rooms, "orchestrator/run.py", "import mlflow"),
    (libraries_stay_in_their_rooms, "jobs/x.py", "from mlflow.tracking import MlflowClient"),
    (libraries_stay_in_their_rooms, "jobs/x.py", "import yaml"),
    (gradients_are_applied_in_the_train_step_only, "orchestrator/players.py", "loss.backward()"),
    (gradients_are_applied_in_the_train_step_only, "strategies/x.py", "self._optimizer.step()"),
    (the_orchestrator_asks_for_no_name, "orchestrator/x.py", "if layout.type == 'deepspeed': pass"),
    (the_orchestrator_asks_for_no_name, "orchestrator/x.py", "ok = config.type in ('logits', 'other')"),
    (the_orchestrator_asks_for_no_name, "orchestrator/x.py", "match engine:\n    case 'fake': pass"),
    (printing_has_one_home, "jobs/x.py", "from rich.console import Console\nConsole().print('x')"),
]


@pytest.mark.parametrize(("rule", "path", "source"), BREACHES)
def test_each_rule_notices_its_breach(rule: Rule, path: str, source: str) -> None:
    assert len(list(rule(path, ast.parse(source)))) == 1


ALLOWED = [
    ("strategies/x.py", "import math\nimport torch\nfrom strategies.core import Progress\nfrom importlib.metadata import entry_points"),
    ("cluster/session.py", "import ray\nray.init()"),
    ("orchestrator/layouts/x.py", "loss.backward()\nself.optimizer.step()"),
    ("orchestrator/track.py", "import mlflow"),
    ("orchestrator/x.py", "if kind == 'eval': schedule.step()"),
    ("jobs/x.py", "from orchestrator.run import run\nfrom cluster.config import Dtype"),
]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_no_rule_objects_to_what_is_fine(path: str, source: str) -> None:
    assert [message for rule in RULES for message in rule(path, ast.parse(source))] == []
