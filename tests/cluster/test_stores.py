"""Signal stores as files: rows come back as they went in, damage is found and named, and one process fills at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.codecs import Exact, codec_for
from cluster.engines import Columns
from cluster.engines.fake import FakeEngine
from cluster.storage import Folder
from cluster.stores import lease
from cluster.stores.files import MANIFEST, SPEC, PartInfo, Spec, StoreFiles
from cluster.stores.key import StoreKey
from cluster.stores.parts import StoreDamaged, content_checksum, part_content, row_hashes
from cluster.stores.reader import StoreReader
from strategies.core import ScoreRequest

VOCABULARY = 64
TOP = ScoreRequest("topk", top_k=5)
CODEC = codec_for(Exact(), TOP, VOCABULARY)
KEY = StoreKey(
    data="d",
    tokenizer="t",
    template="c",
    teacher={"engine": "fake", "vocabulary": VOCABULARY},
    vocabulary=VOCABULARY,
    request=vars(TOP),
    codec={"type": "exact"},
    codec_version=CODEC.version,
)


def rows(lengths: list[int], first: int = 0, seed: int = 0) -> Columns:
    """Rows of random ids of which about half are learnt."""
    draw = np.random.default_rng(seed)
    mask = draw.integers(0, 2, sum(lengths)).astype(np.uint8)
    ends = np.cumsum(lengths)
    mask[[e - n for e, n in zip(ends, lengths, strict=True) if n]] = 0
    return {
        "tokens": draw.integers(0, VOCABULARY, sum(lengths)).astype(np.int32),
        "lengths": np.asarray(lengths, dtype=np.int32),
        "loss_mask": mask,
        "row_id": np.arange(first, first + len(lengths), dtype=np.int64),
    }


def chosen(columns: Columns, order: list[int]) -> Columns:
    """Some of the rows, in another order."""
    ends = np.cumsum(columns["lengths"])
    spans = [slice(int(ends[i] - columns["lengths"][i]), int(ends[i])) for i in order]
    flat = {n: np.concatenate([columns[n][s] for s in spans] or [columns[n][:0]]) for n in ("tokens", "loss_mask")}
    return flat | {n: columns[n][order] for n in ("lengths", "row_id")}


def answers(columns: Columns) -> Columns:
    found = FakeEngine(VOCABULARY).score(columns, TOP)
    return {n: v for n, v in found.items() if n != "dropped_mass"}


LENGTHS = [5, 3, 0, 9, 1, 7]


def filled(home: Path, lengths: list[int] = LENGTHS, cut: int = 3) -> StoreFiles:
    """A finished store of two parts."""
    files = StoreFiles(Folder(str(home)))
    starts = (0, cut, len(lengths))
    files.begin(Spec(KEY, "teacher", starts))
    whole = rows(lengths)
    infos = []
    for number in range(2):
        part = chosen(whole, list(range(starts[number], starts[number + 1])))
        tokens = int(part["loss_mask"].sum())
        content = part_content(part, CODEC.encode(answers(part), tokens))
        rows_here, size, checksum = len(part["lengths"]), content.size, content_checksum(content)
        infos.append(PartInfo(number, rows_here, tokens, len(part["tokens"]), size, checksum, 0.25 * number, 1.0))
        files.keep(infos[-1], content)
    files.finish(infos, {})
    return StoreFiles(files.folder)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=2, max_size=8),
    cut=st.integers(1, 7),
    picks=st.lists(st.integers(0, 7), max_size=12),
)
def test_any_rows_in_any_order_are_read_as_they_were_scored(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], cut: int, picks: list[int]
) -> None:
    order = [p % len(lengths) for p in picks]
    files = filled(tmp_path_factory.mktemp("store"), lengths, min(cut, len(lengths) - 1))
    wanted = chosen(rows(lengths), order)
    arrays, _ = StoreReader(files).read(wanted)
    got, expected = CODEC.decode(arrays), answers(wanted)
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name], values)
        assert got[name].dtype == values.dtype


def test_dropped_mass_is_that_of_the_parts_read(tmp_path: Path) -> None:
    reader, whole = StoreReader(filled(tmp_path)), rows(LENGTHS)
    assert [reader.read(chosen(whole, order))[1] for order in ([0, 1], [0, 4], [])] == [0.0, 0.25, 0.0]


# Damage


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.8, 0.999])
def test_a_flipped_bit_is_never_read(tmp_path: Path, share: float) -> None:
    files = filled(tmp_path)
    path = tmp_path / "part-000000.arrow"
    flip(path, int(share * path.stat().st_size))
    files.check()  # its size tells nothing
    with pytest.raises(StoreDamaged, match=r"part-000000\.arrow: its bytes are not those that were written"):
        StoreReader(files).read(chosen(rows(LENGTHS), [4, 1]))
    StoreReader(files).read(chosen(rows(LENGTHS), [4]))


def test_a_missing_or_shortened_part_is_found_at_the_door(tmp_path: Path) -> None:
    files, path = filled(tmp_path), tmp_path / "part-000001.arrow"
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    with pytest.raises(StoreDamaged, match=rf"part-000001\.arrow: has {len(content) - 7:,} bytes, not {len(content):,}"):
        files.check()
    path.unlink()
    with pytest.raises(StoreDamaged, match="part-000001.arrow: is missing"):
        files.check()
    with pytest.raises(StoreDamaged, match=r"part-000001\.arrow: cannot be read"):
        StoreReader(files).read(chosen(rows(LENGTHS), [5]))


@pytest.mark.parametrize("column", ["tokens", "loss_mask"])
def test_a_row_of_other_ids_is_named(tmp_path: Path, column: str) -> None:
    reader, wanted = StoreReader(filled(tmp_path)), chosen(rows(LENGTHS), [3, 0])
    wanted[column] = wanted[column].copy()
    wanted[column][-1] ^= 1
    with pytest.raises(StoreDamaged, match="row 0 was scored with other token ids or another loss mask"):
        reader.read(wanted)


def test_a_part_of_other_rows_is_found(tmp_path: Path) -> None:
    files = filled(tmp_path)
    a, b = (replace(i, number=1 - i.number) for i in files.parts)
    names = [tmp_path / i.file for i in files.parts]
    contents = [n.read_bytes() for n in names]
    for name, content in zip(names, reversed(contents), strict=True):
        name.write_bytes(content)
    files.finish([b, a], {})
    with pytest.raises(StoreDamaged, match="row 1 is not where it should be"):
        StoreReader(StoreFiles(files.folder)).read(chosen(rows(LENGTHS), [1]))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (SPEC, lambda c: "{", "store.json: is not JSON"),
        (SPEC, lambda c: "[]", "store.json: is not a JSON object"),
        (SPEC, lambda c: json.dumps({**json.loads(c), "format": 99}), r"store.json: was written by a newer program \(format 99"),
        (MANIFEST, lambda c: json.dumps({**json.loads(c), "format": 99}), "manifest.json: was written by a newer program"),
        (SPEC, lambda c: "{}", "store.json: does not say what the store is of"),
        (MANIFEST, lambda c: "{}", "manifest.json: lists 0 parts where store.json has 2"),
        (MANIFEST, lambda c: json.dumps({"parts": [{"number": 0}]}), "does not say what a part is"),
    ],
)
def test_what_a_store_says_of_itself_is_checked(tmp_path: Path, name: str, change: Callable[[str], str], words: str) -> None:
    folder = filled(tmp_path).folder
    (tmp_path / name).write_text(change((tmp_path / name).read_text()))
    with pytest.raises(StoreDamaged, match=words):
        StoreFiles(folder).check()


def test_a_key_says_which_field_differs() -> None:
    other = KEY.model_copy(update={"teacher": {"engine": "fake", "vocabulary": 65}, "codec": {"type": "packed", "bits": 3}})
    assert KEY.differences(other) == [("teacher.vocabulary", 64, 65), ("codec.type", "exact", "packed"), ("codec.bits", None, 3)]
    assert KEY.digest != other.digest and KEY.differences(KEY) == []


# Filling


def test_only_whole_parts_count(tmp_path: Path) -> None:
    files = filled(tmp_path)
    info = files.parts[0]
    (tmp_path / MANIFEST).unlink()
    again = StoreFiles(files.folder)
    assert not again.finished and again.complete_parts() == []  # written, but nobody said that it is complete
    (tmp_path / "part-000000.json").write_text(json.dumps(vars(info)))
    assert again.complete_parts() == [info]
    (tmp_path / info.file).write_bytes(b"half")
    assert again.complete_parts() == []


def test_a_row_hash_sees_ids_mask_and_length() -> None:
    hashes = row_hashes(rows(LENGTHS))
    assert len(set(hashes.tolist())) == len(LENGTHS)
    assert np.array_equal(row_hashes(chosen(rows(LENGTHS), [3, 1])), hashes[[3, 1]])


# The lease


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "DEAD_SECONDS", 1.0)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.05)


def nobody(who: str) -> None:
    raise AssertionError(f"waited for {who}")


def test_one_holds_it_at_a_time(tmp_path: Path, quick: None) -> None:
    folder, inside, most, order = Folder(str(tmp_path)), [0], [0], []

    def work(name: int) -> None:
        with lease.held(folder, lambda who: None) as mine:
            assert mine
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.3)
            inside[0] -= 1
            order.append(name)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == [1] and sorted(order) == [0, 1, 2]
    assert folder.names() == []


def test_waiting_ends_when_what_was_waited_for_is_done(tmp_path: Path, quick: None) -> None:
    folder, waited = Folder(str(tmp_path)), []
    with lease.held(folder, nobody) as first:
        assert first
        done = threading.Timer(0.5, lambda: folder.write("done", b""))
        done.start()
        with lease.held(folder, waited.append, until=lambda: folder.exists("done")) as second:
            assert not second
    assert len(waited) == 1 and str(os.getpid()) in waited[0]


def _hold_for_ever(root: str) -> None:
    with lease.held(Folder(root), nobody):
        time.sleep(1000)


def test_a_killed_holder_does_not_hold(tmp_path: Path, quick: None) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_hold_for_ever, args=(str(tmp_path),))
    process.start()
    while not (tmp_path / lease.LEASE).exists():
        time.sleep(0.05)
    process.kill()
    process.join()
    with lease.held(Folder(str(tmp_path)), nobody) as mine:
        assert mine


def test_a_holder_elsewhere_that_has_fallen_silent_does_not_hold(tmp_path: Path, quick: None) -> None:
    folder = Folder(str(tmp_path))
    folder.write(lease.LEASE, json.dumps({"holder": "elsewhere/1/x", "count": 3}).encode())
    began = time.monotonic()
    with lease.held(folder, nobody) as mine:
        assert mine and time.monotonic() - began >= 1.0
