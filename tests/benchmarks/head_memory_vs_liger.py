"""Peak extra memory of forward and backward against Liger's chunked Jensen-Shannon loss.

The same quantity and case as `head_time_vs_liger.py`, which also says how to install Liger; how memory is measured:
`head_work.py`. The figure holds the better of Liger compiled and uncompiled.
"""

from __future__ import annotations

from tests.benchmarks.figure import Figure, Settings
from tests.benchmarks.head import answers, figure, large
from tests.benchmarks.head_time_vs_liger import AGAINST, RATIOS, check_installed

NAME = "head-memory-vs-liger"


def measure(settings: Settings) -> Figure:
    check_installed(NAME)
    case = large("bytes", settings.smoke)
    found = answers(settings, case, [RATIOS[0].over, *RATIOS[0].under])
    return figure(NAME, settings, case, RATIOS, f"{AGAINST}; without one (V, D) weight gradient on both sides", found)
