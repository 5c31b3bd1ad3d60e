"""Prepared splits made directly, for tests that need rows and not where they come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_split(folder: Path, split: str, lengths: NDArray[np.int64], vocabulary: int = 512, seed: int = 0) -> None:
    """A split of random tokens whose rows have the given lengths; all but the first token of a row are predicted."""
    home = folder / split
    home.mkdir(parents=True)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    mask = np.ones(int(offsets[-1]), dtype=np.uint8)
    mask[offsets[:-1]] = 0
    arrays = {
        "tokens": np.random.default_rng(seed).integers(0, vocabulary, int(offsets[-1])).astype(np.int32),
        "loss_mask": mask,
        "offsets": offsets,
        "lengths": lengths.astype(np.int32),
        "source_row": np.arange(len(lengths), dtype=np.int64),
    }
    for name, values in arrays.items():
        np.save(home / f"{name}.npy", values)
