"""How much of a bare batched forward's speed is left when a teacher's signals are captured: tokens/s over tokens/s.

The teacher is 1,024 wide. The bare side runs the model on the same rows of the same parts, batched by length with the same
padded tokens per forward, and throws its logits away; the product's side is `distill generate` with the packed codec and top 64,
by as many actors of one thread as the bare side has threads: they do not wait for one another where Ray's processes take a core.
Both are timed from the end of their third part to the end of their last, so that starting up is on neither side.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.config import load_job
from orchestrator.data import prepare
from orchestrator.models import load_tokenizer
from orchestrator.stores import part_starts
from tests.benchmarks import BENCHMARKS, material
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.product import ROOT, Setup, environment, recipe
from tests.benchmarks.store_vs_ce import generate

NAME = "capture-vs-forward"
WIDE = {"hidden_size": 1024, "num_hidden_layers": 6, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
PART_TOKENS, FORWARD_TOKENS, THREADS, ROW_TOKENS = 2048, 1024, 2, 128
WARM_UP = 3
"""Parts at whose end the clock starts, or all but one of fewer: until then the processes that write are starting."""


def measure(settings: Settings) -> Figure:
    """Ratio of medians over the rounds; sides take turns."""
    texts = material.standard_library(settings.folder / "material", settings.smoke)
    teacher = texts.teacher if settings.smoke else wide_teacher(texts, settings.folder / "teacher")
    setup = Setup(f"{THREADS} scorers", scorers=THREADS, scorer_threads=1)
    content = recipe(replace(texts, teacher=teacher), setup, {"steps": 1}, _data(settings.smoke), {"top_k": 64})
    content["endpoints"]["teacher"]["forward_tokens"] = FORWARD_TOKENS
    content["signals"] = {"part_tokens": PART_TOKENS}
    speeds: dict[str, list[float]] = {"capture": [], "forward": []}
    for turn in range(settings.rounds):
        bare = _forward(settings.folder / f"bare{turn}", content, teacher)
        speeds["forward"].append(bare)
        speeds["capture"].append(_capture(settings.folder / f"capture{turn}", content))
        print(
            ", ".join(f"{side} {found[-1]:,.0f} tokens/s" for side, found in speeds.items()), f"load {os.getloadavg()[0]:.1f}", flush=True
        )
    return Figure(
        name=NAME,
        value=median(speeds["capture"]) / median(speeds["forward"]),
        unit="tokens/s over tokens/s",
        against=f"the same model's batched forward on the same rows with {THREADS} threads, logits thrown away",
        target=BENCHMARKS[NAME].target,
        measured={**machine(), "smoke": settings.smoke, "tokens_per_second": speeds, "teacher": WIDE, "part_tokens": PART_TOKENS},
    )


def wide_teacher(texts: material.Material, folder: Path) -> Path:
    """A teacher of seeded random weights, `WIDE`, with the tokenizer of the other."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(texts.teacher)
    config.update({**WIDE, "head_dim": 64, "layer_types": ["full_attention"] * WIDE["num_hidden_layers"]})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(texts.teacher).save_pretrained(folder)
    return folder


def _data(smoke: bool) -> dict[str, Any]:
    """A few modules of the standard library."""
    return {"held_out_rows": 16, "max_length_tokens": ROW_TOKENS, "max_rows": 4 if smoke else 12}


def _capture(folder: Path, content: dict[str, Any]) -> float:
    """Tokens a second after the warm-up, by the clock of the files."""
    storage = folder / "runs"
    generate(folder, content, storage)
    (store,) = (storage / "signals").glob("teacher-*")
    parts = json.loads((store / "manifest.json").read_text(encoding="utf-8"))["parts"]
    ended = sorted((((store / f"part-{p['number']:06d}.arrow").stat().st_mtime), p["tokens"]) for p in parts)
    skipped = min(WARM_UP, len(ended) - 1)
    return sum(tokens for _, tokens in ended[skipped:]) / (ended[-1][0] - ended[skipped - 1][0])


def _forward(folder: Path, content: dict[str, Any], teacher: Path) -> float:
    """The same rate of a bare loop, in a process of its own."""
    run = load_job(content).run
    rows = prepare(run.data, load_tokenizer(run.student), run.data.split_seed, folder / "data").folder
    asked = json.dumps({"rows": rows, "teacher": str(teacher), "starts": part_starts(rows, PART_TOKENS)})
    done = subprocess.run([sys.executable, "-m", __name__, asked], cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the bare forward ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def bare_forward(rows: str, teacher: str, starts: list[int]) -> float:
    """Tokens a second after the warm-up."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from cluster.forwards import bundle_rows, group_by_length, lay_out
    from orchestrator.reading import prepared_rows

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    began, tokens, skipped = 0.0, 0, min(WARM_UP, len(starts) - 2)
    for number, (first, last) in enumerate(itertools.pairwise(starts)):
        columns = prepared_rows(rows, np.arange(first, last))
        laid = bundle_rows(columns)
        with torch.inference_mode():
            for group in group_by_length(laid.reach, FORWARD_TOKENS):
                model(input_ids=torch.from_numpy(lay_out(laid, [[r] for r in group]).input_ids), use_cache=False)
        if number < skipped:
            began = time.perf_counter()
        else:
            tokens += len(columns["tokens"])
    return tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    print(bare_forward(**json.loads(sys.argv[1])))
