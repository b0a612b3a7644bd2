"""Multi-scale residual quantisation against the algorithm written out by hand."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.tokenizers.quantizers import MultiScaleResidualQuantizer


def make(
    scales: Sequence[int | tuple[int, int]] = (1, 2, 4), size: int = 16, dim: int = 3, **settings
) -> MultiScaleResidualQuantizer:
    """A quantizer whose codes have deviation 1."""
    settings = {"codebook_init": "normal", **settings}
    quantizer = MultiScaleResidualQuantizer(size, dim, scales=scales, **settings)
    with torch.no_grad():
        quantizer.codebook.codes.normal_()
    return quantizer


def by_hand(quantizer: MultiScaleResidualQuantizer, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Ids and f_hat `(B, D, H, W)` after each scale, by loops over positions."""
    high, wide = latents.shape[1:3]
    rest, f_hat = latents.movedim(-1, 1), torch.zeros_like(latents.movedim(-1, 1))
    ids, after = [], []
    for number, scale in enumerate(quantizer.scales):
        rows, columns = (scale, scale) if isinstance(scale, int) else scale
        codes = torch.zeros(len(latents), quantizer.dim, rows, columns)
        for image in range(len(latents)):
            for row in range(rows):
                for column in range(columns):
                    window = rest[
                        image,
                        :,
                        row * high // rows : -((row + 1) * high // -rows),
                        column * wide // columns : -((column + 1) * wide // -columns),
                    ]
                    mean = window.flatten(1).mean(dim=1)
                    ids.append((quantizer.codebook.codes - mean).square().sum(dim=1).argmin())
                    codes[image, :, row, column] = quantizer.codebook.codes[ids[-1]]
        spread = F.interpolate(codes, (high, wide), mode="bicubic") if (rows, columns) != (high, wide) else codes
        if quantizer.phi_ratio:
            convolution = quantizer.phi[quantizer.phi_of_scale[number]]
            spread = spread + quantizer.phi_ratio * (convolution(spread) - spread)
        f_hat, rest = f_hat + spread, rest - spread
        after.append(f_hat)
    by_scale = torch.stack(ids).split([len(latents) * length for length in quantizer.lengths])
    return torch.cat([of_scale.reshape(len(latents), -1) for of_scale in by_scale], dim=1), after


@pytest.mark.parametrize(
    ("scales", "settings"),
    [
        ((1, 2, 4), {}),
        ((1, 3, 5), {"phi_kernels": 2, "phi_ratio": 0.3}),
        ((2, 4), {"phi_ratio": 0.0}),
        ((3,), {}),
        ((1, (1, 2), (2, 3), (4, 6)), {}),
        ((1, 2, (3, 2), (5, 3)), {}),
    ],
)
@torch.no_grad()
def test_algorithm_by_hand(scales, settings) -> None:
    quantizer = make(scales, **settings)
    grid = quantizer.sizes[-1]
    latents = torch.randn(2, *grid, 3) * 1.5
    tokens, after = by_hand(quantizer, latents)
    quantized = quantizer(latents)
    assert torch.equal(quantized.tokens, tokens) and torch.equal(quantizer.encode(latents), tokens)
    assert (
        tokens.shape
        == (2, *quantizer.token_shape(grid))
        == (2, sum(rows * columns for rows, columns in quantizer.sizes))
    )
    torch.testing.assert_close(quantized.z_q, after[-1].movedim(1, -1))
    assert torch.equal(quantizer.lookup(tokens), quantized.z_q)
    torch.testing.assert_close(quantizer.cumulative(tokens), torch.stack(after))
    distances = torch.stack([(f_hat.movedim(1, -1) - latents).square().mean() for f_hat in after])
    torch.testing.assert_close(quantized.losses["commitment"], 0.25 * distances.mean())
    torch.testing.assert_close(quantized.losses["codebook"], distances.mean())


