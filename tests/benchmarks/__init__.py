"""Side-by-side measurements, run by hand: `python -m tests.benchmarks` lists them. No unit test asserts a speed.

A benchmark is a module with `measure(settings) -> Figure` and one row in `BENCHMARKS`. Both sides of a ratio are measured in
one call, in turns, each in a process of its own, and the figure carries the raw numbers of both.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One benchmark as the list shows it; its module is imported only when it runs."""

    home: str
    """Module with `measure(settings: Settings) -> Figure`."""
    line: str
    target: str


BENCHMARKS: dict[str, Entry] = {
    "train-vs-bare": Entry(
        "tests.benchmarks.train_vs_bare",
        "steady training tokens/s of a run over a bare PyTorch loop doing the same work on the same cores",
        "ratio >= 0.90",
    ),
    "train-vs-trl": Entry(
        "tests.benchmarks.train_vs_trl",
        "training tokens/s over TRL's GKDTrainer on the same rows of uneven length, off-policy",
        "ratio >= 1.3",
    ),
    "first-step": Entry(
        "tests.benchmarks.first_step",
        "seconds from the command to the first optimizer step, with data that was never prepared",
        "<= 25 s with one worker",
    ),
    "head-memory": Entry(
        "tests.benchmarks.head_memory",
        "peak extra memory of the chunked head's forward and backward over whole logits and autograd, V = 131,072",
        "ratio <= 0.125",
    ),
    "head-time": Entry(
        "tests.benchmarks.head_time",
        "time of the chunked head's forward and backward over whole logits and autograd, V = 131,072",
        "ratio <= 1.0",
    ),
}
