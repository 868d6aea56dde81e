"""What networks read in a step beside the rows that they score: prompts that come in chunks."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from server.worker.guidance import Batch, Guidance
from server.worker.history import ListedHistory
from server.worker.residency import Residency
from server.worker.row import GuidedRow
from tests.models import TEXT, make_tokenizer
from tests.server.worker.one_row import VOCAB, chosen, guided, shrinking_prompt, three_networks


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Residency]:
    with three_networks(tmp_path_factory.mktemp("guidance")) as worker:
        yield worker


@pytest.fixture(autouse=True)
def sound(worker: Residency) -> Iterator[None]:
    yield
    for network in worker.networks():
        assert network.failure is None
        network.release(0)


def step(guidance: Guidance, prompt: list[int], length: int) -> torch.Tensor:
    """Run a step that ends behind `length` tokens of the prompt, which the target samples if it is
    whole. Returns guided logits, where the target's are 0."""
    batch = Batch(
        np.array([length], dtype=np.int32),
        np.array([length == len(prompt)]),
        torch.tensor([prompt[length - 1]], dtype=torch.int32),
        ["request"],
    )
    return guidance.step(torch.zeros(1, VOCAB), batch)


def encoded(text: str) -> list[int]:
    return list(make_tokenizer().encode(text, add_special_tokens=False))


@pytest.mark.parametrize("name", ["first", "mapped"])
def test_a_prompt_is_read_as_the_target_reads_it(worker: Residency, name: str) -> None:
    prompt = encoded(TEXT[100:260])
    choice, (network,) = chosen(worker, name)
    guidance, _ = guided(worker, choice, prompt)
    (whole,) = step(guidance, prompt, len(prompt))
    network.release(0)
    for pool in network.pools:
        pool._manager.reset_prefix_cache()
    guidance, _ = guided(worker, choice, prompt)
    read = []
    for length in (*range(20, len(prompt), 20), len(prompt)):
        before = network.num_tokens
        (logits,) = step(guidance, prompt, length)
        read.append(network.num_tokens - before)
        if length < len(prompt):
            masked = logits == float("-inf")
            assert not logits[~masked].any()  # not guided: its sample is discarded
    assert min(read) > 0 and read[-1] < sum(read) / 2
    torch.testing.assert_close(logits, whole, atol=2e-3, rtol=1e-3)


def test_a_prompt_that_is_scored_is_not_read_ahead_as_well(worker: Residency) -> None:
    prompt = encoded(TEXT[:200])
    choice, (network,) = chosen(worker, "first")
    guidance = Guidance(worker, torch.device("cpu"), None)
    row = GuidedRow(choice, ListedHistory(prompt, []), scores_prompt=True)
    row.slot = 0
    guidance.arrange({0: row})
    before = network.num_tokens
    step(guidance, prompt, 30)
    assert network.num_tokens == before


def test_a_beginning_that_is_too_long_does_not_end_a_prompt_that_fits(worker: Residency) -> None:
    choice, (network,) = chosen(worker, "mapped")
    prompt = shrinking_prompt(network)
    guidance, row = guided(worker, choice, prompt)
    step(guidance, prompt, len(prompt) - 1)
    assert not guidance.ended(row) and not guidance.any_ended
    logits = step(guidance, prompt, len(prompt))
    assert not guidance.ended(row) and logits[0].isfinite().any()


def test_a_chunk_of_which_nothing_is_settled_is_read_later(worker: Residency) -> None:
    choice, _ = chosen(worker, "mapped")
    prompt = encoded("Kovac é was here")
    guidance, row = guided(worker, choice, prompt)
    for length in range(1, len(prompt) + 1):
        step(guidance, prompt, length)
    assert not guidance.ended(row)
