"""Where rows come from: files, folders and globs of them, datasets saved with `save_to_disk`, hub datasets.

Opening a source finds out what it is and refuses what cannot work; its records are read, as a stream, when asked for.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import Refusal
from orchestrator.files import (
    BATCH_ROWS,
    ROW_COLUMNS,
    FileKind,
    Record,
    kind_of,
    known_suffixes,
    parquet_columns,
    read_file,
    renamed,
    wanted,
)
from orchestrator.settings import SOURCE_DOMAIN, DataConfig

if TYPE_CHECKING:
    from datasets import Dataset

ROW_KINDS = (("tokens",), ("messages",), ("prompt", "completion"), ("text",))
"""Columns that make a row, by kind; the first kind that a record has is the one it is read as."""
PROMPT_KINDS = (("messages",), ("prompt",))
"""Columns that make a prompt."""
PEEK_ROWS = 100
"""Records of a JSONL source looked at to learn its columns."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """A source that exists, of a known kind."""

    where: str
    """Recipe key that named it."""
    spec: str
    files: tuple[tuple[str, Path], ...]
    """Names inside the source, and paths, of every file it consists of."""
    columns: frozenset[str]
    """Its columns before renaming, as far as known."""
    records: Callable[[], Iterator[Record]]
    has_splits: bool = False
    """Whether the split says which rows are meant; files have none."""


def open_sources(
    given: str | Mapping[str, str],
    config: DataConfig,
    split: str,
    where: str,
    kinds: Sequence[Sequence[str]] = ROW_KINDS,
    most_rows: int | None = None,
) -> Source:
    """What `given` names as one source, with at most the first `most_rows` records of each. Those of several by domain follow each
    other, and each record has its domain in the column `SOURCE_DOMAIN`. Otherwise as `open_source`."""
    if isinstance(given, str):
        one = open_source(given, config, split, where, kinds)
        return replace(one, records=lambda: itertools.islice(one.records(), most_rows))
    each = {name: open_source(spec, config, split, f"{where}.{name}", kinds) for name, spec in given.items()}

    def records() -> Iterator[Record]:
        for name, source in each.items():
            for record in itertools.islice(source.records(), most_rows):
                yield replace(record, columns={**record.columns, SOURCE_DOMAIN: name})

    files = tuple((f"{name}/{file}", path) for name, source in each.items() for file, path in source.files)
    splits = all(source.has_splits for source in each.values())
    return Source(where, ", ".join(given.values()), files, frozenset(), records, splits)


def open_source(spec: str, config: DataConfig, split: str, where: str, kinds: Sequence[Sequence[str]] = ROW_KINDS) -> Source:
    """Opens what `spec` names: a path when there is one, a hub dataset (downloaded here) otherwise.

    `where` is the recipe key, for messages; `split` matters to datasets only; `kinds` are the columns that are looked for.
    Raises `Refusal`.
    """
    if "://" in spec:
        raise Refusal(where, repr(spec), "a path or a hub dataset name", "Copy the data to a folder that every node reaches.")
    path = Path(spec).expanduser()
    if path.is_dir() and any((path / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        source = _dataset_source(_saved(path, split, where), spec, split, where, config)
    elif path.exists() or glob.has_magic(spec):
        source = _file_source(_found(path, spec, config, where), spec, where, config)
    elif _HUB_NAME.fullmatch(spec) and kind_of(path) is None:
        source = _dataset_source(_from_hub(spec, config.subset, split, where), spec, split, where, config)
    else:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
        remedy = f"Did you mean {str(path.parent / near[0])!r}?" if near else "Check the path."
        raise Refusal(where, f"{spec!r}, which does not exist", "a file, folder, glob or hub dataset name", remedy)
    _check_columns(source, config.columns, kinds)
    _check_marks(source, config)
    return source


def _check_columns(source: Source, renames: Mapping[str, str], kinds: Sequence[Sequence[str]]) -> None:
    """Some kind of row can be made of the columns, and every rename meets a column."""
    if not source.columns:
        return
    after = renamed(dict.fromkeys(source.columns), renames)
    place, saw = f"{source.where} {source.spec!r}", ", ".join(sorted(source.columns))
    for old, new in renames.items():
        if new not in ROW_COLUMNS:
            raise Refusal("data.columns", f"{old!r} renamed to {new!r}", f"one of {', '.join(ROW_COLUMNS)}", "Rename to one of these.")
    if any(all(name in after for name in kind) for kind in kinds):
        return
    for old in sorted(set(renames) - source.columns):
        do = _nearest(old, source.columns) or "Correct the name."
        raise Refusal("data.columns", f"the column {old!r}", f"a column of {source.spec!r}: {saw}", do)
    hints = [
        f"{name!r} looks like {near[0]!r}. "
        for name in ROW_COLUMNS
        if (near := difflib.get_close_matches(name, source.columns, n=1)) and near[0] != name
    ]
    do = "".join(hints) + "Rename columns with data.columns, such as {question: prompt, answer: completion}."
    raise Refusal(place, f"the columns {saw}", _listed([" + ".join(kind) for kind in reversed(kinds)]), do)


def _check_marks(source: Source, config: DataConfig) -> None:
    """The columns that say something of rows are there."""
    after = frozenset(renamed(dict.fromkeys(source.columns), config.columns))
    for where, name in (("data.domain", config.domain), ("data.score", config.score)):
        if name is not None and source.columns and name not in after:
            saw = f"a column of {source.where} {source.spec!r}: {', '.join(sorted(after))}"
            raise Refusal(where, f"the column {name!r}", saw, _nearest(name, after) or "Correct the name, or leave it out.")


def _listed(words: Sequence[str]) -> str:
    return ", or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 2 else " or ".join(words)


def _nearest(word: str, known: frozenset[str]) -> str:
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""


def _found(path: Path, spec: str, config: DataConfig, where: str) -> list[tuple[str, Path, FileKind]]:
    """Names, paths and kinds of the files that `spec` means, sorted by name. A file of an unknown suffix is text when a
    pattern chose it, refused when it was named, and passed over when it merely lies in a folder."""
    pattern = config.glob if path.is_dir() else None if path.exists() else spec
    if path.is_file():
        named = [(path.name, path)]
    elif path.is_dir():
        named = _in_folder(path, pattern)
    else:
        named = [(match, Path(match)) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
    typed = [(name, file, kind_of(file)) for name, file in sorted(named)]
    if path.is_file() and typed[0][2] is None:
        do = "Convert it to JSONL, or name it by a glob to have it read as text."
        raise Refusal(where, f"{spec!r}", f"a file ending in one of {known_suffixes()}", do)
    kept: list[tuple[str, Path, FileKind]] = [(name, file, kind or "text") for name, file, kind in typed if kind or pattern]
    if not kept:
        got = f"no file matching {pattern!r}" if pattern else f"no file ending in one of {known_suffixes()}"
        raise Refusal(where, f"{got} in {spec!r}", "at least one file of rows", "Check the path and data.glob.")
    if len({kind for *_, kind in kept}) > 1:
        suffixes = ", ".join(sorted({file.suffix for _, file, _ in kept}))
        do = f"Choose with data.glob, such as '**/*{kept[0][1].suffix}'."
        raise Refusal(where, f"files of different kinds ({suffixes}) in {spec!r}", "files of one kind", do)
    return kept


def _in_folder(folder: Path, pattern: str | None) -> list[tuple[str, Path]]:
    """Files of a folder and everything below it, without hidden ones; those matching `pattern` when there is one."""
    try:
        files = [file for file in folder.glob(pattern or "**/*") if file.is_file()]
    except (ValueError, NotImplementedError) as error:
        raise Refusal("data.glob", repr(pattern), "a relative file pattern such as '**/*.py'", f"{error}.") from error
    named = [(file.relative_to(folder).as_posix(), file) for file in files]
    return [(name, file) for name, file in named if pattern or not any(part.startswith(".") for part in name.split("/"))]


def _file_source(files: list[tuple[str, Path, FileKind]], spec: str, where: str, config: DataConfig) -> Source:
    kind = files[0][2]

    def records() -> Iterator[Record]:
        return itertools.chain.from_iterable(read_file(path, kind, where, config.columns, config.marks) for _, path, _ in files)

    if kind == "Parquet":
        columns = parquet_columns(files[0][1], where)
    elif kind == "text":
        columns = frozenset({"text"})
    else:
        raw = itertools.chain.from_iterable(read_file(path, kind, where, {}) for _, path, _ in files)
        columns = frozenset(name for record in itertools.islice(raw, PEEK_ROWS) for name in record.columns)
    return Source(where, spec, tuple((name, path) for name, path, _ in files), columns, records)


def _dataset_source(dataset: Dataset, spec: str, split: str, where: str, config: DataConfig) -> Source:
    chosen = dataset.with_format(None).select_columns(wanted(dataset.column_names, config.columns, config.marks))

    def records() -> Iterator[Record]:
        row = 0
        for batch in chosen.iter(BATCH_ROWS):
            for values in zip(*batch.values(), strict=True):
                row += 1
                yield Record(f"{spec}[{split}]", row, renamed(dict(zip(batch, values, strict=True)), config.columns))

    files = tuple((Path(file["filename"]).name, Path(file["filename"])) for file in dataset.cache_files)
    return Source(where, spec, files, frozenset(dataset.column_names), records, has_splits=True)


def _saved(path: Path, split: str, where: str) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise Refusal(where, f"{str(path)!r} ({_words(error)})", "a dataset saved with save_to_disk", "Save it again.") from error
    if not isinstance(loaded, DatasetDict):
        return loaded
    if split not in loaded:
        do = f"Set data.{'held_out_split' if where == 'data.held_out' else 'split'}."
        raise Refusal(where, f"no split {split!r} in {str(path)!r}", f"one of {', '.join(sorted(loaded))}", do)
    return loaded[split]


def _from_hub(name: str, subset: str | None, split: str, where: str) -> Dataset:
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        dataset = load_dataset(name, subset, split=split)
    except ConnectionError as error:
        got = f"{name!r}, which is no file or folder here, and the dataset hub cannot be reached ({_words(error)})"
        do = "Check the path, or go online once to fill the cache (HF_HOME)."
        raise Refusal(where, got, "a path that exists, or a way to the hub", do) from error
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        got = f"{name!r}, which is no file or folder here and which the hub does not give ({_words(error)})"
        do = "Check the name, data.subset and the split."
        raise Refusal(where, got, "a path, or a hub dataset with this data.subset and split", do) from error
    if not isinstance(dataset, Dataset):
        raise Refusal(where, f"{name!r} split {split!r} as a {type(dataset).__name__}", "one split", "Name a single split.")
    return dataset


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
