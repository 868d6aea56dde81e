"""Rows whose value logits are not just added: fused dynamically, kept by a floor, or explained.

They take a few passes more over `[num_rows, vocab_size]` than others; a step without such rows
never comes here.
"""

from typing import NamedTuple

import torch

from value_models.combine import keep_target_in_charge, map_value_logits
from value_models.fusion import Fusion, solve_weights

SOLVED_AT_ONCE = 1 << 26
"""Value logits: the solver takes about seven times their memory for as long as it works."""


class Guided(NamedTuple):
    """What came of the rows of a `FusedBatch`."""

    logits: torch.Tensor  # float32 [num_rows, vocab_size]
    weights: torch.Tensor  # float32 [num_rows, num_networks], 0 where there was no opinion
    fusion: Fusion | None  # of the dynamic rows only, in order


class FusedBatch:
    """The target's logits of some rows, and what their networks think of them.

    Attributes:
        target: float32 `[num_rows, vocab_size]`, never changed.
        restricted: the same, without the ids that a row's networks have no logit for.
        values: float32 `[num_rows, num_networks, vocab_size]`, 0 where there is no opinion.
        present: bool `[num_rows, num_networks]`, which networks had an opinion.
    """

    def __init__(self, target: torch.Tensor, num_networks: int) -> None:
        num_rows, vocab_size = target.shape
        self.target = target
        self.restricted = target.clone()
        self.values = target.new_zeros(num_rows, num_networks, vocab_size)
        self.present = target.new_zeros(num_rows, num_networks, dtype=torch.bool)
        self._distances = target.new_zeros(num_rows, num_networks)

    def add(
        self,
        places: torch.Tensor,
        networks: torch.Tensor,
        value: torch.Tensor,
        columns: torch.Tensor | None,
    ) -> None:
        """Add what one network thinks of some rows.

        Args:
            places: int64 `[num_guided]`, which rows.
            networks: int64 `[num_guided]`, the how-manieth network of each row this one is.
            value, columns: as in `value_models.combine.add_value_logits`.
        """
        mapped, excluded = map_value_logits(value, self.target.shape[1], columns)
        self.values[places, networks] = mapped
        self.present[places, networks] = True
        if excluded is not None:
            self.restricted[places] = self.restricted[places].masked_fill(excluded, float("-inf"))

    def add_distances(
        self, places: torch.Tensor, networks: torch.Tensor, distances: torch.Tensor
    ) -> None:
        """Say how far the network's expert has moved from its base: float32 `[num_guided]`."""
        self._distances[places, networks] = distances

    def guide(
        self, scales: torch.Tensor, dynamic: torch.Tensor | None, floor: torch.Tensor | None
    ) -> Guided:
        """Combine.

        Args:
            scales: float32 `[num_rows, num_networks]`; of dynamic rows the bounds of the weights.
            dynamic: int64 `[num_dynamic]`, which rows are; None: none.
            floor: float32 `[num_rows, 1]`, probabilities; None: none has one.
        """
        weights, fusion = scales * self.present, None
        if dynamic is not None:
            fusion = self._solve(weights, dynamic)
            weights = weights.index_copy(0, dynamic, fusion.weights)
        logits = self.restricted.clone()
        for network in range(weights.shape[1]):
            logits += self.values[:, network] * weights[:, network, None]
        if floor is not None:
            logits = keep_target_in_charge(logits, self.target, floor)
        return Guided(logits, weights, fusion)

    def _solve(self, bounds: torch.Tensor, dynamic: torch.Tensor) -> Fusion:
        """Solve for the weights of some rows, int64 `[num_dynamic]`, in order."""
        at_once = max(1, SOLVED_AT_ONCE // self.values[0].numel())
        num_rows = len(bounds)
        if num_rows == len(dynamic) <= at_once:  # nothing to pick
            return solve_weights(self.restricted, self.values, self._distances, bounds)
        parts = [
            solve_weights(
                self.restricted[rows], self.values[rows], self._distances[rows], bounds[rows]
            )
            for rows in dynamic.split(at_once)
        ]
        return Fusion(*map(torch.cat, zip(*parts, strict=True)))
