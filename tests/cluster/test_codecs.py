"""Codecs: what comes back is what went in, to the error that each states, in exactly the bytes that it states.

References are written from the promises: float64, one token at a time, from the encoded answers alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from cluster.codecs import CodecConfig, Exact, Packed, codec_for
from cluster.codecs.bits import SortedIds, from_bits, to_bits
from cluster.codecs.groups import Group, default_groups
from cluster.codecs.topk import FLOOR
from cluster.endpoints import check_scores
from cluster.engines import Columns
from strategies.core import Progress, ScoreRequest
from strategies.objectives.divergence import ForwardKL
from strategies.outputs import TokenLogits
from strategies.signals import Dense, Sampled, TopK
from tests.benchmarks.codec_errors import errors
from tests.benchmarks.codec_material import reduced
from tests.benchmarks.codec_peer import BUDGET, RECOMMENDED
from tests.benchmarks.codec_states import gradients, squares

FINE = 2e-3
"""Error of a log-probability beside the one of its step: masses are stored to 5e-4, one number a group on the way to it."""
WIDER = 2 ** (1 / 16)
"""A stored step is at most this much larger than the range asks for."""


def dense(tokens: int, vocabulary: int, spread: float = 3.0, seed: int = 0) -> NDArray[np.float64]:
    """`(N, V)` log-probabilities in float64."""
    logits = np.random.default_rng(seed).normal(0, spread, (tokens, vocabulary))
    return logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)


def topk_answers(log_p: NDArray[np.float64], k: int) -> Columns:
    ids = np.argsort(-log_p, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(log_p, ids, 1).astype(np.float32)
    label = log_p[:, 0].astype(np.float32)
    label[::3] = -np.inf
    return {"ids": ids.astype(np.int32).ravel(), "logprobs": found.ravel(), "logprob": label}


def sampled_answers(log_p: NDArray[np.float64], draws: int, exponent: float, seed: int = 1) -> Columns:
    """As an engine draws: with replacement from p^e / Z, weighed p / (n r)."""
    rng = np.random.default_rng(seed)
    proposal = exponent * log_p - np.log(np.exp(exponent * log_p).sum(1, keepdims=True))
    rows = [rng.choice(log_p.shape[1], draws, p=np.exp(r) / np.exp(r).sum()) for r in proposal]
    ids = np.stack(rows) if rows else np.zeros((0, draws), np.int64)
    chosen = np.take_along_axis(log_p, ids, 1)
    weights = np.exp(chosen - np.take_along_axis(proposal, ids, 1)) / draws
    columns = {"ids": ids.astype(np.int32), "logprobs": chosen.astype(np.float32), "weights": weights.astype(np.float32)}
    return {**{n: c.ravel() for n, c in columns.items()}, "logprob": log_p[:, 0].astype(np.float32)}


def accepted(scores: Columns, request: ScoreRequest, tokens: int, vocabulary: int) -> None:
    columns: Columns = {"loss_mask": np.ones(tokens, np.uint8)}
    check_scores(columns, {**scores, "dropped_mass": np.zeros(1, np.float32)}, request, vocabulary)


def stored_bytes(arrays: dict[str, NDArray[Any]]) -> int:
    return sum(a.dtype.itemsize * a.shape[1] for a in arrays.values())


def topk_round_trip(answers: Columns, tokens: int, k: int, vocabulary: int, groups: tuple[Group, ...] | None = None) -> Columns:
    """Decoded, after everything that holds of any answer was checked."""
    request = ScoreRequest("topk", top_k=k)
    codec = codec_for(Packed(groups=groups), request, vocabulary)
    arrays = codec.encode(answers, tokens)
    assert all(len(a) == tokens and a.ndim == 2 and a.flags.c_contiguous for a in arrays.values())
    assert stored_bytes(arrays) == codec.bytes_per_token
    decoded = codec.decode(arrays)
    accepted(decoded, request, tokens, vocabulary)
    check_topk(answers, decoded, k, vocabulary, groups or default_groups(k))
    return decoded


def check_topk(answers: Columns, decoded: Columns, k: int, vocabulary: int, groups: tuple[Group, ...]) -> None:
    """Token by token: the ids, the error of every group, and the kept mass and tail."""
    for at in range(len(answers["logprob"])):
        row = slice(at * k, (at + 1) * k)
        back = dict(zip(decoded["ids"][row].tolist(), decoded["logprobs"][row].tolist(), strict=True))
        true = [max(float(v), FLOOR) for v in answers["logprobs"][row].tolist()]
        start = 0
        for group in groups:
            own = true[start : start + group.ids]
            step = (own[0] - own[-1]) / 2**group.bits * (WIDER if group.bits else 1)
            for token, logprob in zip(answers["ids"][row].tolist()[start:], own, strict=False):
                assert abs(back[token] - logprob) <= step + FINE
            start += group.ids
        mass, found = math.fsum(math.exp(v) for v in true), math.fsum(math.exp(v) for v in back.values())
        assert found == pytest.approx(mass, rel=1e-3)
        if k < vocabulary and 1 - mass > 1e-6:
            assert 1 - found == pytest.approx(1 - mass, rel=1e-3, abs=1e-6)
    assert np.array_equal(decoded["logprob"], answers["logprob"].astype(np.float16).astype(np.float32))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_packed_topk_keeps_ids_masses_and_each_group_s_precision(data: st.DataObject) -> None:
    vocabulary = data.draw(st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 257, 4_096, 32_000])))
    k = data.draw(st.integers(1, min(vocabulary, 70)))
    tokens = data.draw(st.integers(1, 4))
    spread = data.draw(st.sampled_from([0.0, 0.3, 3.0, 12.0]))
    topk_round_trip(topk_answers(dense(tokens, vocabulary, spread, data.draw(st.integers(0, 99))), k), tokens, k, vocabulary)


@pytest.mark.parametrize("k", [1, 2, 8, 9, 32, 33, 64, 200])
def test_default_groups_hold_k_ids(k: int) -> None:
    assert sum(g.ids for g in default_groups(k)) == k
    topk_round_trip(topk_answers(dense(3, 200), k), 3, k, 200)


@pytest.mark.parametrize("sharpness", [0.0, 30.0, 400.0], ids=["uniform", "one-hot", "beyond the floor"])
def test_packed_topk_survives_extremes_and_ties(sharpness: float) -> None:
    logits = np.zeros((2, 50))
    logits[:, 49] = sharpness
    log_p = logits - np.log(np.exp(logits - sharpness).sum(1, keepdims=True)) - sharpness
    topk_round_trip(topk_answers(log_p, 20), 2, 20, 50)
    topk_round_trip(topk_answers(log_p, 50), 2, 50, 50)


def test_the_first_and_last_id_of_a_vocabulary_come_back() -> None:
    answers: Columns = {
        "ids": np.array([151_935, 0, 0, 151_935], np.int32),
        "logprobs": np.log(np.array([0.6, 0.3, 0.5, 0.5], np.float32)),
        "logprob": np.array([-np.inf, -1.0], np.float32),
    }
    decoded = topk_round_trip(answers, 2, 2, 151_936)
    assert sorted(decoded["ids"].tolist()) == [0, 0, 151_935, 151_935]
    assert decoded["logprob"][0] == -np.inf


def test_any_groups_that_add_up_are_taken_and_others_refused() -> None:
    answers = topk_answers(dense(5, 300), 30)
    topk_round_trip(answers, 5, 30, 300, (Group(ids=10, bits=12), Group(ids=20, bits=0)))
    topk_round_trip(answers, 5, 30, 300, (Group(ids=30, bits=16),))
    with pytest.raises(ValueError, match="got 31 ids; expected the 30"):
        codec_for(Packed(groups=(Group(ids=31, bits=1),)), ScoreRequest("topk", top_k=30), 300)
    with pytest.raises(ValueError, match="got 301; expected at most the 300"):
        codec_for(Packed(), ScoreRequest("topk", top_k=301), 300)


REQUESTS = [
    ScoreRequest("topk", top_k=12),
    ScoreRequest("sampled", draws=7),
    ScoreRequest("sampled", draws=7, exponent=0.5),
    ScoreRequest("hidden"),
    ScoreRequest("dense"),
    ScoreRequest("per-token"),
]
SETTINGS = [Exact(), Packed()]


def answers_to(request: ScoreRequest, tokens: int, vocabulary: int = 60) -> Columns:
    log_p = dense(tokens, vocabulary)
    if request.kind == "topk":
        return topk_answers(log_p, request.top_k)
    if request.kind == "sampled":
        return sampled_answers(log_p, request.draws, request.exponent)
    if request.kind == "hidden":
        return {"hidden": np.random.default_rng(3).normal(0, 2, tokens * 100).astype(np.float32)}
    own = {"dense": log_p.astype(np.float32).ravel()} if request.kind == "dense" else {}
    return {**own, "logprob": log_p[:, 1].astype(np.float32)}


@pytest.mark.parametrize("config", SETTINGS, ids=lambda c: c.type)
@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: f"{r.kind}-{r.exponent:g}")
class TestEveryCodec:
    def test_slices_decode_as_the_whole_does(self, config: CodecConfig, request_: ScoreRequest) -> None:
        tokens = 9
        codec = codec_for(config, request_, 60)
        arrays = codec.encode(answers_to(request_, tokens), tokens)
        whole = codec.decode(arrays)
        chosen = np.array([7, 2, 2, 5])
        part = codec.decode({name: array[chosen] for name, array in arrays.items()})
        for name, column in whole.items():
            assert np.array_equal(part[name], column.reshape(tokens, -1)[chosen].ravel()), name

    def test_names_dtypes_and_promises_stay(self, config: CodecConfig, request_: ScoreRequest) -> None:
        for tokens in (0, 1, 5):
            codec = codec_for(config, request_, 60)
            answers = answers_to(request_, tokens)
            arrays = codec.encode(answers, tokens)
            decoded = codec.decode(arrays)
            assert set(decoded) == set(request_.answers)
            assert {n: (c.dtype, c.shape) for n, c in decoded.items()} == {n: (c.dtype, c.shape) for n, c in answers.items()}
            assert all(len(a) == tokens and a.ndim == 2 and a.flags.c_contiguous for a in arrays.values())
            accepted(decoded, request_, tokens, 60)
            if request_.kind != "hidden":
                assert stored_bytes(arrays) == codec.bytes_per_token


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: f"{r.kind}-{r.exponent:g}")
def test_exact_is_bit_for_bit(request_: ScoreRequest) -> None:
    answers = answers_to(request_, 6)
    codec = codec_for(Exact(), request_, 60)
    decoded = codec.decode(codec.encode(answers, 6))
    assert all(decoded[n].tobytes() == c.tobytes() for n, c in answers.items())


@given(st.integers(1, 80), st.integers(1, 33_000), st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_packed_draws_stay_together_and_keep_their_weights(draws: int, vocabulary: int, exponent: float, seed: int) -> None:
    answers = sampled_answers(dense(3, vocabulary, 2.0, seed), draws, exponent, seed)
    request = ScoreRequest("sampled", draws=draws, exponent=exponent)
    codec = codec_for(Packed(), request, vocabulary)
    arrays = codec.encode(answers, 3)
    decoded = codec.decode(arrays)
    accepted(decoded, request, 3, vocabulary)
    assert stored_bytes(arrays) == codec.bytes_per_token
    for row in (slice(at * draws, (at + 1) * draws) for at in range(3)):
        order = np.argsort(answers["ids"][row], kind="stable")
        true, found = answers["logprobs"][row][order], decoded["logprobs"][row]
        assert np.array_equal(answers["ids"][row][order], decoded["ids"][row])
        half = (true.max() - true.min()) / 255 / 2 + 1e-5
        assert np.abs(true - found).max() <= half
        drift = np.abs(np.log(decoded["weights"][row]) - np.log(answers["weights"][row][order]))
        assert drift.max() <= 2 * abs(1 - exponent) * half + 1e-4


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_packed_hidden_states_are_off_by_half_a_scale(width: int, kind: str) -> None:
    states = np.random.default_rng(0).normal(0, 3, (7, width)).astype(np.float32)
    states[2] = 0
    states[3, 0] = 5e4
    states[4] *= 1e-3
    given_ = torch.from_numpy(states).bfloat16() if kind == "bfloat16" else torch.from_numpy(states)
    column = given_.view(torch.int16).numpy() if kind == "bfloat16" else states
    codec = codec_for(Packed(), ScoreRequest("hidden"), 10)
    arrays = codec.encode({"hidden": column.ravel()}, 7)
    assert stored_bytes(arrays) == width + 2 * math.ceil(width / 64)
    back = codec.decode(arrays)["hidden"]
    assert back.dtype == column.dtype
    found = torch.from_numpy(back).view(torch.bfloat16).float() if kind == "bfloat16" else torch.from_numpy(back)
    true, found = given_.double().numpy(), found.double().view(7, width).numpy()
    for start in range(0, width, 64):
        block, got = true[:, start : start + 64], found[:, start : start + 64]
        most = np.abs(block).max(1, keepdims=True)
        rounding = np.abs(block) * (2**-8 if kind == "bfloat16" else 2**-23)
        assert (np.abs(block - got) <= most / 127 / 2 * 1.002 + 4e-5 + rounding).all()


@pytest.mark.parametrize("bad", [np.inf, np.nan, 1e9])
def test_hidden_states_that_no_scale_holds_are_refused(bad: float) -> None:
    codec = codec_for(Packed(), ScoreRequest("hidden"), 10)
    with pytest.raises(ValueError, match="expected at most"):
        codec.encode({"hidden": np.array([1.0, bad], np.float32)}, 1)


@given(st.integers(1, 50), st.integers(1, 200_000), st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_sorted_ids_come_back_near_their_entropy(count: int, universe: int, seed: int) -> None:
    ids = np.sort(np.random.default_rng(seed).integers(0, universe, (3, count)), axis=1)
    ids[0], ids[1] = 0, universe - 1
    code = SortedIds(count, universe)
    bits = code.write(ids)
    assert bits.shape == (3, code.bits)
    assert np.array_equal(code.read(bits), ids)
    assert code.bits <= count * (2 + max(0.0, math.log2(universe / count)) + 1)


@pytest.mark.parametrize("width", [0, 1, 7, 8, 16, 17, 32])
def test_numbers_come_back_from_their_bits(width: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << width, (4, 5)) if width else np.zeros((4, 5), np.int64)
    bits = to_bits(values, width)
    assert bits.shape == (4, 5 * width)
    assert [int("".join(map(str, row[:width])) or "0", 2) for row in bits.tolist()] == values[:, 0].tolist()
    assert np.array_equal(from_bits(bits, 5, width), values)


def test_settings_are_chosen_by_type_and_refuse_what_they_do_not_know() -> None:
    read = TypeAdapter(CodecConfig).validate_python
    assert read({"type": "packed", "groups": [{"ids": 4, "bits": 2}]}) == Packed(groups=(Group(ids=4, bits=2),))
    assert read({"type": "exact"}) == Exact()
    for wrong in ({"type": "exact", "groups": None}, {"type": "packed", "group": []}, {"type": "zip"}):
        with pytest.raises(ValidationError):
            read(wrong)


def test_the_errors_that_benchmarks_state_are_those_of_whole_distributions() -> None:
    """KL spelled out over all ids, and autograd through the product's own signal: `tests.benchmarks.codec_errors` in closed form."""
    log_p, log_q = (torch.from_numpy(dense(6, 700, 2.0, seed)) for seed in (1, 2))
    of = reduced("tiny", iter([(log_p.float(), log_q.float())]), {})
    k = 12
    hat = of.logprobs[:, :k] + np.random.default_rng(0).normal(-0.05, 0.03, (6, k)).astype(np.float32)
    found = errors(of, of.ids[:, :k], hat)
    ids = torch.from_numpy(of.ids[:, :k].astype(np.int64))
    log_hat = torch.from_numpy(hat.astype(np.float64))
    tail = 1 - log_hat.exp().sum(1, keepdim=True)
    whole = (tail / (700 - k)).log().expand(6, 700).scatter(1, ids, log_hat)
    kl = (log_p.exp() * (log_p - whole)).sum(1).mean()
    logits = log_q.float().requires_grad_()
    student, teacher = TopK(ids, log_hat.float()).pair(TokenLogits(logits, torch.zeros(6, dtype=torch.int64)), 1.0)
    (got,) = torch.autograd.grad((teacher.exp() * (teacher - student)).sum(), logits)
    true = log_q.exp() - log_p.exp()
    assert found.kl == pytest.approx(float(kl), rel=1e-4)
    assert found.gradient == pytest.approx(float((got.double() - true).norm() / true.norm()), rel=1e-4)


