"""Which signals a run reads from stores, which stores are filled for it first, and which teachers answer live."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cluster.codecs import codec_for
from cluster.config import EndpointConfig, StoreEndpoint
from cluster.storage import Folder
from cluster.stores.files import SPEC, Spec, StoreFiles
from cluster.stores.key import StoreKey
from cluster.stores.parts import StoreDamaged
from orchestrator.checks.networks import Cast
from orchestrator.checks.resumed import ANSWERS
from orchestrator.config import Job
from orchestrator.data import PreparedData, template_digest, tokenizer_digest
from orchestrator.errors import Refusal
from orchestrator.rows import Rows
from orchestrator.settings import SignalsConfig
from strategies.core import Stage, Strategy
from strategies.stages.rollout import rollouts
from strategies.stages.score import Score

State = Literal["finished", "partial", "missing"]
LIVE = "live"


@dataclass(frozen=True)
class FoundStore:
    """One store that a run could read: of what, where, and how much of it is there."""

    files: StoreFiles
    spec: Spec
    state: State
    nearest: str = ""
    """Of a missing one: what the most similar store differs in, in words."""

    @property
    def status(self) -> str:
        """How much of it is there, for a person."""
        if self.state == "finished":
            return "is there whole: the teacher is not asked"
        if self.state == "partial":
            return f"has {len(self.files.complete_parts())} of {self.spec.parts} parts: it is finished first"
        return f"is filled first, in {self.spec.parts} parts"


@dataclass(frozen=True, kw_only=True)
class Wanted(FoundStore):
    """A store of the answers to a stage."""

    stage: Score


@dataclass(frozen=True)
class Sources:
    """Who answers the stages of a run."""

    answering: Mapping[str, EndpointConfig]
    """By endpoint: the teacher itself, or stores of what it said."""
    captures: tuple[Wanted, ...]
    """Stores that are filled before training."""
    read: tuple[Wanted, ...]
    """All stores that the run reads, those filled for it included."""
    digests: Mapping[str, str]
    """By endpoint: `live`, or the digests of its stores."""
    notes: tuple[str, ...] = ()
    losses: Wanted | None = None
    """Of those that are read, the one of the losses that order rows (`orchestrator.row_losses`)."""

    @property
    def asked(self) -> tuple[str, ...]:
        """Endpoints that answer themselves, now or while stores are filled."""
        live = {name for name, digest in self.digests.items() if digest == LIVE}
        return tuple(sorted(live | {w.spec.name for w in self.captures}))


NOBODY = Sources({}, (), (), {})
"""Of a run without teachers."""


def sources(
    job: Job, strategy: Strategy, people: Cast, data: PreparedData, endpoints: Mapping[str, EndpointConfig], before: Mapping[str, str]
) -> Sources:
    """Decides endpoint by endpoint, as `signals.mode` says; a resumed run goes on with what it had `before`, by endpoint.

    `Refusal` for a finished store with a missing or shortened part, and for a named store that is of something else.
    """
    check_named_keys(job, strategy, people, data, endpoints)
    answering = dict(endpoints)
    captures: list[Wanted] = []
    read: list[Wanted] = []
    digests: dict[str, str] = {}
    notes: list[str] = []
    for name, config in endpoints.items():
        wanted = _wanted(job, strategy, people, data, name, config)
        use = bool(wanted) and _use(job.run.signals, wanted, before.get(name))
        digests[name] = "+".join(w.spec.key.digest for w in wanted) if use else LIVE
        if use:
            captures += [w for w in wanted if w.state != "finished"]
            read += wanted
            answering[name] = StoreEndpoint(
                engine="store", folders=tuple(w.files.folder.root for w in wanted), cache=str(cache_folder(job))
            )
        notes += [f"signals of {name!r} are live: {w.nearest}" for w in wanted if not use and w.nearest]
    for found in read:
        check_whole(found)
    return Sources(answering, tuple(captures), tuple(read), digests, tuple(notes))


def _use(signals: SignalsConfig, wanted: Sequence[Wanted], before: str | None) -> bool:
    """Whether an endpoint is answered from stores."""
    if before is not None:
        return before != LIVE
    return all(w.state in signals.uses[signals.mode] for w in wanted)


def _wanted(job: Job, strategy: Strategy, people: Cast, data: PreparedData, name: str, config: EndpointConfig) -> list[Wanted]:
    """The stores that would answer an endpoint's stages; none when a stage is not a question about the prepared rows alone."""
    stages = [s for s in strategy.stages if s.endpoint == name]
    if isinstance(config, StoreEndpoint) or not all(_is_question(s) for s in stages) or rollouts(strategy.stages):
        return []
    return [wanted_store(job, people, data, name, config, s) for s in stages if isinstance(s, Score)]


