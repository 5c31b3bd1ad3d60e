"""Checks of a run that goes on: nothing that its result depends on has changed since it began."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.storage import Folder
from orchestrator.checks.owners import check_nobody_drives
from orchestrator.config import Job, RunConfig
from orchestrator.errors import Refusal
from orchestrator.layouts import layout_facts
from orchestrator.saved_run import saved_job

FACTS = "plan.json"
"""What a run rests on, in its folder."""
SIGNALS = "signals."
"""Before an endpoint's name among fingerprints: `live`, or the digests of the stores that answer for it."""
ANSWERS = ".answers"
"""Behind an endpoint among fingerprints: what its answers depend on. The facts of older runs lack it."""
FREE = (
    "name",
    "tags",
    "alarms",
    "train.workers",
    "train.layout.offload_optimizer",
    "train.max_failures",
    "train.read_ahead_bundles",
    "signals.folder",
    "signals.part_tokens",
    "text.folder",
    "text.part_prompts",
    "endpoints.*.actors",
    "endpoints.*.resources",
    "endpoints.*.base_url",
    "endpoints.*.api_key_env",
    "endpoints.*.requests_at_once",
    "endpoints.*.requests_per_minute",
    "endpoints.*.timeout_seconds",
    "endpoints.*.max_retries",
    "endpoints.*.price_per_million_tokens",
)
"""Settings that a resumed run may change: they say where, how fast and how watched, not what."""


@dataclass(frozen=True)
class Facts:
    """What a run rests on besides its recipe."""

    fingerprints: Mapping[str, str]
    """Of data, student, tokenizer and every endpoint's model."""
    steps: int
    vocabulary: int
    workers: int

    def to_json(self) -> bytes:
        """Content of `FACTS`."""
        return json.dumps(vars(self) | {"fingerprints": dict(self.fingerprints)}, indent=1).encode()


def check_resumable(folder: Folder, job: Job, result: str) -> None:
    """The folder holds an unfinished run of the same recipe. One without a checkpoint goes on from the start."""
    where = f"resume {folder.root}"
    before = saved_job(folder).run
    if folder.exists(result):
        do = "Start another run under a new name; `distill evaluate` and `distill export` work on this one."
        raise Refusal(where, "a finished run", "one that has steps to go", do)
    check_nobody_drives(where, folder)
    check_same_recipe(where, before, job.run)


def check_same_recipe(where: str, before: RunConfig, now: RunConfig) -> None:
    """`Refusal` names the first setting that differs and is not one of `FREE`."""
    old, new = (dict(_flat(config.model_dump(mode="json"), ())) for config in (before, now))
    for path in [*old, *(p for p in new if p not in old)]:
        if old.get(path) != new.get(path) and not _is_free(path):
            name = ".".join(path)
            got = f"{name} = {new.get(path)!r}"
            do = "Leave it as it was, or start a new run with it."
            raise Refusal(where, got, f"{old.get(path)!r}, as the run began", do)


def check_same_facts(folder: Folder, job: Job, now: Facts) -> None:
    """The same data, models and steps as when the run began; another number of workers where the layout can."""
    content, where = folder.read(FACTS), f"resume {folder.root}"
    if content is None:
        return
    before = Facts(**json.loads(content))
    for name in [*before.fingerprints, *(n for n in now.fingerprints if n not in before.fingerprints and not n.endswith(ANSWERS))]:
        old, new = before.fingerprints.get(name, "nothing"), now.fingerprints.get(name, "nothing")
        if old != new:
            do = "Bring back what was there, or start a new run."
            raise Refusal(where, f"another {name} ({new[:23]})", f"the one it began with ({old[:23]})", do)
    for name in ("steps", "vocabulary"):
        if getattr(before, name) != getattr(now, name):
            do = "Start a new run."
            raise Refusal(where, f"{getattr(now, name)} {name}", f"{getattr(before, name)}, as it began", do)
    if before.workers != now.workers and not layout_facts(job.run.train.layout).resumes_any_world:
        do = f"Set train.workers={before.workers}."
        raise Refusal(where, f"{now.workers} workers", f"the {before.workers} that this layout's checkpoint is of", do)


def signals_before(folder: Folder | None) -> dict[str, str]:
    """By endpoint, whether a run that goes on began with live answers or with which stores."""
    content = None if folder is None else folder.read(FACTS)
    if content is None:
        return {}
    known: Mapping[str, str] = json.loads(content)["fingerprints"]
    return {name.removeprefix(SIGNALS): digest for name, digest in known.items() if name.startswith(SIGNALS)}


def _flat(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for key, inner in value.items():
        yield from _flat(inner, (*path, str(key)))


def _is_free(path: tuple[str, ...]) -> bool:
    for pattern in FREE:
        wanted = pattern.split(".")
        if len(path) >= len(wanted) and all(w in ("*", p) for w, p in zip(wanted, path, strict=False)):
            return True
    return False
