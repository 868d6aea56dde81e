"""The same tasks by a server and by the reference, and how far their numbers lie apart."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from value_models.demo.evaluate import WEIGHTS
from value_models.demo.harness.reference import GuidedLM
from value_models.store import check_network

TASKS = ("atlas_choice", "atlas_answer")


@dataclass(frozen=True)
class Result:
    """What one model did on the tasks."""

    accuracy: dict[str, float]
    """Share of the documents that were right, per task."""
    loglikelihoods: list[float]
    """Of each choice of each document of `atlas_choice`, in nats."""
    greedy: list[bool]
    """Whether the model would have said that choice, greedily."""
    answers: list[str]
    """To each document of `atlas_answer`."""


def served(url: str, model: str, limit: int | None = None, weights: Path = WEIGHTS) -> Result:
    """What a server's model does: a network's name chooses the guided target.

    Args:
        url: of the server, without a path.
        limit: at most so many documents of each task.
        weights: folder of the demo family, for the target's tokenizer.
    """
    api = LocalCompletionsAPI(
        model=model,
        base_url=f"{url}/v1/completions",
        tokenizer=str(weights / "target"),
        tokenizer_backend="huggingface",
        num_concurrent=4,
    )
    return _evaluate(api, limit)


def reference(name: str | None, limit: int | None = None, weights: Path = WEIGHTS) -> Result:
    """What the target does in transformers, guided by the network of that name, or alone."""
    if name is None:
        return _evaluate(GuidedLM(weights / "target"), limit)
    network = check_network(weights / "networks" / name)
    scale = network.manifest.default_scale
    return _evaluate(GuidedLM(weights / "target", network.path, scale), limit)


def _evaluate(model: LM, limit: int | None) -> Result:
    folder = Path(__file__).parent
    output: dict[str, Any] = simple_evaluate(
        model,
        tasks=list(TASKS),
        limit=limit,
        apply_chat_template=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    samples = {task: sorted(output["samples"][task], key=itemgetter("doc_id")) for task in TASKS}
    choices = [choice for sample in samples["atlas_choice"] for choice in sample["filtered_resps"]]
    results = output["results"]
    return Result(
        accuracy={
            "atlas_choice": float(results["atlas_choice"]["acc,none"]),
            "atlas_answer": float(results["atlas_answer"]["exact_match,none"]),
        },
        loglikelihoods=[float(loglikelihood) for loglikelihood, _ in choices],
        greedy=[bool(greedy) for _, greedy in choices],
        answers=[sample["filtered_resps"][0] for sample in samples["atlas_answer"]],
    )
