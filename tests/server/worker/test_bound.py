"""Compiled forwards that have looked up their weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import vllm.ir

from server.worker.bound import BoundForward, bind
from server.worker.compilation import compiled_module
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
def loaded(root: Path) -> Iterator[list[NetworkModel]]:
    """Load two networks of one shape, compiled."""
    config = engine_config(root / "target", enforce_eager=False)
    folders = {name: root / name for name in NAMES}
    with (
        vllm.ir.enable_torch_wrap(False),  # as in vLLM's CPU worker
        residency(root / "target", folders, config) as worker,
    ):
        yield [network.models["value"] for network in worker.networks()]


def forward_of(model: NetworkModel) -> Any:
    return compiled_module(model._model).aot_compiled_fn


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


def test_each_network_answers_with_its_own_weights_to_the_last_bit(root: Path) -> None:
    with loaded(root) as bound:
        first, second = map(forward_of, bound)
        assert type(first) is type(second) is BoundForward
        assert first.compiled is second.compiled
        found = [answers(model) for model in (*bound, *bound)]
    with patch("server.worker.model.bind", lambda *_: None), loaded(root) as looking:
        assert not any(isinstance(forward_of(model), BoundForward) for model in looking)
        expected = [answers(model) for model in looking]
    for one, other in zip(found, (*expected, *expected), strict=True):
        assert all(map(torch.equal, one, other))
    assert not torch.equal(found[0][0], found[1][0])


def test_a_forward_that_comes_to_something_else_is_not_used(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(compiled: Any, trials: Any) -> BoundForward:
        bound = bind(compiled, trials)
        assert bound is not None
        kept = bound._arguments
        bound._arguments = [-a if isinstance(a, torch.nn.Parameter) else a for a in kept]
        return bound

    monkeypatch.setattr("server.worker.model.bind", wrong)
    with loaded(root) as networks:
        assert not any(isinstance(forward_of(model), BoundForward) for model in networks)


def test_nothing_is_bound_to_the_weights_of_a_network_that_is_freed(root: Path) -> None:
    with loaded(root) as networks:
        assert all(isinstance(forward_of(model), BoundForward) for model in networks)
    assert [forward_of(model) for model in networks] == [None, None]


class Compiled:
    """What torch makes of a forward, as far as it is read: bytecode, which calls a graph."""

    def __init__(self, code: str, weight: torch.Tensor) -> None:
        scope: dict[str, Any] = {"graph": self.graph, "weight": weight, "torch": torch}
        exec(f"def forward(module, tokens, *, positions=None): {code}", scope)
        self.fn = scope["forward"]
        self._artifacts = SimpleNamespace(backend_id="graph", compiled_fn=self.graph)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.fn(*args, **options)

    @staticmethod
    def graph(size: int, tokens: torch.Tensor, weight: torch.Tensor, other: Any) -> Any:
        return (tokens * weight + size, other)


def bound_to(code: str) -> tuple[Compiled, BoundForward | None]:
    compiled = Compiled(code, torch.tensor(3.0))

    def trials(forward: Any) -> Sequence[int]:
        for number in (numbers := (5, 4)):
            forward(None, torch.rand(number), positions=torch.rand(number))
        return numbers

    bound = bind(compiled, trials)
    assert compiled.fn.__globals__["graph"] is compiled.graph
    return compiled, bound


@pytest.mark.parametrize("other", ["positions", "2", "weight", "None"])
def test_what_is_given_and_how_much_is_new_in_each_call(other: str) -> None:
    compiled, bound = bound_to(f"return graph(len(tokens), tokens, weight, {other})[0]")
    assert bound is not None
    for number in (4, 1, 9):
        given = torch.rand(number), torch.rand(number)
        found = bound(torch.nn.Module(), given[0], positions=given[1])
        assert torch.equal(found, compiled(None, given[0], positions=given[1]))


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
        "return tokens",
    ],
)
def test_bytecode_that_does_more_than_to_look_up_runs_in_each_call(code: str) -> None:
    assert bound_to(code)[1] is None
