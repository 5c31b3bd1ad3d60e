"""What is kept of a scored block in a signal store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from cluster.codecs import Codec
from cluster.stores.files import PartInfo
from cluster.stores.parts import content_checksum, part_content
from orchestrator.bundle import scalar
from strategies.core import Columns

NOTHING = np.zeros(1)


@dataclass(frozen=True)
class KeepSignals:
    """Encodes the answers to one signal's question (`orchestrator.filling.Keep`)."""

    signal: str
    answers: tuple[str, ...]
    """Columns of the answers (`ScoreRequest.answers`); what else a stage says of a bundle is not kept."""
    codec: Codec
    noun: ClassVar[str] = "signals"
    verb: ClassVar[str] = "scored"

    def __call__(self, columns: Columns) -> tuple[PartInfo, pa.Buffer]:
        """The part of a block that went through `Score`, and its file."""
        before = f"{self.signal}/"
        answers = {name: columns[before + name] for name in self.answers}
        dropped, seconds, cost = (float(columns.get(before + name, NOTHING)[0]) for name in ("dropped_mass", "seconds", "cost"))
        loss_tokens = int(np.count_nonzero(columns["loss_mask"]))
        content = part_content(columns, self.codec.encode(answers, loss_tokens))
        info = PartInfo(
            number=scalar(columns, "bundle"),
            rows=len(columns["lengths"]),
            loss_tokens=loss_tokens,
            tokens=len(columns["tokens"]),
            bytes=content.size,
            checksum=content_checksum(content),
            dropped_mass=dropped,
            seconds=seconds,
            cost=cost,
        )
        return info, content

    def count(self, info: PartInfo) -> int:
        """Tokens read."""
        return info.tokens
