"""Seals of checkpoints: whatever is changed, added, taken away or brought from elsewhere is refused by its name."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.seal import Broken, Key, NoKey, SealSettings, check, key_file, key_of, seal

KEY = Key(b"k" * 32)
PLACE = "checkpoint_001_00000005"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two ranks, sealed."""
    for rank, names in enumerate(((".metadata", "__0_0.distcp"), ("__1_0.distcp",))):
        part = tmp_path / str(rank)
        part.mkdir()
        for name in names:
            (part / name).write_bytes(name.encode() * 100)
        seal(part, PLACE, rank, KEY)
        for path in part.iterdir():
            path.rename(tmp_path / path.name)
        part.rmdir()
    return tmp_path


def test_what_was_sealed_is_taken(folder: Path) -> None:
    check(folder, PLACE, KEY)
    for rank in range(3):
        check(folder, PLACE, KEY, rank, 3)


def flip(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[7] ^= 1
        (folder / name).write_bytes(content)

    return change


def forge(folder: Path) -> None:
    """The digest of another file, put into the seal by somebody without the key."""
    flip(".metadata")(folder)
    path = folder / "seal_00000.json"
    content = json.loads(path.read_bytes())
    content["files"][".metadata"] = content["files"]["__0_0.distcp"]
    path.write_text(json.dumps(content))


def reseal(folder: Path) -> None:
    seal(folder, PLACE, 0, Key(b"x" * 32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip(".metadata"), f"{PLACE}/.metadata was changed"),
        (flip("__1_0.distcp"), f"{PLACE}/__1_0.distcp was changed"),
        (forge, "seal_00000.json was changed"),
        (reseal, "seal_00000.json was made with another key"),
        (lambda f: (f / "evil.distcp").write_bytes(b""), "evil.distcp is under no seal"),
        (lambda f: (f / "evil.distcp").symlink_to(f / ".metadata"), "evil.distcp is under no seal"),
        (lambda f: (f / "__1_0.distcp").unlink(), "__1_0.distcp is gone"),
        (lambda f: (f / "seal_00001.json").unlink(), "__1_0.distcp is under no seal"),
        (lambda f: (f / "seal_00001.json").write_text("[]"), "seal_00001.json is no seal"),
    ],
)
def test_what_was_changed_is_refused_by_name(folder: Path, change: Callable[[Path], object], words: str) -> None:
    change(folder)
    with pytest.raises(Broken, match=words):
        check(folder, PLACE, KEY)


def test_a_checkpoint_in_the_place_of_another_is_refused(folder: Path) -> None:
    with pytest.raises(Broken, match=f"belongs to {PLACE}"):
        check(folder, "checkpoint_002_00000010", KEY)


def test_the_ranks_together_find_every_change(folder: Path) -> None:
    flip("__0_0.distcp")(folder)
    found = 0
    for rank in range(2):
        try:
            check(folder, PLACE, KEY, rank, 2)
        except Broken:
            found += 1
    assert found == 1


def test_without_a_seal_only_by_wish(folder: Path) -> None:
    for path in folder.glob("seal_*"):
        path.unlink()
    with pytest.raises(Broken, match="has no seal"):
        check(folder, PLACE, KEY)
    check(folder, PLACE, Key(KEY.secret, required=False))


def test_the_key_file_is_made_once_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    made = key_of(SealSettings())
    assert key_of(SealSettings()) == made
    assert key_file().stat().st_mode & 0o777 == 0o600
    assert [p.name for p in key_file().parent.iterdir()] == ["key"]
    key_file().chmod(0o644)
    with pytest.raises(NoKey, match="chmod 600"):
        key_of(SealSettings())


def test_the_key_of_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OF_RUNS", raising=False)
    with pytest.raises(NoKey, match="OF_RUNS is not set"):
        key_of(SealSettings(key_env="OF_RUNS"))
    monkeypatch.setenv("OF_RUNS", "short")
    with pytest.raises(NoKey, match="too short"):
        key_of(SealSettings(key_env="OF_RUNS"))
    monkeypatch.setenv("OF_RUNS", "v" * 40)
    assert key_of(SealSettings(key_env="OF_RUNS")).secret == b"v" * 40


def test_the_key_is_shown_nowhere() -> None:
    assert "kkk" not in repr(KEY) and KEY.secret.hex() not in KEY.name
    assert pickle.loads(pickle.dumps(KEY)) == KEY


def test_a_file_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    with pytest.raises(NoKey, match="cannot be read or made"):
        key_of(SealSettings())
    assert os.path.isfile(tmp_path / "config")
