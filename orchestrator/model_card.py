"""Where an exported student comes from: as a record beside its files, and as a model card for people."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCardData

from orchestrator.config import RunConfig, to_yaml

MANIFEST = "export.json"
PACKAGES = ("torch", "transformers", "peft", "ray", "deepspeed", "mlflow", "datasets")
MEASURES = {
    "cross_entropy": "cross-entropy, nats per token",
    "perplexity": "perplexity",
    "forward_kl": "KL(teacher ‖ student) on the teacher's top-k and one bucket, nats per token",
    "reverse_kl": "KL(student ‖ teacher) on the teacher's top-k and one bucket, nats per token",
    "top1_agreement": "same first choice as the teacher, share of tokens",
    "top5_agreement": "shared with the teacher's five first choices, share",
    "teacher_topk_mass": "teacher's mass on its kept tokens, share",
    "student_topk_mass": "student's mass on the teacher's kept tokens, share",
}
"""Held-out metrics in words with their units."""


@dataclass(frozen=True)
class Manifest:
    """What an exported student is."""

    checkpoint: str
    """Name of the checkpoint it was made from."""
    step: int
    """Optimizer steps behind it."""
    player: str
    adapter: bool
    """A LoRA adapter that needs its base model, or a whole model."""
    dtype: str
    """Dtype of the weights."""
    parameters: int
    """Numbers in the whole model; in the adapter alone for an adapter."""
    difference: float
    """Largest logit difference after a reload in a fresh process, over the largest logit."""
    bound: float
    """Largest such difference that passes."""
    metrics: Mapping[str, float]
    """Held-out metrics of the checkpoint."""
    lineage: Mapping[str, str | float]
    """Teachers, student, data and run, in words."""
    versions: Mapping[str, str]

    def save(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """`FileNotFoundError` when the folder is not an export of ours."""
        return cls(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))


def versions() -> dict[str, str]:
    """Versions of what made a student."""
    return {name: version(name) for name in PACKAGES}


def card(manifest: Manifest, run: RunConfig, title: str, has_template: bool) -> str:
    """README.md of an exported student: YAML front matter, then what it is, how to load it and where it comes from."""
    data = ModelCardData(
        base_model=_base_model(run) if manifest.adapter or run.student.init == "pretrained" else None,
        library_name="peft" if manifest.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["distillation", run.strategy.type],
        metrics=sorted(name.removeprefix("eval/") for name in manifest.metrics),
    )
    kind = "LoRA adapter" if manifest.adapter else "language model"
    parts = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# {title}",
        f"A {kind} distilled with the strategy `{run.strategy.type}`: {manifest.parameters:,} parameters in {manifest.dtype}, "
        f"from {manifest.checkpoint} after {manifest.step} steps.",
        _usage(manifest, _base_model(run), has_template),
        "## Lineage\n\n" + _table(("what", "value"), {name: _plain(value) for name, value in manifest.lineage.items()}),
        "## Held-out rows\n\n" + _table(("measure", "value"), _measured(manifest.metrics)),
        f"## Strategy `{run.strategy.type}`\n\n{inspect.getdoc(type(run.strategy)) or ''}",
        f"## Recipe\n\n```yaml\n{to_yaml(run).strip()}\n```",
        "## Export\n\n" + _proof(manifest) + "\n\n" + _table(("package", "version"), manifest.versions),
    ]
    return "\n\n".join(parts) + "\n"


def _base_model(run: RunConfig) -> str:
    """The hub name, or the last part of a local path, which is nobody else's business."""
    local = Path(run.student.model).expanduser()
    return local.absolute().name if local.is_dir() else run.student.model


def _usage(manifest: Manifest, base: str, has_template: bool) -> str:
    """Code that loads the student. PEFT's own automatic class would cut a padded vocabulary to the tokenizer's size."""
    model = 'AutoModelForCausalLM.from_pretrained("PATH_OR_NAME")'
    if manifest.adapter:
        model = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}", dtype="{manifest.dtype}"), "PATH_OR_NAME")'
    code = [
        *(["from peft import PeftModel"] if manifest.adapter else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"student = {model}",
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_NAME")',
    ]
    template = "The tokenizer carries a chat template." if has_template else "The tokenizer has no chat template; give it plain text."
    return "## Use\n\n```python\n" + "\n".join(code) + f"\n```\n\n{template}"


def _measured(metrics: Mapping[str, float]) -> dict[str, str]:
    named = {name.removeprefix("eval/"): value for name, value in metrics.items()}
    return {MEASURES.get(name, name.replace("_", " ")): _plain(value) for name, value in named.items()}


def _proof(manifest: Manifest) -> str:
    return (
        f"Reloaded in a fresh process: logits on a fixed batch differ by {manifest.difference:.2g} of the largest "
        f"(at most {manifest.bound:g} passes), and the tokenizer gives the same ids."
    )


def _plain(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    if not rows:
        return "Not known."
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    escaped = ((name.replace("|", r"\|"), value.replace("|", r"\|")) for name, value in rows.items())
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in escaped])