def test_the_errors_of_hidden_states_and_draws_are_those_of_the_product_s_gradients() -> None:
    """Autograd through forward KL of the product's own signals: `tests.benchmarks.codec_states` in closed form."""
    log_p, log_hat, log_q = (torch.from_numpy(dense(6, 300, 2.0, seed)) for seed in (1, 2, 3))
    answers = sampled_answers(log_p.numpy(), 7, 0.5)
    ids = torch.from_numpy(answers["ids"].astype(np.int64)).view(6, 7)
    was = answers["weights"].reshape(6, 7)
    now = was * np.random.default_rng(0).uniform(0.9, 1.1, was.shape).astype(np.float32)

    def gradient(signal: Dense | Sampled) -> torch.Tensor:
        logits = log_q.float().requires_grad_()
        outputs = TokenLogits(logits, torch.zeros(6, dtype=torch.int64))
        values = ForwardKL().values(outputs, signal, 1.0, Progress(0, 1))
        return torch.autograd.grad(values.sum(), logits)[0].double()

    p, hat = (gradient(Dense(table.float())) for table in (log_p, log_hat))
    before, after = (gradient(Sampled(ids, torch.zeros(6, 7), torch.from_numpy(w))) for w in (was, now))
    kl, wrong, right = squares(log_p.numpy(), log_hat.numpy(), log_q.numpy())
    assert kl == pytest.approx((log_p.exp() * (log_p - log_hat)).sum(1).numpy(), rel=1e-9)
    assert (wrong, right) == pytest.approx((float(((hat - p) ** 2).sum()), float((p**2).sum())), rel=1e-4)
    wanted = [float((g**2).sum()) for g in (after - before, before, before - p, p)]
    assert gradients(log_p, log_q, ids, was, now) == pytest.approx(wanted, rel=1e-4)


def test_the_peer_s_settings_take_the_bytes_that_it_states() -> None:
    assert [RECOMMENDED.bytes_per_token(v) for v in (151_936, 128_256)] == [344, 328]
    assert [BUDGET.bytes_per_token(v) for v in (151_936, 128_256)] == [127, 121]
    ranks = np.arange(49)
    curve = np.concatenate([[-0.5], -1 - 0.02 * ranks - 0.3 * np.sqrt(ranks)])[None].astype(np.float32)
    assert np.abs(BUDGET.round_trip(curve) - curve).max() < 1e-5
