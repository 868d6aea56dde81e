"""A compiled model that has looked up its weights once.

What torch.compile makes of a forward is bytecode, which gets each weight from the module, attribute
after attribute; what prepares these for autograd; and compiled code, which takes them all. The
weights of a network stay the same tensors for as long as it lives, and it is never trained here, so
only the code need run in each step: it is called with what it has been called with before.
`python -m deploy.bench choices` says what that spares.

Reads torch 2.13's `torch._inductor.output_code.CompiledFxGraph`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._inductor.output_code import CompiledFxGraph

Run = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Returns hidden states `[num_tokens, hidden_size]` of tokens and their positions, `[num_tokens]`
each."""


class _Call(NamedTuple):
    """One call of a model, and of the compiled code that it led to."""

    tokens: torch.Tensor
    positions: torch.Tensor
    graph: CompiledFxGraph
    arguments: tuple[Any, ...]  # of the graph
    returns_first: bool  # whether the model returns the first thing that the graph does


class BoundForward:
    """Stands in for a compiled model: called with tokens and positions, see `Run`."""

    def __init__(
        self,
        graph: CompiledFxGraph,
        arguments: Sequence[Any],
        of_tokens: Sequence[int],
        of_positions: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        """
        Args:
            graph: what torch has compiled.
            arguments: of the graph.
            of_tokens, of_positions: which of them are these, in each call anew.
            sizes: which of them are the number of tokens.
        """
        self._graph, self._arguments = graph, list(arguments)
        self._of_tokens, self._of_positions, self._sizes = of_tokens, of_positions, sizes
        self._num_tokens: int | None = None

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if tokens.shape[0] != self._num_tokens:
            self._resize(tokens.shape[0])
        arguments = [*self._arguments]  # the graph empties it
        for place in self._of_tokens:
            arguments[place] = tokens
        for place in self._of_positions:
            arguments[place] = positions
        hidden: torch.Tensor = self._graph.current_callable(arguments)[0]
        return hidden

    def _resize(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        # Code in C++ takes tensors only: numbers would be made into tensors in each call.
        size = torch.tensor(num_tokens) if self._graph.fx_kwargs.get("cpp_wrapper") else num_tokens
        for place in self._sizes:
            self._arguments[place] = size


def bind(run: Run, try_with: Callable[[Run], None]) -> BoundForward | None:
    """Bind a compiled model to its weights.

    Args:
        run: runs the model.
        try_with: calls what it is given twice, with different numbers of tokens.

    Returns:
        None: more is done in a call than to look up weights.
    """
    calls: list[_Call | None] = []

    def note(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with _graphs_called() as called:
            hidden = run(tokens, positions)
        if len(called) == 1:
            graph, arguments, returned = called[0]
            calls.append(_Call(tokens, positions, graph, arguments, hidden is returned[0]))
        else:
            calls.append(None)
        return hidden

    try_with(note)
    first, second = calls
    return None if first is None or second is None else _bound(first, second)


@contextmanager
def _graphs_called() -> Iterator[list[tuple[CompiledFxGraph, tuple[Any, ...], Sequence[Any]]]]:
    """Take note of all compiled code that this thread calls, with arguments and what it returns."""
    call, thread = CompiledFxGraph.__call__, threading.get_ident()
    called = []

    def note(graph: CompiledFxGraph, inputs: list[Any]) -> Any:
        arguments = tuple(inputs)
        returned = call(graph, inputs)
        if threading.get_ident() == thread:
            called.append((graph, arguments, returned))
        return returned

    CompiledFxGraph.__call__ = note
    try:
        yield called
    finally:
        CompiledFxGraph.__call__ = call


def _bound(first: _Call, second: _Call) -> BoundForward | None:
    same_graph = first.graph is second.graph
    if not (same_graph and first.returns_first and second.returns_first):
        return None
    kept = list(first.arguments)
    of_tokens, of_positions, sizes = [], [], []
    for place, (one, other) in enumerate(zip(first.arguments, second.arguments, strict=True)):
        if one is first.tokens and other is second.tokens:
            of_tokens.append(place)
        elif one is first.positions and other is second.positions:
            of_positions.append(place)
        elif isinstance(one, int) and (one, other) == (len(first.tokens), len(second.tokens)):
            sizes.append(place)
        elif one is not other:
            return None
        else:
            continue
        kept[place] = None
    if not of_tokens:  # who knows what they are made into
        return None
    return BoundForward(first.graph, kept, of_tokens, of_positions, sizes)
