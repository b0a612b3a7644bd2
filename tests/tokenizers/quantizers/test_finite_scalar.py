"""Finite scalar quantisation against the paper's formula."""

import numpy as np
import pytest
import torch

from discrete_lit.tokenizers.quantizers import FiniteScalarQuantizer

LEVELS = [[2], [3], [8, 6, 5], [8, 5, 5, 5], [7, 5, 5, 5, 5], [2, 2, 3], [15, 16]]
each_levels = pytest.mark.parametrize("levels", LEVELS, ids=str)


def papers_formula(z: np.ndarray, levels: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Appendix A.1 in float64: the bounded latents, the normalised codes, the ids."""
    counts = np.asarray(levels)
    half_l = (counts - 1) * (1 - 1e-3) / 2
    offset = np.where(counts % 2 == 1, 0.0, 0.5)
    shift = np.tan(offset / half_l)
    bounded = np.tanh(z + shift) * half_l - offset
    half_width = counts // 2
    digits = np.round(bounded)
    basis = np.concatenate(([1], np.cumprod(counts[:-1])))
    return bounded, digits / half_width, ((digits + half_width) * basis).sum(axis=-1).astype(np.int64)


@each_levels
def test_papers_formula(levels: list[int]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    latents = torch.randn(5000, len(levels)) * 2
    bounded, codes, tokens = papers_formula(latents.double().numpy(), levels)
    clear = (np.abs(bounded - np.floor(bounded) - 0.5) > 1e-5).all(axis=-1)
    assert clear.mean() > 0.99
    quantized = quantizer(latents)
    assert (quantized.tokens.numpy() == tokens)[clear].all()
    np.testing.assert_allclose(quantized.codes.numpy()[clear], codes[clear], rtol=1e-6)
    assert quantizer.vocab_size == np.prod(levels)


@each_levels
def test_every_id_round_trips(levels: list[int]) -> None:
    """Every id has its own code, which lies on the grid, and latents that fall into it."""
    quantizer = FiniteScalarQuantizer(levels)
    ids = torch.arange(quantizer.vocab_size)
    codes = quantizer.lookup(ids)
    assert codes.dtype == torch.float32 and len(codes.unique(dim=0)) == quantizer.vocab_size
    assert (codes.amin(dim=0) == -1).all()
    assert codes.amax(dim=0).tolist() == pytest.approx([1.0 if n % 2 else 1 - 2 / n for n in levels])
    half = (quantizer.levels - 1) * (1 - 1e-3) / 2
    offset = torch.where(quantizer.levels % 2 == 0, 0.5, 0.0)
    target = codes * (quantizer.levels // 2) + offset
    latents = torch.atanh((target / half).clamp(-0.9999, 0.9999)) - torch.tan(offset / half)
    quantized = quantizer(latents)
    assert torch.equal(quantized.tokens, ids)
    assert torch.equal(quantized.codes, codes)


def test_first_channel_is_least_significant() -> None:
    quantizer = FiniteScalarQuantizer([8, 6, 5])
    steps = quantizer.lookup(torch.tensor([0, 1, 8, 48]))
    assert (steps[1] - steps[0]).tolist() == pytest.approx([1 / 4, 0, 0])
    assert (steps[2] - steps[0]).tolist() == pytest.approx([0, 1 / 3, 0])
    assert (steps[3] - steps[0]).tolist() == pytest.approx([0, 0, 1 / 2])


@each_levels
def test_extreme_latents_stay_on_the_levels(levels: list[int]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    quantized = quantizer(torch.tensor([[1e30] * len(levels), [-1e30] * len(levels)]))
    assert quantized.tokens.tolist() == [quantizer.vocab_size - 1, 0]


@pytest.mark.parametrize("grid", [(), (5,), (3, 4), (2, 3, 4)])
def test_any_grid_and_exact_lookup(grid: tuple[int, ...]) -> None:
    quantizer = FiniteScalarQuantizer([8, 6, 5])
    latents = torch.randn(4, *grid, 3) * 2
    quantized = quantizer(latents)
    assert quantized.tokens.shape == (4, *grid) and quantized.tokens.dtype == torch.int64
    assert torch.equal(quantizer.lookup(quantized.tokens), quantized.codes)
    assert torch.equal(quantizer(latents.reshape(-1, 3)).tokens, quantized.tokens.flatten())
    assert not quantized.losses


def test_gradient_passes_the_rounding_as_the_identity() -> None:
    quantizer = FiniteScalarQuantizer([8, 5, 2])
    latents = torch.randn(50, 3, requires_grad=True)
    weights = torch.randn(50, 3)
    (through,) = torch.autograd.grad((quantizer(latents).codes * weights).sum(), latents)
    (bounded,) = torch.autograd.grad((quantizer.bound(latents) / (quantizer.levels // 2) * weights).sum(), latents)
    assert torch.equal(through, bounded) and (through != 0).all()


def test_autocast_does_not_change_ids() -> None:
    quantizer = FiniteScalarQuantizer([8, 8, 8, 5, 5, 5])
    latents = torch.randn(3000, 6)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(latents)
    assert torch.equal(quantized.tokens, quantizer(latents).tokens)
    assert quantized.codes.dtype == torch.float32
    assert torch.equal(quantizer(latents.bfloat16()).tokens, quantizer(latents.bfloat16().float()).tokens)


@pytest.mark.parametrize("levels", [[], [1, 4], [0], [4, -3]])
def test_levels_out_of_range(levels: list[int]) -> None:
    with pytest.raises(ValueError, match="integers of at least 2"):
        FiniteScalarQuantizer(levels)


@pytest.mark.parity
@pytest.mark.parametrize("levels", [[8, 6, 5], [7, 5, 5, 5, 5]], ids=str)
def test_against_vector_quantize_pytorch(levels: list[int]) -> None:
    """Codes and their order agree everywhere; ids where both bounds (margin inside here, outside there) round alike."""
    from vector_quantize_pytorch import FSQ

    ours, theirs = FiniteScalarQuantizer(levels), FSQ(levels)
    ids = torch.arange(ours.vocab_size)
    torch.testing.assert_close(ours.lookup(ids), theirs.indices_to_codes(ids))
    if any(level % 2 == 0 for level in levels):
        return  # the shifts of even levels differ: tan here and in the paper, atanh there
    latents = torch.randn(3000, 1, len(levels))
    bounded = ours.bound(latents)
    clear = ((bounded - bounded.floor() - 0.5).abs() > 0.01).all(dim=-1)
    assert clear.double().mean() > 0.7
    assert torch.equal(ours(latents).tokens[clear], theirs(latents)[1].long()[clear])
