"""The vllm engine on a stand-in for its package, against the transformers engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.config import TransformersEndpoint, VllmEndpoint
from cluster.endpoints import check_scores, check_written, make_engine
from cluster.engines import Columns, Follower, Writer
from cluster.engines.transformers import TransformersEngine
from cluster.engines.vllm import VllmEngine
from cluster.engines.vllm_worker import narrowed
from strategies.core import Sampling, ScoreRequest
from tests.cluster import fake_vllm
from tests.cluster.fake_vllm import instead_of_vllm
from tests.cluster.test_engines import bundle as rows_of
from tests.cluster.test_writers import PROMPTS, bundle, texts
from tests.tiny import tiny_model

VOCABULARY = 96
USABLE = 80
KINDS = [ScoreRequest("topk", top_k=7), ScoreRequest("dense"), ScoreRequest("per-token")]


@pytest.fixture(autouse=True)
def package() -> Iterator[None]:
    with instead_of_vllm():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vllm")
    tiny_model(path, vocab_size=VOCABULARY, tied=False, seed=3)
    return path


def engine(folder: Path, vocabulary: int | None = None, **settings: Any) -> VllmEngine:
    given = {"max_logprobs": -1, "max_dropped_mass": 1.0, "dtype": "float32", **settings}
    return VllmEngine(VllmEndpoint(engine="vllm", model=str(folder), **given), vocabulary, threads=1)


def reference(folder: Path, vocabulary: int | None = None) -> TransformersEngine:
    return TransformersEngine(TransformersEndpoint(model=str(folder), dtype="float32", max_dropped_mass=1.0), vocabulary, threads=1)


def same(one: Columns, other: Columns, but: frozenset[str] = frozenset()) -> None:
    assert set(one) == set(other)
    for name in set(one) - but:
        np.testing.assert_allclose(one[name], other[name], atol=2e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("usable", [VOCABULARY, USABLE])
@pytest.mark.parametrize("asked", KINDS, ids=lambda r: r.kind)
def test_scores_are_the_transformers_engines(folder: Path, asked: ScoreRequest, usable: int) -> None:
    columns = rows_of([9, 30, 1, 0, 17, 2, 12], vocabulary=usable)
    found, expected = engine(folder, usable).score(columns, asked), reference(folder, usable).score(columns, asked)
    check_scores(columns, found, asked, usable)
    same(found, expected, but=frozenset({"dropped_mass"}))
    # of all tokens that were read, the loss tokens among them
    assert found["dropped_mass"] >= expected["dropped_mass"] and bool(found["dropped_mass"][0]) == (usable < VOCABULARY)


def test_the_whole_is_dropped_that_a_row_of_loss_tokens_has_on_other_ids(folder: Path) -> None:
    columns = rows_of([20, 3], vocabulary=USABLE)
    columns["loss_mask"][1:20] = 1
    one, other = (side(folder, USABLE).score(columns, KINDS[2])["dropped_mass"] for side in (engine, reference))
    np.testing.assert_allclose(one, other, rtol=0.2)


def test_a_token_that_is_not_usable_has_no_probability(folder: Path) -> None:
    columns = rows_of([20, 3], vocabulary=USABLE)
    columns["tokens"][4], columns["loss_mask"][4] = USABLE + 5, 1
    found = engine(folder, USABLE).score(columns, KINDS[0])
    same(found, reference(folder, USABLE).score(columns, KINDS[0]), but=frozenset({"dropped_mass"}))
    assert found["logprob"][int(columns["loss_mask"][:4].sum())] == -np.inf


def test_more_mass_on_other_ids_than_allowed_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"probability on ids that the student lacks; expected at most 0\.001"):
        engine(folder, USABLE, max_dropped_mass=1e-3).score(rows_of([20, 3], vocabulary=USABLE), KINDS[0])


def test_texts_are_not_part_of_the_mass_that_scores_dropped(folder: Path) -> None:
    """The worker forgets what other requests have left there."""
    columns, side = rows_of([20, 3], vocabulary=USABLE), engine(folder, USABLE)
    alone = side.score(columns, KINDS[2])["dropped_mass"]
    side.write(bundle(PROMPTS), Sampling(max_new_tokens=9, temperature=2.0, samples=3))
    np.testing.assert_array_equal(side.score(columns, KINDS[2])["dropped_mass"], alone)


@pytest.mark.parametrize("usable", [VOCABULARY, USABLE])
@pytest.mark.parametrize("stop", [(), (0,), (2, 5)])
def test_likeliest_texts_are_the_transformers_engines(folder: Path, usable: int, stop: tuple[int, ...]) -> None:
    sampling, columns = Sampling(max_new_tokens=10, stop=stop, samples=2), bundle(PROMPTS, limits=[4, 12, 3, 9, 12])
    found, expected = engine(folder, usable).write(columns, sampling), reference(folder, usable).write(columns, sampling)
    check_written(columns, found, 2, usable)
    same(found, expected)


def test_a_text_ends_with_its_stop_and_with_nothing_else(folder: Path) -> None:
    """Not with the model's own EOS, which a recipe's tokenizer may not know."""
    side = engine(folder)
    whole = texts(side.write(bundle(PROMPTS), Sampling(max_new_tokens=10)))
    stop = whole[0][4]
    written = side.write(bundle(PROMPTS), Sampling(max_new_tokens=10, stop=(stop,)))
    assert texts(written) == [t[: t.index(stop) + 1] if stop in t else t for t in whole]
    assert written["finished"].tolist() == [int(stop in t) for t in whole]


@pytest.mark.parametrize("limits", [{"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.5}])
def test_behaviour_is_that_of_the_model_before_it_is_drawn_from(folder: Path, limits: dict[str, Any]) -> None:
    """Log-probabilities of written tokens are at temperature 1, of all usable ids."""
    sampling = Sampling(**{"max_new_tokens": 6, "temperature": 1.0, "samples": 2, "seed": 3, **limits})
    written = engine(folder, USABLE).write(bundle(PROMPTS), sampling)
    rows = [[*PROMPTS[n // 2], *text] for n, text in enumerate(texts(written))]
    columns = bundle(rows)
    columns["loss_mask"] = np.concatenate([np.arange(len(row)) >= len(PROMPTS[n // 2]) for n, row in enumerate(rows)]).astype(np.uint8)
    expected = reference(folder, USABLE).score(columns, ScoreRequest("per-token"))["logprob"]
    np.testing.assert_allclose(written["logprobs"], expected, atol=2e-5)


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_narrowest_draw_is_the_likeliest_token(folder: Path, sampling: dict[str, Any]) -> None:
    side = engine(folder)
    drawn = side.write(bundle(PROMPTS), Sampling(max_new_tokens=6, temperature=1.0, **sampling))
    assert texts(drawn) == texts(side.write(bundle(PROMPTS), Sampling(max_new_tokens=6)))


def test_no_rows_give_nothing(folder: Path) -> None:
    side = engine(folder)
    check_written(bundle([]), side.write(bundle([]), Sampling()), 1, VOCABULARY)
    empty = {**bundle([]), "loss_mask": np.zeros(0, np.uint8)}
    for request in KINDS:
        check_scores(empty, side.score(empty, request), request, VOCABULARY)


@pytest.mark.parametrize("tied", [True, False])
def test_published_weights_answer_from_then_on(tied: bool, tmp_path: Path) -> None:
    for name, seed in {"old": 3, "new": 4}.items():
        tiny_model(tmp_path / name, vocab_size=VOCABULARY, tied=tied, seed=seed)
    follower = engine(tmp_path / "old", follows_student=True)
    assert isinstance(follower, Follower) and isinstance(follower, Writer) and follower.version is None
    state = reference(tmp_path / "new").model.state_dict()
    weights = {name: values.double() for name, values in state.items() if not (tied and name == "model.embed_tokens.weight")}
    sampling, columns = Sampling(max_new_tokens=6), rows_of([9, 12, 3], vocabulary=VOCABULARY)
    before = follower.write(bundle(PROMPTS), sampling)
    follower.publish(weights, 7)
    assert follower.version == 7
    same(follower.write(bundle(PROMPTS), sampling), expected := reference(tmp_path / "new").write(bundle(PROMPTS), sampling))
    same(follower.score(columns, KINDS[1]), reference(tmp_path / "new").score(columns, KINDS[1]))
    assert np.abs(before["logprobs"] - expected["logprobs"]).max() > 0.01


def test_a_publication_empties_the_prefix_cache(folder: Path) -> None:
    side = engine(folder)
    side.write(bundle(PROMPTS), Sampling(max_new_tokens=2))
    assert fake_vllm.LLM.made.prefixes
    side.publish(reference(folder).model.state_dict(), 1)
    assert not fake_vllm.LLM.made.prefixes


FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    r"got 1 missing: model.norm.weight;": lambda w: w.pop("model.norm.weight"),
    r"got 1 missing: lm_head.weight;": lambda w: w.pop("lm_head.weight"),
    r"got 4 unexpected: a, b, c, \.\.\.;": lambda w: w.update(dict.fromkeys("dbca", torch.zeros(1))),
    r"got 1 of another shape: model.norm.weight;": lambda w: w.update({"model.norm.weight": torch.zeros(31)}),
}


@pytest.mark.parametrize("message", FAULTS)
def test_other_weights_are_refused_and_change_nothing(folder: Path, message: str) -> None:
    side, columns = engine(folder), rows_of([9, 12, 3], vocabulary=VOCABULARY)
    before = side.score(columns, KINDS[1])
    weights = {name: values + 1 for name, values in reference(folder).model.state_dict().items()}
    FAULTS[message](weights)
    with pytest.raises(ValueError, match=message):
        side.publish(weights, 1)
    assert side.version is None
    np.testing.assert_array_equal(side.score(columns, KINDS[1])["dense"], before["dense"])


def scored(request: ScoreRequest, rows: list[int] | None = None, **settings: Any) -> Callable[[Path], Any]:
    return lambda folder: engine(folder, **settings).score(rows_of(rows or [9, 6], vocabulary=VOCABULARY), request)


def written(**sampling: Any) -> Callable[[Path], Any]:
    return lambda folder: engine(folder, context_tokens=24).write(bundle(PROMPTS), Sampling(**{"max_new_tokens": 4, **sampling}))


REFUSED: dict[str, Callable[[Path], Any]] = {
    r"hidden: got an endpoint that vLLM runs": scored(ScoreRequest("hidden")),
    r"sampled: got an endpoint that vLLM runs": scored(ScoreRequest("sampled", draws=4)),
    r"max_logprobs: got 7; expected the 8 ids": scored(ScoreRequest("topk", top_k=8), max_logprobs=7),
    r"max_logprobs: got 95; expected the 96 ids": scored(ScoreRequest("dense"), max_logprobs=95),
    r"rows: got one that needs room for 21 tokens; expected at most 20": scored(KINDS[0], [20, 3], context_tokens=20),
    r"rows: got one that needs room for 25 tokens; expected at most 24": written(max_new_tokens=14),
    r"temperature 2.5; expected 0, or 0.01 to 2": written(temperature=2.5),
    r"temperature 0.005; expected 0, or 0.01 to 2": written(temperature=0.005),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_vllm_cannot_do_is_refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message](folder)


def test_a_token_that_the_model_does_not_embed_is_refused(folder: Path) -> None:
    columns = rows_of([20, 3], vocabulary=VOCABULARY)
    columns["tokens"][4] = VOCABULARY
    with pytest.raises(ValueError, match="tokens: got the id 96; expected less than the 96 ids"):
        engine(folder).score(columns, KINDS[0])


def test_ranks_that_do_not_sample_have_no_logits() -> None:
    noted: list[Any] = []
    assert narrowed(lambda states: None, 3, noted.append)(torch.zeros(2, 4)) is None
    assert noted == []


def test_weights_of_automatic_dtype_stay_what_they_were_saved_in(folder: Path, tmp_path: Path) -> None:
    side = make_engine(VllmEndpoint(engine="vllm", model=str(folder)))
    assert isinstance(side, VllmEngine)
    assert fake_vllm.LLM.made.worker.model_runner.model.network.dtype == torch.float32


SETTINGS = [
    ({"rows_at_once": 99, "forward_tokens": 64}, "rows_at_once: got 99; expected at most forward_tokens, 64"),
    ({"follows_student": True, "quantization": "fp8"}, "quantization: got 'fp8'; expected 'none' where weights are published"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VllmEndpoint(engine="vllm", model="owner/model", **settings)
