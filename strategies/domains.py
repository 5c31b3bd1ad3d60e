"""Domains: the kinds of rows that a data set says it has, such as code and prose."""

from __future__ import annotations

import hashlib


def domain_id(name: str) -> int:
    """A number below 2^63 that stands for a domain in the column `domain` (R,) int64, the same wherever and whenever it is asked for."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
