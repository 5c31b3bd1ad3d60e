"""Sections of a recipe that stand by themselves, and the base of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from cluster.codecs import CodecConfig, Packed

SOURCE_DOMAIN = "domain of the source"
"""Column of records whose source is that of a domain."""


class Model(BaseModel):
    """Base of every setting: unknown keys are errors, values are frozen, the text under a field is its doc."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False)


class DataConfig(Model):
    """Where rows come from and how they become token ids. Rows have `text`, `prompt` + `completion`, or `messages`."""

    train: str | Annotated[dict[str, str], Field(min_length=1)]
    """JSONL, Parquet or text file, a folder or glob of them, a saved Hugging Face dataset, or a hub dataset name. Several by name,
    `{code: code.jsonl, prose: prose.jsonl}`, are the domains of their rows."""
    held_out: str | Annotated[dict[str, str], Field(min_length=1)] | None = None
    """The same kinds of source, by domain where `train` is. Absent: `held_out_rows` rows are set aside from `train`, chosen by
    `split_seed`."""
    held_out_rows: NonNegativeInt = 64
    """Rows scored once and used by every evaluation."""
    split_seed: NonNegativeInt = 0
    """Chooses the held-out rows. The run's own seed leaves them alone, so that runs of several seeds share data and signals."""
    split: str = "train"
    """Split of a hub or saved dataset for `train`; a `held_out` source uses its `held_out_split`."""
    held_out_split: str = "test"
    """Split of a hub or saved dataset for `held_out`."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames the source's columns: `{question: prompt, answer: completion}`."""
    domain: str | None = None
    """Column, after renaming, whose value says to which domain a row belongs; rows without one are quarantined."""
    score: str | None = None
    """Column, after renaming, with a number of every row, such as how hard it is; rows without one are quarantined."""
    max_length_tokens: PositiveInt = 1024
    """Longest row, in tokens of the student's tokenizer."""
    overlong: Literal["split", "truncate", "quarantine"] = "split"
    """What becomes of longer rows; only `text` rows can be split, others are quarantined instead."""
    glob: str | None = None
    """File pattern inside a folder source, such as `**/*.py`."""
    max_rows: PositiveInt | None = None
    """Use only the first rows of the source, of each of several, before splitting."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The plan refuses data of which more than this share is quarantined."""

    @model_validator(mode="after")
    def _tells_domains_once(self) -> DataConfig:
        by_name = isinstance(self.train, dict)
        if by_name and self.domain is not None:
            raise ValueError("domain: expected nothing where data.train names a source for each domain")
        if self.held_out is not None and by_name != isinstance(self.held_out, dict):
            raise ValueError("held_out: expected sources by domain where data.train has them, and only there")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source to train on."""
        return (self.train,) if isinstance(self.train, str) else tuple(self.train.values())

    @property
    def domain_column(self) -> str | None:
        """Where a record tells its domain; None where the data has none."""
        return SOURCE_DOMAIN if isinstance(self.train, dict) else self.domain

    @property
    def marks(self) -> tuple[str, ...]:
        """Columns that say something of a row and are no part of it."""
        return tuple(dict.fromkeys(name for name in (self.domain, self.score) if name is not None))


class Lora(Model):
    """A PEFT LoRA adapter as the student's only trained weights."""

    r: PositiveInt = 16
    """Rank of the adapter's matrices."""
    alpha: PositiveFloat = 32.0
    """Their product is scaled by `alpha / r`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that is dropped in training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Module names as PEFT takes them; the output head is not a target."""
    publish: Literal["merged", "adapter"] = "merged"
    """What goes to whoever writes with the student's weights while it trains: all of them with every version, or the adapter, and what
    it adapts once."""


class AnswersConfig(Model):
    """The student answers held-out prompts, the likeliest text each, and a verifier compares with the rows' own completions."""

    verifier: str = "verifier"
    """Name of the endpoint that judges."""
    rows: PositiveInt = 32
    """Held-out rows whose prompts are answered, the first ones."""
    max_new_tokens: PositiveInt = 256
    """Longest answer."""


class Elastic(Model):
    """A number of training workers that follows the cluster: a lost node shrinks the group and a new one lets it grow, from the last
    checkpoint each time. The batch, and with it the result, stays."""

    min: PositiveInt = 1
    """With fewer the run waits."""
    max: PositiveInt
    """As many as there ever are."""
    look_seconds: PositiveFloat = 60.0
    """How often a healthy group looks for room to grow."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"at most `max` ({self.max}) workers as `min`, got {self.min}")
        return self


def _kind_of_workers(value: object) -> str:
    return "elastic" if isinstance(value, dict | Elastic) else "number"


Workers = Annotated[Annotated[PositiveInt, Tag("number")] | Annotated[Elastic, Tag("elastic")], Discriminator(_kind_of_workers)]


class EvaluateConfig(Model):
    """Held-out evaluation during and after training."""

    every_steps: PositiveInt | None = None
    """Also evaluate every so many steps; the last step always is."""
    answers: AnswersConfig | None = None
    """Also measure how many answers are right (`eval/accuracy`), where every training worker has the whole student."""


class CheckpointConfig(Model):
    """What is kept to go on from."""

    every_steps: PositiveInt | None = None
    """Also write a checkpoint every so many steps; the last step always is."""
    keep: PositiveInt = 2
    """Checkpoints kept: the best by held-out metric, and always the last."""
    best_metric: str = "eval/cross_entropy"
    """Held-out metric that ranks checkpoints and the student's LoggedModel: the larger the better of `eval/accuracy` and agreements, else
    the smaller."""


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
