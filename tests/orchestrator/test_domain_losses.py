"""Held-out losses told apart by domain: of the student, and of teachers whether or not their signals give it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.evaluate import domain_metrics, evaluate, evaluation_terms, teacher_cross_entropy, told_apart
from orchestrator.microbatch import WEIGHTS, MicroBatch, cut
from strategies.aligned import TakeSpans
from strategies.core import Columns
from strategies.domains import domain_id
from strategies.sources import TakeHidden, TakeTopK, Taught

DOMAINS = ("code", "prose", "nobody's")
LENGTHS = (4, 3, 5)
TOKENS = sum(LENGTHS) - len(LENGTHS)
OF_TOKEN = np.repeat([0, 1, 0], np.asarray(LENGTHS) - 1)
LABEL, TOPK = Taught(TakeHidden(), endpoint="code"), Taught(TakeTopK(), endpoint="big")


def bundle() -> Columns:
    """Three rows, all but whose first tokens are predicted."""
    mask = np.concatenate([[0] + [1] * (n - 1) for n in LENGTHS])
    return {
        "tokens": np.arange(sum(LENGTHS), dtype=np.int32),
        "lengths": np.asarray(LENGTHS, np.int32),
        "loss_mask": mask.astype(np.uint8),
        "row_id": np.arange(3),
        "domain": np.asarray([domain_id(DOMAINS[i]) for i in (0, 1, 0)], np.int64),
        "t/logprob": -np.arange(TOKENS, dtype=np.float32),
    }


class Layout:
    """A student whose loss of a token is its id."""

    class _Module:
        def eval(self) -> None: ...
        def train(self) -> None: ...

        def __call__(self, micro: MicroBatch, terms: Any, scales: Any, progress: Any) -> tuple[None, torch.Tensor, None]:
            ones = torch.ones(micro.loss_tokens)
            return None, torch.stack([(micro.labels * micro.weights.get(t.name, ones)).sum() for t in terms]), None

    module = _Module()

    def micro(self, last: bool) -> Any:
        return nullcontext()


class Teachers:
    def teach(self, micro: MicroBatch, terms: Any) -> MicroBatch:
        return micro


@pytest.mark.parametrize("micro_batch_tokens", [6, 100])
def test_each_domain_has_the_mean_of_its_own_tokens_and_one_without_any_has_none(micro_batch_tokens: int) -> None:
    terms = evaluation_terms({}, DOMAINS)
    micros = cut(told_apart(bundle(), DOMAINS, {}), [], "bucketed", micro_batch_tokens, 8)
    found = evaluate(Layout(), micros, terms, len(micros) + 1, Teachers(), torch.device("cpu"))  # type: ignore[arg-type]
    labels = bundle()["tokens"][bundle()["loss_mask"].astype(bool)].astype(np.float64)
    assert found["eval/cross_entropy"] == pytest.approx(labels.mean())
    assert found["eval/cross_entropy/code"] == pytest.approx(labels[OF_TOKEN == 0].mean())
    assert found["eval/cross_entropy/prose"] == pytest.approx(labels[OF_TOKEN == 1].mean())
    assert "eval/cross_entropy/nobody's" not in found


def test_a_teacher_called_as_a_domain_keeps_its_own_mean() -> None:
    measured = {"t": LABEL}
    apart = told_apart(bundle(), DOMAINS, measured)
    names = {name.removeprefix(WEIGHTS) for name in apart if name.startswith(WEIGHTS)}
    assert names == {f"{who}/{d}" for who in ("cross_entropy", "teacher_cross_entropy/code") for d in DOMAINS}
    assert apart["weights/teacher_cross_entropy/code/prose"].tolist() == (OF_TOKEN == 1).tolist()


def test_a_teachers_loss_is_that_of_the_log_probabilities_beside_its_signal() -> None:
    found = teacher_cross_entropy([bundle(), bundle()], {"t": TOPK}, DOMAINS)
    values = np.arange(TOKENS)
    expected = {"": values.mean(), "/code": values[OF_TOKEN == 0].mean(), "/prose": values[OF_TOKEN == 1].mean()}
    assert found == pytest.approx({f"eval/teacher_cross_entropy/big{name}": value for name, value in expected.items()})
    assert teacher_cross_entropy([bundle()], {"t": LABEL}, DOMAINS) == {}


def test_a_teacher_with_another_tokenizer_is_measured_on_the_tokens_that_align() -> None:
    span = np.asarray([0, 0, -1, 1, 2, -1, -1, 3, 4], np.int32)
    spanned = {**bundle(), "t/span": span, "t/logprob": np.where(span < 0, 0.0, -np.arange(TOKENS)).astype(np.float32)}
    values, inside = np.arange(TOKENS), span >= 0
    expected = {"": inside, "/code": inside & (OF_TOKEN == 0), "/prose": inside & (OF_TOKEN == 1)}
    found = teacher_cross_entropy([spanned], {"t": Taught(TakeSpans(), endpoint="far")}, DOMAINS)
    assert found == pytest.approx({f"eval/teacher_cross_entropy/far{name}": values[of].mean() for name, of in expected.items()})


def test_names_of_what_is_told_apart_are_known_before_and_of_too_many_domains_there_are_none() -> None:
    assert domain_metrics({"t": TOPK}, ("code",)) == ["eval/cross_entropy/code", "eval/teacher_cross_entropy/big/code"]
    many = [str(n) for n in range(65)]
    assert domain_metrics({}, many) == [] and evaluation_terms({}, many) == evaluation_terms({}) and told_apart({}, many, {}) == {}