def _is_question(stage: Stage) -> bool:
    return isinstance(stage, Score)


def wanted_store(job: Job, people: Cast, data: PreparedData, name: str, config: EndpointConfig, stage: Score) -> Wanted:
    """The store of an endpoint's answers to a stage, and how much of it is there."""
    key = store_key(job, people, data, name, config, stage)
    found = find_store(stores_folder(job), name, key, cache_folder(job), lambda: part_starts(data.folder, job.run.signals.part_tokens))
    return Wanted(**vars(found), stage=stage)


def find_store(home: Folder, name: str, key: StoreKey, cache: Path, starts: Callable[[], tuple[int, ...]]) -> FoundStore:
    """The store of a key in `home`; one that is not there would have parts that begin at `starts`.

    `Refusal` for one that does not say what it is of.
    """
    folder = home.child(f"{name}-{key.digest}")
    files = StoreFiles(folder, cache)
    if not folder.exists(SPEC):
        return FoundStore(files, Spec(key, name, starts()), "missing", nearest_store(home, name, key))
    try:
        return FoundStore(files, files.spec, "finished" if files.finished else "partial")
    except StoreDamaged as error:
        raise _damaged(files, error) from error


def check_whole(store: FoundStore) -> None:
    """`Refusal` when a part of a finished store is missing or shortened."""
    try:
        if store.state == "finished":
            store.files.check()
    except StoreDamaged as error:
        raise _damaged(store.files, error) from error


def _damaged(files: StoreFiles, error: StoreDamaged) -> Refusal:
    root = files.folder.root
    do = f"distill stores prune {root}; it is then filled again."
    return Refusal(f"store {root}", f"damage ({error})", "every part as it was written", do)


def store_key(job: Job, people: Cast, data: PreparedData, name: str, config: EndpointConfig, stage: Score) -> StoreKey:
    """What the answers of an endpoint to a stage's question about these rows depend on."""
    codec = job.run.signals.codec
    return StoreKey(
        data=data.content,
        tokenizer=tokenizer_digest(people.tokenizer),
        template=template_digest(people.tokenizer),
        teacher=teacher_identity(people, name, config),
        vocabulary=people.vocabulary,
        request=asdict(stage.request),
        codec=codec.model_dump(mode="json"),
        codec_version=codec_for(codec, stage.request, people.vocabulary).version,
    )


def teacher_identity(people: Cast, name: str, config: EndpointConfig) -> dict[str, object]:
    """What an endpoint's answers depend on besides the question."""
    network = people.teachers.get(name)
    weights = {"weights": network.fingerprint, "dtype": str(network.dtype).removeprefix("torch.")} if network else {}
    return {**config.identity, **weights}


def identities(people: Cast, endpoints: Mapping[str, EndpointConfig]) -> dict[str, str]:
    """Fingerprints of what each endpoint's answers depend on; a run that goes on must find them again, wherever a server stands by then."""
    told = {n: {k: v for k, v in teacher_identity(people, n, config).items() if k != "url"} for n, config in endpoints.items()}
    return {f"endpoints.{name}{ANSWERS}": sha256(json.dumps(t, sort_keys=True).encode()).hexdigest() for name, t in told.items()}


