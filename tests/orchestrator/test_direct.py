"""Weights past the object store: packed as one tensor, put with the transport that was chosen, and unpacked as they were."""

from __future__ import annotations

from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from orchestrator import direct
from orchestrator.board import open_board
from orchestrator.direct import packed, sent
from orchestrator.versions import FollowingEngine, Freshness, Parcel, Publisher
from tests.orchestrator.test_following import Taking, bundle

WEIGHTS = {
    "half": torch.arange(5, dtype=torch.bfloat16),
    "whole": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
    "flag": torch.ones(3, dtype=torch.int8),
    "one": torch.tensor(2.5),
    "none": torch.zeros((0, 4)),
}


def test_tensors_come_back_as_they_were_and_are_copies() -> None:
    made = packed(WEIGHTS)
    found = made.unpacked()
    assert made.numbers.dtype == torch.uint8 and set(found) == set(WEIGHTS)
    for name, value in WEIGHTS.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
        assert (found[name].dtype == value.dtype and found[name].data_ptr() != value.data_ptr()) or not value.numel()
    assert packed({}).unpacked() == {}


class Growing:
    """A layout whose weight changes in place, as an optimizer changes it."""

    module = torch.nn.Module()

    def __init__(self) -> None:
        self.weight = torch.zeros(2)

    def gathered(self, trained: bool = False) -> dict[str, Tensor]:
        return {"model.w": self.weight}


def test_a_version_is_put_with_its_transport_and_stays_what_it_was(ray_session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put, ways = ray.put, []

    def stand_in(value: Any, _tensor_transport: str | None = None) -> Any:
        ways.append(_tensor_transport)
        return put(value)

    monkeypatch.setattr(direct.ray, "put", stand_in)
    board, layout = open_board("direct"), Growing()
    ray.get(board.begin.remote(1, 0, 0.0))
    publisher = Publisher(board, layout, 0, 1, Parcel(transport="nixl"))  # type: ignore[arg-type]
    publisher.begin(1, 0, {})
    layout.weight.add_(1)
    publisher.publish(1)
    publisher.end()
    writer = Taking()
    following = FollowingEngine(writer, Freshness(1, False, board, transport="nixl"))  # type: ignore[arg-type]
    seen = []
    for step in (1, 3):
        following.follow(bundle(step))
        seen.append(writer.weights["w"].tolist())
    assert seen == [[0.0, 0.0], [1.0, 1.0]] and ways == ["nixl", "nixl"]
    ray.kill(board)


@pytest.mark.slow
def test_another_process_reads_them_by_nixl(ray_session: str) -> None:
    pytest.importorskip("nixl", reason="the package that carries weights past the object store")

    @ray.remote(num_cpus=0)
    class Sender:
        def send(self) -> list[Any]:
            return [sent(WEIGHTS, "nixl")]

    @ray.remote(num_cpus=0)
    class Taker:
        def take(self, references: list[Any]) -> dict[str, Tensor]:
            return {name: value.clone() for name, value in ray.get(references[0]).unpacked().items()}

    sender = Sender.remote()
    found = ray.get(Taker.remote().take.remote(ray.get(sender.send.remote())))
    torch.testing.assert_close(found, {name: WEIGHTS[name] for name in found}, rtol=0, atol=0)
