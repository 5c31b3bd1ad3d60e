"""KL error of the packed codec in 300 bytes a token, over that of DistillKit's recommended setting. How: `codecs.py`."""

from __future__ import annotations

from tests.benchmarks.codec_peer import RECOMMENDED
from tests.benchmarks.codecs import compare
from tests.benchmarks.figure import Figure, Settings

NAME = "codec-300"


def measure(settings: Settings) -> Figure:
    return compare(NAME, settings, 300, RECOMMENDED)
