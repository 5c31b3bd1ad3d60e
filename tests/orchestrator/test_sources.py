"""Opening and reading every kind of source, and what is said when that cannot work."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.errors import Refusal
from orchestrator.files import Record
from orchestrator.settings import DataConfig
from orchestrator.sources import open_source

ROWS = [{"text": "one", "id": 1}, {"text": "two", "id": 2}, {"text": "three", "id": 3}]


def read(spec: Path | str, split: str = "train", **settings: object) -> list[Record]:
    config = DataConfig.model_validate({"train": str(spec), **settings})
    return list(open_source(str(spec), config, split, "data.train").records())


def texts(records: Sequence[Record]) -> list[object]:
    return [record.columns.get("text", record.problem) for record in records]


def refusal(spec: Path | str, split: str = "train", **settings: object) -> str:
    with pytest.raises(Refusal) as caught:
        read(spec, split, **settings)
    return str(caught.value)


def jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def written(kind: str, folder: Path) -> Path:
    """The three rows as a source of some kind."""
    if kind == "jsonl":
        return jsonl(folder / "rows.jsonl", ROWS)
    if kind == "json array":
        (folder / "rows.json").write_text("\n" + json.dumps(ROWS, indent=1), encoding="utf-8")
        return folder / "rows.json"
    if kind == "gzip":
        (folder / "rows.jsonl.gz").write_bytes(gzip.compress(jsonl(folder / "plain.jsonl", ROWS).read_bytes()))
        return folder / "rows.jsonl.gz"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
        return folder / "rows.parquet"
    if kind == "text files":
        for row in ROWS:
            (folder / f"{row['id']}.txt").write_text(str(row["text"]), encoding="utf-8")
        return folder
    made = datasets.Dataset.from_list(ROWS)
    whole = made if kind == "saved" else datasets.DatasetDict({"train": made, "test": made.select([0])})
    whole.save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("kind", ["jsonl", "json array", "gzip", "parquet", "text files", "saved", "saved splits"])
def test_every_kind_of_source_gives_its_rows_in_order(tmp_path: Path, kind: str) -> None:
    records = read(written(kind, tmp_path))
    assert texts(records) == ["one", "two", "three"]
    assert [record.row for record in records] == ([1, 1, 1] if kind == "text files" else [1, 2, 3])


def test_a_broken_line_costs_only_that_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": \n\n[1]\n{"text": "\xff"}\n' + b"[" * 100_000 + b'\n{"text": "z"}')
    records = read(path)
    assert texts(records) == ["a", "not valid JSON", "not a JSON object", "not UTF-8", "not valid JSON", "z"]
    assert [record.row for record in records] == [1, 2, 4, 5, 6, 7]
    assert records[1].excerpt == '{"text":'


def test_a_file_that_is_not_utf8_costs_only_that_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes("caf\u00e9".encode())
    assert texts(read(tmp_path)) == ["not UTF-8", "caf\u00e9"]


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a", "text": "t"}])
    (record,) = read(path, columns={"question": "prompt", "answer": "completion"})
    assert {name: record.columns[name] for name in ("prompt", "completion")} == {"prompt": "q", "completion": "a"}


def test_two_columns_may_swap_names(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "q"}])
    (record,) = read(path, columns={"prompt": "completion", "completion": "prompt"})
    assert record.columns == {"prompt": "q", "completion": "a"}


def test_a_parquet_source_reads_only_what_it_needs(tmp_path: Path) -> None:
    assert read(written("parquet", tmp_path))[0].columns == {"text": "one"}


def test_messages_come_out_of_a_table_as_lists_of_dicts(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "rows.parquet")[0].columns == read(tmp_path / "saved")[0].columns == rows[0]


def test_a_folder_is_read_to_the_bottom_without_hidden_files(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", [{"text": "b"}])
    jsonl(tmp_path / "a" / "deep.jsonl", [{"text": "deep"}])
    jsonl(tmp_path / ".cache" / "c.jsonl", [{"text": "hidden"}])
    (tmp_path / "notes.csv").write_text("x")
    assert texts(read(tmp_path)) == ["deep", "b"]


def test_a_glob_chooses_files_and_reads_unknown_ones_as_text(tmp_path: Path) -> None:
    for name in ("a.xyz", "b.xyz", "c.txt"):
        (tmp_path / name).write_text(name)
    assert texts(read(tmp_path / "*.xyz")) == texts(read(tmp_path, glob="*.xyz")) == ["a.xyz", "b.xyz"]


def test_a_saved_dataset_gives_the_split_that_is_asked_for(tmp_path: Path) -> None:
    saved = written("saved splits", tmp_path)
    assert texts(read(saved, "test")) == ["one"]
    assert "no split 'dev'" in (said := refusal(saved, "dev")) and "one of test, train. Set data.split." in said


def test_a_missing_path_names_the_nearest_one(tmp_path: Path) -> None:
    path = written("jsonl", tmp_path)
    said = refusal(tmp_path / "row.jsonl")
    assert said.startswith("data.train: got ") and "which does not exist" in said and f"Did you mean {str(path)!r}?" in said


def test_a_hub_name_without_a_network_says_so() -> None:
    said = refusal("nobody/no-such-dataset")
    assert "no file or folder here" in said and "cannot be reached" in said and "HF_HOME" in said


def test_a_hub_name_is_loaded_with_its_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load(*args: object, **named: object) -> datasets.Dataset:
        asked.append((args, named))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    records = read("somebody/some-data", "dev", subset="small")
    assert texts(records) == ["one", "two", "three"] and records[0].source == "somebody/some-data[dev]"
    assert asked == [(("somebody/some-data", "small"), {"split": "dev"})]


def test_what_the_hub_does_not_give_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **named: object) -> datasets.Dataset:
        raise ValueError('Unknown split "dev".')

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert 'Unknown split "dev"' in refusal("somebody/some-data", "dev")


def test_an_unsupported_file_says_what_is_supported(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\n")
    assert "expected a file ending in one of .jsonl" in refusal(tmp_path / "rows.csv")
    assert "got no file ending in one of" in refusal(tmp_path)
    assert "got no file matching '*.md'" in refusal(tmp_path, glob="*.md")
    assert "s3://bucket/rows.jsonl" in refusal("s3://bucket/rows.jsonl")


def test_files_of_different_kinds_are_not_mixed(tmp_path: Path) -> None:
    written("jsonl", tmp_path)
    (tmp_path / "README.md").write_text("about")
    assert "(.jsonl, .md)" in (said := refusal(tmp_path)) and "data.glob" in said
    assert len(read(tmp_path, glob="*.jsonl")) == 3


@pytest.mark.parametrize("pattern", ["/abs/*.py", ""])
def test_a_pattern_that_is_none_is_refused(tmp_path: Path, pattern: str) -> None:
    written("text files", tmp_path)
    if pattern:
        assert refusal(tmp_path, glob=pattern).startswith("data.glob: got '/abs/*.py'")
    else:
        assert len(read(tmp_path, glob=pattern)) == 3


def test_files_that_are_not_what_they_are_called_are_refused(tmp_path: Path) -> None:
    for name in ("rows.parquet", "rows.jsonl.gz"):
        (tmp_path / name).write_bytes(b"no")
        assert "cannot be read" in refusal(tmp_path / name)


def test_columns_that_make_no_row_are_named_with_a_remedy(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"question": "q", "complation": "a"}])
    said = refusal(path)
    assert "got the columns complation, question" in said and "expected text, prompt + completion, messages, or tokens" in said
    assert "'completion' looks like 'complation'" in said and "data.columns" in said


def test_a_rename_that_meets_no_column_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    said = refusal(path, columns={"questoin": "prompt", "answer": "completion"})
    assert said.startswith("data.columns: got the column 'questoin'") and "Did you mean 'question'?" in said
    assert "one of tokens" in refusal(path, columns={"question": "promt"})
