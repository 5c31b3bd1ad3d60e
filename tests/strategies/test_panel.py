"""Several teachers of the same rows: who is asked, how much each counts, and what is made of their answers; against float64 references."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.blend import Blend
from strategies.core import Columns, ScoreRequest, Stage, Strategy
from strategies.domains import domain_id
from strategies.multi_teacher import MultiTeacher
from strategies.objectives.divergence import ForwardKL
from strategies.schedule import Steps
from strategies.signals import TopK
from strategies.sources import Blended
from strategies.stages import ask, panel
from strategies.stages.ask import Ask
from strategies.stages.panel import GATE, Choose, Gate, Member, OfDomains, answer_of
from strategies.stages.support import SharedSupport, on_support, union, with_vocabulary
from tests.strategies.families import loss_and_gradient, student

V, K = 12, 3
TOPK, DENSE = ScoreRequest("topk", top_k=K), ScoreRequest("dense")


@dataclass
class Teacher:
    """Answers with probabilities hashed from its seed and the token; fails as often as it is told to."""

    seed: int
    failures: int = 0
    asked: list[Columns] = field(default_factory=list)

    def score(self, columns: Columns, request: ScoreRequest) -> Columns:
        self.asked.append(columns)
        if self.failures:
            self.failures -= 1
            raise ConnectionError("nobody there")
        labels = columns["tokens"][columns["loss_mask"].astype(bool)]
        log_p = np.log(self.probabilities(labels))
        ids = np.argsort(-log_p, -1)[:, : request.top_k]
        answers = {"ids": ids.astype(np.int32).ravel(), "logprobs": np.take_along_axis(log_p, ids, -1).astype(np.float32).ravel()}
        own = answers if request.kind == "topk" else {"dense": log_p.astype(np.float32).ravel()}
        label = np.take_along_axis(log_p, labels[:, None].astype(np.int64), -1)[:, 0].astype(np.float32)
        return {**own, "logprob": label, "dropped_mass": np.zeros(1, np.float32)}

    def probabilities(self, labels: np.ndarray) -> np.ndarray:
        """`(N, V)` float64."""
        return (
            np.stack([np.random.default_rng((self.seed, int(t))).dirichlet(np.ones(V)) for t in labels])
            if len(labels)
            else np.zeros((0, V))
        )


def bundle(step: int = 1, domains: tuple[str, ...] = ("code", "prose", "code")) -> Columns:
    """Rows of 4 tokens, of which the last 2 are loss tokens."""
    rows = len(domains)
    return {
        "tokens": np.random.default_rng(0).integers(0, V, 4 * rows).astype(np.int32),
        "lengths": np.full(rows, 4, np.int32),
        "loss_mask": np.tile([0, 0, 1, 1], rows).astype(np.uint8),
        "row_id": np.arange(rows),
        "domain": np.asarray([domain_id(d) for d in domains]),
        "step": np.asarray([step]),
        "steps": np.asarray([10]),
    }


def labels_of(columns: Columns) -> np.ndarray:
    return columns["tokens"][columns["loss_mask"].astype(bool)]


def through(columns: Columns, *stages: tuple[Stage, Teacher | None]) -> Columns:
    for stage, endpoint in stages:
        before = set(columns)
        assert stage.needs <= before
        columns = stage(columns, endpoint)
        assert stage.adds <= set(columns)
    return columns


@pytest.mark.parametrize("request_", [TOPK, DENSE])
def test_a_teacher_is_asked_about_its_own_domains_and_knows_nothing_of_the_rest(request_: ScoreRequest) -> None:
    teacher, columns = Teacher(1), bundle()
    found = through(columns, (Ask("a", "a", request_, domains=("code",)), teacher))
    (asked,) = teacher.asked
    assert asked["row_id"].tolist() == [0, 2] and asked["lengths"].tolist() == [4, 4] and len(asked["tokens"]) == 8
    assert found["a/answered"].tolist() == [1, 0, 1] and found["count/unanswered/a"].tolist() == [0]
    name = "logprobs" if request_.kind == "topk" else "dense"
    width = K if request_.kind == "topk" else V
    whole = Teacher(1).score(columns, request_)
    given, wanted = found[f"a/{name}"].reshape(6, width), whole[name].reshape(6, width)
    np.testing.assert_array_equal(given[[0, 1, 4, 5]], wanted[[0, 1, 4, 5]])
    np.testing.assert_allclose(np.exp(given[2:4]).sum(-1), K / (K + 1) if request_.kind == "topk" else 1.0, rtol=1e-6)


def test_held_out_rows_are_asked_of_everybody_and_nobody_is_asked_at_steps_without_a_weight() -> None:
    stage = Ask("a", "a", TOPK, domains=("code",), weight=Steps(steps=((0, 0.0), (5, 1.0))))
    for step, asked in ((0, 3), (5, 0), (6, 2)):
        teacher = Teacher(1)
        found = through(bundle(step), (stage, teacher))
        assert sum(len(c["lengths"]) for c in teacher.asked) == asked == found["a/answered"].sum()


def test_who_does_not_answer_stops_the_run_is_waited_for_or_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "PATIENCE_SECONDS", (0.0, 0.0))
    with pytest.raises(ConnectionError):
        through(bundle(), (Ask("a", "a", TOPK), Teacher(1, failures=1)))
    waiting = through(bundle(), (Ask("a", "a", TOPK, on_failure="wait"), Teacher(1, failures=3)))
    np.testing.assert_array_equal(waiting["a/logprobs"], Teacher(1).score(bundle(), TOPK)["logprobs"])
    without = Ask("a", "a", TOPK, on_failure="reweight")
    found = through(bundle(), (without, Teacher(1, failures=1)))
    assert found["a/answered"].tolist() == [0, 0, 0] and found["count/unanswered/a"].tolist() == [3]
    assert through(bundle(0), (without, Teacher(1, failures=2)))["a/answered"].all()  # what measures is never made up


def scored(request_: ScoreRequest, columns: Columns | None = None, **asks: Ask) -> tuple[Columns, dict[str, np.ndarray]]:
    """Answers of two teachers, and their probabilities `(N, V)`."""
    columns = columns or bundle()
    teachers = {"a": Teacher(1), "b": Teacher(2)}
    found = through(columns, *((asks.get(n, Ask(n, n, request_)), t) for n, t in teachers.items()))
    return found, {n: t.probabilities(labels_of(columns)) for n, t in teachers.items()}


def gated(columns: Columns, gate: Gate) -> np.ndarray:
    """Shares `(N, 2)`."""
    found = through(columns, (gate, None))
    return np.stack([found[GATE + n] for n in gate.members], -1)


@pytest.mark.parametrize("by", ["cross-entropy", "entropy", "confidence"])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 7.0])
def test_shares_are_weights_times_the_exponential_of_the_score(by: str, sharpness: float) -> None:
    columns, p = scored(DENSE)
    members = {"a": Member(lambda _: 2.0), "b": Member(lambda _: 1.0)}
    labels = labels_of(columns)
    score = {
        "cross-entropy": lambda x: np.log(x[np.arange(6), labels]),
        "entropy": lambda x: (x * np.log(x)).sum(-1),
        "confidence": lambda x: x.max(-1),
    }[by]
    weights = np.stack([2.0 * np.exp(sharpness * score(p["a"])), np.exp(sharpness * score(p["b"]))], -1)
    shares = gated(columns, Gate(members, by, sharpness))  # type: ignore[arg-type]
    np.testing.assert_allclose(shares, weights / weights.sum(-1, keepdims=True), rtol=1e-5)
    best = gated(columns, Gate(members, by, best=True))  # type: ignore[arg-type]
    assert best.argmax(-1).tolist() == np.stack([score(p["a"]), score(p["b"])], -1).argmax(-1).tolist()
    assert set(best.ravel().tolist()) == {0.0, 1.0}


def test_the_entropy_of_top_k_answers_takes_the_rest_as_one_token() -> None:
    columns, p = scored(TOPK)
    kept = np.sort(p["a"], -1)[:, ::-1][:, :K]
    whole = np.concatenate([kept, 1 - kept.sum(-1, keepdims=True)], -1)
    np.testing.assert_allclose(panel.SCORES["entropy"](answer_of(columns, "a")), (whole * np.log(whole)).sum(-1), rtol=1e-5)


def test_tokens_that_a_whole_answer_rules_out_add_nothing_to_its_entropy() -> None:
    log_p = np.log(np.asarray([[0.5, 0.5, 1e-300]], dtype=np.float64))
    log_p[0, 2] = -np.inf
    assert panel.SCORES["entropy"](panel.Answer(np.zeros(1), log_p))[0] == pytest.approx(np.log(0.5))


def test_rows_go_to_the_teachers_of_their_domain_and_teach_nothing_without_one() -> None:
    columns, _ = scored(TOPK, bundle(domains=("code", "prose", "maths")), b=Ask("b", "b", TOPK, domains=("prose",)))
    gate = Gate({"a": Member(domains=("code",)), "b": Member(domains=("prose",))}, terms=("kd",))
    found = through({**columns, "weights/kd": np.full(6, 0.5, np.float32)}, (gate, None))
    assert found["gate/a"].tolist() == [1, 1, 0, 0, 0, 0] and found["gate/b"].tolist() == [0, 0, 1, 1, 0, 0]
    assert found["weights/kd"].tolist() == [0.5] * 4 + [0, 0]
    assert found["count/taught_tokens/a"].tolist() == [2] == found["count/taught_tokens/b"].tolist()
    apart = through(columns, (replace(gate, terms=(), member_terms={"a": "kd-a", "b": "kd-b"}), None))
    assert apart["weights/kd-b"].tolist() == [0, 0, 1, 1, 0, 0]


def test_a_term_of_one_domain_counts_on_its_rows_and_keeps_their_weights() -> None:
    columns = {**bundle(), "weights/spans": np.full(6, 0.5, np.float32)}
    assert through(columns, (OfDomains("spans", ("prose",)), None))["weights/spans"].tolist() == [0, 0, 0.5, 0.5, 0, 0]
    assert through(columns, (OfDomains("new", ("code",)), None))["weights/new"].tolist() == [1, 1, 0, 0, 1, 1]


def test_who_did_not_answer_leaves_its_share_to_the_others() -> None:
    columns = through(bundle(), (Ask("a", "a", TOPK, on_failure="reweight"), Teacher(1, failures=1)), (Ask("b", "b", TOPK), Teacher(2)))
    assert gated(columns, Gate({"a": Member(lambda _: 9.0), "b": Member()})).tolist() == [[0, 1]] * 6


@pytest.mark.parametrize("request_", [TOPK, DENSE])
def test_one_answer_of_many_is_that_of_whoever_counts_most(request_: ScoreRequest) -> None:
    columns, p = scored(request_)
    names = ("ids", "logprobs", "logprob") if request_.kind == "topk" else ("dense", "logprob")
    found = through(
        columns, (Gate({"a": Member(), "b": Member()}, "confidence", best=True), None), (Choose("panel", ("a", "b"), names), None)
    )
    first = p["a"].max(-1) >= p["b"].max(-1)
    for name in names:
        a, b, chosen = (found[f"{who}/{name}"].reshape(6, -1) for who in ("a", "b", "panel"))
        np.testing.assert_array_equal(chosen, np.where(first[:, None], a, b))


def test_a_teacher_asked_nothing_leaves_dense_answers_as_wide_as_the_others() -> None:
    columns, _ = scored(DENSE, a=Ask("a", "a", DENSE, weight=lambda _: 0.0))
    gate = Gate({"a": Member(lambda _: 0.0), "b": Member()})
    found = through(columns, (gate, None), (Choose("panel", ("a", "b"), ("dense", "logprob")), None))
    np.testing.assert_array_equal(found["panel/dense"], found["b/dense"])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 12), st.integers(0, 1000))
def test_a_union_has_every_id_once_in_its_order_and_then_the_lowest_others(rows: int, width: int, most: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 12, (rows, width))
    for given_, found in zip(ids.tolist(), union(ids, most).tolist(), strict=True):
        wanted = list(dict.fromkeys([*given_, *range(most + width)]))[:most]
        assert found == wanted


def test_what_a_teacher_did_not_name_has_an_even_part_of_its_rest() -> None:
    columns, p = scored(TOPK)
    ids = columns["a/ids"].reshape(6, K).astype(np.int64)
    every = np.broadcast_to(np.arange(V), (6, V))
    found = np.exp(on_support(every, ids, columns["a/logprobs"].reshape(6, K), V))
    np.testing.assert_allclose(found.sum(-1), 1.0, rtol=1e-6)
    for row in range(6):
        rest = np.setdiff1d(np.arange(V), ids[row])
        np.testing.assert_allclose(found[row, ids[row]], p["a"][row, ids[row]], rtol=1e-6)
        np.testing.assert_allclose(found[row, rest], p["a"][row, rest].sum() / len(rest), rtol=1e-5)


@pytest.mark.parametrize("kind", ["mixture", "product"])
def test_top_k_answers_are_blended_on_shared_ids(kind: str) -> None:
    columns, p = scored(TOPK)
    (shared,) = with_vocabulary(Strategy({}, (), (SharedSupport(("a", "b"), "panel/"),)), V).stages
    found = through(columns, (Gate({"a": Member(lambda _: 3.0), "b": Member()}), None), (shared, None))

    def even(name: str) -> np.ndarray:
        """Its probabilities `(N, V)`, with an even rest."""
        ids, rows = columns[f"{name}/ids"].reshape(6, K), np.arange(6)[:, None]
        known = p[name][rows, ids]
        whole = np.repeat((1 - known.sum(-1, keepdims=True)) / (V - K), V, -1)
        whole[rows, ids] = known
        return whole

    mixed = 0.75 * even("a") + 0.25 * even("b") if kind == "mixture" else even("a") ** 0.75 * even("b") ** 0.25
    mixed /= mixed.sum(-1, keepdims=True)
    ids = torch.from_numpy(found["panel/a/ids"].reshape(6, -1)).long()
    members = {n: TopK(ids, torch.from_numpy(found[f"panel/{n}/logprobs"].reshape(6, -1))) for n in ("a", "b")}
    gates = {GATE + n: torch.from_numpy(found[GATE + n])[:, None] for n in ("a", "b")}
    signal = Blended({"a": "gate/a", "b": "gate/b"}, kind).of(members, gates)  # type: ignore[arg-type]
    assert isinstance(signal, Blend)
    log_q, log_p = signal.pair(student(np.zeros((6, V), np.float32)), 1.0)
    on_ids = np.take_along_axis(mixed, ids.numpy(), -1)
    np.testing.assert_allclose(log_p.exp().numpy()[:, :-1], on_ids, rtol=1e-4)
    np.testing.assert_allclose(log_p.exp().sum(-1).numpy(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(log_q.detach().exp().sum(-1).numpy(), 1.0, rtol=1e-5)


def test_members_count_alike_where_nobody_does_so_that_nothing_is_infinite() -> None:
    ids = torch.arange(V).expand(2, V)
    a, b = (TopK(ids, torch.log_softmax(torch.randn(2, V, generator=torch.Generator().manual_seed(s)), -1)) for s in (1, 2))
    none = {"gate/a": torch.tensor([[0.0], [1.0]]), "gate/b": torch.zeros(2, 1)}
    signal = Blended({"a": "gate/a", "b": "gate/b"}).of({"a": a, "b": b}, none)
    loss, gradient = loss_and_gradient(ForwardKL(), np.zeros((2, V), np.float32), signal)
    assert np.isfinite(loss) and np.isfinite(gradient).all()


def test_copies_of_a_teacher_teach_what_one_does() -> None:
    z = np.random.default_rng(5).normal(size=(6, V)).astype(np.float32)
    one = TopK(torch.from_numpy(np.argsort(-z, -1)[:, :K].copy()), torch.zeros(6, K))
    log_p = torch.log_softmax(torch.from_numpy(z), -1)
    one = replace(one, logprobs=log_p.gather(-1, one.ids))
    gates = {"gate/a": torch.full((6, 1), 0.3), "gate/b": torch.full((6, 1), 0.7)}
    for kind in ("mixture", "product"):
        blend = Blended({"a": "gate/a", "b": "gate/b"}, kind).of({"a": one, "b": one}, gates)  # type: ignore[arg-type]
        alone, together = (loss_and_gradient(ForwardKL(), np.zeros((6, V), np.float32), s) for s in (one, blend))
        np.testing.assert_allclose(together[0], alone[0], rtol=1e-5)
        np.testing.assert_allclose(together[1], alone[1], rtol=1e-4, atol=1e-7)


def test_the_settings_say_what_is_combined_before_training() -> None:
    def stages(**more: object) -> list[str]:
        made = MultiTeacher.model_validate({"type": "multi-teacher", "teachers": ["a", "b"], **more}).build()
        return [type(s).__name__ for s in made.stages if s.endpoint is None]

    apart = {"a": {"domains": ["x"]}, "b": {"domains": ["y"]}}
    assert stages() == ["Gate", "SharedSupport"] == stages(combine="product", gate="entropy")
    assert stages(take="dense") == ["Gate"] == stages(combine="sum")
    assert stages(gate={"by": "entropy", "best": True}) == ["Gate", "Choose"] == stages(teachers=apart)
    assert stages(teachers={**apart, "c": {"domains": ["x"]}}) == ["Gate", "SharedSupport"]
    assert "Rollout" in [type(s).__name__ for s in MultiTeacher.model_validate({"teachers": ["a"], "student_share": 0.5}).build().stages]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"teachers": []}, "at least 1"),
        ({"teachers": ["panel"]}, "another name"),
        ({"teachers": {"a": {"weight": -1.0}}}, "0 or more"),
        ({"teachers": ["a"], "gate": {"best": True}}, "who is best"),
        ({"teachers": ["a"], "foreign": ["a"]}, "not in both"),
        ({"teachers": ["a"], "objective": "cross-entropy"}, "compares distributions"),
        ({"teachers": ["a"], "take": {"type": "topk", "tail": "drop"}}, "bucket"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MultiTeacher.model_validate({"type": "multi-teacher", **wrong})
