"""Weights that are solved: what they must reach, against sums in float64 and grids."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import value_models.fusion as fusion
from value_models.fusion import FARTHEST, divergence, solve_weights

INF = float("inf")
WEIGHTS = Path(__file__).parents[2] / "value_models" / "demo" / "weights"


def moved(target: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """KL(fused || target) in float64; `[n, V]`, `[n, T, V]`, `[n, T]` -> `[n]`."""
    before = target.double().log_softmax(-1)
    tilt = (weights.double()[:, :, None] * values.double()).sum(1)
    after = (target.double() + tilt).log_softmax(-1)
    return (after.exp() * (after - before)).masked_fill(after.isneginf(), 0.0).sum(-1)


def draw(
    num_rows: int, num_networks: int, vocab_size: int, seed: int, signs: tuple[float, ...] = (1, -1)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Target and value logits from flat to peaked, a fifth of the tokens excluded, and bounds."""
    generator = torch.Generator().manual_seed(seed)

    def size(*shape: int) -> torch.Tensor:
        return torch.empty(*shape).log_normal_(0.0, 1.2, generator=generator)

    target = torch.randn(num_rows, vocab_size, generator=generator) * size(num_rows, 1)
    values = torch.randn(num_rows, num_networks, vocab_size, generator=generator)
    values *= size(num_rows, num_networks, 1)
    values += size(num_rows, num_networks, 1)  # constants of a row say nothing
    if vocab_size > 2:
        target[torch.rand(num_rows, vocab_size, generator=generator) < 0.2] = -INF
        target[:, :2] = target[:, :2].nan_to_num(0.0, neginf=0.0)
    bounds = 2 * torch.rand(num_rows, num_networks, generator=generator)
    chosen = torch.randint(len(signs), (num_rows, num_networks), generator=generator)
    return target, values, bounds * torch.tensor(signs)[chosen]


