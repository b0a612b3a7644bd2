"""Discriminators: what tells images from reconstructions, for `AdversarialLoss`.

    PatchGAN               a logit for every patch  Isola et al., "Image-to-Image Translation", CVPR 2017, section
                                                    3.2.2; the discriminator of taming's VQGAN
    BlurPoolDiscriminator  a logit for every patch  Weber et al., "MaskBit", TMLR 2024, section 3; of TiTok too
    StyleGANDiscriminator  a logit for an image     Karras et al., "Analyzing and Improving the Image Quality of
                                                    StyleGAN" (StyleGAN2), CVPR 2020
    DINODiscriminator      a logit for every patch  Sauer et al., "StyleGAN-T", ICML 2023, section 3.1
                           and layer of a frozen ViT

The one of whole clips stands in `clip_discriminator.py`. Each stands with its own layers below it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import gcd, prod, sqrt
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from discrete_lit.core.distributed import world_size
from discrete_lit.core.images import ImageSize, check_channels, height_and_width, normal_size
from discrete_lit.core.modules import at_least_float32
from discrete_lit.tokenizers.losses.frozen_networks import FrozenNetwork, make_timm, pixels_for

Norm = Literal["group", "batch", "sync"]
"""How a discriminator normalises: every image alone, over the images of a rank, or over those of all ranks."""

# Groups of channels of a group normalisation, at most.
_NORM_GROUPS = 32


class Discriminator(nn.Module, ABC):
    """Tell images from reconstructions by logits, which are high for images."""

    sees_clips: bool = False
    """Whether it is shown clips `(B, C, T, H, W)` as they are; others see a clip as a batch of its frames."""

    def prepare(self) -> None:
        """Read the weights of what is frozen, if anything is.

        Raises:
            ValueError: there are none where they should be, or they are another network's.
        """

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)`, about [-1, 1], to logits `(B, ...)`, one or several of each: high for real ones."""


