"""How a distillation runs: Ray Data streams, Ray Train trains, MLflow remembers.

    from orchestrator import distill
    result = distill("jobs/recipes/tiny_logits.yaml", ["train.lr=1e-3"])

Names are imported when first used, because Ray's small processes import modules of this package too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.errors import DistillError, Interrupted, Refusal, RunFailed
    from orchestrator.result import RunResult
    from orchestrator.run import distill, resume

__all__ = ["DistillError", "Interrupted", "Refusal", "RunFailed", "RunResult", "distill", "resume"]

_HOMES = {"distill": "run", "resume": "run", "RunResult": "result"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")
    return getattr(import_module(f"orchestrator.{_HOMES.get(name, 'errors')}"), name)
