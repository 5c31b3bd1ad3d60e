"""What every setting of `ray_config.yaml` is built from: the base, names of models, resources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeFloat, PositiveInt


class ClusterModel(BaseModel):
    """Base of every setting here: unknown keys are errors, values are frozen, the text under a field is its doc."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


def _located(model: str) -> str:
    """A folder that is there becomes absolute: processes of a cluster work in other directories. A hub name stays one."""
    folder = Path(model).expanduser()
    return str(folder.absolute()) if folder.is_dir() else model


ModelName = Annotated[str, AfterValidator(_located)]
"""Folder of a saved model, or a hub name."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Resources(ClusterModel):
    """What one process of a role holds on the Ray cluster."""

    cpus: NonNegativeFloat | None = None
    """Logical CPUs; chosen from the machine's size when absent (a whole CPU from 8 cores on, half of one below)."""
    gpus: NonNegativeFloat = 0.0
    """GPUs, fractions allowed."""
    threads: PositiveInt | None = None
    """Compute threads of the process; shared out among the run's processes when absent."""


@dataclass(frozen=True)
class SavedModel:
    """A saved causal language model that each actor of an endpoint loads for itself."""

    model: str
    revision: str | None
    trust_remote_code: bool
    dtype: Dtype
    attention: str
    quantization: Literal["none", "int8", "int4"]
    forward_tokens: int
