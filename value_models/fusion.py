"""Dynamic fusion: weights that are solved at every token.

Dynamic logit fusion (Fan et al., NeurIPS 2024, arXiv 2406.15480) moves the target's distribution as
far as each expert has moved from its own small base, as KL divergences measure it. With target
logits `z`, value logits `v_t` and distances `d_t = KL(softmax(expert_t) || softmax(base_t))`:

    fused(a) = softmax(z + sum_t a_t v_t),    moved(a) = KL(fused(a) || softmax(z))

Each weight `a_t` lies between 0 and its bound, which may be negative.

One network: `moved(a) = d`. On a ray from 0, `moved` never decreases (its derivative is the step
times the variance of the value logits), so there is one solution, or the bound is too near and is
the weight.

Several: minimise `sum_t (moved(a) - d_t)^2`. All `d_t` are compared with the same number, so that
is least where `moved(a)` is their mean, and this is one equation for several unknowns: a surface of
weights solves it equally well, some of them with a single network at work. We take the solution in
the proportions of the weights that the networks would have alone: on the ray through those, as far
as `moved` is the mean. Where a bound ends the ray too early, the path goes on without what has
reached its bound; from where all have, it goes straight to the farthest point of the box, which
networks that pull against each other may need. Where none of this reaches the mean, the farthest
point of the path is the answer, and `Fusion.reached` says how far that is.

Everything runs on the device, with all rows at once. On the CPU it stops when all rows are solved;
elsewhere that would be a wait for the device, and the number of steps is fixed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FARTHEST = 1e6
"""Nats that stand for an infinite distance."""
STEPS = 24
"""The bits of a float32's fraction, and as many halvings of a bracket at worst."""
ABSOLUTE, RELATIVE = 2e-7, 1e-6
"""Nats, and a share of the distance: about what sums of float32 resolve."""
REFINEMENTS = (0.5, 0.25, 0.125, 0.0625)
"""Steps of the search for the farthest point, as shares of the bounds."""
LARGEST, SMALLEST = 1e30, 1e-30
"""Instead of infinity, and of 0 where something is divided."""


class Fusion(NamedTuple):
    """What networks weigh at one position of each row."""

    weights: torch.Tensor  # float32 [num_rows, num_networks], each between 0 and its bound
    wanted: torch.Tensor  # float32 [num_rows], nats: how far the fused distribution should move
    reached: torch.Tensor  # float32 [num_rows], nats: how far these weights move it


def divergence(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax(p) || softmax(q)) of each row, in nats.

    Args:
        p_logits, q_logits: `[num_rows, vocab_size]`, any float dtype. `-inf` excludes a token; what
            `q` excludes and `p` does not makes the divergence infinite.
    """
    p_logits, q_logits = p_logits.float(), q_logits.float()
    p, p_normaliser = _softmax(p_logits)
    _, q_normaliser = _softmax(q_logits)
    # Both may exclude a token: it then counts for nothing, and -inf minus -inf is no number.
    gain = (p_logits - q_logits).sub_(p_normaliser - q_normaliser).where(p > 0, 0.0)
    moved: torch.Tensor = torch.linalg.vecdot(p, gain)
    return moved.clamp_(min=0.0)


def _softmax(
    logits: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities, `[num_rows, vocab_size]`, and the logits' normaliser, `[num_rows, 1]`.

    torch's own sum of exponentials is off by 1e-5 where the vocabulary is large.
    """
    probabilities = torch.softmax(logits, -1, out=out)
    probabilities /= probabilities.sum(-1, keepdim=True)
    # log(sum(exp(logits))), without another pass of exponentials.
    normaliser = logits.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log()
    return probabilities, normaliser


