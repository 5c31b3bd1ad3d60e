"""The contract of engines that write: whose ids they are, where texts end, and what a text depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, MambaConfig, MistralConfig, PreTrainedConfig

from cluster.config import FakeEndpoint, TransformersEndpoint, VllmEndpoint
from cluster.endpoints import check_written, make_engine
from cluster.engines import Columns, Engine, Follower, Writer
from cluster.engines.slots import Network, has_slots
from cluster.engines.transformers import TransformersEngine
from strategies.core import Sampling, ScoreRequest
from tests.cluster.fake_vllm import instead_of_vllm
from tests.tiny import tiny_model

VOCABULARY = 96
PROMPTS = [[5, 9, 11], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [40, 41], [8, 8, 8, 8, 8]]


def bundle(prompts: list[list[int]], ids: list[int] | None = None, limits: list[int] | None = None) -> Columns:
    own = {} if limits is None else {"max_new_tokens": np.asarray(limits, dtype=np.int32)}
    return {
        "tokens": np.asarray([t for p in prompts for t in p], dtype=np.int32),
        "lengths": np.asarray([len(p) for p in prompts], dtype=np.int32),
        "row_id": np.asarray(ids or range(len(prompts)), dtype=np.int64),
        **own,
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


ENGINES: list[Any] = ["transformers", "fake", "vllm"]


@pytest.fixture(params=ENGINES)
def writer(request: pytest.FixtureRequest, engine: TransformersEngine) -> Iterator[Writer]:
    with instead_of_vllm():
        made: dict[str, Callable[[], Engine]] = {
            "transformers": lambda: engine,
            "fake": lambda: make_engine(FakeEndpoint(engine="fake", vocabulary=VOCABULARY)),
            "vllm": lambda: make_engine(VllmEndpoint(engine="vllm", model=engine.config.model, dtype="float32")),
        }
        found = made[request.param]()
        assert isinstance(found, Writer)
        yield found


def test_a_text_belongs_to_its_row_and_sample_and_not_to_its_bundle(writer: Writer) -> None:
    sampling = Sampling(max_new_tokens=6, temperature=1.0, samples=3, stop=(0,))
    whole = writer.write(bundle(PROMPTS), sampling)
    check_written(bundle(PROMPTS), whole, 3, VOCABULARY)
    assert whole["row_id"].tolist() == [r for r in range(5) for _ in range(3)] and whole["sample"].tolist() == [0, 1, 2] * 5
    part = writer.write(bundle([PROMPTS[3], PROMPTS[1]], [3, 1]), sampling)
    assert texts(part) == texts(whole)[9:12] + texts(whole)[3:6]
    assert len({tuple(t) for t in texts(whole)}) > 5
    assert texts(writer.write(bundle(PROMPTS), Sampling(**{**vars(sampling), "seed": 1}))) != texts(whole)


def test_no_text_is_longer_than_its_row_allows(writer: Writer) -> None:
    limits = [2, 6, 1, 9, 4]
    sampling = Sampling(max_new_tokens=6, temperature=1.0, samples=2)
    written = writer.write(bundle(PROMPTS, limits=limits), sampling)
    check_written(bundle(PROMPTS), written, 2, VOCABULARY)
    most = np.repeat(np.minimum(limits, 6), 2)
    assert (written["lengths"] <= most).all() and not written["finished"].any()
    # what a row may be long changes nothing for the others
    other = writer.write(bundle(PROMPTS, limits=[2, 6, 1, 9, 1]), sampling)
    assert texts(other)[:8] == texts(written)[:8] and (other["lengths"][8:] == 1).all()


def test_samples_without_temperature_are_alike(writer: Writer) -> None:
    whole = texts(writer.write(bundle(PROMPTS), Sampling(max_new_tokens=6, samples=2, stop=(0,))))
    assert whole[0::2] == whole[1::2]


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_narrowest_draw_is_the_likeliest_token(engine: TransformersEngine, sampling: dict[str, Any]) -> None:
    drawn = engine.write(bundle(PROMPTS), Sampling(max_new_tokens=6, temperature=1.0, **sampling))
    assert texts(drawn) == texts(engine.write(bundle(PROMPTS), Sampling(max_new_tokens=6)))


@pytest.mark.parametrize(
    "limits",
    [{}, {"top_k": 5}, {"top_p": 0.5}, {"top_p": 0.97, "temperature": 4.0}, {"top_k": 80, "top_p": 0.9}, {"top_k": 3, "top_p": 0.9}],
)
def test_draws_follow_the_tempered_distribution(engine: TransformersEngine, limits: dict[str, Any]) -> None:
    count = 3000
    many = bundle([PROMPTS[0]], [0])
    sampling = Sampling(**{"max_new_tokens": 1, "temperature": 0.5, "samples": count, **limits})
    drawn = engine.write(many, sampling)["tokens"]
    with torch.no_grad():
        p = (engine.model(torch.tensor([PROMPTS[0]])).logits[0, -1] / sampling.temperature).softmax(-1).double()
    order = p.argsort(descending=True)
    kept = torch.zeros_like(p, dtype=torch.bool)
    below = torch.cumsum(p[order], 0) - p[order] < limits.get("top_p", 1.0)
    kept[order[below][: limits.get("top_k") or VOCABULARY]] = True
    expected = (p * kept / p[kept].sum()).numpy()
    shares = np.bincount(drawn, minlength=VOCABULARY) / count
    assert not shares[~kept.numpy()].any()
    assert np.abs(shares - expected).max() < 4 * np.sqrt(expected.max() / count)


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = LlamaConfig(**SMALL, **ENDS, num_key_value_heads=2)
GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ENDS)
SLIDING = MistralConfig(**SMALL, **ENDS, num_key_value_heads=2, sliding_window=8)
STATES = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, **ENDS)
UNPLACED = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **ENDS)


@pytest.mark.parametrize(
    ("config", "attention", "slots"),
    [
        (LLAMA, "sdpa", True),
        (LLAMA, "eager", True),
        (GPT2, "sdpa", True),
        (SLIDING, "sdpa", False),
        (STATES, "sdpa", False),
        (UNPLACED, "sdpa", False),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_architectures_write_what_a_plain_loop_does(config: PreTrainedConfig, attention: Any, slots: bool, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        # larger than by default, so that what a mask hides would change the texts
        AutoModelForCausalLM.from_config(type(config).from_dict({**config.to_dict(), "initializer_range": 0.2})).save_pretrained(tmp_path)
    settings = TransformersEndpoint(model=str(tmp_path), dtype="float32", forward_tokens=64, attention=attention)
    engine = TransformersEngine(settings, threads=1)
    assert has_slots(engine.model) == slots
    limits = [4, 12, 3, 9, 12]
    written = engine.write(bundle(PROMPTS, limits=limits), Sampling(max_new_tokens=10, stop=(2,)))
    expected = [greedy(engine, p, Sampling(max_new_tokens=min(10, m), stop=(2,))) for p, m in zip(PROMPTS, limits, strict=True)]
    assert texts(written) == [ids for ids, _ in expected]
    np.testing.assert_allclose(written["logprobs"], [v for _, values in expected for v in values], atol=1e-4)
    assert written["finished"].tolist() == [int(t[-1] == 2) for t in texts(written)]


def test_what_is_not_as_its_declaration_says_gets_no_slots(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_slots(engine.model)
    # positions counted from 0 in every forward, whatever was asked
    rotary: Any = engine.model.base_model.rotary_emb
    inner = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda states, places: inner(states, torch.arange(places.shape[1])[None].expand_as(places)))
    assert not has_slots(engine.model)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """`("read", prompts)` or `("step", live slots)` of every forward, as they come."""
    said: list[tuple[str, int]] = []
    read, step = Network.read, Network.step
    monkeypatch.setattr(Network, "read", lambda self, prompts, slots: said.append(("read", len(prompts))) or read(self, prompts, slots))
    monkeypatch.setattr(Network, "step", lambda self, tokens, sizes: said.append(("step", len(tokens))) or step(self, tokens, sizes))
    return said


def test_a_slot_is_refilled_as_soon_as_its_text_ends(engine: TransformersEngine, forwards: list[tuple[str, int]]) -> None:
    # 21 tokens at most, so that 64 leave room for 3 slots
    limits = [3, 1, 10, 3, 5]
    written = engine.write(bundle(PROMPTS, limits=limits), Sampling(max_new_tokens=10))
    assert written["lengths"].tolist() == limits and not written["finished"].any()
    # by falling length: rows 2 (10 tokens), 4 (5), 0 (3), then 3 (3) in the slot of row 0, and 1 (1), which ends as it is read
    steps = [("step", 3)] * 2 + [("read", 1)] + [("step", 3)] * 2 + [("read", 1)] + [("step", 1)] * 5
    assert forwards == [("read", 3), *steps]


def test_slots_that_fall_free_at_once_are_refilled_together(engine: TransformersEngine, forwards: list[tuple[str, int]]) -> None:
    engine.write(bundle([[n, 3, n] for n in range(8)]), Sampling(max_new_tokens=18))
    assert [n for kind, n in forwards if kind == "read"] == [3, 3, 2]


def test_a_wide_prompt_leaves_the_narrow_ones_their_slots(engine: TransformersEngine, forwards: list[tuple[str, int]]) -> None:
    prompts = [[3] * 60, *([n, 1] for n in range(12))]
    written = engine.write(bundle(prompts), Sampling(max_new_tokens=3))
    assert texts(written) == [greedy(engine, p, Sampling(max_new_tokens=3))[0] for p in prompts]
    assert [n for kind, n in forwards if kind == "read"] == [1, 12]


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.8}, {"top_k": 20}])
def test_draws_do_not_depend_on_the_number_of_slots(engine: TransformersEngine, limits: dict[str, Any]) -> None:
    sampling = Sampling(max_new_tokens=24, temperature=1.0, samples=4, stop=(0, 1, 2, 3, 4, 5), **limits)
    sides = [TransformersEngine(engine.config.model_copy(update={"forward_tokens": n}), threads=1) for n in (1, 100, 4096)]
    one, few, all_at_once = (side.write(bundle(PROMPTS), sampling) for side in sides)
    assert texts(one) == texts(few) == texts(all_at_once)
    assert len(set(one["lengths"].tolist())) > 1 and one["finished"].any()
    np.testing.assert_allclose(few["logprobs"], one["logprobs"], atol=1e-4)
    np.testing.assert_allclose(all_at_once["logprobs"], one["logprobs"], atol=1e-4)


def test_both_ways_draw_the_same_texts(engine: TransformersEngine) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=1.0, samples=3, stop=(0, 1, 2, 3))
    other = TransformersEngine(engine.config, threads=1)
    other._has_slots = False
    columns = bundle(PROMPTS, limits=[4, 12, 3, 9, 12])
    slots, batches = engine.write(columns, sampling), other.write(columns, sampling)
    assert texts(slots) == texts(batches) and slots["finished"].tolist() == batches["finished"].tolist()
    np.testing.assert_allclose(slots["logprobs"], batches["logprobs"], atol=1e-4)


@pytest.mark.parametrize("limits", [[1, 2, 3, 4, 0], [1, 2]])
def test_limits_that_fit_no_rows_are_refused(engine: TransformersEngine, limits: list[int]) -> None:
    with pytest.raises(ValueError, match="max_new_tokens: got"):
        engine.write(bundle(PROMPTS, limits=limits), Sampling())


def test_no_prompts_give_no_texts(engine: TransformersEngine) -> None:
    check_written(bundle([]), engine.write(bundle([]), Sampling()), 1, VOCABULARY)


@pytest.fixture
def follower(tmp_path: Path) -> TransformersEngine:
    tiny_model(tmp_path / "old", vocab_size=VOCABULARY, seed=3)
    return TransformersEngine(TransformersEndpoint(model=str(tmp_path / "old"), dtype="float32", forward_tokens=64), threads=1)


def test_published_weights_answer_from_then_on(follower: TransformersEngine, tmp_path: Path) -> None:
    assert isinstance(follower, Follower) and follower.version is None
    sampling, request = Sampling(max_new_tokens=6, temperature=1.0), ScoreRequest(kind="dense")
    columns = {**bundle(PROMPTS), "loss_mask": np.asarray([int(n > 0) for p in PROMPTS for n in range(len(p))], dtype=np.uint8)}
    before = follower.write(bundle(PROMPTS), sampling), follower.score(columns, request)
    new = tiny_model(tmp_path / "new", vocab_size=VOCABULARY, seed=4)
    weights = {name: values.double() for name, values in new.state_dict().items() if name != "lm_head.weight"}
    follower.publish(weights, 7)
    fresh = TransformersEngine(TransformersEndpoint(model=str(tmp_path / "new"), dtype="float32", forward_tokens=64), threads=1)
    assert follower.version == 7
    assert texts(follower.write(bundle(PROMPTS), sampling)) == texts(fresh.write(bundle(PROMPTS), sampling)) != texts(before[0])
    np.testing.assert_array_equal(follower.score(columns, request)["dense"], fresh.score(columns, request)["dense"])
    assert not np.allclose(follower.score(columns, request)["dense"], before[1]["dense"])
    assert {p.dtype for p in follower.model.parameters()} == {torch.float32}


FAULTS: dict[str, Any] = {
    r"got 1 missing: model.norm.weight;": lambda w: w.pop("model.norm.weight"),
    r"got 2 missing: lm_head.weight, model.embed_tokens.weight;": lambda w: [w.pop("lm_head.weight"), w.pop("model.embed_tokens.weight")],
    r"got 4 unexpected: a, b, c, \.\.\.;": lambda w: w.update(dict.fromkeys("dbca", torch.zeros(1))),
    r"got 1 of another shape: model.norm.weight;": lambda w: w.update({"model.norm.weight": torch.zeros(31)}),
}


@pytest.mark.parametrize("message", FAULTS)
def test_other_weights_are_refused_and_change_nothing(follower: TransformersEngine, message: str) -> None:
    before = {name: values.clone() for name, values in follower.model.state_dict().items()}
    weights = {name: values + 1 for name, values in before.items()}
    FAULTS[message](weights)
    with pytest.raises(ValueError, match=message):
        follower.publish(weights, 1)
    assert follower.version is None
    assert all(torch.equal(values, before[name]) for name, values in follower.model.state_dict().items())


def test_a_quantised_model_takes_no_weights(follower: TransformersEngine) -> None:
    weights = follower.model.state_dict()
    follower.config = follower.config.model_copy(update={"quantization": "int8"})
    with pytest.raises(ValueError, match="expected 'none' where weights are published"):
        follower.publish(weights, 1)


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
