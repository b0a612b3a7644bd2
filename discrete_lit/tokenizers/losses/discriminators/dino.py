"""A discriminator that looks through a frozen ViT (Sauer et al., "StyleGAN-T", ICML 2023, section 3.1)."""

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from discrete_lit.tokenizers.losses.discriminators.discriminator import Discriminator
from discrete_lit.tokenizers.losses.frozen import FrozenNetwork
from discrete_lit.tokenizers.losses.timm_networks import make_timm, pixels_for

_NORM_GROUPS = 32


class DINODiscriminator(Discriminator):
    """Small heads on the patch tokens of several layers of a frozen ViT; each gives a logit for a patch.

    A head is two convolutions over the sequence of patches, the second wide and residual, and one to a logit, under
    spectral normalisation. StyleGAN-T's own heads also read the class embedding of a text, and normalise over the
    batch instead of groups of channels.

    Args:
        model_name: timm's name of the ViT, for instance `vit_small_patch16_224.dino` or
            `vit_small_patch14_dinov2.lvd142m`.
        weights_path: its weights in timm's layout; `"random"` takes random ones, for tests.
        layers: blocks whose tokens are judged, from 0.
        image_size: images are resized to it: a multiple of the ViT's patch.
        kernel_size: of the wide convolution; odd.

    Raises:
        ValueError: a setting out of its range; no such network.
    """

    def __init__(
        self,
        model_name: str,
        weights_path: str,
        layers: Sequence[int] = (2, 5, 8, 11),
        image_size: int = 224,
        kernel_size: int = 9,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size of DINODiscriminator must be odd, got {kernel_size}")
        with torch.device("meta"):
            shape = make_timm(model_name, "random", "discriminator", has_layers=True, num_classes=0)
        depth, patch = len(getattr(shape, "blocks", ())), getattr(shape, "patch_embed", None)
        if patch is None or not layers or not all(0 <= layer < depth for layer in layers):
            raise ValueError(
                f"layers of DINODiscriminator must be blocks of a ViT: {model_name!r} has {depth}, got {list(layers)}"
            )
        if image_size < 1 or image_size % patch.patch_size[0]:
            raise ValueError(
                f"image_size of DINODiscriminator must be a multiple of the patch of {model_name!r}, "
                f"{patch.patch_size[0]}, got {image_size}"
            )
        self.model_name = model_name
        self.weights_path = weights_path
        self.layers = list(layers)
        self.image_size = image_size
        self.frozen = FrozenNetwork(self._make)
        self.heads = nn.ModuleList(_Head(int(shape.embed_dim), kernel_size) for _ in layers)  # type: ignore[arg-type]

    def prepare(self) -> None:
        self.frozen.prepare()

    def features(self, images: Tensor) -> list[Tensor]:
        """The tokens `(B, D, patches)` of each layer, of images `(B, 3, H, W)`."""
        network = self.frozen.on(images.device)
        pixels = pixels_for(network, images, self.image_size)
        tokens = network.forward_intermediates(pixels, indices=self.layers, output_fmt="NLC", intermediates_only=True)
        return [layer.transpose(1, 2) for layer in tokens]

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, layers, patches)
        return torch.cat([head(layer) for head, layer in zip(self.heads, self.features(images), strict=True)], dim=1)

    def _make(self) -> nn.Module:
        return make_timm(
            self.model_name,
            self.weights_path,
            "discriminator",
            has_layers=True,
            num_classes=0,
            img_size=self.image_size,
        )


class _Head(nn.Module):
    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        self.enter = _layer(width, 1)
        self.mix = _layer(width, kernel_size)
        self.logit = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, D, patches) -> (B, 1, patches)
        hidden = self.enter(tokens.float())
        return self.logit((hidden + self.mix(hidden)) * 0.5**0.5)


def _layer(width: int, kernel_size: int) -> nn.Module:
    convolution = nn.Conv1d(width, width, kernel_size, padding=kernel_size // 2, padding_mode="circular")
    return nn.Sequential(spectral_norm(convolution), nn.GroupNorm(gcd(width, _NORM_GROUPS), width), nn.LeakyReLU(0.2))
