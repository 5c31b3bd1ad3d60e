"""Records as questions: what is asked, and what the data answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.pieces import Bad

Prompt = str | list[object]


@dataclass(frozen=True)
class Question:
    """One record."""

    prompt: Prompt
    """Plain text, or the messages before the answer."""
    completion: Prompt | None
    """The data's own answer, in the same form; None when it has none."""
    reference: str | None
    """What a judge compares with: the column `answer`, else the words of the completion."""

    @property
    def row(self) -> dict[str, object]:
        """The record with the data's own answer as a row to learn from, or to measure on."""
        return {"prompt": self.prompt, "completion": self.completion}


def question(record: Mapping[str, object]) -> Question | Bad:
    """The question of a record with `prompt` (text or messages) or `messages`, of which the last is the answer if it is the
    assistant's."""
    given = {name: value for name, value in record.items() if value is not None}
    prompt, completion = given.get("prompt"), given.get("completion")
    if prompt is None and isinstance(given.get("messages"), list):
        prompt, completion = _split(given["messages"])
    if isinstance(prompt, list) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(prompt, str | list) or not prompt:
        return Bad("no prompt", f"in the columns {', '.join(sorted(given)) or 'of nothing'}")
    answer = given.get("answer")
    if not isinstance(completion, str | list) or not completion:
        completion = None
    return Question(prompt, completion, str(answer) if answer is not None else _words(completion))


def _split(messages: object) -> tuple[list[object], list[object] | None]:
    said = list(messages) if isinstance(messages, list) else []
    last = said[-1] if said else None
    if isinstance(last, dict) and last.get("role") == "assistant":
        return said[:-1], said[-1:]
    return said, None


def _words(completion: object) -> str | None:
    if isinstance(completion, list):
        said = [str(m.get("content") or "") for m in completion if isinstance(m, dict)]
        return "\n".join(said) or None
    return completion if isinstance(completion, str) else None
