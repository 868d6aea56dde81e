"""Guided logits behind the tokens of prompts; which ones vLLM wants is told in `scoring.py`."""

import torch

from server.worker.fused import FusedBatch
from server.worker.guidance import Guidance
from server.worker.network import Scores, ValueNetwork
from server.worker.row import GuidedRow
from server.worker.soundness import NOT_FINITE, are_finite

SCORED_AT_ONCE = 256
"""Positions of a prompt, by one network; of several the fewer: the logits of all are tensors of
`[positions, num_networks, vocab_size]`."""


class PromptScorer:
    """Combines each position of a prompt as a step combines a row of its batch."""

    def __init__(self, guidance: Guidance) -> None:
        """`guidance`: of the steps that the prompts' rows are in."""
        self._guidance = guidance

    def score(self, row: GuidedRow, logits: torch.Tensor, start: int) -> torch.Tensor:
        """Return guided logits behind the tokens of a prompt.

        Args:
            logits: `[num_positions, vocab_size]` of the target.
            start: the first token's place in the prompt.

        Returns:
            float32 `[num_positions, vocab_size]`; NaN if a network fails, or has.
        """
        guided = logits.to(torch.float32)
        at_once = SCORED_AT_ONCE // len(row.choice.networks)
        for offset in range(0, len(guided), at_once):
            piece = guided[offset : offset + at_once]
            piece.copy_(self._score_positions(row, piece, start + offset))
            if self._guidance.ended(row):
                self._guidance.any_ended = True
                return guided.fill_(float("nan"))
        return guided

    def _score_positions(self, row: GuidedRow, target: torch.Tensor, start: int) -> torch.Tensor:
        """`score` for as many positions as are scored at once."""
        choice, num_positions, device = row.choice, len(target), self._guidance.device
        fused = FusedBatch(target, len(choice.networks))
        for ordinal, chosen in enumerate(choice.networks):
            network = self._guidance.residency.find(chosen.name, chosen.version)
            if network is None or network.failure is not None:
                break
            try:
                if network.translator is None:
                    scores = network.score_history(
                        row.slot, row.tokens, start, start + num_positions, choice.dynamic
                    )
                    places, columns = torch.arange(num_positions, device=device), None
                else:
                    read = self._score_translated(row, network, start, num_positions)
                    if read is None:
                        continue
                    places, scores, columns = read
            except BaseException as error:
                self._guidance.caught(network, error)
                break
            if not are_finite(scores):
                self._guidance.fail(NOT_FINITE, network)
                break
            fused.add(places, torch.full_like(places, ordinal), scores.value, columns)
            if scores.distances is not None:
                fused.add_distances(places, torch.full_like(places, ordinal), scores.distances)
        scales = target.new_tensor([[chosen.scale for chosen in choice.networks]] * num_positions)
        every = torch.arange(num_positions, device=device) if choice.dynamic else None
        floor = target.new_full((num_positions, 1), choice.floor) if choice.floor else None
        return fused.guide(scales, every, floor).logits

    def _score_translated(
        self, row: GuidedRow, network: ValueNetwork, start: int, num_positions: int
    ) -> tuple[torch.Tensor, Scores, torch.Tensor] | None:
        """Score a prompt by a network of another vocabulary.

        As long as positions just add to the network's tokens they are scored together. Where one
        ends in other tokens than the next one goes on with, what comes next is computed anew.
        """
        network.release(row.slot)  # it may have read further, with another end
        reading = network.translator.follow(row.tokens)
        ids: list[int] = []
        ends: list[int] = []  # of the positions that wait to be scored, in `ids`
        places, scores, readings = [], [], []

        def score() -> None:
            if ends:
                value, distances = network.score_history(
                    row.slot, lambda a, b: ids[a:b], ends[0] - 1, ends[-1], row.choice.dynamic
                )
                wanted = torch.tensor([end - ends[0] for end in ends], device=self._guidance.device)
                distances = None if distances is None else distances[wanted]
                scores.append(Scores(value[wanted], distances))
                ends.clear()

        for place in range(num_positions):
            length = start + place + 1
            kept = reading.advance(length, lambda length=length: row.tokens(length - 1, length)[0])
            end = len(reading.ids)
            if kept < len(ids) or (ends and end - ends[0] >= SCORED_AT_ONCE):
                score()
                network.rewind(row.slot, kept)
            ids[kept:] = reading.ids[kept:]
            if reading.waiting:
                continue
            if end > network.max_context:  # the whole prompt may be shorter than its beginning
                row.translation(network).outgrown = True
                break
            ends.append(end)
            places.append(place)
            readings.append(network.translator.columns([reading]))
        score()
        network.release(row.slot)
        if not places:
            return None
        columns = readings[0]
        if any(found.dim() == 2 for found in readings):
            columns = torch.stack([found.view(-1, found.shape[-1])[0] for found in readings])
        return (
            torch.tensor(places, device=self._guidance.device),
            Scores(
                torch.cat([score.value for score in scores]),
                torch.cat([score.distances for score in scores]) if row.choice.dynamic else None,
            ),
            columns,
        )
