"""Small real things for tests: a byte-level BPE tokenizer and a Qwen3 model, made in a moment and without a network."""

from __future__ import annotations

import argparse
import inspect
import json
import textwrap
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML without generation markers, as most published tokenizers have it."""

CHATML_MARKED = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- message['content'] + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""The same text, with the assistant's own tokens marked by `{% generation %}`."""

TEMPLATES = {"plain": CHATML, "marked": CHATML_MARKED, "none": None}


def source_text() -> str:
    """Some 100 kB of the standard library's own source."""
    return "\n".join(inspect.getsource(module) for module in (argparse, textwrap, json))


def tiny_tokenizer(
    folder: Path | str, vocab_size: int = 512, template: Literal["plain", "marked", "none"] = "plain"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on standard library source and saved in `folder`, loadable by AutoTokenizer.

    EOS and padding are `<|endoftext|>`; no BOS is added.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(source_text().splitlines(keepends=True), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATES[template]
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def tiny_model(
    folder: Path | str,
    vocab_size: int = 512,
    width: int = 32,
    layers: int = 2,
    heads: int = 4,
    max_length_tokens: int = 512,
    tied: bool = True,
    seed: int = 0,
) -> Qwen3ForCausalLM:
    """A Qwen3 model with seeded random float32 weights, saved in `folder`; put a tokenizer in the same folder as needed."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=max(2, width // heads),
        max_position_embeddings=max_length_tokens,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(str(folder))
    return model


def tiny_pair(folder: Path, rows: int) -> Path:
    """`folder` with a student, a wider teacher of other weights, and `rows.jsonl` of so many prompts with completions."""
    for name, width, seed in (("student", 32, 0), ("teacher", 48, 1)):
        tokenizer = tiny_tokenizer(folder / name)
        tiny_model(folder / name, vocab_size=len(tokenizer), width=width, seed=seed)
    pairs = ({"prompt": f"def f{i}(x):", "completion": f" return x + {i}"} for i in range(rows))
    (folder / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder
