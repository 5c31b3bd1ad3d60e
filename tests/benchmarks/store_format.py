"""Why parts are Arrow files: rows read in shuffled order from memory-mapped Arrow over the same from Parquet, rows/s over rows/s.

Both hold the same encoded arrays of the same rows, uncompressed (packed numbers do not compress), with their files open. Parquet
is read by row groups; the best of three sizes counts for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.stores.parts import Part, part_content
from tests.benchmarks import BENCHMARKS
from tests.benchmarks.figure import Figure, Settings, machine, median

NAME = "store-format"
ROW_TOKENS, BYTES_A_TOKEN, PART_ROWS, BUNDLE_ROWS = 128, 160, 256, 16
GROUPS = (1, 16, 256)
"""Rows of a Parquet row group."""
Read = Callable[[int, int], np.ndarray]


def measure(settings: Settings) -> Figure:
    """Ratio of medians over the rounds; each round reads every row once."""
    parts = 2 if settings.smoke else 32
    settings.folder.mkdir(parents=True, exist_ok=True)
    _write(settings.folder, parts)
    sides: dict[str, Read] = {"arrow": _arrow(settings.folder, parts)}
    sides |= {f"parquet, row groups of {rows}": _parquet(settings.folder, parts, rows) for rows in GROUPS}
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(settings.rounds):
        order = np.random.default_rng(turn).permutation(parts * PART_ROWS)[: 64 if settings.smoke else 2048]
        for side, read in sides.items():
            speeds[side].append(_rate(read, order))
    found = {side: median(rates) for side, rates in speeds.items()}
    sizes = {p.suffix: sum(q.stat().st_size for q in settings.folder.glob(f"*{p.suffix}")) for p in settings.folder.iterdir()}
    print("\n".join(f"{side}: {rate:,.0f} rows/s" for side, rate in found.items()), flush=True)
    return Figure(
        name=NAME,
        value=found["arrow"] / max(rate for side, rate in found.items() if side != "arrow"),
        unit="rows/s over rows/s",
        against="Parquet of the same arrays, uncompressed, in the best of three row group sizes",
        target=BENCHMARKS[NAME].target,
        measured={**machine(), "smoke": settings.smoke, "rows_per_second": speeds, "bytes_by_suffix": sizes},
    )


def _write(folder: Path, parts: int) -> None:
    draw = np.random.default_rng(0)
    lengths = np.full(PART_ROWS, ROW_TOKENS, dtype=np.int32)
    mask = np.tile(np.concatenate([[0], np.ones(ROW_TOKENS - 1)]), PART_ROWS).astype(np.uint8)
    for number in range(parts):
        tokens = draw.integers(0, 1000, PART_ROWS * ROW_TOKENS).astype(np.int32)
        ids = np.arange(number * PART_ROWS, (number + 1) * PART_ROWS, dtype=np.int64)
        packed = draw.integers(0, 256, (int(mask.sum()), BYTES_A_TOKEN)).astype(np.uint8)
        content = part_content({"tokens": tokens, "lengths": lengths, "loss_mask": mask, "row_id": ids}, {"packed": packed})
        (folder / f"{number}.arrow").write_bytes(content)
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
        for rows in GROUPS:
            pq.write_table(table, folder / f"{number}.{rows}.parquet", row_group_size=rows, compression="none", use_dictionary=False)


def _arrow(folder: Path, parts: int) -> Read:
    open_parts = [Part(str(n), pa.memory_map(str(folder / f"{n}.arrow")).read_buffer()) for n in range(parts)]
    return lambda part, row: open_parts[part].row(row, part * PART_ROWS + row)["packed"]


def _parquet(folder: Path, parts: int, rows: int) -> Read:
    files = [pq.ParquetFile(folder / f"{n}.{rows}.parquet", memory_map=True) for n in range(parts)]

    def read(part: int, row: int) -> np.ndarray:
        values = files[part].read_row_group(row // rows, columns=["packed"]).column(0).chunk(0)
        start, stop = values.offsets[row % rows].as_py(), values.offsets[row % rows + 1].as_py()
        flat = values.values.values.to_numpy()
        return np.asarray(flat[start * BYTES_A_TOKEN : stop * BYTES_A_TOKEN]).reshape(-1, BYTES_A_TOKEN)

    return read


def _rate(read: Read, order: np.ndarray) -> float:
    """Rows a second in bundles, each put together as the reader does."""
    began = time.perf_counter()
    for start in range(0, len(order), BUNDLE_ROWS):
        found = [read(int(i) // PART_ROWS, int(i) % PART_ROWS) for i in order[start : start + BUNDLE_ROWS]]
        assert len(np.concatenate(found)) == len(found) * (ROW_TOKENS - 1)
    return len(order) / (time.perf_counter() - began)
