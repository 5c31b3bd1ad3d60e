"""Mutants that no test can notice, with the reason why the program means the same. They do not count.

A reason is for a line as it stands: change the line, and judge anew. `python -m tests.mutation` names those that match nothing.
"""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, str, str], str] = {}
"""(path, line before, line after), both stripped -> the reason."""
