"""Teachers made of the student: how their weights follow its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Follow:
    """An endpoint with the student's own network. After every optimizer step its weights w become `w + rate (student - w)`.

    0 keeps the student as it began and 1 is the student itself; between them lies an exponential moving average in float32, which
    begins as the student does.
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate: got {self.rate:g}; expected a number from 0, as the student began, to 1, as it is")

    @property
    def moves(self) -> bool:
        """Whether its weights come from the training job; else they are those that the student begins with."""
        return self.rate > 0

    @property
    def averages(self) -> bool:
        """Whether the training job keeps weights of its own for it."""
        return 0 < self.rate < 1
