"""What networks of one and of two models answer, compared with transformers in float32."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from server.worker.blocks import BLOCK_SIZE
from server.worker.network import ValueNetwork
from server.worker.residency import Residency
from tests.models import (
    make_contrast,
    make_mapped_network,
    make_model,
    make_network,
    make_sentencepiece_tokenizer,
    make_tokenizer,
)
from tests.server.worker.alone import (
    engine_config,
    plain_logits,
    process_group,
    residency,
    rows_of,
    tokens_of,
)
from tests.server.worker.engine import one_context_gb
from value_models.store import check_network

CONTEXT = 192
SIZE = {"max_position_embeddings": CONTEXT}
BUDGET = 48
"""Tokens of one forward: histories run in several."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("network")
    make_model(root / "target", **SIZE)
    make_network(root / "plain", seed=1, **SIZE)
    make_network(root / "referenced", seed=2, reference={"seed": 3, "vocab_size": 544}, **SIZE)
    # Both vocabularies are padded, one more than the other: the padding is in neither's way.
    padded = {"vocab_size": 544, "antiexpert": {"vocab_size": 576}}
    make_contrast(root / "contrast", seed=4, **padded, **SIZE)
    make_contrast(
        root / "unlike",
        seed=5,
        vocab_size=576,
        antiexpert={"architecture": "qwen3", "heads": 4, "kv_heads": 2, "vocab_size": 544},
        **SIZE,
    )
    other = make_sentencepiece_tokenizer()
    make_mapped_network(
        root / "mapped", make_tokenizer(), kind="contrast", tokenizer=other, seed=6, **SIZE
    )
    with process_group(root):
        yield root


NAMES = ("plain", "referenced", "contrast", "unlike", "mapped")


@pytest.fixture(scope="module", params=["ample", "one context"])
def worker(root: Path, request: pytest.FixtureRequest) -> Iterator[Residency]:
    """With ample memory and a prefix cache, and with pools that hold one context each."""
    networks = {name: root / name for name in NAMES}
    ample = request.param == "ample"
    memory = 0.1 if ample else one_context_gb(networks, CONTEXT)
    config = engine_config(root / "target", max_num_batched_tokens=BUDGET, max_model_len=CONTEXT)
    with residency(
        root / "target", networks, config, value_memory_gb=memory, prefix_caching=ample
    ) as worker:
        if not ample:
            for network in worker.networks():
                for pool in network.pools:
                    assert pool.num_tokens < 2 * pool.tables[0].block_ids.shape[1] * BLOCK_SIZE
        yield worker
        assert not any(network.failure for network in worker.networks())


@pytest.fixture(autouse=True)
def forget(worker: Residency) -> Iterator[None]:
    yield
    for network in worker.networks():
        for slot in range(8):
            network.release(slot)


def named(worker: Residency, name: str) -> ValueNetwork:
    return next(network for network in worker.networks() if network.folder.name == name)


def history(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, 480) for _ in range(length)]


def value_of(network: ValueNetwork, tokens: Sequence[int]) -> torch.Tensor:
    """Return what it should answer behind each token."""
    paths = {model.role: model.path for model in network.folder.models}
    if "value" in paths:
        return plain_logits(paths["value"], tokens)
    expert, base = (plain_logits(paths[role], tokens) for role in ("expert", "antiexpert"))
    covered = network.folder.vocab_size
    return expert[:, :covered] - base[:, :covered]


def distances_of(network: ValueNetwork, tokens: Sequence[int]) -> torch.Tensor:
    """Return KL(expert || base) behind each token, nats."""
    base_role = "reference" if "value" in network.models else "antiexpert"
    path = next(model.path for model in network.folder.models if model.role == base_role)
    value = value_of(network, tokens)
    base = plain_logits(path, tokens)[:, : value.shape[1]]
    expert = (base + value).log_softmax(-1)
    return (expert.exp() * (expert - base.log_softmax(-1))).sum(-1)


def assert_close(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=1e-3)


def opened(network: ValueNetwork, role: str) -> set[int]:
    return set(network.models[role].table.requests)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_transformers(worker: Residency, name: str) -> None:
    """Rows of all lengths at once, which grow by a token a step."""
    network = named(worker, name)
    whole = {slot: history(slot, length) for slot, length in enumerate((3, 40, 100, 129))}
    expected = {slot: value_of(network, tokens) for slot, tokens in whole.items()}
    for back in (3, 2, 1, 0):
        rows = {slot: tokens[: len(tokens) - back] for slot, tokens in whole.items()}
        rows = {slot: tokens for slot, tokens in rows.items() if tokens}
        value, distances = network.score(rows_of(rows))
        assert distances is None
        for row, (slot, tokens) in zip(value, rows.items(), strict=True):
            assert_close(row, expected[slot][len(tokens) - 1])


