"""KL error of the packed codec in 100 bytes a token, over that of DistillKit's budget setting. How: `codecs.py`."""

from __future__ import annotations

from tests.benchmarks.codec_peer import BUDGET
from tests.benchmarks.codecs import compare
from tests.benchmarks.figure import Figure, Settings

NAME = "codec-100"


def measure(settings: Settings) -> Figure:
    return compare(NAME, settings, 100, BUDGET)
