"""Checks of student and teachers as saved networks: precision, context, vocabulary, tokenizers, templates."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from transformers import PreTrainedTokenizerBase

from cluster.config import EndpointConfig, SavedModel, follows_student
from orchestrator.checks.recipe import check_attention
from orchestrator.config import Job, RunConfig, StudentConfig
from orchestrator.data import PreparedData, template_digest
from orchestrator.errors import Refusal
from orchestrator.models import load_tokenizer, usable_vocabulary
from orchestrator.settings import DataConfig
from orchestrator.sketch import Network, student_network, teacher_network
from orchestrator.sources import open_source
from strategies.sources import ForeignStates, Taught
from strategies.stages.rollout import BASE
from strategies.stages.score import Score

SHOWN_TOKENS = 3


@dataclass(frozen=True)
class Cast:
    """Who takes part: networks and tokenizers, all without weights."""

    student: Network
    tokenizer: PreTrainedTokenizerBase
    teachers: Mapping[str, Network]
    """By endpoint; those that load a saved model."""
    tokenizers: Mapping[str, PreTrainedTokenizerBase]
    """The teachers' own, where there is one."""
    vocabulary: int
    """Ids, from 0, that student and every teacher predict that shares its tokenizer."""
    foreign: Mapping[str, int] = field(default_factory=dict)
    """Ids of those that have a tokenizer of their own, by endpoint."""

    def usable(self, name: str) -> int:
        """Ids, from 0, that an endpoint may name."""
        return self.foreign.get(name, self.vocabulary)


def cast(
    job: Job, endpoints: Mapping[str, EndpointConfig], itself: Container[str] = (), foreign: Collection[str] = ()
) -> tuple[Cast, list[str]]:
    """Opens every network and tokenizer of a run and compares them; also returns warnings. Endpoints in `itself` are meant to have the
    student's own weights, those in `foreign` may have another tokenizer."""
    run = job.run
    following = {n for n, c in endpoints.items() if follows_student(c)}
    saved = {name: model for name, config in endpoints.items() if name not in following and (model := config.saved_model)}
    for name, model in saved.items():
        _check_endpoint(name, model, endpoints[name].resources.gpus)
    tokenizer = load_tokenizer(run.student)
    student = student_network(run.student)
    _check_precision(job, student)
    teachers = {n: teacher_network(n, m.model, m.revision, m.trust_remote_code, m.dtype) for n, m in saved.items()}
    own = {n: t for n, m in saved.items() if (t := _own_tokenizer(m)) is not None}
    named = {n: _named_tokenizer(n, source) for n, c in endpoints.items() if (source := c.own_tokenizer)}
    own |= named
    for name in sorted(set(foreign) - set(own)):
        raise _without_tokenizer(name)
    warnings = [f"endpoint {n!r} has no tokenizer beside its model; it is taken to share the student's." for n in saved if n not in own]
    for name, theirs in own.items():
        warnings += [] if name in foreign else _compare_tokenizers(name, tokenizer, theirs)
    warnings += _about_weights(run, student, {name: network for name, network in teachers.items() if name not in itself})
    teachers |= dict.fromkeys(following, student)
    sharing = {n: t for n, t in teachers.items() if n not in foreign}
    shared = _shared_vocabulary(student, tokenizer, sharing, {n: c for n, c in endpoints.items() if n not in foreign})
    ids = {n: teachers[n].vocabulary if n in teachers else endpoints[n].own_vocabulary or len(own[n]) for n in sorted(foreign)}
    return Cast(student, tokenizer, teachers, own, shared, ids), warnings


def check_rows(run: RunConfig, people: Cast, data: PreparedData) -> list[str]:
    """Rows against contexts and chat templates."""
    longest = max(data.train.longest_tokens, data.held_out.longest_tokens)
    for network in (people.student, *(t for n, t in people.teachers.items() if n not in people.foreign)):
        if network.context is not None and longest > network.context:
            do = f"Set data.max_length_tokens={network.context} or less, or choose a network with a longer context."
            raise Refusal("data.max_length_tokens", f"rows of {longest} tokens", f"at most the {network.context} of {network.where}", do)
    sharing = {n: t for n, t in people.tokenizers.items() if n not in people.foreign}
    different = [n for n, t in sharing.items() if template_digest(t) != template_digest(people.tokenizer)]
    if different and conversations(run.data):
        do = "Give both the same chat template (chat_template.jinja beside the model), or turn messages into prompt and completion."
        got = f"messages, which endpoint {different[0]!r} and the student lay out by different chat templates"
        raise Refusal("data.train", got, "one template, because the teacher scores the student's tokens", do)
    return [f"endpoint {n!r} has another chat template than the student; rows of plain text do not use it." for n in different]


def _check_endpoint(name: str, model: SavedModel, gpus: float) -> None:
    if model.quantization != "none" and not gpus:
        do = f"Set endpoints.{name}.resources.gpus=1, or quantization=none."
        raise Refusal(f"endpoints.{name}.quantization", f"{model.quantization!r} in a process without a GPU", "'none' on CPUs", do)
    if model.quantization != "none" and find_spec("bitsandbytes") is None:
        do = "pip install bitsandbytes on every node, or set quantization=none."
        raise Refusal(f"endpoints.{name}.quantization", "no package 'bitsandbytes'", "the package that quantises", do)
    check_attention(f"endpoints.{name}.attention", model.attention, gpus, model.dtype != "float32", f"endpoints.{name}.dtype=bfloat16")


