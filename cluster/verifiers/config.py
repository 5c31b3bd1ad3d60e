"""Settings of an endpoint that judges."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, JsonValue, PositiveInt, model_validator

from cluster.settings import EndpointModel, ModelName, Resources


class VerifierEndpoint(EndpointModel):
    """Says whether written texts are right, by their rows' own completions. Loads no model and scores nothing."""

    scores: ClassVar[bool] = False
    judges: ClassVar[bool] = True
    engine: Literal["verifier"]
    kind: Literal["math", "exact", "numeric", "regex", "callable", "tests"]
    """`math`: equal formulas or numbers; `exact`: the same words; `numeric`: equal numbers; `regex`: the same words, found by
    `pattern`; `callable`: what `function` says; `tests`: the reference is Python code that tests the text's last block of code."""
    pattern: str | None = None
    """`regex` only: a Python pattern whose first group is the answer; the last match counts."""
    function: str | None = None
    """`callable` only: `package.module:function`, which takes text and reference and returns a bool, or a reward from 0 to 1."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 10.0
    """For one text, until it counts as not judged; for `tests` as wrong."""
    tokenizer: ModelName | None = None
    """Folder or hub name of the tokenizer that the tokens come from; the student's when absent."""
    actors: PositiveInt = 1
    """Each judges one text at a time."""
    resources: Resources = Resources(cpus=0.1, threads=1)

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> VerifierEndpoint:
        for name, kind in (("pattern", "regex"), ("function", "callable")):
            given = getattr(self, name)
            if (self.kind == kind) != (given is not None):
                raise ValueError(f"{name}: got {given!r} for the kind {self.kind}; expected one for the kind {kind}, and for no other")
        if self.function is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.function):
            raise ValueError(f"function: got {self.function!r}; expected package.module:function")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern: got {self.pattern!r} ({error}); expected a Python pattern") from error
        return self

    def with_tokenizer(self, folder: str) -> Self:
        return self if self.tokenizer else self.model_copy(update={"tokenizer": folder})

    @property
    def own_tokenizer(self) -> str | None:
        return self.tokenizer

    @property
    def identity(self) -> dict[str, JsonValue]:
        return self.model_dump(mode="json", include={"engine", "kind", "pattern", "function"})
