"""Finite scalar quantisation against the paper's formula."""

from math import prod

import numpy as np
import pytest
import torch

from discrete_lit.tokenizers.quantizers import FiniteScalarQuantizer

LEVELS = [[2], [3], [8, 6, 5], [8, 5, 5, 5], [7, 5, 5, 5, 5], [2, 2, 3], [15, 16]]
each_levels = pytest.mark.parametrize("levels", LEVELS, ids=str)
each_formula = pytest.mark.parametrize("formula", ["paper", "atanh"])


def published_formula(formula: str, z: np.ndarray, levels: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In float64: the bounded latents, the normalised codes, the ids."""
    counts = np.asarray(levels)
    half_l = (counts - 1) * (1 - 1e-3 if formula == "paper" else 1 + 1e-3) / 2
    offset = np.where(counts % 2 == 1, 0.0, 0.5)
    shift = np.tan(offset / half_l) if formula == "paper" else np.arctanh(offset / half_l)
    bounded = np.tanh(z + shift) * half_l - offset
    half_width = counts // 2
    digits = np.round(bounded)
    basis = np.concatenate(([1], np.cumprod(counts[:-1])))
    return bounded, digits / half_width, ((digits + half_width) * basis).sum(axis=-1).astype(np.int64)


@each_formula
@each_levels
def test_published_formulas(levels: list[int], formula) -> None:
    quantizer = FiniteScalarQuantizer(levels, formula=formula)
    latents = torch.randn(5000, len(levels)) * 2
    bounded, codes, tokens = published_formula(formula, latents.double().numpy(), levels)
    clear = (np.abs(bounded - np.floor(bounded) - 0.5) > 1e-5).all(axis=-1)
    assert clear.mean() > 0.99
    quantized = quantizer(latents)
    assert (quantized.tokens.numpy() == tokens)[clear].all()
    np.testing.assert_allclose(quantized.z_q.numpy()[clear], codes[clear], rtol=1e-6)
    assert quantizer.vocab_size == np.prod(levels)


def test_formulas_differ() -> None:
    latents = torch.randn(20000, 6)
    paper, atanh = (
        FiniteScalarQuantizer([8, 8, 8, 5, 5, 5], formula=formula)(latents).tokens for formula in ("paper", "atanh")
    )
    assert 0.01 < (paper != atanh).double().mean() < 0.9


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
    assert torch.equal(quantized.z_q, codes)


def test_first_channel_is_least_significant() -> None:
    quantizer = FiniteScalarQuantizer([8, 6, 5])
    steps = quantizer.lookup(torch.tensor([0, 1, 8, 48]))
    assert (steps[1] - steps[0]).tolist() == pytest.approx([1 / 4, 0, 0])
    assert (steps[2] - steps[0]).tolist() == pytest.approx([0, 1 / 3, 0])
    assert (steps[3] - steps[0]).tolist() == pytest.approx([0, 0, 1 / 2])


@each_formula
@pytest.mark.parametrize("levels", [*LEVELS, [1000, 999]], ids=str)
def test_extreme_latents_stay_on_the_levels(levels: list[int], formula) -> None:
    quantizer = FiniteScalarQuantizer(levels, formula=formula)
    quantized = quantizer(torch.tensor([[1e30] * len(levels), [-1e30] * len(levels)]))
    assert quantized.tokens.tolist() == [quantizer.vocab_size - 1, 0]


@pytest.mark.parametrize("grid", [(), (5,), (3, 4), (2, 3, 4)])
def test_any_grid_and_exact_lookup(grid: tuple[int, ...]) -> None:
    quantizer = FiniteScalarQuantizer([8, 6, 5])
    latents = torch.randn(4, *grid, 3) * 2
    quantized = quantizer(latents)
    assert quantized.tokens.shape == (4, *grid) and quantized.tokens.dtype == torch.int64
    assert torch.equal(quantizer.lookup(quantized.tokens), quantized.z_q)
    assert torch.equal(quantizer(latents.reshape(-1, 3)).tokens, quantized.tokens.flatten())
    assert not quantized.losses


@each_formula
def test_gradient_passes_the_rounding_as_the_identity(formula) -> None:
    quantizer = FiniteScalarQuantizer([8, 5, 2], formula=formula)
    latents = torch.randn(50, 3, requires_grad=True)
    weights = torch.randn(50, 3)
    (through,) = torch.autograd.grad((quantizer(latents).z_q * weights).sum(), latents)
    (bounded,) = torch.autograd.grad((quantizer.bound(latents) / (quantizer.levels // 2) * weights).sum(), latents)
    torch.testing.assert_close(through, bounded, rtol=1e-5, atol=1e-7)
    assert (through != 0).all()


def test_training_follows_validation() -> None:
    """What inference mode made first serves the backward pass."""
    quantizer, latents = FiniteScalarQuantizer([8, 5]), torch.randn(4, 16, 2, requires_grad=True)
    with torch.inference_mode():
        expected = quantizer(latents).tokens
    quantized = quantizer(latents)
    quantized.z_q.sum().backward()
    assert torch.equal(quantized.tokens, expected) and latents.grad is not None


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("positions", [1, 63, 64, 200])
def test_layouts_give_the_same(positions: int, strided: bool) -> None:
    """Latents of a channels-first network, and any number of positions."""
    quantizer = FiniteScalarQuantizer([8, 5, 5])
    latents = torch.randn(3, 3, positions).movedim(1, 2) if strided else torch.randn(3, positions, 3)
    latents.requires_grad_()
    quantized = quantizer(latents)
    weights = torch.randn(3, positions, 3)
    (gradient,) = torch.autograd.grad((quantized.z_q * weights).sum(), latents)
    for image in range(3):
        single = torch.stack([quantizer(latents[image, position]).z_q for position in range(positions)])
        (alone,) = torch.autograd.grad((single * weights[image]).sum(), latents)
        torch.testing.assert_close(alone[image], gradient[image], rtol=1e-5, atol=1e-7)
        assert torch.equal(single, quantized.z_q[image])


@pytest.mark.parametrize("levels", [[64] * 4, [33] * 6, [8] * 17], ids=str)
def test_large_vocabularies_are_exact(levels: list[int]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    quantized = quantizer(torch.randn(500, len(levels)))
    digits = ((quantized.z_q.double() + 1) * (torch.tensor(levels) // 2)).round().long()
    expected = [sum(d * prod(levels[:channel]) for channel, d in enumerate(row)) for row in digits.tolist()]
    assert quantized.tokens.tolist() == expected and max(expected) > 2**23
    assert torch.equal(quantizer.lookup(quantized.tokens), quantized.z_q)


def test_components_are_the_channels_levels() -> None:
    quantizer = FiniteScalarQuantizer([8, 6, 5])
    tokens = torch.tensor([[0, 7, 8], [48, 239, 100]])
    components = quantizer.components(tokens)
    assert [(name, component.size) for name, component in components.items()] == [
        ("channel_0", 8),
        ("channel_1", 6),
        ("channel_2", 5),
    ]
    assert [component.ids.tolist() for component in components.values()] == [
        [[0, 7, 0], [0, 7, 4]],
        [[0, 0, 1], [0, 5, 0]],
        [[0, 0, 0], [1, 4, 2]],
    ]


def test_a_module_in_bfloat16_gives_the_same_ids() -> None:
    latents = torch.randn(3000, 6)
    plain = FiniteScalarQuantizer([8, 8, 8, 5, 5, 5])
    assert torch.equal(FiniteScalarQuantizer([8, 8, 8, 5, 5, 5]).bfloat16()(latents).tokens, plain(latents).tokens)


def test_autocast_does_not_change_ids() -> None:
    quantizer = FiniteScalarQuantizer([8, 8, 8, 5, 5, 5])
    latents = torch.randn(3000, 6)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(latents)
    assert torch.equal(quantized.tokens, quantizer(latents).tokens)
    assert quantized.z_q.dtype == torch.float32
    assert torch.equal(quantizer(latents.bfloat16()).tokens, quantizer(latents.bfloat16().float()).tokens)


@pytest.mark.parametrize("levels", [[], [1, 4], [0], [4, -3]])
def test_levels_out_of_range(levels: list[int]) -> None:
    with pytest.raises(ValueError, match="integers of at least 2"):
        FiniteScalarQuantizer(levels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebook_size": 1024}, r"codebook_size=1024 is not the product of the levels \[8, 5, 5, 5\], 1000"),
        ({"formula": "tan"}, "formula must be 'paper' or 'atanh', got 'tan'"),
        ({"levels": [1001, 2], "formula": "atanh"}, "formula='atanh' has at most 1000 levels, got 1001"),
        ({"levels": [8] * 21}, r"must be at most 2\^62, got 9223372036854775808"),
    ],
)
def test_other_settings_out_of_range(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FiniteScalarQuantizer(**{"levels": [8, 5, 5, 5], **arguments})


def test_stated_codebook_size() -> None:
    assert FiniteScalarQuantizer([8, 5, 5, 5], codebook_size=1000).vocab_size == 1000


@pytest.mark.parity
@pytest.mark.parametrize("levels", [[8, 6, 5], [7, 5, 5, 5, 5], [8, 8, 8, 5, 5, 5]], ids=str)
def test_against_vector_quantize_pytorch(levels: list[int]) -> None:
    from vector_quantize_pytorch import FSQ

    ours, theirs = FiniteScalarQuantizer(levels, formula="atanh"), FSQ(levels)
    ids = torch.arange(ours.vocab_size)
    torch.testing.assert_close(ours.lookup(ids), theirs.indices_to_codes(ids))
    latents = torch.randn(3, 1000, len(levels), requires_grad=True)
    quantized = ours(latents)
    codes, tokens = theirs(latents)
    assert torch.equal(quantized.tokens, tokens.long())
    torch.testing.assert_close(quantized.z_q, codes)
    weights = torch.randn_like(codes)
    gradients = (torch.autograd.grad((made * weights).sum(), latents)[0] for made in (quantized.z_q, codes))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
