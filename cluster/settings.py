"""What every setting of `ray_config.yaml` is built from: the base, names of models, resources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, JsonValue, NonNegativeFloat, PositiveInt


class ClusterModel(BaseModel):
    """Base of every setting here: unknown keys are errors, values are frozen, the text under a field is its doc."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


def _located(model: str) -> str:
    """A folder that is there becomes absolute: processes of a cluster work in other directories. A hub name stays one. Nothing at
    all would be the current folder."""
    if not model.strip():
        raise ValueError("expected a folder of a saved model, or a hub name")
    folder = Path(model).expanduser()
    return str(folder.absolute()) if folder.is_dir() else model


ModelName = Annotated[str, AfterValidator(_located)]
"""Folder of a saved model, or a hub name."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Resources(ClusterModel):
    """What one process of a role holds on the Ray cluster."""

    cpus: NonNegativeFloat | None = None
    """Logical CPUs; chosen from the machine's size when absent (a whole CPU from 8 cores on; below, half of one, or a quarter at least
    where there are many processes)."""
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


class EndpointModel(ClusterModel):
    """Base of the settings of endpoints: what others ask of them without knowing which engine answers."""

    scores: ClassVar[bool] = True
    """Whether it tells probabilities of given tokens."""
    writes: ClassVar[bool] = False
    """Whether it can write text."""
    judges: ClassVar[bool] = False
    """Whether it says which texts are right."""
    follows: ClassVar[bool] = False
    """Whether its engine takes weights that training publishes."""
    engine: str
    """What answers: `transformers`, `vllm`, `openai`, `store`, `verifier` or `fake`."""
    actors: PositiveInt = 1
    """Processes that answer, each for itself."""
    resources: Resources = Resources()
    """What each of them holds on the Ray cluster."""

    @property
    def saved_model(self) -> SavedModel | None:
        """What its actors load; None for an endpoint that loads nothing here."""
        return None

    @property
    def own_vocabulary(self) -> int | None:
        """Ids it answers with when no saved model says; None when one does."""
        return None

    @property
    def own_tokenizer(self) -> str | None:
        """Folder or hub name of a tokenizer that does not lie beside a saved model; None when there is none."""
        return None

    @property
    def identity(self) -> dict[str, JsonValue]:
        """What its answers depend on besides the weights and their dtype. Nothing secret."""
        return {"engine": self.engine}

    def shared_by(self, users: int) -> Self:
        """What each of so many users of one server may have of it; the same where each loads its own."""
        return self

    def with_tokenizer(self, folder: str) -> Self:
        """The same with the student's tokenizer in `folder`, where it needs one of its own and names none."""
        return self
