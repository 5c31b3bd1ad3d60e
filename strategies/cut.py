"""How many tokens the output head takes at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from strategies.signals import Signal

BLOCK_BYTES = 128 << 20
"""float32 logits of the tokens that go through matrix products together: with fewer than some 256 tokens products lose
speed, as all of the `(V, D)` weight is read for each."""
PIECE_BYTES = 4 << 20
"""float32 logits that objectives see at once on a CPU: their copies stay in the cache, and below 32 MiB glibc's malloc
hands the same memory out again, where larger tensors would be mapped and cleared anew by the kernel each time."""
FLOAT = 4


@runtime_checkable
class Together(Protocol):
    """An objective whose tokens see each other, so that its value depends on how many it is given at once."""

    @property
    def tokens_at_once(self) -> int:
        """As many are handed over, but for the last ones of a micro-batch."""
        ...


@runtime_checkable
class Costly(Protocol):
    """A signal whose numbers are made by a matrix product, which wants more tokens at once than objectives see."""

    def ready(self) -> Signal:
        """The same signal with that product made, for a block of tokens whose pieces are taken afterwards."""
        ...


@dataclass(frozen=True)
class Cut:
    """How N tokens are cut; a block is cut into pieces anew."""

    block_tokens: int
    """Tokens whose logits exist at once, in the compute dtype."""
    piece_tokens: int
    """Tokens that objectives see at once, with their float32 copies."""


def cut_for(vocabulary: int, device: str, objectives: Iterable[object] = (), chunk_tokens: int | None = None) -> Cut:
    """The cut for logits over a vocabulary on a type of device. `chunk_tokens` sets the tokens of a block.

    An accelerator sees whole blocks at once: there a launch costs more than a copy.
    """
    block = chunk_tokens or max(32, BLOCK_BYTES // (FLOAT * vocabulary) // 32 * 32)
    piece = max(1, PIECE_BYTES // (FLOAT * vocabulary)) if device == "cpu" else block
    together = max((o.tokens_at_once for o in objectives if isinstance(o, Together)), default=0)
    if together:
        return Cut(max(1, block // together) * together, together)
    return Cut(block, min(block, piece))
