"""CellTransformer: the order of cells, what a place sees, the cache, and what it costs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from discrete_lit.backbones import CellLayout, CellTransformer
from discrete_lit.backbones.embeddings import grid_coordinates, rotary_table

LAYOUT = CellLayout(channels=2, grid=(4, 6), cell_size=(2, 3), num_classes=3)


def network(layout: CellLayout = LAYOUT) -> CellTransformer:
    torch.manual_seed(0)
    made = CellTransformer(layout, width=16, depth=1, heads=2, decoder_depth=2).eval()
    for parameter in made.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    return made


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    times = torch.tensor([[10.0, 900.0, 400.0, 250.0]]).expand(batch, -1)
    return torch.randn(batch, 4, 6, 2), times, torch.tensor([2, 3])[:batch]


def test_cells_are_row_major_and_back() -> None:
    latents = torch.arange(48.0).view(1, 2, 4, 6)
    cells = LAYOUT.to_cells(latents)
    assert (LAYOUT.cells, LAYOUT.places) == (4, 6) and cells.shape == (1, 4, 6, 2)
    # The second cell is the upper right, its fourth place the first of the second row.
    assert cells[0, 1, 3].tolist() == [latents[0, 0, 1, 3], latents[0, 1, 1, 3]]
    assert torch.equal(LAYOUT.to_grid(cells), latents)


def test_rotations_follow_the_cells() -> None:
    rows = rotary_table(grid_coordinates((4, 6)), 8)  # in raster order
    table = network().rotary_table
    # The first place of the third cell stands in the third row, first column.
    torch.testing.assert_close(table[12], rows[12], rtol=0, atol=0)
    torch.testing.assert_close(table[6], rows[3], rtol=0, atol=0)
    torch.testing.assert_close(network().double().rotary_table[12].float(), rows[12], rtol=0, atol=0)


@torch.no_grad()
def test_a_cell_sees_itself_and_those_before() -> None:
    made, (cells, times, labels) = network(), inputs()
    output = made(cells, times, labels)
    for cell in range(4):
        changed, later = cells.clone(), times.clone()
        changed[:, cell, -1] += 1
        other = made(changed, times, labels)
        assert torch.equal(other[:, :cell], output[:, :cell])
        # The first place of the cell sees its last.
        assert not torch.isclose(other[:, cell:, 0], output[:, cell:, 0]).all(dim=-1).any()
        later[:, cell] += 50
        other = made(cells, later, labels)
        assert torch.equal(other[:, :cell], output[:, :cell])
        assert not torch.isclose(other[:, cell:], output[:, cell:]).all()


@torch.no_grad()
def test_the_cache_gives_what_a_pass_over_all_gives() -> None:
    made, (cells, times, labels) = network().double(), inputs()
    cells = cells.double()
    output, cache = made(cells, times, labels), made.new_cache(2)
    for cell in range(4):
        here = slice(cell, cell + 1)
        # Passes before the cache moves on leave nothing behind.
        made(cells[:, here] + 3, times[:, here], labels, cache)
        torch.testing.assert_close(made(cells[:, here], times[:, here], labels, cache), output[:, here])
        cache.advance(LAYOUT.places)


def test_checkpointed_activations_change_no_gradient() -> None:
    made, (cells, times, labels) = network().train(), inputs()
    gradients = []
    for checkpointed in (False, True):
        made.activation_checkpointing = checkpointed
        made(cells, times, labels).square().mean().backward()
        gradients.append([parameter.grad for parameter in made.parameters()])
        made.zero_grad(set_to_none=True)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_operations_grow_with_the_cells_before() -> None:
    made = network()
    first, second, third = (made.flops(1, known) for known in range(3))
    # Each cell before adds two products of each attention: 6 places with 6 others, of width 16.
    assert third - second == second - first == 3 * 2 * 2 * 6 * 6 * 16
    assert made.flops(3, 0) == 3 * first


@pytest.mark.parametrize("settings", [{"width": 18}, {"heads": 0}, {"depth": 0}, {"width": 20, "heads": 2}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    given: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, **settings}
    with pytest.raises(ValueError, match=r"at least 1, and width a multiple of 4 x heads, got"):
        CellTransformer(LAYOUT, **given)