def alone(target: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """How far each network moves the target without the others, `[n, T]`."""
    each = [moved(target, values[:, [i]], weights[:, [i]]) for i in range(values.shape[1])]
    return torch.stack(each, 1)


@pytest.mark.parametrize(
    ("num_rows", "vocab_size"), [(300, 2), (300, 3), (300, 17), (300, 400), (8, 8192), (2, 131_072)]
)
def test_one_network_moves_the_target_as_far_as_it_moved_its_base(
    num_rows: int, vocab_size: int
) -> None:
    target, values, bounds = draw(num_rows, 1, vocab_size, seed=vocab_size)
    farthest = moved(target, values, bounds)
    share = torch.rand(num_rows, generator=torch.Generator().manual_seed(1)) ** 2
    distances = (farthest * share).float()[:, None]
    found = solve_weights(target, values, distances, bounds)
    reached = moved(target, values, found.weights)
    torch.testing.assert_close(reached.float(), distances[:, 0], atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(found.reached.double(), reached, atol=2e-5, rtol=1e-6)
    assert torch.equal(found.wanted, distances[:, 0])
    between = found.weights / bounds
    assert between.min() >= 0
    assert between.max() <= 1


def test_the_bound_is_the_weight_where_it_is_too_near() -> None:
    target, values, bounds = draw(100, 1, 30, seed=2)
    farthest = moved(target, values, bounds).float()
    found = solve_weights(target, values, 1.1 * farthest[:, None] + 0.01, bounds)
    torch.testing.assert_close(found.weights, bounds)
    torch.testing.assert_close(found.reached, farthest, atol=1e-5, rtol=1e-5)
    assert (found.reached < found.wanted).all()


def test_negative_bounds_are_those_of_the_opposite_network() -> None:
    target, values, bounds = draw(50, 2, 30, seed=3)
    distances = torch.rand(50, 2)
    one = solve_weights(target, values, distances, bounds)
    other = solve_weights(target, -values, distances, -bounds)
    assert torch.equal(one.weights, -other.weights)


ONE_HOT = torch.tensor([0.0, -200.0, -300.0, -250.0])
FLAT = torch.zeros(4)
STEEP = torch.tensor([0.0, 5.0, -1.0, 2.0])


@pytest.mark.parametrize(
    ("target", "value", "distance", "bound", "weight"),
    [
        pytest.param(FLAT, torch.zeros(4), 0.0, 2.0, 0.0, id="expert is its base"),
        pytest.param(FLAT, STEEP, 0.0, 2.0, 0.0, id="distance 0"),
        pytest.param(FLAT, torch.full((4,), 7.3), 0.5, 2.0, 0.0, id="constant value"),
        pytest.param(FLAT, STEEP, 0.5, 0.0, 0.0, id="bound 0"),
        pytest.param(ONE_HOT, STEEP, 0.5, 2.0, 2.0, id="one-hot target"),
        pytest.param(ONE_HOT, STEEP, 0.5, -2.0, -2.0, id="one-hot target, away"),
        pytest.param(
            torch.tensor([-INF, 1.0, -INF, -INF]), STEEP, 0.5, 2.0, 0.0, id="one allowed token"
        ),
        pytest.param(
            torch.tensor([0.0, -INF, 1.0, -INF]),
            torch.tensor([3.0, 9.0, 3.0, 1.0]),
            0.5,
            2.0,
            0.0,
            id="constant where allowed",
        ),
        pytest.param(torch.full((4,), -INF), STEEP, 0.5, 2.0, 0.0, id="nothing allowed"),
        pytest.param(FLAT, 0.01 * STEEP, INF, 2.0, 2.0, id="infinite distance"),
        pytest.param(FLAT, 0.01 * STEEP, 50.0, 1.5, 1.5, id="one-hot expert"),
        pytest.param(FLAT, torch.tensor([0.0, 1e4, 0.0, 0.0]), 9.0, 2.0, 2.0, id="huge value"),
        pytest.param(1e4 * STEEP, STEEP, 1.0, 2.0, 2.0, id="huge target"),
    ],
)
def test_degenerate_cases_end_at_zero_or_the_bound(
    target: torch.Tensor, value: torch.Tensor, distance: float, bound: float, weight: float
) -> None:
    arguments = (value[None, None], torch.tensor([[distance]]), torch.tensor([[bound]]))
    found = solve_weights(target[None], *arguments)
    assert found.weights.tolist() == [[weight]]
    assert all(part.isfinite().all() for part in found)
    if weight == 0:
        assert found.wanted.item() == found.reached.item() == 0
    # Next to another network, and as a row of a batch.
    ordinary = draw(1, 1, 4, seed=4)[1]
    together = solve_weights(
        torch.stack([FLAT, target]),
        torch.cat([ordinary, value[None, None]], 1).expand(2, -1, -1),
        torch.tensor([[0.3, distance]]).expand(2, -1),
        torch.tensor([[1.0, bound]]).expand(2, -1),
    )
    assert all(part.isfinite().all() for part in together)


def test_an_infinite_distance_is_a_large_one() -> None:
    target, values, bounds = draw(1, 1, 30, seed=5)
    assert solve_weights(target, values, torch.tensor([[INF]]), bounds).wanted.item() == FARTHEST


def test_huge_logits_give_no_nan() -> None:
    target, values, bounds = draw(100, 3, 50, seed=6)
    found = solve_weights(1e4 * target, 1e4 * values, torch.rand(100, 3), bounds)
    assert all(part.isfinite().all() for part in found)
    assert (found.weights.abs() <= bounds.abs() * (1 + 1e-6)).all()


@pytest.mark.parametrize(("num_networks", "points"), [(2, 41), (3, 15), (4, 8)])
@pytest.mark.parametrize("vocab_size", [3, 30])
def test_several_networks_reach_the_mean_wherever_the_box_does(
    num_networks: int, points: int, vocab_size: int
) -> None:
    num_rows = 60
    target, values, bounds = draw(num_rows, num_networks, vocab_size, seed=7 + num_networks)
    # Networks that pull against each other need more than the ray.
    values[::3, 1] = 0.2 * values[::3, 1] - values[::3, 0] * (bounds[::3, :1] / bounds[::3, 1:2])
    axes = torch.linspace(0, 1, points)
    grid = torch.cartesian_prod(*[axes] * num_networks)
    everywhere = torch.stack(
        [moved(target, values, bounds * shares[None]) for shares in grid], 1
    )  # [n, num_points]
    farthest = everywhere.amax(1, keepdim=True)
    generator = torch.Generator().manual_seed(8)
    distances = farthest * torch.rand(num_rows, 1, generator=generator) * 1.1
    distances = (
        distances * (0.5 + torch.rand(num_rows, num_networks, generator=generator))
    ).float()
    found = solve_weights(target, values, distances, bounds)
    reached = moved(target, values, found.weights)

    def objective(distance: torch.Tensor) -> torch.Tensor:
        return (distance[..., None] - distances[:, None].double()).square().sum(-1)

    attainable = farthest[:, 0] >= found.wanted
    assert 0.5 < attainable.float().mean() < 1
    torch.testing.assert_close(found.wanted, distances.mean(1))
    torch.testing.assert_close(found.reached.double(), reached, atol=2e-5, rtol=1e-6)
    missed = (reached - found.wanted)[attainable].abs()
    assert missed.max() < 2e-5
    best = objective(everywhere).amin(1)
    mine = objective(reached[:, None])[:, 0]
    assert (mine - best)[attainable].max() < 1e-4
    # Elsewhere the farthest point is the best.
    torch.testing.assert_close(
        reached.clamp(max=farthest[:, 0])[~attainable],
        farthest[:, 0][~attainable],
        atol=1e-6,
        rtol=0.02,
    )


def test_weights_have_the_proportions_that_networks_have_alone() -> None:
    target, values, bounds = draw(200, 3, 40, seed=9)
    own = alone(target, values, bounds * torch.rand(200, 3)).float()
    each = [solve_weights(target, values[:, [i]], own[:, [i]], bounds[:, [i]]) for i in range(3)]
    separate = torch.cat([one.weights for one in each], 1)
    found = solve_weights(target, values, own, bounds)
    inside = (found.weights.abs() < bounds.abs() * 0.999).all(1) & (own.amin(1) > 1e-3)
    assert inside.sum() > 50
    proportions = (found.weights / separate)[inside]
    torch.testing.assert_close(proportions, proportions[:, :1].expand(-1, 3), atol=0, rtol=1e-3)


def test_what_has_reached_its_bound_stays_there_while_others_go_on() -> None:
    target = torch.zeros(1, 6)
    values = torch.tensor([[[4.0, 0, 0, 0, 0, 0], [0, 0, 0, 4.0, 0, 0]]])
    bounds = torch.tensor([[0.5, 2.0]])
    # The first alone would be at its bound; the second, hardly in it.
    distances = torch.tensor([[0.9, 0.05]])
    found = solve_weights(target, values, distances, bounds)
    assert found.weights[0, 0] == 0.5
    assert 0 < found.weights[0, 1] < 2
    assert found.reached.item() == pytest.approx(0.475, abs=1e-5)


def test_opposite_networks_do_not_stop_each_other() -> None:
    target, value, _ = draw(20, 1, 30, seed=10)
    values = torch.cat([value, -value], 1)
    bounds = torch.tensor([[1.0, 1.0]]).expand(20, -1)
    one = 0.9 * torch.minimum(*alone(target, values, bounds).float().unbind(1))
    found = solve_weights(target, values, one[:, None].expand(-1, 2), bounds)
    torch.testing.assert_close(found.reached, one, atol=1e-5, rtol=1e-5)


def test_networks_in_another_order_have_the_same_weights() -> None:
    target, values, bounds = draw(200, 4, 20, seed=11)
    distances = 1.5 * alone(target, values, bounds).float() * torch.rand(200, 4)
    order = torch.tensor([2, 0, 3, 1])
    found = solve_weights(target, values, distances, bounds)
    other = solve_weights(target, values[:, order], distances[:, order], bounds[:, order])
    torch.testing.assert_close(other.weights, found.weights[:, order], atol=1e-4, rtol=1e-3)


def test_equal_networks_weigh_the_same() -> None:
    target, value, _ = draw(50, 1, 30, seed=12)
    values, bounds = value.expand(-1, 3, -1), torch.full((50, 3), 2.0)
    distances = alone(target, values, 0.5 * bounds).float()
    found = solve_weights(target, values, distances, bounds)
    assert torch.equal(found.weights, found.weights[:, :1].expand(-1, 3))
    torch.testing.assert_close(found.weights.sum(1), torch.ones(50), atol=1e-2, rtol=1e-2)


def test_networks_without_a_say_do_not_count() -> None:
    target, values, bounds = draw(50, 4, 30, seed=13)
    distances = alone(target, values, bounds).float() * torch.rand(50, 4)
    bounds[:, 1] = 0
    values[:, 3] = 5.0
    said = [0, 2]
    found = solve_weights(target, values, distances, bounds)
    without = solve_weights(target, values[:, said], distances[:, said], bounds[:, said])
    assert not found.weights[:, [1, 3]].any()
    torch.testing.assert_close(found.weights[:, said], without.weights, atol=1e-5, rtol=1e-4)
    assert torch.equal(found.wanted, without.wanted)


def test_a_row_does_not_depend_on_the_others() -> None:
    target, values, bounds = draw(30, 2, 50, seed=14)
    distances = 1.2 * alone(target, values, bounds).float() * torch.rand(30, 2)
    together = solve_weights(target, values, distances, bounds)
    for row in range(30):
        one = slice(row, row + 1)
        by_itself = solve_weights(target[one], values[one], distances[one], bounds[one])
        torch.testing.assert_close(by_itself.weights[0], together.weights[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_networks", [1, 2, 3])
def test_a_fixed_number_of_steps_solves_the_same(
    num_networks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, values, bounds = draw(100, num_networks, 50, seed=15)
    distances = 1.2 * alone(target, values, bounds).float() * torch.rand(100, num_networks)
    looking = solve_weights(target, values, distances, bounds)
    monkeypatch.setattr(fusion, "_may_look", lambda tensor: False)
    fixed = solve_weights(target, values, distances, bounds)
    torch.testing.assert_close(fixed.reached, looking.reached, atol=1e-5, rtol=1e-5)
    # Next to no distance is no weight, or another: what it does is below what float32 resolves.
    tells = distances.amin(1) > 1e-4
    torch.testing.assert_close(fixed.weights[tells], looking.weights[tells], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("num_networks", [1, 4])
def test_nothing_waits_for_a_device(num_networks: int) -> None:
    # A meta tensor has no content: whoever asks for it fails.
    target, values = torch.empty(5, 9), torch.empty(5, num_networks, 9)
    weights = torch.empty(5, num_networks)
    found = solve_weights(*(part.to("meta") for part in (target, values, weights, weights)))
    assert found.weights.shape == (5, num_networks)
    assert found.reached.shape == found.wanted.shape == (5,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence(dtype: torch.dtype) -> None:
    p, q = (3 * torch.randn(20, 100) for _ in range(2))
    p[:, 10:20] = q[:, 10:20] = -INF
    p[:, 30:40] = -INF
    p, q = p.to(dtype), q.to(dtype)
    allowed = [i for i in range(100) if not (10 <= i < 20 or 30 <= i < 40)]
    expected = torch.nn.functional.kl_div(
        q.double().log_softmax(-1)[:, allowed],
        p.double().log_softmax(-1)[:, allowed],
        reduction="none",
        log_target=True,
    ).sum(-1)
    torch.testing.assert_close(divergence(p, q).double(), expected, atol=1e-5, rtol=1e-6)
    assert divergence(q, p).isinf().all()
    assert (divergence(p, p) < 1e-6).all()


def test_divergence_of_one_hot_distributions() -> None:
    one, other = torch.tensor([[500.0, 0.0, -INF]]), torch.tensor([[0.0, 500.0, 3.0]])
    assert divergence(one, other).item() == pytest.approx(500)
    assert divergence(one, one).item() == 0
    # What is excluded there has no probability here, to float32.
    assert divergence(one, torch.tensor([[0.0, -INF, -INF]])).item() == 0


@pytest.fixture(scope="module")
def demo() -> dict[str, torch.Tensor]:
    """Logits of the demo's models behind each token of a chat, `[num_tokens, vocab_size]`."""
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "target")
    chat = [{"role": "user", "content": "Where was Ana Kovac born?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(
        prompt + "Ana Kovac was born in Velenje in 1931.", return_tensors="pt"
    ).input_ids
    names = ("target", "small", "networks/qa", "networks/json", "networks/guard")
    with torch.inference_mode():
        return {
            name: AutoModelForCausalLM.from_pretrained(WEIGHTS / name, dtype=torch.float32)
            .eval()(ids)
            .logits[0]
            for name in names
        }


@pytest.mark.parametrize("names", [["qa"], ["json"], ["qa", "json"], ["qa", "json", "guard"]])
def test_trained_models(demo: dict[str, torch.Tensor], names: list[str]) -> None:
    target, base = demo["target"], demo["small"]
    values = torch.stack([demo[f"networks/{name}"] for name in names], 1)
    distances = torch.stack([divergence(base + v, base) for v in values.unbind(1)], 1)
    bounds = torch.full_like(distances, 2.0)
    found = solve_weights(target, values, distances, bounds)
    reached = moved(target, values, found.weights)
    torch.testing.assert_close(found.reached.double(), reached, atol=2e-5, rtol=0)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 2.0])] * len(names)).view(-1, len(names))
    farthest = torch.stack(
        [moved(target, values, corner.expand_as(bounds)) for corner in corners]
    ).amax(0)
    solvable = farthest > found.wanted
    assert solvable.float().mean() > 0.5
    torch.testing.assert_close(reached[solvable].float(), found.wanted[solvable], atol=2e-5, rtol=0)
    torch.testing.assert_close(reached[~solvable], farthest[~solvable], atol=2e-2, rtol=0)
