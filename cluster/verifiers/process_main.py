"""The child of `process.py`: imports one verifier, then answers until its parent is gone. Arguments: a descriptor and settings."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import get_args

from cluster.verifiers import Judged
from cluster.verifiers.answers import Kind, Verdict, verdict

MEMORY_BYTES = 4 * 2**30
GRACE_SECONDS = 2.0
"""By how much this process outlives a limit by itself, so that the parent is the one who ends it."""

Judge = Callable[[str, str], Judged]


def main() -> None:
    """Says nothing when ready, else what is wrong; then `[text, reference, seconds]` in and `[reward, reason, failed]` out."""
    descriptor, settings = int(sys.argv[1]), json.loads(sys.argv[2])
    os.set_inheritable(descriptor, False)
    with Connection(descriptor) as parent:
        try:
            judge = judge_for(settings)
        except BaseException as error:  # noqa: BLE001 - a module of somebody else is imported, which may raise anything
            parent.send_bytes(_said(error).encode())
            return
        parent.send_bytes(b"")
        while (job := _next(parent)) is not None:
            parent.send_bytes(_answer(judge, *job))


def judge_for(settings: dict[str, str | None]) -> Judge:
    """What the settings of a `JudgeProcess` say. Whatever importing a function raises; `TypeError` for one that cannot be called."""
    kind, pattern, path = settings["kind"], settings.get("pattern"), settings.get("function")
    if kind == "callable":
        return _graded(_found(path or ""))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    if kind == "math":
        from cluster.verifiers.maths import math_verdict

        return lambda text, reference: _judged(math_verdict(text, reference))
    known: dict[str | None, Kind] = {name: name for name in get_args(Kind)}
    return lambda text, reference: _judged(verdict(known[kind], text, reference, pattern))


def _next(parent: Connection) -> tuple[str, str, float] | None:
    try:
        text, reference, seconds = json.loads(parent.recv_bytes())
    except (EOFError, ConnectionResetError):
        return None
    return text, reference, seconds


def _answer(judge: Judge, text: str, reference: str, seconds: float) -> bytes:
    """Ends this process when the verdict takes too long, so that none is left to run when the parent was killed."""
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True, file=nowhere)
        try:
            found: tuple[float | None, str, bool] = (*judge(text, reference), False)
        except BaseException as error:  # noqa: BLE001 - a verifier must not end the stream, whatever it raises
            found = (None, _said(error), True)
        faulthandler.cancel_dump_traceback_later()
    return json.dumps(found).encode()


def _found(path: str) -> Callable[[str, str], object]:
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{path} is {type(function).__name__}, which cannot be called")
    return function  # type: ignore[no-any-return]  # whether it takes two texts shows when it is called


def _graded(function: Callable[[str, str], object]) -> Judge:
    def judge(text: str, reference: str) -> Judged:
        reward = float(function(text, reference))  # type: ignore[arg-type]  # raises TypeError for what is no number
        if not 0 <= reward <= 1:
            raise ValueError(f"reward: got {reward}; expected 0 to 1")
        return Judged(reward, "")

    return judge


def _judged(found: Verdict) -> Judged:
    return Judged(None if found.right is None else float(found.right), found.reason)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__} ({' '.join(str(error).split())[:300]})"


if __name__ == "__main__":
    main()
