"""What a driver writes into its run's folder, whether or not MLflow answers, and the heartbeat that goes with it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.claim import Pulse
from orchestrator.journal import OUTBOX, Journal, Lines, MetricRow


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names and texts: `{"train": {"lr": 2e-5}}` becomes `{"train.lr": "2e-05"}`."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


class Logbook:
    """One driver's writing. The folder is its own from here to `close`, and no other driver's."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._pulse = Pulse(folder)  # first, so that the watchdog of an earlier driver lets go
        self._journal, self._outbox = Journal(folder), Lines(folder / OUTBOX)
        self._wake = threading.Event()

    def log(self, rows: Sequence[MetricRow]) -> None:
        """Within one attempt, the steps of a metric rise. A value that is not finite stays local and is counted by the
        metric `nonfinite` of its step."""
        self._journal.append(rows)
        self._wake.set()

    def truncate(self, step: int, attempt: int) -> None:
        """Attempt `attempt` starts after `step`. What older attempts wrote beyond it leaves the local journal; MLflow keeps
        what it has, and gets no second value for those steps."""
        self._journal.truncate(step, attempt)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nested settings under dotted names. A param that MLflow has with another value becomes the tag `changed.<name>`."""
        self._outbox.append([{"kind": "params", "params": flatten(params)}])
        self._wake.set()

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run; of two values of one tag the later stays."""
        self._outbox.append([{"kind": "tags", "tags": dict(tags)}])
        self._wake.set()

    def log_text(self, text: str, artifact_file: str) -> None:
        """A text artifact of the run, at a relative path such as `plan/recipe.yaml`."""
        self._outbox.append([{"kind": "text", "text": text, "file": artifact_file}])
        self._wake.set()

    def log_file(self, path: Path) -> None:
        """A file of the run's folder as an artifact under its own name, as it is when MLflow takes it."""
        self._outbox.append([{"kind": "file", "path": str(path.absolute())}])
        self._wake.set()

    def close(self) -> None:
        """The last of it is written, and anybody may go on with the folder."""
        self._pulse.end()
        self._journal.close()
        self._outbox.close()
