"""Whose small files are whose, and who drives a run or a search in remote storage."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.storage import Folder
from orchestrator import mirror
from orchestrator.checks.folders import BASELINE, run_folder
from orchestrator.checks.owners import FAR_SILENCE_SECONDS, GRACE_SECONDS
from orchestrator.config import Job, load_job, to_yaml
from orchestrator.errors import Refusal
from orchestrator.journal import Heartbeat, Journal, MetricRow, RunRecord
from orchestrator.mirror import mirrored
from orchestrator.naming import fresh_name
from orchestrator.owner import COPY, OWNER, Owner, are_of, driver_of, home_of, small_files
from orchestrator.result import RECIPE
from orchestrator.search import drive
from orchestrator.search.book import run_name, run_names
from orchestrator.search.folders import new_name

WAIT_SECONDS = 10.0
"""For a thread."""


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A storage that is remote to the programs, and a working folder of the test's own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return f"file://{tmp_path}/far"


@pytest.fixture
def gone_on(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Storages of the searches that were let in to go on."""
    told: list[str] = []
    monkeypatch.setattr(drive, "_run", lambda planned, where, display: told.append(where["storage"]))
    return told


def job(storage: str, **settings: object) -> Job:
    return load_job({"student": "some/model", "strategy": "logits", "data": "rows.jsonl", **settings}, cluster={"storage": storage})


def begun(storage: str, name: str) -> Folder:
    """A run as its driver left it here and in the storage."""
    home = Folder.of(storage, name)
    home.write(RECIPE, to_yaml(job(storage, name=name).run).encode())
    with mirrored(small_files(home), home):
        Journal(small_files(home)).append([row(1)])
    return home


def row(step: int) -> MetricRow:
    return MetricRow(step, 1, {"loss": 1.0}, 0.0)


def driven(home: Folder, beat: Heartbeat | None) -> Folder:
    """A remote run or search whose driver was last seen so."""
    home.child(COPY).write(OWNER, Owner("theirs", beat=beat).to_json())
    return home


def elsewhere(seconds_ago: float) -> Heartbeat:
    return Heartbeat("elsewhere", 7, 0.0, time.time() - seconds_ago)


def parent() -> Heartbeat:
    """Another process of this machine, which lives."""
    found = psutil.Process(os.getppid())
    return Heartbeat(socket.gethostname(), found.pid, found.create_time(), time.time())


def dead() -> Heartbeat:
    """A process that this machine does not have."""
    return Heartbeat(socket.gethostname(), 2**22 + 1, 0.0, time.time())


def search_here(name: str) -> Path:
    """The folder of a search in local storage."""
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / drive.SEARCH).write_text("search: {}")
    return folder


# A new run


@pytest.mark.parametrize("name", ["x", f"x{BASELINE}"])
def test_a_new_run_takes_over_no_small_files_of_its_name(storage: str, name: str) -> None:
    (Path("runs") / name).mkdir(parents=True)
    with pytest.raises(Refusal, match=rf"runs/{name}, where small files of another run lie.*Choose another name") as caught:
        run_folder(job(storage, name="x", baseline=True), "recipe", None)
    assert caught.value.where == "name"
    assert run_folder(job(storage, name="y", baseline=True), "recipe", None).root == f"{storage}/y"


def test_a_run_whose_folder_was_removed_does_not_come_back_as_a_new_one(storage: str) -> None:
    begun(storage, "x").clear()
    with pytest.raises(Refusal, match=f"small files of {storage}/x"):
        run_folder(job(storage, name="x"), "recipe", None)


def test_in_local_storage_the_folder_itself_is_what_has_to_be_free(storage: str) -> None:
    (Path("runs") / "x").mkdir(parents=True)
    assert run_folder(job("elsewhere", name="x"), "recipe", None).local == Path("elsewhere/x").absolute()


def test_a_name_that_nobody_chose_is_free_here_too(storage: str) -> None:
    first = fresh_name(storage, "recipe")
    (Path("runs") / first).mkdir(parents=True)
    assert fresh_name(storage, "recipe") != first


# A run that goes on


def test_small_files_of_an_earlier_resumption_are_the_runs_own(storage: str) -> None:
    home = begun(storage, "x")
    assert run_folder(job(storage, name="x"), "recipe", home) == home
    with mirrored(Path("another machine"), home):
        pass
    assert run_folder(job(storage, name="x"), "recipe", home) == home


