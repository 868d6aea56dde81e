"""Guided decoding in plain PyTorch, over transformers models with KV caches.

What the server does inside vLLM, on a page: the reference that readers learn from and tests compare
with, and the way to measure kinds that cannot be served. `combine` is the definition of guidance at
one position, in float64 and by plain bisection; `decode` continues a batch of prompts greedily.

- Value networks: Lu et al., NAACL 2025, arXiv 2410.21027: `target + sum_i scale_i value_i`.
- Pairs, `value = expert - antiexpert`: proxy tuning, Liu et al., COLM 2024, arXiv 2401.08565.
- Weights that are solved at every token: dynamic logit fusion, Fan et al., NeurIPS 2024,
  arXiv 2406.15480. `value_models.fusion` says what is solved for several networks, and why.
- A floor below which guidance raises nothing: `value_models.combine.keep_target_in_charge`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from value_models.attention import attend_as_configured
from value_models.connection import CONNECTIONS
from value_models.fusion import REFINEMENTS
from value_models.store import Role, check_network, model_path
from value_models.vocabulary.reading import Reader

EXCLUDED = float("-inf")
HALVINGS = 60
"""A float64 has 53 binary digits."""


class Opinion(NamedTuple):
    """What one network has to say on the next token of one sequence."""

    value: torch.Tensor  # [network_vocab_size], value logits
    scale: float  # its weight, or in dynamic fusion the bound of its weight; 0: does not take part
    base: torch.Tensor | None = None  # [at least network_vocab_size], the logits that it moves
    columns: torch.Tensor | None = None  # int64 [num_ids]: the column each id takes, -1 for none


def combine(
    target: torch.Tensor,
    opinions: Sequence[Opinion],
    *,
    dynamic: bool = False,
    floor: float = 0.0,
) -> torch.Tensor:
    """Return the guided logits of one position, up to a constant.

    Args:
        target: `[vocab_size]`; `-inf` marks excluded tokens, which stay so.
        dynamic: solve for the weights, instead of taking the scales; every opinion needs its base.
        floor: a probability; guidance does not raise what the target finds less likely.

    Returns:
        float64 `[vocab_size]`.

    Raises:
        ValueError: `dynamic`, and an opinion has no base.
    """
    target = target.double()
    opinions = [opinion for opinion in opinions if opinion.scale != 0]
    if not opinions:
        return target
    mapped = [_by_target_ids(opinion, len(target)) for opinion in opinions]
    values = torch.stack([value for value, _ in mapped])
    # What a network has no logit for is out: value logits are only defined up to a constant.
    known = torch.stack([known for _, known in mapped]).all(0)
    restricted = target.masked_fill(~known, EXCLUDED)
    weights = torch.tensor([opinion.scale for opinion in opinions], dtype=torch.float64)
    if dynamic:
        weights = _solve(restricted, values, [_distance(opinion) for opinion in opinions], weights)
    return _keep_in_charge(restricted + weights @ values, target, floor)


def _by_target_ids(opinion: Opinion, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return value logits by the target's ids, and which ids have one: `[vocab_size]` each."""
    columns = opinion.columns
    if columns is None:
        columns = torch.arange(len(opinion.value))
    columns = torch.cat([columns, columns.new_full((vocab_size,), -1)])[:vocab_size]
    known = columns >= 0
    return (opinion.value.double()[columns.clamp(min=0)]).where(known, 0.0), known


def _distance(opinion: Opinion) -> float:
    """How far a network moves its own base, in nats and in its own vocabulary."""
    if opinion.base is None:
        raise ValueError(
            "dynamic fusion needs networks that know their base: a pair, or a residual network "
            "with a reference"
        )
    base = opinion.base[: len(opinion.value)].double()
    return _divergence(base + opinion.value.double(), base)


def _divergence(p_logits: torch.Tensor, q_logits: torch.Tensor) -> float:
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    allowed = ~p.isneginf()
    return float((p.exp() * (p - q))[allowed].sum())


def _solve(
    target: torch.Tensor, values: torch.Tensor, distances: Sequence[float], bounds: torch.Tensor
) -> torch.Tensor:
    """Solve for the weights by bisection; `value_models.fusion` says which ones.

    Args:
        target: `[vocab_size]`.
        values: `[num_networks, vocab_size]`.
        distances: nats, one of each network.
        bounds: `[num_networks]`, not 0.

    Returns:
        float64 `[num_networks]`.
    """

    def moved(shares: torch.Tensor) -> float:
        return _divergence(target + (shares * bounds) @ values, target)

    allowed = values[:, ~target.isneginf()]
    counted = [len(value.unique()) > 1 for value in allowed]
    wanted = [d for d, counts in zip(distances, counted, strict=True) if counts]
    if not any(wanted):
        return torch.zeros_like(bounds)
    nothing, single = torch.zeros_like(bounds), torch.eye(len(bounds), dtype=torch.float64)
    alone = nothing.clone()
    for i, distance in enumerate(distances):
        if counted[i]:
            alone += _bisect(moved, nothing, single[i], distance)
    if len(wanted) == 1:
        return alone * bounds
    mean = sum(wanted) / len(wanted)
    # As far as a bound, then on without what has reached its own, then to the farthest point.
    turns = sorted((share for share in alone.tolist() if share), reverse=True)
    path = [nothing, *((alone / turn).clamp(max=1.0) for turn in turns), _farthest(moved, single)]
    for start, stop in pairwise(path):
        if moved(stop) >= mean:
            return _bisect(moved, start, stop, mean) * bounds
    farthest: torch.Tensor = max(path, key=moved) * bounds
    return farthest


