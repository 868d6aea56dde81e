"""How rows are laid out for a forward, and what CUDA graphs are replayed over."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from server.worker.blocks import BLOCK_SIZE
from server.worker.compilation import CompiledForwards
from server.worker.forward import Forward
from server.worker.graphs import DecodeGraphs, DecodeInputs, GraphMemory
from server.worker.loading import finish
from server.worker.model import NetworkModel
from tests.models import make_model, make_network
from tests.server.worker.alone import (
    engine_config,
    plain_logits,
    process_group,
    residency,
    rows_of,
)

CONTEXT = 192


class Replayed(DecodeGraphs):
    """Graphs without CUDA: what is captured runs again over the same inputs when replayed."""

    def capture(self, size: int, run: Callable[[DecodeInputs], torch.Tensor]) -> None:
        run(self._inputs.first(size))
        self._run = run

    def replay(self, size: int) -> torch.Tensor:
        return self._run(self._inputs.first(size))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkModel]:
    root = tmp_path_factory.mktemp("forward")
    target = make_model(root / "target", max_position_embeddings=CONTEXT)
    network = make_network(root / "network", seed=1, max_position_embeddings=CONTEXT)
    config = engine_config(target, max_model_len=CONTEXT)
    with process_group(root), residency(target, {"qa": network}, config) as worker:
        (resident,) = worker.networks()
        yield resident.models["value"]


@pytest.fixture(autouse=True)
def forget(model: NetworkModel) -> Iterator[None]:
    yield
    for slot in range(8):
        model.release(slot)
    model._forward.forget_graphs()


def histories(*lengths: int) -> dict[int, list[int]]:
    rng = np.random.default_rng(sum(lengths))
    return {slot: rng.integers(10, 480, length).tolist() for slot, length in enumerate(lengths)}


def assert_scored(model: NetworkModel, rows: dict[int, list[int]]) -> None:
    expected = torch.stack([plain_logits(model.path, row)[-1] for row in rows.values()])
    torch.testing.assert_close(model.score(rows_of(rows)), expected, atol=2e-3, rtol=1e-3)


def grow(rows: dict[int, list[int]], token: int) -> dict[int, list[int]]:
    return {slot: [*row, token] for slot, row in rows.items()}


def test_a_row_that_fills_a_block_keeps_no_other_from_the_fast_path(
    model: NetworkModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = histories(20, 29, 31, 32, 63)
    model.score(rows_of(rows))
    monkeypatch.setattr(model, "_extend", None)  # would be called for rows that owe tokens
    for token in range(20, 60):
        rows = grow(rows, token)
        if token % 8 == 0:
            assert_scored(model, rows)
        else:
            model.score(rows_of(rows))


def test_the_layout_of_rows_that_stay_is_kept_until_their_blocks_change(
    model: NetworkModel,
) -> None:
    rows = histories(40, 50)
    model.score(rows_of(rows))
    seen: list[object] = []
    slots = np.array([0, 1])
    for token in range(30, 60):
        rows = grow(rows, token)
        model.score(rows_of(rows)._replace(slots=slots))
        layout = model._forward._decode_rows
        assert layout is not None
        # Torch would compile the offset of one tensor in another into the forward.
        assert not any(tensor.storage_offset() for tensor in layout.next or ())
        if not seen or seen[-1] is not layout:
            seen.append(layout)
            for slot, row in rows.items():
                used = -(-len(row) // BLOCK_SIZE)
                own = model.table.block_ids[slot, :used].tolist()
                assert layout.block_ids[slot, :used].tolist() == own
    assert len(seen) == 3  # at first, and as either row fills a block
    assert_scored(model, grow(rows, 61))


def test_rows_that_go_on_into_blocks_that_they_have_already(model: NetworkModel) -> None:
    """A row that was cut short keeps its blocks: none changes where it comes to the next."""
    slots = np.array([0, 1])
    rows = histories(40, 50)
    model.score(rows_of(rows))
    for token in range(20, 60):
        rows = grow(rows, token)
        model.score(rows_of(rows)._replace(slots=slots))
    rows = {slot: row[:60] for slot, row in rows.items()}
    for slot, row in rows.items():
        model.rewind(slot, len(row))
    before = model.table.block_ids.copy()
    for token in range(100, 110):
        rows = grow(rows, token)
        if token == 100:
            assert_scored(model, rows)
        else:
            model.score(rows_of(rows)._replace(slots=slots))
    assert (model.table.block_ids == before).all()
    assert_scored(model, grow(rows, 111))


def test_rows_that_were_read_by_others_meanwhile_do_not_go_on(model: NetworkModel) -> None:
    slots = np.array([0, 1])
    rows = histories(40, 50)
    for token in (20, 21, 22):
        model.score(rows_of(rows)._replace(slots=slots))
        rows = grow(rows, token)
    lengths = np.array([len(row) for row in rows.values()], dtype=np.int32)
    assert model._forward.goes_on(slots, lengths)
    assert not model._forward.goes_on(slots.copy(), lengths)
    assert not model._forward.goes_on(slots, lengths + 1)
    model.rewind(1, int(lengths[1]) - 1)  # as rows of another vocabulary are: nothing is forgotten
    assert model._forward.goes_on(slots, lengths)
    model.rewind(1, 30)
    assert not model._forward.goes_on(slots, lengths)
    assert_scored(model, rows)


def test_other_rows_in_the_same_slots_are_laid_out_anew(model: NetworkModel) -> None:
    rows = histories(70, 35)
    model.score(rows_of(rows))
    assert_scored(model, grow(rows, 11))
    model.release(0)
    rows = {0: histories(90)[0], 1: [*rows[1], 11]}
    model.score(rows_of({0: rows[0]}))
    assert_scored(model, grow(rows, 12))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5])
def test_graphs_are_filled_up_with_rows_that_change_nothing(
    model: NetworkModel, num_rows: int
) -> None:
    forward = model._forward
    graphs = Replayed([2, 4], model.table.block_ids.shape[1], GraphMemory(), torch.device("cpu"))
    for size in graphs.sizes:
        graphs.capture(size, lambda inputs: forward._run_decode(inputs, None))
    rows = histories(*range(35, 35 + 8 * num_rows, 8))
    model.score(rows_of(rows))
    before = [cache[1:].clone() for cache in model.pool.layer_caches]
    forward._graphs = graphs
    # Graphs of more rows left their inputs behind.
    graphs._inputs.block_ids.fill_(3)
    graphs._inputs.lengths.fill_(60)
    assert_scored(model, grow(rows, 13 + num_rows))
    written = {int(model.table.block_ids[s, len(row) // BLOCK_SIZE]) for s, row in rows.items()}
    for cache, was in zip(model.pool.layer_caches, before, strict=True):
        changed = (cache[1:] != was).flatten(1).any(1).nonzero().flatten() + 1
        assert set(changed.tolist()) == written


def test_a_trial_run_comes_to_the_same_whatever_threads_do(model: NetworkModel) -> None:
    """Else a compiled forward would be taken for a wrong one at times, and not be used."""
    model.table.block_ids[0] = 0
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.get_num_threads() == 2  # workers of vLLM's forbid to set it
        first, *others = (model.trial().logits(eager=True) for _ in range(20))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first, other) for other in others)


def test_sizes_that_rows_are_replayed_at() -> None:
    graphs = Replayed([1, 2, 4, 8], 4, GraphMemory(), torch.device("cpu"))
    assert [graphs.size_for(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, None]


def test_models_of_one_shape_share_the_inputs_of_their_graphs() -> None:
    memory, device = GraphMemory(), torch.device("cpu")
    first, second, other = (Replayed([1, 4], blocks, memory, device) for blocks in (6, 6, 7))
    assert first._inputs is second._inputs and first._inputs is not other._inputs


def test_a_model_whose_graphs_cannot_be_captured_runs_without(
    model: NetworkModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Replayed):
        def capture(self, size: int, run: Callable[[DecodeInputs], torch.Tensor]) -> None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    warm_up(model, Broken, monkeypatch)
    assert not model._forward.has_graphs
    assert_scored(model, histories(40, 50))


@pytest.mark.parametrize("wrong", [False, True])
def test_graphs_that_compute_something_else_are_off(
    model: NetworkModel, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    class Graphs(Replayed):
        def replay(self, size: int) -> torch.Tensor:
            hidden = super().replay(size)
            return -hidden if wrong else hidden

    warm_up(model, Graphs, monkeypatch)
    assert model._forward.has_graphs is not wrong
    rows = histories(40, 50)
    model.score(rows_of(rows))
    assert_scored(model, grow(rows, 14))


def warm_up(
    model: NetworkModel, graphs: type[DecodeGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Try the model again, as on a device where vLLM captures graphs."""
    monkeypatch.setattr("server.worker.forward.DecodeGraphs", graphs)
    monkeypatch.setattr("server.worker.forward.graph_sizes", lambda *_: [2, 16])
    model.table.block_ids[0] = 0  # as in a table that no row has used
    finish(model.warm_up(CompiledForwards()))


def test_nothing_is_captured_where_vllm_captures_nothing(model: NetworkModel) -> None:
    forward: Forward = model._forward
    assert list(forward.capture(GraphMemory())) == []
    assert not forward.has_graphs
