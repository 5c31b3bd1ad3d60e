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
    "onpolicy-vs-trl": Entry(
        "tests.benchmarks.onpolicy_vs_trl",
        "written tokens/s of the whole on-policy step over TRL's DistillationTrainer: same models, prompts, lengths, loss and cores",
        "ratio >= 1.5",
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
    "head-time-small": Entry(
        "tests.benchmarks.head_time_small",
        "the same at the quickstart's size: V = 4,096, 2,032 tokens, top 256",
        "ratio <= 1.0",
    ),
    "head-memory-vs-liger": Entry(
        "tests.benchmarks.head_memory_vs_liger",
        "peak extra memory of the chunked head over Liger's chunked JSD, from hidden states and heads of both models",
        "ratio <= 1.0",
    ),
    "head-time-vs-liger": Entry(
        "tests.benchmarks.head_time_vs_liger",
        "time of the chunked head over Liger's chunked JSD, the better of compiled and uncompiled",
        "ratio <= 1.0",
    ),
    "three-terms": Entry(
        "tests.benchmarks.three_terms",
        "time of three terms in one pass of the head over one of them",
        "ratio <= 1.5",
    ),
    "memory-vs-trl": Entry(
        "tests.benchmarks.memory_vs_trl",
        "peak resident memory of a training worker over that of TRL's GKDTrainer process, V = 131,072, the same rows",
        "ratio <= 0.6",
    ),
    "store-vs-ce": Entry(
        "tests.benchmarks.store_vs_ce",
        "training tokens/s from a signal store over the same student on cross-entropy alone",
        "ratio >= 0.90",
    ),
    "capture-vs-forward": Entry(
        "tests.benchmarks.capture_vs_forward",
        "tokens/s of capturing signals over a bare batched forward of the same teacher, 1,024 wide",
        "ratio >= 0.90",
    ),
    "rollout-vs-generate": Entry(
        "tests.benchmarks.rollout_vs_generate",
        "useful tokens/s of writing texts of uneven length over transformers' generate in batches of 16",
        "ratio >= 1.5",
    ),
    "staleness-speedup": Entry(
        "tests.benchmarks.staleness_speedup",
        "steps/s with staleness 1 over staleness 0, writing and training being sleeps of equal length",
        "ratio >= 1.6",
    ),
    "verifiable-task": Entry(
        "tests.benchmarks.verifiable_task",
        "a student's KL to its teacher on its own text after on-policy methods over after off-policy logits; accuracies of all methods",
        "ratio < 1.0",
    ),
    "pass-rate": Entry(
        "tests.benchmarks.pass_rate",
        "wrong answers of a student whose prompts weigh by how often it solves them, over equal weights; and weights dealt by lot",
        "ratio < 1.0",
    ),
    "specialists": Entry(
        "tests.benchmarks.specialists",
        "share of the gap to a specialist's own student that a routed student of two specialists closes on each domain",
        "share >= 0.95",
    ),
    "curriculum-mixture": Entry(
        "tests.benchmarks.curriculum_mixture",
        "gap to the teacher that is left, over two domains, when the mixture follows it, over the data's own proportions, at equal tokens",
        "ratio < 1.0",
    ),
    "together": Entry(
        "tests.benchmarks.together",
        "held-out cross-entropy of two teachers, a mixture that follows the gap and own rows in one run, over no teacher; and of its parts",
        "ratio < 1.0",
    ),
    "align-throughput": Entry(
        "tests.benchmarks.align_throughput",
        "tokens/s of the Align stage over training tokens/s of the quickstart's student on cross-entropy alone, one thread each",
        "ratio >= 10",
    ),
    "cross-tokenizer": Entry(
        "tests.benchmarks.cross_tokenizer",
        "held-out bits per byte of students with another BPE and of bytes, taught across tokenizers, over cross-entropy alone; equal bytes",
        "ratio < 1.0",
    ),
    "teacher-tokens": Entry(
        "tests.benchmarks.teacher_tokens",
        "tokens a teacher is sent over the tokens of the data, with four students and two epochs from one store",
        "ratio = 1.0",
    ),
    "search-cost": Entry(
        "tests.benchmarks.search_cost",
        "core-seconds of a search of eight trials on one store over the same eight recipes run apart with a live teacher each",
        "ratio <= 0.5",
    ),
    "asha-cost": Entry(
        "tests.benchmarks.asha_cost",
        "core-seconds of a search of eight trials with ASHA over the same without a scheduler, at a quality within 1 %",
        "ratio <= 0.6",
    ),
    "search-seconds": Entry(
        "tests.benchmarks.search_seconds",
        "seconds of a search of eight trials at the quickstart's size, from the command to the report",
        "<= 600 s",
    ),
    "recovery-seconds": Entry(
        "tests.benchmarks.recovery_seconds",
        "seconds from SIGKILL of a training worker to the next optimizer step, with a stored signal; beside it with a live teacher",
        "<= 30 s",
    ),
    "scale-1-to-2": Entry(
        "tests.benchmarks.scale_1_to_2",
        "training tokens/s of two workers of one thread over one, on a stored signal and steps of a second or more",
        "ratio >= 1.7",
    ),
    "memory-flat": Entry(
        "tests.benchmarks.memory_flat",
        "growth of a run's driver and board over 10,000 steps and 1,000,000 rows",
        "<= 32 MiB",
    ),
    "orchestration-share": Entry(
        "tests.benchmarks.orchestration_share",
        "share of the time of 24 training workers that is neither a step nor its overlap, with 8 scorers, all of them stand-ins that sleep",
        "<= 0.05",
    ),
    "store-format": Entry(
        "tests.benchmarks.store_format",
        "rows/s read in shuffled order from a store's Arrow files over the same arrays in Parquet",
        "ratio >= 1.0",
    ),
    "codec-300": Entry(
        "tests.benchmarks.codec_300",
        "KL error of the packed top-k codec at 300 bytes a token over that of DistillKit's recommended setting (344 bytes)",
        "ratio < 1.0",
    ),
    "codec-100": Entry(
        "tests.benchmarks.codec_100",
        "the same at 100 bytes a token over DistillKit's budget setting (127 bytes)",
        "ratio < 1.0",
    ),
}
