"""What TRL's trainers are told in every benchmark. Imports nothing of TRL."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.loop import LoopSpec


def shared_arguments(spec: LoopSpec, folder: str) -> dict[str, Any]:
    """What both sides share, and that TRL reports and saves nothing. Without gradient checkpointing, which TRL turns on and the
    product does not, it is faster and larger."""
    return {
        "output_dir": folder,
        "max_steps": spec.steps,
        "per_device_train_batch_size": spec.batch_rows,
        "learning_rate": spec.lr,
        "weight_decay": spec.weight_decay,
        "adam_beta1": spec.betas[0],
        "adam_beta2": spec.betas[1],
        "max_grad_norm": spec.clip_norm,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": spec.gradient_checkpointing,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": spec.seed,
    }
