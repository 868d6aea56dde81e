"""What guidance did to each token of requests that asked, written where an API process reads it.

A file for each request lies in the run directory; the API process makes and removes it. A token's
line is written before the token leaves the worker: who has the token finds its line.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from value_models.explain import Explanation
from value_models.fusion import Fusion


class Explained(NamedTuple):
    """One row whose next token is to be explained."""

    row: int  # in the batch
    place: int  # in the explanation's tensors
    file: str
    request: str
    position: int  # of the token, among those generated
    networks: list[int]  # the how-manieth of the choice had an opinion
    active: bool
    solved: int | None  # where it is in `fusion`


class Explanations:
    """The explanations of one step, until its tokens are known.

    Attributes:
        wanted: whether this worker writes any; of tensor-parallel ranks one does.
    """

    def __init__(self, folder: Path) -> None:
        self.wanted = True
        self._folder = folder
        self._rows: Sequence[Explained] = ()

    @property
    def waiting(self) -> bool:
        """Whether rows wait for their tokens."""
        return bool(self._rows)

    def note(
        self,
        rows: Sequence[Explained],
        explanation: Explanation,
        weights: torch.Tensor,
        fusion: Fusion | None,
    ) -> None:
        """Keep what is known of a step before it has sampled.

        Args:
            weights: float32 `[num_places, num_networks]`.
        """
        self._rows, self._explanation = rows, explanation
        self._weights, self._fusion = weights, fusion

    def forget(self) -> None:
        """The step that was noted is not, or no longer, waited for."""
        self._rows = ()

    def write(self, sampled: torch.Tensor) -> None:
        """Write a line for each row: int `[num_rows, 1]`, the tokens of the whole batch."""
        rows, explanation = self._rows, self._explanation
        self.forget()
        num_places = len(explanation.kl)
        places = torch.tensor([row.place for row in rows], device=sampled.device)
        indices = torch.tensor([row.row for row in rows], device=sampled.device)
        tokens = sampled.new_zeros(num_places, dtype=torch.int64)
        tokens[places] = sampled[indices, 0].long()
        target, guided, contributions = (part.tolist() for part in explanation.chosen(tokens))
        chosen, weights = tokens.tolist(), self._weights.tolist()
        kl, masked = explanation.kl.tolist(), explanation.masked.tolist()
        target_top = _tops(explanation.target_ids, explanation.target_probabilities)
        guided_top = _tops(explanation.guided_ids, explanation.guided_probabilities)
        fusion = self._fusion
        wanted = [] if fusion is None else fusion.wanted.tolist()
        reached = [] if fusion is None else fusion.reached.tolist()
        for row in rows:
            at = row.place
            self._append(
                row.file,
                {
                    "request": row.request,
                    "position": row.position,
                    "token": chosen[at],
                    "kl": kl[at],
                    "target": target_top[at],
                    "guided": guided_top[at],
                    "target_probability": target[at],
                    "guided_probability": guided[at],
                    "networks": [[n, weights[at][n], contributions[at][n]] for n in row.networks],
                    "wanted": None if row.solved is None else wanted[row.solved],
                    "reached": None if row.solved is None else reached[row.solved],
                    "masked": masked[at],
                    "active": row.active,
                },
            )

    def _append(self, file: str, line: dict[str, Any]) -> None:
        try:  # without O_CREAT: whoever has removed the file does not want it any more
            descriptor = os.open(self._folder / file, os.O_WRONLY | os.O_APPEND)
        except OSError:
            return
        try:
            os.write(descriptor, json.dumps(line).encode() + b"\n")
        finally:
            os.close(descriptor)


def _tops(ids: torch.Tensor, probabilities: torch.Tensor) -> list[list[tuple[int, float]]]:
    """Return the likeliest tokens of each row; impossible ones are no choices."""
    return [
        [(token, p) for token, p in zip(row, row_probabilities, strict=True) if p > 0]
        for row, row_probabilities in zip(ids.tolist(), probabilities.tolist(), strict=True)
    ]
