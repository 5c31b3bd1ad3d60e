"""Records to tokens and masks, against the tokenizer asked directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from orchestrator import encode
from orchestrator.encode import Encoder
from orchestrator.errors import Refusal
from orchestrator.pieces import Bad, Encoded, fit
from tests.tiny import source_text, tiny_tokenizer

EOS, END = 0, 2
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo there"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "no"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder(tokenizer, "data.train")


def with_bos(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer that puts `<|im_start|>` before and `<|im_end|>` behind every text."""
    tokenizer = tiny_tokenizer(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    return tokenizer


def row(encoder: Encoder, **record: object) -> Encoded:
    (result,) = encoder.encode([record])
    assert isinstance(result, Encoded), result
    assert result.tokens.dtype == np.int32 and result.loss_mask.dtype == np.uint8
    assert len(result.tokens) == len(result.loss_mask)
    return result


def reason(encoder: Encoder, **record: object) -> str:
    (result,) = encoder.encode([record])
    assert isinstance(result, Bad)
    return result.reason


def counted(tokenizer: PreTrainedTokenizerFast, result: Encoded) -> str:
    return str(tokenizer.decode(result.tokens[result.loss_mask == 1]))


def test_text_counts_every_token_but_the_first_and_ends_with_eos(tokenizer: PreTrainedTokenizerFast, encoder: Encoder) -> None:
    result = row(encoder, text="def f(x): return x")
    assert result.tokens.tolist() == [*tokenizer("def f(x): return x")["input_ids"], EOS]
    assert result.loss_mask.tolist() == [0] + [1] * (len(result.tokens) - 1)


def test_a_text_that_ends_with_eos_gets_no_second_one(encoder: Encoder) -> None:
    assert row(encoder, text="end<|endoftext|>").tokens.tolist().count(EOS) == 1


def test_bos_stands_where_the_tokenizer_puts_it_and_the_end_is_ours(tmp_path: Path) -> None:
    encoder = Encoder(with_bos(tmp_path), "data.train")
    text, pair = row(encoder, text="abc"), row(encoder, prompt="abc", completion="def")
    assert text.tokens[0] == pair.tokens[0] == 1
    assert text.tokens[-1] == pair.tokens[-1] == EOS
    assert END not in [*text.tokens, *pair.tokens] and 1 not in [*text.tokens[1:], *pair.tokens[1:]]


def test_a_completion_and_its_eos_count_and_the_prompt_does_not(tokenizer: PreTrainedTokenizerFast, encoder: Encoder) -> None:
    result = row(encoder, prompt="The answer is", completion=" 42")
    assert counted(tokenizer, result) == " 42<|endoftext|>"


@given(st.text("ab \n=", min_size=1, max_size=9).filter(str.strip), st.text("ab \n=", min_size=1, max_size=9).filter(str.strip))
def test_ids_of_a_prompt_never_depend_on_the_completion(
    tokenizer: PreTrainedTokenizerFast, encoder: Encoder, prompt: str, completion: str
) -> None:
    ids = tokenizer(prompt)["input_ids"]
    result = row(encoder, prompt=prompt, completion=completion)
    assert result.tokens[: len(ids)].tolist() == ids
    assert tokenizer.decode(result.tokens) == prompt + completion + "<|endoftext|>"


def test_strings_are_plain_text_even_with_a_chat_template(tokenizer: PreTrainedTokenizerFast, encoder: Encoder) -> None:
    assert tokenizer.decode(row(encoder, prompt="hi", completion=" yo").tokens) == "hi yo<|endoftext|>"


def test_lists_of_messages_go_through_the_template(tokenizer: PreTrainedTokenizerFast, encoder: Encoder) -> None:
    result = row(encoder, prompt=TURNS[:2], completion=TURNS[2:3])
    prompt = tokenizer.apply_chat_template(TURNS[:2], add_generation_prompt=True)["input_ids"]
    assert result.tokens[: len(prompt)].tolist() == prompt
    assert counted(tokenizer, result) == "yo there<|im_end|>"


@pytest.mark.parametrize("turns", [TURNS, TURNS[:3], TURNS[1:4]])
def test_marks_and_prefixes_find_the_same_assistant_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, encoder: Encoder, turns: list[dict[str, str]]
) -> None:
    by_prefix = row(encoder, messages=turns)
    by_marks = row(Encoder(tiny_tokenizer(tmp_path, template="marked"), "data.train"), messages=turns)
    assert by_prefix.tokens.tolist() == by_marks.tokens.tolist() == tokenizer.apply_chat_template(turns)["input_ids"]
    assert by_prefix.loss_mask.tolist() == by_marks.loss_mask.tolist()
    said = [turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant"]
    assert counted(tokenizer, by_prefix) == "".join(said)


def test_a_template_that_rewrites_earlier_turns_is_noticed(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}"
    assert reason(Encoder(tokenizer, "data.train"), messages=TURNS) == "the chat template renders a message differently once others follow"


def test_tokens_that_merge_over_a_turns_end_are_noticed(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    turns = [{"role": "user", "content": "sel"}, {"role": "assistant", "content": "f"}]
    assert reason(Encoder(tokenizer, "data.train"), messages=turns) == "the tokens of a message change with what follows it"


@pytest.mark.parametrize("template", ["plain", "marked"])
def test_one_conversation_that_the_template_refuses_costs_only_itself(tmp_path: Path, template: Any) -> None:
    tokenizer = tiny_tokenizer(tmp_path, template=template)
    refusing = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('never') }}{% endif %}"
    tokenizer.chat_template = refusing + str(tokenizer.chat_template)
    good, bad = TURNS[1:3], [{"role": "user", "content": "no"}, *TURNS[2:3]]
    results = Encoder(tokenizer, "data.train").encode([{"messages": turns} for turns in (good, bad, good)])
    assert [isinstance(result, Bad) for result in results] == [False, True, False]
    assert results[1] == Bad("the chat template refuses it", "never")


