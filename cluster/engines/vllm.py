"""A model that vLLM runs in this process as an engine: scores from its prompt log-probabilities, texts from its scheduler.

Arguments, fields and what they mean are those of vLLM 0.29 and 0.30, as their sources have them:

- `prompt_logprobs=k` gives each prompt token its own log-probability and then the k best, of the model's own distribution
  at temperature 1; such a request reads nothing from the prefix cache. A prompt needs room for one new token behind it.
- `logprobs_mode="raw_logprobs"` takes those of written tokens before temperature, top-k and top-p.
- `flat_logprobs` keeps all numbers of a text in plain lists, the token itself first at every place.
- `ignore_eos` with `stop_token_ids` ends a text at those ids alone, and the id is part of `token_ids`.
- A request's `seed` makes its draws its own. `temperature` is 0, or from 0.01 to 2.
- The worker's `reload_weights` takes tensors by the names of a checkpoint and keeps the storage that CUDA graphs read.

Not every id may be usable: `cluster.engines.vllm_worker` then narrows the model's logits in vLLM's workers, because
`allowed_token_ids` holds at most 1,024 ids and leaves log-probabilities as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from cluster.answers import refuse_dropped
from cluster.engines import Columns, Request, Sampling
from cluster.engines.names import refuse_names
from cluster.engines.texts import Text, asked_texts
from cluster.engines.vllm_door import KINDS, check_package, check_sampling
from cluster.forwards import BundleRows, bundle_rows
from cluster.vllm_settings import VllmEndpoint

SEED_BITS = 0x7FFFFFFFFFFFFFFF
WORKER = "cluster.engines.vllm_worker.UsableIds"


class VllmEngine:
    """Scores rows and writes texts with one copy of a model, on as many GPUs as its endpoint says."""

    def __init__(self, config: VllmEndpoint, vocabulary: int | None = None, threads: int | None = None):
        """Loads the model. `vocabulary` is how many ids, from 0, may be named; all of the model's when absent.

        `Unfit`, a `ValueError`, where vLLM is not installed; `OSError` when there is no such model.
        """
        check_package()
        if threads is not None:
            torch.set_num_threads(threads)
        # the scheduler in this process: it then orders requests alike each time, and tensors need no pickles on their way to one GPU
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import vllm

        self.config = config
        self.version: int | None = None
        """Of the weights that were published last; None for those that were loaded."""
        self._shape = AutoConfig.from_pretrained(
            config.model, revision=config.revision or "main", trust_remote_code=config.trust_remote_code
        )
        self._dtype = _dtype(config, self._shape)
        self._vllm: Any = vllm
        self._llm: Any = vllm.LLM(**_arguments(config, self._dtype))
        self.predicted = int(self._llm.model_config.get_vocab_size())
        self.context = int(self._llm.model_config.max_model_len)
        self.vocabulary = min(self.predicted, vocabulary or self.predicted)
        if self.vocabulary < self.predicted:
            self._llm.collective_rpc("keep_usable", args=(self.vocabulary,))

    def score(self, columns: Columns, request: Request) -> Columns:
        """See `cluster.engines.Engine.score`; of kinds `topk`, `dense` and `per-token`.

        `dropped_mass` is the largest of all tokens that were read, whether they are loss tokens or not.
        """
        kept = self._kept(columns, request)
        rows = bundle_rows(columns)
        busy = np.flatnonzero(rows.reach)
        prompts = [rows.tokens[s : s + n + 1] for s, n in zip(rows.starts[busy], rows.reach[busy], strict=True)]
        self._refuse_long(np.asarray([len(p) + 1 for p in prompts], dtype=np.int64))
        ask = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=kept, flat_logprobs=True, detokenize=False)
        self._dropped()  # what other requests have left there
        answers = [_table(a.prompt_logprobs, p, kept) for a, p in zip(self._generate(prompts, [ask] * len(prompts)), prompts, strict=True)]
        dropped = self._dropped()
        refuse_dropped(torch.tensor([dropped]), self.config.max_dropped_mass, self.config.model)
        ids, values = _loss_tokens(rows, busy, answers, kept)
        found: Columns = {
            "logprob": np.where(rows.labels < self.vocabulary, values[:, 0], -np.inf).astype(np.float32),
            "dropped_mass": np.asarray([dropped], dtype=np.float32),
        }
        return {**found, **self._asked(request, ids[:, 1:], values[:, 1:])}

    def write(self, columns: Columns, sampling: Sampling) -> Columns:
        """See `cluster.engines.Writer.write`. `Unfit`, a `ValueError`, for a temperature that vLLM does not take."""
        check_sampling(sampling)
        self._refuse_unknown(columns)
        asked = asked_texts(columns, sampling)
        self._refuse_long(np.asarray([len(p) for p in asked.prompts], dtype=np.int64) + asked.limits)
        drawn = [n for n, sample in enumerate(asked.sample.tolist()) if sampling.temperature or sample == 0]
        # what an earlier bundle has left in the cache would change which numbers are computed together
        self._forget_prefixes()
        params = [self._vllm.SamplingParams(**_drawing(sampling, int(asked.limits[n]), int(asked.keys[n]) & SEED_BITS)) for n in drawn]
        texts = [_text(a.outputs[0], sampling) for a in self._generate([asked.prompts[n] for n in drawn], params)]
        copies = 1 if sampling.temperature else sampling.samples
        return asked.columns([text for text in texts for _ in range(copies)])

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """See `cluster.engines.Follower.publish`. The prefix cache, which is made of the old weights, is emptied."""
        if self.config.quantization != "none":
            raise ValueError(f"endpoint quantization: got {self.config.quantization!r}; expected 'none' where weights are published")
        own = expected_weights(self._shape, self.config.trust_remote_code)
        given = {id(own[name]): values for name, values in weights.items() if name in own}
        refuse_names("missing", (n for n, parameter in own.items() if id(parameter) not in given))
        refuse_names("unexpected", (n for n in weights if n not in own))
        refuse_names("of another shape", (n for n, values in weights.items() if values.shape != own[n].shape))
        # a tied tensor goes by its first name: vLLM passes over the others
        first = {id(parameter): name for name, parameter in reversed(own.items())}
        tensors = [(name, given[key].to(self._dtype)) for key, name in first.items()]
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors, "is_checkpoint_format": True})
        self._forget_prefixes()
        self.version = version

    def _generate(self, prompts: Sequence[NDArray[Any]], params: Sequence[Any]) -> list[Any]:
        if not prompts:
            return []
        asked = [self._vllm.TokensPrompt(prompt_token_ids=p.tolist()) for p in prompts]
        found: list[Any] = self._llm.generate(asked, list(params), use_tqdm=False)
        return found

    def _asked(self, request: Request, ids: NDArray[np.int32], values: NDArray[np.float32]) -> Columns:
        """The columns of a kind, of the best ids and their log-probabilities, both `(N, K)`."""
        if request.kind == "per-token":
            return {}
        usable = ids < self.vocabulary
        if request.kind == "dense":
            dense = np.full((len(ids), self.vocabulary), -np.inf, dtype=np.float32)
            row = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
            dense[row[usable], ids[usable]] = values[usable]
            return {"dense": dense.ravel()}
        if not usable.all():
            raise RuntimeError(f"vLLM's best ids: got {ids.max()}; expected less than the {self.vocabulary} usable ones")
        return {"ids": ids.ravel(), "logprobs": values.ravel()}

    def _dropped(self) -> float:
        """The largest probability outside the usable ids since it was asked for last."""
        return max(self._llm.collective_rpc("take_dropped")) if self.vocabulary < self.predicted else 0.0

    def _forget_prefixes(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM's prefix cache: got a refusal to empty it; expected no request under way")

    def _kept(self, columns: Columns, request: Request) -> int:
        """Ids asked for of every token."""
        self._refuse_unknown(columns)
        if request.kind not in KINDS:
            raise ValueError(f"{request.kind}: got an endpoint that vLLM runs; expected one of the engine 'transformers'")
        kept = {"topk": request.top_k, "dense": self.vocabulary}.get(request.kind, 0)
        if kept > self.vocabulary:
            raise ValueError(f"top_k: got {kept}; expected at most the {self.vocabulary} usable ids. Lower the strategy's top_k.")
        if 0 <= self.config.max_logprobs < kept:
            raise ValueError(f"max_logprobs: got {self.config.max_logprobs}; expected the {kept} ids that are asked for. Raise it.")
        return kept

    def _refuse_unknown(self, columns: Columns) -> None:
        highest = int(columns["tokens"].max()) if len(columns["tokens"]) else 0
        if highest >= self.predicted:
            raise ValueError(
                f"tokens: got the id {highest}; expected less than the {self.predicted} ids that this endpoint's model embeds. "
                "Teacher and student must share a tokenizer."
            )

    def _refuse_long(self, widths: NDArray[np.int64]) -> None:
        longest = int(widths.max(initial=0))
        if longest > self.context:
            raise ValueError(
                f"rows: got one that needs room for {longest} tokens; expected at most {self.context}. Lower data.max_length_tokens, "
                "or raise the endpoint's context_tokens."
            )


def expected_weights(shape: PreTrainedConfig, trust_remote_code: bool) -> dict[str, Tensor]:
    """Floating-point tensors, without memory, that a model of this configuration has, by name; tied ones are the same object."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(shape, trust_remote_code=trust_remote_code)
    return {name: values for name, values in model.state_dict(keep_vars=True).items() if values.is_floating_point()}


