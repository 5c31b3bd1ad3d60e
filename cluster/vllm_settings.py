"""Settings of `engine: vllm`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue, PositiveInt, model_validator

from cluster.settings import Dtype, EndpointModel, ModelName, Resources, SavedModel

ALL = -1


class VllmEndpoint(EndpointModel):
    """A causal language model that vLLM runs inside the stage's own actors, on GPUs. Needs the extra `vllm`.

    It gives top-k ids, whole distributions and single log-probabilities, and writes; no hidden states and no draws.
    """

    writes: ClassVar[bool] = True
    follows: ClassVar[bool] = True
    engine: Literal["vllm"]
    model: ModelName
    """Folder of a saved model, or a hub name."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; the newest of its main branch when absent."""
    follows_student: bool = False
    """Takes the weights that training publishes instead of the saved ones."""
    dtype: Dtype = "auto"
    """Dtype of the weights; `auto` is the one they were saved in (vLLM's own `auto` would halve float32)."""
    quantization: Literal["none", "fp8"] = "none"
    """Of weights that are saved whole; a model that was saved quantised says so itself."""
    tensor_parallel: PositiveInt = 1
    """GPUs that each actor's copy of the model is split over; `resources.gpus` must hold as many."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that one actor takes, key-value cache included, whatever `resources.gpus` says."""
    context_tokens: PositiveInt | None = None
    """Longest prompt and text together (`max_model_len`); what the model was made for when absent. A row that is scored needs one
    token more than it has."""
    max_logprobs: Annotated[int, Field(ge=ALL)] = 256
    """Most ids of a token that may be asked for; -1 for all. Every one of them passes through Python."""
    forward_tokens: PositiveInt = 8192
    """Tokens in one forward (`max_num_batched_tokens`)."""
    rows_at_once: PositiveInt = 256
    """Rows and texts under way at once (`max_num_seqs`)."""
    enforce_eager: bool = False
    """Without CUDA graphs and compilation: starts sooner, runs slower."""
    actors: PositiveInt = 1
    """Actors in the stage's pool, each with its own copy of the model."""
    resources: Resources = Resources(gpus=1.0)
    trust_remote_code: bool = False
    """Runs the Python code that a model brings."""
    max_dropped_mass: Annotated[float, Field(ge=0, le=1)] = 1e-3
    """Most probability of one token that may lie on ids which the student lacks; it is dropped and the rest renormalised."""

    @model_validator(mode="after")
    def _fits(self) -> VllmEndpoint:
        if self.rows_at_once > self.forward_tokens:
            raise ValueError(f"rows_at_once: got {self.rows_at_once}; expected at most forward_tokens, {self.forward_tokens}")
        if self.follows_student and self.quantization != "none":
            raise ValueError(f"quantization: got {self.quantization!r}; expected 'none' where weights are published")
        return self

    @property
    def saved_model(self) -> SavedModel | None:
        return SavedModel(self.model, self.revision, self.trust_remote_code, self.dtype, "sdpa", "none", self.forward_tokens)

    @property
    def identity(self) -> dict[str, JsonValue]:
        return self.model_dump(mode="json", include={"engine", "quantization"})
