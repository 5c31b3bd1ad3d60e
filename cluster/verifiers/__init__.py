"""Verifiers: whether a written text is right. What a text contains is executed in the sandbox alone."""

from __future__ import annotations

from typing import NamedTuple


class Judged(NamedTuple):
    """What a verifier says of a text."""

    reward: float | None
    """0 to 1. None: nobody can say, because the reference has no answer."""
    reason: str
    """Why it is not 1; may be empty."""


class VerifierFailed(ValueError):
    """A verifier that gave no verdict: it threw, hung, died or could not be started."""