def _bisect(
    moved: Callable[[torch.Tensor], float], start: torch.Tensor, stop: torch.Tensor, wanted: float
) -> torch.Tensor:
    """Return where `moved` is as wanted between `start` and `stop`, or `stop` if it is too near."""
    if wanted <= 0:
        return start
    if moved(stop) <= wanted:
        return stop
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if moved(start + middle * (stop - start)) < wanted:
            low = middle
        else:
            high = middle
    return start + high * (stop - start)


def _farthest(moved: Callable[[torch.Tensor], float], axes: torch.Tensor) -> torch.Tensor:
    """Return the farthest corner, or what is farther still near it."""
    ends = product((0.0, 1.0), repeat=len(axes))
    here = max((torch.tensor(end, dtype=torch.float64) for end in ends), key=moved)
    for step in REFINEMENTS:
        around = [here + step * sign * axis for sign in (1, -1) for axis in axes]
        here = max([here, *(point.clamp(0.0, 1.0) for point in around)], key=moved)
    return here


def _keep_in_charge(guided: torch.Tensor, target: torch.Tensor, floor: float) -> torch.Tensor:
    """Cap tokens below the floor at the target's probability; the others share what is left."""
    before = target.softmax(-1)
    capped = before < floor
    capped[before.where(~guided.isneginf(), -1.0).argmax()] = False
    if not capped.any():
        return guided
    lower = torch.minimum(target.log_softmax(-1), guided.log_softmax(-1))
    left = 1 - lower[capped].exp().sum()
    share = guided - guided[~capped].logsumexp(0)
    return torch.where(capped, lower, share + left.log())


class Step(NamedTuple):
    """One decoding step of a batch whose prompts are padded on the left."""

    histories: list[list[int]]  # [num_rows], all tokens of each row
    inputs: torch.Tensor  # int64 [num_rows, num_new], tokens that no model has seen yet
    mask: torch.Tensor  # int64 [num_rows, length], 0 on padding
    base_logits: torch.Tensor  # [num_rows, num_new, vocab_size]


class Guide(Protocol):
    """Something that steers: a network, or a pair of models."""

    def start(self) -> Guiding:
        """Begin with a new batch."""
        ...


class Guiding(Protocol):
    """A guide at work on one batch."""

    def opinions(self, step: Step) -> Sequence[Opinion | None]:
        """Return what it has to say on each row's next token; None: nothing, this time."""
        ...


@dataclass(frozen=True)
class NetworkGuide:
    """A value network of the base's own vocabulary, of any kind in `CONNECTIONS`."""

    model: PreTrainedModel
    scale: float = 1.0
    kind: str = "residual"
    reference: PreTrainedModel | None = None
    """The base it was trained against, for dynamic fusion."""

    def start(self) -> _NetworkGuiding:
        reference = None if self.reference is None else _Cached(self.reference)
        return _NetworkGuiding(self, _Cached(self.model), reference)


@dataclass(frozen=True)
class PairGuide:
    """An expert minus an anti-expert, usually what the expert was tuned from."""

    expert: PreTrainedModel
    antiexpert: PreTrainedModel
    scale: float = 1.0

    def start(self) -> _PairGuiding:
        return _PairGuiding(self.scale, _Cached(self.expert), _Cached(self.antiexpert))


@dataclass(frozen=True)
class MappedGuide:
    """A residual network or a pair of another vocabulary than the target's.

    Without KV caches: the tail of a history in other tokens changes as it grows.
    """

    guide: NetworkGuide | PairGuide
    reader: Reader

    def start(self) -> Guiding:
        return _MappedGuiding(self)


def load_guide(
    folder: Path, scale: float | None = None, target_fingerprint: str | None = None
) -> Guide:
    """Load a network's folder: of any kind, with its reference if it has one, in float32.

    Args:
        scale: replaces the network's own.
        target_fingerprint: `tokenizer_fingerprint` of the target's tokenizer; if it is not the
            network's own, the folder has a map for it. None: it is the network's own.

    Raises:
        NetworkError: the folder is no usable network.
        VocabularyError: it has no sound map for the target.
    """
    manifest = check_network(folder).manifest
    scale = manifest.default_scale if scale is None else scale

    def load(role: Role) -> PreTrainedModel:
        path = model_path(folder, role)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return attend_as_configured(model).eval()

    guide: NetworkGuide | PairGuide
    if manifest.kind == "contrast":
        guide = PairGuide(load("expert"), load("antiexpert"), scale)
    else:
        reference = load("reference") if manifest.reference else None
        guide = NetworkGuide(load("value"), scale, manifest.kind, reference)
    if target_fingerprint is None or target_fingerprint == manifest.tokenizer_fingerprint:
        return guide
    return MappedGuide(guide, Reader.load(folder, target_fingerprint))


