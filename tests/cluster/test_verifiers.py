"""Final answers: where they are found, when two are the same, and what nobody can say; and verifiers that misbehave."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cluster.config import EndpointConfig, VerifierEndpoint
from cluster.endpoints import make_engine
from cluster.engines import Columns
from cluster.engines.verifier import VerifierEngine
from cluster.verifiers import VerifierFailed
from cluster.verifiers.answers import final_answer, number, verdict
from cluster.verifiers.maths import math_verdict
from cluster.verifiers.process import JudgeProcess
from strategies.core import ScoreRequest
from tests.tiny import tiny_tokenizer

SECONDS = 60.0
"""Far more than any of this takes on a busy machine."""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 3 + 4 = 7.\n#### 7", "7"),
        ("#### 1\nNo: #### 2\n", "2"),
        ("#### 72 apples\nand more words", "72 apples"),
        ("so \\boxed{\\frac{1}{2}} holds", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("The answer is 12. Bye.", "12"),
        ("Answer: 3.5", "3.5"),
        ("<think>the answer is 4</think>\nI say #### 5", "5"),
        ("<think>#### 4</think> so", None),
        ("\\boxed{never closed", None),
        ("####", None),
        ("just words", None),
        ("", None),
    ],
)
def test_where_an_answer_is_found(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234,567.5", Fraction("1234567.5")),
        ("$ 3 / 4 each", Fraction(3, 4)),
        ("-7", Fraction(-7)),
        ("\u22127", Fraction(-7)),
        ("10 - 3", Fraction(3)),
        ("007", Fraction(7)),
        (".5", Fraction(1, 2)),
        ("2.50%", Fraction("2.5")),
        ("3/0", None),
        ("9" * 5000, None),
        ("none", None),
    ],
)
def test_what_number_a_text_ends_with(text: str, value: Fraction | None) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "reference", "right", "reason"),
    [
        ("numeric", "that makes 1,000.0 dollars", "#### 1000", True, ""),
        ("numeric", "#### 12", "5 + 6 = 11\n#### 11", False, "wrong answer"),
        ("numeric", "I do not know", "#### 11", False, "no answer"),
        ("numeric", "#### 11", "nobody knows", None, "the reference has no answer"),
        ("numeric", "#### many", "#### 11", False, "no answer"),
        ("numeric", "0.5", "1/2", True, ""),
        ("exact", "Thus\n#### The  Moon.", "#### the moon", True, ""),
        ("exact", "hm\nParis", "Paris", True, ""),
        ("exact", "Rome", "Paris", False, "wrong answer"),
        ("exact", "   ", "Paris", False, "no answer"),
        ("regex", "choice (B), no: choice (C)", "#### C", True, ""),
        ("regex", "B", "choice (B)", False, "no answer"),
    ],
)
def test_who_is_right(kind: str, text: str, reference: str, right: bool | None, reason: str) -> None:
    assert verdict(kind, text, reference, r"choice \((\w)\)") == (right, reason)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("1/2", "0.5", True),
        (r"So we have $\frac{1}{2}$.", "1/2", True),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        ("1+x", "x+1", True),
        ("hence the answer is $(x-1)(x+1)$.", "x^2-1", True),
        (r"\boxed{x+1}", "x+2", False),
        ("1", "1+x", False),
        ("2", "1/2", False),
        (r"\{2, 1\}", r"\{1,2\}", True),
        (r"\{1,3\}", r"\{1,2\}", False),
        ("#### (2,1)", "(1,2)", False),
        (r"#### (2,\infty)\cup(-\infty,1)", r"(-\infty,1)\cup(2,\infty)", True),
        ("sqrt(8)", r"2\sqrt{2}", True),
        ("50%", "0.5", True),
        ("#### 1,000", "1000", True),
        ("#### 12 dollars", "She has 3 times 4.\n#### 12", True),
        ("<think>#### 3</think>#### 4", "4", True),
        ("I do not know", "3", False),
        ("", "3", False),
        ("Paris", "Paris", None),
    ],
)
def test_formulas_and_numbers_are_equal_however_they_are_written(text: str, reference: str, right: bool | None) -> None:
    assert math_verdict(text, reference).right is right


CALLABLE = {"kind": "callable", "function": "tests.cluster.judges:same"}


@pytest.fixture(scope="module")
def same() -> Iterator[JudgeProcess]:
    process = JudgeProcess(CALLABLE, 3.0)
    yield process
    process.close()


@pytest.mark.parametrize(("text", "problem"), [("throw", r"threw RuntimeError \(no way\)"), ("exit", "SystemExit"), ("die", "died")])
def test_a_verifier_that_gives_way_costs_one_verdict(same: JudgeProcess, text: str, problem: str) -> None:
    with pytest.raises(VerifierFailed, match=problem):
        same.judge(text, "x")
    assert same.judge("x", "x").reward == 1.0 and same.judge("y", "x").reward == 0.0


def test_a_verifier_that_hangs_is_ended(same: JudgeProcess) -> None:
    hanging, began = same._child.pid, time.monotonic()
    with pytest.raises(VerifierFailed, match="hung"):
        same.judge("hang", "x")
    assert time.monotonic() - began < 30 and not Path(f"/proc/{hanging}").exists()
    assert same.judge("x", "x").reward == 1.0


def test_a_formula_without_end_is_given_up() -> None:
    process = JudgeProcess({"kind": "math"}, 6.0)
    with pytest.raises(VerifierFailed, match="hung"):
        process.judge("$1000000000!$", "3")
    assert process.judge("0.5", "1/2").reward == 1.0
    process.close()


def test_a_pattern_without_end_is_given_up() -> None:
    process = JudgeProcess({"kind": "regex", "pattern": "(a+)+b"}, 3.0)
    with pytest.raises(VerifierFailed, match="hung"):
        process.judge("a" * 100, "aab")
    assert process.judge("aab", "aab").reward == 1.0
    process.close()


def test_a_reward_is_a_number_from_0_to_1() -> None:
    half = JudgeProcess({"kind": "callable", "function": "tests.cluster.judges:half"}, SECONDS)
    assert [half.judge(text, "four").reward for text in ("1234", "123")] == [0.5, 0.0]
    half.close()
    lavish = JudgeProcess({"kind": "callable", "function": "tests.cluster.judges:lavish"}, SECONDS)
    for text in ("1.5", "-0.1", "nan"):
        with pytest.raises(VerifierFailed, match="expected 0 to 1"):
            lavish.judge(text, "x")
    lavish.close()
    words = JudgeProcess({"kind": "callable", "function": "tests.cluster.judges:words"}, SECONDS)
    with pytest.raises(VerifierFailed, match="ValueError"):
        words.judge("x", "x")
    words.close()


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("tests.cluster.judges:missing", "AttributeError"),
        ("tests.cluster.missing:same", "ModuleNotFoundError"),
        ("tests.cluster.judges:NOT_CALLABLE", "cannot be called"),
    ],
)
def test_a_function_that_is_not_there_is_told_at_once(function: str, problem: str) -> None:
    with pytest.raises(VerifierFailed, match=f"{function}.*{problem}"):
        JudgeProcess({"kind": "callable", "function": function}, SECONDS)


def test_no_process_outlives_its_owner() -> None:
    process = JudgeProcess(CALLABLE, SECONDS)
    child = process._child.pid
    del process
    assert not Path(f"/proc/{child}").exists()


ENDPOINT: TypeAdapter[EndpointConfig] = TypeAdapter(EndpointConfig)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kind": "regex"}, "pattern: got None for the kind regex"),
        ({"kind": "math", "pattern": "x"}, "pattern: got 'x' for the kind math"),
        ({"kind": "callable"}, "function: got None for the kind callable"),
        ({"kind": "tests", "function": "a:b"}, "function: got 'a:b' for the kind tests"),
        ({"kind": "callable", "function": "judges.same"}, "expected package.module:function"),
        ({"kind": "regex", "pattern": "("}, r"pattern: got '\('.*expected a Python pattern"),
        ({"kind": "exact", "timeout_seconds": 0}, "greater than 0"),
        ({"kind": "guess"}, "'math', 'exact'"),
    ],
)
def test_settings_that_fit_no_kind_are_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ENDPOINT.validate_python({"engine": "verifier", **settings})


def test_a_verifier_is_an_endpoint_without_a_model() -> None:
    config = ENDPOINT.validate_python({"engine": "verifier", "kind": "regex", "pattern": "x", "timeout_seconds": 3})
    assert isinstance(config, VerifierEndpoint)
    assert (config.saved_model, config.own_vocabulary, config.own_tokenizer, config.writes) == (None, None, None, False)
    assert config.identity == {"engine": "verifier", "kind": "regex", "pattern": "x", "function": None}
    with pytest.raises(ValueError, match="tokenizer of the regex verifier: got none"):
        make_engine(config)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
    return loaded


def bundle(tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, str, str]]) -> Columns:
    """Rows of prompt, written text with the end mark, and reference."""
    asked = [(tokenizer.encode(p), [*tokenizer.encode(t), tokenizer.eos_token_id], tokenizer.encode(r)) for p, t, r in rows]
    return {
        "tokens": np.asarray([i for p, t, _ in asked for i in p + t], dtype=np.int32),
        "loss_mask": np.asarray([m for p, t, _ in asked for m in [0] * len(p) + [1] * len(t)], dtype=np.uint8),
        "lengths": np.asarray([len(p + t) for p, t, _ in asked], dtype=np.int32),
        "reference": np.asarray([i for *_, r in asked for i in r], dtype=np.int32),
        "reference_lengths": np.asarray([len(r) for *_, r in asked], dtype=np.int32),
    }


def engine_of(tokenizer: PreTrainedTokenizerFast, **settings: object) -> VerifierEngine:
    found = make_engine(ENDPOINT.validate_python({"engine": "verifier", "tokenizer": tokenizer.name_or_path, **settings}))
    assert isinstance(found, VerifierEngine)
    return found


def check(found: Columns, reward: list[float], judged: list[int], failed: int, unjudgeable: int) -> None:
    for name, values, dtype in (
        ("reward", reward, "float32"),
        ("judged", judged, "uint8"),
        ("failed", [failed], "int64"),
        ("unjudgeable", [unjudgeable], "int64"),
    ):
        assert found[name].dtype == dtype and found[name].tolist() == values, name
    assert set(found) == {"reward", "judged", "failed", "unjudgeable"}


def test_rows_are_judged_by_what_was_written_in_them(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = engine_of(tokenizer, kind="math", timeout_seconds=SECONDS)
    rows = [("3 + 4 = #### 9", r"\boxed{7}", "#### 7"), ("2 + 2", "5", "4"), ("why", "1", "Because"), ("x", "0.5", "1/2"), ("y", "1", "")]
    check(engine.judge(bundle(tokenizer, rows)), [1, 0, 0, 1, 0], [1, 1, 0, 1, 0], 0, 2)
    check(engine.judge(bundle(tokenizer, [])), [], [], 0, 0)


def test_failures_of_a_verifier_are_counted_and_no_more(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = engine_of(tokenizer, **CALLABLE, timeout_seconds=3)
    rows = [("", text, "x") for text in ("x", "throw", "x", "die", "hang", "y", "exit", "x")]
    check(engine.judge(bundle(tokenizer, rows)), [1, 0, 1, 0, 0, 0, 0, 1], [1, 0, 1, 0, 0, 1, 0, 1], 4, 0)


def test_code_is_judged_by_its_reference(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = engine_of(tokenizer, kind="tests", timeout_seconds=SECONDS)
    rows = [
        ("f", "```\ndef f():\n    return 1\n```", "assert f() == 1"),
        ("f", "import sys; sys.exit(0)", "assert f() == 1"),
        ("f", "1", ""),
    ]
    check(engine.judge(bundle(tokenizer, rows)), [1, 0, 0], [1, 1, 0], 0, 1)


def test_a_verifier_scores_nothing_and_reads_no_malformed_bundle(tokenizer: PreTrainedTokenizerFast) -> None:
    engine, columns = engine_of(tokenizer, kind="tests"), bundle(tokenizer, [("a", "b", "c"), ("d", "e", "f")])
    with pytest.raises(ValueError, match="topk: got a verifier, which only judges"):
        engine.score(columns, ScoreRequest("topk", top_k=1))
    with pytest.raises(ValueError, match="got 1 references"):
        engine.judge({**columns, "reference_lengths": columns["reference_lengths"][:1]})
    with pytest.raises(ValueError, match="reference: got 1 values; expected the 2"):
        engine.judge({**columns, "reference": columns["reference"][:1]})
    with pytest.raises(ValueError, match="tokens: got"):
        engine.judge({**columns, "lengths": columns["lengths"] + 1})


def test_a_verifier_that_is_alive_is_asked_again(same: JudgeProcess) -> None:
    same.judge("x", "x")
    child = same._child.pid
    same.judge("y", "x")
    assert same._child.pid == child and os.getpgid(child) == child
