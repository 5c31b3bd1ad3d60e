"""Micro-batches: one bundle cut into forwards of the student, always the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.answers import token_keys
from cluster.forwards import BundleRows, Forward, bundle_rows, group_by_length, lay_out
from strategies.core import Columns
from strategies.head import TokenBatch
from strategies.signals import Signal
from strategies.sources import Source, scored_columns
from strategies.taps import Tapped

if TYPE_CHECKING:
    from orchestrator.config import RunConfig

WEIGHTS = "weights/"
KEYS = "keys"


@dataclass(frozen=True)
class MicroBatch:
    """One forward of the student over B sequences of L tokens with N loss tokens.

    Padding is on the right and needs no attention mask: a causal network never looks there. Rows packed into one
    sequence are told apart by `position_ids` alone, from which transformers makes each of them blind to the others.
    """

    input_ids: Tensor
    """`(B, L)` int64."""
    position_ids: Tensor | None
    """`(B, L)` int64, restarting at 0 with every packed row; None when no sequence holds two rows."""
    index: Tensor
    """`(N,)` int64 places in the flattened `(B*L)` hidden states that predict the loss tokens."""
    labels: Tensor
    """`(N,)` int64 the loss tokens."""
    keys: Tensor
    """`(N,)` int64 seeds of the tokens, for teachers that draw."""
    columns: Mapping[str, Tensor]
    """`<signal>/<column>` `(N, ...)` of every signal that a stage scored."""
    weights: Mapping[str, Tensor]
    """`(N,)` float32 by term name, for the terms that have them."""
    signals: Mapping[str, Signal] = field(default_factory=dict)
    """What the terms read; made on the device of the columns and of frozen players (`teachers.py`), and not moved."""
    taught: Mapping[str, Tapped] = field(default_factory=dict)
    """Inner states of frozen players by name, for the terms that read them; made there too."""

    @property
    def loss_tokens(self) -> int:
        return len(self.labels)

    @property
    def padded_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def batch(self) -> TokenBatch:
        """What the terms read."""
        return TokenBatch(self.labels, self.signals, self.weights, self.token_rows)

    @property
    def token_rows(self) -> Tensor:
        """`(N,)` int64 numbers of the loss tokens' rows, counted from 0 over the rows that have any."""
        numbers = self.rows.flatten().index_select(0, self.index)
        return numbers if self.position_ids is None else torch.unique(numbers, return_inverse=True)[1]

    @property
    def rows(self) -> Tensor:
        """`(B, L)` int64 numbers of the rows. Each padded place of a packed sequence counts as one more row."""
        sequences, length = self.input_ids.shape
        if self.position_ids is None:
            return torch.arange(sequences, device=self.index.device)[:, None].expand(-1, length)
        return (self.position_ids == 0).flatten().cumsum(0).view(sequences, length)

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on `device`."""
        return MicroBatch(
            input_ids=self.input_ids.to(device),
            position_ids=None if self.position_ids is None else self.position_ids.to(device),
            index=self.index.to(device),
            labels=self.labels.to(device),
            keys=self.keys.to(device),
            columns={name: values.to(device) for name, values in self.columns.items()},
            weights={name: values.to(device) for name, values in self.weights.items()},
        )

    def dummy(self) -> MicroBatch:
        """A forward like this one without loss tokens, for a rank with fewer micro-batches than others."""
        device = self.input_ids.device
        return MicroBatch(
            input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device),
            position_ids=None,
            index=self.index[:0],
            labels=self.labels[:0],
            keys=self.keys[:0],
            columns={name: values[:0] for name, values in self.columns.items()},
            weights={name: values[:0] for name, values in self.weights.items()},
        )


def dummy() -> MicroBatch:
    """The micro-batch of a rank that has none: one token read, nothing predicted, zero gradients."""
    none = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(torch.zeros((1, 1), dtype=torch.int64), None, none, none, none, {}, {})


def cut_bundle(run: RunConfig, bundle: Columns, sources: Mapping[str, Source], together: int = 1) -> list[MicroBatch]:
    """The micro-batches of a bundle as a run's settings want them, with the columns of these signals."""
    train = run.train
    return cut(bundle, scored_columns(sources), train.batching, train.micro_batch_tokens, run.data.max_length_tokens, together)


