"""The heads that draw vectors: what they learn, how guidance acts, what they cost, and their signs."""

from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from discrete_lit.backbones.token_diffusion import BinaryFlowHead, DenoisingMLP, TokenDiffusionHead
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath, SteppedPath, cosine_betas
from discrete_lit.diffusion.solvers import DDPM, Heun


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


def test_signs_are_bits_and_flow_to_plus_and_minus_one() -> None:
    head = randomised(BinaryFlowHead(4, 5, width=16, depth=4))
    drawn = head.sample(normal(6, 5, 90), normal(6, 4, 0), noise=fresh(6, 4))
    assert head.signs(drawn).tolist() == (drawn >= 0).long().tolist()
    assert len(head.network.modulations) == 2
    terms = head.losses(
        normal(6, 5, 90),
        torch.where(drawn >= 0, 1.0, -1.0),
        uniforms=torch.full((4, 6), 0.5, dtype=torch.float64),
        noise=normal(24, 4, 3).view(4, 6, 4),
    )
    assert set(terms) == {"error"}
    assert terms["error"].shape == (6,)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="modulations=3 must divide the 4 blocks"):
        DenoisingMLP(4, 4, width=8, depth=4, modulations=3)
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        TokenDiffusionHead(4, 4, repeats=0, **SMALL)
    with pytest.raises(ValueError, match="scale above 0"):
        TokenDiffusionHead(4, 4, scale=0.0, **SMALL)


@pytest.mark.parametrize("solver", [DDPM(6), Heun(3)])
def test_a_step_with_guidance_is_one_call_of_the_network_and_embeds_no_time(solver: Any) -> None:
    path: Any = SteppedPath(cosine_betas(20)) if isinstance(solver, DDPM) else RectifiedPath()
    prediction: Any = "noise" if isinstance(solver, DDPM) else "velocity"
    denoiser = GaussianDenoiser(path, prediction=prediction, learned_variance=isinstance(solver, DDPM))
    head = randomised(TokenDiffusionHead(3, 5, denoiser=denoiser, solver=solver, **SMALL))
    rows: list[int] = []
    embedded: list[int] = []
    head.network.input_projection.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    head.network.time_embedding.register_forward_hook(lambda _, inputs, __: embedded.append(len(inputs[0])))
    head.sample(normal(8, 5, 90), normal(4, 3, 0), noise=fresh(4, 3), guidance_scale=2.0)
    assert rows == [8] * 6
    assert embedded == [solver.steps + 1]