def test_a_machine_that_has_nothing_of_a_run_may_go_on_with_it(storage: str) -> None:
    home = Folder.of(storage, "x")
    home.write(RECIPE, to_yaml(job(storage).run).encode())
    assert run_folder(job(storage), "recipe", home) == home


@pytest.mark.parametrize("name", ["x", f"x{BASELINE}"])
def test_a_run_does_not_go_on_with_small_files_of_another(storage: str, name: str) -> None:
    home, other = Folder.of(storage, "x"), Folder.of(f"{storage}-other", name)
    home.write(RECIPE, to_yaml(job(storage, baseline=True).run).encode())
    with mirrored(small_files(other), other):
        pass
    with pytest.raises(Refusal, match=f"runs/{name}, where small files of {other.root} lie.*Move that folder"):
        run_folder(job(storage, baseline=True), "recipe", home)


def test_a_run_does_not_go_on_with_the_folder_of_a_local_one(storage: str) -> None:
    home = Folder.of(storage, "x")
    home.write(RECIPE, to_yaml(job(storage).run).encode())
    (Path("runs") / "x").mkdir(parents=True)
    RunRecord("https://server/", "1", "other").save(Path("runs") / "x")
    with pytest.raises(Refusal, match="small files of another run"):
        run_folder(job(storage), "recipe", home)


def test_files_that_a_copied_storage_knows_are_its_own(storage: str) -> None:
    """A bucket that was copied to another has the same copy."""
    home, moved = begun(storage, "x"), Folder.of(f"{storage}-moved", "x")
    moved.child(COPY).write(OWNER, home.child(COPY).read(OWNER) or b"")
    assert are_of(moved)


# A second driver


@pytest.mark.parametrize("seen", [lambda: elsewhere(0), lambda: elsewhere(FAR_SILENCE_SECONDS - 20), parent])
def test_a_remote_run_that_is_driven_is_refused(storage: str, seen: Callable[[], Heartbeat]) -> None:
    beat = seen()
    home = driven(begun(storage, "x"), beat)
    with pytest.raises(Refusal, match=f"a run that process {beat.pid} of {beat.host} is driving"):
        run_folder(job(storage, name="x"), "recipe", home)


@pytest.mark.parametrize("seen", [lambda: None, lambda: elsewhere(FAR_SILENCE_SECONDS + 1), dead])
def test_a_remote_run_whose_driver_is_gone_goes_on(storage: str, seen: Callable[[], Heartbeat | None]) -> None:
    home = driven(begun(storage, "x"), seen())
    assert run_folder(job(storage, name="x"), "recipe", home) == home


def test_a_driver_says_that_it_lives_and_that_it_ended(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "RENEW_SECONDS", 0.01)
    home = Folder.of(storage, "x")
    with mirrored(small_files(home), home):
        first = driver_of(home)
        assert first is not None and (first.host, first.pid) == (socket.gethostname(), os.getpid())
        end = time.monotonic() + WAIT_SECONDS
        while (beat := driver_of(home)) is None or beat.beat == first.beat:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert driver_of(home) is None and are_of(home)


def test_a_driver_whose_run_was_taken_over_copies_no_more(storage: str, caplog: pytest.LogCaptureFixture) -> None:
    home, there = Folder.of(storage, "x"), Path("there")
    with mirrored(small_files(home), home):
        Journal(small_files(home)).append([row(1)])
        with mirrored(there, home):
            Journal(there).append([row(2)])
        taken = home.child(COPY).read(OWNER)
    assert home.child(COPY).read("metrics.jsonl") == (there / "metrics.jsonl").read_bytes()
    assert home.child(COPY).read(OWNER) == taken and "took" in caplog.text


