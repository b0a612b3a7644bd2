"""The heads that draw vectors: what they learn, how guidance acts, what they cost, and their signs."""

from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from discrete_lit.backbones import BlockSettings, ids_of_signs
from discrete_lit.backbones.token_diffusion import BinaryFlowHead, DenoisingMLP, TokenDiffusionHead
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath, SteppedPath, cosine_betas
from discrete_lit.diffusion.solvers import DDPM, Euler, EulerMaruyama, Heun, HeunMaruyama


def normal(rows: int, columns: int, step: int) -> Tensor:
    return CounterRandom(0, torch.arange(rows)).normal(Purpose.LATENT_NOISE, columns, step).float()


Head = TypeVar("Head", bound=TokenDiffusionHead)


def randomised(head: Head) -> Head:
    generator = torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return head.eval()


SMALL: dict[str, Any] = {"width": 16, "depth": 2}


def fresh(rows: int, columns: int) -> Any:
    return lambda step: normal(rows, columns, step + 1)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("kind", ["steps", "flow"])
def test_a_head_learns_a_mixture_for_each_condition(kind: str) -> None:
    """Two conditions, each with a mixture of two points in the plane, which no regression could draw."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"width": 48, "depth": 2, "repeats": 2}
    if kind == "steps":
        path = SteppedPath(cosine_betas(100))
        # A first step that divides by alpha next to 0 wants more training than a test has.
        denoiser = GaussianDenoiser(path, prediction="v", learned_variance=True)
        head = TokenDiffusionHead(2, 2, denoiser=denoiser, solver=DDPM(50), **settings)
    else:
        denoiser = GaussianDenoiser(RectifiedPath(), prediction="velocity")
        head = TokenDiffusionHead(2, 2, denoiser=denoiser, solver=Heun(20), **settings)
    centres = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]], [[1.0, -1.0], [-1.0, 1.0]]])
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    rows = torch.arange(256)
    conditions, parts = rows % 2, rows // 2 % 2
    z = torch.nn.functional.one_hot(conditions, 2).float()
    for step in range(300):
        random = CounterRandom(1, rows + 256 * step)
        data = centres[conditions, parts] + 0.05 * random.normal(Purpose.LATENT_NOISE, 2).float()
        noise = random.normal(Purpose.CODE_NOISE, 4).float().view(256, 2, 2).movedim(1, 0)
        uniforms = random.uniform(Purpose.MASK_RATIO, 2).T
        terms = head.losses(z, data, uniforms=uniforms, noise=noise)
        optimizer.zero_grad()
        sum(terms.values(), torch.zeros(256)).mean().backward()
        optimizer.step()
    drawn = head.eval().sample(z, normal(256, 2, 0), noise=fresh(256, 2))
    distances = (drawn[:, None] - centres[conditions]).norm(dim=-1)
    assert (distances.min(dim=1).values < 0.35).float().mean() > 0.95
    shares = torch.stack([(distances.argmin(dim=1)[conditions == y] == 0).float().mean() for y in (0, 1)])
    assert bool(((shares > 0.3) & (shares < 0.7)).all()), shares


def test_guidance_of_one_is_none_and_both_halves_share_their_noise() -> None:
    head = randomised(TokenDiffusionHead(3, 5, solver=DDPM(6), **SMALL))
    z, null, start = normal(4, 5, 90), normal(4, 5, 91), 0.1 * normal(4, 3, 0)
    plain = head.sample(z, start, noise=fresh(4, 3))
    both = torch.cat((z, null))
    torch.testing.assert_close(head.sample(both, start, noise=fresh(4, 3), guidance_scale=1.0), plain)
    torch.testing.assert_close(
        head.sample(torch.cat((z, z)), start, noise=fresh(4, 3), guidance_scale=3.0), plain, rtol=1e-4, atol=1e-4
    )
    guided = head.sample(both, start, noise=fresh(4, 3), guidance_scale=3.0)
    assert (guided - plain).abs().max() > 1e-3
    # A scale of each row, and rows that do not depend on their neighbours.
    rows = head.sample(both, start, noise=fresh(4, 3), guidance_scale=torch.tensor([[1.0], [3.0], [1.0], [3.0]]))
    torch.testing.assert_close(rows[::2], plain[::2])
    torch.testing.assert_close(rows[1::2], guided[1::2])


def test_the_scale_of_the_data_is_taken_out_and_put_back() -> None:
    unit = randomised(TokenDiffusionHead(3, 5, solver=DDPM(6), repeats=1, **SMALL))
    scaled = TokenDiffusionHead(3, 5, solver=DDPM(6), repeats=1, scale=0.5, **SMALL).eval()
    scaled.load_state_dict(unit.state_dict())
    z, data, start = normal(4, 5, 90), normal(4, 3, 91), normal(4, 3, 0)
    draws = {"uniforms": torch.full((1, 4), 0.4, dtype=torch.float64), "noise": normal(4, 3, 92)[None]}
    for name, term in unit.losses(z, data, **draws).items():
        torch.testing.assert_close(scaled.losses(z, 0.5 * data, **draws)[name], term)
    torch.testing.assert_close(
        scaled.sample(z, start, noise=fresh(4, 3)), 0.5 * unit.sample(z, start, noise=fresh(4, 3))
    )


@pytest.mark.parametrize("repeats", [1, 4])
def test_stratified_times_lie_one_in_each_part(repeats: int) -> None:
    """So a loss that is a known function of t has a mean with less noise, and the same expectation."""
    denoiser = GaussianDenoiser(RectifiedPath(), prediction="velocity")
    settings: dict[str, Any] = {**SMALL, "denoiser": denoiser, "repeats": repeats}
    plain, stratified = TokenDiffusionHead(3, 5, **settings), TokenDiffusionHead(3, 5, stratified=True, **settings)
    times: list[Tensor] = []
    for head in (plain, stratified):
        head.network.time_embedding.register_forward_hook(lambda _, inputs, __: times.append(inputs[0] / 1000))
    rows = 500
    draws: dict[str, Tensor] = {
        "uniforms": CounterRandom(2, torch.arange(rows)).uniform(Purpose.DIFFUSION_TIME, repeats).T,
        "noise": torch.zeros(repeats, rows, 3),
    }
    for head in (plain, stratified):
        terms = head.losses(normal(rows, 5, 90), torch.ones(rows, 3), **draws)
        assert all(term.shape == (rows,) for term in terms.values())
    independent, spread = (t.view(repeats, rows) for t in times)
    torch.testing.assert_close((spread * repeats).floor(), torch.arange(repeats)[:, None].expand(-1, rows).double())
    assert bool((spread > 0).all() and (spread < 1).all())
    deviations = [float(t.square().mean(dim=0).std()) for t in (independent, spread)]
    assert deviations[1] == deviations[0] if repeats == 1 else deviations[1] < 0.4 * deviations[0]
    errors = [float(t.square().mean() - 1 / 3) for t in (independent, spread)]
    assert max(map(abs, errors)) < 4 * 0.3 / (repeats * rows) ** 0.5


def test_a_new_head_predicts_nothing_and_passes_few_products() -> None:
    network = DenoisingMLP(4, 6, width=16, depth=4, modulations=2)
    x, condition = normal(3, 4, 0), normal(3, 6, 1)
    assert bool((network(x, torch.zeros(3), condition) == 0).all())
    with FlopCounterMode(display=False) as counter:
        network.denoise(x, torch.zeros(1), network.condition_projection(condition))
    width, rows = 16, 3
    products = rows * (6 * width + 4 * width + 4 * 2 * width**2 + 2 * 3 * width**2 + 2 * width**2 + width * 4)
    time = 256 * width + width**2  # once for all rows
    assert counter.get_total_flops() == 2 * (products + time)


# --- Bits by flow matching ---


def test_first_weights_are_those_of_mar() -> None:
    """Xavier's uniform law, of deviation sqrt(2 / (inputs + outputs)), 0.02 for the time, 0 for what modulates."""
    torch.manual_seed(0)
    for name, weight in DenoisingMLP(96, 64, width=128, depth=2).named_parameters():
        found = float(weight.detach().square().mean().sqrt())
        if name.endswith("norm.weight"):
            assert found == 1
        elif weight.ndim < 2 or name.startswith(("modulations", "final_modulation", "output")):
            assert found == 0, name
        else:
            law = 0.02 if name.startswith("time_embedding") else (2 / sum(weight.shape)) ** 0.5
            assert found == pytest.approx(law, rel=0.05), name


