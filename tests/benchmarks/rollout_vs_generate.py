"""How fast texts of uneven length are written in slots, over `generate` of the same model in batches: useful tokens/s over tokens/s.

Every text's length is drawn from a log-normal distribution whose longest is at least three times the mean, and forced on both
sides: here by the row's own `max_new_tokens`, there by a stopping criterion that says of each row whether it is done, so that a
done row is padded until the longest of its batch ends. Padding is not counted. Both sides hold 16 texts at a time, draw at
temperature 1, and compute with 2 threads in a process of their own; the product's also gives log-probabilities. It takes prompts
by their length and does not look at limits to choose an order, so that it learns no more than the other side of where texts end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import BENCHMARKS, material
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.product import ROOT, environment

NAME = "rollout-vs-generate"
AT_ONCE, THREADS = 16, 2
TEXTS, PROMPT_TOKENS, MEDIAN_TOKENS, SIGMA = 160, (8, 64), 64, 0.7
SMOKE_TEXTS = 24
SEED = 5
SIDES = ("slots", "generate")


def measure(settings: Settings) -> Figure:
    """Ratio of medians over the rounds; sides take turns."""
    teacher = material.standard_library(settings.folder / "material", settings.smoke).teacher
    prompts, limits = _work(settings.smoke)
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(settings.rounds):
        for side in SIDES:
            speeds[side].append(_run(side, teacher, settings.smoke))
        print(", ".join(f"{side} {s[-1]:,.0f} tokens/s" for side, s in speeds.items()), f"load {os.getloadavg()[0]:.1f}", flush=True)
    lengths = {"texts": len(prompts), "mean": float(limits.mean()), "longest": int(limits.max())}
    return Figure(
        name=NAME,
        value=median(speeds["slots"]) / median(speeds["generate"]),
        unit="useful tokens/s over useful tokens/s",
        against=f"transformers' generate in batches of {AT_ONCE} with {THREADS} threads, lengths forced alike",
        target=BENCHMARKS[NAME].target,
        measured={**machine(), "smoke": settings.smoke, "tokens_per_second": speeds, "at_once": AT_ONCE, "lengths": lengths},
    )


def _work(smoke: bool) -> tuple[list[np.ndarray[Any, np.dtype[np.int32]]], np.ndarray[Any, np.dtype[np.int32]]]:
    """Prompts of random ids that every model here embeds, and the length of each text."""
    random = np.random.default_rng(SEED)
    texts = SMOKE_TEXTS if smoke else TEXTS
    prompts = [random.integers(0, 512, size).astype(np.int32) for size in random.integers(*PROMPT_TOKENS, texts)]
    lengths = np.ceil(random.lognormal(np.log(MEDIAN_TOKENS), SIGMA, texts)).astype(np.int32)
    if not smoke and lengths.max() < 3 * lengths.mean():
        raise SystemExit(f"lengths: got a longest of {lengths.max()} and a mean of {lengths.mean():.0f}; expected three times the mean")
    return prompts, lengths


def _run(side: str, teacher: Path, smoke: bool) -> float:
    """Useful tokens a second of one side, in a process of its own."""
    asked = json.dumps({"side": side, "teacher": str(teacher), "smoke": smoke})
    done = subprocess.run([sys.executable, "-m", __name__, asked], cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the side {side} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def speed(side: str, teacher: str, smoke: bool) -> float:
    """Useful tokens a second, after one batch that is not counted."""
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    prompts, lengths = _work(smoke)
    write = {"slots": _slots, "generate": _generate}[side](teacher, max(len(p) for p in prompts) + int(lengths.max()))
    write(prompts[:AT_ONCE], np.minimum(lengths[:AT_ONCE], 8))
    began = time.perf_counter()
    written = write(prompts, lengths)
    seconds = time.perf_counter() - began
    if written != lengths.sum():
        raise SystemExit(f"the side {side}: got {written} useful tokens; expected {lengths.sum()}")
    return written / seconds


def _slots(teacher: str, widest: int) -> Any:
    """The product's engine, with room for as many texts as the other side's batches."""
    from cluster.config import TransformersEndpoint
    from cluster.engines.transformers import TransformersEngine
    from strategies.core import Sampling

    engine = TransformersEngine(TransformersEndpoint(model=teacher, dtype="float32", forward_tokens=AT_ONCE * widest), threads=THREADS)

    def write(prompts: Any, lengths: Any) -> int:
        columns = {
            "tokens": np.concatenate(prompts),
            "lengths": np.asarray([len(p) for p in prompts], dtype=np.int32),
            "row_id": np.arange(len(prompts)),
            "max_new_tokens": lengths,
        }
        return int(engine.write(columns, Sampling(temperature=1.0, max_new_tokens=int(lengths.max())))["lengths"].sum())

    return write


def _generate(teacher: str, widest: int) -> Any:
    """The library's own loop, batch after batch."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

    class Done(StoppingCriteria):
        """Of each row, whether it is as long as it shall be; its `eos_token_id` makes `generate` pad such rows."""

        eos_token_id = torch.tensor([0])

        def __init__(self, ends: Any):
            self.ends = torch.from_numpy(ends)

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return input_ids.shape[1] >= self.ends

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)

    def batch(prompts: Any, lengths: Any) -> int:
        width = max(len(p) for p in prompts)
        ids = torch.stack([torch.from_numpy(np.pad(p, (width - len(p), 0))) for p in prompts]).long()
        mask = torch.stack([(torch.arange(width) >= width - len(p)).long() for p in prompts])
        done = StoppingCriteriaList([Done(width + lengths)])
        longest = int(lengths.max())
        whole = model.generate(
            input_ids=ids, attention_mask=mask, stopping_criteria=done, max_new_tokens=longest, do_sample=True, top_k=0, top_p=1.0
        )
        return int(lengths.sum()) if whole.shape[1] == width + longest else -1

    def write(prompts: Any, lengths: Any) -> int:
        starts = range(0, len(prompts), AT_ONCE)
        return sum(batch(prompts[s : s + AT_ONCE], lengths[s : s + AT_ONCE]) for s in starts)

    return write


if __name__ == "__main__":
    print(speed(**json.loads(sys.argv[1])))
