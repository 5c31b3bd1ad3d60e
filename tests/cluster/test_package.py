"""What a job takes along of the working tree, and what makes it too large."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from cluster.package import Tree


def fill(root: Path, **files: str) -> Path:
    """Files by name; `__` stands for a slash, `DOT` for a leading dot."""
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = fill(
        tmp_path / "project",
        DOTgitignore="runs/\n*.bin\n!kept.bin\n",
        DOTrayignore="notes\n",
        main="x",
        kept="y",
        runs__a__model="weights",
        notes__todo="later",
        code__DOTgitignore="secret*\n",
        code__secret_plan="no",
        code__module="yes",
        DOTgit__HEAD="ref",
        DOTvenv__lib="python",
    )
    (root / "big.bin").write_bytes(b"0" * 1000)
    (root / "kept.bin").write_bytes(b"1" * 10)
    return root


def test_ignore_files_are_honoured_in_every_folder(project: Path) -> None:
    assert set(Tree.of(project).files) == {
        ".gitignore", ".rayignore", "main", "kept", "kept.bin", "code/.gitignore", "code/module",
    }  # fmt: skip


def test_the_files_are_those_that_ray_itself_would_take(project: Path, tmp_path: Path) -> None:
    archive = tmp_path / "by_ray.zip"
    create_package(str(project), archive, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(archive) as content:
        theirs = {name for name in content.namelist() if not name.endswith("/")}
    assert set(Tree.of(project).files) == theirs


def test_files_that_hold_secrets_by_custom_stay_here(project: Path) -> None:
    fill(project, DOTenv="HF_TOKEN=hf_x", code__DOTnetrc="password x")
    assert not {".env", "code/.netrc"} & set(Tree.of(project).files)


def test_a_link_out_of_the_tree_is_not_followed(project: Path, tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", passwords="x")
    (project / "inside").symlink_to("main")
    (project / "file").symlink_to(tmp_path / "elsewhere" / "passwords")
    (project / "folder").symlink_to(tmp_path / "elsewhere")
    files = set(Tree.of(project).files)
    assert "inside" in files
    assert not any(name.startswith(("file", "folder")) for name in files)


def test_the_folder_of_runs_stays_here_whatever_the_ignore_files_say(project: Path) -> None:
    fill(project, kept_runs__a__model="weights")
    assert "kept_runs/a/model" in Tree.of(project).files
    assert "kept_runs/a/model" not in Tree.of(project, without=project / "kept_runs").files


def test_a_folder_goes_along_only_when_all_of_it_does(project: Path) -> None:
    tree = Tree.of(project)
    assert tree.holds(project / "main")
    assert not tree.holds(project / "code")
    assert not tree.holds(project / "runs")
    assert not tree.holds(project.parent)


def test_culprits_are_named_as_narrowly_as_they_explain_their_folder() -> None:
    sizes = {"data/raw/rows.bin": 900, "data/readme": 1, "models/a": 300, "models/b": 300, "main": 5}
    assert Tree(Path("/"), sizes).culprits() == [("data/raw/rows.bin", 900), ("models/", 600), ("main", 5)]


def test_equal_contents_make_equal_archives(project: Path, tmp_path: Path) -> None:
    archives = [tmp_path / "one.zip", tmp_path / "two.zip"]
    (project / "main").chmod(0o755)
    for archive in archives:
        (project / "kept").touch()
        Tree.of(project).write(archive, {"submitted/recipe.yaml": b"student: x\n"})
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with zipfile.ZipFile(archives[0]) as content:
        assert content.read("submitted/recipe.yaml") == b"student: x\n"
        assert content.read("code/module") == b"yes"
        assert content.getinfo("main").external_attr >> 16 == 0o755
        assert content.getinfo("kept").external_attr >> 16 == 0o644
