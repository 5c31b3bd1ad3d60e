"""Where things run: the typed form of `ray_config.yaml`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, JsonValue, NonNegativeFloat, NonNegativeInt, PositiveInt, Tag

from cluster.inside import inside_job
from cluster.node_settings import Jobs, Nodes
from cluster.patience import Patience
from cluster.seal import SealSettings
from cluster.settings import ClusterModel, Dtype, EndpointModel, ModelName, Resources, SavedModel
from cluster.verifiers.config import VerifierEndpoint
from cluster.vllm_settings import VllmEndpoint

__all__ = [
    "ClusterConfig",
    "ClusterModel",
    "Dtype",
    "EndpointConfig",
    "FakeEndpoint",
    "ModelName",
    "OpenAIEndpoint",
    "ReplayEndpoint",
    "Resources",
    "SavedModel",
    "StoreEndpoint",
    "TransformersEndpoint",
    "VerifierEndpoint",
    "VllmEndpoint",
]


class TransformersEndpoint(EndpointModel):
    """A Hugging Face causal language model inside the stage's own actors; works on CPUs and GPUs."""

    writes: ClassVar[bool] = True
    follows: ClassVar[bool] = True
    engine: Literal["transformers"] = "transformers"
    model: ModelName
    """Folder of a saved model, or a hub name."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; the newest of its main branch when absent."""
    follows_student: bool = False
    """Takes the weights that training publishes instead of the saved ones, as the endpoint `student` does."""
    dtype: Dtype = "auto"
    """Dtype of the weights; `auto` is the one they were saved in. Independent of the student's."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """Weight quantisation of this endpoint alone (bitsandbytes, needs a GPU)."""
    actors: PositiveInt = 1
    """Actors in the stage's pool, each with its own copy of the model."""
    resources: Resources = Resources()
    forward_tokens: PositiveInt = 8192
    """Padded tokens in one forward."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Which kernel computes attention; `flash_attention_2` needs the package flash-attn."""
    trust_remote_code: bool = False
    """Runs the Python code that a model brings."""
    max_dropped_mass: Annotated[float, Field(ge=0, le=1)] = 1e-3
    """Most probability of one token that may lie on ids which the student lacks; it is dropped and the rest renormalised."""

    @property
    def saved_model(self) -> SavedModel | None:
        return SavedModel(
            self.model, self.revision, self.trust_remote_code, self.dtype, self.attention, self.quantization, self.forward_tokens
        )

    @property
    def identity(self) -> dict[str, JsonValue]:
        return self.model_dump(mode="json", include={"engine", "quantization", "attention"})


class OpenAIEndpoint(EndpointModel):
    """A model behind any OpenAI-compatible server. Loads none here.

    To score, rows go as token ids and come back as log-probabilities at temperature 1, as vLLM gives them; a server that cannot
    do that is refused. To write, any server will do: prompts go as ids or as text, and texts come back as either.
    """

    writes: ClassVar[bool] = True
    engine: Literal["openai"]
    base_url: str
    """Up to and with the version, such as `http://host:8000/v1`."""
    model: str
    """Name of the model at the server."""
    vocabulary: PositiveInt
    """Ids it answers with: the rows of the model's output head."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, on this machine and on every node; servers on this machine need none."""
    tokenizer: ModelName | None = None
    """Folder or hub name of its tokenizer, compared with the student's; taken to be the student's when absent. It makes ids of
    texts that come without."""
    local_model: ModelName | None = None
    """Folder or hub name of the same weights. The first rows are scored with them too, and answers that differ are refused."""
    calibration_rows: PositiveInt = 8
    """Rows compared with `local_model`, by every actor."""
    max_calibration_error: Annotated[float, Field(gt=0)] = 0.05
    """Most that log-probabilities of the rows' own tokens may differ from `local_model`'s, on average, in nats."""
    requests_at_once: PositiveInt = 16
    """Requests that one actor has under way."""
    requests_per_minute: PositiveInt | None = None
    """Of all actors together; as many as the server takes when absent."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """For one request, until it counts as lost."""
    max_retries: NonNegativeInt = 5
    """Repetitions of a request that the server was too busy or too broken for, at growing distances."""
    price_per_million_tokens: NonNegativeFloat = 0.0
    """Of prompts, in any currency; what a step cost is logged as `cost/NAME`."""
    price_per_million_written_tokens: NonNegativeFloat = 0.0
    """The same, of texts."""
    actors: PositiveInt = 1
    resources: Resources = Resources()
    max_dropped_mass: Annotated[float, Field(ge=0, le=1)] = 1e-3
    """Most probability of one token that may lie on ids which the student lacks; it is dropped and the rest renormalised."""

    @property
    def own_vocabulary(self) -> int | None:
        return self.vocabulary

    @property
    def own_tokenizer(self) -> str | None:
        return self.tokenizer

    def shared_by(self, users: int) -> Self:
        pace = self.requests_per_minute
        return self if pace is None else self.model_copy(update={"requests_per_minute": max(1, pace // users)})

    def with_tokenizer(self, folder: str) -> Self:
        return self if self.tokenizer else self.model_copy(update={"tokenizer": folder})

    @property
    def identity(self) -> dict[str, JsonValue]:
        return {"engine": self.engine, "url": self.base_url.rstrip("/"), "model": self.model, "vocabulary": self.vocabulary}


class FakeEndpoint(EndpointModel):
    """Deterministic scores made from token ids by hashing; for tests and dry runs. Loads no model, so nothing moves when weights
    are published."""

    writes: ClassVar[bool] = True
    follows: ClassVar[bool] = True
    engine: Literal["fake"]
    vocabulary: PositiveInt
    """Ids it answers with."""
    actors: PositiveInt = 1
    resources: Resources = Resources()
    seconds_per_bundle: NonNegativeFloat = 0.0
    """Sleep added to every bundle."""

    @property
    def own_vocabulary(self) -> int | None:
        return self.vocabulary

    @property
    def identity(self) -> dict[str, JsonValue]:
        return {"engine": self.engine, "vocabulary": self.vocabulary}


class StoreEndpoint(EndpointModel):
    """What a teacher said before, read from finished signal stores. Loads no model."""

    engine: Literal["store"]
    folders: tuple[str, ...]
    """Stores, one for each question that is asked of it."""
    actors: PositiveInt = 1
    resources: Resources = Resources(cpus=0.1, threads=1)
    cache: str = "runs/stores-cache"
    """Where parts of stores on other filesystems are kept after they were fetched."""

    @property
    def own_vocabulary(self) -> int | None:
        from cluster.stores.files import vocabulary_of

        return vocabulary_of(self.folders)

    @property
    def identity(self) -> dict[str, JsonValue]:
        return {"engine": self.engine, "folders": " ".join(self.folders)}


class ReplayEndpoint(EndpointModel):
    """What the student of this run wrote in earlier steps. Runs that recall it have one; no recipe names it. Loads no model."""

    scores: ClassVar[bool] = False
    engine: Literal["replay"]
    folder: str = ""
    """The run's rollout log; the door fills it in."""
    actors: PositiveInt = 1
    resources: Resources = Resources(cpus=0.1, threads=1)


