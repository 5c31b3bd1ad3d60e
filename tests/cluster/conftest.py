"""What the tests of engines behind a URL share."""

from __future__ import annotations

import pytest

from cluster.engines import openai_client


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client would have slept, in seconds."""
    slept: list[float] = []
    monkeypatch.setattr(openai_client, "sleep", slept.append)
    return slept
