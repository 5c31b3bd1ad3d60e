"""Checks of endpoints that have the student's own network."""

from __future__ import annotations

from importlib.util import find_spec

from cluster.config import EndpointConfig, follows_student
from orchestrator.config import Job
from orchestrator.errors import Refusal
from orchestrator.following import average_rates, weight_sets
from strategies.core import Strategy


def check_following(job: Job, strategy: Strategy) -> None:
    """`Refusal` for an endpoint that nobody asks, whose engine takes no published weights, that would begin as a student that is saved
    nowhere, or that would need an average of weights where only an adapter is sent."""
    where, student = f"strategy.{job.run.strategy.type}", job.run.student
    asked = {stage.endpoint for stage in strategy.stages if stage.endpoint}
    for name in sorted(set(strategy.follows) - asked):
        known = ", ".join(sorted(asked)) or "none"
        raise Refusal(where, f"the endpoint {name!r}, which follows the student", f"one that a stage asks: {known}", "Mend the strategy.")
    if weight_sets(strategy) and job.cluster.weights_transport == "nixl" and find_spec("nixl") is None:
        do = "pip install nixl on every node, or set weights_transport: object_store in ray_config.yaml."
        raise Refusal("weights_transport", "no package 'nixl'", "the package that carries the weights", do)
    for name in sorted(asked & set(weight_sets(strategy))):
        _check_takes_weights(name, job.endpoints.get(name))
    for name in sorted(asked - set(weight_sets(strategy))):
        config = job.endpoints.get(name)
        if config is not None and follows_student(config):
            got = "true, and nothing of the strategy lets it follow the student: its weights would stay random"
            raise Refusal(f"endpoints.{name}.follows_student", got, "false", "Drop it, or set strategy.weights to average or live.")
    still = sorted(name for name, follow in strategy.follows.items() if not follow.moves)
    if student.truncate is not None and (weight_sets(strategy) or still):
        do = "Save it first, by a run of strategy=cross-entropy, and start from its exported folder."
        got = "a student that is cut out of a larger network, and writes or teaches while it trains"
        raise Refusal("student.truncate", got, "a student that is saved as it is, because others load its configuration", do)
    if still and student.init == "random":
        got = f"'random', for a student that is also its own teacher {still[0]!r}, as it begins"
        do = "Start from a saved model, or let the teacher follow: strategy.weights=average."
        raise Refusal("student.init", got, "'pretrained', because fresh weights are saved nowhere", do)
    if average_rates(strategy) and student.lora is not None and student.lora.publish == "adapter":
        do = "Set student.lora.publish=merged, or another policy of the teacher's weights."
        got = "'adapter', with a teacher that is a moving average of the student"
        raise Refusal("student.lora.publish", got, "'merged', because an average of products is no product of averages", do)


def _check_takes_weights(name: str, config: EndpointConfig | None) -> None:
    """The weights that training publishes have somewhere to go."""
    if config is None:
        return
    where = f"endpoints.{name}"
    if not config.follows:
        do = f"Leave out {where}, or take an engine inside the run: transformers, or vllm on GPUs."
        got = f"{config.engine!r}, which takes no weights, for an endpoint that has the student's while it trains"
        raise Refusal(f"{where}.engine", got, "an engine that takes published weights", do)
    if config.saved_model is None:
        return
    if not follows_student(config):
        got = "false, for an endpoint that has the student's weights while it trains"
        raise Refusal(f"{where}.follows_student", got, "true", f"Set {where}.follows_student=true.")
    if config.saved_model.quantization != "none":
        got = f"{config.saved_model.quantization!r}, for an endpoint that takes published weights"
        raise Refusal(f"{where}.quantization", got, "'none'", "Drop it; dtype=bfloat16 halves float32 weights.")
