"""Records to token ids and the mask of what is learnt from them. Bad records become a reason, never an exception.

By kind of record: `text`: every token counts, and EOS follows at the end. `prompt` + `completion`: the completion and its
EOS count; both are encoded apart, so that the prompt's ids never depend on the completion; strings are plain text even
with a chat template, lists of messages go through it, and get EOS only if the template ends the turn without a special
token. `messages`: what the assistant says counts, with its end-of-turn token. `tokens`: ids are taken as they are, with
`loss_mask` when given. BOS stands where the tokenizer puts it; in templated records that is the template's business.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from orchestrator.chat import Chat, ChatTemplate, Marked
from orchestrator.errors import Refusal
from orchestrator.pieces import Bad, Encoded, Ids, is_unicode, unpredicted_first

PIECE_CHARACTERS = 1 << 16
"""Long documents are encoded in pieces of about this size; one call on all of it takes a hundred bytes per token."""
CALL_CHARACTERS = 1 << 20
"""Characters given to the tokenizer at once."""
_BREAK = re.compile(r"\S\n(?=\S)")
_SAMPLE = 'def f(x):\n    return {1: x};\nfoo bar  baz\n\n\nBa\u00df 12\t9\n\u65e5\u672c\u8a9e\n"end"\n.x\n\nabc\n'


@dataclass(frozen=True)
class _Segments:
    """Texts encoded apart and joined; `counted` says of each whether it is predicted."""

    texts: tuple[str, ...]
    counted: tuple[bool, ...]
    bos: bool = True
    eos: bool = True
    splittable: bool = False


_Plan = _Segments | Chat | Marked | Encoded | Bad


class Encoder:
    """One tokenizer's way of making rows. `where` names the source in refusals. Immutable."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str):
        self._tokenizer, self._where = tokenizer, where
        self._vocabulary = len(tokenizer)
        self._template = ChatTemplate(tokenizer, where)
        self._eos = np.asarray([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.int32)
        self._bos = self._prefix()
        apart = np.concatenate(self._ids(_pieces(_SAMPLE, 1)))
        self._piecewise = np.array_equal(apart, self._ids([_SAMPLE])[0])
        """Whether cutting a text at a lone line break leaves its ids as they are; not so for some SentencePiece models."""

    def encode(self, records: Sequence[Mapping[str, object]]) -> list[Encoded | Bad]:
        """One whole row per record, or what is wrong with it. Raises `Refusal` for messages without a chat template and
        for completions without an EOS token to end them."""
        plans = [self._plan({name: value for name, value in record.items() if value is not None}) for record in records]
        marked = iter(self._template.mark([plan.messages for plan in plans if isinstance(plan, Marked)]))
        plans = [next(marked) if isinstance(plan, Marked) else plan for plan in plans]
        texts = [_texts(plan) for plan in plans]
        ids = iter(self._ids(list(itertools.chain.from_iterable(texts))))
        return [self._assemble(plan, list(itertools.islice(ids, len(own)))) for plan, own in zip(plans, texts, strict=True)]

    def prompts(self, prompts: Sequence[object]) -> list[Ids | Bad]:
        """The ids that stand before an answer to each prompt: a string, or a list of messages with the generation prompt."""
        texts = [self._template.opening(p) if isinstance(p, list) else _problem("prompt", p) or str(p) for p in prompts]
        ids = iter(self._ids([text for text in texts if not isinstance(text, Bad)]))
        plain = [not isinstance(p, list) for p in prompts]
        return [
            t if isinstance(t, Bad) else np.concatenate([self._bos[: None if p else 0], next(ids)])
            for t, p in zip(texts, plain, strict=True)
        ]

    def _plan(self, record: Mapping[str, object]) -> _Plan:
        if "tokens" in record:
            return self._given(record["tokens"], record.get("loss_mask"))
        if "messages" in record:
            return self._template.conversation(record["messages"])
        if "prompt" in record and "completion" in record:
            return self._pair(record["prompt"], record["completion"])
        if "text" in record:
            return _problem("text", record["text"]) or self._document(str(record["text"]))
        half = {"prompt": "completion", "completion": "prompt"}
        missing = [half[name] for name in half if name in record]
        return Bad("missing value", f"of {missing[0] if missing else 'text, prompt + completion, messages or tokens'}")

    def _document(self, text: str) -> _Segments:
        texts = tuple(_pieces(text, PIECE_CHARACTERS)) if self._piecewise else (text,)
        return _Segments(texts, (True,) * len(texts), splittable=True)

    def _pair(self, prompt: object, completion: object) -> _Plan:
        if isinstance(prompt, list) and isinstance(completion, list):
            answer = self._template.answer(prompt, completion)
            if isinstance(answer, Bad):
                return answer
            return _Segments(answer, (False, True), bos=False, eos=not self._template.ends_turn(answer[1]))
        bad = _problem("prompt", prompt) or _problem("completion", completion)
        if bad:
            return bad
        if not len(self._eos):
            do = "Set eos_token in the tokenizer's configuration."
            raise Refusal(self._where, "prompt + completion, and a tokenizer without an EOS token", "an EOS token to end completions", do)
        return _Segments((str(prompt), str(completion)), (False, True))

    def _given(self, tokens: object, mask: object) -> Encoded | Bad:
        if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
            return Bad("tokens are not a list of integers, or an empty one")
        if min(tokens) < 0 or max(tokens) >= self._vocabulary:
            return Bad("token id outside the vocabulary", f"{min(tokens)}..{max(tokens)}, not within 0..{self._vocabulary - 1}")
        if mask is None:
            mask = [1] * len(tokens)
        if not isinstance(mask, list) or len(mask) != len(tokens) or not all(value in (0, 1) for value in mask):
            return Bad("loss_mask is not a list of 0 and 1 as long as tokens")
        return Encoded(np.asarray(tokens, dtype=np.int32), unpredicted_first(np.asarray(mask, dtype=np.uint8)))

    def _assemble(self, plan: _Plan, ids: list[Ids]) -> Encoded | Bad:
        if isinstance(plan, _Segments):
            return self._join(plan, ids)
        if isinstance(plan, Chat):
            return plan.assemble(ids[0], ids[1:])
        assert isinstance(plan, Encoded | Bad)
        return plan

    def _join(self, plan: _Segments, ids: list[Ids]) -> Encoded:
        none = self._eos[:0]
        start = self._bos if plan.bos else none
        end = self._eos if plan.eos and not np.array_equal(ids[-1][-1:], self._eos) else none
        counted = [np.full(len(part), flag, np.uint8) for part, flag in zip(ids, plan.counted, strict=True)]
        mask = np.concatenate([np.zeros(len(start), np.uint8), *counted, np.ones(len(end), np.uint8)])
        return Encoded(np.concatenate([start, *ids, end]), unpredicted_first(mask), plan.splittable)

    def _ids(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text, without special tokens around it."""
        ids: list[Ids] = []
        for group in _grouped(texts):
            out = self._tokenizer(group, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)
            ids += [np.asarray(own, dtype=np.int32) for own in out["input_ids"]]
        return ids

    def _prefix(self) -> Ids:
        """What the tokenizer puts before a text: BOS, or nothing."""
        plain = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self._tokenizer("a")["input_ids"]
        starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
        return np.asarray(whole[: starts[0]] if starts else [], dtype=np.int32)


def _texts(plan: _Plan) -> Sequence[str]:
    if isinstance(plan, _Segments):
        return plan.texts
    if isinstance(plan, Chat):
        return [plan.full, *itertools.chain.from_iterable(plan.spans)]
    return ()


def _problem(column: str, value: object) -> Bad | None:
    if not isinstance(value, str):
        return Bad(f"{column} is not a string", f"but of type {type(value).__name__}")
    if not value.strip():
        return Bad(f"{column} is empty")
    return None if is_unicode(value) else Bad("not valid Unicode")


def _pieces(text: str, size: int) -> list[str]:
    """The text cut after lone line breaks between words, every `size` characters or a little more."""
    cuts = [0]
    while match := _BREAK.search(text, cuts[-1] + size):
        cuts.append(match.end())
    return [text[start:stop] for start, stop in itertools.pairwise([*cuts, len(text)])]


def _grouped(texts: Sequence[str]) -> Iterator[list[str]]:
    """Consecutive texts in groups of about `CALL_CHARACTERS`."""
    group: list[str] = []
    held = 0
    for text in texts:
        if group and held + len(text) > CALL_CHARACTERS:
            yield group
            group, held = [], 0
        group.append(text)
        held += len(text)
    if group:
        yield group
