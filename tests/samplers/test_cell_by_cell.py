"""NextCellSampler: its guidance scales, its waits, and what it refuses; its laws are in tests/generators."""

from typing import Any

import pytest
import torch
from helpers.fake_gpu import waits_of_a_draw
from torch import Tensor

from discrete_lit.backbones import CellLayout, CellTransformer
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath
from discrete_lit.diffusion.solvers import EulerMaruyama
from discrete_lit.samplers import NextCellSampler

LAYOUT = CellLayout(channels=2, grid=(2, 4), cell_size=(2, 2), num_classes=3)


def network() -> CellTransformer:
    torch.manual_seed(0)
    return CellTransformer(LAYOUT, width=16, depth=1, heads=2).eval()


def drawn(sampler: NextCellSampler, modules: Any, labels: Tensor, random: CounterRandom) -> Tensor:
    denoiser = GaussianDenoiser(RectifiedPath(), prediction="velocity")
    return sampler(modules[0], labels, random, denoiser=denoiser, network_time=lambda t: 1000 * t).tokens


def test_the_first_cell_is_not_guided_and_the_last_is() -> None:
    linear, constant = (NextCellSampler(guidance_scale=4.0, guidance_schedule=each) for each in ("linear", "constant"))
    assert [linear.scale(number, 4) for number in range(4)] == [1.0, 2.0, 3.0, 4.0]
    assert [constant.scale(number, 4) for number in range(4)] == [4.0] * 4
    assert linear.scale(0, 1) == 4.0


def test_a_sampled_network_keeps_its_mode() -> None:
    made = network().train()
    cells = drawn(NextCellSampler(EulerMaruyama(2)), [made], torch.tensor([0, 3]), CounterRandom(0, torch.arange(2)))
    assert cells.shape == (2, 2, 4, 2) and made.training and made.encoder[0].training


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_draw_waits_for_nothing(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = NextCellSampler(EulerMaruyama(3), guidance_scale=scale)
    found = waits_of_a_draw([network()], lambda *given: drawn(sampler, *given), monkeypatch)
    assert found == ([], 0)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="guidance_schedule must be one of linear, constant"):
        NextCellSampler(guidance_schedule="known")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"guidance_scale at least 0, got 'linear' and -1"):
        NextCellSampler(guidance_scale=-1.0)
