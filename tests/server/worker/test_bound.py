"""Compiled forwards that have looked up their weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import vllm.ir

from server.worker.bound import BoundForward, Run, bind
from server.worker.model import NetworkModel
from tests.models import make_model, make_network
from tests.server.worker.alone import engine_config, process_group, residency, rows_of

NAMES = ("first", "second")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("bound")
    make_model(root / "target")
    for seed, name in enumerate(NAMES):
        make_network(root / name, seed=seed)
    with process_group(root):
        yield root


@contextmanager
def loaded(root: Path, dtype: str = "float32") -> Iterator[list[NetworkModel]]:
    """Load two networks of one shape, compiled."""
    config = engine_config(root / "target", enforce_eager=False, dtype=dtype)
    folders = {name: root / name for name in NAMES}
    with (
        vllm.ir.enable_torch_wrap(False),  # as in vLLM's CPU worker
        residency(root / "target", folders, config) as worker,
    ):
        yield [network.models["value"] for network in worker.networks()]


def answers(model: NetworkModel) -> list[torch.Tensor]:
    """To rows that it reads, and that it decodes: some, one, more than it was tried with."""
    found = []
    for count in (3, 1, 8):
        rows = {slot: [10 + slot, *range(20, 25 + 7 * slot)] for slot in range(count)}
        for token in range(30, 33):
            found.append(model.score(rows_of(rows)))
            rows = {slot: [*row, token] for slot, row in rows.items()}
        for slot in rows:
            model.release(slot)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_network_answers_with_its_own_weights_to_the_last_bit(root: Path, dtype: str) -> None:
    with loaded(root, dtype) as bound:
        assert [type(model._forward.bound) for model in bound] == [BoundForward] * 2
        found = [answers(model) for model in (*bound, *bound)]
    with patch("server.worker.trial.bind", lambda *_: None), loaded(root, dtype) as looking:
        assert [model._forward.bound for model in looking] == [None, None]
        expected = [answers(model) for model in looking]
    for one, other in zip(found, (*expected, *expected), strict=True):
        assert all(map(torch.equal, one, other))
    assert not torch.equal(found[0][0], found[1][0])


def test_a_forward_that_comes_to_something_else_is_not_used(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*given: Any) -> BoundForward:
        bound = bind(*given)
        assert bound is not None
        kept = bound._arguments
        bound._arguments = [-a if isinstance(a, torch.nn.Parameter) else a for a in kept]
        return bound

    monkeypatch.setattr("server.worker.trial.bind", wrong)
    with loaded(root) as networks:
        assert [model._forward.bound for model in networks] == [None, None]


def test_nothing_is_bound_to_the_weights_of_a_network_that_is_freed(root: Path) -> None:
    with loaded(root) as networks:
        assert all(isinstance(model._forward.bound, BoundForward) for model in networks)
    assert [model._forward.bound for model in networks] == [None, None]


class Graph:
    """What torch compiles, as far as it is read."""

    def __init__(self, from_cpp: bool = False) -> None:
        self.fx_kwargs = {"cpp_wrapper": from_cpp}
        self.sizes: list[object] = []

    def __call__(self, arguments: list[Any]) -> Any:
        return self.current_callable(arguments)

    def current_callable(self, arguments: list[Any]) -> Any:
        size, tokens, weight, other = arguments
        arguments.clear()
        self.sizes.append(size)
        return [tokens * weight + size, other]


def bound_to(code: str, from_cpp: bool = False) -> tuple[Run, Graph, BoundForward | None]:
    """Bind what stands in for bytecode, which calls a graph."""
    weight, inner = torch.tensor(3.0), Graph(from_cpp)

    def graph(*arguments: Any) -> Any:
        return inner(list(arguments))

    def another(*arguments: Any) -> Any:
        return Graph()(list(arguments))

    scope = {"graph": graph, "another": another, "weight": weight, "torch": torch}
    exec(f"def forward(tokens, positions): {code}", scope)
    forward: Run = scope["forward"]

    def try_with(run: Run) -> None:
        for number in (5, 4):
            run(torch.rand(number), torch.rand(number))

    call = Graph.__call__
    with patch("server.worker.bound.CompiledFxGraph", Graph):
        bound = bind(forward, try_with)
    assert Graph.__call__ is call
    return forward, inner, bound


@pytest.mark.parametrize("from_cpp", [False, True])
@pytest.mark.parametrize("other", ["positions", "2", "weight", "None", "len(positions)"])
def test_tokens_positions_and_how_many_they_are_are_new_in_each_call(
    other: str, from_cpp: bool
) -> None:
    forward, _, bound = bound_to(f"return graph(len(tokens), tokens, weight, {other})[0]", from_cpp)
    assert bound is not None
    for number in (4, 1, 9, 9):
        given = torch.rand(number), torch.rand(number)
        assert torch.equal(bound(*given), forward(*given))


def test_code_that_is_called_from_cpp_gets_numbers_as_tensors() -> None:
    for from_cpp in (False, True):
        _, graph, bound = bound_to("return graph(len(tokens), tokens, weight, 0)[0]", from_cpp)
        assert bound is not None
        for number in (4, 4, 9):
            graph.sizes.clear()
            bound(torch.rand(number), torch.rand(number))
            (size,) = graph.sizes
            assert size == number
            assert isinstance(size, torch.Tensor) == from_cpp


@pytest.mark.parametrize(
    "code",
    [
        "return graph(len(tokens), tokens, weight * 1, 0)[0]",
        "return graph(len(tokens), tokens + 0, weight, 0)[0]",
        "return graph(2 * len(tokens), tokens, weight, 0)[0]",
        "return graph(len(tokens), tokens, weight, 0)",
        "return graph(len(tokens), tokens, weight, 0)[0] * 1",
        "return graph(len(tokens), tokens, weight, weight)[1]",
        "graph(1, tokens, weight, 0); return graph(len(tokens), tokens, weight, 0)[0]",
        "return another(len(tokens), tokens, weight, 0)[0]",
        "return graph(len(tokens), weight.copy_(tokens[0]), weight, 0)[0]",
        "return tokens",
    ],
)
def test_code_that_does_more_than_to_look_up_runs_in_each_call(code: str) -> None:
    assert bound_to(code)[2] is None
