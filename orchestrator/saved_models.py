"""Saved models as files, in a folder or on the Hugging Face hub: found, checked and fingerprinted without loading weights."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from orchestrator.errors import Refusal

WHOLE_FILE_BYTES = 64 << 20
"""Smaller weight files are hashed whole; of larger ones the header and evenly spaced samples."""
SAMPLES = 64
SAMPLE_BYTES = 64 << 10
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py"]
"""Files of a hub model other than weights."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def config_folder(model: str, revision: str | None) -> Path:
    """The folder that holds the model's configuration; for a hub name the small files are fetched, or found in the cache.

    `Refusal` for a missing folder, an unknown name or revision, a gated model, or a hub that cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    where = f"model {model!r}"
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise Refusal(where, "no such folder", "the folder of a saved model", "Check the path.")
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=SMALL_FILES))
    except HFValidationError as error:
        raise Refusal(where, "neither a folder nor a hub name", "an existing folder, or owner/name", "Check the path.") from error
    except GatedRepoError as error:
        raise Refusal(where, "a gated model", "access granted to your account", "Ask for access on its page and set HF_TOKEN.") from error
    except RevisionNotFoundError as error:
        raise Refusal(where, f"no revision {revision!r}", "a branch, tag or commit", "Check the revision.") from error
    except RepositoryNotFoundError as error:
        do = "Check the spelling; for a private model set HF_TOKEN."
        raise Refusal(where, "no such folder and no such model on the hub", "one of the two", do) from error
    except LocalEntryNotFoundError as error:
        do = "Check the path, or connect to the hub, or download the model before."
        raise Refusal(where, "no such folder, and a hub that cannot be reached", "one of the two", do) from error


def load_config(model: str, revision: str | None = None, trust_remote_code: bool = False, weights: bool = True) -> PreTrainedConfig:
    """Configuration of a causal language model. With `weights`, safetensors files must stand beside it.

    `Refusal` also for what is no model, for pickled weights only, and for code of the model's own that was not granted.
    """
    folder = config_folder(model, revision)
    where = f"model {model!r}"
    if not (folder / "config.json").is_file():
        raise Refusal(where, "no config.json", "a saved Hugging Face model", "Point at the folder that holds config.json.")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _unreadable(where, error, trust_remote_code) from error
    remote = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not (trust_remote_code and "AutoModelForCausalLM" in remote):
        do = "Use a decoder-only language model."
        raise Refusal(where, f"the architecture {config.model_type!r}", "a causal language model", do)
    if weights:
        _require_safetensors(where, file_names(model, revision))
    return config


def _unreadable(where: str, error: Exception, trusted: bool) -> Refusal:
    problem = " ".join(str(error).split())
    if "trust_remote_code" in problem and not trusted:
        do = "Read its code, then set trust_remote_code: true beside the model."
        return Refusal(where, "a model that runs code of its own", "permission for that", do)
    do = "Check that it was saved by save_pretrained of a known architecture."
    return Refusal(where, f"a configuration that cannot be read ({problem[:300]})", "a known architecture", do)


def file_names(model: str, revision: str | None = None) -> set[str]:
    """Names of the model's files; of a hub model that cannot be reached, those in the cache."""
    folder = config_folder(model, revision)
    if not Path(model).expanduser().is_dir():
        try:
            return {file.filename for file in snapshot_download(model, revision=revision, dry_run=True)}
        except OSError:  # the hub is out of reach
            pass
    return {path.name for path in folder.iterdir()}


def _require_safetensors(where: str, names: set[str]) -> None:
    if any(name.endswith(".safetensors") for name in names):
        return
    if any(name.endswith(PICKLES) for name in names):
        do = "Load it once in a place you trust and save it again with save_pretrained."
        raise Refusal(where, "pickled weights only", "safetensors weights, which cannot run code when loaded", do)
    do = "Check the folder; for fresh weights set student.init: random."
    raise Refusal(where, "no weights", "safetensors weights beside config.json", do)


def fingerprint(model: str, revision: str | None = None) -> str:
    """What identifies the weights: a hub model's commit, or `sha256:` over a folder's configuration and weight files.

    Weight files of 64 MiB and more enter with name, size, header and samples, so a few changed numbers can pass unnoticed.
    """
    folder = config_folder(model, revision)
    if not Path(model).expanduser().is_dir():
        return folder.name  # the cache names a snapshot after its commit
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            _add_content(digest, path)
    return f"sha256:{digest.hexdigest()}"


def _add_content(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < WHOLE_FILE_BYTES:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
            return
        header = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header, WHOLE_FILE_BYTES)))
        for i in range(SAMPLES):
            file.seek(size * i // SAMPLES)
            digest.update(file.read(SAMPLE_BYTES))


def count_parameters(folder: Path) -> int | None:
    """Numbers in the safetensors files of a folder; None when it holds none, as for a hub name."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total or None
