"""Time of forward and backward: the chunked head over whole logits, log-softmax and autograd.

The worse of two signals: a teacher's top 64 with a bucket, and a teacher's hidden states with its head, both with forward KL
in float32 at vocabulary 131,072, 2,048 tokens and width 1,024.
"""

from __future__ import annotations

from tests.benchmarks.figure import Figure, Settings
from tests.benchmarks.head import Ratio, answers, figure, large

NAME = "head-time"
RATIOS = (Ratio("topk", "chunked topk", ["plain topk"]), Ratio("hidden", "chunked hidden", ["plain hidden"]))
AGAINST = "whole logits, log_softmax and autograd"


def measure(settings: Settings) -> Figure:
    case = large("seconds", settings.smoke)
    sides = [side for r in RATIOS for side in (r.over, *r.under)]
    return figure(NAME, settings, case, RATIOS, AGAINST, answers(settings, case, sides))
