"""Verifiers of somebody else, good and bad."""

from __future__ import annotations

import os
import time


def half(text: str, reference: str) -> float:
    """0.5 for a text of the reference's length."""
    print("noise" * 1000)
    return 0.5 * (len(text) == len(reference))


def same(text: str, reference: str) -> bool:
    """Whether they are the same; misbehaves for some texts, each in its own way."""
    if text == "throw":
        raise RuntimeError("no\nway")
    if text == "exit":
        raise SystemExit(0)
    if text == "die":
        os._exit(0)
    if text == "hang":
        time.sleep(999)
    return text == reference


def lavish(text: str, reference: str) -> float:
    """More than a reward may be."""
    return float(text)


def words(text: str, reference: str) -> str:
    """No reward at all."""
    return "right"


NOT_CALLABLE = 3
