"""What a version of the student carries: averages, an adapter and its base; and who takes what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor, nn

from orchestrator.adapters import apart, merged
from orchestrator.board import open_board
from orchestrator.config import LayoutConfig, Lora, StudentConfig
from orchestrator.following import average_rates, freshness, weight_sets
from orchestrator.layouts import Numerics, make_layout
from orchestrator.models import StudentModule, load_student
from orchestrator.published import Average, published_adapter, published_base, published_weights
from orchestrator.versions import BASE_WEIGHTS, BEGINNING, FollowingEngine, Freshness, Parcel, Publisher, kept_versions
from strategies import STRATEGIES
from strategies.core import Columns
from tests.orchestrator.networks import network
from tests.tiny import tiny_model

RATE = 0.25


class Counting:
    """A layout whose one weight is what a test says."""

    def __init__(self) -> None:
        self.value = 4.0

    def gathered(self, trained: bool = False) -> dict[str, Tensor]:
        return {"model.w": torch.full((2,), self.value)}


class Taking:
    """An engine that remembers the weights it was given."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.versions: list[int] = []

    def publish(self, weights: dict[str, Tensor], version: int) -> None:
        self.weights = dict(weights)
        self.versions.append(version)

    def score(self, columns: Columns, request: Any) -> Columns:
        return {}


def bundle(step: int, **more: int) -> Columns:
    return {name: np.asarray([value]) for name, value in {"step": step, "attempt": 1, **more}.items()}


def averaging() -> Parcel:
    return Parcel(averages={"self": Average(RATE)})


@pytest.fixture
def board(ray_session: str, request: pytest.FixtureRequest) -> Any:
    made = open_board(request.node.name)
    ray.get(made.begin.remote(1, 0, 0.0))
    yield made
    ray.kill(made)


def by_hand(values: list[float]) -> list[float]:
    """The average after each step, from the student's weight at the beginning and after each."""
    found = [values[0]]
    for value in values[1:]:
        found.append((1 - RATE) * found[-1] + RATE * value)
    return found


def test_every_version_carries_the_average_as_of_its_step_and_goes_on_after_a_checkpoint(board: Any, tmp_path: Path) -> None:
    values = [4.0, 8.0, 1.0, 3.0, 5.0]
    layout, publisher = Counting(), Publisher(board, Counting(), 0, 2, averaging())  # type: ignore[arg-type]
    publisher._layout = layout  # type: ignore[assignment]
    publisher.begin(1, 0, {})
    for step, layout.value in enumerate(values[1:4], start=1):
        publisher.publish(step)
    publisher.keep(tmp_path)
    publisher.end()
    teacher = Taking()
    following = FollowingEngine(teacher, Freshness(2, False, board, weights="self"))  # type: ignore[arg-type]
    for step in (4, 5, 6):
        following.follow(bundle(step))
        assert teacher.weights["w"].tolist() == [by_hand(values)[step - 3]] * 2
    kept = kept_versions(tmp_path)
    assert {step: sorted(sets) for step, sets in kept.items()} == {1: ["self", "student"], 2: ["self", "student"], 3: ["self"]}

    again = Publisher(board, layout, 0, 2, averaging())  # type: ignore[arg-type]
    again.begin(1, 3, kept)
    layout.value = values[4]
    again.publish(4)
    again.end()
    following = FollowingEngine(teacher, Freshness(2, False, board, weights="self"))  # type: ignore[arg-type]
    for step in (5, 6, 7):
        following.follow(bundle(step))
        assert teacher.weights["w"].tolist() == [by_hand(values)[step - 3]] * 2


def test_held_out_rows_are_scored_by_the_student_as_it_began(board: Any) -> None:
    layout, publisher = Counting(), Publisher(board, Counting(), 0, 0, averaging())  # type: ignore[arg-type]
    publisher._layout = layout  # type: ignore[assignment]
    publisher.begin(1, 0, {})
    layout.value = 8.0
    publisher.publish(1)
    publisher.publish(2)
    teacher = Taking()
    following = FollowingEngine(teacher, Freshness(0, False, board, weights="self"))  # type: ignore[arg-type]
    assert following.follow(bundle(0))["policy_version"].tolist() == [BEGINNING]
    assert teacher.weights["w"].tolist() == [4.0, 4.0]
    publisher.settled()
    publisher.publish(3)
    assert BEGINNING not in ray.get(board.version.remote(1, None))[1]
    publisher.end()


def test_a_teacher_follows_to_the_version_that_wrote_the_rows(board: Any) -> None:
    publisher = Publisher(board, Counting(), 0, 2, averaging())  # type: ignore[arg-type]
    publisher.begin(1, 0, {})
    publisher.publish(1)
    publisher.publish(2)
    teacher = Taking()
    newest = FollowingEngine(teacher, Freshness(2, True, board, weights="self"))  # type: ignore[arg-type]
    assert newest.follow(bundle(3))["policy_version"].tolist() == [2]
    assert newest.follow(bundle(3, policy_version=1))["policy_version"].tolist() == [1]
    assert teacher.versions == [2, 1]
    publisher.end()


