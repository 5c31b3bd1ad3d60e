"""What is kept of a block of prompts in a text store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from cluster.endpoints import check_written
from cluster.stores.files import PartInfo
from cluster.stores.parts import content_checksum
from cluster.stores.texts import texts_content
from orchestrator.bundle import scalar
from strategies.core import Columns


@dataclass(frozen=True)
class KeepTexts:
    """The texts as they were written (`orchestrator.filling.Keep`)."""

    samples: int
    vocabulary: int
    noun: ClassVar[str] = "texts"
    verb: ClassVar[str] = "written"

    def __call__(self, columns: Columns) -> tuple[PartInfo, pa.Buffer]:
        """The part of a block that went through `Write`, and its file. `loss_tokens` are those written, `tokens` those read too."""
        written = {name.removeprefix("written/"): values for name, values in columns.items() if name.startswith("written/")}
        check_written(columns, written, self.samples, self.vocabulary)
        content = texts_content(written)
        tokens = len(written["tokens"])
        info = PartInfo(
            number=scalar(columns, "bundle"),
            rows=len(columns["lengths"]),
            loss_tokens=tokens,
            tokens=tokens + self.samples * int(np.sum(columns["lengths"])),
            bytes=content.size,
            checksum=content_checksum(content),
            dropped_mass=0.0,
            seconds=float(written["seconds"][0]),
            cost=float(written["cost"][0]) if "cost" in written else 0.0,
        )
        return info, content

    def count(self, info: PartInfo) -> int:
        """Tokens written."""
        return info.loss_tokens
