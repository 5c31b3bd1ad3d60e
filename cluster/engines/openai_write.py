"""Texts of a server, put in order and as token ids: its own where it tells them, else what a tokenizer makes of its text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cluster.answers import mixed_keys
from cluster.config import OpenAIEndpoint
from cluster.engines import Columns, Sampling
from cluster.engines.openai_client import Json, Server
from cluster.engines.openai_manners import Answer, NotWritten, read_answer
from cluster.engines.openai_probe import probe_writing
from cluster.offers import Unfit

SEED_BITS = 0x7FFFFFFF
"""Seeds that every server takes."""
BROKEN = "\ufffd"
"""Stands for the bytes of a character that a limit of tokens cut through."""


@dataclass(frozen=True)
class Text:
    """One text as its row will hold it."""

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finished: bool


class Pen:
    """Writes at one server, several requests at once."""

    def __init__(self, server: Server, config: OpenAIEndpoint, usable: int, pool: ThreadPoolExecutor):
        """Probes the server. `usable` is how many ids, from 0, may be written. `Unfit` when it does not write."""
        self.config = config
        self.usable = usable
        self._server, self._pool = server, pool
        self.offer, self._manner = probe_writing(server, config)

    def write(self, columns: Columns, sampling: Sampling) -> Columns:
        """See `cluster.engines.Writer.write`.

        Each sample is a request of its own with a seed of its own, because not every server writes several; without temperature
        all are one. A server may do with a seed what it likes. `ServerFailed` when a request was not answered after all its
        repetitions.
        """
        self.offer.check(sampling)
        prompts = _prompts(columns)
        drawn = sampling.samples if sampling.temperature else 1
        row, sample = np.repeat(np.arange(len(prompts)), drawn), np.tile(np.arange(drawn), len(prompts))
        row_id = columns["row_id"].astype(np.int64)
        seeds = mixed_keys(sampling.seed, row_id[row], sample) & SEED_BITS
        sent = [p if self._manner.ids else prompt_text(self._tokenizer, p) for p in prompts]
        own = columns.get("max_new_tokens", np.full(len(prompts), sampling.max_new_tokens))
        limits = np.minimum(own, sampling.max_new_tokens).tolist()
        asked = zip(row.tolist(), seeds.tolist(), strict=True)
        bodies = [{**self._manner.body(sent[r], sampling, seed), "max_tokens": limits[r]} for r, seed in asked]
        answers = list(self._pool.map(self._ask, bodies))
        texts = [self._text(answer, prompts[r], sampling.stop, limits[r]) for r, answer in zip(row.tolist(), answers, strict=True)]
        return self._columns([t for t in texts for _ in range(sampling.samples // drawn)], row_id, sampling.samples, answers)

    def _ask(self, body: Json) -> Answer:
        try:
            return read_answer(self._server.post("/completions", {"model": self.config.model, **body}))
        except NotWritten as error:
            raise Unfit("base_url", f"{error} ({self.offer.url})", "a text for every prompt", "Look at the server.") from error

    def _text(self, answer: Answer, prompt: Sequence[int], stop: tuple[int, ...], limit: int) -> Text:
        """Up to what ends it: one of `stop`, an id that is not usable, or the limit, which other ids of the same text may pass."""
        ids = list(answer.ids) if answer.ids is not None else self._ids(answer)
        known = answer.logprobs if answer.ids is not None else [math.nan] * len(ids)
        if answer.ended and stop and not (ids and ids[-1] in stop):
            ids.append(_ending(answer, prompt, stop))
            known = [*known, math.nan]
        size = next((n + 1 for n, i in enumerate(ids) if i in stop), len(ids))
        foreign = next((n for n, i in enumerate(ids) if i >= self.usable), len(ids))
        kept = ids[: min(size, foreign, limit)]
        finished = bool(kept) and kept[-1] in stop
        return Text(np.asarray(kept, dtype=np.int32), np.asarray(known[: len(kept)], dtype=np.float32), finished)

    def _ids(self, answer: Answer) -> list[int]:
        """What the tokenizer makes of a text."""
        text = answer.text if answer.ended else answer.text.rstrip(BROKEN)
        return [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.config.tokenizer is None:
            do = "Name the folder or hub name of the model's tokenizer."
            raise Unfit("tokenizer", f"none, for a server that speaks text ({self.offer.url})", "one that makes ids of text", do)
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.config.tokenizer)
        return found

    def _columns(self, texts: Sequence[Text], row_id: NDArray[np.int64], samples: int, answers: Sequence[Answer]) -> Columns:
        columns: Columns = {
            "tokens": np.concatenate([np.zeros(0, np.int32), *(t.tokens for t in texts)]),
            "lengths": np.asarray([len(t.tokens) for t in texts], dtype=np.int32),
            "row_id": np.repeat(row_id, samples),
            "sample": np.tile(np.arange(samples, dtype=np.int32), len(row_id)),
            "finished": np.asarray([t.finished for t in texts], dtype=np.uint8),
            "logprobs": np.concatenate([np.zeros(0, np.float32), *(t.logprobs for t in texts)]),
        }
        read, written = self.config.price_per_million_tokens, self.config.price_per_million_written_tokens
        if read or written:
            price = sum(a.prompt_tokens * read + a.written_tokens * written for a in answers) / 1e6
            columns["cost"] = np.asarray([price], dtype=np.float32)
        return columns


def prompt_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """A prompt in words, special tokens included, but for a first one that a server's tokenizer puts there itself."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    adds = [int(i) for i in tokenizer("a")["input_ids"][:1]] == [tokenizer.bos_token_id]
    return text.removeprefix(str(tokenizer.bos_token)) if adds else text


def _prompts(columns: Columns) -> list[list[int]]:
    """`ValueError` for an empty one."""
    ends = np.cumsum(columns["lengths"].astype(np.int64))
    if len(ends) and columns["lengths"].min() == 0:
        raise ValueError("prompts: got an empty one; expected at least one token to go on from")
    return [columns["tokens"][end - size : end].tolist() for end, size in zip(ends, columns["lengths"], strict=True)]


def _ending(answer: Answer, prompt: Sequence[int], stop: Sequence[int]) -> int:
    """The id that ended a text: what the server says; else the one that ends turns of this prompt; else the first."""
    if answer.stop in stop:
        return int(answer.stop or 0)
    return next((i for i in reversed(stop) if i in prompt), stop[0])