@pytest.mark.parametrize("name", ["referenced", "contrast", "unlike", "mapped"])
def test_distances_are_exact_and_only_of_rows_that_want_them(worker: Residency, name: str) -> None:
    network = named(worker, name)
    whole = {slot: history(10 + slot, length) for slot, length in enumerate((5, 70, 100, 31))}
    expected = {slot: distances_of(network, tokens) for slot, tokens in whole.items()}
    values = {slot: value_of(network, tokens) for slot, tokens in whole.items()}
    for back, wanted in ((2, [1, 0, 1, 0]), (1, [0, 0, 0, 0]), (0, [1, 0, 1, 1])):
        rows = {slot: tokens[: len(tokens) - back] for slot, tokens in whole.items()}
        chosen = np.array(wanted, dtype=bool)
        value, distances = network.score(rows_of(rows), chosen)
        if any(wanted):
            assert_close(
                distances,
                torch.stack([expected[s][-1 - back] for s in rows if wanted[s]]),
            )
        else:
            assert distances is None
        assert_close(value, torch.stack([values[slot][-1 - back] for slot in rows]))


def test_a_reference_never_reads_rows_that_want_no_distance(worker: Residency) -> None:
    network = named(worker, "referenced")
    rows = {slot: history(20 + slot, 9) for slot in range(4)}
    network.score(rows_of(rows))
    network.score_history(5, tokens_of(history(3, 20)), 0, 20, False)
    assert opened(network, "value") >= {5} and not opened(network, "reference")
    network.score(rows_of(rows), np.zeros(4, dtype=bool))
    assert not opened(network, "reference")
    network.score(rows_of(rows), np.array([False, True, False, False]))
    assert opened(network, "reference") == {1}
    network.rewind(2, 3)
    network.release(1)
    assert not opened(network, "reference") and 1 not in opened(network, "value")


@pytest.mark.parametrize("name", NAMES)
def test_a_history_read_in_chunks_is_not_computed_again(worker: Residency, name: str) -> None:
    """As rows in chunked prefill are: their samples are discarded, so they want no logits."""
    network = named(worker, name)
    tokens = history(35, 100)
    models = [model for role, model in network.models.items() if role != "reference"]
    for length in (40, 80):
        network.read(rows_of({2: tokens[:length]}))
    if worker._settings.prefix_caching:
        assert [model.table.computed[2] for model in models] == [80] * len(models)
    before = network.num_tokens
    assert_close(network.score(rows_of({2: tokens})).value[0], value_of(network, tokens)[-1])
    if worker._settings.prefix_caching:
        assert network.num_tokens - before == 20 * len(models)


def test_reading_takes_no_blocks_that_others_need(worker: Residency) -> None:
    network = named(worker, "plain")
    model = network.models["value"]
    row = history(36, 180)
    network.score(rows_of({0: row}))
    drops = model.table.drops
    network.read(rows_of({1: history(37, 40), 2: history(38, 40)}))
    assert model.table.drops == drops and model.table.computed[0] == 180
    for slot, seed in ((1, 37), (2, 38)):
        tokens = history(seed, 40)
        assert_close(network.score(rows_of({slot: tokens})).value[0], value_of(network, tokens)[-1])


def test_models_of_one_shape_share_a_pool(worker: Residency) -> None:
    plain, contrast, unlike = (named(worker, n) for n in ("plain", "contrast", "unlike"))
    assert contrast.pools == plain.pools
    assert len(unlike.pools) == 2 and plain.pools[0] in unlike.pools


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [7, 64, 150])
def test_a_history_scored_in_ascending_parts(worker: Residency, name: str, size: int) -> None:
    network = named(worker, name)
    tokens = history(30, 150)
    scores = [
        network.score_history(3, tokens_of(tokens), start, min(150, start + size), False)
        for start in range(0, 150, size)
    ]
    assert_close(torch.cat([score.value for score in scores]), value_of(network, tokens))
    assert all(score.distances is None for score in scores)
    first = next(iter(network.models.values()))
    assert first.table.computed[3] in (0, 150)  # 0: the other model has taken its blocks
    # The row goes on from there.
    longer = [*tokens, *history(31, 12)]
    assert_close(network.score(rows_of({3: longer})).value[0], value_of(network, longer)[-1])


@pytest.mark.parametrize("name", ["referenced", "contrast", "mapped"])
def test_distances_of_a_history(worker: Residency, name: str) -> None:
    network = named(worker, name)
    tokens = history(40, 90)
    scores = [
        network.score_history(1, tokens_of(tokens), start, stop, True)
        for start, stop in ((0, 60), (60, 90))
    ]
    found = torch.cat([score.distances for score in scores])
    assert_close(found, distances_of(network, tokens))
    assert_close(torch.cat([score.value for score in scores]), value_of(network, tokens))


