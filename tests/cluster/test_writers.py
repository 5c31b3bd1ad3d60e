"""The contract of engines that write: whose ids they are, where texts end, and what a text depends on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cluster.config import FakeEndpoint, TransformersEndpoint
from cluster.endpoints import check_written, make_engine
from cluster.engines import Columns, Writer
from cluster.engines.transformers import TransformersEngine
from strategies.core import Sampling
from tests.tiny import tiny_model

VOCABULARY = 96
PROMPTS = [[5, 9, 11], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [40, 41], [8, 8, 8, 8, 8]]


def bundle(prompts: list[list[int]], ids: list[int] | None = None) -> Columns:
    return {
        "tokens": np.asarray([t for p in prompts for t in p], dtype=np.int32),
        "lengths": np.asarray([len(p) for p in prompts], dtype=np.int32),
        "row_id": np.asarray(ids or range(len(prompts)), dtype=np.int64),
    }


def texts(written: Columns) -> list[list[int]]:
    ends = np.cumsum(written["lengths"])
    return [written["tokens"][e - n : e].tolist() for e, n in zip(ends, written["lengths"], strict=True)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    folder = tmp_path_factory.mktemp("writer")
    tiny_model(folder, vocab_size=VOCABULARY, tied=False, seed=3)
    return TransformersEngine(TransformersEndpoint(model=str(folder), dtype="float32", forward_tokens=64), threads=1)


def greedy(engine: TransformersEngine, prompt: list[int], sampling: Sampling, usable: int = VOCABULARY) -> tuple[list[int], list[float]]:
    """Token by token without a cache, one prompt at a time."""
    ids, logprobs = list(prompt), []
    while len(ids) < len(prompt) + sampling.max_new_tokens:
        with torch.no_grad():
            known = engine.model(torch.tensor([ids])).logits[0, -1, :usable].log_softmax(-1)
        ids.append(int(known.argmax()))
        logprobs.append(float(known.max()))
        if ids[-1] in sampling.stop:
            break
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("stop", [(), (0,)])
def test_greedy_texts_are_those_of_a_plain_loop(engine: TransformersEngine, stop: tuple[int, ...]) -> None:
    sampling = Sampling(max_new_tokens=10, stop=stop)
    written = engine.write(bundle(PROMPTS), sampling)
    check_written(bundle(PROMPTS), written, 1, VOCABULARY)
    expected = [greedy(engine, p, sampling) for p in PROMPTS]
    assert texts(written) == [ids for ids, _ in expected]
    np.testing.assert_allclose(written["logprobs"], [v for _, values in expected for v in values], atol=1e-4)


def test_a_text_ends_with_its_stop_and_says_so(engine: TransformersEngine) -> None:
    whole = texts(engine.write(bundle(PROMPTS), Sampling(max_new_tokens=10)))
    stop = whole[0][4]
    written = engine.write(bundle(PROMPTS), Sampling(max_new_tokens=10, stop=(stop,)))
    cut = [t[: t.index(stop) + 1] if stop in t else t for t in whole]
    assert texts(written) == cut
    assert written["finished"].tolist() == [int(stop in t) for t in whole] and written["finished"][0] == 1
    assert len(written["logprobs"]) == len(written["tokens"])


def test_only_usable_ids_are_written(engine: TransformersEngine) -> None:
    narrow = TransformersEngine(engine.config, vocabulary=50, threads=1)
    for temperature in (0.0, 2.0):
        written = narrow.write(bundle(PROMPTS), Sampling(max_new_tokens=8, temperature=temperature, samples=2))
        check_written(bundle(PROMPTS), written, 2, 50)
    sampling = Sampling(max_new_tokens=8)
    assert texts(narrow.write(bundle(PROMPTS), sampling)) == [greedy(engine, p, sampling, 50)[0] for p in PROMPTS]


ENGINES: list[Any] = ["transformers", "fake"]


@pytest.fixture(params=ENGINES)
def writer(request: pytest.FixtureRequest, engine: TransformersEngine) -> Writer:
    found = engine if request.param == "transformers" else make_engine(FakeEndpoint(engine="fake", vocabulary=VOCABULARY))
    assert isinstance(found, Writer)
    return found


def test_a_text_belongs_to_its_row_and_sample_and_not_to_its_bundle(writer: Writer) -> None:
    sampling = Sampling(max_new_tokens=6, temperature=1.0, samples=3, stop=(0,))
    whole = writer.write(bundle(PROMPTS), sampling)
    check_written(bundle(PROMPTS), whole, 3, VOCABULARY)
    assert whole["row_id"].tolist() == [r for r in range(5) for _ in range(3)] and whole["sample"].tolist() == [0, 1, 2] * 5
    part = writer.write(bundle([PROMPTS[3], PROMPTS[1]], [3, 1]), sampling)
    assert texts(part) == texts(whole)[9:12] + texts(whole)[3:6]
    assert len({tuple(t) for t in texts(whole)}) > 5
    assert texts(writer.write(bundle(PROMPTS), Sampling(**{**vars(sampling), "seed": 1}))) != texts(whole)


def test_samples_without_temperature_are_alike(writer: Writer) -> None:
    whole = texts(writer.write(bundle(PROMPTS), Sampling(max_new_tokens=6, samples=2, stop=(0,))))
    assert whole[0::2] == whole[1::2]


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_narrowest_draw_is_the_likeliest_token(engine: TransformersEngine, sampling: dict[str, Any]) -> None:
    drawn = engine.write(bundle(PROMPTS), Sampling(max_new_tokens=6, temperature=1.0, **sampling))
    assert texts(drawn) == texts(engine.write(bundle(PROMPTS), Sampling(max_new_tokens=6)))


@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.5}])
def test_draws_follow_the_tempered_distribution(engine: TransformersEngine, limits: dict[str, Any]) -> None:
    count = 3000
    many = bundle([PROMPTS[0]], [0])
    drawn = engine.write(many, Sampling(max_new_tokens=1, temperature=0.5, samples=count, **limits))["tokens"]
    with torch.no_grad():
        p = (engine.model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.5).softmax(-1).double()
    order = p.argsort(descending=True)
    kept = torch.zeros_like(p, dtype=torch.bool)
    below = torch.cumsum(p[order], 0) - p[order] < limits.get("top_p", 1.0)
    kept[order[below][: limits.get("top_k") or VOCABULARY]] = True
    expected = (p * kept / p[kept].sum()).numpy()
    shares = np.bincount(drawn, minlength=VOCABULARY) / count
    assert not shares[~kept.numpy()].any()
    assert np.abs(shares - expected).max() < 4 * np.sqrt(expected.max() / count)


def test_an_empty_prompt_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(ValueError, match="expected at least one token"):
        engine.write(bundle([[3], []]), Sampling())


def test_what_is_promised_is_checked() -> None:
    columns = bundle(PROMPTS)
    good = make_engine(FakeEndpoint(engine="fake", vocabulary=VOCABULARY)).write(columns, Sampling(stop=(0,)))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="'lengths' of the texts"):
        check_written(columns, good, 2, VOCABULARY)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        check_written(columns, good, 1, 2)
