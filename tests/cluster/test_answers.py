"""What engines say beyond the top-k: whole distributions, draws and hidden states, of one arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.answers import answer, draw, token_keys, uniforms
from cluster.causal_lm import OutputHead
from cluster.config import FakeEndpoint, TransformersEndpoint
from cluster.endpoints import check_scores, make_engine
from strategies.core import ScoreRequest
from tests.cluster.test_engines import VOCABULARY, agrees, bundle, row_logprobs
from tests.tiny import tiny_model

REQUESTS = [
    ScoreRequest("dense"),
    ScoreRequest("sampled", draws=5, exponent=0.8),
    ScoreRequest("hidden"),
    ScoreRequest("per-token"),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TransformersEndpoint:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_model(folder, vocab_size=VOCABULARY)
    return TransformersEndpoint(model=str(folder), forward_tokens=32, max_dropped_mass=1.0)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.kind)
@pytest.mark.parametrize("usable", [VOCABULARY, 300])
@pytest.mark.parametrize("keep", [0.7, 0.0])
def test_every_kind_keeps_its_promise(teacher: TransformersEndpoint, request_: ScoreRequest, usable: int, keep: float) -> None:
    columns = bundle([9, 6, 3], keep=keep)
    check_scores(columns, make_engine(teacher, vocabulary=usable).score(columns, request_), request_, usable)
    if request_.kind != "hidden":
        fake = make_engine(FakeEndpoint(engine="fake", vocabulary=usable))
        check_scores(columns, fake.score(columns, request_), request_, usable)


@pytest.mark.parametrize("request_", [*REQUESTS, ScoreRequest("topk", top_k=3)], ids=lambda r: r.kind)
def test_more_mass_on_ids_that_the_student_lacks_than_allowed_is_an_error(teacher: TransformersEndpoint, request_: ScoreRequest) -> None:
    engine = make_engine(teacher.model_copy(update={"max_dropped_mass": 1e-3}), vocabulary=300)
    with pytest.raises(ValueError, match=r"ids that the student lacks; expected at most 0\.001\. .*max_dropped_mass"):
        engine.score(bundle([9, 6, 3], vocabulary=300), request_)
    lost = make_engine(teacher, vocabulary=300).score(bundle([9, 6, 3], vocabulary=300), request_)["dropped_mass"]
    assert 0.1 < lost.item() < 1


def test_a_fake_has_no_hidden_states() -> None:
    with pytest.raises(ValueError, match="no network"):
        make_engine(FakeEndpoint(engine="fake", vocabulary=9)).score(bundle([9]), ScoreRequest("hidden"))


def test_dense_is_what_the_model_says_and_hidden_states_make_it_through_the_head(teacher: TransformersEndpoint) -> None:
    columns = bundle([9, 6, 3])
    engine = make_engine(teacher)
    reference = row_logprobs(teacher.model, columns)  # type: ignore[arg-type]
    dense = torch.from_numpy(engine.score(columns, ScoreRequest("dense"))["dense"]).view(len(reference), -1)
    torch.testing.assert_close(dense, reference, atol=1e-5, rtol=0)
    hidden = torch.from_numpy(engine.score(columns, ScoreRequest("hidden"))["hidden"]).view(len(reference), -1)
    head: OutputHead = engine.head  # type: ignore[attr-defined]
    torch.testing.assert_close(head.logits(hidden).log_softmax(-1), reference, atol=1e-5, rtol=0)
    agrees(engine.score(columns, ScoreRequest("topk", top_k=7)), reference, columns, 7)


def test_bfloat16_states_travel_as_the_same_bits(teacher: TransformersEndpoint) -> None:
    half = make_engine(teacher.model_copy(update={"dtype": "bfloat16"}))
    sent = half.score(bundle([9]), ScoreRequest("hidden"))["hidden"]
    assert sent.dtype == np.int16 and torch.from_numpy(sent).view(torch.bfloat16).isfinite().all()


def test_draws_belong_to_the_token_and_not_to_its_bundle() -> None:
    engine, request = make_engine(FakeEndpoint(engine="fake", vocabulary=50)), ScoreRequest("sampled", draws=6)
    together = bundle([9, 6, 8], keep=1.0) | {"row_id": np.asarray([4, 9, 2]), "step": np.asarray([3])}
    second = {
        "tokens": together["tokens"][9:15],
        "lengths": together["lengths"][1:2],
        "loss_mask": together["loss_mask"][9:15],
        "row_id": np.asarray([9]),
        "step": np.asarray([3]),
    }
    whole, alone = engine.score(together, request), engine.score(second, request)
    here = slice(6 * 8, 6 * (8 + 5))
    np.testing.assert_array_equal(whole["ids"][here], alone["ids"])
    other = engine.score({**second, "step": np.asarray([4])}, request)
    assert (other["ids"] != alone["ids"]).any()


def test_averages_over_draws_are_unbiased_for_any_proposal() -> None:
    logprobs = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    f = torch.arange(8.0) ** 2
    for exponent in (0.5, 1.0, 1.5):
        keys = torch.arange(4000)
        drawn = draw(logprobs.expand(4000, -1), keys, ScoreRequest("sampled", draws=16, exponent=exponent))
        means = (drawn["weights"] * f[drawn["ids"].long()]).sum(-1)
        error = means.std() / len(means) ** 0.5
        assert abs(means.mean() - (logprobs.exp() * f).sum()) < 4 * error


def test_uniform_numbers_are_a_function_of_their_key_and_fill_the_unit_interval() -> None:
    columns = bundle([200, 300], keep=1.0)
    keys = token_keys(columns, np.flatnonzero(columns["loss_mask"]))
    assert len(set(keys.tolist())) == len(keys)
    found = uniforms(keys, 32)
    np.testing.assert_array_equal(found, uniforms(keys, 32))
    assert found.min() >= 0 and found.max() < 1
    counts, _ = np.histogram(found, bins=16, range=(0, 1))
    assert abs(counts / counts.mean() - 1).max() < 0.15


def test_no_tokens_make_no_answer() -> None:
    head = OutputHead(torch.nn.Parameter(torch.zeros(5, 2)), None, None)
    none = torch.zeros(0, dtype=torch.int64)
    assert answer(torch.zeros(0, 2), head, none, none, ScoreRequest("hidden"), 5)["hidden"].shape == (0, 2)
