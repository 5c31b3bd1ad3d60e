"""Text that teachers write before training: which is there, which is to be written, and which rows a run then trains on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from cluster.config import EndpointConfig
from cluster.offers import WritingOffer
from cluster.storage import Folder
from cluster.stores.key import StoreKey
from orchestrator.chat import ChatTemplate
from orchestrator.checks.networks import Cast, conversations
from orchestrator.checks.teaching import named_endpoints
from orchestrator.config import Job
from orchestrator.data import template_digest, tokenizer_digest
from orchestrator.errors import Refusal
from orchestrator.pieces import Bad
from orchestrator.prompts import Prompts, prepare_prompts
from orchestrator.rows import Rows
from orchestrator.selection import Selected, Source, select
from orchestrator.settings import DataConfig
from orchestrator.stores import FoundStore, cache_folder, check_whole, find_store, teacher_identity
from strategies.core import Strategy
from strategies.stages.write import Authored

TEXT = "text."
"""Begins the names of fingerprints of text stores."""


@dataclass(frozen=True, kw_only=True)
class WantedText(FoundStore):
    """A store of the text that a run trains on."""

    authored: Authored
    """With the tokens that end a text."""

    @property
    def source(self) -> Source:
        return Source(self.authored, self.files, self.spec.name)


@dataclass(frozen=True)
class Text:
    """What is written for a run, and what it trains on."""

    prompts: Prompts
    stores: tuple[WantedText, ...]
    data: DataConfig
    """The rows: those chosen from the stores, or stand-ins of the greatest length while a store is not finished."""
    selected: Selected | None
    """None while a store is not finished."""
    offers: Mapping[str, WritingOffer] = field(default_factory=dict)
    """How the servers write that are still to be asked, by endpoint."""

    @property
    def missing(self) -> tuple[WantedText, ...]:
        return tuple(w for w in self.stores if w.state != "finished")

    def about(self) -> dict[str, str]:
        """Contents of small files that say what was written and kept, by name."""
        stores = {f"text/{w.spec.name}-{w.spec.key.digest}.json": w.files.manifest_text for w in self.stores if w.state == "finished"}
        return {**stores, **({"text/selected.json": json.dumps(asdict(self.selected), indent=1)} if self.selected else {})}

    @property
    def digests(self) -> dict[str, str]:
        return {TEXT + w.spec.name: w.spec.key.digest for w in self.stores}


def writers(job: Job, strategy: Strategy) -> dict[str, EndpointConfig]:
    """The endpoints that write. `Refusal` for one that cannot."""
    found = named_endpoints(job, {a.write.endpoint for a in strategy.authors})
    for name, config in found.items():
        if not config.writes:
            do = (
                f"Name a saved model in endpoints.{name}.model, or a server (engine: openai); or train on rows that were written elsewhere."
            )
            raise Refusal(f"endpoints.{name}.engine", f"{config.engine!r}, which does not write text", "an engine that does", do)
    return found


def prepare_text(job: Job, strategy: Strategy, people: Cast, cache: Path) -> Text | None:
    """Prompts, stores and rows of a strategy's authors; None for one without. Writes nothing but what `cache` holds.

    `Refusal` for prompts that nobody can write for, a judge without references, and stores that are damaged.
    """
    if not strategy.authors:
        return None
    prompts = _prompts(job.run.data, strategy, people.tokenizer, cache)
    for authored in strategy.authors:
        _check_references(prompts, authored)
    stop, endpoints = stop_tokens(people.tokenizer), writers(job, strategy)
    stores = tuple(_find(job, people, prompts, a, endpoints[a.write.endpoint], stop) for a in strategy.authors)
    rows = None
    if all(w.state == "finished" for w in stores):
        rows = select([w.source for w in stores], prompts, people.tokenizer, cache)
    train = str(rows.rows_file if rows else _stand_ins(prompts, strategy, stop))
    return Text(prompts, stores, _rows_config(job.run.data, train, prompts.held_out_file), rows)


def measured_data(job: Job, strategy: Strategy, tokenizer: PreTrainedTokenizerBase, cache: Path) -> DataConfig:
    """Data with the held-out rows that runs of the job are measured on, whoever wrote the rows that they train on."""
    if not strategy.authors:
        return job.run.data
    prompts = _prompts(job.run.data, strategy, tokenizer, cache)
    return _rows_config(job.run.data, str(_stand_ins(prompts, strategy, stop_tokens(tokenizer))), prompts.held_out_file)


def _prompts(data: DataConfig, strategy: Strategy, tokenizer: PreTrainedTokenizerBase, cache: Path) -> Prompts:
    """The prompts that leave room for the longest text."""
    if data.marks or not isinstance(data.train, str) or isinstance(data.held_out, dict):
        do = "Leave data.domain and data.score out and name one source, or train on rows that are written elsewhere."
        got = f"domains or scores of rows ({', '.join(data.marks) or 'sources by domain'})"
        raise Refusal("data", got, "none where teachers write the rows", do)
    longest = max(a.write.sampling.max_new_tokens for a in strategy.authors)
    room = data.max_length_tokens - longest
    if room < 1:
        do = f"Set data.max_length_tokens to more than {longest}, by the length of a prompt, or lower strategy.max_new_tokens."
        raise Refusal("data.max_length_tokens", f"{data.max_length_tokens} for prompts and {longest} new tokens", "room for both", do)
    return prepare_prompts(data, tokenizer, data.split_seed, room, cache)


def _rows_config(given: DataConfig, train: str, held_out: str) -> DataConfig:
    """The settings under which the rows are read as any other data."""
    fresh: dict[str, object] = {"train": train, "held_out": held_out, "columns": {}, "glob": None, "subset": None, "max_rows": None}
    return given.model_copy(update=fresh)


def _check_references(prompts: Prompts, authored: Authored) -> None:
    if authored.judge.type != "none" and not prompts.references:
        do = "Give rows a completion or an answer (data.columns={solution: answer}), or set strategy.judge=none."
        raise Refusal("strategy.judge", f"{authored.judge.type!r}, and no prompt with a reference", "answers to compare with", do)


def last_token(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends what is learnt: of a turn, where rows are conversations, else of a text; None for a tokenizer without."""
    return stop_tokens(tokenizer)[-1] if conversations(config) else tokenizer.eos_token_id


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a text: EOS, and what ends the assistant's turn in the chat template. `Refusal` when there is none."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template is not None:
        turn = ChatTemplate(tokenizer, "student.tokenizer").answer(
            [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
        )
        ids = [] if isinstance(turn, Bad) else tokenizer(turn[1], add_special_tokens=False)["input_ids"]
        if ids and ids[-1] in tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder):
            found.append(int(ids[-1]))
    if not found:
        do = "Set eos_token in the tokenizer's configuration."
        raise Refusal("student.tokenizer", "no EOS token", "a token that ends a written text", do)
    return tuple(dict.fromkeys(found))


