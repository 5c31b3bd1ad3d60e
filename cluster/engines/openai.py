"""A model behind an OpenAI-compatible server as an engine: rows go as token ids, their scores come back; or prompts, and texts.

Nothing is re-tempered here: temperature 1 is asked for, and a server that answers at another one is found by comparing some
rows with a local forward (`local_model`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.answers import refuse_dropped
from cluster.config import OpenAIEndpoint
from cluster.engines import Columns, Request, Sampling
from cluster.engines.openai_calibration import check_calibration
from cluster.engines.openai_client import Server, ServerFailed
from cluster.engines.openai_dialects import Dialect, NotScored, Said
from cluster.engines.openai_probe import Reply, ask, most_ids, probe_server
from cluster.engines.openai_write import Pen
from cluster.forwards import BundleRows, bundle_rows
from cluster.offers import Offer, Unfit

MOST_MASS = 1.001
"""Of the kept ids of one token: more than 1 by rounding alone."""
SPARE_IDS = 16
"""Asked for beyond those to keep, to take the places of ids that are not usable; less where the server gives less."""


@dataclass(frozen=True)
class Numbers:
    """Scores of N tokens over the usable ids."""

    logprob: NDArray[np.float64]
    """`(N,)`."""
    ids: NDArray[np.int32]
    """`(N, K)`."""
    logprobs: NDArray[np.float64]
    """`(N, K)`."""
    dropped: NDArray[np.float64]
    """`(N,)` probability known to lie on other ids."""


class OpenAIEngine:
    """Scores rows and writes texts at a server, several requests at once; answers keep the order of the rows.

    The server is probed for what is asked first of it: one that gives no scores may write.
    """

    def __init__(self, config: OpenAIEndpoint, vocabulary: int | None = None, threads: int | None = None):
        """`vocabulary` is how many ids, from 0, may be named; all of the server's when absent.

        `Unfit`, a `ValueError`, for an address or a key that cannot be right.
        """
        self.config = config
        self.vocabulary = min(config.vocabulary, vocabulary or config.vocabulary)
        self._threads = threads
        self._server = Server(config)
        self._pool = ThreadPoolExecutor(config.requests_at_once, thread_name_prefix="requests")
        self._given = self._searched = 1  # ids of a token: seen to be given, and looked for
        self._spare = min(SPARE_IDS, config.vocabulary - self.vocabulary)
        self._calibrated = config.local_model is None

    @cached_property
    def _scoring(self) -> tuple[Offer, Dialect]:
        """`ServerFailed` from one that does not answer: it was there at the door."""
        try:
            return probe_server(self._server, self.config)
        except Unfit as error:
            if isinstance(failure := error.__cause__, ServerFailed) and not failure.refused:
                raise failure from None
            raise

    @property
    def offer(self) -> Offer:
        """What the server gives of tokens that are scored. `Unfit` when it cannot be reached or gives no prompt scores by id."""
        return dataclasses.replace(self._scoring[0], top_k=self._given)

    @property
    def _dialect(self) -> Dialect:
        return self._scoring[1]

    @cached_property
    def _pen(self) -> Pen:
        return Pen(self._server, self.config, self.vocabulary, self._pool)

    def write(self, columns: Columns, sampling: Sampling) -> Columns:
        """See `cluster.engines.Writer.write` and `Pen.write`. `Unfit` when the server cannot be reached or does not write."""
        return self._pen.write(columns, sampling)

    def score(self, columns: Columns, request: Request) -> Columns:
        """See `cluster.engines.Engine.score`; of kinds `topk` and `per-token`.

        Of ids that are not usable only those among a token's top ids are seen, so only they count as dropped.
        `ServerFailed`, a `ConnectionError`, when a request was not answered after all its repetitions, `Unfit` when the server gives no
        such scores.
        """
        kept = self._kept(columns, request)
        rows = bundle_rows(columns)
        busy = np.flatnonzero(rows.reach)
        prompts = [rows.tokens[s : s + n + 1].tolist() for s, n in zip(rows.starts[busy], rows.reach[busy], strict=True)]
        asked = max(1, min(kept + self._spare, self.offer.top_k))
        replies = list(self._pool.map(lambda tokens: self._reply(tokens, asked), prompts))
        numbers = self._numbers(rows.labels.tolist(), _loss_tokens(rows, busy, replies), kept)
        refuse_dropped(torch.from_numpy(numbers.dropped), self.config.max_dropped_mass, self.config.model)
        if not self._calibrated and replies:
            check_calibration(self.config, self.vocabulary, columns, numbers.logprob, self._threads)
            self._calibrated = True
        return self._columns(numbers, sum(reply.prompt_tokens for reply in replies))

    def _reply(self, tokens: list[int], top_k: int) -> Reply:
        try:
            return ask(self._server, self.config, self._dialect, tokens, top_k)
        except NotScored as error:
            raise Unfit("base_url", f"{error} ({self.offer.url})", "scores of every token that was sent", "Look at the server.") from error

    def _kept(self, columns: Columns, request: Request) -> int:
        """Ids to keep of every token. `ValueError` for what the server does not give."""
        kept = request.top_k if request.kind == "topk" else 0
        if kept > self.vocabulary:
            raise ValueError(f"top_k: got {kept}; expected at most the {self.vocabulary} usable ids. Lower the strategy's top_k.")
        highest = int(columns["tokens"].max()) if len(columns["tokens"]) else 0
        if highest >= self.config.vocabulary:
            raise ValueError(
                f"tokens: got the id {highest}; expected less than the endpoint's vocabulary of {self.config.vocabulary}. "
                "Teacher and student must share a tokenizer."
            )
        wanted = kept + self._spare
        if kept and wanted > self._searched:
            self._given = most_ids(self._server, self.config, self._dialect, wanted)
            self._searched = wanted
        self.offer.check(request.kind, kept)
        return kept

    def _numbers(self, labels: Sequence[int], said: Sequence[Said], kept: int) -> Numbers:
        """What is said of the loss tokens, without ids that are not usable. `Unfit` for numbers that cannot be."""
        self._check_mass(said)
        usable = [[(i, v) for i, v in s.top.items() if i < self.vocabulary][:kept] for s in said]
        if any(len(top) < kept for top in usable):
            got = f"{min(map(len, usable))} usable ids among a token's top {kept} ({self.offer.url})"
            raise Unfit("base_url", got, str(kept), "Lower the strategy's top_k, or take a student with the teacher's vocabulary.")
        dropped = np.asarray([self._dropped(s, label) for s, label in zip(said, labels, strict=True)], dtype=np.float64)
        rest = np.log1p(-np.minimum(dropped, 1.0 - 1e-9))
        own = [s.logprob if label < self.vocabulary else -math.inf for s, label in zip(said, labels, strict=True)]
        pairs = np.asarray(usable, dtype=np.float64).reshape(len(said), kept, 2)
        return Numbers(np.asarray(own) - rest, pairs[..., 0].astype(np.int32), pairs[..., 1] - rest[:, None], dropped)

    def _check_mass(self, said: Sequence[Said]) -> None:
        masses = [math.fsum(map(math.exp, s.top.values())) for s in said]
        wrong = next((mass for mass in masses if not mass <= MOST_MASS), None)  # NaN is wrong too
        if wrong is not None:
            raise Unfit(
                "base_url",
                f"top ids with a total probability of {wrong:.4f} ({self.offer.url})",
                "at most 1: natural logarithms of probabilities at temperature 1",
                "Serve log-probabilities as the model gives them (vLLM: --logprobs-mode raw_logprobs).",
            )

    def _dropped(self, said: Said, label: int) -> float:
        foreign = {i: v for i, v in said.top.items() if i >= self.vocabulary}
        if label >= self.vocabulary:
            foreign[label] = said.logprob
        return math.fsum(map(math.exp, foreign.values()))

    def _columns(self, numbers: Numbers, prompt_tokens: int) -> Columns:
        found: Columns = {"logprob": numbers.logprob.astype(np.float32)}
        if numbers.ids.shape[1]:
            found |= {"ids": numbers.ids.ravel(), "logprobs": numbers.logprobs.astype(np.float32).ravel()}
        found["dropped_mass"] = np.asarray([numbers.dropped.max(initial=0.0)], dtype=np.float32)
        if self.config.price_per_million_tokens:
            found["cost"] = np.asarray([prompt_tokens * self.config.price_per_million_tokens / 1e6], dtype=np.float32)
        return found


def _loss_tokens(rows: BundleRows, busy: NDArray[np.int64], replies: Sequence[Reply]) -> list[Said]:
    """What the replies about the rows `busy` say of all loss tokens, in order."""
    said: list[Said] = []
    for row, reply in zip(busy.tolist(), replies, strict=True):
        places = rows.loss_at[rows.first_loss[row] : rows.first_loss[row + 1]] - rows.starts[row]
        said += [reply.said[place - 1] for place in places.tolist()]
    return said
