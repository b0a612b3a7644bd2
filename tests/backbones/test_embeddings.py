"""Rotary positions, sines and cosines."""

import pytest
import torch

from discrete_lit.backbones.embeddings import grid_coordinates, rotary_table, rotate, sine_cosine_table


def test_grid_is_raster_ordered() -> None:
    assert grid_coordinates((2, 3)).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert grid_coordinates((3,)).tolist() == [[0], [1], [2]]
    assert grid_coordinates((2, 2, 2))[5].tolist() == [1, 0, 1]


def test_angles_and_frequencies() -> None:
    table = rotary_table(torch.tensor([[3]]), head_dim=8, base=100.0)
    angles = 3 * 100.0 ** -torch.tensor([0, 2 / 8, 4 / 8, 6 / 8])
    torch.testing.assert_close(table, torch.stack((angles.cos(), angles.sin()), dim=-1)[None])
    axial = rotary_table(torch.tensor([[3, 5]]), head_dim=8, base=100.0)
    for axis, place in enumerate((3, 5)):  # the first half of the pairs is turned by the row, the second by the column
        angles = place * 100.0 ** -torch.tensor([0, 2 / 4])
        expected = torch.stack((angles.cos(), angles.sin()), dim=-1)[None]
        torch.testing.assert_close(axial[:, 2 * axis : 2 * axis + 2], expected)


def test_rotation_is_a_complex_product_of_neighbouring_channels() -> None:
    x = torch.randn(2, 3, 5, 8)
    table = rotary_table(torch.arange(5)[:, None], head_dim=8)
    product = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous()) * torch.view_as_complex(table)
    torch.testing.assert_close(rotate(x, table), torch.view_as_real(product).flatten(-2))


@pytest.mark.parametrize("grid", [(7,), (4, 5)])
def test_scores_depend_on_the_offset_alone(grid: tuple[int, ...]) -> None:
    query, key = torch.randn(8), torch.randn(8)
    coordinates = grid_coordinates(grid)
    table = rotary_table(coordinates, head_dim=8)
    turned_query = rotate(query.expand(1, 1, len(table), 8), table)[0, 0]
    turned_key = rotate(key.expand(1, 1, len(table), 8), table)[0, 0]
    scores = turned_query @ turned_key.T
    by_offset: dict[tuple[int, ...], float] = {}
    for i, j in torch.cartesian_prod(torch.arange(len(table)), torch.arange(len(table))).tolist():
        offset = tuple((coordinates[i] - coordinates[j]).tolist())
        assert by_offset.setdefault(offset, float(scores[i, j])) == pytest.approx(float(scores[i, j]), abs=1e-4)
    values = torch.tensor(list(by_offset.values()))
    assert len(values.unique()) == len(values)  # another offset, another score: rows and columns are told apart


def test_bfloat16_is_turned_in_float32() -> None:
    x = torch.randn(1, 1, 50, 8).bfloat16()
    table = rotary_table(torch.arange(50)[:, None] * 100, head_dim=8)
    assert rotate(x, table).dtype == torch.bfloat16
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())


def test_head_widths_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        rotary_table(torch.zeros(3, 2), head_dim=6)


def test_sines_and_cosines_of_each_axis() -> None:
    table = sine_cosine_table(torch.tensor([[3, 5], [0, 0]]), width=8, base=100.0)
    angles = [place * 100.0 ** -torch.tensor([0, 1 / 2]) for place in (3, 5)]
    expected = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())])
    torch.testing.assert_close(table, torch.stack((expected, torch.tensor([0.0, 0, 1, 1] * 2))))
    rows = sine_cosine_table(grid_coordinates((4, 5)), width=8)
    assert len(rows.unique(dim=0)) == 20
    with pytest.raises(ValueError, match="over 2 axes need a width divisible by 4, got 6"):
        sine_cosine_table(torch.zeros(3, 2), width=6)


@pytest.mark.parametrize("grid", [(2, 3), (3, 2)])
def test_rotations_of_a_grid_that_is_not_square(grid: tuple[int, int]) -> None:
    """Element n behind the start stands in row n // W and column n % W; half of the pairs is turned by each."""
    from discrete_lit.backbones import SequenceLayout
    from discrete_lit.backbones.embeddings import Positions

    layout = SequenceLayout(5, grid, num_classes=2, attention="bidirectional", mask_token=True)
    table = Positions(layout, "rope_2d", starts=1, width=8, head_dim=8).rotary(0, 7, None)
    assert table is not None
    for number in range(6):
        row, column = number // grid[1], number % grid[1]
        for pair, angle in enumerate((row, row / 100, column, column / 100)):
            expected = torch.tensor([angle, angle + torch.pi / 2]).cos() * torch.tensor([1.0, -1.0])
            torch.testing.assert_close(table[1 + number, pair], expected, atol=1e-6, rtol=0)