def flow_head(bits: int, *, width: int = 5, **settings: Any) -> BinaryFlowHead:
    given: dict[str, Any] = {"width": 16, "depth": 2, "modulations": 1, **settings}
    return BinaryFlowHead(BlockSettings(width=width, heads=1, head_dim=width, mlp_hidden=4), 2**bits, **given)


class OptimalNetwork(nn.Module):
    """E[x | x_t] for a law of vectors of ±1, in the place of a head's network: the law is given by the condition.

    On straight lines x_t = (1 - t) x + t eps, so that p(x | x_t) is proportional to p(x) exp((1 - t) x.x_t / t^2).
    """

    def __init__(self, laws: Tensor, codes: Tensor) -> None:
        super().__init__()
        self.laws, self.codes = laws.double(), codes.double()
        self.condition_projection = self.time_embedding = nn.Identity()
        self.seen = 0

    def denoise(self, x: Tensor, time: Tensor, projected: Tensor, *, embedded: bool = False) -> Tensor:
        self.seen += 1
        t = (1 - time.double() / 1000).clamp(min=1e-3)  # the network reads 1,000 times the time from the noise on
        strength = ((1 - t) / t**2).reshape(-1, *(1,) * (x.ndim - 1)).flatten(1)
        flat, laws = x.double().flatten(1), self.laws[projected.flatten(1)[:, 0].long()]
        weights = (laws.log() + strength * (flat @ self.codes.T)).softmax(dim=-1)
        return (weights @ self.codes).view(x.shape).float()


