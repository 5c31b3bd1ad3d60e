"""KL error of the packed codec in 300 bytes a token, over that of DistillKit's recommended setting. How: `codecs.py`.

Beside it, what hidden states and draws cost and lose: `codec_states.py`.
"""

from __future__ import annotations

from dataclasses import replace

from tests.benchmarks.codec_peer import RECOMMENDED
from tests.benchmarks.codec_states import others
from tests.benchmarks.codecs import compare
from tests.benchmarks.figure import Figure, Settings

NAME = "codec-300"


def measure(settings: Settings) -> Figure:
    figure = compare(NAME, settings, 300, RECOMMENDED)
    return replace(figure, measured={**figure.measured, **others(settings)})
