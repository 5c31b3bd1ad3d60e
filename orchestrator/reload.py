"""A saved student read back as anybody would, in a process of its own: `python -m orchestrator.reload FOLDER`.

Prints one line of JSON about the folder's own `proof.npz`. Imports little, because a proof should be quick.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from cluster.causal_lm import compute_device

ADAPTER = "adapter_config.json"
PROOF = "proof.npz"
"""Logits that the exported student gave in memory, beside its files, so that any machine can repeat the comparison."""
TEXT = "def f(x):\n    return x + 1  # 2024\nÜbung: café, 東京 🙂"
SEQUENCES, TOKENS, VOCABULARY_IDS = 2, 16, 4096
"""Size of the fixed batch, and how many vocabulary ids of a larger vocabulary are compared."""


@dataclass(frozen=True)
class Reloaded:
    """What a fresh process found."""

    difference: float
    """Largest difference to the logits in `proof.npz`, over the largest logit there; NaN when either has one."""
    same_tokens: bool
    """Whether the saved tokenizer still gives the ids it gave."""
    same_template: bool
    """Whether its chat template, or the lack of one, is what it was."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps progress bars off the terminal, and DeepSpeed, which saving a model imports, from telling that it found a CPU."""
    os.environ.setdefault("DS_ACCELERATOR", compute_device().type)
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def load_saved(folder: str, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """A saved model, or a saved PEFT adapter over the base that it names, on the CPU in evaluation mode.

    `dtype` is that of the weights; `auto` is the saved one, of the base's for an adapter.
    """
    adapter, source, revision = Path(folder) / ADAPTER, folder, "main"
    if adapter.is_file():
        named = json.loads(adapter.read_text(encoding="utf-8"))
        source, revision = named["base_model_name_or_path"], named.get("revision") or "main"
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    if adapter.is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    loaded: PreTrainedModel = model.eval()
    return loaded


def write_proof(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str) -> None:
    """Keeps what `model` answers to a fixed batch, for `compare_with_proof` to meet again. `dtype` is that of its weights."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    input_ids = (np.arange(SEQUENCES * TOKENS, dtype=np.int64) * 7 + 3).reshape(SEQUENCES, TOKENS) % vocabulary
    ids = np.unique(np.linspace(0, vocabulary - 1, min(vocabulary, VOCABULARY_IDS)).round().astype(np.int64))
    np.savez(
        folder / PROOF,
        input_ids=input_ids,
        vocabulary_ids=ids,
        logits=logits(model, input_ids)[..., ids],
        text_ids=np.asarray(tokenizer(TEXT)["input_ids"], dtype=np.int64),
        template=np.asarray(tokenizer.chat_template or ""),
        dtype=np.asarray(dtype),
    )


def compare_with_proof(folder: Path, trust_remote_code: bool = False) -> Reloaded:
    """Loads the student of `folder` and compares it with the proof that lies there."""
    with np.load(folder / PROOF, allow_pickle=False) as proof:
        given = {name: proof[name] for name in proof.files}
    model = load_saved(str(folder), str(given["dtype"]), trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    wanted = given["logits"]
    got = logits(model, given["input_ids"])[..., given["vocabulary_ids"]]
    return Reloaded(
        difference=float(np.abs(got - wanted).max() / np.abs(wanted).max().clip(1e-6)),
        same_tokens=tokenizer(TEXT)["input_ids"] == given["text_ids"].tolist(),
        same_template=(tokenizer.chat_template or "") == str(given["template"]),
    )


@torch.no_grad()
def logits(model: PreTrainedModel, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """`(B, L, V)` float32 logits of `(B, L)` ids, by the model's own forward."""
    found: torch.Tensor = model(input_ids=torch.from_numpy(input_ids).to(model.device), use_cache=False).logits
    numbers: NDArray[np.float32] = found.float().cpu().numpy()
    return numbers


def main() -> None:
    """Entry point of the fresh process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trust-remote-code", action="store_true")
    given = parser.parse_args()
    with quiet_libraries():
        print(json.dumps(asdict(compare_with_proof(given.folder, given.trust_remote_code))))


if __name__ == "__main__":
    main()
