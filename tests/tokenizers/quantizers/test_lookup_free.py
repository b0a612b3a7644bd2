"""Bits of signs: LFQ and BSQ, their ids, codes, losses and gradients."""

from itertools import product
from math import sqrt

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.tokenizers.quantizers import BinarySphericalQuantizer, LookupFreeQuantizer

each_kind = pytest.mark.parametrize("kind", [LookupFreeQuantizer, BinarySphericalQuantizer])


def scale(quantizer: LookupFreeQuantizer) -> float:
    return 1 / sqrt(quantizer.dim) if isinstance(quantizer, BinarySphericalQuantizer) else 1.0


@each_kind
@pytest.mark.parametrize("order", ["first_least_significant", "first_most_significant"])
def test_ids_and_codes_by_hand(kind, order) -> None:
    quantizer = kind(4, bit_order=order)
    for signs in product((-1, 1), repeat=4):
        bits = [sign > 0 for sign in (signs if order == "first_least_significant" else reversed(signs))]
        token = sum(int(bit) * 2**power for power, bit in enumerate(bits))
        quantized = quantizer(torch.tensor(signs)[None] * torch.tensor([0.1, 2.0, 0.5, 1e-20]))
        assert quantized.tokens.tolist() == [token]
        assert quantized.z_q[0].tolist() == pytest.approx([sign * scale(quantizer) for sign in signs])
    assert quantizer.vocab_size == 16 and quantizer.dim == quantizer.latent_dim == 4


@each_kind
def test_zero_is_minus_one(kind) -> None:
    quantizer = kind(3)
    assert quantizer.encode(torch.tensor([[0.0, 0.0, 0.0], [-0.0, 0.0, -1.0]])).tolist() == [0, 0]


@each_kind
@pytest.mark.parametrize("grid", [(), (5,), (3, 4), (2, 3, 4)])
def test_any_grid_and_exact_lookup(kind, grid: tuple[int, ...]) -> None:
    quantizer = kind(6)
    latents = torch.randn(4, *grid, 6)
    quantized = quantizer(latents)
    assert quantized.tokens.shape == (4, *grid) and quantized.tokens.dtype == torch.int64
    assert quantized.z_q.shape == latents.shape and quantized.z_q.dtype == torch.float32
    assert torch.equal(quantizer.lookup(quantized.tokens), quantized.z_q)
    assert torch.equal(quantizer.encode(latents), quantized.tokens)


@pytest.mark.parametrize("bits", [36, 62])
def test_many_bits(bits: int) -> None:
    quantizer = BinarySphericalQuantizer(bits)
    quantized = quantizer(torch.randn(500, bits))
    assert 2 ** (bits - 1) < int(quantized.tokens.max()) < 2**bits == quantizer.vocab_size
    assert torch.equal(quantizer.lookup(quantized.tokens), quantized.z_q)


@each_kind
def test_components_are_the_channels_bits(kind) -> None:
    quantizer = kind(5)
    latents = torch.randn(2, 3, 5)
    components = quantizer.components(quantizer.encode(latents))
    assert list(components) == [f"bit_{channel}" for channel in range(5)]
    for channel, component in enumerate(components.values()):
        assert component.size == 2 and torch.equal(component.ids, (latents[..., channel] > 0).long())


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_losses_over_every_code(groups: int) -> None:
    """Softmax of `2 x.c / temperature` over all codes of each group, in float64."""
    settings = {"entropy_weight": 0.3, "entropy_temperature": 0.5, "batch_entropy_weight": 1.5}
    quantizer = LookupFreeQuantizer(6, commitment_weight=0.7, entropy_groups=groups, **settings)
    latents = torch.randn(2, 10, 6)
    losses = quantizer(latents).losses
    rows = latents.double().reshape(20, 6)
    per_sample, batch = entropies_by_group(rows, groups, 0.5, 1.0)
    torch.testing.assert_close(losses["sample_entropy"].double(), 0.3 * per_sample, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["batch_entropy"].double(), -0.3 * 1.5 * batch, rtol=1e-5, atol=0)
    codes = torch.where(latents > 0, 1.0, -1.0)
    torch.testing.assert_close(losses["commitment"], 0.7 * (latents - codes).square().mean())


def entropies_by_group(rows: Tensor, groups: int, temperature: float, size: float) -> tuple[Tensor, Tensor]:
    bits = rows.shape[1] // groups
    codes = size * (((torch.arange(2**bits)[:, None] >> torch.arange(bits)) & 1) * 2 - 1).double()
    per_sample, batch = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for group in rows.split(bits, dim=1):
        probabilities = (2 * group @ codes.T / temperature).softmax(dim=1)
        per_sample = per_sample + torch.special.entr(probabilities).sum(dim=1).mean()
        batch = batch + torch.special.entr(probabilities.mean(dim=0)).sum()
    return per_sample, batch


@pytest.mark.parametrize("groups", [None, 1, 2])
def test_spherical_losses(groups: int | None) -> None:
    quantizer = BinarySphericalQuantizer(
        6,
        commitment_weight=0.7,
        entropy_weight=0.3,
        entropy_temperature=0.2,
        batch_entropy_weight=1.5,
        entropy_groups=groups,
    )
    latents = torch.randn(2, 10, 6) * 5
    losses = quantizer(latents).losses
    rows = F.normalize(latents.double().reshape(20, 6), dim=1)
    per_sample, batch = entropies_by_group(rows, 6 if groups is None else groups, 0.2, 1 / sqrt(6))
    torch.testing.assert_close(losses["sample_entropy"].double(), 0.3 * per_sample, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["batch_entropy"].double(), -0.3 * 1.5 * batch, rtol=1e-5, atol=0)
    codes = torch.where(rows > 0, 1 / sqrt(6), -1 / sqrt(6)).double()
    distance = (rows - codes).square().sum(dim=1).mean()
    torch.testing.assert_close(losses["commitment"].double(), 0.7 * distance, rtol=1e-5, atol=0)