def cut(
    columns: Columns,
    wanted: Sequence[str],
    batching: Literal["bucketed", "packed"],
    micro_batch_tokens: int,
    max_length_tokens: int,
    together: int = 1,
) -> list[MicroBatch]:
    """The micro-batches of one bundle, largest first, on the CPU; none when it has no loss tokens.

    A pure function of the bundle. No micro-batch has more than `micro_batch_tokens` padded tokens, unless one row alone does. Each run
    of `together` rows of the bundle is in one micro-batch, and its rows are numbered so that the runs are still runs. `packed` lays rows
    into sequences of at most `max_length_tokens`, or of one longer run; flash attention packs single sequences only, which
    `max_length_tokens = micro_batch_tokens` makes of them. `ValueError` for a malformed bundle, rows that do not come in such runs, or a
    signal that the bundle does not carry.
    """
    rows = bundle_rows(columns)
    if len(rows.reach) % together:
        raise ValueError(f"a bundle of {len(rows.reach)} rows; expected runs of {together} rows that belong together")
    sequences, alone = [[r] for r in range(len(rows.reach))], together
    if batching == "packed":
        sequences, alone = pack(rows.reach, max_length_tokens, together), 1
    lengths = np.asarray([int(rows.reach[s].sum()) for s in sequences], dtype=np.int64)
    per_token = _per_token(columns, wanted, len(rows.loss_at)) | {KEYS: token_keys(columns, rows.loss_at)}
    groups = group_by_length(lengths, micro_batch_tokens, alone)
    return [_micro(rows, lay_out(rows, [sequences[s] for s in group]), per_token) for group in groups]


def pack(lengths: NDArray[np.int64], room: int, together: int = 1) -> list[list[int]]:
    """Numbers of the rows of each sequence: first-fit decreasing, longest rows first; empty rows are left out. Each run of `together`
    rows stays in one sequence, one after another."""
    runs = np.arange(len(lengths)).reshape(-1, together)
    sizes = lengths[runs].sum(-1)
    sequences: list[list[int]] = []
    left: list[int] = []
    for run in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[run])
        if size == 0:
            break
        home = next((s for s, space in enumerate(left) if space >= size), None)
        if home is None:
            home = len(sequences)
            sequences.append([])
            left.append(room)
        sequences[home] += runs[run].tolist()
        left[home] -= size
    return sequences


def count_tokens(columns: Columns, term: str) -> int:
    """Loss tokens of the bundle that `term` weighs with something else than zero: its share of the denominator."""
    weights = columns.get(WEIGHTS + term)
    return int(np.count_nonzero(columns["loss_mask"] if weights is None else weights))


def _per_token(columns: Columns, wanted: Sequence[str], tokens: int) -> dict[str, NDArray[np.generic]]:
    """The columns that micro-batches carry, each `(N, ...)` in the bundle's loss-token order."""
    found: dict[str, NDArray[np.generic]] = {}
    for name in wanted:
        if name not in columns:
            raise ValueError(f"signal column {name!r}: got a bundle with {', '.join(sorted(columns))}; expected a stage to have added it")
        if tokens and len(columns[name]) % tokens:
            raise ValueError(f"signal column {name!r}: got {len(columns[name])} values; expected a multiple of {tokens} loss tokens")
        found[name] = columns[name].reshape(tokens, -1) if tokens else columns[name][:0]
    for name in (n for n in columns if n.startswith(WEIGHTS)):
        if len(columns[name]) != tokens:
            raise ValueError(f"column {name!r}: got {len(columns[name])} values; expected one for each of {tokens} loss tokens")
        found[name] = columns[name].astype(np.float32, copy=False)
    return found


def _micro(rows: BundleRows, laid: Forward, per_token: Mapping[str, NDArray[np.generic]]) -> MicroBatch:
    mine = {name: torch.from_numpy(values[laid.order]) for name, values in per_token.items()}
    return MicroBatch(
        input_ids=torch.from_numpy(laid.input_ids),
        position_ids=None if laid.position_ids is None else torch.from_numpy(laid.position_ids),
        index=torch.from_numpy(laid.index),
        labels=torch.from_numpy(rows.labels[laid.order]),
        keys=mine.pop(KEYS),
        columns={name: values for name, values in mine.items() if not name.startswith(WEIGHTS)},
        weights={name.removeprefix(WEIGHTS): values for name, values in mine.items() if name.startswith(WEIGHTS)},
    )
