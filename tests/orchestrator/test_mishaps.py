"""What is told of a run that something happened to, and what is told again; broken seals; streams that fall silent. Without Ray."""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from ray.exceptions import RayActorError
from ray.train import Checkpoint
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from torch.distributed.checkpoint.api import CheckpointException

from cluster.seal import Key
from cluster.storage import Folder
from orchestrator import board as boards
from orchestrator import checkpoint
from orchestrator.board import Board, Entry, Place, RankJournal
from orchestrator.errors import RunFailed
from orchestrator.fit import Fit
from orchestrator.ledger import Ledger
from orchestrator.mishaps import Nodes, Witness, lost_worker
from orchestrator.models import load_student
from orchestrator.players import load_players
from orchestrator.stream import Part, Stream
from orchestrator.weights import load_weights
from tests.checkpoints import recipe, save_models

# The board and its lives


class Handle:
    """An actor's handle whose calls run at once; `kill` starts it anew."""

    def __init__(self) -> None:
        self.kill()

    def kill(self) -> None:
        self.actor = Board()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *given: getattr(self.actor, name)(*given))


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Handle:
    monkeypatch.setattr(boards, "ray", SimpleNamespace(wait=lambda refs, timeout: (refs, []), get=lambda value: value))
    monkeypatch.setattr("orchestrator.fit.ray", SimpleNamespace(get=lambda value: value))
    return Handle()


def begun(handle: Handle) -> RankJournal:
    handle.actor.begin(1, 0, 0.0)
    journal = RankJournal(handle, 0, None)
    journal.begin(1)
    return journal


def step(journal: RankJournal, number: int) -> None:
    journal.step(1, number, {"loss": 1.0, "tokens": 1.0, "step_seconds": 1.0})


def test_a_board_that_was_lost_is_told_every_step_again(handle: Handle) -> None:
    journal, ledger, fit = begun(handle), Ledger(), Fit(threading.Thread(), handle)
    for number in range(1, 5):
        step(journal, number)
    ledger.take(next(fit.entries()))
    step(journal, 5)  # told, and lost before anybody reads it
    handle.kill()
    for number in (6, 7, 8):
        step(journal, number)
    entries = next(fit.entries())
    assert [e.values["text"] for e in entries if e.kind == "note"] == [
        "The run's board was lost and has been started anew; it is told again what it held."
    ]
    fresh = ledger.take(entries)
    assert [e.step for e in fresh if e.kind == "step"] == [5, 6, 7, 8]
    assert ledger.step == 8


def test_a_wish_to_stop_outlives_the_board(handle: Handle) -> None:
    journal, fit = begun(handle), Fit(threading.Thread(), handle)
    next(fit.entries())
    fit.ask_to_stop()
    handle.kill()
    next(fit.entries())
    for number in (1, 2):
        step(journal, number)
    assert journal.stop


def test_a_place_of_another_life_is_the_beginning() -> None:
    board = Board()
    _, life = board.post(3, "another", [Entry("step", 3, 7)])
    board.post(3, life, [Entry("step", 3, 1), Entry("step", 3, 2)])
    entries, place = board.drain(Place("another", 99))
    assert [e.step for e in entries] == [1, 2] and place.number == 2
    assert board.drain(place) == ([], place)
    board.post(2, life, [Entry("step", 2, 9)])  # of an attempt that is over
    assert board.drain(place)[0] == []


def test_notes_reach_the_ledger_and_become_tags() -> None:
    tags: dict[str, str] = {}
    ledger = Ledger()
    notes = [Entry("note", 2, 0, {"text": text}, time) for text, time in (("one", 1.0), ("two", 2.0))]
    assert ledger.take(notes) == notes
    ledger.tell(SimpleNamespace(log_tags=tags.update))  # type: ignore[arg-type]
    assert tags == {"mishap.1000000": "one", "mishap.2000000": "two"}


# Words


