"""What is run: a recipe as a typed `RunConfig`, and dotted overrides. The only place of this package that reads YAML."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
)

from cluster.config import ClusterConfig, Dtype, EndpointConfig, ModelName, ReplayEndpoint
from orchestrator.alarms import Alarms, switch
from orchestrator.dotted import put
from orchestrator.errors import Refusal
from orchestrator.explain import nearest, refusal
from orchestrator.search.settings import SearchConfig
from orchestrator.settings import CheckpointConfig, DataConfig, Elastic, EvaluateConfig, Lora, Model, SignalsConfig, TextConfig, Workers
from orchestrator.student_endpoint import fill_student_endpoints, student_endpoints
from orchestrator.truncate import Truncate
from strategies import StrategyConfig, known_strategies
from strategies.core import Progress, Strategy
from strategies.curriculum import Curriculum
from strategies.schedule import LearningRate, PositiveSchedule, schedule
from strategies.stages.replay import REPLAY

M = TypeVar("M", bound=BaseModel)


def _short(key: str) -> BeforeValidator:
    """Lets a recipe write a plain string where a mapping with one main key stands."""
    return BeforeValidator(lambda v: {key: v} if isinstance(v, str) else v)


class StudentConfig(Model):
    """The network that learns."""

    model: ModelName
    """Folder of a saved model or configuration, or a hub name."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; the newest of its main branch when absent."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` starts from fresh weights of the same configuration."""
    truncate: Truncate | None = None
    """Cuts the student out of a larger `model`: which layers stay, and how wide they are."""
    tokenizer: ModelName | None = None
    """Folder or hub name; the model's own when absent."""
    dtype: Dtype = "float32"
    """Dtype of the trained weights. Keep float32; `train.precision` sets the compute dtype."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Which kernel computes attention; `flash_attention_2` needs a GPU and the package flash-attn."""
    lora: Lora | None = None
    trust_remote_code: bool = False
    """Runs the Python code that a model brings."""


class LayoutConfig(Model):
    """How one student is spread over workers."""

    type: Literal["single", "ddp", "fsdp2", "deepspeed"] = "ddp"
    """One worker; a copy on each; shards by torch; shards by DeepSpeed's ZeRO."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed only."""
    offload_optimizer: bool = False
    """DeepSpeed only: optimizer states in host memory."""


class TrainConfig(Model):
    """The student's optimisation."""

    steps: PositiveInt | None = None
    """Optimizer steps; give this or `epochs`."""
    epochs: PositiveFloat | None = None
    """Times that every row is trained on, fractions allowed; give this or `steps`."""
    batch_rows: PositiveInt = 16
    """Rows of one optimizer step over all workers."""
    batch_tokens: PositiveInt | None = None
    """Instead of a number of rows: as many rows as fit in this many tokens (uses the cached length index)."""
    micro_batch_tokens: PositiveInt = 8192
    """Padded tokens of one forward and backward; a step has as many micro-batches as it needs."""
    batching: Literal["bucketed", "packed"] = "bucketed"
    """`bucketed` pads rows of similar length together; `packed` lays several rows in one sequence, blind to each other."""
    workers: Workers = 1
    """A number, or `{min: 1, max: 4}`, where a layout can be taken up by another number of workers."""
    layout: Annotated[LayoutConfig, _short("type")] = LayoutConfig()
    lr: PositiveSchedule = 2e-5
    """Peak learning rate of AdamW; of a schedule, what it says at a step is that step's peak."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate comes down from its peak."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which it first rises to the peak."""
    lr_final_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate reached after the last step, as a share of the peak."""
    weight_decay: NonNegativeFloat = 0.01
    """Of AdamW, decoupled from the gradient."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW: how slowly the means of gradients and of their squares move."""
    eps: PositiveFloat = 1e-8
    """Of AdamW: added to the root of the second mean."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 never clips."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of forward and backward; weights and optimizer keep the student's dtype."""
    gradient_checkpointing: bool = False
    """Computes activations anew in the backward pass: less memory, about a third more work."""
    read_ahead_bundles: PositiveInt = 4
    """Bundles that may be scored before the student asks for them."""
    max_failures: NonNegativeInt = 2
    """Times the worker group is restarted from the last committed checkpoint."""

    @property
    def most_workers(self) -> int:
        """As many as there ever are: the bundles of a step."""
        return self.workers.max if isinstance(self.workers, Elastic) else self.workers

    @property
    def fewest_workers(self) -> int:
        """As many as there always are: what must fit."""
        return self.workers.min if isinstance(self.workers, Elastic) else self.workers

    def learning_rate(self, progress: Progress) -> float:
        """That of a step: the peak, times warm-up or decay."""
        share = LearningRate(kind=self.lr_schedule, warmup_steps=self.warmup_steps, final=self.lr_final_share)
        return schedule(self.lr)(progress) * share(progress)


class RunConfig(Model):
    """One recipe."""

    name: str | None = None
    """Unique name of the run; made from the recipe's file name and the time when absent."""
    seed: NonNegativeInt = 0
    """Of fresh weights, the order of rows, and all draws."""
    student: Annotated[StudentConfig, _short("model")]
    strategy: SerializeAsAny[StrategyConfig]
    """What is taught, and of what."""
    data: Annotated[DataConfig, _short("train")]
    curriculum: Curriculum | None = None
    """Which rows each step draws; absent, all alike, each once in every epoch."""
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    signals: Annotated[SignalsConfig, _short("mode")] = SignalsConfig()
    text: TextConfig = TextConfig()
    alarms: Annotated[Alarms, BeforeValidator(switch)] = Alarms()
    endpoints: dict[str, EndpointConfig] = Field(default_factory=dict)
    """Teachers by name: new ones, or fields that differ from those in `ray_config.yaml`."""
    baseline: bool = False
    """Also train the same student without a teacher, on the same rows and steps, and compare. Refused where a teacher writes the
    rows and nothing else is learnt of it: the control would be the same run."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Tags of the MLflow run."""

    def build(self) -> Strategy:
        """What runs: the strategy, with the controllers of the curriculum beside its own."""
        strategy = self.strategy.build()
        return (
            dataclasses.replace(strategy, controllers={**strategy.controllers, **self.curriculum.controllers()})
            if self.curriculum
            else strategy
        )


class Job(Model):
    """Everything a run needs: the recipe and the cluster it runs on, with endpoints merged."""

    run: RunConfig
    cluster: ClusterConfig
    search: SearchConfig | None = None
    """What `distill search` looks for around this recipe; a run leaves it alone."""

    @property
    def endpoints(self) -> dict[str, EndpointConfig]:
        """All that are defined, by name. Those of the student's own network have its model unless the recipe says more of them, and its
        texts have one more."""
        own = student_endpoints(self.run.student, self.run.strategy)
        return {**own, REPLAY: ReplayEndpoint(engine="replay"), **self.cluster.endpoints, **self.run.endpoints}


def load_job(recipe: Path | Mapping[str, Any], overrides: Sequence[str] = (), cluster: Path | Mapping[str, Any] | None = None) -> Job:
    """A recipe file (or its content) with dotted overrides, and a `ray_config.yaml`, checked field by field.

    Raises `Refusal` for a missing or unreadable file, an unknown key, a wrong type or a malformed override.
    """
    where = str(recipe) if isinstance(recipe, Path) else "recipe"
    content = read_content(recipe, overrides)
    search = content.pop("search", None)
    cluster_where = str(cluster) if isinstance(cluster, Path) else "ray_config.yaml"
    cluster_content = {} if cluster is None else _mapping(cluster, cluster_where)
    _merge_endpoints(content, cluster_content)
    content["strategy"] = _strategy(content.get("strategy"), where)
    fill_student_endpoints(content, content["strategy"], StudentConfig.model_fields["dtype"].default)
    run = _validated(RunConfig, content, where)
    asked = None if search is None else _validated(SearchConfig, search, f"{where}: search")
    return Job(run=run, cluster=_validated(ClusterConfig, cluster_content, cluster_where), search=asked)


def read_content(source: Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe, or a `ray_config.yaml`, as it is written, with overrides; not checked yet."""
    content = _mapping(source, str(source) if isinstance(source, Path) else "recipe")
    for override in overrides:
        _apply(content, override)
    return content


def load_cluster(cluster: Path | Mapping[str, Any] | None) -> ClusterConfig:
    """A `ray_config.yaml`; the defaults without one. `Refusal` as from `load_job`."""
    where = str(cluster) if isinstance(cluster, Path) else "ray_config.yaml"
    return ClusterConfig() if cluster is None else _validated(ClusterConfig, _mapping(cluster, where), where)


def _merge_endpoints(recipe: dict[str, Any], cluster: Mapping[str, Any]) -> None:
    """A recipe's endpoint starts from the fields of the cluster's endpoint of that name."""
    own, shared = recipe.get("endpoints"), cluster.get("endpoints")
    if not isinstance(own, dict) or not isinstance(shared, dict):
        return
    for name, given in own.items():
        if isinstance(given, dict) and isinstance(shared.get(name), dict):
            own[name] = {**shared[name], **given}


def to_yaml(config: BaseModel | Mapping[str, Any]) -> str:
    """YAML that `load_job` reads back to the same config or content."""
    content = config.model_dump(mode="json") if isinstance(config, BaseModel) else dict(config)
    return yaml.safe_dump(content, sort_keys=False)


def _mapping(source: Path | Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(source, Path):
        return copy.deepcopy(dict(source))
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refusal(where, error.strerror or str(error), "a readable YAML file", "Check the path.") from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise Refusal(where, f"text that is not YAML ({problem})", "a YAML mapping", "Mend the line it names.") from error
    if not isinstance(content, dict):
        raise Refusal(where, f"a {type(content).__name__}", "a YAML mapping of settings", "See jobs/recipes for examples.")
    return content


def _apply(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise Refusal(f"override {override!r}", "no dotted.path=value", "train.lr=2e-5 for example", "Write it without spaces around '='.")
    try:
        put(content, keys, _value(text))
    except LookupError as error:
        raise Refusal(f"override {override!r}", str(error), "a setting or an item that is there", "Correct the path.") from error


def _value(text: str) -> Any:
    """As YAML reads it in a recipe; what is not YAML is text. Numbers such as 2e-5 are text to YAML and numbers to pydantic."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _strategy(content: Any, where: str) -> StrategyConfig:
    if isinstance(content, str):
        content = {"type": content}
    if not isinstance(content, dict):
        raise Refusal(f"{where}: strategy", repr(content), "a strategy's name or settings", "`distill strategies` lists them.")
    return _validated(strategy_settings(content.get("type"), where), content, f"{where}: strategy")


def strategy_settings(name: object, where: str) -> type[StrategyConfig]:
    """The settings class of a strategy by name; `Refusal` names the nearest known one."""
    known = known_strategies()
    if name in known:
        return known[str(name)]
    near = nearest(str(name), known)
    raise Refusal(f"{where}: strategy.type", repr(name), f"one of {', '.join(sorted(known))}", f"{near}`distill strategies` explains each.")


def _validated(model: type[M], content: Mapping[str, Any], where: str) -> M:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise refusal(error, model, content, where) from error
