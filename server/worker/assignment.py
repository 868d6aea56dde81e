"""Who steers whom in a batch: the rows of each network, and those that are fused."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from server.worker.blocks import TokensOf
from server.worker.fused import FusedBatch
from server.worker.network import Scores, ValueNetwork
from server.worker.row import GuidedRow
from server.worker.translation import TranslatedRow
from value_models.combine import add_value_logits

NOT_FUSED = -1


class FusedRows(NamedTuple):
    """The rows of a batch that are fused; see `server.worker.fused`."""

    indices: list[int]  # [num_fused], where they are in the batch
    members: list[GuidedRow]  # [num_fused]
    index: torch.Tensor  # `indices`, int64 on the device
    scales: torch.Tensor  # float32 [num_fused, num_networks] on the device, 0: no such network
    dynamic: torch.Tensor | None  # int64 [num_dynamic] on the device, which of them are dynamic
    floor: torch.Tensor | None  # float32 [num_fused, 1] on the device, probabilities

    @classmethod
    def of(cls, rows: Sequence[tuple[int, GuidedRow]], device: torch.device) -> "FusedRows":
        """Put together what is known of them before any step."""
        members = [row for _, row in rows]
        most = max(len(row.choice.networks) for row in members)
        scales = torch.zeros(len(members), most)
        for place, row in enumerate(members):
            for ordinal, chosen in enumerate(row.choice.networks):
                scales[place, ordinal] = chosen.scale
        dynamic = [p for p, row in enumerate(members) if row.choice.dynamic and row.active]
        # Rows that nobody guides keep the target's logits to the last bit.
        floors = [[row.choice.floor if row.active else 0.0] for row in members]
        return cls(
            [index for index, _ in rows],
            members,
            torch.tensor([index for index, _ in rows], device=device),
            scales.to(device),
            torch.tensor(dynamic, device=device) if dynamic else None,
            torch.tensor(floors, device=device) if any(floor for (floor,) in floors) else None,
        )

    def take(self, logits: torch.Tensor) -> FusedBatch:
        """Begin a step: float32 `[num_rows, vocab_size]` of the whole batch."""
        return FusedBatch(logits[self.index], self.scales.shape[1])


class Assignment(NamedTuple):
    """The rows of a batch that one network steers."""

    network: ValueNetwork
    rows: np.ndarray  # int64 [num_guided]
    index: torch.Tensor  # `rows` on the device
    slots: np.ndarray  # int64 [num_guided]
    histories: list[TokensOf]
    translations: list[TranslatedRow]  # [num_guided], or empty where both vocabularies are one
    scales: torch.Tensor  # float32 [num_guided, 1] on the device
    places: np.ndarray  # int64 [num_guided], which of the fused rows; NOT_FUSED: none
    ordinals: np.ndarray  # int64 [num_guided], the how-manieth network of its row this one is
    dynamic: np.ndarray  # bool [num_guided]
    follows: np.ndarray  # bool [num_guided], prompts that are read as the target reads them
    is_plain: bool  # no row is fused
    any_dynamic: bool

    def only(self, chosen: np.ndarray) -> "Assignment":
        """Return it without the rows that are not chosen: bool `[num_guided]`."""
        if chosen.all():
            return self
        kept = np.flatnonzero(chosen)
        on_device = torch.from_numpy(kept).to(self.index.device)
        return Assignment(
            self.network,
            self.rows[kept],
            self.index[on_device],
            self.slots[kept],
            [self.histories[i] for i in kept],
            [self.translations[i] for i in kept] if self.translations else [],
            self.scales[on_device],
            self.places[kept],
            self.ordinals[kept],
            self.dynamic[kept],
            self.follows[kept],
            self.is_plain,
            self.any_dynamic,
        )

    def divide(
        self,
        logits: torch.Tensor,
        fused: FusedBatch,
        scores: Scores,
        columns: torch.Tensor | None,
    ) -> None:
        """Give the scores of fused rows to `fused`, and add those of the others to `logits`."""
        device = logits.device

        def pick(mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
            kept = torch.from_numpy(np.flatnonzero(mask)).to(device)
            picked = columns[kept] if columns is not None and columns.dim() == 2 else columns
            return kept, scores.value[kept], picked

        is_fused = self.places != NOT_FUSED
        kept, value, picked = pick(is_fused)
        if len(kept):
            places = torch.from_numpy(self.places[is_fused]).to(device)
            ordinals = torch.from_numpy(self.ordinals[is_fused]).to(device)
            fused.add(places, ordinals, value, picked)
        if scores.distances is not None:
            places = torch.from_numpy(self.places[self.dynamic]).to(device)
            ordinals = torch.from_numpy(self.ordinals[self.dynamic]).to(device)
            fused.add_distances(places, ordinals, scores.distances)
        if not is_fused.all():
            kept, value, picked = pick(~is_fused)
            rows = torch.from_numpy(self.rows[~is_fused]).to(device)
            add_value_logits(logits, value, self.scales[kept], rows, picked)


class _Member(NamedTuple):
    index: int
    row: GuidedRow
    scale: float
    ordinal: int


def assign(
    rows: Sequence[tuple[int, GuidedRow]],
    fused: FusedRows | None,
    find: Callable[[str, str], ValueNetwork | None],
    device: torch.device,
) -> list[Assignment]:
    """Return the networks that steer a batch, each with its rows.

    Args:
        rows: all guided ones, with their index in the batch, in its order.
        fused: those of them that are.
        find: returns the network of a name and version, if it is resident.
    """
    chosen: dict[ValueNetwork, list[_Member]] = {}
    for index, row in rows:
        if row.failed or not row.active:
            continue
        for ordinal, choice in enumerate(row.choice.networks):
            network = find(choice.name, choice.version)
            if network is not None:
                member = _Member(index, row, choice.scale, ordinal)
                chosen.setdefault(network, []).append(member)
    places = {} if fused is None else {index: p for p, index in enumerate(fused.indices)}
    return [_assign(network, members, places, device) for network, members in chosen.items()]


def _assign(
    network: ValueNetwork,
    members: Sequence[_Member],
    places: dict[int, int],
    device: torch.device,
) -> Assignment:
    rows = [member.row for member in members]
    translations = [t for row in rows if (t := row.translation(network)) is not None]
    indices = np.array([member.index for member in members])
    fused_places = np.array([places.get(member.index, NOT_FUSED) for member in members])
    dynamic = np.array([row.choice.dynamic for row in rows])
    return Assignment(
        network,
        indices,
        torch.from_numpy(indices).to(device),
        np.array([row.slot for row in rows]),
        [history.tokens for history in translations or rows],
        translations,
        torch.tensor([[member.scale] for member in members], dtype=torch.float32, device=device),
        fused_places,
        np.array([member.ordinal for member in members]),
        dynamic,
        np.array([not row.scores_prompt for row in rows]),
        bool((fused_places == NOT_FUSED).all()),
        bool(dynamic.any()),
    )