@torch.no_grad()
def test_teacher_forcing_is_what_sampling_feeds() -> None:
    quantizer = make((1, 2, 3, 5))
    tokens = torch.randint(16, (2, 1 + 4 + 9 + 25))
    expected, f_hat = [], torch.zeros(2, 3, 5, 5)
    for number, ids in enumerate(quantizer.split(tokens)):
        if number:
            expected.append(quantizer.at_scale(number, f_hat))
        f_hat = f_hat + quantizer.contribution(number, ids)
    fed = quantizer.teacher_forcing(tokens)
    assert fed.shape == (2, 4 + 9 + 25, 3)
    torch.testing.assert_close(fed, torch.cat(expected, dim=1))
    torch.testing.assert_close(fed[:, 4 + 9 :], quantizer.cumulative(tokens)[2].flatten(2).transpose(1, 2))
    torch.testing.assert_close(quantizer.lookup(tokens), f_hat.movedim(1, -1))
    # The first scale's ids see nothing, the last scale's feed nothing.
    tokens[:, -25:] = 0
    assert torch.equal(quantizer.teacher_forcing(tokens), fed)
    assert make((3,)).teacher_forcing(tokens[:, :9]).shape == (2, 0, 3)


def test_gradients() -> None:
    """The decoder's gradient reaches the latents alone; the codebook term reaches codes and convolutions alone."""
    quantizer = make()
    latents, weights = torch.randn(2, 4, 4, 3, requires_grad=True), torch.randn(2, 4, 4, 3)
    quantized = quantizer(latents)
    (through,) = torch.autograd.grad((quantized.z_q * weights).sum(), latents, retain_graph=True)
    assert torch.equal(through, weights)
    trained = [quantizer.codebook.codes, *quantizer.phi.parameters()]
    gradients = torch.autograd.grad(
        quantized.losses["codebook"], [latents, *trained], allow_unused=True, retain_graph=True
    )
    assert gradients[0] is None
    used = {f"phi.{kernel}" for kernel in quantizer.phi_of_scale}
    for (name, _), gradient in zip(quantizer.phi.named_parameters(prefix="phi"), gradients[2:], strict=True):
        assert (gradient is not None) == (name.rpartition(".")[0] in used)
    ids = quantized.tokens.unique()
    unused = torch.ones(16, dtype=torch.bool).index_fill(0, ids, False)
    assert gradients[1][ids].abs().sum() > 0 and not gradients[1][unused].any()
    (commitment,) = torch.autograd.grad(quantized.losses["commitment"], latents)
    after = quantizer.cumulative(quantized.tokens).detach().movedim(2, -1)
    expected = 0.25 * 2 * (latents.detach() - after).mean(dim=0) / latents.numel()
    torch.testing.assert_close(commitment, expected)


def test_every_convolution_has_a_scale_where_there_are_enough() -> None:
    ten = MultiScaleResidualQuantizer(4, 2, scales=[1, 2, 3, 4, 5, 6, 8, 10, 13, 16])
    assert ten.phi_of_scale == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert MultiScaleResidualQuantizer(4, 2, scales=[1, 2, 3], phi_kernels=1).phi_of_scale == [0, 0, 0]
    assert not MultiScaleResidualQuantizer(4, 2, scales=[1, 2, 3], phi_ratio=0.0).phi


def test_running_means_take_the_latents_of_all_scales_once() -> None:
    quantizer = make((1, 2), size=4, codebook_update="ema", decay=0.5, phi_ratio=0.0).train()
    quantizer.codebook.embedding_sum.copy_(quantizer.codebook.codes)
    codes = quantizer.codebook.codes.clone()
    quantized = quantizer(torch.randn(3, 2, 2, 3))
    counts = torch.bincount(quantized.tokens.flatten(), minlength=4)
    assert int(counts.sum()) == 3 * 5
    torch.testing.assert_close(quantizer.codebook.cluster_size, 0.5 + 0.5 * counts)
    # The codes handed on are those before the update.
    before = (
        codes[quantizer.split(quantized.tokens)[1]].reshape(3, 2, 2, 3) + codes[quantized.tokens[:, 0]][:, None, None]
    )
    torch.testing.assert_close(quantized.z_q, before)
    assert not torch.equal(quantizer.codebook.codes, codes)