def with_optimal_network(head: BinaryFlowHead, laws: Tensor, places: int = 1) -> OptimalNetwork:
    """Laws `(labels, 2^(b p))` of the bits of p positions together, the first one's the least significant."""
    codes = head.signs(torch.arange(laws.shape[1])) if places == 1 else joint_codes(head, laws.shape[1], places)
    head.flow.network = network = OptimalNetwork(laws, codes)  # type: ignore[assignment]
    return network


def joint_codes(head: BinaryFlowHead, count: int, places: int) -> Tensor:
    ids = torch.arange(count)[:, None] // 2 ** (head.bits * torch.arange(places)) % 2**head.bits
    return head.signs(ids).flatten(1)


def drawn_ids(head: BinaryFlowHead, labels: Tensor, *, steps: int) -> Tensor:
    """Ids `(B, p)`; row i of the hidden states holds the number of its law alone."""
    random, p = CounterRandom(2, torch.arange(len(labels))), head.block_size
    hidden = labels[:, None, None].expand(-1, p, head.width).float()

    def noise(step: int) -> Tensor:
        return random.normal(Purpose.LATENT_NOISE, p * head.bits, step).float().view(-1, p, head.bits)

    solver = EulerMaruyama(steps, last_step=0.05, last_drift="velocity")
    return head.ids(head.sample(hidden, noise(0), noise=lambda step: noise(step + 1), solver=solver))


def some_law(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(size, generator=generator, dtype=torch.float64)).softmax(dim=0)


def total_variation(numbers: Tensor, law: Tensor) -> float:
    return float((torch.bincount(numbers, minlength=len(law)) / len(numbers) - law).abs().sum() / 2)


@torch.no_grad()
def test_the_best_prediction_reaches_any_law_of_bits_with_steps() -> None:
    """The error falls with the steps to that of the draws alone; independent bits would be far off."""
    head, laws = flow_head(3), torch.stack((some_law(8, 0), some_law(8, 1)))
    network = with_optimal_network(head, laws)
    labels = torch.ones(20_000, dtype=torch.int64)
    found = {steps: total_variation(drawn_ids(head, labels, steps=steps)[:, 0], laws[1]) for steps in (3, 12, 101)}
    assert network.seen == 3 + 12 + 101
    assert found[3] > 2 * found[12] > 2 * found[101] and found[101] < 0.015, found
    bits = head.sub_tokens.split(torch.arange(8))
    ones = (laws[1, :, None] * bits).sum(dim=0)
    independent = torch.where(bits == 1, ones, 1 - ones).prod(dim=1)
    assert float((independent - laws[1]).abs().sum() / 2) > 0.1
    assert total_variation(drawn_ids(head, labels, steps=101)[:, 0], laws[0]) > 0.2