@torch.inference_mode()
def decode(
    base: PreTrainedModel,
    guides: Sequence[Guide],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
    *,
    dynamic: bool = False,
    floor: float = 0.0,
) -> list[list[int]]:
    """Continue each prompt greedily, until a stop token (left out) or `max_new_tokens`.

    Args:
        base: the target; without guides it decodes alone.
        prompts: token ids of the base's vocabulary, one batch.
        dynamic, floor: as for `combine`.
    """
    histories = [list(prompt) for prompt in prompts]
    inputs, mask = _pad_left(histories)
    cached, at_work = _Cached(base), [guide.start() for guide in guides]
    generated: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        base_logits = cached(inputs, mask)
        step = Step(histories, inputs, mask, base_logits)
        said = [guiding.opinions(step) for guiding in at_work]
        tokens = []
        for row, logits in enumerate(base_logits[:, -1]):
            opinions = [opinions[row] for opinions in said]
            spoken = [opinion for opinion in opinions if opinion is not None]
            tokens.append(int(combine(logits, spoken, dynamic=dynamic, floor=floor).argmax()))
        for row, token in enumerate(tokens):
            histories[row].append(token)
            if token in stop_ids:
                running.discard(row)
            elif row in running:
                generated[row].append(token)
        if not running:
            break
        inputs = torch.tensor(tokens)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return generated


def _pad_left(histories: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and their mask, int64 `[num_rows, longest]` each."""
    longest = max(map(len, histories))
    padding = [longest - len(history) for history in histories]
    ids = [[0] * pad + [*history] for pad, history in zip(padding, histories, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
    return torch.tensor(ids), torch.tensor(mask)


class _Cached:
    """A model with the KV cache of one batch."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._past: Any = None

    def __call__(
        self,
        inputs: torch.Tensor | None,
        mask: torch.Tensor,
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read new tokens, or their embeddings; returns `[num_rows, num_new, vocab_size]`."""
        new = inputs if embeddings is None else embeddings
        assert new is not None
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        output = self.model(
            input_ids=inputs if embeddings is None else None,
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._past,
            use_cache=True,
        )
        self._past = output.past_key_values
        logits: torch.Tensor = output.logits
        return logits


@dataclass(frozen=True)
class _NetworkGuiding:
    guide: NetworkGuide
    cached: _Cached
    reference: _Cached | None

    def opinions(self, step: Step) -> Sequence[Opinion]:
        connect = CONNECTIONS[self.guide.kind]
        embedding = self.guide.model.get_input_embeddings()
        embeddings = connect(step.inputs, step.base_logits, embedding)
        value = self.cached(None, step.mask, embeddings)[:, -1]
        if self.reference is None:
            return [Opinion(row, self.guide.scale) for row in value]
        bases = self.reference(step.inputs, step.mask)[:, -1]
        pairs = zip(value, bases, strict=True)
        return [Opinion(row, self.guide.scale, base) for row, base in pairs]


@dataclass(frozen=True)
class _PairGuiding:
    scale: float
    expert: _Cached
    antiexpert: _Cached

    def opinions(self, step: Step) -> Sequence[Opinion]:
        expert = self.expert(step.inputs, step.mask)[:, -1].float()
        base = self.antiexpert(step.inputs, step.mask)[:, -1].float()
        both = min(expert.shape[1], base.shape[1])
        value = expert[:, :both] - base[:, :both]
        return [Opinion(v, self.scale, b) for v, b in zip(value, base, strict=True)]


@dataclass(frozen=True)
class _MappedGuiding:
    guide: MappedGuide

    def opinions(self, step: Step) -> Sequence[Opinion | None]:
        readings = [self.guide.reader.read(history) for history in step.histories]
        said: list[Opinion | None] = [None] * len(readings)
        rows = [row for row, reading in enumerate(readings) if not reading.waiting]
        if not rows:
            return said
        histories = [list(readings[row].ids) for row in rows]
        # Residual networks and pairs read tokens only, nothing of the base's logits.
        own = Step(histories, *_pad_left(histories), base_logits=step.base_logits)
        columns = self.guide.reader.map.columns
        for row, opinion in zip(rows, self.guide.guide.start().opinions(own), strict=True):
            at_start = readings[row].at_start
            said[row] = opinion._replace(columns=columns[-1 if at_start else 0])
        return said
