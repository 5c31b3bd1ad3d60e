"""Every engine keeps the contract, and the transformers engine says what the model itself says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cluster.answers import largest
from cluster.config import FakeEndpoint, OpenAIEndpoint, TransformersEndpoint, VllmEndpoint
from cluster.endpoints import check_scores, make_engine
from cluster.engines import Columns, Engine
from cluster.engines.fake import FakeEngine
from cluster.engines.fake_server import FakeServer
from cluster.engines.transformers import TransformersEngine
from cluster.forwards import bundle_rows, group_by_length, lay_out
from strategies.core import ScoreRequest
from tests.cluster.fake_vllm import instead_of_vllm
from tests.tiny import tiny_model

VOCABULARY = 512
TOP_K = 7
TOP = ScoreRequest("topk", top_k=TOP_K)
ALL = ScoreRequest("topk", top_k=VOCABULARY)


def bundle(lengths: list[int], seed: int = 0, vocabulary: int = VOCABULARY, keep: float = 0.7) -> Columns:
    """Random rows with uneven loss masks; the last row has no loss token."""
    rng = np.random.default_rng(seed)
    mask = (rng.random(sum(lengths)) < keep).astype(np.uint8)
    ends = np.cumsum(lengths)
    mask[[e - n for e, n in zip(ends, lengths, strict=True) if n]] = 0
    mask[ends[-1] - lengths[-1] :] = 0
    return {
        "tokens": rng.integers(0, vocabulary, sum(lengths)).astype(np.int32),
        "lengths": np.asarray(lengths, dtype=np.int32),
        "loss_mask": mask,
    }


def row_logprobs(folder: Path, columns: Columns, vocabulary: int | None = None) -> torch.Tensor:
    """The naive reference: every row alone through the whole model, all logits at once. `(N, V)`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pieces, start = [], 0
    for length in columns["lengths"].tolist():
        here = slice(start, start + length)
        start += length
        mask = columns["loss_mask"][here].astype(bool)
        if mask.any():
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(columns["tokens"][here]).long()[None]).logits[0, :, :vocabulary]
            pieces.append(logits.log_softmax(-1)[torch.from_numpy(np.flatnonzero(mask) - 1)])
    return torch.cat(pieces)


