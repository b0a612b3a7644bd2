"""Frozen networks that a loss looks through: never trained, never saved, read from files when training starts.

`FrozenNetwork` holds one; below it stand networks of timm and torchvision, and images as those expect them.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.images import to_rgb
from discrete_lit.core.modules import at_least_float32, widened
from discrete_lit.core.weight_files import read_weights

RANDOM_WEIGHTS = "random"
"""The path of weights that stands for the network's own random initialisation, for tests."""


class FrozenNetwork:
    """Hold a network in eval mode, without gradients to its weights, made when it is first needed.

    It is no module, so that a module that holds one neither saves its weights nor needs them to be loaded again. Copies
    share it. It follows what it is asked for to its device and, where that is given, its precision.

    Args:
        make: builds the network with its weights; may raise a ValueError.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self._make = make
        self._network: nn.Module | None = None
        self._device = torch.device("cpu")
        self._dtype = torch.float32

    def prepare(self) -> nn.Module:
        """The network, made now if it was not; what `make` raises tells the user about his weights."""
        if self._network is None:
            self._network = self._make().eval().requires_grad_(False)
        return self._network

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> Any:
        """The network, on a device and in a precision, or else in the one that it has."""
        network = self.prepare()
        if device != self._device or dtype not in (None, self._dtype):
            network.to(device, dtype)
            self._device, self._dtype = device, dtype or self._dtype
        return network

    def seeing(self, images: Tensor) -> Any:
        """The network, on the device of images and in float32, or in float64 where they are."""
        return self.on(images.device, widened(images.dtype))

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenNetwork":
        return self


def load_frozen(network: nn.Module, weights: dict[str, Tensor], setting: str) -> nn.Module:
    """Put weights into a network, all of them and nothing else.

    Args:
        network: to be filled.
        weights: by name.
        setting: where the user gave their path, for the message.

    Raises:
        ValueError: a missing or unexpected name, or another shape.
    """
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{setting} holds the weights of another network: {error}") from error
    return network


def make_timm(model_name: str, weights_path: str, setting: str, *, has_layers: bool, **arguments: Any) -> nn.Module:
    """A network of timm with weights from a file.

    Args:
        model_name: timm's.
        weights_path: in timm's layout, or `"random"`.
        setting: what the user configured, for messages.
        has_layers: whether the features of its layers are needed.
        arguments: of the network.

    Raises:
        ValueError: no such network; one that does not give the features of its layers; no such weights.
    """
    from timm.models import create_model, is_model

    if not is_model(model_name.partition(".")[0]):
        raise ValueError(f"{setting}.model_name={model_name!r} is not a network of timm")
    network = create_model(model_name, **arguments)
    if has_layers and not hasattr(network, "forward_intermediates"):
        raise ValueError(f"{setting}.model_name={model_name!r} does not give the features of its layers")
    if weights_path != RANDOM_WEIGHTS:
        load_frozen(network, read_weights(weights_path, f"{setting}.weights_path"), f"{setting}.weights_path")
    return with_pixel_statistics(network, cast(Any, network.pretrained_cfg))


def make_torchvision(model_name: str, weights_path: str, setting: str) -> nn.Module:
    """A classifier of torchvision with weights from a file; it was trained on ImageNet's pixels at unit deviation.

    Args:
        model_name: torchvision's.
        weights_path: in torchvision's layout, or `"random"`.
        setting: what the user configured, for messages.

    Raises:
        ValueError: no such classifier; no such weights.
    """
    from torchvision import models

    if model_name not in models.list_models(module=models):
        raise ValueError(f"{setting}.model_name={model_name!r} is not a classifier of torchvision")
    network = models.get_model(model_name, weights=None)
    if weights_path != RANDOM_WEIGHTS:
        load_frozen(network, read_weights(weights_path, f"{setting}.weights_path"), f"{setting}.weights_path")
    return with_pixel_statistics(network, {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)})


def with_pixel_statistics(network: Any, statistics: Mapping[str, Any]) -> nn.Module:
    """The network, with the mean and deviation of its training's pixels where `pixels_for` finds them."""
    for name in ("mean", "std"):
        network.register_buffer(f"pixel_{name}", torch.tensor(statistics[name])[:, None, None], persistent=False)
    return network


def pixels_for(
    network: Any,
    images: Tensor,
    image_size: tuple[int, int] | None,
    *,
    resize: Literal["bilinear", "area"] = "bilinear",
) -> Tensor:
    """Images `(B, C, H, W)` in [-1, 1], in colour, resized and normalised as in training.

    Grey is repeated to three channels, RGBA laid over white.

    Args:
        network: with the statistics of its pixels.
        images: to be seen.
        image_size: that the network wants; None takes the images as they are.
        resize: `"bilinear"`, antialiased; or `"area"`, means of larger images, and a bicubic filter for smaller ones.
    """
    pixels = (to_rgb(at_least_float32(images), "a frozen network") + 1) / 2
    if image_size is not None and pixels.shape[-2:] != image_size and resize == "area":
        larger = pixels.shape[-2] > image_size[0]
        pixels = F.interpolate(pixels, size=image_size, mode="area" if larger else "bicubic")
    elif image_size is not None and pixels.shape[-2:] != image_size:
        pixels = F.interpolate(pixels, size=image_size, mode="bilinear", align_corners=False, antialias=True)
    return (pixels - network.pixel_mean) / network.pixel_std