@pytest.mark.parametrize("name", NAMES)
def test_a_history_is_scored_behind_the_row_that_has_computed_it(
    worker: Residency, name: str
) -> None:
    """Also where its blocks are those of another row, which goes on reading them."""
    network = named(worker, name)
    tokens = history(50, 140)
    other = [*tokens[:100], *history(51, 10)]
    for slot, row in ((0, other), (1, other[:100])):
        network.score(rows_of({slot: row}))
    for model in network.models.values():
        model.table.prefix_hits = 0
    network.score(rows_of({2: tokens}), None)
    if worker._settings.prefix_caching:
        model = next(iter(network.models.values()))
        assert model.table.prefix_hits >= 96
    spans = ((0, 50), (50, 139), (110, 139))
    expected = value_of(network, tokens)
    for start, stop in spans:
        scores = network.score_history(2, tokens_of(tokens), start, stop, False)
        assert_close(scores.value, expected[start:stop])
    # Both rows go on.
    for slot, row in ((0, [*other, 77]), (2, [*tokens, 78]), (1, [*other[:100], 79])):
        assert_close(network.score(rows_of({slot: row})).value[0], value_of(network, row)[-1])


def test_blocks_of_a_scored_history_are_shared_once_its_row_is_scored(worker: Residency) -> None:
    network = named(worker, "contrast")
    tokens = history(60, 130)
    network.score_history(0, tokens_of(tokens), 0, 130, False)
    network.score(rows_of({0: [*tokens, *history(61, 40)]}))
    before = [model.table.prefix_hits for model in network.models.values()]
    row = [*tokens, 5]
    assert_close(network.score(rows_of({4: row})).value[0], value_of(network, row)[-1])
    if worker._settings.prefix_caching:
        after = [model.table.prefix_hits for model in network.models.values()]
        assert all(b - a >= 128 for a, b in zip(before, after, strict=True))


def test_scoring_a_history_looks_into_no_prefix_cache(worker: Residency) -> None:
    network = named(worker, "plain")
    tokens = history(70, 130)
    network.score(rows_of({0: tokens}))
    network.release(0)
    table = network.models["value"].table
    before = table.prefix_queries
    network.score_history(1, tokens_of(tokens), 100, 130, False)
    assert table.prefix_queries == before and table.prefix_hits <= before


def test_what_a_network_rewrites_is_computed_anew_by_both_models(worker: Residency) -> None:
    network = named(worker, "mapped")
    tokens = history(80, 100)
    rows = rows_of({0: tokens})._replace(num_stable=np.array([90], dtype=np.int32))
    network.score(rows)
    rewritten = [*tokens[:95], *history(81, 10)]
    network.rewind(0, 95)
    rows = rows_of({0: rewritten})._replace(num_stable=np.array([95], dtype=np.int32))
    scores = network.score(rows, np.array([True]))
    assert_close(scores.value[0], value_of(network, rewritten)[-1])
    assert_close(scores.distances, distances_of(network, rewritten)[-1:])


def test_a_scored_history_that_is_rewritten_was_never_shared(worker: Residency) -> None:
    network = named(worker, "mapped")
    tokens = history(85, 130)
    network.score_history(0, tokens_of(tokens), 0, 130, False)
    rewritten = [*tokens[:60], *history(86, 100)]
    network.rewind(0, 60)
    network.score(rows_of({0: rewritten}))
    assert_close(network.score(rows_of({1: tokens})).value[0], value_of(network, tokens)[-1])


def test_tokens_that_no_model_knows_do_no_harm(worker: Residency) -> None:
    """A padded target may sample ids that its networks have no embedding for."""
    for network in worker.networks():
        tokens = [*history(90, 40), 5000, 6000]
        assert network.score(rows_of({0: tokens})).value.isfinite().all()
        scores = network.score_history(0, tokens_of(tokens), 30, 42, False)
        assert scores.value.isfinite().all() and len(scores.value) == 12


def test_numbers_are_sums_over_both_models(worker: Residency) -> None:
    network = named(worker, "contrast")
    before = network.num_tokens
    network.score(rows_of({0: history(95, 10)}))
    assert network.num_tokens - before == 20
    state = next(n for n in worker.status()["networks"] if n["name"] == "contrast")
    folder = check_network(network.folder.path)
    assert state["num_parameters"] == folder.num_parameters
    assert state["weights_bytes"] >= 4 * folder.num_parameters
    assert state["dynamic"] and state["vocab_size"] == 544
    assert state["forward_tokens"] == network.num_tokens
    dynamic = {n["name"] for n in worker.status()["networks"] if n["dynamic"]}
    assert dynamic == set(NAMES) - {"plain"}