def solve_weights(
    target: torch.Tensor, values: torch.Tensor, distances: torch.Tensor, bounds: torch.Tensor
) -> Fusion:
    """Solve for the weights of all rows; see the module.

    A network does not count, and weighs 0, where its bound is 0 or its value logits are the same
    for all tokens that are not excluded: no weight of it would change anything.

    Args:
        target: float32 `[num_rows, vocab_size]`; `-inf` marks excluded tokens.
        values: finite `[num_rows, num_networks, vocab_size]`.
        distances: `[num_rows, num_networks]`, nats.
        bounds: `[num_rows, num_networks]`.
    """
    num_rows, num_networks, _ = values.shape
    target = target.float()
    allowed = (target > -torch.inf).float()[:, None]
    probabilities, normaliser = _softmax(target)
    start = target - normaliser
    # In units of the bounds, weights lie between 0 and 1.
    tilts = values.float() * bounds.float()[:, :, None]
    outside = (1 - allowed) * LARGEST
    counted = (tilts - outside).amax(-1) > (tilts + outside).amin(-1)
    # A constant of each row is free: relative to the mean, sums keep their digits.
    tilts -= torch.linalg.vecdot(probabilities[:, None], tilts)[:, :, None]
    tilts *= allowed
    distances = distances.float().nan_to_num(0.0, FARTHEST).clamp(0.0, FARTHEST) * counted
    wanted = distances.sum(-1) / counted.sum(-1).clamp(min=1)
    if num_networks == 1:
        shares, reached = _solve(_Line.of(start, tilts[:, 0]), wanted)
        return Fusion(shares[:, None] * bounds, wanted, reached)
    each = _Line.of(start.repeat_interleave(num_networks, 0), tilts.flatten(0, 1))
    alone = _solve(each, distances.flatten())[0].view(num_rows, num_networks)
    shares, reached = _solve_together(start, tilts, alone, wanted)
    return Fusion(shares * bounds, wanted, reached)


class _Line(NamedTuple):
    """The distributions `softmax(target + origin + share * direction)`."""

    target: torch.Tensor  # [num_rows, vocab_size], log-probabilities
    direction: torch.Tensor  # [num_rows, vocab_size], 0 on excluded tokens
    work: torch.Tensor  # [2, at least num_rows, vocab_size], for what comes up on the way: to
    # take memory anew for each tensor of this size costs the CPU more than to fill it
    origin: torch.Tensor | None = None  # [num_rows, vocab_size], 0 on excluded tokens; None: 0

    @classmethod
    def of(
        cls, target: torch.Tensor, direction: torch.Tensor, origin: torch.Tensor | None = None
    ) -> _Line:
        return cls(target, direction, target.new_empty(2, *target.shape), origin)

    def at(self, share: torch.Tensor) -> torch.Tensor:
        """Return the point at this share of each row.

        Returns:
            `[3, num_rows]`: the share; the root of how far that is from the target, in nats; and
            the derivative of the share with respect to that root.
        """
        first, second = self.work[:, : len(share)]
        if self.origin is None:
            tilt = None
            logits = torch.addcmul(self.target, share[:, None], self.direction, out=first)
        else:
            tilt = torch.addcmul(self.origin, share[:, None], self.direction)
            logits = torch.add(self.target, tilt, out=first)
        fused, normaliser = _softmax(logits, out=second)
        weighted = torch.mul(fused, self.direction, out=first)
        mean = weighted.sum(-1)
        if tilt is None:
            gain = share * mean
            spread = share * torch.mul(weighted, self.direction, out=second).sum(-1) - gain * mean
        else:
            gain = torch.linalg.vecdot(fused, tilt)
            spread = torch.linalg.vecdot(weighted, tilt) - gain * mean
        root = (gain - normaliser[:, 0]).clamp_(min=0.0).sqrt_()
        return torch.stack([share, root, 2 * root / spread.clamp_(min=SMALLEST)])

    def begin(self) -> torch.Tensor:
        """Return the point at share 0."""
        zero = self.target.new_zeros(len(self.target))
        if self.origin is not None:
            return self.at(zero)
        # The limit of 0 / 0: for small steps the divergence is half the variance times their square
        weighted = self.target.softmax(-1) * self.direction
        mean = weighted.sum(-1)
        variance = torch.linalg.vecdot(weighted, self.direction) - mean * mean
        return torch.stack([zero, zero, (variance.clamp_(min=SMALLEST) / 2).rsqrt_()])

    def rows(self, chosen: torch.Tensor) -> _Line:
        origin = None if self.origin is None else self.origin[chosen]
        return _Line(self.target[chosen], self.direction[chosen], self.work, origin)


