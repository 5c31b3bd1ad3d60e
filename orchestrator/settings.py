"""Sections of a recipe that stand by themselves, and the base of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt

from cluster.codecs import CodecConfig, Packed


class Model(BaseModel):
    """Base of every setting: unknown keys are errors, values are frozen, the text under a field is its doc."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False)


class EvaluateConfig(Model):
    """Held-out evaluation during and after training."""

    every_steps: PositiveInt | None = None
    """Also evaluate every so many steps; the last step always is."""


class CheckpointConfig(Model):
    """What is kept to go on from."""

    every_steps: PositiveInt | None = None
    """Also write a checkpoint every so many steps; the last step always is."""
    keep: PositiveInt = 2
    """Checkpoints kept: the best by held-out metric, and always the last."""
    best_metric: str = "eval/cross_entropy"
    """Held-out metric, smaller is better, that ranks checkpoints and the student's LoggedModel."""


class TextConfig(Model):
    """Where text that teachers write is kept. It is always written before training, and read again by every run that asks for
    the same."""

    folder: str | None = None
    """Folder or URI that holds the text stores; `text` in the storage folder when absent."""
    part_prompts: PositiveInt = 64
    """Prompts of one part of a store: what a killed process has to have written again."""


class SignalsConfig(Model):
    """Whether teachers are asked during training or were asked before."""

    mode: Literal["auto", "live", "store"] = "auto"
    """`auto` reads a store of exactly these rows and questions when there is one, finishing a partial one first; `store` fills what
    is missing before training; `live` asks the teachers during training."""
    codec: Annotated[CodecConfig, BeforeValidator(lambda v: {"type": v} if isinstance(v, str) else v)] = Packed()
    """How a store keeps numbers: `packed`, or `exact` to the last bit."""
    folder: str | None = None
    """Folder or URI that holds the stores; `signals` in the storage folder when absent."""
    part_tokens: PositiveInt = 32768
    """Tokens of one part of a store: what a killed process has to score again."""
    uses: ClassVar[Mapping[str, frozenset[str]]] = {
        "auto": frozenset({"finished", "partial"}),
        "live": frozenset(),
        "store": frozenset({"finished", "partial", "missing"}),
    }
    """States in which a store is read, after it was filled, by mode."""
