"""Which saved models can be compared: names of models and adapters, what their tokenizers mean, how far they read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cluster.causal_lm import vocabulary_rows
from orchestrator.config import StudentConfig
from orchestrator.errors import Refusal
from orchestrator.models import load_tokenizer
from orchestrator.reload import ADAPTER
from orchestrator.saved_models import load_config


def check_models(names: Sequence[str], trust_remote_code: bool = False) -> int:
    """Size of the usable vocabulary. `Refusal` for a model that is not there, or whose tokenizer is not the first one's."""
    tokenizers = [tokenizer_of(name, trust_remote_code) for name in names]
    sizes = [vocabulary_rows(load_config(base_of(name), None, trust_remote_code)) for name in names]
    for name, tokenizer in zip(names[1:], tokenizers[1:], strict=True):
        if problem := _difference(tokenizers[0], tokenizer):
            do = "Compare models that share a tokenizer; the numbers of others mean something else."
            raise Refusal(f"tokenizer of {name!r}", problem, f"the one of {names[0]!r}", do)
    return min(sizes)


def tokenizer_of(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model or an adapter, else that of the adapter's base."""
    return load_tokenizer(StudentConfig(model=base_of(name), tokenizer=tokenizer_place(name), trust_remote_code=trust_remote_code))


def tokenizer_place(name: str) -> str:
    """Where it lies."""
    own = Path(name).expanduser()
    return name if not own.is_dir() or any(own.glob("tokenizer*")) else base_of(name)


def positions_of(name: str, trust_remote_code: bool = False) -> int | None:
    """Tokens of the longest row that a model can read; None when it does not tell."""
    config = load_config(base_of(name), None, trust_remote_code).get_text_config()
    return getattr(config, "max_position_embeddings", None) or None


def base_of(name: str) -> str:
    """Where the configuration of a model lies: an adapter's is that of the base it names."""
    adapter = Path(name).expanduser() / ADAPTER
    if not adapter.is_file():
        return name
    return str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])


def _difference(mine: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """How another tokenizer gives the same ids another meaning; None when it does not.

    Added tokens, such as those of a chat format, may be there in only one of them.
    """
    added = [t.get_added_vocab() for t in (mine, other)]
    learnt = [{k: v for k, v in t.get_vocab().items() if k not in a} for t, a in zip((mine, other), added, strict=True)]
    if learnt[0] != learnt[1]:
        return f"another vocabulary ({len(learnt[1])} learnt tokens against {len(learnt[0])})"
    by_id = [{v: k for k, v in a.items()} for a in added]
    moved = [i for i in by_id[0].keys() & by_id[1].keys() if by_id[0][i] != by_id[1][i]]
    return f"{by_id[1][moved[0]]!r} for the id {moved[0]}, which is {by_id[0][moved[0]]!r}" if moved else None