def _check_precision(job: Job, student: Network) -> None:
    run = job.run
    if student.dtype == torch.float16:
        got = "'auto', which for this model is float16"
        do = "Set student.dtype=float32 and train.precision=bfloat16 for speed."
        raise Refusal("student.dtype", got, "float32, because float16 weights overflow without loss scaling", do)
    half = run.train.precision == "bfloat16" or student.dtype == torch.bfloat16
    check_attention("student.attention", run.student.attention, job.cluster.resources.worker.gpus, half, "train.precision=bfloat16")


def _own_tokenizer(model: SavedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved beside a teacher; None when there is none."""
    beside = StudentConfig(model=model.model, revision=model.revision, trust_remote_code=model.trust_remote_code)
    try:
        return load_tokenizer(beside)
    except Refusal:  # teachers are given ids, so they may come without one
        return None


def _without_tokenizer(name: str) -> Refusal:
    do = f"Save its tokenizer beside its model, or name it in endpoints.{name}.tokenizer where the engine has that."
    return Refusal(f"endpoints.{name}", "no tokenizer, for a teacher that reads the text in tokens of its own", "its tokenizer", do)


def _named_tokenizer(name: str, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer that an endpoint names apart from its model."""
    try:
        return load_tokenizer(StudentConfig(model=source))
    except Refusal as error:
        do = "Name the folder or hub name of its tokenizer, or leave it out if it is the student's."
        raise Refusal(f"endpoints.{name}.tokenizer", f"{source!r} with {error.got}", error.expected, do) from error


def _shared_vocabulary(
    student: Network, tokenizer: PreTrainedTokenizerBase, teachers: Mapping[str, Network], endpoints: Mapping[str, EndpointConfig]
) -> int:
    sizes = [usable_vocabulary(student.config, tokenizer, teacher.config, name) for name, teacher in teachers.items()]
    needed = max(tokenizer.get_vocab().values()) + 1
    own = {"student": student.vocabulary, **{f"endpoint {n!r}": v for n, c in endpoints.items() if (v := c.own_vocabulary)}}
    for who, size in own.items():
        if size < needed:
            do = "Use the tokenizer it was made with, or one that fits it."
            raise Refusal(f"vocabulary of {who}", f"{size} ids", f"at least the {needed} ids of the student's tokenizer", do)
    return min([*sizes, *own.values()])


def _compare_tokenizers(name: str, ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> list[str]:
    """`Refusal` when the same ids mean other tokens; warnings about special tokens."""
    mine, other = ours.get_vocab(), theirs.get_vocab()
    owner = {i: token for token, i in other.items()}
    different = {t: i for t, i in mine.items() if other.get(t, i) != i or owner.get(i, t) != t}
    if different:
        shown = ", ".join(f"{t!r} is {i} here and {other.get(t, 'unknown')} there" for t, i in list(different.items())[:SHOWN_TOKENS])
        do = "Use a teacher of the student's family; other tokenizers need a strategy that aligns them."
        raise Refusal(f"tokenizer of endpoint {name!r}", f"{len(different)} tokens with other ids ({shown})", "the student's ids", do)
    warnings = []
    if lacking := len([t for t in mine if t not in other]):
        warnings.append(f"the tokenizer of endpoint {name!r} lacks {lacking} tokens of the student's; it never learnt them.")
    if ours.eos_token_id != theirs.eos_token_id:
        own, other_end = (f"{t.eos_token_id} ({t.eos_token!r})" for t in (ours, theirs))
        warnings.append(
            f"EOS is {own} for the student and {other_end} for endpoint {name!r}: the teacher will call every end of a row unlikely. "
            "Give both tokenizers the same eos_token."
        )
    if adds_before(ours) != adds_before(theirs):
        warnings.append(
            f"the student's rows begin with {adds_before(ours)} where endpoint {name!r} is used to {adds_before(theirs)} (BOS)."
        )
    return warnings


def adds_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special ids that the tokenizer puts before a text."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return [int(i) for i in whole[:start]]


def _about_weights(run: RunConfig, student: Network, teachers: Mapping[str, Network]) -> list[str]:
    if run.student.init == "random":
        return []
    strategy = run.build()
    teaching = {s.endpoint for s in strategy.signals.values() if isinstance(s, Taught | ForeignStates)}
    bases = {s.endpoint for s in strategy.stages if isinstance(s, Score) and s.signal == strategy.base} - teaching
    same = [n for n, t in teachers.items() if t.fingerprint == student.fingerprint and n not in bases | {BASE}]
    return [f"endpoint {n!r} has the very weights that the student starts from; it can only teach it to stay." for n in same]


def conversations(config: DataConfig) -> bool:
    """Whether rows go through the chat template: the first of some source does."""
    opened = [open_source(spec, config, config.split, "data.train") for spec in config.sources]
    firsts = [next((record.columns for record in source.records() if record.problem is None), {}) for source in opened]
    return any("tokens" not in first and ("messages" in first or isinstance(first.get("prompt"), list)) for first in firsts)
