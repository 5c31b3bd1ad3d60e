"""Checks of who writes: processes of endpoints whose text is not there yet fit, their servers write, and texts end alike."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.endpoints import probe_writer
from cluster.offers import Unfit, WritingOffer
from cluster.resources import demands, machine_cpus
from orchestrator.authored import Text, WantedText, last_token, stop_tokens
from orchestrator.checks import machine
from orchestrator.checks.actors import check_endpoint
from orchestrator.checks.networks import Cast
from orchestrator.config import Job
from orchestrator.errors import Refusal
from orchestrator.memory import author_memory, small_process, surroundings
from orchestrator.prompts import Prompts
from strategies.core import Strategy
from strategies.sources import TakenActions
from strategies.stages.score import Score


def check_authors(job: Job, people: Cast, text: Text | None) -> tuple[dict[str, WritingOffer], list[str]]:
    """How the servers among them write, by endpoint, and warnings. `Refusal` for one that cannot."""
    offers: dict[str, WritingOffer] = {}
    if text is None:
        return offers, []
    for wanted in text.missing:
        name, sampling = wanted.spec.name, wanted.authored.write.sampling
        check_endpoint(name, job.endpoints[name], people, (), [sampling], text.prompts.longest_tokens + sampling.max_new_tokens)
        _check_fits(job, people, name)
        offer = _offer(job, wanted)
        if offer is not None:
            _check_length(job, offer, text.prompts, wanted)
            offers[name] = offer
    return offers, _unknown(job, offers)


def check_ends(job: Job, strategy: Strategy, people: Cast) -> None:
    """`Refusal` for a teacher whose texts end with another token than the student's, where the end is rewarded like any token that the
    student writes: never likely to the teacher, it would be unlearnt."""
    acted = [s for s in strategy.signals.values() if isinstance(s, TakenActions)]
    asked = {stage.signal: stage.endpoint for stage in strategy.stages if isinstance(stage, Score)}
    names = {asked[name] for s in acted for name in (s.teacher, s.reference) if name in asked}
    for name in sorted(names & people.tokenizers.keys()):
        ours, theirs = people.tokenizer, people.tokenizers[name]
        end = last_token(job.run.data, ours)
        if end is not None and theirs.eos_token_id is not None and end not in stop_tokens(theirs):
            got = f"{ours.convert_ids_to_tokens(end)!r}, and endpoint {name!r} never ends a text so"
            expected = "an end that both have, because each token that the student writes is rewarded by how likely the teacher calls it"
            raise Refusal("student.tokenizer", f"texts that end with {got}", expected, "Give both tokenizers the same eos_token.")


def _check_fits(job: Job, people: Cast, name: str) -> None:
    """The processes of an endpoint that writes fit while nothing else runs."""
    model = job.endpoints[name].saved_model
    wanted = demands(job.cluster, {name: job.endpoints[name]}, 0, machine_cpus())[1:]
    machine.check_processors(job, wanted)
    held = [author_memory(people.teachers[name], model, d) if model and d.role == name else small_process(d) for d in wanted]
    machine.check_memory(job, [*held, surroundings()], 0)


def _offer(job: Job, wanted: WantedText) -> WritingOffer | None:
    name = wanted.spec.name
    try:
        offer = probe_writer(job.endpoints[name])
        if offer is not None:
            offer.check(wanted.authored.write.sampling)
    except Unfit as error:
        raise Refusal(f"endpoints.{name}.{error.field}", error.got, error.expected, error.do) from error
    return offer


def _check_length(job: Job, offer: WritingOffer, prompts: Prompts, wanted: WantedText) -> None:
    """The longest prompt and text fit a server's context."""
    new = wanted.authored.write.sampling.max_new_tokens
    if offer.context_tokens is not None and prompts.longest_tokens + new > offer.context_tokens:
        do = f"Set data.max_length_tokens={offer.context_tokens} or less, or serve {offer.model!r} with a longer context."
        got = f"prompts of {prompts.longest_tokens} tokens and {new} new ones"
        expected = f"at most the {offer.context_tokens} together that endpoints.{wanted.spec.name} holds ({offer.url})"
        raise Refusal("data.max_length_tokens", got, expected, do)


def _unknown(job: Job, offers: Mapping[str, WritingOffer]) -> list[str]:
    unnamed = [name for name in offers if job.endpoints[name].own_tokenizer is None]
    silent = [name for name, offer in offers.items() if offer.context_tokens is None]
    return [f"endpoint {n!r} names no tokenizer; its model is taken to share the student's." for n in unnamed] + [
        f"the server of endpoint {n!r} does not tell its context." for n in silent
    ]
