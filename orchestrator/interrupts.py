"""A person's Ctrl-C: the first asks for an orderly end, the second ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.display import Display


@contextmanager
def interruptible(display: Display, ask_to_stop: Callable[[], None]) -> Iterator[None]:
    """Inside, the first SIGINT calls `ask_to_stop` in a thread of its own. Does nothing in a thread other than the main one, which alone is
    signalled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        display.stopping()
        threading.Thread(target=ask_to_stop, daemon=True).start()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
