"""Preparing data end to end: splits, quarantine, refusals, and the cache under kills and races."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from orchestrator import data
from orchestrator.data import PreparedData, prepare, template_digest, tokenizer_digest
from orchestrator.errors import Refusal
from orchestrator.rows import Rows, Split
from orchestrator.settings import DataConfig
from strategies.domains import domain_id
from tests.tiny import CHATML_MARKED, source_text, tiny_tokenizer

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo there"}]


@pytest.fixture(scope="module")
def saved_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return folder


@pytest.fixture
def tokenizer(saved_tokenizer: Path) -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(saved_tokenizer)
    return loaded


def jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(train: Path, **more: object) -> DataConfig:
    return DataConfig.model_validate({"train": str(train), "held_out_rows": 2, **more})


def words(count: int) -> list[dict[str, str]]:
    return [{"text": f"row number {i}"} for i in range(count)]


def decoded(prepared: PreparedData, split: Split, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    rows = Rows(prepared.folder, split)
    return [str(tokenizer.decode(rows.read(np.asarray([i]))["tokens"], skip_special_tokens=True)) for i in range(len(rows))]


def refusal(config: DataConfig, tokenizer: PreTrainedTokenizerFast, cache: Path) -> str:
    with pytest.raises(Refusal) as caught:
        prepare(config, tokenizer, 0, cache)
    assert not [path for path in cache.glob("*") if not path.name.startswith("quarantine")]
    return str(caught.value)


def test_every_row_is_in_one_split_and_in_source_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    prepared = prepare(settings(jsonl(tmp_path / "a.jsonl", words(20))), tokenizer, 0, tmp_path / "cache")
    train, held_out = (decoded(prepared, split, tokenizer) for split in ("train", "held_out"))
    assert len(train) == 18 and len(held_out) == 2
    everything = [row["text"] for row in words(20)]
    assert sorted([*train, *held_out]) == sorted(everything)
    assert train == [text for text in everything if text in train]
    assert [everything[i] for i in Rows(prepared.folder, "train").source_row] == train
    assert prepared.held_out_by == "documents" and prepared.dropped_rows == 0


def test_sizes_are_those_of_the_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    prepared = prepare(settings(jsonl(tmp_path / "a.jsonl", words(20))), tokenizer, 0, tmp_path / "cache")
    for split, info in (("train", prepared.train), ("held_out", prepared.held_out)):
        rows = Rows(prepared.folder, split)  # type: ignore[arg-type]
        columns = rows.read(np.arange(len(rows)))
        assert (info.rows, info.tokens, info.longest_tokens) == (len(rows), len(columns["tokens"]), rows.lengths.max())
        assert info.loss_tokens == columns["loss_mask"].sum() == info.tokens - info.rows


def test_no_document_stands_on_both_sides(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    text = source_text()
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(text[i * 1000 : (i + 1) * 1000])
    prepared = prepare(settings(tmp_path, max_length_tokens=16, held_out_rows=50), tokenizer, 3, tmp_path / "cache")
    assert prepared.held_out.rows == 50 and prepared.held_out_by == "documents"
    sides = [set(Rows(prepared.folder, split).source_row.tolist()) for split in ("train", "held_out")]  # type: ignore[arg-type]
    assert not sides[0] & sides[1]
    assert prepared.dropped_rows == 0 or len(sides[0] | sides[1]) == 12


def test_one_big_document_is_split_first(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text(text := source_text()[:5000])
    prepared = prepare(settings(tmp_path / "a.txt", max_length_tokens=32), tokenizer, 0, tmp_path / "cache")
    assert prepared.held_out_by == "chunks" and prepared.held_out.rows == 2 and prepared.train.longest_tokens == 32
    chunks = len(tokenizer(text)["input_ids"]) + 1
    assert prepared.train.rows + 2 == -(-chunks // 32) - (chunks % 32 == 1)


def test_a_held_out_source_gives_rows_by_seed_and_train_keeps_its_own(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train, other = jsonl(tmp_path / "a.jsonl", words(5)), jsonl(tmp_path / "b.jsonl", [{"text": f"other {i}"} for i in range(9)])
    made = [prepare(settings(train, held_out=str(other)), tokenizer, seed, tmp_path / "cache") for seed in range(3)]
    assert all(decoded(p, "train", tokenizer) == [row["text"] for row in words(5)] for p in made)
    chosen = [decoded(p, "held_out", tokenizer) for p in made]
    assert all(len(rows) == 2 and rows == sorted(rows) and rows[0].startswith("other") for rows in chosen)
    assert len({tuple(rows) for rows in chosen}) > 1
    assert made[0].held_out_by == "source" and made[0].dropped_rows == 7 and made[0].records == 14


def test_only_the_first_rows_are_used_when_asked(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    prepared = prepare(settings(jsonl(tmp_path / "a.jsonl", words(50)), max_rows=7), tokenizer, 0, tmp_path / "cache")
    assert prepared.records == 7 and prepared.train.rows == 5


def test_bad_records_are_counted_and_listed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*words(9), {"text": ""}, {"text": 5}, {"messages": [{"role": "elf", "content": "hi"}]}])
    path.write_text("oops\n" + path.read_text())
    prepared = prepare(settings(path, max_bad_share=0.5), tokenizer, 0, tmp_path / "cache")
    assert prepared.quarantined == {"not valid JSON": 1, "text is empty": 1, "text is not a string": 1, "unknown role": 1}
    assert prepared.records == 13 and prepared.train.rows + prepared.held_out.rows == 9
    listed = [json.loads(line) for line in Path(prepared.quarantine_file).read_text().splitlines()]
    assert [(entry["row"], entry["reason"]) for entry in listed] == [
        (1, "not valid JSON"),
        (11, "text is empty"),
        (12, "text is not a string (but of type int)"),
        (13, "unknown role ('elf')"),
    ]
    assert listed[0] == {"source": str(path), "row": 1, "reason": "not valid JSON", "excerpt": "oops"}
    assert listed[3]["excerpt"].startswith("messages: [{'role': 'elf'")


def test_source_rows_count_bad_records_too(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": ""}, *words(4)])
    prepared = prepare(settings(path, max_bad_share=0.5), tokenizer, 0, tmp_path / "cache")
    rows = [Rows(prepared.folder, split).source_row.tolist() for split in ("train", "held_out")]  # type: ignore[arg-type]
    assert sorted(rows[0] + rows[1]) == [1, 2, 3, 4]


@pytest.mark.parametrize(("overlong", "rows"), [("split", 20), ("truncate", 20), ("quarantine", 19)])
def test_overlong_text_goes_the_way_that_is_set(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, overlong: str, rows: int) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*words(19), {"text": "x " * 20}])
    prepared = prepare(settings(path, overlong=overlong, max_length_tokens=24), tokenizer, 0, tmp_path / "cache")
    total = prepared.train.rows + prepared.held_out.rows + prepared.dropped_rows
    assert total == rows + (overlong == "split")
    assert prepared.quarantined == ({"longer than max_length_tokens": 1} if overlong == "quarantine" else {})


def test_an_overlong_conversation_is_never_split(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    long = [CHAT[0], {"role": "assistant", "content": "yo " * 99}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}] * 19 + [{"messages": long}])
    prepared = prepare(settings(path, max_length_tokens=64), tokenizer, 0, tmp_path / "cache")
    assert prepared.quarantined == {"longer than max_length_tokens": 1}


def test_the_first_row_is_there_to_look_at(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first = prepare(settings(jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}] * 4)), tokenizer, 0, tmp_path / "cache").first_row
    assert first.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo there<|im_end|>\n"
    assert tokenizer.decode([t for t, m in zip(first.tokens, first.loss_mask, strict=True) if m]) == "yo there<|im_end|>"


def test_the_same_data_is_prepared_once(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(jsonl(tmp_path / "a.jsonl", words(9)))
    first = prepare(config, tokenizer, 0, tmp_path / "cache")
    monkeypatch.setattr(data, "_make", None)
    assert prepare(config, tokenizer, 0, tmp_path / "cache") == first


def test_whatever_changes_the_rows_changes_the_fingerprint(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = jsonl(tmp_path / "a.jsonl", words(9))
    cache = tmp_path / "cache"

    def fingerprint(config: DataConfig, seed: int = 0) -> str:
        return prepare(config, tokenizer, seed, cache).fingerprint

    seen = [fingerprint(settings(path)), fingerprint(settings(path), 1), fingerprint(settings(path, max_length_tokens=99))]
    os.utime(path, (0, 0))
    assert fingerprint(settings(path)) == seen[0]
    path.write_text(path.read_text().replace("row number 3", "row number 4"))
    seen.append(fingerprint(settings(path)))
    tokenizer.chat_template = CHATML_MARKED
    seen.append(fingerprint(settings(path)))
    tokenizer.eos_token = "<|im_end|>"
    seen.append(fingerprint(settings(path)))
    assert len(set(seen)) == 6


def test_a_tokenizers_digest_outlives_saving_and_use(saved_tokenizer: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    digest, template = tokenizer_digest(tokenizer), template_digest(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer_digest(tokenizer), tokenizer_digest(again), template_digest(again)) == (digest, digest, template)
    other = tiny_tokenizer(tmp_path / "other", vocab_size=400, template="marked")
    assert tokenizer_digest(other) != digest and template_digest(other) != template


def test_the_cache_may_be_moved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = settings(jsonl(tmp_path / "a.jsonl", words(9)))
    prepare(config, tokenizer, 0, tmp_path / "cache")
    (tmp_path / "cache").rename(tmp_path / "moved")
    prepared = prepare(config, tokenizer, 0, tmp_path / "moved")
    assert prepared.folder.startswith(str(tmp_path / "moved")) and Path(prepared.quarantine_file).is_file()


def test_a_relative_cache_is_found_from_any_folder(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = prepare(settings(jsonl(tmp_path / "a.jsonl", words(9))), tokenizer, 0, Path("cache"))
    monkeypatch.chdir("/")
    assert len(Rows(prepared.folder, "train")) == 7


@pytest.mark.parametrize("damage", ["manifest.json", "train/tokens.npy", "held_out/offsets.npy"])
def test_a_damaged_result_is_made_again(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, damage: str) -> None:
    config = settings(jsonl(tmp_path / "a.jsonl", words(9)))
    first = prepare(config, tokenizer, 0, tmp_path / "cache")
    path = Path(first.folder) / damage
    path.write_bytes(path.read_bytes()[:-3])
    assert prepare(config, tokenizer, 0, tmp_path / "cache") == first
    assert len(Rows(first.folder, "train")) == 7


def test_a_killed_preparation_leaves_nothing_half_made(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, cache = settings(jsonl(tmp_path / "a.jsonl", words(9))), tmp_path / "cache"
    killed = multiprocessing.get_context("fork").Process(target=_killed_half_way, args=(config, tokenizer, cache))
    killed.start()
    killed.join()
    assert killed.exitcode == 9 and [path.name.startswith(".preparing-") for path in cache.iterdir()] == [True]
    prepared = prepare(config, tokenizer, 0, cache)
    assert prepared.train.rows == 7 and [str(path) for path in cache.iterdir()] == [prepared.folder]


def _killed_half_way(config: DataConfig, tokenizer: PreTrainedTokenizerFast, cache: Path) -> None:
    data._split = lambda *_: os._exit(9)  # type: ignore[assignment]
    prepare(config, tokenizer, 0, cache)


def test_a_loser_of_the_race_takes_the_winners_result(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, cache, make = settings(jsonl(tmp_path / "a.jsonl", words(9))), tmp_path / "cache", data._make
    winners: list[tuple[PreparedData, int]] = []

    def slow(*args: Any) -> PreparedData:
        made = make(*args)
        monkeypatch.setattr(data, "_make", make)
        winner = prepare(config, tokenizer, 0, cache)
        winners.append((winner, Path(winner.folder).stat().st_ino))
        return made

    monkeypatch.setattr(data, "_make", slow)
    loser = prepare(config, tokenizer, 0, cache)
    assert [(loser, Path(loser.folder).stat().st_ino)] == winners
    assert [str(path) for path in cache.iterdir()] == [loser.folder]


def test_too_many_bad_records_are_refused_and_stay_listed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*words(8), {"text": ""}, {"text": ""}])
    said = refusal(settings(path), tokenizer, tmp_path / "cache")
    assert "got 2 bad records of 10 (text is empty: 2)" in said and "at most 0.1 (data.max_bad_share)" in said
    (listed,) = (tmp_path / "cache").glob("quarantine-*.jsonl")
    assert str(listed) in said and len(listed.read_text().splitlines()) == 2


def test_nothing_left_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": ""}])
    assert "at least one row to learn from" in refusal(settings(path, max_bad_share=1.0), tokenizer, tmp_path / "cache")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "got no records" in refusal(settings(tmp_path / "empty.jsonl"), tokenizer, tmp_path / "cache")


def test_a_run_without_held_out_rows_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = jsonl(tmp_path / "a.jsonl", words(5))
    assert "data.held_out_rows: got 0" in refusal(settings(path, held_out_rows=0), tokenizer, tmp_path / "cache")
    said = refusal(settings(path, held_out_rows=5), tokenizer, tmp_path / "cache")
    assert "got 5 rows to train on and to hold out from; expected more than data.held_out_rows = 5" in said


def test_evaluating_on_the_train_data_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = jsonl(tmp_path / "a.jsonl", words(5))
    said = refusal(settings(path, held_out=str(tmp_path / "*.jsonl")), tokenizer, tmp_path / "cache")
    assert said.startswith("data.held_out: got 'a.jsonl', which data.train reads too")


def marked_words(count: int) -> list[dict[str, object]]:
    return [{"text": f"row number {i}", "topic": ("code", "prose")[i % 2], "hard": i / 2} for i in range(count)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_have_the_domain_and_the_score_of_their_record(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        jsonl(path, marked_words(20))
    else:
        pq.write_table(pa.Table.from_pylist(marked_words(20)), path)
    prepared = prepare(settings(path, domain="topic", score="hard"), tokenizer, 0, tmp_path / "cache")
    for split, info in (("train", prepared.train), ("held_out", prepared.held_out)):
        rows = Rows(prepared.folder, split)  # type: ignore[arg-type]
        number = rows.source_row
        names = [("code", "prose")[i % 2] for i in number.tolist()]
        assert rows.read(np.arange(len(rows)))["domain"].tolist() == [domain_id(name) for name in names]
        assert rows.marks["score"].tolist() == (number / 2).tolist()
        assert info.domains == {name: names.count(name) for name in sorted(set(names))}


def test_pieces_of_a_document_have_its_domain(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": source_text(), "kind": 3}, {"text": "short words", "kind": "x"}]
    prepared = prepare(settings(jsonl(tmp_path / "a.jsonl", rows), domain="kind", max_length_tokens=32), tokenizer, 0, tmp_path / "cache")
    assert prepared.train.domains["3"] > 10 and set(prepared.train.domains) | set(prepared.held_out.domains) == {"3", "x"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [({"topic": ""}, "no domain"), ({"topic": None}, "no domain"), ({"topic": 1.5}, "no domain"), ({"hard": "much"}, "no score")],
)
def test_rows_that_do_not_tell_are_quarantined(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, record: dict[str, object], reason: str
) -> None:
    rows = marked_words(20)
    rows[3] |= record
    prepared = prepare(settings(jsonl(tmp_path / "a.jsonl", rows), domain="topic", score="hard"), tokenizer, 0, tmp_path / "cache")
    assert prepared.quarantined == {reason: 1}
    assert prepared.train.rows + prepared.held_out.rows == 19
    assert reason in Path(prepared.quarantine_file).read_text()


@pytest.mark.parametrize(("key", "name"), [("domain", "topics"), ("score", "hards")])
def test_a_column_that_is_not_there_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, key: str, name: str) -> None:
    said = refusal(settings(jsonl(tmp_path / "a.jsonl", marked_words(9)), **{key: name}), tokenizer, tmp_path / "cache")
    assert f"data.{key}: got the column {name!r}" in said and f"Did you mean {name[:-1]!r}?" in said


def test_a_renamed_column_is_a_domain_by_its_new_name(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = settings(jsonl(tmp_path / "a.jsonl", marked_words(9)), columns={"topic": "answer"}, domain="answer")
    assert set(prepare(config, tokenizer, 0, tmp_path / "cache").train.domains) == {"code", "prose"}


def test_sources_by_name_are_the_domains_of_their_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    one = jsonl(tmp_path / "a.jsonl", words(9))
    other = jsonl(tmp_path / "b.jsonl", [{"prompt": f"{i} and", "completion": " so on"} for i in range(5)])
    given = {"train": {"text": str(one), "pairs": str(other)}, "held_out_rows": 2}
    prepared = prepare(DataConfig.model_validate(given | {"max_rows": 4}), tokenizer, 0, tmp_path / "cache")
    found = Counter(prepared.train.domains) + Counter(prepared.held_out.domains)
    assert found == {"text": 4, "pairs": 4} and prepared.domains == ("pairs", "text")
    own = {"held_out": {"text": str(jsonl(tmp_path / "c.jsonl", words(3))), "pairs": str(jsonl(tmp_path / "d.jsonl", words(3)))}}
    prepared = prepare(DataConfig.model_validate(given | own | {"held_out_rows": 6}), tokenizer, 0, tmp_path / "cache")
    assert prepared.held_out.domains == {"pairs": 3, "text": 3} and prepared.train.domains == {"pairs": 5, "text": 9}
    renamed = prepare(DataConfig.model_validate(given | {"train": {"x": str(one), "y": str(other)}}), tokenizer, 0, tmp_path / "cache")
    assert renamed.domains == ("x", "y"), "other names are other data"


@pytest.mark.parametrize(
    ("more", "said"),
    [({"domain": "kind"}, "a source for each domain"), ({"held_out": "x.jsonl"}, "sources by domain"), ({"train": {}}, "")],
)
def test_domains_are_told_once(more: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DataConfig.model_validate({"train": {"a": "a.jsonl"}} | more)


def test_a_source_of_a_domain_is_refused_by_its_key(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig.model_validate({"train": {"a": str(jsonl(tmp_path / "a.jsonl", words(5))), "b": str(tmp_path / "b.jsonl")}})
    assert "data.train.b: got" in refusal(config, tokenizer, tmp_path / "cache")