def _engine_of(value: object) -> str:
    engine = value.get("engine") if isinstance(value, dict) else getattr(value, "engine", None)
    return str(engine or "transformers")


EndpointConfig = Annotated[
    Annotated[TransformersEndpoint, Tag("transformers")]
    | Annotated[OpenAIEndpoint, Tag("openai")]
    | Annotated[FakeEndpoint, Tag("fake")]
    | Annotated[StoreEndpoint, Tag("store")]
    | Annotated[ReplayEndpoint, Tag("replay")]
    | Annotated[VerifierEndpoint, Tag("verifier")]
    | Annotated[VllmEndpoint, Tag("vllm")],
    Discriminator(_engine_of),
]


def follows_student(config: EndpointConfig) -> bool:
    """Whether its weights are those that training publishes."""
    return isinstance(config, TransformersEndpoint | VllmEndpoint) and config.follows_student


SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_KEY|CREDENTIAL|PRIVATE_KEY", re.IGNORECASE)
"""Names of variables whose values are taken for secrets."""
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _no_secret(name: str) -> str:
    """Looks at the name alone, so that a refusal repeats no value."""
    if SECRET_NAME.search(name):
        raise ValueError("no secret: give it to the nodes and write its name under `secrets`")
    return name


PlainName = Annotated[EnvironmentName, AfterValidator(_no_secret)]


class Roles(ClusterModel):
    """Resources of the training job's own processes; endpoints carry theirs."""

    worker: Resources = Resources()
    """One student training worker."""
    reader: Resources = Resources()
    """The process that lays out the order and reads rows."""
    placement: Literal["pack", "spread"] = "pack"
    """Training workers on as few nodes as hold them, or on as many as there are."""


class Mlflow(ClusterModel):
    """Where runs are remembered."""

    tracking_uri: str | None = None
    """Any MLflow URI. Absent: MLFLOW_TRACKING_URI when set, else sqlite in the storage folder."""
    experiment: str = "distill"


class ClusterConfig(ClusterModel):
    """The whole of `ray_config.yaml`."""

    address: str = "local"
    """`local` starts Ray on this machine; `auto`, `host:port` or `ray://host:port` joins a running cluster; a Jobs URL such as
    `http://host:8265` is where `distill submit` sends jobs. RAY_ADDRESS wins over `local`. Inside a job, it is the job's own cluster."""
    storage: str = "runs"
    """Folder (or a pyarrow filesystem URI reached by every node) that holds one folder per run."""
    mlflow: Mlflow = Mlflow()
    resources: Roles = Roles()
    patience: Patience = Patience()
    seal: SealSettings = SealSettings()
    jobs: Jobs = Jobs()
    nodes: Nodes = Nodes()
    """Machines of the cluster that `distill cluster render` writes files for."""
    environment: dict[PlainName, str] = Field(default_factory=dict)
    """Variables of every process of a submitted job. Ray writes them to its logs: no secrets here."""
    secrets: tuple[EnvironmentName, ...] = ()
    """Names of variables that every node has by itself, such as HF_TOKEN. Their values are never read here, sent or stored."""
    weights_transport: Literal["object_store", "nixl"] = "object_store"
    """How a student's weights travel to those that write or teach with them while it trains. `nixl` leaves Ray's object store out (Ray
    Direct Transport, alpha): training workers keep every version that may be asked for, and it is read out of their memory, by RDMA where
    the network has it. Needs the package `nixl` on every node."""
    endpoints: dict[str, EndpointConfig] = Field(default_factory=dict)
    """Teachers by name; a recipe may add its own or change fields of these."""

    @property
    def ray_address(self) -> str:
        if inside_job():
            return "auto"
        return os.environ.get("RAY_ADDRESS") or self.address if self.address == "local" else self.address

    @property
    def tracking_uri(self) -> str:
        given = self.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        return given or f"sqlite:///{self.small_files}/mlflow.db"

    @property
    def small_files(self) -> Path:
        """Where what must lie on a disk is kept: in the storage, or in `runs` here beside one that is remote."""
        return Path("runs" if "://" in self.storage else self.storage).absolute()