def _solve(line: _Line, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Go along lines until the distributions are `wanted` nats from the target's.

    The root of the divergence is close to linear in the share, so a cubic through both ends of a
    bracket, with their slopes, is a good guess; where it does not narrow the bracket well, a
    halving does. Lines begin nearer than wanted; where the end is nearer too, it is the answer.

    Returns:
        Shares and how far they are, `[num_rows]` each.
    """
    start, end = line.begin(), line.at(torch.ones_like(wanted))
    moves = wanted > 0
    best, reached = end[0].where(moves, 0.0), end[1].square().where(moves, 0.0)
    goal = wanted.sqrt()
    error = (wanted - reached).abs().where(moves & (goal < end[1]), 0.0)
    enough = ABSOLUTE + RELATIVE * wanted
    bracket, width = torch.stack([start, end]), torch.full_like(wanted, torch.inf)
    rows = torch.arange(len(wanted), device=wanted.device)
    for _ in range(STEPS):
        if _may_look(wanted):
            unsolved = (error > enough).nonzero()[:, 0]
            if not len(unsolved):
                break
            if 2 * len(unsolved) <= len(rows):  # to pick some costs as much as half a step of all
                line, bracket, rows = line.rows(unsolved), bracket[..., unsolved], rows[unsolved]
                row_parts = torch.stack([wanted, goal, error, enough, width])[:, unsolved]
                wanted, goal, error, enough, width = row_parts.unbind()
        guess, width = _guess(bracket, goal, width)
        point = line.at(guess)
        nearer = point[1] < goal
        bracket = torch.where(torch.stack([nearer, ~nearer])[:, None], point, bracket)
        found = point[1].square()
        now = (found - wanted).abs_()
        # What is solved stays as it is, whatever other rows still need.
        closer = (now < error) & (error > enough)
        error = now.where(closer, error)
        best[rows] = guess.where(closer, best[rows])
        reached[rows] = found.where(closer, reached[rows])
    return best, reached


def _guess(
    bracket: torch.Tensor, goal: torch.Tensor, last_width: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return shares within brackets, `[num_rows]`, and the brackets' widths.

    Args:
        bracket: `[2, 3, num_rows]`, two points of each row, one nearer than the goal, one farther.
        goal: `[num_rows]`, the root to be reached.
        last_width: `[num_rows]`, of the bracket before it was last narrowed.
    """
    share, root, slope = bracket.unbind(1)
    width, rise = share[1] - share[0], (root[1] - root[0]).clamp_(min=SMALLEST)
    x = ((goal - root[0]) / rise).clamp_(0.0, 1.0)
    # The share as a cubic of the root, monotone (and so within) with slopes of up to 3 times the
    # mean one: Fritsch & Carlson 1980.
    steepest = 3 * width
    near, far = torch.minimum(slope * rise, steepest).unbind()
    both = near + far
    cubic = x * (near + x * (steepest - near - both + x * (both - 2 * width)))
    slow = width > 0.6 * last_width
    return share[0] + cubic.where(~slow, 0.5 * width), width


def _may_look(tensor: torch.Tensor) -> bool:
    """Whether its content can decide what is done next without a wait for the device."""
    return tensor.device.type == "cpu"


def _solve_together(
    target: torch.Tensor, tilts: torch.Tensor, alone: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve for the shares of several networks.

    Args:
        target: `[num_rows, vocab_size]`, log-probabilities.
        tilts: `[num_rows, num_networks, vocab_size]`, value logits times bounds.
        alone: `[num_rows, num_networks]`, the shares that each would have alone.
        wanted: `[num_rows]`, nats.

    Returns:
        Shares `[num_rows, num_networks]`, and how far they move the target, `[num_rows]`.
    """
    first = alone / alone.amax(-1, keepdim=True).clamp(min=SMALLEST)
    along, reached = _solve(_Line.of(target, _mix(tilts, first)), wanted)
    shares = along[:, None] * first
    short = reached < wanted - ABSOLUTE - 10 * RELATIVE * wanted
    if _may_look(wanted):
        rows = short.nonzero()[:, 0]
        if len(rows):
            parts = (part[rows] for part in (target, tilts, alone, wanted))
            shares[rows], reached[rows] = _solve_beyond(*parts)
        return shares, reached
    beyond, reached_beyond = _solve_beyond(target, tilts, alone, wanted)
    return beyond.where(short[:, None], shares), reached_beyond.where(short, reached)


def _solve_beyond(
    target: torch.Tensor, tilts: torch.Tensor, alone: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve where a bound ends the ray too early; arguments and results as above."""
    turns = alone.sort(-1, descending=True).values.clamp(min=SMALLEST)
    path = [(alone / turn[:, None]).clamp(max=1.0) for turn in turns.unbind(-1)]
    path.append(_farthest(target, tilts))
    points = torch.stack(path, 1)  # [num_rows, num_points, num_networks]
    moved = torch.stack([_moved(target, tilts, point) for point in path], 1)
    enough = moved >= wanted[:, None]
    # The first that is far enough, or the farthest.
    stop = torch.where(enough.any(-1), enough.int().argmax(-1), moved.argmax(-1))
    steps = torch.arange(len(alone), device=target.device)
    to, away = points[steps, stop], points[steps, (stop - 1).clamp(min=0)]
    away = away * (enough.any(-1) & (stop > 0))[:, None]
    line = _Line.of(target, _mix(tilts, to - away), _mix(tilts, away))
    share, reached = _solve(line, wanted)
    return away + share[:, None] * (to - away), reached


def _farthest(target: torch.Tensor, tilts: torch.Tensor) -> torch.Tensor:
    """Return shares that move the target far: from the best corner, by the best of smaller steps.

    Almost always that is the corner. On an edge of the box `moved` may be larger in the middle.
    """
    num_networks = tilts.shape[1]
    numbers = torch.arange(2**num_networks, device=target.device)
    axes = torch.eye(num_networks, device=target.device)
    corners = (numbers[:, None] >> axes.argmax(0) & 1).to(axes)
    shares = _best(target, tilts, corners.expand(len(target), -1, -1))
    for step in REFINEMENTS:
        around = torch.cat([torch.zeros_like(axes[:1]), step * axes, -step * axes])
        shares = _best(target, tilts, (shares[:, None] + around).clamp(0.0, 1.0))
    return shares


def _best(target: torch.Tensor, tilts: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return the point that moves farthest, of `[num_rows, num_points, num_networks]`."""
    moved = torch.stack([_moved(target, tilts, point) for point in points.unbind(1)], 1)
    return points.gather(1, moved.argmax(-1)[:, None, None].expand(-1, 1, points.shape[2]))[:, 0]


def _mix(tilts: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return the sum of tilts by their shares, `[num_rows, vocab_size]`."""
    mixed = tilts[:, 0] * shares[:, :1]
    for network in range(1, tilts.shape[1]):
        mixed.addcmul_(tilts[:, network], shares[:, network, None])
    return mixed


def _moved(target: torch.Tensor, tilts: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    whole = torch.ones_like(shares[:, 0])
    return _Line.of(target, _mix(tilts, shares)).at(whole)[1].square()
