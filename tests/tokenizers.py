"""Tokenizers of several kinds for tests, all made in a moment, and the bytes of their tokens read another way than the code does."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from strategies.core import Columns
from tests.tiny import CHATML, source_text

END = "<|endoftext|>"


def byte_level_bpe(vocabulary: int, digits: bool = False, template: str | None = None, turn: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2 and its heirs have it; with `digits`, none of its tokens holds two."""
    raw = Tokenizer(models.BPE())
    alone = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), alone]) if digits else alone
    raw.decoder = decoders.ByteLevel()
    marks = [END, "<|im_start|>", "<|im_end|>"] if turn is None else [END, turn]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(source_text().splitlines(keepends=True), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=END)
    tokenizer.chat_template = template or CHATML
    return tokenizer


def bytes_alone() -> PreTrainedTokenizerFast:
    """A token for every byte."""
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


def sentencepiece(fallback: bool = True, changed: bool = False) -> PreTrainedTokenizerFast:
    """BPE over characters, as Llama 2 has it: a space before every text, BOS, and bytes for unknown characters, or `<unk>` without
    `fallback`. `changed` makes it read another text than it is given: full-width letters as plain ones."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    trained.train_from_iterator(source_text().splitlines(), trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for b in range(256 if fallback else 0):
        vocabulary[f"<0x{b:02X}>"] = len(vocabulary)
    raw = Tokenizer(models.BPE(vocabulary, [tuple(m) for m in model["merges"]], byte_fallback=fallback, unk_token="<unk>", fuse_unk=True))
    steps: list[Any] = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), *steps] if changed else steps)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bpe": lambda: byte_level_bpe(512),
    "large-bpe": lambda: byte_level_bpe(1500, digits=True),
    "bytes": bytes_alone,
    "byt5": ByT5Tokenizer,
    "sentencepiece": sentencepiece,
}


@cache
def kind(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a kind; made once."""
    return KINDS[name]()


def shown_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """What each id says, told by the tokens' names and, of byte-level ones, by the table of transformers; special ones say nothing."""
    special, table = set(tokenizer.all_special_ids), {c: b for b, c in bytes_to_unicode().items()}

    def said(token: str) -> bytes:
        if isinstance(tokenizer, ByT5Tokenizer):
            return bytes([ord(token)])
        if tokenizer.unk_token is None:
            return bytes(table[c] for c in token)
        return bytes([int(token[3:5], 16)]) if len(token) == 6 and token.startswith("<0x") else token.replace("▁", " ").encode()

    tokens = tokenizer.convert_ids_to_tokens(list(range(max(tokenizer.get_vocab().values()) + 1)))
    return [b"" if i in special else said(t) for i, t in enumerate(tokens)]


def bundle(rows: list[list[int]], masks: list[list[int]] | None = None) -> Columns:
    """Rows of ids; everything but their first token is learnt unless masks say otherwise."""
    learnt = masks or [[0, *[1] * (len(r) - 1)] for r in rows]
    return {
        "tokens": np.asarray([t for r in rows for t in r], np.int32),
        "lengths": np.asarray([len(r) for r in rows], np.int32),
        "loss_mask": np.asarray([m for r in learnt for m in r], np.uint8),
        "row_id": np.arange(len(rows)),
    }