def adapted(folder: Path, architecture: str = "") -> Any:
    """A LoRA student under a layout, with factors that do something."""
    if architecture:
        network(architecture).save_pretrained(str(folder))
    else:
        tiny_model(folder, layers=1)
    student = load_student(StudentConfig(model=str(folder), lora=Lora(r=3, alpha=5.0)), False, 0)
    torch.manual_seed(1)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    numerics = Numerics(1.0, torch.float32, torch.device("cpu"))
    return make_layout(LayoutConfig(type="single"), StudentModule(student), lambda p: torch.optim.AdamW(p.values()), numerics), student


def test_an_adapter_beside_its_base_is_the_merged_student(tmp_path: Path, board: Any) -> None:
    layout, student = adapted(tmp_path)
    whole = {n: v.clone() for n, v in published_weights(layout, 5.0 / 3).items()}
    apart_again = merged(published_base(layout), published_adapter(layout, 5.0 / 3))
    assert list(whole) == list(apart_again)
    torch.testing.assert_close(apart_again, whole)
    publisher = Publisher(board, layout, 0, 0, Parcel(5.0 / 3, adapter_only=True))
    publisher.begin(1, 0, {})
    writer = Taking()
    FollowingEngine(writer, Freshness(0, False, board)).follow(bundle(1))  # type: ignore[arg-type]
    publisher.end()
    torch.testing.assert_close(writer.weights, whole)
    theirs = student.merge_and_unload().state_dict()
    torch.testing.assert_close(writer.weights, {n: theirs[n] for n in writer.weights})


def test_layers_that_lie_the_other_way_round_are_merged_so(tmp_path: Path) -> None:
    """GPT-2's weights are (inputs, outputs), and some of them are square: a product that is not turned would fit, too."""
    layout, student = adapted(tmp_path, "gpt2")
    whole = {n: v.clone() for n, v in published_weights(layout, 5.0 / 3).items()}
    torch.testing.assert_close(merged(published_base(layout), published_adapter(layout, 5.0 / 3)), whole)
    before = network("gpt2").state_dict()
    theirs = student.merge_and_unload().state_dict()
    torch.testing.assert_close(whole, {n: theirs[n] for n in whole})
    square = "transformer.h.0.attn.c_proj.weight"
    assert (whole[square] - before[square]).abs().max() > 1e-2


def test_an_adapter_alone_is_sent_with_every_version(tmp_path: Path, board: Any) -> None:
    layout, _ = adapted(tmp_path)
    publisher = Publisher(board, layout, 0, 1, Parcel(2.0, adapter_only=True))
    publisher.begin(1, 0, {})
    publisher.publish(1)
    _, first = ray.get(board.version.remote(1, 0))
    _, second = ray.get(board.version.remote(1, 1))
    publisher.end()
    assert first[BASE_WEIGHTS] == second[BASE_WEIGHTS] and first["student"] != second["student"]

    def size(references: list[Any]) -> int:
        return sum(values.nbytes for _, values in ray.get(references[0]).values())

    assert size(second["student"]) < size(second[BASE_WEIGHTS]) / 5
    names = set(ray.get(second["student"][0]))
    assert names and all(name.endswith((":A", ":B")) for name in names)


def test_only_factors_of_linear_layers_are_merged() -> None:
    with pytest.raises(ValueError, match="linear layers only"):
        apart({"base_model.model.embed.lora_embedding_A.default": torch.zeros(2, 2)}, 1.0)
    with pytest.raises(ValueError, match="the base lacks"):
        merged({}, {"q.weight:A": torch.zeros(1, 2), "q.weight:B": torch.zeros(2, 1)})


@pytest.mark.parametrize(("weights", "sets", "rates"), [("frozen", {}, {}), ("live", {"self": "student"}, {})])
def test_each_policy_takes_its_own_weights(weights: str, sets: dict[str, str], rates: dict[str, float]) -> None:
    strategy = STRATEGIES["opsd"].model_validate({"weights": weights, "staleness": 2}).build()
    assert weight_sets(strategy) == {"student": "student", **sets} and average_rates(strategy) == rates
    found = freshness(strategy, None)
    assert found is not None and found.staleness == 2


def test_an_average_has_a_set_of_its_own() -> None:
    strategy = STRATEGIES["sdft"].model_validate({"average_rate": 0.1, "teacher": "mean"}).build()
    assert weight_sets(strategy)["mean"] == "mean" and average_rates(strategy) == {"mean": 0.1}
    assert freshness(STRATEGIES["logits"]().build(), None) is None
