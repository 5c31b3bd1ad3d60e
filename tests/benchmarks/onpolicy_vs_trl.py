"""The whole on-policy step, writing, scoring and learning, against TRL's DistillationTrainer: written tokens/s over tokens/s.

Both sides have the same models, prompts in the same order, rows of a step, longest text, optimizer and loss: reverse KL over the
whole vocabulary on what the student wrote at temperature 1, float32, on the same cores. The models have random weights, but for a
feature of their embeddings that makes a text end every so many tokens, sooner or later by its content: lengths are uneven as they
come, and the learning rate is so small that they stay so. Each side draws its own texts: tokens are counted, not steps.

TRL has one way to share out threads, and is given the better of two; so has the product without staleness. With `staleness: 1`
it writes while it trains, which TRL cannot: that ratio stands beside, as does one with the teacher's top 64 only.

TRL is not a dependency: see `train_vs_trl`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine, median
from tests.benchmarks.loop import prepare_rows, run_loop
from tests.benchmarks.material import Material
from tests.benchmarks.product import Run, Setup, recipe, run
from tests.benchmarks.train_vs_trl import check_installed, questions
from tests.benchmarks.window import Trace, Window

NAME = "onpolicy-vs-trl"
BATCH_ROWS, NEW_TOKENS, ROW_TOKENS = 32, 256, 512
LR = 1e-5
TRAIN = {"batch_rows": BATCH_ROWS, "lr": LR, "lr_schedule": "constant", "weight_decay": 0.05, "betas": [0.9, 0.95], "layout": "single"}
TRL_THREADS = (2, 1)
MEAN_TOKENS = 80
"""Of a text, about, if the longest were not cut."""
FEATURE = 0.5
"""Of every embedding, whose norm is about 1."""
PARTS = ("step_seconds", "stream_wait_seconds", "write_seconds", "score_seconds/teacher", "rollout/length", "rollout/finished")


@dataclass(frozen=True)
class Way:
    """One way to run the product."""

    name: str
    threads: int | None = None
    """Of each process; as the product shares them out when None."""
    staleness: int = 0
    take: str = "hidden"
    """Of the teacher: `hidden` is the whole distribution, as TRL has it."""


SAME = (Way("as shared out"), Way("2 threads each", threads=2))
"""The same work as TRL's. The value is the better one's."""
BESIDE = (
    Way("staleness 1", staleness=1),
    Way("staleness 1, 2 threads each", threads=2, staleness=1),
    Way("top 64, 2 threads each", threads=2, take="topk"),
)


def measure(settings: Settings) -> Figure:
    """Ratio of medians over the rounds, the better of two product setups over TRL with its better number of threads."""
    check_installed(NAME)
    from tests.benchmarks.trl_writing_loop import WritingSpec

    window = Window(2, 3, 1) if settings.smoke else Window(5, 20, 2)
    material = questions(NAME, settings)
    new_tokens = 16 if settings.smoke else NEW_TOKENS
    rows = 4 if settings.smoke else BATCH_ROWS
    contents = {way: _content(material, way, window.steps, rows, new_tokens) for way in SAME + BESIDE}
    storage = settings.folder / "runs"
    spec = WritingSpec(
        student=str(material.student),
        teacher=str(material.teacher),
        rows=prepare_rows(contents[SAME[0]], storage / "data"),
        steps=window.steps,
        batch_rows=rows,
        threads=2,
        lr=LR,
        max_new_tokens=new_tokens,
    )
    for folder in (material.teacher, material.student):
        let_texts_end(folder, mean_tokens=8 if settings.smoke else MEAN_TOKENS)
    raw: dict[str, list[dict[str, float]]] = {}
    for turn in range(settings.rounds):
        for threads in TRL_THREADS[: 1 if settings.smoke else None]:
            theirs = run_loop("tests.benchmarks.trl_writing_loop", replace(spec, threads=threads), settings.folder / "trl")
            _note(raw, f"DistillationTrainer, threads={threads}", _speeds(theirs, window))
        for way, content in list(contents.items())[: 1 if settings.smoke else None]:
            done = run(settings.folder / f"turn{turn}", content, Setup(way.name, worker_threads=way.threads), storage)
            _note(raw, way.name, _numbers(done, window))
    sizes = {"parameters": material.parameters, "batch_rows": rows, "max_new_tokens": new_tokens}
    return _figure(settings, window, raw, sizes)


def _content(material: Material, way: Way, steps: int, rows: int, new_tokens: int) -> dict[str, Any]:
    data = {"held_out_rows": 8, "max_length_tokens": ROW_TOKENS, "overlong": "quarantine"}
    setup = Setup(way.name, scorer_threads=way.threads)
    content = recipe(material, setup, {**TRAIN, "batch_rows": rows, "steps": steps}, data, {})
    student = {} if way.threads is None else {"student": {"resources": {"threads": way.threads}}}
    writing = {"type": "gkd", "beta": 1.0, "take": {"type": way.take}, "max_new_tokens": new_tokens, "staleness": way.staleness}
    return {**content, "strategy": writing, "endpoints": {**content["endpoints"], **student}}


@torch.inference_mode()
def let_texts_end(folder: Path, mean_tokens: int) -> None:
    """Makes the first feature of all embeddings of the model in `folder` alike, and that of EOS so much larger that in the output head,
    which is the same matrix, EOS is as likely after random ids as in texts of `mean_tokens` tokens."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weight, end = model.get_output_embeddings().weight, model.config.eos_token_id
    weight[:, 0] = FEATURE
    ids = torch.randint(model.config.vocab_size, (8, 128), generator=torch.Generator().manual_seed(0))
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    logits = states @ weight.T
    others = logits.index_fill(1, torch.tensor([end]), -torch.inf).logsumexp(-1)
    low, high = 0.0, 100.0
    for _ in range(40):
        more = (low + high) / 2
        likely = torch.sigmoid(logits[:, end] + more * states[:, 0] - others).mean()
        low, high = (more, high) if likely < 1 / mean_tokens else (low, more)
    weight[end, 0] += more
    model.save_pretrained(folder)