class PatchGAN(Discriminator):
    """Give a logit to every patch of an image by 4x4 convolutions; with three layers a patch is 70x70 pixels.

    Convolutions, their order and their initialisation are those of taming's `NLayerDiscriminator`, and with batch
    normalisation the names of the weights too.

    Args:
        image_channels: C of the images.
        width: channels of the first layer; they double up to eight times that.
        layers: convolutions of stride 2.
        norm: `"group"` normalises every image alone; `"batch"` is batch normalisation, the paper's, with which images
            and reconstructions are normalised apart; `"sync"` is that over all ranks, so that several ranks train as
            one. Published VQGANs take `"batch"`.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(self, *, image_channels: int = 3, width: int = 64, layers: int = 3, norm: Norm = "group") -> None:
        super().__init__()
        if width < 1 or layers < 1:
            raise ValueError(f"width and layers of PatchGAN must be at least 1, got width={width}, layers={layers}")
        _check_norm(norm, "PatchGAN")
        self.image_channels = image_channels
        self.smallest = 3 * 2**layers
        widths = [width * min(2**layer, 8) for layer in range(layers + 1)]
        made: list[nn.Module] = [nn.Conv2d(image_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            stride = 2 if layer < layers else 1
            # The norm brings a bias of its own.
            made.append(nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=False))
            made += [_norm(norm, widths[layer]), nn.LeakyReLU(0.2)]
        made.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*made)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 1, h, w)
        check_channels(images, self.image_channels, "PatchGAN")
        if min(images.shape[-2:]) < self.smallest:
            raise ValueError(
                f"this PatchGAN takes images of at least {self.smallest}x{self.smallest} pixels, got "
                f"{tuple(images.shape[-2:])}; give it fewer layers"
            )
        return self.main(images)


def _check_norm(kind: str, owner: str) -> None:
    if kind not in ("group", "batch", "sync"):
        raise ValueError(f"norm of {owner} must be 'group', 'batch' or 'sync', got {kind!r}")


def _norm(kind: Norm, width: int, epsilon: float = 1e-5) -> nn.Module:
    """The norm of `(B, width, h, w)` or `(B, width, n)`."""
    if kind == "group":
        return nn.GroupNorm(gcd(width, _NORM_GROUPS), width, eps=epsilon)
    return (SynchronizedBatchNorm if kind == "sync" else RankBatchNorm)(width, eps=epsilon)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, RankBatchNorm | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class RankBatchNorm(nn.BatchNorm2d):
    """Normalise, in training, by the statistics of the batch of this rank, of images or of sequences."""

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim in (3, 4)


class SynchronizedBatchNorm(RankBatchNorm):
    """Normalise, in training, by the statistics of the joined batch of all ranks.

    Whether there are other ranks is asked at every call. Unlike `torch.nn.SyncBatchNorm` it runs on every device and
    can be differentiated twice, as a gradient penalty asks.
    """

    def forward(self, input: Tensor) -> Tensor:  # (B, C, ...) -> (B, C, ...)
        if not self.training or world_size() == 1:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        with torch.autocast(input.device.type, enabled=False):
            # Channels last; sums around the running mean, the same on every rank: those around 0 would cancel.
            center = self.running_mean.clone()
            values = at_least_float32(input).movedim(1, -1) - center
            rows = values.flatten(0, -2)
            sums = torch.cat((rows.sum(dim=0), rows.square().sum(dim=0), values.new_tensor([len(rows)])))
            sums = all_reduce(sums)
            total = sums[-1]
            mean, square = (sums[:-1] / total).chunk(2)
            variance = (square - mean.square()).clamp(min=0)
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean + center, momentum)
                self.running_var.lerp_(variance * total / (total - 1), momentum)
            normed = (values - mean) * torch.rsqrt(variance + self.eps)
            return (normed * self.weight + self.bias).movedim(-1, 1).to(input.dtype)


class BlurPoolDiscriminator(Discriminator):
    """Give a logit to every patch of an image by 3x3 convolutions, each followed by a blur that halves it.

    The discriminator of MaskBit (section 3) and of TiTok's decoder (1d-tokenizer, `discriminator.py`), with the names
    of its weights: leaky ReLUs of slope 0.1, group normalisation behind each blur, and at the end the maxima over a
    grid of 16 x 16. It sees pixels in [0, 1].

    Args:
        image_channels: C of the images.
        width: channels of the first two stages; they double with every later one.
        stages: how often the image is halved.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(self, *, image_channels: int = 3, width: int = 128, stages: int = 3) -> None:
        super().__init__()
        if width < 1 or stages < 1:
            raise ValueError(
                f"width and stages of BlurPoolDiscriminator must be at least 1, got width={width}, stages={stages}"
            )
        self.image_channels = image_channels
        widths = [width, *(width * 2**stage for stage in range(stages))]
        self.block_in = nn.Sequential(nn.Conv2d(image_channels, width, 5, padding=2), nn.LeakyReLU(0.1))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, padding=1), _BlurPool(), _norm("group", after), nn.LeakyReLU(0.1)
                )
                for before, after in pairwise(widths)
            )
        )
        self.pool = nn.AdaptiveMaxPool2d(16)
        self.to_logits = nn.Sequential(
            nn.Conv2d(widths[-1], widths[-1], 1), nn.LeakyReLU(0.1), nn.Conv2d(widths[-1], 1, 5, padding=2)
        )

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 1, 16, 16)
        check_channels(images, self.image_channels, "BlurPoolDiscriminator")
        return self.to_logits(self.pool(self.blocks(self.block_in((images + 1) / 2))))