def _find(job: Job, people: Cast, prompts: Prompts, given: Authored, config: EndpointConfig, stop: tuple[int, ...]) -> WantedText:
    authored = replace(given, write=replace(given.write, sampling=replace(given.write.sampling, stop=stop)))
    name = authored.write.endpoint
    key = StoreKey(
        data=prompts.content,
        tokenizer=tokenizer_digest(people.tokenizer),
        template=template_digest(people.tokenizer),
        teacher=teacher_identity(people, name, config),
        vocabulary=people.vocabulary,
        request={"kind": "text", **asdict(authored.write.sampling), "stop": list(stop)},
        codec={"type": "ids"},
        codec_version=1,
    )
    found = find_store(
        text_folder(job), name, key, cache_folder(job), lambda: (*range(0, prompts.rows, job.run.text.part_prompts), prompts.rows)
    )
    check_whole(found)
    return WantedText(**vars(found), authored=authored)


def text_folder(job: Job) -> Folder:
    """Where the text stores of a job lie."""
    given = job.run.text.folder
    return Folder.of(given) if given else Folder.of(job.cluster.storage, "text")


def _stand_ins(prompts: Prompts, strategy: Strategy, stop: tuple[int, ...]) -> Path:
    """Rows of the greatest length that may come, so that a run is checked before a teacher is asked: every prompt with as many
    tokens as may be written, once for each text that may be kept of it."""
    most = [
        (min(a.per_prompt or a.write.sampling.samples, a.write.sampling.samples), a.write.sampling.max_new_tokens) for a in strategy.authors
    ]
    each, longest = sum(count for count, _ in most), max(tokens for _, tokens in most)
    path = Path(prompts.folder) / f"stand-in-{each}x{longest}.jsonl"
    if path.exists():
        return path
    rows = Rows(prompts.folder, "train")
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        for number in range(len(rows)):
            prompt = rows.read(np.asarray([number]))["tokens"].tolist()
            line = json.dumps({"tokens": prompt + [stop[0]] * longest, "loss_mask": [0] * len(prompt) + [1] * longest}) + "\n"
            file.write(line * each)
    part.replace(path)
    return path
