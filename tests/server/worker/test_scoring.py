"""Prompts that are scored, without an engine: what can go wrong, and what it costs."""

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from server.worker.guidance import Batch, Guidance
from server.worker.history import ListedHistory
from server.worker.mirror import MirroredHistory, TokenMirror
from server.worker.prompt_scores import SCORED_AT_ONCE, PromptScorer
from server.worker.residency import Residency
from server.worker.row import GuidedRow
from server.worker.scoring import guide_prompt_scores, guide_prompt_worker
from tests.models import TEXT, make_tokenizer
from tests.server.worker.one_row import (
    CONTEXT,
    VOCAB,
    chosen,
    guided,
    shrinking_prompt,
    three_networks,
)
from value_models.guided import Opinion, combine


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Residency]:
    with three_networks(tmp_path_factory.mktemp("scoring")) as worker:
        yield worker


def test_a_prompt_whose_beginning_is_too_long_ends_its_request_only(worker: Residency) -> None:
    choice, (network,) = chosen(worker, "mapped")
    prompt = shrinking_prompt(network)
    guidance, row = guided(worker, choice, prompt)
    scores = PromptScorer(guidance).score(row, torch.zeros(len(prompt) - 1, VOCAB), 0)
    assert scores.isnan().all()
    assert guidance.ended(row) and guidance.any_ended
    assert network.failure is None
    assert not network.models["value"].table.requests


def test_a_score_that_cannot_be_made_fails_no_network(
    worker: Residency, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Say for want of memory: then the request is to blame, or nobody."""
    choice, networks = chosen(worker, "first", "second")
    guidance, row = guided(worker, choice, list(range(10, 20)))

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(PromptScorer, "score", out_of_memory)
    model = SimpleNamespace(compute_logits=lambda hidden: torch.zeros(len(hidden), VOCAB))
    runner: Any = SimpleNamespace(
        model=model,
        num_prompt_logprobs={"request": 1},
        query_start_loc=SimpleNamespace(np=np.array([0, 9])),
        input_batch=SimpleNamespace(num_reqs=1, num_computed_tokens_cpu=np.array([0])),
        _get_prompt_logprobs_dict=lambda hidden, _: {"request": model.compute_logits(hidden)},
    )
    guide_prompt_scores(runner, guidance, {0: row})
    assert runner._get_prompt_logprobs_dict(torch.zeros(9, 4), {})["request"].isnan().all()
    assert not any(network.failure for network in networks)


def test_a_prompt_that_the_host_cannot_read_fails_no_network(worker: Residency) -> None:
    """In the V2 runner, whose tokens are on the device. The last position belongs to nobody."""
    choice, networks = chosen(worker, "first")
    guidance = Guidance(worker, torch.device("cpu"), None)
    row = GuidedRow(choice, MirroredHistory(TokenMirror(1, 16), 0, 9))
    row.slot, row.failed = 0, True
    scores: Any = SimpleNamespace(
        uses_prompt_logprobs=np.array([True]),
        compute_prompt_logprobs=lambda logits_of, hidden, _: logits_of(hidden),
        compute_prompt_token_id_logprobs=None,
    )
    guide_prompt_worker(scores, guidance, {0: row})
    batch = SimpleNamespace(
        idx_mapping_np=np.array([0]),
        prefill_len_np=np.array([9]),
        query_start_loc_np=np.array([0, 9]),
        num_computed_prefill_tokens_np=np.array([0]),
        num_scheduled_tokens=np.array([9]),
    )
    logits = scores.compute_prompt_logprobs(
        lambda hidden: torch.zeros(len(hidden), VOCAB), torch.zeros(9, 4), batch
    )
    assert logits[:-1].isnan().all() and not logits[-1].isnan().any()
    assert not any(network.failure for network in networks)


def test_several_networks_take_no_more_memory_than_one(
    worker: Residency, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    prompt = [rng.randrange(10, 480) for _ in range(CONTEXT)]
    choice, networks = chosen(worker, "first", "second")
    guidance, row = guided(worker, choice, prompt)
    sizes = []
    for network in networks:
        score = network.score_history

        def recorded(slot: int, tokens: Any, start: int, stop: int, *rest: Any) -> Any:
            sizes.append(stop - start)
            return score(slot, tokens, start, stop, *rest)  # noqa: B023

        monkeypatch.setattr(network, "score_history", recorded)
    logits = torch.zeros(CONTEXT - 1, VOCAB)
    PromptScorer(guidance).score(row, logits, 0)
    assert max(sizes) * len(networks) <= SCORED_AT_ONCE
    assert sum(sizes) == len(networks) * (CONTEXT - 1)


def test_a_network_of_another_vocabulary_scores_what_just_grows_together(
    worker: Residency, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each position is scored as if the prompt had ended there, in far fewer forwards."""
    choice, (network,) = chosen(worker, "mapped")
    prompt = make_tokenizer().encode(TEXT[:200], add_special_tokens=False)
    guidance, row = guided(worker, choice, prompt)
    spans = []
    score = network.score_history

    def recorded(slot: int, tokens: Any, start: int, stop: int, *rest: Any) -> Any:
        spans.append((start, stop))
        return score(slot, tokens, start, stop, *rest)

    monkeypatch.setattr(network, "score_history", recorded)
    # In two chunks; they end and begin wherever it may be.
    parts = [(0, 31), (31, len(prompt) - 1)]
    found = torch.cat(
        [PromptScorer(guidance).score(row, torch.zeros(b - a, VOCAB), a) for a, b in parts]
    )
    assert network.translator is not None
    reader = network.translator._reader
    plain = AutoModelForCausalLM.from_pretrained(network.folder.path, dtype=torch.float32)
    for position, scores in enumerate(found):
        reading = reader.read(prompt[: position + 1])
        if reading.waiting:
            assert not scores.any()
            continue
        value = plain(torch.tensor([list(reading.ids)])).logits[0, -1]
        columns = reader.map.columns[-1 if reading.at_start else 0]
        expected = combine(torch.zeros(VOCAB), [Opinion(value, 1.0, None, columns)])
        torch.testing.assert_close(scores, expected.float(), atol=2e-3, rtol=1e-3)
    assert len(spans) < 0.6 * len(found)


def test_rows_that_cannot_be_fused_fail_alone(
    worker: Residency, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Say for want of memory: their networks steer others well."""
    prompt = [20, 21, 22]
    floored, networks = chosen(worker, "first", floor=0.01)
    plain, _ = chosen(worker, "first")
    guidance = Guidance(worker, torch.device("cpu"), None)
    rows = {
        0: GuidedRow(floored, ListedHistory(prompt, [])),
        1: GuidedRow(plain, ListedHistory(prompt, [])),
    }
    for slot, row in rows.items():
        row.slot = slot
    guidance.arrange(rows)
    monkeypatch.setattr(guidance, "_fuse", lambda *_: torch.empty(1 << 60))
    lengths = np.array([3, 3], dtype=np.int32)
    batch = Batch(lengths, np.array([True, True]), torch.tensor([22, 22]), ["a", "b"])
    with torch.inference_mode():
        guidance.step(torch.randn(2, VOCAB), batch)
    assert [guidance.ended(row) for row in rows.values()] == [True, False]
    assert networks[0].failure is None
    for row in rows.values():
        guidance.release(row)