def died(words: str) -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError("health", failure=RayActorError(error_msg=words))


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        ({1: died("it was killed")}, "Training worker 1 died."),
        ({0: RuntimeError("connection reset by peer"), 1: died("it was killed")}, "Training worker 1 died."),
        ({0: died("The actor died because its node has died.")}, "Training worker 0 died with its node."),
        ({2: WorkerHealthCheckTimeoutError("long")}, "Training worker 2 does not answer any more and is taken for dead."),
        ({0: RuntimeError("gloo: Connection closed by peer")}, "Training worker 0 lost touch with another."),
        ({0: OSError(27, "File too large")}, "Training worker 0 failed: [Errno 27] File too large."),
    ],
)
def test_the_worker_that_failed_first_is_named(failures: dict[int, Exception], said: str) -> None:
    assert lost_worker(failures) == said


def test_a_failure_that_stays_is_told_once() -> None:
    told: list[str] = []
    witness = Witness(SimpleNamespace(note=SimpleNamespace(remote=told.append)))
    for _ in range(3):
        witness.after_exception(None, {1: died("it was killed")})
    assert told == ["Training worker 1 died."]


def test_nodes_that_come_and_go_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([{"a": "1.1.1.1", "b": "2.2.2.2"}, {"a": "1.1.1.1", "b": "2.2.2.2"}, {"a": "1.1.1.1", "c": "3.3.3.3"}])
    monkeypatch.setattr("cluster.session.nodes", lambda: next(seen))
    monkeypatch.setattr("orchestrator.mishaps.LOOK_SECONDS", 0.0)
    nodes = Nodes()
    assert nodes.changes() == []
    assert nodes.changes() == [
        "The node at 2.2.2.2 is gone; what ran there is done again elsewhere.",
        "There is a new node at 3.3.3.3.",
    ]


# Streams


def test_a_stream_that_falls_silent_is_given_up() -> None:
    silence = threading.Event()

    class Silent:
        def iter_batches(self, **settings: Any) -> Iterator[pa.Table]:
            silence.wait(30)
            yield from ()

    stream = Stream(Silent(), Part(0, 1, 1), 0, rows_seconds=0.05)
    with pytest.raises(RunFailed, match=r"no rows came for 0.05 seconds"):
        next(stream.after(0, 1))
    silence.set()


# Seals


@pytest.fixture
def sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any, Any]:
    """A sealed checkpoint in its place, its recipe, and its players."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = recipe(save_models(tmp_path / "models"))
    players = load_players(run, run.strategy.build().players, torch.device("cpu"))
    saved = checkpoint.save(players, checkpoint.Position(7, 2, {}), 0, key=KEY)
    return Path(saved.path).rename(tmp_path / checkpoint.name_of(2, 7)), run, players


KEY = Key(b"k" * 32)


def test_a_sealed_checkpoint_is_restored(sealed: tuple[Path, Any, Any]) -> None:
    folder, run, players = sealed
    assert checkpoint.restore(players, Checkpoint(str(folder)), KEY).step == 7
    load_weights(Folder(str(folder)), "student", load_student(run.student, gradient_checkpointing=False, seed=0), KEY)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


def test_metadata_that_somebody_put_there_is_refused_before_it_is_unpickled(sealed: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, run, players = sealed
    went_off = tmp_path / "went off"
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(went_off)))
    with pytest.raises(RunFailed, match=r"checkpoint_002_00000007/.metadata was changed after it was written; nothing of this"):
        checkpoint.restore(players, Checkpoint(str(folder)), KEY)
    student = load_student(run.student, gradient_checkpointing=False, seed=0)
    with pytest.raises(RunFailed, match=r"checkpoint_002_00000007/.metadata was changed after it was written; nothing of it"):
        load_weights(Folder(str(folder)), "student", student, KEY)
    assert not went_off.exists()
    with pytest.raises(CheckpointException):
        checkpoint.restore(players, Checkpoint(str(folder)))
    assert went_off.exists(), "without a key it is unpickled, so that this test could fail"
