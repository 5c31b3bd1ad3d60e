"""`distill task specialists`: text of two domains, and a teacher of each that has never read the other's.

Code is the standard library's sources, arithmetic are word problems with worked steps. Everything lies where the recipe
`specialists.yaml` looks for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from jobs import arithmetic, quickstart
from orchestrator import run as runs
from orchestrator.display import Display

DEFAULT = Path("runs/specialists")
"""Where the recipes look."""
DOMAINS = ("code", "arithmetic")
BOTH = "both"
"""Folder of the rows of all domains, which say in a column `domain` which they are of."""
VOCABULARY = 2048
TOKENIZER_TEXTS = 3_000
CODE_CHARACTERS = {"train": 3_000_000, "held_out": 100_000}
PROBLEMS: dict[arithmetic.Split, int] = {"train": 15_000, "held_out": 600}
PROBLEMS_IN_A_ROW = 2

TEACHER = {"hidden_size": 192, "num_hidden_layers": 4, "intermediate_size": 576, "num_attention_heads": 4, "head_dim": 48}
STUDENT = {"hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 288, "num_attention_heads": 4, "head_dim": 24}


def run_specialists(folder: Path, verbose: bool) -> None:
    """Makes what is missing in `folder` and says what can be run next."""
    display = Display(verbose)
    display.say(f"Text of {' and '.join(DOMAINS)}, tokenizer and shapes: {folder}")
    prepare(folder)
    for domain in DOMAINS:
        train_teacher(folder, domain, display)
    given = " ".join(overrides(folder))
    display.say("Next")
    display.say(f"    distill run {RECIPE} {given}".rstrip())
    for combine in ("mixture", "product"):
        asked = f"strategy.teachers='[{', '.join(DOMAINS)}]' strategy.combine={combine}"
        display.say(f"    distill run {RECIPE} {asked} {given}".rstrip())


RECIPE = quickstart.RECIPES / "specialists.yaml"
TEACHER_RECIPE = quickstart.RECIPES / "specialists_teacher.yaml"


def train_teacher(folder: Path, domain: str, display: Display, more: Sequence[str] = ()) -> Path:
    """Trains the specialist of a domain unless it is there; where it is."""
    target = folder / domain
    if not (target / "config.json").exists():
        display.say(f"{domain}: cross-entropy on that domain alone")
        given = [*places(folder, domain), f"student.model={folder}/shapes/teacher", *more]
        made = runs.distill(TEACHER_RECIPE, given, cluster(folder), display=display)
        Path(made.student).rename(target)
    return target


def overrides(folder: Path, domain: str = BOTH) -> list[str]:
    """What lets `specialists.yaml` read from `folder`, rows of one domain or of both; nothing where it does so by itself."""
    if (folder, domain) == (DEFAULT, BOTH):
        return []
    teachers = [f"endpoints.{name}.model={folder}/{name}" for name in DOMAINS]
    return [*places(folder, domain), f"student.model={folder}/shapes/student", *teachers]


def places(folder: Path, domain: str = BOTH) -> list[str]:
    """Where the rows of a domain lie."""
    return [f"data.train={folder}/data/{domain}/train.jsonl", f"data.held_out={folder}/data/{domain}/held_out.jsonl"]


def cluster(folder: Path) -> dict[str, object]:
    """Runs of the task lie in its folder."""
    return {"storage": str(folder / "runs"), "mlflow": {"experiment": "specialists"}}


def prepare(folder: Path) -> None:
    """Rows of both domains and splits, tokenizer and shapes, unless they are there."""
    if (folder / "shapes").exists():
        return
    texts: list[str] = []
    for split in PROBLEMS:
        rows = {"code": list(code(split)), "arithmetic": list(problems(split))}
        for domain, given in rows.items():
            _write(folder / "data" / domain / f"{split}.jsonl", [{"text": text, "domain": domain} for text in given])
        _write(folder / "data" / BOTH / f"{split}.jsonl", [{"text": t, "domain": d} for d, given in rows.items() for t in given])
        texts += [text for given in rows.values() for text in given[:TOKENIZER_TEXTS] if split == "train"]
    tokenizer = quickstart.train_tokenizer(iter(texts), VOCABULARY)
    for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
        quickstart.write_shape(folder / "shapes" / name, tokenizer, shape, VOCABULARY)


def code(split: arithmetic.Split) -> Iterator[str]:
    """Modules of the standard library up to a number of characters."""
    left = CODE_CHARACTERS[split]
    for name, text in quickstart.sources():
        if quickstart.held_out(name) == (split == "held_out") and left > 0:
            left -= len(text)
            yield text


def problems(split: arithmetic.Split) -> Iterator[str]:
    """Some problems a row, with their working."""
    drawn = islice(arithmetic.problems(split), PROBLEMS[split])
    while several := list(islice(drawn, PROBLEMS_IN_A_ROW)):
        yield "\n\n".join(p.prompt + p.completion for p in several)


def _write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
