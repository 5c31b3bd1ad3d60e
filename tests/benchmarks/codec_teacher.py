"""A teacher of 22 million parameters and a student of 5, trained for minutes on the standard library and GSM8K."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from jobs.quickstart import END, has_bfloat16, held_out, sources
from tests.benchmarks.train_vs_trl import DATA

VOCABULARY = 32_000
TEACHER = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1152, "num_attention_heads": 6, "head_dim": 64}
STUDENT = {"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 384, "num_attention_heads": 2, "head_dim": 64}
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 8}
SECONDS = {"teacher": 540.0, "student": 120.0}
SEEDS = {"teacher": 7, "student": 8}
"""A tiny student that is the teacher's twin has no gradient to be wrong about."""
ROW_TOKENS, BATCH_ROWS, SEED = 256, 4, 0


@dataclass(frozen=True)
class Trained:
    """Two models saved under `folder` and text that neither has read."""

    folder: Path
    held_out: Tensor
    """`(R, ROW_TOKENS)` int64, of both sources in turns."""
    about: dict[str, Any]


def train(folder: Path, data: Path | None, smoke: bool) -> Trained:
    """Trains what `folder` lacks. `data` is GSM8K's train.jsonl; without one at hand, the standard library alone is read."""
    path = data or DATA
    if data is not None and not data.exists():
        raise SystemExit(f"got no file {data}; expected GSM8K's train.jsonl, or no --data: then the standard library is read alone")
    texts = list(_texts(path, smoke))
    tokenizer = _tokenizer(folder / "tokenizer.json", [text for text, _ in texts], 400 if smoke else VOCABULARY)
    rows = {kept: _rows(tokenizer, texts, kept) for kept in (False, True)}
    about = {"text": "standard library and GSM8K" if path.exists() else "standard library alone: no GSM8K at hand"}
    for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
        if not (folder / name / "about.json").exists():
            seconds = 0.1 if smoke else SECONDS[name]
            _train(folder / name, TINY if smoke else shape, tokenizer.get_vocab_size(), rows[False], seconds)
        about[name] = json.loads((folder / name / "about.json").read_text(encoding="utf-8"))
    return Trained(folder, rows[True], about)


def _texts(path: Path, smoke: bool) -> Iterator[tuple[str, bool]]:
    """Text and whether it is held out, the sources in turns so that a prefix has both."""
    modules = [(text, held_out(name) or (smoke and at % 4 == 3)) for at, (name, text) in enumerate(sources())][: 8 if smoke else None]
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines[: 8 if smoke else None]]
    questions = [(row["question"] + "\n" + row["answer"], at % 20 == 0) for at, row in enumerate(found)]
    share = max(1, len(questions) // len(modules))
    for at, module in enumerate(modules):
        yield module
        yield from questions[at * share : (at + 1) * share]


def _tokenizer(path: Path, texts: list[str], vocabulary: int) -> Tokenizer:
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def _rows(tokenizer: Tokenizer, texts: list[tuple[str, bool]], kept: bool) -> Tensor:
    end = tokenizer.token_to_id(END)
    found = tokenizer.encode_batch([text for text, held in texts if held == kept])
    flat = torch.tensor([i for e in found for i in (*e.ids, end)])
    rows = flat[: len(flat) // ROW_TOKENS * ROW_TOKENS].view(-1, ROW_TOKENS)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))]


def _train(folder: Path, shape: dict[str, int], vocabulary: int, rows: Tensor, seconds: float) -> None:
    """Cross-entropy for `seconds`, with a cosine that ends when they do."""
    torch.manual_seed(SEEDS[folder.name])
    spread = shape["hidden_size"] ** -0.5
    config = Qwen3Config(vocab_size=vocabulary, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=spread, **shape)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    start, step, share, losses = time.monotonic(), 0, 0.0, [math.nan]
    while share < 1.0 or step < 20:
        share = min((time.monotonic() - start) / seconds, 1.0)
        optimizer.param_groups[0]["lr"] = 2e-3 * min((step + 1) / 20, 0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)
        batch = rows[torch.arange(step * BATCH_ROWS, (step + 1) * BATCH_ROWS) % len(rows)]
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            print(f"{folder.name}: step {step}, loss {losses[-1]:.3f}", flush=True)
    model.save_pretrained(folder)
    about = {"parameters": model.num_parameters(), "read_tokens": step * BATCH_ROWS * ROW_TOKENS, "last_loss": sum(losses[-20:]) / 20}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
