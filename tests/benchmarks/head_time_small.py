"""Time of forward and backward at the quickstart's size, where logits of a micro-batch take 33 MB and products little time.

The chunked head over whole logits, log-softmax and autograd: forward KL on a teacher's top 256 with a bucket, float32,
vocabulary 4,096, 2,032 tokens and width 88.
"""

from __future__ import annotations

from tests.benchmarks.figure import Figure, Settings
from tests.benchmarks.head import Ratio, answers, figure, small

NAME = "head-time-small"
RATIOS = (Ratio("topk", "chunked topk", ["plain topk"]),)


def measure(settings: Settings) -> Figure:
    case = small("seconds", settings.smoke)
    found = answers(settings, case, [RATIOS[0].over, *RATIOS[0].under])
    return figure(NAME, settings, case, RATIOS, "whole logits, log_softmax and autograd", found)
