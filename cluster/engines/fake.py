"""An engine without a model: deterministic scores for tests and dry runs."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.answers import draw, token_keys
from cluster.engines import Columns, Request, Sampling
from cluster.forwards import BundleRows, bundle_rows


class FakeEngine:
    """A distribution over `vocabulary` ids for every loss token, hashed from the token before it and its place in the row.

    Scores of a row do not depend on the other rows of its bundle.
    """

    def __init__(self, vocabulary: int, seconds_per_bundle: float = 0.0):
        self.vocabulary = vocabulary
        self.seconds_per_bundle = seconds_per_bundle

    def score(self, columns: Columns, request: Request) -> Columns:
        """See `cluster.engines.Engine.score`. A token outside the vocabulary gets -inf; there are no hidden states."""
        if request.kind == "hidden":
            raise ValueError("hidden: got a fake endpoint, which has no network; expected an engine that loads one")
        if request.kind == "topk" and request.top_k > self.vocabulary:
            raise ValueError(f"top_k: got {request.top_k}; expected at most the fake endpoint's vocabulary of {self.vocabulary}")
        rows = bundle_rows(columns)
        table = self._table(rows)
        labels = rows.labels
        own = np.take_along_axis(table, np.minimum(labels, self.vocabulary - 1)[:, None], axis=-1)[:, 0]
        time.sleep(self.seconds_per_bundle)
        found = self._chosen(table, token_keys(columns, rows.loss_at), request)
        if request.kind == "among":
            wanted = columns["wanted"].astype(np.int64)
            ids = wanted[wanted < self.vocabulary]
            found = {"among": np.logaddexp.reduce(table[:, ids], axis=-1, initial=-np.inf).clip(max=0.0).astype(np.float32)}
        return {
            **{name: values.ravel() for name, values in found.items()},
            "logprob": np.where(labels < self.vocabulary, own, -np.inf).astype(np.float32),
            "dropped_mass": np.zeros(1, dtype=np.float32),
        }

    def write(self, columns: Columns, sampling: Sampling) -> Columns:
        """See `cluster.engines.Writer.write`: ids and lengths hashed from the prompt and, above temperature 0, seed, row and sample."""
        ends = np.cumsum(columns["lengths"].astype(np.int64))
        prompts = [columns["tokens"][end - size : end] for end, size in zip(ends, columns["lengths"], strict=True)]
        asked = [(p, int(r), s) for p, r in zip(prompts, columns["row_id"], strict=True) for s in range(sampling.samples)]
        own = columns.get("max_new_tokens", np.full(len(prompts), sampling.max_new_tokens))
        limits = np.repeat(np.minimum(own, sampling.max_new_tokens), sampling.samples).tolist()
        texts = [
            self._text(prompt.tobytes() + (f"{sampling.seed} {r} {s}".encode() if sampling.temperature else b""), sampling.stop, limit)
            for (prompt, r, s), limit in zip(asked, limits, strict=True)
        ]
        time.sleep(self.seconds_per_bundle)
        tokens = np.concatenate([np.zeros(0, np.int32), *texts])
        return {
            "tokens": tokens,
            "lengths": np.asarray([len(t) for t in texts], dtype=np.int32),
            "row_id": np.asarray([r for _, r, _ in asked], dtype=np.int64),
            "sample": np.asarray([s for *_, s in asked], dtype=np.int32),
            "finished": np.asarray([t[-1] in sampling.stop for t in texts], dtype=np.uint8),
            "logprobs": np.full(len(tokens), -np.log(self.vocabulary), dtype=np.float32),
        }

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """See `cluster.engines.Follower.publish`: there is nothing that could move."""

    def _text(self, seed: bytes, stop: tuple[int, ...], limit: int) -> NDArray[np.int32]:
        """Ids that are no `stop`, then one of those unless the text is as long as it may be."""
        random = np.random.default_rng(zlib.crc32(seed))
        size = int(random.integers(1, limit + 1))
        usable = np.setdiff1d(np.arange(self.vocabulary), stop)
        body = usable[random.integers(0, len(usable), size)].astype(np.int32)
        if size < limit and stop:
            body = np.append(body, np.int32(stop[0]))
        return body

    def _table(self, rows: BundleRows) -> NDArray[np.float64]:
        """Log-probabilities `(N, V)`."""
        row_of = np.searchsorted(rows.first_loss, np.arange(len(rows.loss_at)), side="right") - 1
        places = rows.loss_at - rows.starts[row_of]
        before = rows.tokens[rows.loss_at - 1].astype(np.int64)
        seeds = [zlib.crc32(f"{token} {place}".encode()) for token, place in zip(before.tolist(), places.tolist(), strict=True)]
        logits = [np.random.default_rng(seed).standard_normal(self.vocabulary) for seed in seeds]
        table = np.stack(logits) if logits else np.zeros((0, self.vocabulary))
        return np.asarray(table - np.log(np.exp(table).sum(-1, keepdims=True)))

    def _chosen(self, table: NDArray[np.float64], keys: NDArray[np.int64], request: Request) -> dict[str, NDArray[np.generic]]:
        if request.kind == "dense":
            return {"dense": table.astype(np.float32)}
        if request.kind == "sampled":
            drawn = draw(torch.from_numpy(table.astype(np.float32)), torch.from_numpy(keys), request)
            return {name: values.numpy() for name, values in drawn.items()}
        if request.kind in ("per-token", "among"):
            return {}
        ids = np.argsort(-table, axis=-1, kind="stable")[:, : request.top_k]
        return {"ids": ids.astype(np.int32), "logprobs": np.take_along_axis(table, ids, axis=-1).astype(np.float32)}