def agrees(scores: Columns, reference: torch.Tensor, columns: Columns, top_k: int, tolerance: float = 1e-5) -> None:
    tokens = len(reference)
    ids = torch.from_numpy(scores["ids"].reshape(tokens, top_k)).long()
    given = torch.from_numpy(scores["logprobs"].reshape(tokens, top_k))
    torch.testing.assert_close(given, reference.topk(top_k).values, atol=tolerance, rtol=0)
    torch.testing.assert_close(given, reference.gather(-1, ids), atol=tolerance, rtol=0)
    labels = torch.from_numpy(columns["tokens"][columns["loss_mask"].astype(bool)]).long()
    torch.testing.assert_close(torch.from_numpy(scores["logprob"]), reference.gather(-1, labels[:, None])[:, 0], atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    tiny_model(path)
    return path


@pytest.fixture(params=["transformers", "fake", "openai", "vllm"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    fake = make_engine(FakeEndpoint(engine="fake", vocabulary=VOCABULARY))
    if request.param == "openai":
        with FakeServer(fake) as server:
            yield make_engine(OpenAIEndpoint(engine="openai", base_url=server.url, model="fake", vocabulary=VOCABULARY))
    elif request.param == "vllm":
        with instead_of_vllm():
            yield make_engine(VllmEndpoint(engine="vllm", model=str(folder), max_logprobs=-1))
    else:
        yield fake if request.param == "fake" else make_engine(TransformersEndpoint(model=str(folder), forward_tokens=40))


def test_every_engine_keeps_the_contract(engine: Engine) -> None:
    columns = bundle([9, 30, 1, 0, 17, 2, 12])
    check_scores(columns, engine.score(columns, TOP), TOP, VOCABULARY)


def test_every_engine_may_name_the_whole_vocabulary(engine: Engine) -> None:
    columns = bundle([9, 6])
    scores = engine.score(columns, ALL)
    check_scores(columns, scores, ALL, VOCABULARY)
    np.testing.assert_allclose(np.exp(scores["logprobs"].reshape(-1, VOCABULARY)).sum(-1), 1.0, rtol=1e-5)


def test_every_engine_refuses_more_tokens_than_the_vocabulary_has(engine: Engine) -> None:
    with pytest.raises(ValueError, match=f"top_k: got {VOCABULARY + 1}; expected at most"):
        engine.score(bundle([9, 6]), ScoreRequest("topk", top_k=VOCABULARY + 1))


def test_every_engine_answers_a_bundle_without_loss_tokens(engine: Engine) -> None:
    columns = bundle([9, 6], keep=0.0)
    check_scores(columns, engine.score(columns, TOP), TOP, VOCABULARY)


@pytest.mark.parametrize("engine", ["transformers", "fake"], indirect=True)
def test_an_engine_with_whole_distributions_says_how_likely_any_of_some_ids_is(engine: Engine) -> None:
    columns, wanted = bundle([9, 6]), np.asarray([3, 0, 77, VOCABULARY + 5], np.int32)
    request = ScoreRequest("among")
    scores = engine.score({**columns, "wanted": wanted}, request)
    check_scores(columns, scores, request, VOCABULARY)
    whole = engine.score(columns, ScoreRequest("dense"))["dense"].reshape(-1, VOCABULARY).astype(np.float64)
    np.testing.assert_allclose(scores["among"], np.log(np.exp(whole[:, [3, 0, 77]]).sum(-1)), rtol=1e-4)
    all_of_them = engine.score({**columns, "wanted": np.arange(VOCABULARY, dtype=np.int32)}, request)["among"]
    np.testing.assert_allclose(all_of_them, 0.0, atol=1e-5)
    assert all_of_them.max() <= 0.0 and np.isneginf(engine.score({**columns, "wanted": wanted[:0]}, request)["among"]).all()
    nothing = bundle([9, 6], keep=0.0)
    check_scores(nothing, engine.score({**nothing, "wanted": wanted}, request), request, VOCABULARY)


@pytest.mark.parametrize("engine", ["openai", "vllm"], indirect=True)
def test_an_engine_without_them_refuses(engine: Engine) -> None:
    with pytest.raises(ValueError, match="among"):
        engine.score({**bundle([9, 6]), "wanted": np.zeros(1, np.int32)}, ScoreRequest("among"))


def test_every_engine_repeats_itself_bitwise(engine: Engine) -> None:
    columns = bundle([9, 30, 17, 12])
    first, second = engine.score(columns, TOP), engine.score(columns, TOP)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_fake_scores_of_a_row_do_not_depend_on_its_bundle() -> None:
    engine = FakeEngine(VOCABULARY)
    together = bundle([9, 30, 17, 4])
    scores = engine.score(together, TOP)
    alone = {"tokens": together["tokens"][9:39], "lengths": together["lengths"][1:2], "loss_mask": together["loss_mask"][9:39]}
    before, count = int(together["loss_mask"][:9].sum()), int(alone["loss_mask"].sum())
    here = slice(before * TOP_K, (before + count) * TOP_K)
    np.testing.assert_array_equal(engine.score(alone, TOP)["ids"], scores["ids"][here])


@pytest.mark.parametrize("forward_tokens", [1, 40, 10_000])
def test_scores_are_those_of_each_row_alone_whatever_the_padding(folder: Path, forward_tokens: int) -> None:
    columns = bundle([9, 30, 1, 17, 30, 2, 12])
    scores = TransformersEngine(TransformersEndpoint(model=str(folder), forward_tokens=forward_tokens)).score(columns, TOP)
    agrees(scores, row_logprobs(folder, columns), columns, TOP_K)
    assert scores["dropped_mass"] == 0.0


def save(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_scores_of_a_soft_capped_model_with_sliding_windows(tmp_path: Path) -> None:
    config = Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4, final_logit_softcapping=0.5)
    columns = bundle([20, 9, 14, 3])
    where = save(Gemma2ForCausalLM(config), tmp_path)
    scores = TransformersEngine(TransformersEndpoint(model=str(where))).score(columns, TOP)
    agrees(scores, row_logprobs(where, columns), columns, TOP_K)


def test_scores_of_models_with_learned_positions_and_untied_heads(tmp_path: Path) -> None:
    gpt2 = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    llama = LlamaConfig(**SMALL, tie_word_embeddings=False)
    columns = bundle([20, 9, 14, 3])
    for name, model in {"gpt2": GPT2LMHeadModel(gpt2), "llama": LlamaForCausalLM(llama)}.items():
        where = save(model, tmp_path / name)
        scores = TransformersEngine(TransformersEndpoint(model=str(where))).score(columns, TOP)
        agrees(scores, row_logprobs(where, columns), columns, TOP_K)


def test_a_padded_teacher_vocabulary_is_dropped_and_the_rest_renormalised(folder: Path) -> None:
    usable = 500
    columns = bundle([20, 9, 14, 3], vocabulary=usable)
    scores = make_engine(TransformersEndpoint(model=str(folder), max_dropped_mass=1.0), vocabulary=usable).score(
        columns, ScoreRequest("topk", top_k=usable)
    )
    check_scores(columns, scores, ScoreRequest("topk", top_k=usable), usable)
    agrees(scores, row_logprobs(folder, columns, usable), columns, usable)
    lost = row_logprobs(folder, columns)[:, usable:].exp().sum(-1).max()
    assert float(scores["dropped_mass"][0]) == pytest.approx(float(lost), rel=1e-4)


def test_a_token_beyond_the_usable_vocabulary_has_no_probability(folder: Path) -> None:
    columns = bundle([20, 3], vocabulary=10)
    columns["tokens"][4], columns["loss_mask"][4] = 505, 1
    scores = make_engine(TransformersEndpoint(model=str(folder), max_dropped_mass=1.0), vocabulary=500).score(columns, TOP)
    assert scores["logprob"][int(columns["loss_mask"][:4].sum())] == -np.inf
    assert np.isfinite(scores["logprobs"]).all()


def test_a_token_that_the_teacher_does_not_embed_is_refused(folder: Path) -> None:
    columns = bundle([20, 3])
    columns["tokens"][4] = VOCABULARY
    with pytest.raises(ValueError, match="tokens: got the id 512; expected less than the 512 ids"):
        make_engine(TransformersEndpoint(model=str(folder))).score(columns, TOP)


def test_bfloat16_weights_score_close_to_float32(folder: Path) -> None:
    columns = bundle([20, 9, 14, 3])
    engine = TransformersEngine(TransformersEndpoint(model=str(folder), dtype="bfloat16"))
    assert engine.model.dtype == torch.bfloat16
    scores = engine.score(columns, TOP)
    check_scores(columns, scores, TOP, VOCABULARY)
    labels = torch.from_numpy(columns["tokens"][columns["loss_mask"].astype(bool)]).long()
    wanted = row_logprobs(folder, columns).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(scores["logprob"]), wanted, atol=0.05, rtol=0)


def test_pickled_weights_are_never_loaded(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        make_engine(TransformersEndpoint(model=str(tmp_path)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="quantisation works on a GPU")
def test_quantisation_on_a_cpu_says_what_to_do(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"got 'int4' in a process without a GPU.*resources\.gpus"):
        make_engine(TransformersEndpoint(model=str(folder), quantization="int4"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ids", lambda v: v[:-1], "column 'ids'"),
        ("ids", lambda v: v + VOCABULARY, "ids of the scores"),
        ("logprob", lambda v: v.astype(np.float64), "column 'logprob'"),
        ("logprobs", lambda v: v[::-1].copy(), "rising"),
        ("logprobs", lambda v: np.full_like(v, np.nan), "not finite"),
        ("logprobs", lambda v: np.zeros_like(v), "total probability"),
    ],
)
def test_a_broken_answer_is_named(name: str, change, message: str) -> None:  # type: ignore[no-untyped-def]
    columns = bundle([9, 6])
    scores = FakeEngine(VOCABULARY).score(columns, TOP)
    with pytest.raises(ValueError, match=message):
        check_scores(columns, {**scores, name: change(scores[name])}, TOP, VOCABULARY)


def test_a_first_token_that_is_to_be_predicted_is_refused() -> None:
    columns = bundle([9, 6, 3])
    columns["loss_mask"][9] = 1
    with pytest.raises(ValueError, match="first token is to be predicted"):
        bundle_rows(columns)


def test_lengths_that_do_not_add_up_are_refused() -> None:
    columns = bundle([9, 6, 3])
    with pytest.raises(ValueError, match="lengths adding up to 15"):
        bundle_rows({**columns, "lengths": columns["lengths"][:2]})


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12), room=st.integers(1, 80), seed=st.integers(0, 5))
def test_every_loss_token_is_laid_out_once_behind_its_own_prefix(lengths: list[int], room: int, seed: int) -> None:
    columns = bundle(lengths, seed)
    rows = bundle_rows(columns)
    seen = []
    for group in group_by_length(rows.reach, room):
        laid = lay_out(rows, [[r] for r in group])
        assert laid.input_ids.size <= room or len(group) == 1
        for place, number in zip(laid.index.tolist(), laid.order.tolist(), strict=True):
            b, t = divmod(place, laid.input_ids.shape[1])
            at = int(rows.loss_at[number])
            np.testing.assert_array_equal(laid.input_ids[b, : t + 1], columns["tokens"][at - t - 1 : at])
            assert at - t - 1 in rows.starts
            seen.append(number)
    assert sorted(seen) == list(range(len(rows.loss_at)))


@pytest.mark.parametrize("k", [1, 3, 100, 199, 200])
def test_the_largest_logits_are_found_by_either_way(k: int) -> None:
    values = torch.randn(5, 200, generator=torch.Generator().manual_seed(0)).round(decimals=3)
    found, places = largest(values, k)
    assert torch.equal(found, values.topk(k).values)
    assert torch.equal(found, values.gather(-1, places))
    assert all(len(set(row)) == k for row in places.tolist())
