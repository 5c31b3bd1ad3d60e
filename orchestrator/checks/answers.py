"""Checks of evaluations in which the student answers held-out prompts."""

from __future__ import annotations

from pathlib import Path

from cluster.config import VerifierEndpoint
from orchestrator.answers import Answers
from orchestrator.authored import stop_tokens
from orchestrator.checks.actors import check_endpoint
from orchestrator.checks.networks import Cast
from orchestrator.config import Job
from orchestrator.data import PreparedData
from orchestrator.errors import Refusal
from orchestrator.explain import nearest
from orchestrator.layouts import layout_facts
from orchestrator.tokenizers import with_tokenizers
from strategies.core import Sampling
from strategies.stages.rollout import LONGEST_ROW

WHERE = "evaluate.answers"


def check_answers(job: Job, people: Cast, data: PreparedData, cache: Path) -> Answers | None:
    """What workers need to know to let the student answer; None where nobody asks. `Refusal` for what cannot be: without a verifier,
    where no worker has the whole student, or where answers leave no room for a prompt. A tokenizer that the verifier needs is kept in
    `cache`."""
    asked = job.run.evaluate.answers
    if asked is None:
        return None
    judge = _judge(job, asked.verifier)
    check_endpoint(asked.verifier, judge, people, (), (), 0)
    train = job.run.train
    if layout_facts(train.layout).held(train.layout, 2).weights < 1:
        do = "Set train.layout to single or ddp, or deepspeed with zero_stage up to 2, or leave it out: `distill evaluate` does it later."
        raise Refusal(WHERE, f"layout {train.layout.type}, which shards the weights", "a whole student in every worker", do)
    longest = people.student.context or LONGEST_ROW
    if asked.max_new_tokens >= longest:
        do = f"Set it below {longest}, by the length of a prompt."
        raise Refusal(f"{WHERE}.max_new_tokens", f"{asked.max_new_tokens}", f"less than the {longest} positions of the student", do)
    known = with_tokenizers({asked.verifier: judge}, people.tokenizer, cache)[asked.verifier]
    assert isinstance(known, VerifierEndpoint)
    return Answers(
        judge=known,
        sampling=Sampling(max_new_tokens=asked.max_new_tokens, stop=stop_tokens(people.tokenizer)),
        first_row=data.train.rows,
        rows=asked.rows,
        longest_tokens=longest,
        usable=people.vocabulary,
        forward_tokens=train.micro_batch_tokens,
    )


def _judge(job: Job, name: str) -> VerifierEndpoint:
    config = job.endpoints.get(name)
    if config is None:
        do = f"{nearest(name, job.endpoints)}Set endpoints.{name}={{engine: verifier, kind: math}}, or another kind."
        raise Refusal(f"{WHERE}.verifier", f"{name!r}, which nothing defines", "an endpoint that judges", do)
    if not isinstance(config, VerifierEndpoint):
        do = f"Set endpoints.{name}={{engine: verifier, kind: math}}, or name another one."
        raise Refusal(f"{WHERE}.verifier", f"{name!r}, of the engine {config.engine!r}", "an endpoint that judges", do)
    return config
