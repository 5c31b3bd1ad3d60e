"""Errors a person meets. Every `Refusal` says where, what was got, what was expected and what to do.

DistillError
+-- Refusal      the plan says no; nothing was created (exit 2)
|   +-- Unanswered   a server says nothing now, and may later
+-- RunFailed    a run that had started ended with an error (exit 1)
+-- Alarmed      an alarm stopped the run; a checkpoint was written (exit 3)
+-- Interrupted  a person stopped the run; a checkpoint was written (exit 130)
"""

from __future__ import annotations


class DistillError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class Refusal(DistillError):
    """One bad input, found before any model loads."""

    exit_code = 2

    def __init__(self, where: str, got: str, expected: str, do: str):
        self.where, self.got, self.expected, self.do = where, got, expected, do
        super().__init__(f"{where}: got {got}; expected {expected}. {do}")

    def __reduce__(self) -> tuple[type[Refusal], tuple[str, str, str, str]]:
        return (type(self), (self.where, self.got, self.expected, self.do))


class Unanswered(Refusal):
    """A server did not answer, or was in trouble of its own; whoever has time may ask again."""


class RunFailed(DistillError):
    """The run started and ended with an error; its last committed checkpoint is kept."""


class Alarmed(DistillError):
    """An alarm stopped the run, as its recipe asks; a checkpoint is kept."""

    exit_code = 3


class Interrupted(DistillError):
    """A person stopped it; a checkpoint, or what was complete of a store, is kept."""

    exit_code = 130


_BECAUSE = "The above exception was the direct cause"
"""What Python writes between the tracebacks of a chain; Ray brings chains of other processes as text."""


def origin(error: BaseException) -> str:
    """What went wrong first, in a line: of an error that Ray brought, the words of the exception that began it."""
    chain, cause = str(error), getattr(error, "cause", None) or error
    text = chain.partition(_BECAUSE)[0] if _BECAUSE in chain else str(cause)
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), type(cause).__name__)
