"""Time of forward and backward against Liger's chunked Jensen-Shannon loss, from the hidden states and heads of both models.

The same quantity on both sides: JSD with beta 1/2 of whole distributions, float32, at vocabulary 131,072, 2,048 tokens and
width 1,024. The figure holds the better of Liger compiled and uncompiled, both with its default chunk of 1,024 tokens; the
time to compile is left out. `within` says how far the forward and the reverse KL are from the JSD of the same head.

Liger is not a dependency. `pip install -e .[bench]` adds it; to leave an environment as it is,
`pip install --no-deps --target FOLDER liger-kernel` and run with `PYTHONPATH=FOLDER`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

from tests.benchmarks.figure import Figure, Settings, median
from tests.benchmarks.head import Ratio, answers, figure, large

NAME = "head-time-vs-liger"
RATIOS = (Ratio("jsd", "chunked hidden, jsd", ["liger", "liger, compiled"]),)
AGAINST = "liger_kernel.chunked_loss.LigerFusedLinearJSDLoss, the better of compiled and uncompiled"
KLS = ("chunked hidden", "chunked hidden, reverse")


def measure(settings: Settings) -> Figure:
    check_installed(NAME)
    case = large("seconds", settings.smoke)
    found = answers(settings, case, [RATIOS[0].over, *RATIOS[0].under, *KLS])
    jsd = median(a.value for a in found[RATIOS[0].over])
    within = {side: median(a.value for a in found[side]) / jsd for side in KLS}
    result = figure(NAME, settings, case, RATIOS, AGAINST, found)
    return replace(result, measured={**result.measured, "kl_over_own_jsd": within})


def check_installed(name: str) -> None:
    """`SystemExit` with what to do when Liger cannot be imported."""
    if importlib.util.find_spec("liger_kernel") is None:
        how = " ".join((__doc__ or "").split("\n\n")[2].split())
        raise SystemExit(f"{name}: got no liger_kernel; expected it to be installed. {how}")