def test_convolutions_begin_as_the_identity() -> None:
    """Untrained, the last scale's codes are those of plain residual quantisation."""
    quantizer, without = make(), make(phi_ratio=0.0)
    without.codebook.load_state_dict(quantizer.codebook.state_dict())
    latents = torch.randn(2, 4, 4, 3)
    torch.testing.assert_close(quantizer(latents).z_q, without(latents).z_q)


def test_training_lowers_its_losses() -> None:
    quantizer = MultiScaleResidualQuantizer(32, 3, scales=[1, 2, 4]).train()
    latents = torch.randn(8, 4, 4, 3)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    distances = []
    for _ in range(60):
        quantized = quantizer(latents)
        distances.append((quantized.z_q - latents).square().mean())
        optimizer.zero_grad()
        quantized.losses["codebook"].backward()
        optimizer.step()
    assert distances[-1] < 0.7 * distances[0]


def test_components_are_the_scales() -> None:
    quantizer = make()
    tokens = torch.arange(21).repeat(2, 1) % 16
    components = quantizer.components(tokens)
    assert list(components) == ["scale_1", "scale_2", "scale_4"] and all(
        component.size == 16 for component in components.values()
    )
    assert [component.ids.tolist()[0] for component in components.values()] == [
        [0],
        [1, 2, 3, 4],
        [n % 16 for n in range(5, 21)],
    ]


def test_autocast_changes_nothing() -> None:
    quantizer = make().eval()
    latents = torch.randn(2, 4, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(latents)
        tokens = quantizer.encode(latents)
    plain = quantizer(latents)
    assert torch.equal(quantized.tokens, plain.tokens) and torch.equal(tokens, plain.tokens)
    assert torch.equal(quantized.z_q, plain.z_q) and quantized.z_q.dtype == torch.float32


@pytest.mark.parametrize("grid", [(2, 2), (5, 5), (4, 5), (4,), (4, 4, 4)])
def test_other_grids_are_refused(grid: tuple[int, ...]) -> None:
    quantizer = make()
    latents = torch.zeros(1, *grid, 3)
    for call in (lambda: quantizer.token_shape(grid), lambda: quantizer(latents), lambda: quantizer.encode(latents)):
        with pytest.raises(ValueError, match=r"latent grid is [\d x]+, and the scales \[1, 2, 4\] end at 4"):
            call()


def test_scales_that_are_no_squares() -> None:
    quantizer = make((1, [1, 2], [2, 2], (4, 6)))
    assert quantizer.scales == (1, (1, 2), 2, (4, 6)) and quantizer.lengths == [1, 2, 4, 24]
    names = quantizer.components(torch.zeros(1, 31, dtype=torch.int64))
    assert list(names) == ["scale_1", "scale_1x2", "scale_2", "scale_4x6"]
    with pytest.raises(ValueError, match=r"latent grid is 6 x 4, and the scales .* end at 4 x 6"):
        quantizer.token_shape((6, 4))
    for scales in ((1, (2, 4), (3, 3)), ((2, 3), (2, 3)), (1, (2, 0))):
        with pytest.raises(ValueError, match="scales must be positive and grow"):
            make(scales)


def test_ids_of_other_scales_are_refused() -> None:
    with pytest.raises(ValueError, match=r"have shape \(B, 21\), got \(2, 20\)"):
        make().lookup(torch.zeros(2, 20, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": []}, r"scales must be positive and grow, got \[\]"),
        ({"scales": [1, 1]}, "scales must be positive and grow"),
        ({"scales": [0, 1]}, "scales must be positive and grow"),
        ({"phi_kernels": 0}, "phi_kernels must be positive, got 0"),
        ({"phi_ratio": 1.5}, r"phi_ratio must lie in \[0, 1\], got 1.5"),
        ({"commitment_weight": -1.0}, "commitment_weight must be >= 0"),
    ],
)
def test_settings_out_of_range(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiScaleResidualQuantizer(8, 2, **{"scales": [1, 2], **arguments})
