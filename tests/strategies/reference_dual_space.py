"""Float64 references for dual-space distillation, row by row and token by token; gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def _unit(x: Tensor) -> Tensor:
    return x / (x - x.mean()).square().mean().sqrt()


def spaces(t: Mapping[str, Tensor], exact: bool) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """States in the other's space by token: `t2s` of the student's that count and `s2t` of the teacher's.

    `t` has for a side `q` or `p` hidden states `h`, embeddings `e`, `reads`, `labels`, `rows` and `spans`; `w` weights of the student's
    tokens, and the filters `t2s`, `s2t` and `query`.
    """
    ours = [i for i in range(len(t["hq"])) if t["w"][i] != 0 and t["spansq"][i] >= 0]
    counted = {int(t["spansq"][i]) for i in ours}
    theirs = [j for j in range(len(t["hp"])) if int(t["spansp"][j]) in counted]
    into, back = {}, {}
    if exact:
        for i in ours:
            same = [j for j in theirs if t["spansp"][j] == t["spansq"][i]]
            into[i] = torch.stack([t["t2s"] @ t["hp"][j] for j in same]).mean(0)
        for j in theirs:
            same = [i for i in ours if t["spansp"][j] == t["spansq"][i]]
            back[j] = torch.stack([t["s2t"] @ t["hq"][i] for i in same]).mean(0)
        return into, back
    query = {i: t["query"] @ torch.cat([_unit(t["eq"][t["readsq"][i]]), _unit(t["eq"][t["labelsq"][i]])]) for i in ours}
    key = {j: torch.cat([_unit(t["ep"][t["readsp"][j]]), _unit(t["ep"][t["labelsp"][j]])]) for j in theirs}
    value = {j: t["t2s"] @ (_unit(t["hp"][j]) + _unit(t["ep"][t["labelsp"][j]])) for j in theirs}

    def share(i: int, j: int) -> Tensor:
        return (query[i] @ key[j]) / (2 * t["hp"].shape[1]) ** 0.5

    for i in ours:
        row = [j for j in theirs if t["rowsp"][j] == t["rowsq"][i]]
        a = torch.stack([share(i, j) for j in row]).softmax(0)
        into[i] = sum((a[n] * value[j] for n, j in enumerate(row)), torch.zeros((), dtype=torch.float64))
    for j in theirs:
        row = [i for i in ours if t["rowsp"][j] == t["rowsq"][i]]
        a = torch.stack([share(i, j) for i in row]).softmax(0)
        back[j] = sum((a[n] * (t["s2t"] @ t["hq"][i]) for n, i in enumerate(row)), torch.zeros((), dtype=torch.float64))
    return into, back


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()


def task(t: Mapping[str, Tensor], exact: bool) -> Tensor:
    into, _ = spaces(t, exact)
    return torch.stack([-t["w"][i] * (t["headq"].detach() @ s).log_softmax(-1)[t["labelsq"][i]] for i, s in into.items()]).sum()


def student_space(t: Mapping[str, Tensor], exact: bool) -> Tensor:
    into, _ = spaces(t, exact)
    total = t["hq"].sum() * 0.0
    for i, s in into.items():
        p = (t["headq"] @ s).detach()
        if int(p.argmax()) == int(t["labelsq"][i]):
            total = total + t["w"][i] * _kl(p, t["headq"] @ t["hq"][i])
    return total


def teacher_space(t: Mapping[str, Tensor], exact: bool) -> Tensor:
    _, back = spaces(t, exact)
    total = t["hq"].sum() * 0.0
    for j, s in back.items():
        weight = max(float(t["w"][i]) for i in range(len(t["hq"])) if t["spansq"][i] == t["spansp"][j])
        total = total + weight * _kl(t["headp"] @ t["hp"][j], t["headp"] @ s)
    return total


PARTS: dict[str, Callable[[Mapping[str, Tensor], bool], Tensor]] = {
    "student-space-task": task,
    "student-space": student_space,
    "teacher-space": teacher_space,
}