def _speeds(trace: Trace, window: Window) -> dict[str, float]:
    """Written tokens and steps a second of the measured steps, and the mean length of their texts."""
    first, last = window.warm_up, window.warm_up + window.measured
    return {
        "tokens_per_second": trace.tokens_per_second(window),
        "steps_per_second": window.measured / (trace.times[last - 1] - trace.times[first - 1]),
        "tokens_per_step": sum(trace.tokens[first:last]) / window.measured,
        "first_loss": trace.losses[0],
    }


def _numbers(done: Run, window: Window) -> dict[str, float]:
    """The same of a run of the product, and where its time went."""
    steps = done.steps()
    tokens = (round(s["values"]["rollout/length"] * s["values"]["rows"]) for s in steps)
    trace = Trace(tuple(s["time"] for s in steps), tuple(tokens), tuple(s["values"]["loss"] for s in steps))
    last = window.warm_up + window.measured
    return {**_speeds(trace, window), **{m: done.median_of(m, window.warm_up + 1, last) for m in PARTS}}


def _note(raw: dict[str, list[dict[str, float]]], side: str, numbers: dict[str, float]) -> None:
    numbers = {**numbers, "load": os.getloadavg()[0]}
    raw.setdefault(side, []).append(numbers)
    print(f"{side}: " + ", ".join(f"{name} {value:,.4g}" for name, value in numbers.items()), flush=True)


def _figure(settings: Settings, window: Window, raw: Mapping[str, list[dict[str, float]]], sizes: Mapping[str, object]) -> Figure:
    medians = {side: median(n["tokens_per_second"] for n in numbers) for side, numbers in raw.items()}
    theirs = max((side for side in medians if side.startswith("DistillationTrainer")), key=medians.__getitem__)
    ours = max((way.name for way in SAME if way.name in medians), key=medians.__getitem__)
    return Figure(
        name=NAME,
        value=medians[ours] / medians[theirs],
        unit="written tokens/s over written tokens/s",
        against="trl.DistillationTrainer, beta=1 (reverse KL), generating with transformers, without gradient checkpointing",
        target=BENCHMARKS[NAME].target,
        measured={
            **machine(),
            "smoke": settings.smoke,
            "value_of": f"{ours} over {theirs}",
            "ratios": {side: speed / medians[theirs] for side, speed in medians.items()},
            "rounds": raw,
            "steps": asdict(window),
            **sizes,
        },
    )
