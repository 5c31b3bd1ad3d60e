"""What may be asked of all training workers between two steps. Ranks agree on the largest wish of any, at the same step."""

from __future__ import annotations

from enum import IntEnum


class Wish(IntEnum):
    """In rising order: a larger one includes the smaller."""

    NOTHING = 0
    SAVE = 1
    """Write a checkpoint, and go on."""
    STOP = 2
    """Write a checkpoint, and end."""


class Notice:
    """Whether a node that this worker group holds is about to be taken back; heard once."""

    def __init__(self) -> None:
        self._heard = False

    @property
    def fresh(self) -> bool:
        """Read from Ray Train's own context of this process: its `get_preemption_info` asks all ranks, and costs a round trip a step."""
        from ray.train.v2._internal.execution.context import get_train_context

        return not self._heard and get_train_context().preemption_context.preemption_info is not None

    def hear(self) -> None:
        """The wish was fulfilled."""
        self._heard = True
