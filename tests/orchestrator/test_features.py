"""Inner states inside a worker: what hooks collect, what frozen players say, what is trained beside the student, and where it stays."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from transformers import PreTrainedModel

from cluster.config import FakeEndpoint, TransformersEndpoint
from cluster.engines.transformers import TransformersEngine
from cluster.storage import Folder
from orchestrator import checkpoint, export
from orchestrator.config import Lora, StudentConfig
from orchestrator.errors import Refusal
from orchestrator.export import export_student
from orchestrator.frozen import FrozenPlayer, load_frozen_players
from orchestrator.microbatch import MicroBatch, cut, dummy
from orchestrator.models import StudentModule, load_student, make_filters
from orchestrator.players import load_players
from orchestrator.taps import recorded, tap_widths
from orchestrator.teachers import Teachers
from orchestrator.weights import load_weights
from strategies.core import AnyTerm, Columns, Player, Progress, StatesTerm, Term, lm_update
from strategies.objectives.features import GramMatrices, HiddenStates, Matched
from strategies.objectives.filtered import FilteredLayers, FilterTask
from strategies.objectives.likelihood import CrossEntropy
from strategies.objectives.relations import PARTS, Relations
from strategies.schedule import constant
from strategies.sources import TakeDense, TakeHidden, TakePerToken, TakeSampled, TakeTopK, Taught, scored_columns
from strategies.taps import OUTPUT, Layer, Tap, Tapped, Taps
from tests.checkpoints import recipe, save_models
from tests.orchestrator.networks import ARCHITECTURES, VOCABULARY, network
from tests.tiny import tiny_model

NOW = Progress(0, 1)
CPU = torch.device("cpu")
LENGTHS = [9, 3, 17, 0, 12, 6, 1, 14]
MIDDLE = HiddenStates(layers=("output", Matched(student=Layer(number=1), teacher=Layer(depth=0.5))))
TERMS: tuple[AnyTerm, ...] = (
    StatesTerm("hidden", MIDDLE, constant(1.0), "guide"),
    Term("ce", CrossEntropy(), constant(1.0)),
    StatesTerm("gram", GramMatrices(layers=(Layer(depth=0.5),)), constant(1.0), "guide"),
    StatesTerm("relations", Relations(heads=2), constant(1.0), "guide"),
    StatesTerm("task", FilterTask(layers=(Layer(depth=0.5),)), constant(1.0), "guide", filters="ted"),
    StatesTerm("match", FilteredLayers(layers=(Layer(depth=0.5),)), constant(1.0), "guide", filters="ted"),
)
SCALES = {"hidden": 0.7, "ce": 0.3, "gram": 2.0, "relations": 5.0, "task": 0.2, "match": 0.5}
PLAYERS = {"student": Player(), "guide": Player(model="guide", trained=False)}


def bundle(lengths: list[int] = LENGTHS, seed: int = 0) -> Columns:
    """Random rows with uneven masks and random weights on one term."""
    draw = np.random.default_rng(seed)
    mask = (draw.random(sum(lengths)) < 0.6).astype(np.uint8)
    ends = np.cumsum(lengths)
    mask[[e - n for e, n in zip(ends, lengths, strict=True) if n]] = 0
    return {
        "tokens": draw.integers(1, VOCABULARY, sum(lengths)).astype(np.int32),
        "lengths": np.asarray(lengths, dtype=np.int32),
        "loss_mask": mask,
        "weights/hidden": draw.random(int(mask.sum())).astype(np.float32),
    }


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guide")
    tiny_model(folder, vocab_size=VOCABULARY, width=24, layers=3, seed=5)
    return folder


@pytest.fixture(scope="module")
def frozen(guide: Path) -> dict[str, FrozenPlayer]:
    return {"guide": FrozenPlayer(TransformersEndpoint(model=str(guide)), CPU, packed=True)}


def micros_of(columns: Columns, batching: Literal["bucketed", "packed"] = "bucketed", tokens: int = 1000) -> list[MicroBatch]:
    return cut(columns, [], batching, tokens, 32)


def module_of(model: Any, frozen: dict[str, FrozenPlayer], seed: int = 0) -> StudentModule:
    read = {tap for t in TERMS if isinstance(t, StatesTerm) for tap in t.objective.taps.teacher}
    return StudentModule(model, chunk_tokens=7, filters=make_filters(model, TERMS, {"guide": frozen["guide"].widths(read)}, seed))


def learned(module: StudentModule, micros: list[MicroBatch], frozen: dict[str, FrozenPlayer], terms: tuple[AnyTerm, ...] = TERMS) -> Any:
    """Sums of the terms over all micro-batches, and the gradients of their scaled sum."""
    module.zero_grad()
    sums = torch.zeros(len(terms))
    for micro in micros:
        loss, parts, _ = module(Teachers(frozen=frozen).teach(micro, terms), terms, SCALES, NOW)
        loss.backward()
        sums += parts
    return sums, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


# What hooks collect


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_taps_are_the_hidden_states_that_transformers_gives(architecture: str) -> None:
    model = network(architecture)
    ids = torch.arange(12).reshape(2, 6)
    taps = [Tap("hidden", Layer(number=n)) for n in range(2)] + [OUTPUT]
    with recorded(model.base_model, taps) as found, torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states
    for number, tap in enumerate(taps):
        torch.testing.assert_close(found[tap], expected[number if number < 2 else -1], msg=str(tap))
    assert tap_widths(model, taps) == {tap: found[tap].shape[-1] for tap in taps}


def test_queries_keys_and_values_are_those_of_the_projections() -> None:
    model = network("qwen3")
    ids = torch.arange(12).reshape(2, 6)
    taps = [Tap(part, Layer(depth=1.0)) for part in PARTS]
    with recorded(model.base_model, taps) as found, torch.no_grad():
        states = model.base_model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    layer = model.base_model.layers[-1]
    read = layer.input_layernorm(states[-2])
    for tap, name in zip(taps, "qkv", strict=True):
        torch.testing.assert_close(found[tap], getattr(layer.self_attn, f"{name}_proj")(read))


@pytest.mark.parametrize(
    ("architecture", "tap", "words"),
    [
        ("gpt2", Tap("query", Layer(depth=1.0)), "query at depth 1: got a layer of GPT2Model without a module 'q_proj'"),
        ("qwen3", Tap("key", Layer(number=0)), "key of layer 0: got a layer of Qwen3Model without"),
        ("qwen3", Tap("hidden", Layer(number=3)), "layer number 3: got a network of 2 layers"),
    ],
)
def test_what_a_network_does_not_have_is_named(architecture: str, tap: Tap, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tap_widths(network(architecture), [tap])


# What is taught


@pytest.mark.parametrize("tokens", [1000, 40, 20, 1])
@pytest.mark.parametrize("batching", ["bucketed", "packed"])
def test_gradients_do_not_depend_on_how_a_bundle_is_cut(frozen: dict[str, FrozenPlayer], batching: Any, tokens: int) -> None:
    whole = learned(module_of(network("qwen3"), frozen), micros_of(bundle()), frozen)
    micros = [*micros_of(bundle(), batching, tokens), dummy()]
    sums, gradients = learned(module_of(network("qwen3"), frozen), micros, frozen)
    torch.testing.assert_close(sums, whole[0], rtol=1e-4, atol=1e-5)
    close(gradients, whole[1])
    assert (sums > 0).all() and all(g.abs().sum() > 0 for n, g in gradients.items() if n.startswith("filters"))


def test_recomputed_layers_give_the_same_gradients(frozen: dict[str, FrozenPlayer]) -> None:
    expected = learned(module_of(network("qwen3").train(), frozen), micros_of(bundle()), frozen)
    model = network("qwen3").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    found = learned(module_of(model, frozen), micros_of(bundle()), frozen)
    assert torch.equal(found[0], expected[0])
    close(found[1], expected[1])


def test_nothing_is_recorded_when_no_term_asks(frozen: dict[str, FrozenPlayer], monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of(network("qwen3"), frozen)
    hooks: list[object] = []
    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", lambda self, hook, **given: hooks.append(hook))
    micro = Teachers(frozen=frozen).teach(micros_of(bundle())[0], TERMS[1:2])
    module(micro, TERMS[1:2], SCALES, NOW)[0].backward()
    assert not hooks and not micro.taught
    assert all(p.grad is not None and not p.grad.any() for p in module.filters.parameters())  # DDP waits for them


def test_states_alone_give_every_weight_a_gradient(frozen: dict[str, FrozenPlayer]) -> None:
    module = module_of(network("llama"), frozen)
    _, gradients = learned(module, micros_of(bundle()), frozen, TERMS[3:4])
    assert gradients.keys() == {name for name, _ in module.named_parameters()}
    assert gradients["model.lm_head.weight"].abs().sum() == 0 < gradients["model.model.embed_tokens.weight"].abs().sum()


def test_the_same_network_teaches_nothing(tmp_path: Path) -> None:
    tiny_model(tmp_path, vocab_size=VOCABULARY)
    same = {"guide": FrozenPlayer(TransformersEndpoint(model=str(tmp_path)), CPU)}
    hidden = StatesTerm("hidden", HiddenStates(layers=("output", Layer(number=1))), constant(1.0), "guide")
    terms = (hidden, *(t for t in TERMS if t.name in ("gram", "relations", "match")))
    student = load_student(StudentConfig(model=str(tmp_path)), gradient_checkpointing=False, seed=0)
    widths = {"guide": same["guide"].widths({tap for t in terms for tap in t.objective.taps.teacher})}  # type: ignore[union-attr]
    sums, gradients = learned(StudentModule(student, filters=make_filters(student, terms, widths, 0)), micros_of(bundle()), same, terms)
    assert sums.abs().max() < 1e-5 and all(g.abs().max() < 1e-5 for g in gradients.values())


def test_filters_are_drawn_from_the_seed_and_take_the_students_dtype(frozen: dict[str, FrozenPlayer]) -> None:
    model = network("qwen3")
    before = torch.random.get_rng_state()
    first, again, other = (module_of(model, frozen, seed).filters.state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(first) == [f"{n}.weight" for n in ("hidden/0", "hidden/1", "ted/student0", "ted/teacher0")]
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert [n for n in first if torch.equal(first[n], other[n])] == ["ted/teacher0.weight"]  # the identity
    assert {p.dtype for p in module_of(model.bfloat16(), frozen).filters.parameters()} == {torch.bfloat16}


# How hard terms pull


@dataclass(frozen=True)
class CrossEntropyFromStates:
    """The cross-entropy, told as a term on inner states with an output head of its own."""

    head: Tensor

    @property
    def taps(self) -> Taps:
        return Taps((OUTPUT,), (OUTPUT,))

    def filters(self, student: Any, teacher: Any) -> dict[str, Any]:
        return {}

    def compare(self, student: Tapped, teacher: Tapped, filters: Any, weights: Tensor, progress: Progress) -> Tensor:
        assert student.labels is not None
        logits = student.tokens(OUTPUT) @ self.head.T
        return (torch.nn.functional.cross_entropy(logits, student.labels, reduction="none") * weights).sum()


def test_terms_on_states_and_on_logits_pull_in_one_currency(frozen: dict[str, FrozenPlayer]) -> None:
    model = network("qwen3")
    told = StatesTerm("told", CrossEntropyFromStates(model.lm_head.weight.detach()), constant(1.0), "guide")
    terms: tuple[AnyTerm, ...] = (told, TERMS[1])
    micro = Teachers(frozen=frozen).teach(micros_of(bundle())[0], terms)
    _, _, pulls = StudentModule(model)(micro, terms, {"told": 0.3, "ce": 0.3}, NOW)
    torch.testing.assert_close(pulls[0], pulls[1], rtol=1e-4, atol=0)
    assert pulls[0] > 0


def test_every_term_pulls_in_its_measure_and_changes_no_gradient(frozen: dict[str, FrozenPlayer], monkeypatch: pytest.MonkeyPatch) -> None:
    module, micro = module_of(network("qwen3"), frozen), Teachers(frozen=frozen).teach(micros_of(bundle())[0], TERMS)
    pulls = module(micro, TERMS, SCALES, NOW)[2]
    assert ((pulls > 0) == torch.tensor([t.name != "task" for t in TERMS])).all()  # that one moves its filters alone
    doubled = module(micro, TERMS, SCALES | {"relations": 10.0}, NOW)[2]
    torch.testing.assert_close(doubled, pulls * torch.tensor([1, 1, 1, 4, 1, 1]))
    measured = learned(module_of(network("qwen3"), frozen), micros_of(bundle()), frozen)
    monkeypatch.setattr("orchestrator.models.states_pull", lambda scaled, student: torch.zeros(()))
    plain = learned(module_of(network("qwen3"), frozen), micros_of(bundle()), frozen)
    assert all(torch.equal(measured[1][n], g) for n, g in plain[1].items())


def test_nobody_pulls_alone_or_without_gradients(frozen: dict[str, FrozenPlayer]) -> None:
    module, micro = module_of(network("qwen3"), frozen), Teachers(frozen=frozen).teach(micros_of(bundle())[0], TERMS)
    assert not module(micro, TERMS[:1], SCALES, NOW)[2].any()
    with torch.no_grad():
        assert not module(micro, TERMS, SCALES, NOW)[2].any()


# What a frozen player says


TAKES = [TakeTopK(top_k=5), TakeDense(), TakeSampled(draws=4, exponent=0.8), TakeHidden(), TakePerToken()]


@pytest.mark.parametrize("batching", ["bucketed", "packed"])
@pytest.mark.parametrize("vocabulary", [None, VOCABULARY - 6])
@pytest.mark.parametrize("take", TAKES, ids=lambda t: t.type)
def test_a_frozen_player_says_what_a_stage_scores(guide: Path, take: Any, batching: Any, vocabulary: int | None) -> None:
    config = TransformersEndpoint(model=str(guide), max_dropped_mass=1.0)
    columns = {**bundle(), "tokens": bundle()["tokens"] % (VOCABULARY - 6)}
    scored = TransformersEngine(config, vocabulary).score(columns, take.request)
    columns |= {f"far/{name}": values for name, values in scored.items()}
    sources = {"far": Taught(take, endpoint="guide"), "near": Taught(take, player="guide")}
    players = {"guide": Player(model="guide", trained=False)}
    teachers = Teachers.load(players, sources, {"guide": config}, vocabulary, batching == "packed", CPU)
    terms = tuple(Term(name, CrossEntropy(), constant(1.0), name) for name in sources)
    for micro in cut(columns, scored_columns(sources), batching, 40, 32):
        with torch.autocast("cpu", torch.bfloat16):
            signals = teachers.teach(micro, terms).signals
        far, near = vars(signals["far"]), vars(signals["near"])
        for name in (n for n in far if isinstance(far[n], Tensor)):
            torch.testing.assert_close(near[name], far[name], rtol=1e-4, atol=1e-5)
        if take.type == "hidden":
            assert len(far["head"].weight) == len(near["head"].weight) == (vocabulary or VOCABULARY)


def test_a_frozen_player_may_not_lose_mass_on_ids_that_the_student_lacks(guide: Path) -> None:
    sources, endpoints = {"near": Taught(TakeDense(), player="guide")}, {"guide": TransformersEndpoint(model=str(guide))}
    teachers = Teachers.load({"guide": Player(model="guide", trained=False)}, sources, endpoints, VOCABULARY - 6, False, CPU)
    with pytest.raises(ValueError, match=r"ids that the student lacks.*max_dropped_mass"):
        teachers.teach(micros_of(bundle())[0], (Term("near", CrossEntropy(), constant(1.0), "near"),))


def test_a_frozen_player_keeps_its_own_dtype_and_makes_no_gradient(guide: Path) -> None:
    player = FrozenPlayer(TransformersEndpoint(model=str(guide), dtype="bfloat16"), CPU)
    micro = micros_of(bundle())[0]
    plain = player.taps(micro, [OUTPUT]).tokens(OUTPUT)
    with torch.enable_grad(), torch.autocast("cpu", torch.float16):
        inside = player.taps(micro, [OUTPUT]).tokens(OUTPUT)
    assert plain.dtype == torch.bfloat16 and torch.equal(plain, inside)
    assert not (inside.requires_grad or player.model.training or any(p.requires_grad for p in player.model.parameters()))


@pytest.mark.parametrize("take", TAKES, ids=lambda t: t.type)
def test_a_frozen_player_has_nothing_to_say_of_an_empty_micro_batch(frozen: dict[str, FrozenPlayer], take: Any) -> None:
    teachers = Teachers({"near": Taught(take, player="guide")}, frozen=frozen)
    empty = teachers.teach(dummy(), (Term("near", CrossEntropy(), constant(1.0), "near"),))
    assert not empty.signals and not empty.loss_tokens


def test_an_endpoint_without_a_network_cannot_be_a_player() -> None:
    with pytest.raises(Refusal, match="an engine without a network"):
        load_frozen_players(PLAYERS, {"guide": FakeEndpoint(engine="fake", vocabulary=9)}, None, False, CPU)


# Where filters stay


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_a_checkpoint_holds_filters_and_an_export_does_not(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, int] | None
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(export, "prove_export", lambda *given: 0.0)
    run = recipe(models, lora=lora)
    frozen = {"guide": FrozenPlayer(TransformersEndpoint(model=str(models / "untied")), CPU)}
    update = lm_update(StatesTerm("hidden", HiddenStates(), constant(1.0), "guide"))
    players = load_players(run, PLAYERS, CPU, (update,), frozen)
    assert list(players) == ["student"]
    with torch.no_grad():
        next(iter(players["student"].module.filters.parameters())).fill_(3.0)
    saved = checkpoint.save(players, checkpoint.Position(7, 1, {}), 0).path
    assert "student.model.filters.hidden/0.weight" in FileSystemReader(saved).read_metadata().state_dict_metadata
    again = load_players(run, PLAYERS, CPU, (update,), frozen)
    checkpoint.restore(again, checkpoint_of(saved))
    assert (again["student"].module.filters["hidden/0"].weight == 3.0).all()
    folder = export_student(run, Folder(saved), tmp_path / "out", lineage={"run": "x"})
    assert not any("filter" in name for name in load_file(folder / "model.safetensors"))
    load_weights(Folder(saved), "student", load_student(run.student, gradient_checkpointing=False, seed=0))


def checkpoint_of(path: str) -> Any:
    from ray.train import Checkpoint

    return Checkpoint.from_directory(path)


def test_filters_that_are_shared_must_be_alike(frozen: dict[str, FrozenPlayer]) -> None:
    kinds = {"a": HiddenStates(), "b": HiddenStates(filter="gelu-linear")}
    terms = [StatesTerm(name, kind, constant(1.0), "guide", filters="one") for name, kind in kinds.items()]
    with pytest.raises(ValueError, match="filters 'one/0': got terms that make them differently"):
        make_filters(network("qwen3"), terms, {"guide": frozen["guide"].widths([OUTPUT])}, 0)


def test_filters_train_beside_an_adapter(models: Path) -> None:
    student = load_student(StudentConfig(model=str(models / "tied"), lora=Lora(r=2)), gradient_checkpointing=False, seed=0)
    frozen = {"guide": FrozenPlayer(TransformersEndpoint(model=str(models / "untied")), CPU)}
    module = module_of(student, frozen)
    _, gradients = learned(module, micros_of(bundle()), frozen)
    assert {n for n in gradients if "lora" not in n} == {f"filters.{n}" for n in module.filters.state_dict()}


def test_a_model_that_is_no_language_model_of_layers_is_named() -> None:
    model: PreTrainedModel = network("qwen3")
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="no list of its 7 layers"):
        tap_widths(model, [Tap("hidden", Layer(depth=0.5))])
