"""The contract of an autoencoder network: images to a grid of latents, and codes back to images."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from discrete_lit.core.images import ImageSize

LayerInitialization = Literal["vaex", "lecun"]
"""First weights of the layers of a tokenizer; see `initialise_layers`."""

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class Autoencoder(nn.Module, ABC):
    """Encode images to a grid of latents, and decode them; the tokenizer puts its quantizer between the two.

    A tokenizer builds its network by a call with two integers: `code_dim`, the width of what the decoder takes, and
    `latent_dim`, the width of what the encoder gives. They differ where the bottleneck narrows, as a KL one does.
    """

    image_channels: int = 3
    """C of the images: three unless a subclass says otherwise."""
    modality: Literal["image", "audio", "video"] = "image"
    """The kind of samples that it encodes: images, waveforms or clips of frames."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights: images and codes that come in another one are brought to it."""
        return self.last_layer.dtype

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """The weight that makes the pixels: an adaptive adversarial weight compares the gradients there."""

    @property
    def last_encoder_layer(self) -> Tensor:
        """The weight that makes the latents: an adaptive alignment loss compares the gradients there.

        Raises:
            ValueError: this network does not say which it is.
        """
        raise ValueError(
            f"a {type(self).__name__} does not say which layer of its encoder is the last: an alignment loss needs "
            "adaptive: false with it"
        )

    @abstractmethod
    def grid(self, image_size: ImageSize) -> tuple[int, ...]:
        """The latent grid of images of this size: the side of a square, or (H, W).

        Raises:
            ValueError: a size that the network cannot divide.
        """

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Encode images `(B, C, H, W)` in [-1, 1] to latents `(B, latent_dim, *grid)`.

        Raises:
            ValueError: a side that the network cannot divide.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode codes `(B, code_dim, *grid)` to images `(B, C, H, W)`, about [-1, 1] and not clamped."""

    def hidden_layers(self) -> Iterable[nn.Module]:
        """Give the modules whose linear layers are hidden ones, for optimizers that treat their weights as matrices.

        None by default.
        """
        return ()


@torch.no_grad()
def initialise_layers(module: nn.Module, kind: LayerInitialization | None) -> None:
    """Give the linear layers and convolutions of a new network or quantizer the weights that they begin with.

    - `"vaex"`: convolutions normal with deviation sqrt(2 / (n + m)) / 2, of n inputs and m outputs times the kernel's
      size (Xavier's with a gain of 0.5), linear layers normal with 0.02, biases 0: those of vaex, the single-scale
      tokenizer of VAR's authors (`models/__init__.py`).
    - `"lecun"`: normal with deviation 1 / sqrt(n), n the inputs of an output, biases 0 (LeCun et al., "Efficient
      BackProp", 1998): what a linear network is given it passes on at its size. PyTorch's own weights make it 1.7 times
      smaller in each layer; a deep network without norms then begins with what its biases say, and leaves that slowly.

    Args:
        module: changed in place.
        kind: the scheme; None leaves the weights as they are.

    Raises:
        ValueError: a scheme that is not known.
    """
    if kind is None:
        return
    if kind not in get_args(LayerInitialization):
        raise ValueError(f"initialization={kind!r} is not known, accepted: {', '.join(get_args(LayerInitialization))}")
    for layer in module.modules():
        if not isinstance(layer, nn.Linear | _Convolution):
            continue
        weight = torch.empty_like(layer.weight)
        (_fill_lecun if kind == "lecun" else _fill_vaex)(weight, layer)
        if is_parametrized(layer, "weight"):  # computed of others, as by weight_norm: assigning sets these
            layer.weight = weight  # type: ignore[assignment]
        else:
            layer.weight.copy_(weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _fill_vaex(weight: Tensor, layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.normal_(weight, std=0.02)
    else:
        nn.init.xavier_normal_(weight, gain=0.5)


def _fill_lecun(weight: Tensor, layer: nn.Module) -> None:
    inputs = float(weight[0].numel())
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        inputs = weight[:, 0].numel() / prod(layer.stride)  # the taps that a stride leaves of the kernel
    nn.init.normal_(weight, std=inputs**-0.5)