def nearest_store(home: Folder, name: str, key: StoreKey) -> str:
    """What distinguishes the most similar store of the endpoint, in words; nothing when there is none."""
    best: tuple[int, str] | None = None
    for folder in home.names():
        if not folder.startswith(f"{name}-"):
            continue
        try:
            differences = key.differences(StoreFiles(home.child(folder)).spec.key)
        except StoreDamaged:
            continue
        field, wanted, found = differences[0] if differences else ("nothing", "", "")
        words = f"the nearest store, {folder}, differs in {field} ({_short(found)}, not {_short(wanted)})"
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        if best is None or len(differences) < best[0]:
            best = (len(differences), words + more + ".")
    return best[1] if best else ""


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:20] + "..."


def check_named_stores(endpoints: Mapping[str, EndpointConfig]) -> None:
    """`Refusal` for an endpoint that names a folder which holds no finished store."""
    named = [(name, root) for name, config in endpoints.items() if isinstance(config, StoreEndpoint) for root in config.folders]
    for name, root in named:
        files, where = StoreFiles(Folder.of(root)), f"endpoints.{name}.folders"
        try:
            whole = bool(files.spec) and files.finished
            if whole:
                files.check()
        except StoreDamaged as error:
            do = "`distill stores` lists those there are."
            raise Refusal(where, f"{root} ({error})", "a finished signal store", do) from error
        if not whole:
            do = "Finish it: distill generate with the recipe that began it."
            raise Refusal(where, f"{root}, which is not finished", "a finished signal store", do)


def check_named_keys(job: Job, strategy: Strategy, people: Cast, data: PreparedData, endpoints: Mapping[str, EndpointConfig]) -> None:
    """`Refusal` names the field in which a store that an endpoint names differs from what the run asks."""
    for name, config in endpoints.items():
        if not isinstance(config, StoreEndpoint):
            continue
        keys = [StoreFiles(Folder.of(root)).spec.key for root in config.folders]
        for stage in (s for s in strategy.stages if s.endpoint == name and isinstance(s, Score)):
            differing = [_mismatch(key, job, people, data, stage) for key in keys]
            if all(differing):
                field, wanted, found = min((d for d in differing if d), key=len)[0]
                do = "Name a store of these rows and this question, or capture one with distill generate."
                raise Refusal(f"endpoints.{name}.folders", f"a store whose {field} is {found!r}", f"{wanted!r}", do)


def _mismatch(key: StoreKey, job: Job, people: Cast, data: PreparedData, stage: Score) -> list[tuple[str, object, object]]:
    """Differences between a store and what is asked, but for who answered and how its numbers are kept."""
    asked = key.model_copy(
        update={
            "data": data.content,
            "tokenizer": tokenizer_digest(people.tokenizer),
            "template": template_digest(people.tokenizer),
            "vocabulary": people.vocabulary,
            "request": asdict(stage.request),
        }
    )
    return asked.differences(key)


def stores_folder(job: Job) -> Folder:
    """Where the stores of a job lie."""
    given = job.run.signals.folder
    return Folder.of(given) if given else Folder.of(job.cluster.storage, "signals")


def cache_folder(job: Job) -> Path:
    """Where parts of stores elsewhere are kept on this machine."""
    return job.cluster.small_files / "stores-cache"


def part_starts(folder: str, part_tokens: int) -> tuple[int, ...]:
    """First rows of the parts of prepared data, and the end: held-out rows follow the others and share no part with them."""
    train, held_out = Rows(folder, "train"), Rows(folder, "held_out")
    first = _cuts(train.lengths, part_tokens)
    then = _cuts(held_out.lengths, part_tokens) + len(train)
    return tuple(int(s) for s in (*first, *then, len(train) + len(held_out)))


def _cuts(lengths: NDArray[np.int32], part_tokens: int) -> NDArray[np.int64]:
    """Rows at which a part begins: whenever another `part_tokens` tokens are full."""
    before = np.cumsum(lengths, dtype=np.int64) - lengths
    return np.flatnonzero(np.diff(before // part_tokens, prepend=-1))
