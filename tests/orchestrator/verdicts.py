"""Verifiers for `kind: callable`, apart from the tests: a process that judges imports only this."""

from __future__ import annotations

import time


def even(text: str, reference: str) -> bool:
    """Right about half of the time, whoever wrote the text."""
    return sum(text.encode()) % 2 == 0


def broken(text: str, reference: str) -> bool:
    """Throws on every other text, and never returns from some of the others."""
    if sum(text.encode()) % 2:
        raise RuntimeError("a verifier's own mistake")
    if sum(text.encode()) % 8 == 0:
        time.sleep(3600)
    return True


def right(text: str, reference: str) -> bool:
    """Whatever it is."""
    return True
