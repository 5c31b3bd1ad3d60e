"""Conversations to texts that are ready for the tokenizer, and to what of them the assistant says.

Two ways to know the assistant's tokens: the template marks them itself (`{% generation %}`), or they are what the
conversation up to and with a turn has more than the conversation up to it with the generation prompt. The second way needs
each to be a prefix of the next; templates that drop earlier reasoning break that, and such conversations are bad.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from orchestrator.errors import Refusal
from orchestrator.pieces import Bad, Encoded, Ids, is_unicode, unpredicted_first

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError)
"""What a chat template raises on messages it does not like."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = Mapping[str, object]


@dataclass(frozen=True)
class Chat:
    """A rendered conversation. Each span is the text before an assistant's words and the text up to their end."""

    full: str
    spans: tuple[tuple[str, str], ...]

    def assemble(self, full: Ids, parts: Sequence[Ids]) -> Encoded | Bad:
        """The row, given the ids of `full` and those of both texts of every span in turn."""
        mask = np.zeros(len(full), dtype=np.uint8)
        for before, until in zip(parts[::2], parts[1::2], strict=True):
            if not (_begins(full, before) and _begins(full, until) and len(before) <= len(until)):
                return Bad("the tokens of a message change with what follows it")
            mask[len(before) : len(until)] = 1
        return Encoded(full, unpredicted_first(mask))


@dataclass(frozen=True)
class Marked:
    """A conversation whose template marks the assistant's tokens itself."""

    messages: Sequence[Message]


class ChatTemplate:
    """A tokenizer's chat template. Immutable; every method with messages raises `Refusal` when there is no template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str):
        self._tokenizer, self._where = tokenizer, where
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = tuple(added | set(tokenizer.all_special_tokens))
        self._marked = bool(tokenizer.chat_template and _GENERATION.search(str(tokenizer.get_chat_template())))

    def conversation(self, given: object) -> Chat | Marked | Bad:
        """How a `messages` value becomes a row."""
        messages = self._checked(given)
        if isinstance(messages, Bad):
            return messages
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            return Bad("no assistant message")
        if self._marked:
            return Marked(messages)
        if turns[0] == 0:
            return Bad("no message before the assistant's first")
        try:
            full = self._render(messages)
            spans = tuple((self._render(messages[:i], True), self._to_end_of_turn(self._render(messages[: i + 1]))) for i in turns)
        except TEMPLATE_ERRORS as error:
            return Bad("the chat template refuses it", str(error))
        if not all(full.startswith(text) for span in spans for text in span):
            return Bad("the chat template renders a message differently once others follow")
        return Chat(full, spans)

    def answer(self, prompt: object, completion: object) -> tuple[str, str] | Bad:
        """Text of the prompt with the generation prompt, and of the completion up to its end-of-turn token, for two
        lists of messages."""
        before, after = self._checked(prompt), self._checked(completion)
        if isinstance(before, Bad):
            return before
        if isinstance(after, Bad):
            return after
        try:
            start, full = self._render(before, True), self._render([*before, *after])
        except TEMPLATE_ERRORS as error:
            return Bad("the chat template refuses it", str(error))
        if not full.startswith(start):
            return Bad("the chat template renders a message differently once others follow")
        return start, self._to_end_of_turn(full[len(start) :])

    def opening(self, prompt: object) -> str | Bad:
        """Text of a list of messages with the generation prompt."""
        before = self._checked(prompt)
        if isinstance(before, Bad):
            return before
        try:
            return self._render(before, True)
        except TEMPLATE_ERRORS as error:
            return Bad("the chat template refuses it", str(error))

    def ends_turn(self, text: str) -> bool:
        """Whether the text ends with a special token."""
        return text.endswith(self._special)

    def mark(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded | Bad]:
        """Rows of conversations by the template's own marks. One that fails is found by halving."""
        if not conversations:
            return []
        try:
            given = cast(Any, list(conversations))
            out = cast(Any, self._tokenizer.apply_chat_template(given, return_dict=True, return_assistant_tokens_mask=True))
        except TEMPLATE_ERRORS as error:
            if len(conversations) == 1:
                return [Bad("the chat template refuses it", str(error))]
            half = len(conversations) // 2
            return [*self.mark(conversations[:half]), *self.mark(conversations[half:])]
        pairs = zip(out["input_ids"], out["assistant_masks"], strict=True)
        return [Encoded(np.asarray(ids, dtype=np.int32), unpredicted_first(np.asarray(mask, dtype=np.uint8))) for ids, mask in pairs]

    def _checked(self, given: object) -> list[Message] | Bad:
        """The messages without empty entries (tables fill absent ones with null)."""
        if self._tokenizer.chat_template is None:
            do = "Name an instruction-tuned tokenizer in student.tokenizer, or give prompt + completion strings."
            raise Refusal(self._where, "messages, and a tokenizer without a chat template", "a tokenizer with a chat template", do)
        if not isinstance(given, list) or not given:
            return Bad("messages are not a list, or an empty one")
        for message in given:
            if bad := _message_problem(message):
                return bad
        return [{name: value for name, value in message.items() if value is not None} for message in given]

    def _render(self, messages: Sequence[Message], answering: bool = False) -> str:
        return str(self._tokenizer.apply_chat_template(cast(Any, list(messages)), tokenize=False, add_generation_prompt=answering))

    def _to_end_of_turn(self, text: str) -> str:
        """Without the white space that a template puts behind the token that ends a turn: nobody has to predict it."""
        stripped = text.rstrip()
        return stripped if self.ends_turn(stripped) else text


def _message_problem(message: object) -> Bad | None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return Bad("a message without a role", repr(message)[:80])
    if message["role"] not in ROLES:
        return Bad("unknown role", repr(message["role"])[:80])
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return None
    if not isinstance(content, str):
        return Bad("a message without text", f"content is of type {type(content).__name__}")
    return None if is_unicode(content) else Bad("not valid Unicode")


def _begins(full: Ids, part: Ids) -> bool:
    return np.array_equal(full[: len(part)], part)