def test_no_entropy_without_weight() -> None:
    assert set(LookupFreeQuantizer(30, entropy_weight=0)(torch.randn(4, 30)).losses) == {"commitment"}


def test_gradient_passes_straight_through() -> None:
    quantizer = LookupFreeQuantizer(4)
    latents, weights = torch.randn(20, 4, requires_grad=True), torch.randn(20, 4)
    (through,) = torch.autograd.grad((quantizer(latents).z_q * weights).sum(), latents)
    assert torch.equal(through, weights)
    (commitment,) = torch.autograd.grad(quantizer(latents).losses["commitment"], latents)
    codes = torch.where(latents > 0, 1.0, -1.0)
    torch.testing.assert_close(commitment, 0.25 * 2 * (latents.detach() - codes) / latents.numel())


def test_spherical_gradient_passes_the_normalisation() -> None:
    quantizer = BinarySphericalQuantizer(4)
    latents, weights = torch.randn(20, 4, requires_grad=True), torch.randn(20, 4)
    (through,) = torch.autograd.grad((quantizer(latents).z_q * weights).sum(), latents)
    (expected,) = torch.autograd.grad((F.normalize(latents, dim=1) * weights).sum(), latents)
    torch.testing.assert_close(through, expected)


@each_kind
def test_entropy_alone_spreads_and_decides_the_bits(kind) -> None:
    """Descent on the entropy terms makes latents that all had one code use every code, each clearly."""
    quantizer = kind(3, commitment_weight=0, entropy_weight=1, entropy_temperature=0.3, entropy_groups=1)
    latents = (torch.randn(64, 3) * 0.1 + 0.4).requires_grad_()
    assert len(quantizer.encode(latents).unique()) == 1
    optimizer = torch.optim.Adam([latents], lr=0.05)
    for _ in range(200):
        losses = quantizer(latents).losses
        optimizer.zero_grad()
        (losses["sample_entropy"] + losses["batch_entropy"]).backward()
        optimizer.step()
    counts = torch.bincount(quantizer.encode(latents), minlength=8)
    assert counts.min() >= 1
    assert losses["sample_entropy"] < 0.3 and losses["batch_entropy"] < -1.5  # of at most log 8 = 2.08


@each_kind
def test_autocast_changes_nothing(kind) -> None:
    quantizer = kind(8)
    latents = torch.randn(300, 8)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(latents)
    plain = quantizer(latents)
    assert torch.equal(quantized.tokens, plain.tokens) and torch.equal(quantized.z_q, plain.z_q)
    assert all(torch.equal(loss, plain.losses[name]) for name, loss in quantized.losses.items())
    assert quantizer(latents.bfloat16()).z_q.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, r"bits must lie in \[1, 62\], got 0"),
        ({"bits": 63}, r"bits must lie in \[1, 62\], got 63"),
        ({"bits": 6, "entropy_groups": 4}, "entropy_groups must divide the 6 bits, got 4"),
        ({"bits": 6, "entropy_groups": 0}, "entropy_groups must divide the 6 bits, got 0"),
        ({"bits": 36}, "the batch entropy of 36 bits together has 2.36 probabilities: split the 36 bits"),
        ({"bits": 4, "entropy_temperature": 0.0}, "entropy_temperature must be above 0, got 0.0"),
        ({"bits": 4, "commitment_weight": -1.0}, "must be >= 0, got commitment_weight=-1.0"),
    ],
)
def test_settings_out_of_range(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LookupFreeQuantizer(**arguments)


@pytest.mark.parity
@pytest.mark.parametrize("spherical", [False, True])
def test_against_vector_quantize_pytorch(spherical: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vector_quantize_pytorch import lookup_free_quantization

    # Their logarithm stops at a probability of 1e-5: there both differ from the entropy.
    monkeypatch.setattr(lookup_free_quantization, "log", lambda p, eps=1e-38: p.clamp(min=eps).log())
    theirs = lookup_free_quantization.LFQ(
        dim=7,
        entropy_loss_weight=0.3,
        commitment_loss_weight=0.25,
        diversity_gamma=1.5,
        spherical=spherical,
    ).train()
    settings = {"entropy_weight": 0.3, "entropy_temperature": 0.01, "batch_entropy_weight": 1.5, "entropy_groups": 1}
    # Their commitment is a mean over channels, a spherical code's length is 1.
    kind, commitment = (BinarySphericalQuantizer, 0.25 / 7) if spherical else (LookupFreeQuantizer, 0.25)
    ours = kind(7, commitment_weight=commitment, bit_order="first_most_significant", **settings).train()
    latents = (torch.randn(2, 30, 7) * 0.1).requires_grad_()
    mine = ours(latents)
    codes, tokens, loss = theirs(latents)
    assert torch.equal(mine.tokens, tokens)
    torch.testing.assert_close(mine.z_q, codes)
    my_loss = torch.stack(list(mine.losses.values())).sum()
    torch.testing.assert_close(my_loss, loss, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(codes)
    my_gradient, their_gradient = (
        torch.autograd.grad((made * weights).sum() + value, latents)[0]
        for made, value in ((mine.z_q, my_loss), (codes, loss))
    )
    torch.testing.assert_close(my_gradient, their_gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.lookup(tokens), theirs.indices_to_codes(tokens))
