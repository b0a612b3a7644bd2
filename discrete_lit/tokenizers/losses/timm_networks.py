"""Frozen networks of timm, and images as they want them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.tokenizers.losses.frozen import RANDOM_WEIGHTS, load_weights, read_weights


def make_timm(model_name: str, weights_path: str, setting: str, has_layers: bool, **arguments: Any) -> nn.Module:
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
        load_weights(network, read_weights(weights_path, f"{setting}.weights_path"), f"{setting}.weights_path")
    return with_pixel_statistics(network)


def with_pixel_statistics(network: Any) -> nn.Module:
    """The network, with the mean and deviation of its training's pixels where `pixels_for` finds them."""
    for name in ("mean", "std"):
        values = torch.tensor(network.pretrained_cfg[name])[:, None, None]
        network.register_buffer(f"pixel_{name}", values, persistent=False)
    return network


def pixels_for(network: Any, images: Tensor, image_size: int | None) -> Tensor:
    """Images `(B, 3, H, W)` in [-1, 1], resized (antialiased bilinear) and normalised as the network was trained."""
    pixels = (images.float() + 1) / 2
    if image_size is not None and pixels.shape[-2:] != (image_size, image_size):
        size = (image_size, image_size)
        pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
    return (pixels - network.pixel_mean) / network.pixel_std
