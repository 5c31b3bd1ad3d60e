"""`distill task arithmetic`: data, tokenizer, a teacher and a student that has begun, of a task whose answers can be judged.

Everything lies where the recipes `arithmetic_*.yaml` look for it, so that each of them can be run next.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from jobs import arithmetic, quickstart
from orchestrator import run as runs
from orchestrator.display import Display

DEFAULT = Path("runs/arithmetic")
"""Where the recipes look."""
ROWS: dict[arithmetic.Split, int] = {"train": 20_000, "held_out": 500}
TOKENIZER_ROWS = 2_000
VOCABULARY = 384
"""At most: 256 bytes and the task's words."""

TEACHER = {"hidden_size": 192, "num_hidden_layers": 4, "intermediate_size": 576, "num_attention_heads": 4, "head_dim": 48}
STUDENT = {"hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 288, "num_attention_heads": 4, "head_dim": 24}

MODELS = {"teacher": "teacher", "start": "student"}
"""Models that are trained by the recipe `arithmetic_NAME.yaml`, and their shapes."""
METHODS = ("cross_entropy", "logits", "gkd", "opd", "kdrl", "paced")
"""Recipes `arithmetic_METHOD.yaml` go on from `start`."""


def run_task(folder: Path, verbose: bool) -> None:
    """Makes what is missing in `folder` and says what can be run next."""
    display = Display(verbose)
    display.say(f"Problems, tokenizer and shapes: {folder}")
    prepare(folder)
    begun = [train(folder, name, display) for name in MODELS][-1]
    display.say("Next")
    for method in METHODS:
        display.say(f"    distill run {recipe(method)} {' '.join(overrides(folder, method, begun))}".rstrip())
    rows = f"--recipe {recipe('logits')} {' '.join(f'--set {o}' for o in overrides(folder, 'logits', begun))}".rstrip()
    display.say(f"    distill evaluate RUN_FOLDER {begun} --teacher {folder}/teacher {rows} --verifier numeric --max-new-tokens 36")


def recipe(name: str) -> Path:
    """The recipe of a model or method."""
    return quickstart.RECIPES / f"arithmetic_{name}.yaml"


def overrides(folder: Path, method: str, begun: Path) -> list[str]:
    """What lets a method's recipe read from `folder` and go on from `begun`; nothing where it does so by itself."""
    if (folder, begun) == (DEFAULT, DEFAULT / "start"):
        return []
    teacher = [f"endpoints.teacher.model={folder}/teacher"] if "endpoints" in recipe(method).read_text(encoding="utf-8") else []
    return [*places(folder), f"student.model={begun}", *teacher]


def places(folder: Path) -> list[str]:
    """Where the data lies."""
    return [f"data.train={folder}/data/train.jsonl", f"data.held_out={folder}/data/held_out.jsonl"]


def train(folder: Path, name: str, display: Display, seed: int = 0, more: Sequence[str] = ()) -> Path:
    """Trains the model `name` of `MODELS` by its recipe, `seed` and further overrides, unless it is there; where it is."""
    target = folder / (f"{name}-{seed}" if seed else name)
    if not (target / "config.json").exists():
        display.say(f"{target.name}: cross-entropy on the train problems")
        given = [*places(folder), f"student.model={folder}/shapes/{MODELS[name]}", f"seed={seed}", *more]
        made = runs.distill(recipe(name), given, cluster(folder), display=display)
        Path(made.student).rename(target)
    return target


def cluster(folder: Path) -> dict[str, object]:
    """Runs of the task lie in its folder."""
    return {"storage": str(folder / "runs"), "mlflow": {"experiment": "arithmetic"}}


def prepare(folder: Path) -> None:
    """Problems of both splits, tokenizer and shapes, unless they are there."""
    if (folder / "shapes").exists():
        return
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    texts: list[str] = []
    for split, count in ROWS.items():
        rows = [problem.row for problem in islice(arithmetic.problems(split), count)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        texts += [row["prompt"] + row["completion"] for row in rows[:TOKENIZER_ROWS] if split == "train"]
    tokenizer = quickstart.train_tokenizer(iter(texts), VOCABULARY, single_digits=True)
    for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
        quickstart.write_shape(folder / "shapes" / name, tokenizer, shape, len(tokenizer))