@torch.no_grad()
def test_positions_of_a_block_are_drawn_from_their_joint_law() -> None:
    head, laws = flow_head(2, block_size=2), some_law(16, 3)[None]
    with_optimal_network(head, laws, places=2)
    ids = drawn_ids(head, torch.zeros(20_000, dtype=torch.int64), steps=101)
    assert total_variation(ids[:, 0] + 4 * ids[:, 1], laws[0]) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("places", [1, 2])
def test_the_bound_of_the_best_prediction_is_the_likelihood(places: int) -> None:
    """Half the integral of the squared error over the ratio of signal to noise, for each vector by itself."""
    bits = 3 if places == 1 else 2
    head = flow_head(bits, block_size=places, likelihood_draws=64).eval()
    law = some_law(2 ** (bits * places), 5)
    with_optimal_network(head, law[None], places)
    numbers = torch.arange(len(law)).repeat_interleave(400)
    ids = numbers[:, None] // 2 ** (bits * torch.arange(places)) % 2**bits
    hidden = torch.zeros(len(ids), places, head.width)
    random = CounterRandom(0, torch.arange(len(ids)))
    nats = head.log_likelihood(hidden, ids, random)
    assert nats.shape == ids.shape and head.likelihood_kind == "bound"
    nats = nats.sum(dim=1).view(len(law), -1)
    errors = nats.std(dim=1) / nats.shape[1] ** 0.5
    assert float(errors.max()) < 0.1
    assert bool(((nats.mean(dim=1) - law.log()).abs() < 4 * errors + 0.002).all()), (nats.mean(dim=1), law.log())
    # In eval mode the loss is that; a prediction that knows less has a lower bound.
    losses, weights = head.losses(hidden, ids, random)
    torch.testing.assert_close(-losses.sum(dim=1), nats.flatten())
    assert bool((weights == 1).all())
    with_optimal_network(head, torch.full_like(law, 1 / len(law))[None], places)
    worse = head.log_likelihood(hidden, ids, random).sum(dim=1).view(len(law), -1).mean(dim=1)
    assert float((law * (nats.mean(dim=1) - worse)).sum()) > 0.1


def test_training_minimises_the_error_of_the_velocity() -> None:
    """Of each id, or block: the error of the data over sigma, which is at least 0.05, squared and averaged."""
    for size in (1, 2):
        head = randomised(flow_head(3, block_size=size, repeats=2)).train()
        hidden, ids = normal(4, 4 * 5, 90).view(4, 4, 5), torch.arange(16).view(4, 4) % 8
        random = CounterRandom(3, torch.arange(4))
        values, weights = head.losses(hidden, ids, random)
        count = 4 // size
        uniforms = random.uniform(Purpose.DIFFUSION_TIME, 2 * count).view(4, 2, count)
        noise = random.normal(Purpose.DIFFUSION_NOISE, 2 * 4 * 3).view(4, 2, count, size, 3).float()
        data = head.signs(ids).view(4, 1, count, size, 3)
        t = head.flow.objective.times(uniforms)[..., None, None].float()
        x_t = (1 - t) * data + t * noise
        rows = hidden.view(4, 1, count, size, 5).expand(-1, 2, -1, -1, -1)
        shape = (-1, 3) if size == 1 else (-1, size, 3)
        output = head.flow.network(x_t.reshape(shape), 1000 * (1 - t.flatten()), rows.reshape(*shape[:-1], 5)).view(
            x_t.shape
        )
        error = ((data - output) / t.clamp(min=0.05)).square().mean(dim=(3, 4)).mean(dim=1)
        torch.testing.assert_close(values, error.repeat_interleave(size, dim=1), rtol=1e-4, atol=1e-4)
        assert weights.shape == (4, 4) and bool((weights == 1).all())
        logits = torch.logit(head.flow.objective.times(torch.tensor([0.5, 0.8413447])))
        torch.testing.assert_close(logits, torch.tensor([0.8, 1.6]).double(), rtol=1e-4, atol=1e-4)


