"""The loop somebody writes in an afternoon: teacher forward, student forward and backward, AdamW, in one process.

`python -m tests.benchmarks.bare_loop SPEC TRACE`. The same models, rows, loss and optimizer as the product; nothing is
chunked, streamed, logged, checkpointed or checked.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from strategies.signals import TAIL_FLOOR
from tests.benchmarks.loop import LoopSpec, batches
from tests.benchmarks.window import Trace


def train(spec: LoopSpec) -> Trace:
    """Trains for `spec.steps` steps."""
    torch.set_num_threads(spec.threads)
    student = AutoModelForCausalLM.from_pretrained(spec.student, dtype=torch.float32).train()
    teacher = AutoModelForCausalLM.from_pretrained(spec.teacher, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay, fused=True)
    times, tokens, losses = [], [], []
    for batch in batches(spec):
        ids, mask = batch.padded()
        labels, weights = ids.roll(-1, 1).flatten(), mask.roll(-1, 1)
        weights[:, -1] = 0.0
        with torch.inference_mode():
            logits = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            best, best_ids = logits.topk(spec.top_k)
            log_p = best - logits.logsumexp(-1, keepdim=True)
        out = student(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        loss = token_loss(out, labels, best_ids.clone(), log_p.clone(), spec) @ weights.flatten() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), spec.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        tokens.append(batch.tokens)
        times.append(time.time())
    return Trace(tuple(times), tuple(tokens), tuple(losses))


def token_loss(logits: Tensor, labels: Tensor, ids: Tensor, log_p: Tensor, spec: LoopSpec) -> Tensor:
    """Cross-entropy and forward KL on the teacher's top tokens and one bucket for the rest, weighted, `(N,)`."""
    log_q = logits.log_softmax(-1)
    inside = log_q.gather(-1, ids)
    q_tail = torch.log1p(-inside.exp().sum(-1).clamp(max=1 - 1e-6))
    p, p_tail = log_p.exp(), (1 - log_p.exp().sum(-1)).clamp(min=TAIL_FLOOR)
    kd = (p * (log_p - inside)).sum(-1) + p_tail * (p_tail.log() - q_tail)
    return spec.kd_weight * kd - spec.ce_weight * log_q.gather(-1, labels[:, None])[:, 0]


if __name__ == "__main__":
    train(LoopSpec.load(Path(sys.argv[1]))).save(Path(sys.argv[2]))
