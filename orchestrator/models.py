"""The student as a network: its files, its head, and the module that layouts wrap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cluster.causal_lm import (
    attention_argument,
    backbone,
    explained_by_rounding,
    head_deviation,
    input_embeddings,
    output_head,
    packing_deviation,
    vocabulary_rows,
)
from orchestrator.config import StudentConfig
from orchestrator.errors import Refusal
from orchestrator.microbatch import MicroBatch
from orchestrator.saved_models import config_folder, fingerprint, load_config
from orchestrator.settings import Lora
from orchestrator.taps import recorded, tap_widths, tapped
from orchestrator.truncate import begins_as_saved, cut_shape, fill, sources
from strategies.core import AnyTerm, Progress, StatesTerm, Term
from strategies.head import Head, chunked_terms
from strategies.pulls import logits_pulls, states_pull
from strategies.taps import Filter, Tap

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

__all__ = [
    "FILTERS",
    "StudentModule",
    "backbone_of",
    "check_head",
    "check_packing",
    "fingerprint",
    "head_of",
    "load_config",
    "load_student",
    "load_tokenizer",
    "lora_config",
    "make_filters",
    "usable_vocabulary",
]

TOKENIZER_FILES = ("tokenizer", "vocab", "tekken")
"""How the names of files that make a tokenizer begin."""


def load_tokenizer(config: StudentConfig) -> PreTrainedTokenizerBase:
    """The student's tokenizer. `Refusal` when there is none."""
    source = config.tokenizer or config.model
    revision = config.revision if config.tokenizer is None else None
    where = f"tokenizer of {source!r}"
    do = "Name one with student.tokenizer, or save the tokenizer beside the model."
    names = {path.name for path in config_folder(source, revision).iterdir()}
    if not any(name.startswith(TOKENIZER_FILES) or name.endswith((".model", ".tiktoken")) for name in names):
        raise Refusal(where, "no tokenizer files", "tokenizer.json or its like", do)  # AutoTokenizer would make an empty one
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())[:300]
        raise Refusal(where, f"no usable one ({problem})", "tokenizer files", do) from error
    return tokenizer


def load_student(config: StudentConfig, gradient_checkpointing: bool, seed: int) -> PreTrainedModel | PeftModel:
    """The student on the CPU, in evaluation mode, equal on every rank: whatever is drawn at random is drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = _pretrained(config) if begins_as_saved(config) else _made(config)
        base.config.use_cache = False
        if gradient_checkpointing:
            base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model = base if config.lora is None else _adapted(base, config.lora)
    return model.eval()


def _pretrained(config: StudentConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        config.model,
        revision=config.revision or "main",
        dtype=config.dtype,
        attn_implementation=attention_argument(config.attention),
        trust_remote_code=config.trust_remote_code,
        use_safetensors=True,
    )
    return model


def _made(config: StudentConfig) -> PreTrainedModel:
    """Of fresh weights, or of those that it keeps of a larger network."""
    saved = load_config(config.model, config.revision, config.trust_remote_code, weights=False)
    shape = saved if config.truncate is None else cut_shape(saved, config.truncate)
    dtype = shape.dtype or torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        shape, dtype=dtype, attn_implementation=attention_argument(config.attention), trust_remote_code=config.trust_remote_code
    )
    if config.truncate is not None and config.init == "pretrained":
        whole = _pretrained(config.model_copy(update={"dtype": "auto"}))  # cast once cut, for it is larger
        model.generation_config = whole.generation_config
        own, theirs = model.state_dict(), whole.state_dict()
        with torch.no_grad():
            fill(own, theirs, sources(saved, config.truncate, theirs, own))
    return model


def _adapted(base: PreTrainedModel, config: Lora) -> PeftModel:
    from peft import get_peft_model  # takes seconds, and only a LoRA student waits for it

    adapted: PeftModel = get_peft_model(base, lora_config(config))
    return adapted


def lora_config(config: Lora) -> LoraConfig:
    """PEFT's form of the settings."""
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    alpha: Any = config.alpha  # PEFT divides it; its annotation says int
    from peft import LoraConfig

    return LoraConfig(r=config.r, lora_alpha=alpha, lora_dropout=config.dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM")


def head_of(model: PreTrainedModel | PeftModel) -> Head:
    """The output head, through a LoRA adapter and tied or not. Ask anew in every forward: sharding replaces parameters."""
    found = output_head(_base(model))
    return Head(found.weight, found.bias, found.transform)


def backbone_of(model: PreTrainedModel | PeftModel) -> nn.Module:
    """The part whose output has `last_hidden_state`, `(B, L, D)`, ready for the head."""
    return backbone(_base(model))


def _base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel):
        return model
    base: Any = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


def check_head(model: PreTrainedModel | PeftModel) -> None:
    """`Refusal` when the backbone and the head apart do not give the model's own logits."""
    base = _base(model)
    deviation = head_deviation(base)
    if not explained_by_rounding(deviation, base.dtype):
        raise Refusal(
            f"architecture {type(base).__name__}",
            f"logits that differ by {deviation:.2g} of the largest when the output head is applied apart",
            "the model's own logits",
            "This architecture does something to its logits that is not known here; use another model.",
        )


def check_packing(model: PreTrainedModel | PeftModel) -> None:
    """`Refusal` when rows packed into one sequence see each other, as in networks with a recurrent state."""
    base = _base(model)
    deviation = packing_deviation(base)
    if not explained_by_rounding(deviation, base.dtype):
        raise Refusal(
            f"train.batching with {type(base).__name__}",
            f"packed rows that change each other's hidden states by {deviation:.2g} of the largest",
            "rows blind to each other",
            "Set train.batching=bucketed for this architecture.",
        )


