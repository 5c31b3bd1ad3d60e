"""Domains: kinds of rows, such as the languages or the skills that they are about, known everywhere by a number of their name."""

from __future__ import annotations

from hashlib import blake2b

DOMAIN = "domain"
"""Column `(R,)` int64 of a bundle whose data has domains: the `domain_id` of each row's. A row that somebody writes keeps that of the
row whose prompt it has."""


def domain_id(name: str) -> int:
    """A number of 63 bits that depends on the name alone, so that a stage knows a domain without knowing the data."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
