"""Bytes of every token of a tokenizer, read off its vocabulary: how texts of two tokenizers are compared without decoding any.

Three kinds of vocabularies say what bytes their tokens are: byte-level ones (GPT-2 and its heirs, with or without merges), those made by
SentencePiece, with or without byte fallback, and byte tokenizers whose tokens are characters below 256 (ByT5).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from orchestrator.errors import Refusal

SPACE = "\u2581"
"""What SentencePiece writes for a space."""
BYTE_TOKENS = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}
"""Tokens of SentencePiece's byte fallback."""
BLANK = b" \t\n\r"
"""Bytes with which a new unit of text begins."""
PROBE = "Ab 1\n  \u00e9\u4e2d\U0001f600 z"
"""Encoded and put together again to see that a vocabulary was understood."""


@dataclass(frozen=True)
class TokenBytes:
    """What text each id stands for. Ids outside, and special tokens, stand for none."""

    flat: NDArray[np.uint8]
    """Bytes of all tokens, one after another."""
    starts: NDArray[np.int64]
    """`(V+1,)` where each token's lie."""
    prefixed: bool
    """Whether encoding puts a space before a text that is not there."""
    fallback: frozenset[int] = frozenset()
    """Ids that encoding takes only for bytes that no other token has."""

    def sizes(self, ids: NDArray[Any]) -> NDArray[np.int64]:
        """Bytes of each of `ids` `(S,)`; 0 for one that is no text."""
        known = np.minimum(ids, len(self.starts) - 2)
        return np.where(ids == known, self.starts[known + 1] - self.starts[known], 0)

    def text(self, ids: NDArray[Any]) -> NDArray[np.uint8]:
        """The bytes of all `ids`, one after another."""
        sizes = self.sizes(ids)
        before = np.cumsum(sizes) - sizes
        known = np.minimum(ids, len(self.starts) - 2)
        return self.flat[np.repeat(self.starts[known] - before, sizes) + np.arange(int(sizes.sum()))]

    def ids_by_bytes(self) -> dict[bytes, int]:
        """The id of each text that is a token, as encoding takes it: the smallest where several are, one of `fallback` last."""
        flat, starts = self.flat.tobytes(), self.starts.tolist()
        preferred = sorted(range(len(starts) - 1), key=lambda i: (i in self.fallback, i))
        return {flat[starts[i] : starts[i + 1]]: i for i in reversed(preferred) if starts[i] < starts[i + 1]}


def token_bytes(tokenizer: PreTrainedTokenizerBase, where: str) -> TokenBytes:
    """The bytes of its tokens. `Refusal`, naming `where`, for a vocabulary that does not say them."""
    special = special_ids(tokenizer)
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    texts = [b""] * (max(tokenizer.get_vocab().values()) + 1)
    try:
        read = _reader(tokenizer)
        for token, i in tokenizer.get_vocab().items():
            if i not in special:
                texts[i] = added[i].encode() if i in added else read(token)
    except (KeyError, ValueError) as error:
        raise _unknown(tokenizer, where, "tokens that are not bytes of text") from error
    starts = np.concatenate([[0], np.cumsum([len(t) for t in texts], dtype=np.int64)])
    found = TokenBytes(np.frombuffer(b"".join(texts), dtype=np.uint8), starts, False)
    fallback = frozenset(i for token, i in tokenizer.get_vocab().items() if token in BYTE_TOKENS)
    return TokenBytes(found.flat, starts, _prefixed(tokenizer, found, where), fallback)


def unit_ids(tokens: TokenBytes, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of tokens that begin a new unit of text: those whose first byte is blank, and special ones."""
    long = np.flatnonzero(np.diff(tokens.starts))
    begin = long[np.isin(tokens.flat[tokens.starts[long]], list(BLANK))]
    return tuple(sorted({*begin.tolist(), *special_ids(tokenizer)}))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of tokens that are no text: BOS, EOS, marks of turns."""
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({int(i) for i in tokenizer.all_special_ids} | marked)


def _prefixed(tokenizer: PreTrainedTokenizerBase, found: TokenBytes, where: str) -> bool:
    """Whether a text comes back with a space before it. `Refusal` when it comes back as another one."""
    ids = np.asarray(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    back = found.text(ids).tobytes()
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids.tolist()
    if back not in (PROBE.encode(), b" " + PROBE.encode()) and not unknown:
        raise _unknown(tokenizer, where, f"tokens of {PROBE!r} that make {back.decode(errors='replace')!r}")
    return back.startswith(b" ")


def _reader(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    """How a token of the vocabulary is read. `ValueError` for one that does not say what bytes it is."""
    kinds = _kinds(tokenizer)
    if "ByteLevel" in kinds:
        return lambda token: bytes(_CHARACTERS[c] for c in token)
    if kinds & {"ByteFallback", "Metaspace", "Replace"}:
        return lambda token: BYTE_TOKENS.get(token) or token.replace(SPACE, " ").encode()
    if not kinds:
        return lambda token: token.encode("latin-1")  # bytes are characters, or this fails
    raise ValueError(f"a decoder of {', '.join(sorted(kinds))}")


def _kinds(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Types of the steps by which a fast tokenizer decodes; none of one written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set()
    decoder = json.loads(backend.to_str())["decoder"] or {}
    steps: Sequence[dict[str, Any]] = decoder.get("decoders", [decoder])
    return {str(step.get("type")) for step in steps}


def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, others for 256 and on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


_CHARACTERS = _byte_characters()


def _unknown(tokenizer: PreTrainedTokenizerBase, where: str, got: str) -> Refusal:
    expected, do = "a byte-level, SentencePiece or byte tokenizer", "Choose a model that has one, or learn from the text that it writes."
    return Refusal(where, f"{type(tokenizer).__name__} with {got}", expected, do)
