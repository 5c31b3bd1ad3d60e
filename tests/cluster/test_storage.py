"""Small files on any filesystem: where an address leads, and that a file is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import fs

from cluster import storage
from cluster.storage import Folder


@pytest.fixture(params=["a local path", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(f"file://{tmp_path}/run" if request.param == "file" else f"{tmp_path}/run")


def test_a_file_is_replaced_and_nothing_is_left_beside_it(folder: Folder) -> None:
    folder.write("a.json", b"old")
    folder.write("a.json", b"new")
    assert folder.read("a.json") == b"new" and folder.names() == ["a.json"]


def test_a_write_that_is_cut_short_leaves_what_was_there(folder: Folder) -> None:
    folder.write("a.json", b"old")
    with pytest.raises(TypeError):
        folder.write("a.json", None)  # type: ignore[arg-type] # fails once the file is open
    assert folder.read("a.json") == b"old"


def test_a_file_address_is_a_path_of_the_machine(tmp_path: Path) -> None:
    Folder(f"file://{tmp_path}/run").write("a.json", b"{}")
    assert (tmp_path / "run" / "a.json").read_bytes() == b"{}"


def test_an_object_store_is_written_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its uploads are whole by themselves, and a move there is another copy."""
    local, opened = fs.LocalFileSystem(), list[str]()

    class Store:
        def create_dir(self, path: str, recursive: bool) -> None:
            local.create_dir(path, recursive=recursive)

        def open_output_stream(self, path: str) -> object:
            opened.append(path)
            return local.open_output_stream(path)

    monkeypatch.setattr(storage, "_remote", lambda address: (Store(), str(tmp_path)))
    Folder("s3://bucket/run").write("a.json", b"{}")
    assert opened == [f"{tmp_path}/run/a.json"]