def test_a_driver_that_is_killed_while_it_fetches_leaves_nothing_that_counts(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home = begun(storage, "x")
    there = Path("there")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Folder, "sizes", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with mirrored(there, home):
            pass
    assert not (there / "metrics.jsonl").exists()
    with mirrored(there, home):
        assert [r.step for r in Journal(there).rows()] == [1]


def test_what_is_no_owner_is_somebody_unknown() -> None:
    assert Owner.of(None) is None
    for content in (b"", b"somebody", b"1234", b'{"id": "a"}'):
        assert Owner.of(content) == Owner("")
    assert not Owner("").same(Owner(""))
    whole = Owner("a", "s3://b/runs/x", elsewhere(3))
    assert Owner.of(whole.to_json()) == whole and whole.same(Owner("a"))


def test_a_password_of_the_storage_is_not_written_down(tmp_path: Path) -> None:
    (tmp_path / "S").mkdir()
    (tmp_path / "S" / OWNER).write_bytes(Owner("a", "s3://bucket/runs/S").to_json())
    named = Folder(str(tmp_path / "S"))
    assert home_of(named, "s3://me:secret@bucket/runs").root == "s3://me:secret@bucket/runs/S"
    assert home_of(named, "runs").root == "s3://bucket/runs/S"
    mine = mirror._Mirror(tmp_path / "S", Folder("s3://me:secret@bucket/runs/S"))
    mine._own("b")
    assert Owner.here(tmp_path / "S") == Owner("b", "s3://bucket/runs/S")


# Searches


def test_names_of_a_searchs_runs() -> None:
    own = [run_name("find", number, generation) for number, generation in ((0, 0), (7, 2), (1234, 0), (-1, 0))]
    assert run_names("find", [*own, "find", "find-12", "find-better", "find-20260101-101010", "a-find-000", "find-000-x"]) == own


@pytest.mark.parametrize("name", ["find", "find-003", "find-control"])
def test_a_new_search_takes_over_no_small_files_of_its_names(storage: str, name: str) -> None:
    (Path("runs") / name).mkdir(parents=True)
    with pytest.raises(Refusal, match=f"runs/{name}, where small files of another run lie"):
        new_name(job(storage, name="find"), "recipe")
    assert new_name(job(storage, name="other"), "recipe") == "other"


@pytest.mark.parametrize("far", [True, False])
def test_a_new_search_takes_over_no_trial_of_an_earlier_one(storage: str, far: bool) -> None:
    place = storage if far else "runs"
    Folder.of(place, "find-000").write(RECIPE, b"{}")
    with pytest.raises(Refusal, match=f"{place}/find-000, a trial of an earlier search"):
        new_name(job(place, name="find"), "recipe")


def test_a_local_search_goes_on_where_it_is_whatever_the_storage(storage: str, gone_on: list[str]) -> None:
    folder = search_here("S")
    drive.resume_search(folder, cluster={"storage": storage})
    assert gone_on == [str(Path("runs").absolute())] and not Folder(storage).exists()


def test_a_remote_search_does_not_go_on_with_the_files_of_a_local_one(storage: str, gone_on: list[str]) -> None:
    search_here("S")
    with pytest.raises(Refusal, match="runs/S, where small files of another run lie"):
        drive.resume_search(f"{storage}/S")
    assert gone_on == []


def test_a_search_goes_on_in_the_storage_that_its_small_files_name(storage: str, gone_on: list[str]) -> None:
    home = Folder.of(storage, "S")
    with mirrored(small_files(home), home):
        (small_files(home) / drive.SEARCH).write_text("search: {}")
    drive.resume_search("runs/S", cluster={"storage": "s3://another/runs"})
    assert gone_on == [storage]


def test_a_search_does_not_go_on_with_a_trial_of_another(storage: str, gone_on: list[str]) -> None:
    home, trial = Folder.of(storage, "S"), Folder.of(f"{storage}-other", "S-001")
    for each in (home, trial):
        with mirrored(small_files(each), each):
            (small_files(each) / drive.SEARCH).write_text("search: {}")
    with pytest.raises(Refusal, match=f"runs/S-001, where small files of {trial.root} lie"):
        drive.resume_search("runs/S")
    assert gone_on == []


def test_a_local_search_that_is_driven_is_refused(storage: str, gone_on: list[str]) -> None:
    folder = search_here("S")
    parent().save(folder)
    with pytest.raises(Refusal, match=f"a search that process {parent().pid} of .* is driving"):
        drive.resume_search(folder)
    Heartbeat("elsewhere", 7, 0.0, time.time() - 3600).save(folder)
    drive.resume_search(folder)
    assert len(gone_on) == 1


@pytest.mark.parametrize("silence", [0.0, FAR_SILENCE_SECONDS + GRACE_SECONDS / 2])
def test_a_remote_search_that_is_driven_is_refused(storage: str, gone_on: list[str], silence: float) -> None:
    home = driven(Folder.of(storage, "S"), elsewhere(silence))
    home.child(COPY).write(drive.SEARCH, b"search: {}")
    with pytest.raises(Refusal, match="a search that process 7 of elsewhere is driving"):
        drive.resume_search(home.root)
    assert Owner.of_copy(home) == Owner("theirs", beat=driver_of(home)) and not Path("runs").exists()
    driven(home, elsewhere(FAR_SILENCE_SECONDS + GRACE_SECONDS + 5))
    drive.resume_search(home.root)
    assert gone_on == [storage]