def test_vectors_that_are_drawn_together_see_one_another() -> None:
    """And no others; their order does not matter."""
    network = DenoisingMLP(3, 4, width=8, depth=2, heads=2, mlp="swiglu", modulations=1)
    for number, parameter in enumerate(network.parameters()):
        parameter.data = 0.2 * normal(1, parameter.numel(), number).view(parameter.shape)
    x, condition, time = normal(2, 9, 0).view(2, 3, 3), normal(2, 12, 1).view(2, 3, 4), torch.tensor([300.0, 700.0])
    with torch.no_grad():
        output = network(x, time, condition)
        order = torch.tensor([2, 0, 1])
        again = network(x[:, order], time, condition[:, order])
        torch.testing.assert_close(again, output[:, order], rtol=1e-4, atol=1e-4)
        moved = x.clone()
        moved[0, 1] += 1
        changed = (network(moved, time, condition) - output).abs().amax(dim=-1) > 1e-6
    assert changed.tolist() == [[True, True, True], [False, False, False]]


def test_signs_and_ids() -> None:
    head = flow_head(3)
    signs = head.signs(torch.arange(8))
    assert signs[6].tolist() == [-1, 1, 1] and head.ids(signs).tolist() == list(range(8))
    assert int(head.ids(torch.zeros(3))) == 7
    latents = signs.view(2, 2, 2, 3).movedim(-1, 1)
    assert ids_of_signs(latents).flatten().tolist() == list(range(8))
    many = torch.ones(1, 62, 1, 1)
    assert int(ids_of_signs(many)) == 2**62 - 1


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.full((1, 3, 2, 2), 0.7), "12 of 12 latents are neither -1 nor 1"),
        (torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1), "1 of 3 latents"),
        (torch.full((1, 3, 1, 1), torch.nan), "3 of 3 latents"),
        (torch.ones(1, 63, 1, 1), "at most 62 bits, the latents have 63 channels"),
    ],
)
def test_latents_that_are_no_signs_are_refused(latents: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ids_of_signs(latents)


def test_wrong_settings_of_a_flow_are_refused() -> None:
    block = BlockSettings(width=4, heads=1, head_dim=4, mlp_hidden=4)
    with pytest.raises(
        ValueError, match="BinaryFlowHead needs a vocabulary that is a power of 2, the tokenizer's is 12"
    ):
        BinaryFlowHead(block, 12)
    with pytest.raises(ValueError, match="block_size and likelihood_draws must be at least 1, got 0 and 16"):
        BinaryFlowHead(block, 8, block_size=0)
    with pytest.raises(ValueError, match="heads=2 are of the attention among positions"):
        BinaryFlowHead(block, 8, heads=2)
    with pytest.raises(ValueError, match="width=10 is not a multiple of heads=3"):
        BinaryFlowHead(block, 8, block_size=2, heads=3, width=10, depth=2)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="modulations=3 must divide the 4 blocks"):
        DenoisingMLP(4, 4, width=8, depth=4, modulations=3)
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        TokenDiffusionHead(4, 4, repeats=0, **SMALL)
    with pytest.raises(ValueError, match="scale above 0"):
        TokenDiffusionHead(4, 4, scale=0.0, **SMALL)


@pytest.mark.parametrize("solver", [DDPM(6), Euler(6), Heun(3), Heun(3, euler_last=True), HeunMaruyama(3)])
def test_a_step_with_guidance_is_one_call_of_the_network_and_embeds_no_time(solver: Any) -> None:
    path: Any = SteppedPath(cosine_betas(20)) if isinstance(solver, DDPM) else RectifiedPath()
    prediction: Any = "noise" if isinstance(solver, DDPM) else "velocity"
    denoiser = GaussianDenoiser(path, prediction=prediction, learned_variance=isinstance(solver, DDPM))
    head = randomised(TokenDiffusionHead(3, 5, denoiser=denoiser, solver=solver, **SMALL))
    rows: list[int] = []
    embedded: list[int] = []
    head.network.input_projection.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    head.network.time_embedding.register_forward_hook(lambda _, inputs, __: embedded.append(len(inputs[0])))
    with FlopCounterMode(display=False) as counter:
        head.sample(normal(8, 5, 90), normal(4, 3, 0), noise=fresh(4, 3), guidance_scale=2.0)
    assert rows == [8] * solver.evaluations
    assert solver.evaluations in (5, 6)
    assert embedded == [solver.steps + 1]
    with FlopCounterMode(display=False) as of_times:
        head.network.time_embedding(torch.zeros(solver.steps + 1))
    assert head.flops(8, solver) == counter.get_total_flops() - of_times.get_total_flops() > 0