def test_token_ids_stay_token_ids(encoder: Encoder) -> None:
    assert row(encoder, tokens=[5, 0, 7]).tokens.tolist() == [5, 0, 7]
    assert row(encoder, tokens=[5, 0, 7]).loss_mask.tolist() == [0, 1, 1]
    assert row(encoder, tokens=[5, 0, 7], loss_mask=[1, 0, 1]).loss_mask.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": None}, "missing value"),
        ({"prompt": "a"}, "missing value"),
        ({"text": 3}, "text is not a string"),
        ({"text": " \n"}, "text is empty"),
        ({"text": "\ud800"}, "not valid Unicode"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": ["a"], "completion": "b"}, "prompt is not a string"),
        ({"messages": []}, "messages are not a list, or an empty one"),
        ({"messages": "hi"}, "messages are not a list, or an empty one"),
        ({"messages": [{"content": "hi"}]}, "a message without a role"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "a message without text"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "not valid Unicode"),
        ({"messages": TURNS[:2]}, "no assistant message"),
        ({"messages": TURNS[2:3]}, "no message before the assistant's first"),
        ({"tokens": []}, "tokens are not a list of integers, or an empty one"),
        ({"tokens": [1, 2.5]}, "tokens are not a list of integers, or an empty one"),
        ({"tokens": [1, 512]}, "token id outside the vocabulary"),
        ({"tokens": [-1]}, "token id outside the vocabulary"),
        ({"tokens": [1, 2], "loss_mask": [1]}, "loss_mask is not a list of 0 and 1 as long as tokens"),
    ],
)
def test_a_bad_record_is_a_reason_and_not_a_crash(encoder: Encoder, record: dict[str, object], expected: str) -> None:
    assert reason(encoder, **record) == expected


def test_records_of_several_kinds_may_be_mixed(encoder: Encoder) -> None:
    results = encoder.encode([{"text": "a"}, {"messages": TURNS}, {"text": None}, {"prompt": "a", "completion": "b", "text": None}])
    assert [isinstance(result, Encoded) for result in results] == [True, True, False, True]


def test_messages_without_a_template_are_refused(tmp_path: Path) -> None:
    encoder = Encoder(tiny_tokenizer(tmp_path, template="none"), "data.train")
    for record in ({"messages": TURNS}, {"prompt": TURNS[:2], "completion": TURNS[2:3]}):
        with pytest.raises(Refusal, match=r"data.train: got messages.* student.tokenizer"):
            encoder.encode([record])


def test_completions_without_an_eos_token_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.eos_token = None
    encoder = Encoder(tokenizer, "data.train")
    assert row(encoder, text="abc").tokens[-1] != EOS
    with pytest.raises(Refusal, match="without an EOS token"):
        encoder.encode([{"prompt": "a", "completion": "b"}])


def test_a_long_document_has_the_ids_it_would_have_in_one_piece(
    tokenizer: PreTrainedTokenizerFast, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(encode, "CALL_CHARACTERS", 300)
    text = source_text()[:20_000]
    assert row(encoder, text=text).tokens.tolist() == [*tokenizer(text)["input_ids"], EOS]


def test_a_tokenizer_that_cutting_would_change_gets_whole_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 50)
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.pre_tokenizer = type(tokenizer.backend_tokenizer.pre_tokenizer)(add_prefix_space=True)
    text = source_text()[:5_000]
    assert row(Encoder(tokenizer, "data.train"), text=text).tokens.tolist() == [*tokenizer(text)["input_ids"], EOS]


def test_splitting_makes_consecutive_chunks_and_drops_a_last_one_of_one_token() -> None:
    long = Encoded(np.arange(9, dtype=np.int32), np.asarray([0] + [1] * 8, np.uint8), splittable=True)
    pieces = fit(long, 4, "split")
    assert isinstance(pieces, list)
    assert [piece.tokens.tolist() for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [piece.loss_mask.tolist() for piece in pieces] == [[0, 1, 1, 1]] * 2
    assert [p.tokens.tolist() for p in fit(Encoded(long.tokens[:4], long.loss_mask[:4], True), 4, "split")] == [[0, 1, 2, 3]]


def test_only_text_is_split() -> None:
    long = Encoded(np.arange(9, dtype=np.int32), np.ones(9, np.uint8))
    assert fit(long, 4, "split") == fit(long, 4, "quarantine") == Bad("longer than max_length_tokens", "9 tokens")


def test_truncation_that_leaves_nothing_to_learn_is_bad() -> None:
    mask = np.asarray([0, 0, 0, 1], np.uint8)
    kept = fit(Encoded(np.arange(4, dtype=np.int32), mask), 3, "truncate")
    assert kept == Bad("no token to learn from within max_length_tokens")
    assert len(fit(Encoded(np.arange(4, dtype=np.int32), mask[::-1].copy() | 1), 3, "truncate")[0].tokens) == 3