def _dtype(config: VllmEndpoint, shape: PreTrainedConfig) -> torch.dtype:
    found: torch.dtype = (shape.dtype or torch.float32) if config.dtype == "auto" else getattr(torch, config.dtype)
    return found


def _arguments(config: VllmEndpoint, dtype: torch.dtype) -> dict[str, Any]:
    """What `vllm.LLM` is told."""
    return {
        "model": config.model,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "skip_tokenizer_init": True,
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": None if config.quantization == "none" else config.quantization,
        "load_format": "dummy" if config.follows_student else "auto",
        "tensor_parallel_size": config.tensor_parallel,
        # else a Ray actor's placement group would be asked for GPUs that the actor itself holds
        "distributed_executor_backend": "mp" if config.tensor_parallel > 1 else "uni",
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "max_model_len": config.context_tokens,
        "max_num_batched_tokens": config.forward_tokens,
        "max_num_seqs": config.rows_at_once,
        "max_logprobs": config.max_logprobs,
        "logprobs_mode": "raw_logprobs",
        "enable_prefix_caching": True,
        "enforce_eager": config.enforce_eager,
        "generation_config": "vllm",
        "worker_extension_cls": WORKER,
        "seed": 0,
    }


def _drawing(sampling: Sampling, limit: int, seed: int) -> dict[str, Any]:
    """What `vllm.SamplingParams` is told of one text."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": seed,
        "stop_token_ids": list(sampling.stop),
        "ignore_eos": True,
        "max_tokens": limit,
        "logprobs": 0,
        "flat_logprobs": True,
        "detokenize": False,
    }


def _text(said: Any, sampling: Sampling) -> Text:
    tokens = np.asarray(said.token_ids, dtype=np.int32)
    logprobs = np.asarray(said.logprobs.logprobs, dtype=np.float32)
    if said.finish_reason not in ("stop", "length") or not len(tokens) or len(logprobs) != len(tokens):
        got = f"{len(tokens)} tokens with {len(logprobs)} log-probabilities, finished by {said.finish_reason!r}"
        raise RuntimeError(f"vLLM's text: got {got}; expected one log-probability for each token up to a stop or the limit")
    return Text(tokens, logprobs, int(tokens[-1]) in sampling.stop)


def _table(said: Any, prompt: NDArray[Any], kept: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and log-probabilities, `(L - 1, 1 + kept)`, at every place of a prompt of L tokens but the first: the token itself, then
    the best."""
    width = 1 + kept
    if len(said.token_ids) != (len(prompt) - 1) * width:
        got = f"{len(said.token_ids)} of a prompt of {len(prompt)} tokens"
        raise RuntimeError(f"vLLM's prompt_logprobs: got {got}; expected {width} for every token but the first")
    ids = np.asarray(said.token_ids, dtype=np.int32).reshape(-1, width)
    if (ids[:, 0] != prompt[1:]).any():
        raise RuntimeError("vLLM's prompt_logprobs: got those of other tokens; expected the prompt's own first at every place")
    return ids, np.asarray(said.logprobs, dtype=np.float32).reshape(-1, width)


def _loss_tokens(
    rows: BundleRows, busy: NDArray[np.int64], answers: Sequence[tuple[NDArray[np.int32], NDArray[np.float32]]], kept: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """What the answers about the rows `busy` say of all N loss tokens, in order, both `(N, 1 + kept)`."""
    ids, values = [np.zeros((0, 1 + kept), np.int32)], [np.zeros((0, 1 + kept), np.float32)]
    for row, (row_ids, row_values) in zip(busy.tolist(), answers, strict=True):
        places = rows.loss_at[rows.first_loss[row] : rows.first_loss[row + 1]] - rows.starts[row] - 1
        ids.append(row_ids[places])
        values.append(row_values[places])
    return np.concatenate(ids), np.concatenate(values)
