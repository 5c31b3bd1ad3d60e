"""The quickstart's material for recipes across tokenizers."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from jobs import quickstart


def test_a_student_of_bytes_reads_any_text_a_byte_at_a_time() -> None:
    tokenizer, text = quickstart.byte_tokenizer(), "naïve 中文 \U0001f600\n\t x"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.eos_token_id == 256 and len(tokenizer) == 257


def test_a_folder_of_before_gets_the_student_of_bytes_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "shapes" / "student").mkdir(parents=True)
    quickstart.prepare(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shapes"]
    home = tmp_path / "shapes" / "bytes"
    assert AutoConfig.from_pretrained(home).vocab_size == len(AutoTokenizer.from_pretrained(home)) == 257
