"""What is told of an error that another process raised."""

from __future__ import annotations

import pytest

from orchestrator.errors import origin


class Brought(Exception):
    """As Ray brings it: its text is a chain of tracebacks, its cause the last of them."""

    def __init__(self, text: str, cause: Exception | None = None):
        super().__init__(text)
        self.cause = cause


CHAIN = """Traceback (most recent call last):
  File "engine.py", line 1, in score
ValueError: top_k: got 8; expected at most 3

The above exception was the direct cause of the following exception:

UserCodeException: UDF failed.
To change retry attempts, configure the context.
"""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            Brought(CHAIN, Exception("UDF failed.\nTo change retry attempts, configure the context.")),
            "ValueError: top_k: got 8; expected at most 3",
        ),
        (Brought("Traceback\nValueError: no", ValueError("line one\nline two\n")), "line two"),
        (ValueError("plain"), "plain"),
        (ValueError(), "ValueError"),
    ],
)
def test_the_first_exception_of_a_chain_is_told(error: Exception, words: str) -> None:
    assert origin(error) == words
