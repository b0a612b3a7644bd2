"""The search for the best code against one in float64."""

import pytest
import torch

from discrete_lit.tokenizers.quantizers import nearest
from discrete_lit.tokenizers.quantizers.nearest import largest_product, nearest_codes

# Rows, K, D: less and more than a tile, blocks that do not come out even, one code, no rows.
SIZES = [(300, 100, 1), (300, 3000, 4), (513, 4097, 8), (40, 70_000, 8), (257, 1025, 256), (5, 1, 3), (0, 7, 2)]


def distances(rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return torch.cdist(rows.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


@pytest.mark.parametrize(("rows", "size", "dim"), SIZES)
def test_nearest_is_that_of_float64(rows: int, size: int, dim: int) -> None:
    latents, codes = torch.randn(rows, dim) * 1.5 + 0.5, torch.randn(size, dim)
    found, exact = nearest_codes(latents, codes), distances(latents, codes)
    assert found.dtype == torch.int64 and found.shape == (rows,)
    two = exact.topk(min(2, size), dim=1, largest=False).values
    clear = two[:, -1] - two[:, 0] > 1e-6 * dim if size > 1 else torch.ones(rows, dtype=torch.bool)
    assert int(clear.sum()) >= 0.95 * rows
    assert torch.equal(found[clear], exact.argmin(dim=1)[clear])
    torch.testing.assert_close(exact.gather(1, found[:, None])[:, 0], exact.amin(dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "size", "dim"), SIZES)
@pytest.mark.parametrize("offset", [False, True])
def test_largest_product_is_that_of_float64(rows: int, size: int, dim: int, offset: bool) -> None:
    latents, codes = torch.randn(rows, dim), torch.randn(size, dim)
    offsets = torch.randn(size) * 3 if offset else None
    exact = latents.double() @ codes.double().T + (offsets.double() if offsets is not None else 0)
    found = largest_product(latents, codes, offsets)
    torch.testing.assert_close(exact.gather(1, found[:, None])[:, 0], exact.amax(dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tile", "dim"), [("_NARROW", 8), ("_WIDE", 64)])
@pytest.mark.parametrize("largest", [1, 10_000, 2**22])
def test_the_tile_does_not_matter(monkeypatch: pytest.MonkeyPatch, tile: str, dim: int, largest: int) -> None:
    """Nor how many of them the maxima are kept of."""
    latents, codes = torch.randn(300, dim), torch.randn(5000, dim)
    found = nearest_codes(latents, codes)
    monkeypatch.setattr(nearest, tile, nearest._Tiling(codes=64, rows=7, width=4))
    monkeypatch.setattr(nearest, "_LARGEST", largest)
    assert torch.equal(nearest_codes(latents, codes), found)


@pytest.mark.parametrize("size", [20, 3000, 9000])
def test_the_first_of_equal_codes(size: int) -> None:
    """Copies of a few codes, in a random order over all blocks: small integers, whose products are exact."""
    few = torch.randint(-4, 5, (10, 3)).float().unique(dim=0)
    which = torch.randint(len(few), (size,))
    latents = torch.randint(-4, 5, (200, 3)).float()
    assert torch.equal(nearest_codes(latents, few[which]), distances(latents, few[which]).argmin(dim=1))


@pytest.mark.parametrize("size", [5, 5000])
def test_rows_that_are_not_finite_get_some_id_and_leave_the_others_alone(size: int) -> None:
    latents, codes = torch.randn(20, 4), torch.randn(size, 4)
    expected = nearest_codes(latents, codes)
    latents[3, 1], latents[7], latents[11, 0] = torch.nan, torch.inf, -torch.inf
    found = nearest_codes(latents, codes)
    assert 0 <= int(found.min()) and int(found.max()) < size
    finite = latents.isfinite().all(dim=1)
    assert torch.equal(found[finite], expected[finite])


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_allowed_shortcuts_of_float32_products_are_not_taken(precision: str) -> None:
    latents, codes = torch.randn(300, 64), torch.randn(3000, 64)
    expected = nearest_codes(latents, codes)
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(nearest_codes(latents, codes), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