def usable_vocabulary(
    student: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedConfig, name: str = "teacher"
) -> int:
    """Ids, from 0, that student and teacher both predict. Models of one family pad one vocabulary to different sizes.

    `Refusal` when either of them lacks an id that the tokenizer can produce. `name` is the teacher's endpoint.
    """
    needed = max(tokenizer.get_vocab().values()) + 1
    rows = {"student": vocabulary_rows(student), f"endpoint {name!r}": vocabulary_rows(teacher)}
    for who, size in rows.items():
        if size < needed:
            raise Refusal(
                f"vocabulary of {who}",
                f"{size} ids",
                f"at least the {needed} ids of the student's tokenizer",
                "Use a model that shares the tokenizer; other tokenizers need a strategy that aligns them.",
            )
    return min(rows.values())


FILTERS = "filters"
"""Where a `StudentModule` keeps what is trained beside the student: its checkpointed names begin so."""


def make_filters(
    model: PreTrainedModel | PeftModel, terms: Iterable[AnyTerm], teachers: Mapping[str, Mapping[Tap, int]], seed: int
) -> dict[str, Filter]:
    """What `terms` train beside `model`, drawn from `seed`, so equal on every rank; by `<filters of a term>/<name>`.

    `teachers` has the widths of frozen players' taps by name. `ValueError` for widths that a term cannot compare.
    """
    asking = [t for t in terms if isinstance(t, StatesTerm)]
    mine = tap_widths(_base(model), {tap for t in asking for tap in t.objective.taps.student})
    dtype = next((p.dtype for p in model.parameters() if p.requires_grad), _base(model).dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = [(f"{t.filters_name}/{n}", f.to(dtype)) for t in asking for n, f in t.objective.filters(mine, teachers[t.signal]).items()]
    found: dict[str, Filter] = {}
    for name, module in made:
        if found.setdefault(name, module).shape != module.shape:
            raise ValueError(f"filters {name!r}: got terms that make them differently; expected equal settings of what they share")
    return found


class StudentModule(nn.Module):
    """What a layout wraps: backbone, filters, selection of loss positions and chunked head, all inside one forward.

    So the hooks of DDP, FSDP2 and ZeRO-3 fire around everything that touches parameters.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, chunk_tokens: int | None = None, filters: Mapping[str, Filter] | None = None):
        """`filters` are modules trained beside the student, by `<filters of a term>/<name>`."""
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.filters = nn.ModuleDict(filters)

    def forward(
        self, micro: MicroBatch, terms: tuple[AnyTerm, ...], scales: Mapping[str, float], progress: Progress
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The scaled loss, a scalar that carries the gradient; the unscaled sums of the terms, `(len(terms),)` detached; and their
        squared pulls on a few tokens (`strategies.pulls`), 0 for a single term.

        Under `torch.no_grad` the same path measures: no gradient is made.
        """
        places = {} if micro.position_ids is None else {"position_ids": micro.position_ids}
        on_states, on_logits = [t for t in terms if isinstance(t, StatesTerm)], tuple(t for t in terms if isinstance(t, Term))
        body = backbone_of(self.model)
        with recorded(body, {tap for t in on_states for tap in t.objective.taps.student}) as outputs:
            states: Tensor = body(input_ids=micro.input_ids, use_cache=False, **places).last_hidden_state
        hidden = states.flatten(0, 1).index_select(0, micro.index if on_logits else micro.index[:0])
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # norms leave float32, and the head would cast chunk by chunk
            hidden = hidden.to(torch.get_autocast_dtype(device))
        found = chunked_terms(hidden, head_of(self.model), micro.batch, on_logits, scales, progress, self.chunk_tokens)
        probing = torch.is_grad_enabled() and len(terms) > 1
        pulls = logits_pulls(hidden, head_of(self.model), micro.batch, on_logits, scales, progress, found.settled) if probing else {}
        loss, sums = found.loss, dict(found.sums)
        for term in on_states:
            weights = micro.batch.weight(term.name, 0, micro.loss_tokens)
            mine, theirs = tapped(micro, outputs, head_of(self.model), self._embedded).apart(), micro.taught[term.signal]
            value = term.objective.compare(mine, theirs, self._filters_of(term.filters_name), weights, progress)
            scaled = scales[term.name] * value
            loss, sums[term.name] = loss + scaled, value.detach()
            pulls |= {term.name: states_pull(scaled, mine)} if probing else {}
        nothing = loss.new_zeros(())
        by_term = [torch.stack([kind.get(t.name, nothing).float() for t in terms]) for kind in (sums, pulls)]
        return loss + self._nothing(states), by_term[0], by_term[1]

    def _embedded(self, ids: Tensor) -> Tensor:
        """The student's input embeddings of `ids`, without a gradient."""
        return input_embeddings(_base(self.model)).detach()[ids]

    def _filters_of(self, name: str) -> dict[str, Filter]:
        return {key.removeprefix(f"{name}/"): module for key, module in self._filters() if key.startswith(f"{name}/")}

    def _filters(self) -> list[tuple[str, Filter]]:
        return [(name, module) for name, module in self.filters.items() if isinstance(module, Filter)]

    def _nothing(self, states: Tensor) -> Tensor:
        """Zero, with a gradient of zero for every filter: some terms only read a filter, and DDP waits for every parameter."""
        empty = [module(states.new_zeros((0, module.width))).sum() for _, module in self._filters()]
        return torch.stack(empty).sum() if empty else states.new_zeros(())
