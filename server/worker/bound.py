"""A compiled forward that has looked up its model's weights once.

What torch.compile makes of a forward is bytecode, which gets each weight from the module, attribute
after attribute, and a graph, which takes them all. The weights of a network stay the same tensors
for as long as it lives, so the bytecode need not run in each step: here, the graph is called with
what the bytecode has called it with before. `python -m deploy.bench choices` says what that spares.

Reads torch 2.13's `torch._dynamo.aot_compile.AOTCompiledFunction`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class _Call(NamedTuple):
    """One call of a compiled forward."""

    num_tokens: int
    given: tuple[Any, ...]  # to the forward
    arguments: tuple[Any, ...]  # of the graph, which the bytecode has made of it
    is_first: bool  # whether the forward returns the first thing that the graph does


class BoundForward:
    """Stands in for a compiled forward, for the module that it was bound to.

    Attributes:
        compiled: the forward, which modules share.
    """

    def __init__(
        self,
        compiled: Any,
        arguments: Sequence[Any],
        inputs: Sequence[tuple[int, int]],
        sizes: Sequence[int],
        counted: int,
    ) -> None:
        """
        Args:
            arguments: of the graph.
            inputs: which of them are given in each call, (place, which of the given).
            sizes: which of them are the number of tokens.
            counted: which of the given has as many entries.
        """
        self.compiled = compiled
        self._graph = compiled._artifacts.compiled_fn
        self._arguments, self._inputs, self._sizes = arguments, inputs, sizes
        self._counted = counted

    def __call__(self, module: torch.nn.Module, *args: Any, **options: Any) -> Any:
        given = (*args, *options.values())
        arguments = [*self._arguments]
        for place, which in self._inputs:
            arguments[place] = given[which]
        num_tokens = len(given[self._counted])
        for place in self._sizes:
            arguments[place] = num_tokens
        return self._graph(*arguments)[0]


def bind(compiled: Any, trials: Callable[[Any], Sequence[int]]) -> BoundForward | None:
    """Bind a compiled forward to a module.

    Args:
        compiled: what torch.compile has made, ahead of time.
        trials: calls what it is given as the module calls its forward, with two numbers of tokens,
            and returns these.

    Returns:
        None: the bytecode does more than to look up weights.
    """
    scope, name = compiled.fn.__globals__, compiled._artifacts.backend_id
    graph = scope[name]
    inner: list[tuple[tuple[Any, ...], Any]] = []
    outer: list[tuple[tuple[Any, ...], Any]] = []

    def note_graph(*arguments: Any) -> Any:
        returned = graph(*arguments)
        inner.append((arguments, returned))
        return returned

    def note_forward(module: torch.nn.Module, *args: Any, **options: Any) -> Any:
        returned = compiled(module, *args, **options)
        outer.append(((*args, *options.values()), returned))
        return returned

    scope[name] = note_graph
    try:
        numbers = trials(note_forward)
    finally:
        scope[name] = graph
    if not len(inner) == len(outer) == len(numbers) == 2:
        return None
    first, second = (
        _Call(number, given, arguments, result is returned[0])
        for number, (given, result), (arguments, returned) in zip(
            numbers, outer, inner, strict=True
        )
    )
    return _bound(compiled, first, second)


def _bound(compiled: Any, first: _Call, second: _Call) -> BoundForward | None:
    counted = [
        which
        for which, given in enumerate(first.given)
        if isinstance(given, torch.Tensor)
        and (len(given), len(second.given[which])) == (first.num_tokens, second.num_tokens)
    ]
    inputs, sizes = [], []
    for place, (one, other) in enumerate(zip(first.arguments, second.arguments, strict=True)):
        which = next((i for i, given in enumerate(first.given) if given is one), None)
        if isinstance(one, int):
            if (one, other) == (first.num_tokens, second.num_tokens):
                sizes.append(place)
            elif one != other:
                return None
        elif which is not None and second.given[which] is other:
            inputs.append((place, which))
        elif one is not other:
            return None
    if not (counted and first.is_first and second.is_first):
        return None
    kept = list(first.arguments)
    for place, _ in inputs:
        kept[place] = None
    return BoundForward(compiled, kept, inputs, sizes, counted[0])
