"""Every generator of latents at a tiny size with random weights, beside rows of data for it."""

from collections.abc import Callable
from typing import Any

import torch

from discrete_lit.backbones import (
    CellTransformer,
    ChannelHead,
    DiT,
    MaskedAutoencoder,
    ScaleTransformer,
    TokenDiffusionHead,
    Transformer,
)
from discrete_lit.diffusion.consistency import ConsistencyLoss
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath
from discrete_lit.diffusion.solvers import DDPM
from discrete_lit.generators import (
    ContinuousAutoregressive,
    ContinuousMasked,
    ContinuousNextScale,
    DimensionwiseMasked,
    DisCon,
    HybridNextScale,
    LatentDiffusion,
    Masked,
    NextCell,
    TokenDiffusionDecoder,
)
from discrete_lit.tokenizers import FSQ, HybridLatents, HybridVQ, LatentGrid, RawPixels, TokenGrid
from discrete_lit.tokenizers.networks import ConvAutoencoder
from helpers.random_weights import randomise

SIZE: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2}
GRID = (3, 4, 4)


def head(repeats: int = 2) -> Callable[[int, int], TokenDiffusionHead]:
    return lambda dim, width: TokenDiffusionHead(dim, width, width=16, depth=1, repeats=repeats, solver=DDPM(3))


def masked_network(**switches: Any) -> Callable[[Any], MaskedAutoencoder]:
    return lambda layout: MaskedAutoencoder(layout, **SIZE, buffer=2, **switches)


def convolutional(code_dim: int, latent_dim: int) -> ConvAutoencoder:
    return ConvAutoencoder(code_dim, latent_dim, channels=4, multipliers=(1, 1), blocks=1, norm_groups=2)


def scale_network(layout: Any) -> ScaleTransformer:
    return ScaleTransformer(layout, **SIZE, mlp_hidden=16)


def _hybrid() -> HybridNextScale:
    tokenizer = HybridLatents(HybridVQ(convolutional, 5, code_dim=3, scales=[1, 2, 4]))
    return HybridNextScale(
        tokenizer, 8, num_classes=2, backbone=scale_network, head=head(), check_scale=False, least_kept=1
    )


def _discon() -> DisCon:
    discrete = Masked(TokenGrid(6, (2, 2)), 4, num_classes=2, backbone=lambda layout: Transformer(layout, **SIZE))
    settings: dict[str, Any] = {"exposure": "replace", "exposure_probability": 0.3, "check_scale": False}
    return DisCon(
        LatentGrid(GRID),
        4,
        num_classes=2,
        discrete=discrete,
        backbone=masked_network(fusion="prefix"),
        head=head(),
        **settings,
    )


def _decoder(**settings: Any) -> TokenDiffusionDecoder:
    return TokenDiffusionDecoder(
        RawPixels(),
        8,
        discrete=FSQ(convolutional, levels=[4, 4]),
        backbone=lambda layout: DiT(layout, **SIZE),
        **settings,
    )


def _on_grid(kind: Any, **settings: Any) -> Any:
    return kind(LatentGrid(GRID), 4, num_classes=2, **{"check_scale": False, **settings})


FAMILIES: dict[str, Callable[[], Any]] = {
    "LatentDiffusion": lambda: _on_grid(LatentDiffusion, backbone=lambda layout: DiT(layout, **SIZE)),
    "ContinuousMasked": lambda: _on_grid(ContinuousMasked, backbone=masked_network(), head=head()),
    "ContinuousMasked, one draw of the head": lambda: _on_grid(
        ContinuousMasked, backbone=masked_network(), head=head(repeats=1)
    ),
    "ContinuousAutoregressive": lambda: _on_grid(
        ContinuousAutoregressive, backbone=lambda layout: Transformer(layout, **SIZE), head=head(), hidden_width=16
    ),
    "DisCon": _discon,
    "NextCell": lambda: _on_grid(NextCell, backbone=lambda layout: CellTransformer(layout, **SIZE), cell_size=2),
    "DimensionwiseMasked": lambda: _on_grid(
        DimensionwiseMasked,
        backbone=masked_network(),
        head=lambda layout: ChannelHead(layout, width=8, depth=1, heads=2),
        levels=4,
    ),
    "ContinuousNextScale": lambda: _on_grid(ContinuousNextScale, backbone=scale_network, head=head(), scales=[1, 2, 4]),
    "HybridNextScale": _hybrid,
    "TokenDiffusionDecoder": _decoder,
    "TokenDiffusionDecoder, consistency": lambda: _decoder(
        denoiser=GaussianDenoiser(RectifiedPath(), prediction="velocity"), consistency=ConsistencyLoss
    ),
}


def make(family: str, spread: float = 0.2) -> Any:
    torch.manual_seed(0)
    made = FAMILIES[family]()
    for part in ("backbone", "head", "token_embedding"):
        module = getattr(made, part, None)
        if module is not None:
            randomise(module, spread)
    return made


def rows_of(family: str, made: Any, count: int) -> list[dict[str, Any]]:
    """Rows of latents or images, with labels, and with the ids that a family is given."""
    random = torch.Generator().manual_seed(0)
    images = isinstance(made, (HybridNextScale, TokenDiffusionDecoder))
    shape = (3, 8, 8) if images else GRID
    data = torch.rand(count, *shape, generator=random) * 2 - 1
    name = "image" if images else "latents"
    rows = [{name: one, "label": number % 2, "index": number} for number, one in enumerate(data)]
    if isinstance(made, DisCon):
        ids = torch.randint(6, (count, 2, 2), generator=random)
        rows = [{**row, "tokens": one} for row, one in zip(rows, ids, strict=True)]
    return rows