class _BlurPool(nn.Module):
    """Halve an image behind a binomial filter of 4 x 4, zeros around it; an odd side is rounded up."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        binomial = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", torch.outer(binomial, binomial) / 64, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, C, h/2, w/2)
        width = x.shape[1]
        padded = F.pad(x, (1, 1 + x.shape[3] % 2, 1, 1 + x.shape[2] % 2))
        return F.conv2d(padded, self.kernel.to(x.dtype).expand(width, 1, 4, 4), stride=2, groups=width)


# The shorter side of the image behind the last block of StyleGAN's discriminator.
_LEAST_SIZE = 4


class StyleGANDiscriminator(Discriminator):
    """Give one logit to an image by residual blocks that halve it behind a blur, down to 4x4.

    Where height and width differ, the shorter ends at 4. As in MaskGIT's port of it, layers are ordinary ones instead
    of equalised.

    Args:
        image_size: of the images: a side of 4 times a power of 2, or `[height, width]`, of which the shorter is 4 times
            a power of 2 and the longer a multiple of that power.
        image_channels: C of the images.
        width: channels at full resolution; they double with every halving.
        max_width: channels at most.
        group_size: images, at most, whose deviation from one another is shown to the last layers (minibatch standard
            deviation: Karras et al., "Progressive Growing of GANs", ICLR 2018, section 3); 1 leaves it out. Groups are
            neighbours in the batch, so it must divide the batch of a rank for several ranks to be as one.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        image_size: ImageSize,
        *,
        image_channels: int = 3,
        width: int = 64,
        max_width: int = 512,
        group_size: int = 4,
    ) -> None:
        super().__init__()
        size = height_and_width(image_size)
        halvings = max(min(size) // _LEAST_SIZE, 1).bit_length() - 1
        if min(size) != _LEAST_SIZE * 2**halvings or max(size) % 2**halvings:
            raise ValueError(
                f"image_size of StyleGANDiscriminator must be 4 times a power of 2, got {normal_size(image_size)}; of "
                "height and width the shorter, and the longer a multiple of that power"
            )
        if min(width, max_width, group_size) < 1:
            raise ValueError(
                "width, max_width and group_size of StyleGANDiscriminator must be at least 1, got "
                f"{width}, {max_width} and {group_size}"
            )
        widths = [min(width * 2**level, max_width) for level in range(halvings + 1)]
        self.image_size = size
        self.image_channels = image_channels
        self.group_size = group_size
        self.stem = nn.Conv2d(image_channels, widths[0], 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(*pair) for pair in pairwise(widths)))
        self.last = nn.Conv2d(widths[-1] + (group_size > 1), widths[-1], 3, padding=1)
        self.hidden = nn.Linear(widths[-1] * prod(side // 2**halvings for side in size), widths[-1])
        self.logit = nn.Linear(widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 1)
        check_channels(images, self.image_channels, "StyleGANDiscriminator")
        if images.shape[-2:] != self.image_size:
            raise ValueError(
                f"this StyleGANDiscriminator was made for image_size={normal_size(self.image_size)}, got images of "
                f"{tuple(images.shape[-2:])}"
            )
        hidden = self.blocks(_activate(self.stem(images)))
        if self.group_size > 1:
            hidden = torch.cat((hidden, _group_deviation(hidden, self.group_size)), dim=1)
        hidden = _activate(self.last(hidden)).flatten(1)
        return self.logit(_activate(self.hidden(hidden)))


class _Block(nn.Module):
    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_width, in_width, 3, padding=1)
        self.second = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.shortcut = nn.Conv2d(in_width, out_width, 1, bias=False)
        self.halve = _BlurPool()

    def forward(self, x: Tensor) -> Tensor:  # (B, in, h, w) -> (B, out, h/2, w/2)
        hidden = _activate(self.second(self.halve(_activate(self.first(x)))))
        return (self.shortcut(self.halve(x)) + hidden) / sqrt(2)


def _activate(x: Tensor) -> Tensor:
    """Leaky ReLU that keeps the variance, as StyleGAN's."""
    return F.leaky_relu(x, 0.2) * sqrt(2)


def _group_deviation(hidden: Tensor, group_size: int) -> Tensor:
    """`(B, C, h, w)` to `(B, 1, h, w)`: the mean deviation over the images of each group, at least in float32."""
    batch, _, height, width = hidden.shape
    group = next(size for size in range(min(group_size, batch), 0, -1) if batch % size == 0)
    groups = rearrange(at_least_float32(hidden), "(groups group) c h w -> groups group (c h w)", group=group)
    deviation = (groups.var(dim=1, unbiased=False) + 1e-8).sqrt().mean(dim=1)  # (groups,)
    return repeat(deviation, "groups -> (groups group) 1 h w", group=group, h=height, w=width).to(hidden.dtype)


class DINODiscriminator(Discriminator):
    """Give a logit to every patch and layer of a frozen ViT, whose patch tokens small heads read.

    A head is two convolutions over the sequence of patches, the second wide and residual, and one to a logit, under
    spectral normalisation. StyleGAN-T's own heads also read the class embedding of a text, and normalise over groups
    of 8 images. Those of vaex, the tokenizer of VAR's authors (`dino.py`), have `norm: sync`, `norm_epsilon: 1.0e-6`,
    `class_token: true`, `embedding: true`, `resize: area` and `initial_deviation: 0.02`.

    Args:
        model_name: timm's name of the ViT, for instance `vit_small_patch16_224.dino` or
            `vit_small_patch14_dinov2.lvd142m`.
        weights_path: its weights in timm's layout; `"random"` takes random ones, for tests.
        layers: blocks whose tokens are read, from 0.
        image_size: images are resized to it, a side or `[height, width]`: multiples of the ViT's patch.
        kernel_size: of the wide convolution; odd.
        norm: of the heads, as for `PatchGAN`.
        norm_epsilon: of the norm.
        resize: how larger images become `image_size`: `"bilinear"`, antialiased, or the `"area"` mean; smaller ones are
            then enlarged by a bicubic filter.
        initial_deviation: of the normal distribution that the weights of the heads begin with, biases 0; None takes
            PyTorch's own.
        class_token: add the class token of a layer to the tokens of its patches.
        embedding: read the tokens before the first block too, by a head of its own, the first.

    Raises:
        ValueError: a setting out of its range; no such network.
    """

    def __init__(
        self,
        model_name: str,
        weights_path: str,
        *,
        layers: Sequence[int] = (2, 5, 8, 11),
        image_size: ImageSize = 224,
        kernel_size: int = 9,
        norm: Norm = "group",
        norm_epsilon: float = 1e-5,
        resize: Literal["bilinear", "area"] = "bilinear",
        initial_deviation: float | None = None,
        class_token: bool = False,
        embedding: bool = False,
    ) -> None:
        super().__init__()
        _check_norm(norm, "DINODiscriminator")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size of DINODiscriminator must be odd, got {kernel_size}")
        if resize not in ("bilinear", "area"):
            raise ValueError(f"resize of DINODiscriminator must be 'bilinear' or 'area', got {resize!r}")
        with torch.device("meta"):
            shape = make_timm(model_name, "random", "discriminator", has_layers=True, num_classes=0)
        depth, patch = len(getattr(shape, "blocks", ())), getattr(shape, "patch_embed", None)
        if patch is None or not layers or not all(0 <= layer < depth for layer in layers):
            raise ValueError(
                f"layers of DINODiscriminator must be blocks of a ViT: {model_name!r} has {depth}, got {list(layers)}"
            )
        if class_token and not shape.num_prefix_tokens:
            raise ValueError(f"class_token of DINODiscriminator needs a ViT that has one: {model_name!r} has none")
        size = height_and_width(image_size)
        if any(side % patch.patch_size[0] for side in size):
            raise ValueError(
                f"image_size of DINODiscriminator must be a multiple of the patch of {model_name!r}, "
                f"{patch.patch_size[0]}, got {normal_size(size)}"
            )
        self.model_name = model_name
        self.weights_path = weights_path
        self.layers = list(layers)
        self.image_size = size
        self.resize: Literal["bilinear", "area"] = resize
        self.class_token = class_token
        self.embedding = embedding
        self.frozen = FrozenNetwork(self._make)
        width: int = shape.embed_dim  # type: ignore[assignment]
        normalised = partial(_norm, norm, width, norm_epsilon)
        self.heads = nn.ModuleList(
            _Head(width, kernel_size, norm=normalised, deviation=initial_deviation)
            for _ in range(embedding + len(layers))
        )

    def prepare(self) -> None:
        self.frozen.prepare()

    def features(self, images: Tensor) -> list[Tensor]:
        """The tokens `(B, D, patches)` that each head reads, of images `(B, C, H, W)`; see `pixels_for`."""
        network = self.frozen.seeing(images)
        pixels = pixels_for(network, images, self.image_size, resize=self.resize)
        entered: list[Tensor] = []  # `(B, prefix + patches, D)`
        hook = network.blocks[0].register_forward_pre_hook(lambda block, given: entered.append(given[0]))
        try:
            read: list[Any] = network.forward_intermediates(
                pixels,
                indices=self.layers,
                output_fmt="NLC",
                intermediates_only=True,
                return_prefix_tokens=self.class_token,
            )
        finally:
            hook.remove()
        if self.embedding:
            prefix, patches = entered[0].tensor_split([network.num_prefix_tokens], dim=1)
            read = [(patches, prefix) if self.class_token else patches, *read]
        if self.class_token:
            read = [patches + prefix[:, :1] for patches, prefix in read]
        return [tokens.mT for tokens in read]

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, layers, patches)
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
    def __init__(self, width: int, kernel_size: int, *, norm: Callable[[], nn.Module], deviation: float | None) -> None:
        super().__init__()
        self.enter = _layer(width, kernel_size=1, norm=norm, deviation=deviation)
        self.mix = _layer(width, kernel_size=kernel_size, norm=norm, deviation=deviation)
        self.logit = _spectral(nn.Conv1d(width, 1, 1), deviation)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, D, patches) -> (B, 1, patches)
        hidden = self.enter(at_least_float32(tokens))
        return self.logit((hidden + self.mix(hidden)) * 0.5**0.5)


def _layer(width: int, *, kernel_size: int, norm: Callable[[], nn.Module], deviation: float | None) -> nn.Module:
    convolution = nn.Conv1d(width, width, kernel_size, padding=kernel_size // 2, padding_mode="circular")
    return nn.Sequential(_spectral(convolution, deviation), norm(), nn.LeakyReLU(0.2))


def _spectral(convolution: nn.Conv1d, deviation: float | None) -> nn.Module:
    """Normalise the weight of a convolution, which begins with a deviation or as it is."""
    if deviation is not None:
        nn.init.normal_(convolution.weight, std=deviation)
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
    return spectral_norm(convolution)
