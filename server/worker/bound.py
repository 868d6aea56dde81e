"""A compiled model that has looked up its weights once.

What torch.compile makes of a forward is bytecode, which gets each weight from the module, attribute
after attribute, and a graph, which takes them all. The weights of a network stay the same tensors
for as long as it lives, so neither the bytecode nor the modules around it need run in each step:
here, the graph is called with what the bytecode has called it with before.
`python -m deploy.bench choices` says what that spares.

Reads torch 2.13's `torch._dynamo.aot_compile.AOTCompiledFunction`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Run = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Returns hidden states `[num_tokens, hidden_size]` of tokens and their positions, `[num_tokens]`
each."""


class _Call(NamedTuple):
    """One call of a model."""

    tokens: torch.Tensor
    positions: torch.Tensor
    arguments: tuple[Any, ...]  # of the graph, which the bytecode has made of them
    returns_first: bool  # whether the model returns the first thing that the graph does


class BoundForward:
    """Stands in for a compiled model: called with tokens and positions, see `Run`."""

    def __init__(
        self,
        graph: Callable[..., Any],
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
        self._graph, self._arguments = graph, arguments
        self._of_tokens, self._of_positions, self._sizes = of_tokens, of_positions, sizes

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        arguments, num_tokens = [*self._arguments], len(tokens)
        for place in self._of_tokens:
            arguments[place] = tokens
        for place in self._of_positions:
            arguments[place] = positions
        for place in self._sizes:
            arguments[place] = num_tokens
        hidden: torch.Tensor = self._graph(*arguments)[0]
        return hidden


def bind(compiled: Any, run: Run, try_with: Callable[[Run], None]) -> BoundForward | None:
    """Bind a compiled model to its weights.

    Args:
        compiled: what torch has compiled of it, ahead of time.
        run: runs the model.
        try_with: calls what it is given twice, with different numbers of tokens.

    Returns:
        None: more is done in a call than to look up weights.
    """
    scope, name = compiled.fn.__globals__, compiled._artifacts.backend_id
    graph = scope[name]
    inner: list[tuple[tuple[Any, ...], Any]] = []
    outer: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def note_graph(*arguments: Any) -> Any:
        returned = graph(*arguments)
        inner.append((arguments, returned))
        return returned

    def note_run(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = run(tokens, positions)
        outer.append((tokens, positions, hidden))
        return hidden

    scope[name] = note_graph
    try:
        try_with(note_run)
    finally:
        scope[name] = graph
    if not len(inner) == len(outer) == 2:
        return None
    first, second = (
        _Call(tokens, positions, arguments, hidden is returned[0])
        for (tokens, positions, hidden), (arguments, returned) in zip(outer, inner, strict=True)
    )
    return _bound(graph, first, second)


def _bound(graph: Callable[..., Any], first: _Call, second: _Call) -> BoundForward | None:
    if not (first.returns_first and second.returns_first):
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
    return BoundForward(graph, kept, of_tokens, of_positions, sizes)
