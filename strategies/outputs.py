"""What objectives see of the student: logits of some loss tokens, and what several terms want of them computed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


class TokenLogits:
    """Student logits of n tokens, `(n, V)` float32, differentiable by autograd."""

    def __init__(self, logits: Tensor, labels: Tensor):
        self._logits = logits
        self.labels = labels
        self._normalisers: dict[float, Tensor] = {}
        self._logprobs: dict[float, Tensor] = {}

    @property
    def logits(self) -> Tensor:
        """`(n, V)` float32. For a few ids of each token, `picked` costs less."""
        return self._logits

    def normaliser(self, temperature: float = 1.0) -> Tensor:
        """`logsumexp(z / T)`, `(n, 1)`."""
        if temperature not in self._normalisers:
            self._normalisers[temperature] = self._mass(None, temperature)
        return self._normalisers[temperature]

    def logprobs(self, temperature: float = 1.0) -> Tensor:
        """`log softmax(z / T)`, `(n, V)`."""
        if temperature not in self._logprobs:
            self._logprobs[temperature] = _tempered(self.logits, temperature) - self.normaliser(temperature)
        return self._logprobs[temperature]

    def label_logprobs(self) -> Tensor:
        """`log q(label)` at temperature 1, `(n,)`."""
        return (self.picked(self.labels[:, None]) - self.normaliser())[:, 0]

    def partition(self, ids: Tensor, temperature: float, want_tail: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of `ids` `(n, K)` int64, `(n, K)`, and of everything else together, `(n, 1)`.

        The tail is summed from its own logits: `1 - sum` would cancel once the student agrees with the teacher.
        """
        inside = _tempered(self.picked(ids), temperature)
        if not want_tail:
            return inside - self.normaliser(temperature), None
        outside = self._mass(ids, temperature)
        if temperature not in self._normalisers:
            self._normalisers[temperature] = torch.logaddexp(outside, torch.logsumexp(inside, -1, keepdim=True))
        normaliser = self._normalisers[temperature]
        return inside - normaliser, outside - normaliser

    def picked(self, ids: Tensor) -> Tensor:
        """Logits of `ids` `(n, K)` int64, `(n, K)`."""
        return self.logits.gather(-1, ids)

    def _mass(self, without: Tensor | None, temperature: float) -> Tensor:
        """`logsumexp(z / T)` over all ids but those of `without` `(n, K)`, `(n, 1)`."""
        kept = _tempered(self.logits, temperature)
        return torch.logsumexp(kept if without is None else kept.scatter(-1, without, -torch.inf), -1, keepdim=True)


class RecordedLogits(TokenLogits):
    """The same for one backward: what is asked for becomes a small leaf, and `gradient` puts the `(n, V)` together once.

    Autograd would make one `(n, V)` for each use of the logits and add them up. Most objectives ask only for masses
    `(n, 1)` and picked logits `(n, K)`. The gradient of a mass is a softmax, kept from when the mass was summed; that of
    picked logits is a scatter. An objective that reads `logits` or `logprobs` gets an `(n, V)` leaf and pays for it.
    """

    def __init__(self, logits: Tensor, labels: Tensor):
        """`logits` carries no gradient and is overwritten by `gradient`."""
        super().__init__(logits, labels)
        self._whole: Tensor | None = None
        self._picks: dict[_Key, tuple[Tensor, Tensor]] = {}
        self._masses: dict[tuple[_Key | None, float], _Mass] = {}

    @property
    def logits(self) -> Tensor:
        if self._whole is None:
            self._whole = self._logits.detach().requires_grad_()
        return self._whole

    def picked(self, ids: Tensor) -> Tensor:
        key = _key(ids)
        if key not in self._picks:
            self._picks[key] = ids, self._logits.gather(-1, ids).requires_grad_()
        return self._picks[key][1]

    def _mass(self, without: Tensor | None, temperature: float) -> Tensor:
        key = None if without is None else _key(without), temperature
        if key not in self._masses:
            self._masses[key] = _mass_of(self._logits, without, temperature)
        return self._masses[key].log_mass

    def gradient(self, total: Tensor) -> Tensor:
        """Gradient of the scalar `total` with respect to the logits, `(n, V)` float32, in the memory of the logits."""
        masses, picks = tuple(self._masses.values()), tuple(self._picks.values())
        leaves = [m.log_mass for m in masses] + [p[1] for p in picks] + ([] if self._whole is None else [self._whole])
        if not (leaves and total.requires_grad):
            return self._logits.zero_()
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        return self._put_together(found, masses, picks)

    @torch.no_grad()
    def _put_together(
        self, found: tuple[Tensor | None, ...], masses: tuple[_Mass, ...], picks: tuple[tuple[Tensor, Tensor], ...]
    ) -> Tensor:
        into, given = self._logits, None if self._whole is None else found[-1]
        for mass, by in zip(masses, found, strict=False):
            if by is not None:
                by = by / mass.temperature
                torch.mul(mass.shares, by, out=into) if given is None else torch.addcmul(given, mass.shares, by, out=into)
                given = into
        if given is None:
            into.zero_()
        elif given is not into:
            into.copy_(given)
        for (ids, _), by in zip(picks, found[len(masses) :], strict=False):
            if by is not None:
                into.scatter_add_(-1, ids, by)
        return into


@dataclass(frozen=True)
class _Mass:
    """`logsumexp(z / T)` over all outcomes but `without`, a leaf `(n, 1)`, and the share of each in it, `(n, V)`."""

    log_mass: Tensor
    shares: Tensor
    without: Tensor | None
    temperature: float


@torch.no_grad()
def _mass_of(logits: Tensor, without: Tensor | None, temperature: float) -> _Mass:
    tempered = _tempered(logits, temperature)
    if without is not None:
        tempered = tempered.scatter(-1, without, LOWEST)
    most = tempered.amax(-1, keepdim=True)
    shares = tempered.softmax(-1)
    log_mass = most - shares.amax(-1, keepdim=True).log()  # exact: the largest share is no less than 1/V
    if without is not None:  # where all other logits are -inf, the shares are those of `without`
        shares.scatter_(-1, without, 0.0)
        log_mass = torch.where(most > LOWEST, log_mass, -torch.inf)
    return _Mass(log_mass.requires_grad_(), shares, without, temperature)


_Key = tuple[int, torch.Size, tuple[int, ...]]


def _key(ids: Tensor) -> _Key:
    """Equal for views of the same memory, as two terms on one signal give; whoever keeps it must keep `ids` alive."""
    return ids.data_ptr(), ids.shape, ids.stride()


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature
