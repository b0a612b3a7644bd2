"""Residual quantisation against its definition, and against vector-quantize-pytorch."""

import pytest
import torch

from discrete_lit.tokenizers.quantizers import ResidualQuantizer

each_sharing = pytest.mark.parametrize("shared", [True, False])


def make(shared: bool = True, size: int = 16, dim: int = 3, depth: int = 3, **settings) -> ResidualQuantizer:
    """A quantizer whose codes have deviation 1."""
    quantizer = ResidualQuantizer(
        size, dim, depth=depth, shared_codebook=shared, **{"codebook_init": "normal", **settings}
    )
    with torch.no_grad():
        for codebook in quantizer.codebooks:
            codebook.codes.normal_()
            if codebook.update == "ema":
                codebook.embedding_sum.copy_(codebook.codes)
    return quantizer


@each_sharing
@pytest.mark.parametrize("grid", [(), (5,), (3, 4), (2, 3, 4)])
def test_algorithm_by_hand(shared: bool, grid: tuple[int, ...]) -> None:
    quantizer = make(shared).eval()
    latents = torch.randn(2, *grid, 3) * 2
    quantized = quantizer(latents)
    assert quantized.tokens.shape == (2, *quantizer.token_shape(grid)) == (2, *grid, 3)
    assert quantized.tokens.dtype == torch.int64 and torch.equal(quantizer.encode(latents), quantized.tokens)
    total, distances = torch.zeros_like(latents), []
    for number in range(3):
        codes = quantizer.codebooks[0 if shared else number].codes
        ids = torch.cdist(latents - total, codes, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=-1)
        assert torch.equal(quantized.tokens[..., number], ids)
        total = total + codes[ids]
        distances.append((latents - total).square().mean())
    torch.testing.assert_close(quantized.z_q, total)
    assert torch.equal(quantizer.lookup(quantized.tokens), quantized.z_q)
    torch.testing.assert_close(quantized.losses, {"commitment": 0.25 * torch.stack(distances).mean()})
    assert len(quantizer.codebooks) == (1 if shared else 3)


@each_sharing
def test_gradients(shared: bool) -> None:
    quantizer = make(shared, codebook_update="gradient", revive_below=None)
    latents, weights = torch.randn(20, 3, requires_grad=True), torch.randn(20, 3)
    quantized = quantizer(latents)
    (through,) = torch.autograd.grad((quantized.z_q * weights).sum(), latents, retain_graph=True)
    assert torch.equal(through, weights)
    (commitment,) = torch.autograd.grad(quantized.losses["commitment"], latents, retain_graph=True)
    rests, rest = [], latents.detach()
    for number, ids in enumerate(quantized.tokens.unbind(dim=-1)):
        rests.append(rest)
        rest = rest - quantizer.codebook(number).codes.detach()[ids]
    after = torch.stack([*rests[1:], rest])
    torch.testing.assert_close(commitment, 0.25 * 2 * after.mean(dim=0) / latents.numel())
    torch.testing.assert_close(quantized.losses["codebook"], after.square().mean())
    parameters = list(quantizer.parameters())
    gradients = torch.autograd.grad(quantized.losses["codebook"], [latents, *parameters], allow_unused=True)
    assert gradients[0] is None
    expected = torch.zeros(len(parameters), 16, 3)
    for number, (before, left) in enumerate(zip(rests, after, strict=True)):
        where = 0 if shared else number
        expected[where].index_add_(0, quantized.tokens[:, number], -2 * left / before.numel() / 3)
    torch.testing.assert_close(torch.stack(gradients[1:]), expected)


def test_shared_running_means_move_at_every_depth() -> None:
    """Each depth is a step of the means, and the next depth searches the moved codes."""
    quantizer = make(size=6, depth=2, decay=0.5, revive_below=None).train()
    codes, size = quantizer.codebooks[0].codes.clone(), torch.ones(6)
    sums, rest = codes.clone(), torch.randn(30, 3)
    quantized = quantizer(rest)
    for number in range(2):
        ids = torch.cdist(rest, codes).argmin(dim=1)
        assert torch.equal(quantized.tokens[:, number], ids)
        counts = torch.bincount(ids, minlength=6)
        taken = codes[ids]
        size, sums = (size + counts) / 2, (sums + torch.zeros(6, 3).index_add(0, ids, rest)) / 2
        smoothed = (size + 1e-5) / (size.sum() + 6e-5) * size.sum()
        codes = sums / smoothed[:, None]
        rest = rest - taken
    torch.testing.assert_close(quantizer.codebooks[0].codes, codes)


@each_sharing
def test_first_codes_and_revival_use_the_vocabulary(shared: bool) -> None:
    torch.manual_seed(1)
    quantizer = ResidualQuantizer(32, 4, depth=3, shared_codebook=shared, decay=0.8).train()
    for _ in range(30):
        latents = torch.randn(400, 4)
        quantizer(latents)
    tokens = quantizer.eval()(latents).tokens
    whole = [tokens] if shared else tokens.unbind(dim=-1)
    assert all(len(ids.unique()) >= 29 for ids in whole)
    distances = [(latents - quantizer.lookup(tokens)).square().mean()]
    assert distances[0] < 0.1 * latents.square().mean()


def test_components_are_the_depths() -> None:
    tokens = torch.randint(16, (2, 4, 4, 3))
    components = make().components(tokens)
    assert list(components) == ["depth_0", "depth_1", "depth_2"]
    for number, component in enumerate(components.values()):
        assert component.size == 16 and torch.equal(component.ids, tokens[..., number])


def test_autocast_changes_nothing() -> None:
    quantizer = make().eval()
    latents = torch.randn(50, 3)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(latents)
    plain = quantizer(latents)
    assert torch.equal(quantized.tokens, plain.tokens) and torch.equal(quantized.z_q, plain.z_q)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"depth": 0}, "depth must be positive, got 0"), ({"commitment_weight": -1.0}, "commitment_weight must be >= 0")],
)
def test_settings_out_of_range(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResidualQuantizer(8, 2, **{"depth": 2, **arguments})


@pytest.mark.parity
@each_sharing
def test_against_vector_quantize_pytorch(shared: bool) -> None:
    from vector_quantize_pytorch import ResidualVQ

    ours = make(shared, size=32, dim=8, depth=4).eval()
    theirs = ResidualVQ(
        dim=8, codebook_size=32, num_quantizers=4, shared_codebook=shared, rotation_trick=False, quantize_dropout=False
    ).eval()
    with torch.no_grad():
        for number, layer in enumerate(theirs.layers):
            layer._codebook.embed.copy_(ours.codebook(number).codes[None])
    latents = torch.randn(2, 50, 8)
    codes, tokens, _ = theirs(latents)
    quantized = ours(latents)
    assert torch.equal(quantized.tokens, tokens)
    torch.testing.assert_close(quantized.z_q, codes)
    torch.testing.assert_close(ours.lookup(tokens), theirs.get_output_from_indices(tokens))
