"""Models measured by what they write: accuracies counted by hand, and divergences on own text against a float64 reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.config import VerifierEndpoint
from cluster.engines.transformers_write import write
from orchestrator.errors import Refusal
from orchestrator.written import Bundle, Writing, WrittenScores, evaluate_written, judge_of, judged, scored, written
from strategies.core import Columns, Sampling
from tests.tiny import tiny_model, tiny_tokenizer

END = 0
NUMERIC = VerifierEndpoint(engine="verifier", kind="numeric")
NOWHERE = VerifierEndpoint(engine="verifier", kind="callable", function="nowhere.at_all:judge")
PROMPTS = ["one and two: ", "two and two: ", "what is love? ", "nine: "]
ANSWERS = ["#### 3", "#### 4", "none", "#### 9"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer in `student` and `teacher`, whose models are random and far from uniform; `padded` embeds a few more ids."""
    folder = tmp_path_factory.mktemp("written")
    for seed, (name, width, vocabulary) in enumerate((("student", 32, 512), ("teacher", 48, 530))):
        tiny_tokenizer(folder / name)
        model = tiny_model(folder / name, width=width, vocab_size=vocabulary, max_length_tokens=64, seed=seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 6.0 if parameter.ndim == 2 else 1.0
        model.save_pretrained(folder / name)
    return folder


def questions(home: Path) -> Bundle:
    """The prompts with their answers."""
    tokenizer = tiny_tokenizer(home / "student")
    pairs = [(tokenizer(p)["input_ids"], [*tokenizer(a)["input_ids"], END]) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    return Bundle(
        {
            "tokens": np.concatenate([np.asarray(p + a, np.int32) for p, a in pairs]),
            "loss_mask": np.concatenate([np.asarray([0] * len(p) + [1] * len(a), np.uint8) for p, a in pairs]),
            "lengths": np.asarray([len(p) + len(a) for p, a in pairs], np.int32),
            "row_id": np.arange(len(pairs)),
        }
    )


def reciting(home: Path, texts: dict[str, list[str]]) -> Callable[[Columns, Sampling], Columns]:
    """`write` of an author who answers each prompt with the given texts; one that does not end with a full stop is cut."""
    tokenizer = tiny_tokenizer(home / "student")

    def write(columns: Columns, sampling: Sampling) -> Columns:
        starts = np.cumsum([0, *columns["lengths"]])
        prompts = [tokenizer.decode(columns["tokens"][a:b].tolist()) for a, b in itertools.pairwise(starts)]
        said = [text for prompt in prompts for text in texts[prompt][: sampling.samples]]
        ids = [tokenizer(text)["input_ids"] + ([END] if text.endswith(".") else []) for text in said]
        return {
            "tokens": np.concatenate([np.asarray(i, np.int32) for i in ids]),
            "lengths": np.asarray([len(i) for i in ids], np.int32),
            "row_id": np.repeat(columns["row_id"], sampling.samples),
            "sample": np.tile(np.arange(sampling.samples, dtype=np.int32), len(prompts)),
            "finished": np.asarray([text.endswith(".") for text in said], np.uint8),
            "logprobs": np.zeros(sum(len(i) for i in ids), np.float32),
        }

    return write


class Author:
    """An endpoint that writes by a function."""

    def __init__(self, write: Callable[[Columns, Sampling], Columns]):
        self.write = write


def recited(home: Path, texts: list[list[str]], samples: int, rows_at_once: int = 3) -> WrittenScores:
    author = Author(reciting(home, dict(zip(PROMPTS, texts, strict=True))))
    columns = written(author, questions(home), np.arange(len(PROMPTS)), Sampling(samples, 1.0), 64, rows_at_once)
    return scored("m", judged(columns, judge_of(NUMERIC, str(home / "student"))), True)


def test_accuracy_is_a_mean_over_prompts_with_a_verdict(home: Path) -> None:
    texts = [["1+2=3 #### 3.", "#### 4."], ["#### 4.", "#### 4."], ["#### 1.", "#### 2."], ["#### 8.", "#### 99"]]
    one, two = recited(home, texts, samples=1), recited(home, texts, samples=2)
    assert (one.prompts, one.texts, one.unjudgeable, one.failed) == (4, 4, 1, 0)
    assert one.accuracy == one.pass_at_k == pytest.approx(2 / 3)
    assert one.accuracy_error == pytest.approx(math.sqrt(2 / 3 * 1 / 3 * 3 / 2 / 3))
    assert (two.prompts, two.texts, two.unjudgeable) == (4, 8, 2)
    assert two.accuracy == pytest.approx((0.5 + 1 + 0) / 3)
    assert two.pass_at_k == pytest.approx(2 / 3)
    assert two.accuracy_error == pytest.approx(math.sqrt(0.25 / 3))
    assert two.finished == pytest.approx(7 / 8)


def test_lengths_are_those_of_the_texts_and_their_end(home: Path) -> None:
    texts = [["#### 3."], ["#### 4"], ["no."], ["#### 8."]]
    tokenizer = tiny_tokenizer(home / "student")
    sizes = [len(tokenizer(own[0])["input_ids"]) + own[0].endswith(".") for own in texts]
    assert recited(home, texts, 1).tokens == pytest.approx(sum(sizes) / 4)


def test_rows_are_read_in_parts_that_change_nothing(home: Path) -> None:
    texts = [["#### 3."], ["#### 5."], ["#### 1."], ["#### 9."]]
    assert recited(home, texts, 1, rows_at_once=1) == recited(home, texts, 1, rows_at_once=100)


def test_prompts_without_room_are_left_out_and_counted(home: Path) -> None:
    author = Author(reciting(home, dict(zip(PROMPTS, [["a."]] * 4, strict=True))))
    tokenizer = tiny_tokenizer(home / "student")
    lengths = [len(tokenizer(p)["input_ids"]) for p in PROMPTS]
    columns = written(author, questions(home), np.arange(4), Sampling(), max(lengths), 2)
    found = scored("m", columns, False)
    assert found.left_out == lengths.count(max(lengths))
    assert found.prompts == 4 - found.left_out
    assert (found.accuracy, found.accuracy_error, found.pass_at_k) == (None, None, None)
    with pytest.raises(Refusal, match="no prompt that leaves room"):
        scored("m", written(author, questions(home), np.arange(4), Sampling(), 1, 2), False)


def keeping(seen: list[Columns], columns: Columns) -> Columns:
    seen.append(columns)
    return columns


def whole_log_probs(model: Path, columns: Columns) -> torch.Tensor:
    """`(N, V)` float64 log-probabilities over the shared ids at every written token, one row at a time."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    found, start = [], 0
    for size in columns["lengths"].tolist():
        ids = torch.from_numpy(columns["tokens"][start : start + size].astype(np.int64))
        at = torch.from_numpy(np.flatnonzero(columns["loss_mask"][start : start + size]))
        with torch.no_grad():
            found.append(network(input_ids=ids[None]).logits[0, at - 1, :512].log_softmax(-1))
        start += size
    return torch.cat(found)


def test_divergences_on_own_text_are_those_of_a_naive_float64_reference(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Columns] = []
    asked: list[float] = []

    def writes(model: object, columns: Columns, sampling: Sampling, *others: Any) -> Columns:
        assert END in sampling.stop
        asked.append(sampling.temperature)
        return write(model, columns, sampling, *others)

    monkeypatch.setattr("orchestrator.written.write", writes)
    monkeypatch.setattr("orchestrator.written.Bundle", lambda columns: Bundle(keeping(drawn, columns)))
    writing = Writing(judge=NUMERIC, max_new_tokens=12)
    student, teacher = evaluate_written([str(home / "student")], str(home / "teacher"), questions(home), np.arange(4), writing)
    (own,) = drawn
    assert asked == [0.0, 1.0, 0.0]  # the student's answers, its own text, the teacher's answers
    log_q, log_p = whole_log_probs(home / "student", own), whole_log_probs(home / "teacher", own)
    assert student.own_tokens == len(log_q) > 4
    assert student.own_forward_kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)
    assert student.own_reverse_kl == pytest.approx(float((log_q.exp() * (log_q - log_p)).sum(-1).mean()), rel=1e-4)
    assert student.own_agreement == pytest.approx(float((log_q.argmax(-1) == log_p.argmax(-1)).double().mean()))
    assert (student.model, teacher.model) == (str(home / "student"), str(home / "teacher"))
    assert (teacher.own_forward_kl, teacher.own_tokens) == (None, 0)
    assert student.accuracy is not None
    assert teacher.accuracy is not None


def test_a_greedy_answer_is_what_the_network_prefers_at_each_step(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Columns] = []
    monkeypatch.setattr("orchestrator.written.judged", lambda columns, _: keeping(seen, columns))
    evaluate_written([str(home / "student")], None, questions(home), np.asarray([1, 3]), Writing(max_new_tokens=8))
    (columns,) = seen
    network = AutoModelForCausalLM.from_pretrained(home / "student", dtype=torch.float64)
    start = 0
    for size in columns["lengths"].tolist():
        ids = torch.from_numpy(columns["tokens"][start : start + size].astype(np.int64))
        at = np.flatnonzero(columns["loss_mask"][start : start + size])
        assert ids[at].tolist() == network(input_ids=ids[None]).logits[0, at - 1, :512].argmax(-1).tolist()
        start += size


@pytest.mark.parametrize(
    ("writing", "words"),
    [
        (Writing(samples=4), "a temperature above 0"),
        (Writing(max_new_tokens=64), "64 positions of the models"),
        (Writing(NOWHERE, max_new_tokens=8), "verifier 'callable'"),
    ],
)
def test_what_cannot_be_written_or_judged_is_refused_before_a_model_loads(
    home: Path, writing: Writing, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.written.load_network", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(Refusal, match=words):
        evaluate_written([str(home / "student")], None, questions(home), np.arange(4), writing)


def test_an_adapter_writes_as_its_base_with_it_merged(home: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(home / "student")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tiny_tokenizer(tmp_path / "merged")
    names = [str(tmp_path / "adapter"), str(tmp_path / "merged")]
    of_adapter, of_merged, _ = evaluate_written(names, str(home / "teacher"), questions(home), np.arange(4), Writing(max_new_tokens=6))
    assert of_adapter.own_reverse_kl == pytest.approx(of_merged.own_reverse_kl, rel=1e-3)
