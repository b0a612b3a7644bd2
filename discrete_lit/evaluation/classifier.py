"""A small image classifier, for the label accuracy of samples: the fraction that show the class that was asked for."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.distributed import logged_batch_size
from discrete_lit.core.files import file_sha256
from discrete_lit.core.images import check_channels, frames_of, from_uint8, size_of, size_text
from discrete_lit.metrics.extractors import FeatureExtractor
from discrete_lit.optimization import configure_optimizers, evaluation_stage

PLAIN_CHANNELS = (16, 32, 64, 128)


class ImageClassifier(LightningModule):
    """Classify images by convolutions with batch norm, a mean over positions, and a linear layer, or by any network.

    There is one convolution for each entry of `channels`, and each halves the image. Of a batch of clips it learns
    every frame by itself, as an image of the clip's class. Logs `train/loss` (cross-entropy
    in nats), `validation/loss` and `validation/accuracy` (fraction in [0, 1]), in a test `test/loss` and
    `test/accuracy`.

    Args:
        num_classes: K.
        channels: width of each stage; n stages need images of at least 2^n pixels. By default (16, 32, 64, 128).
        network: timm's name of another network, such as `resnet18`, which is trained from random weights; it says what
            sizes of images it takes.
        image_channels: C of the images.
        dropout: probability that a pooled feature is dropped in training.
        optimizer: from parameters to an optimizer; needed to train.
        scheduler: from an optimizer to a scheduler, stepped after every batch.

    Raises:
        ValueError: `network` is none of timm's, or `channels` are given besides it.
    """

    def __init__(
        self,
        num_classes: int,
        channels: tuple[int, ...] | None = None,
        *,
        network: str | None = None,
        image_channels: int = 3,
        dropout: float = 0.1,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.num_classes = num_classes
        self.image_channels = image_channels
        if network is None:
            made = _plain_network(num_classes, channels or PLAIN_CHANNELS, image_channels, dropout)
            # Behind the first convolution there must be a pixel left for each halving.
            self.smallest = 2 ** len(channels or PLAIN_CHANNELS) - 1
        elif channels is not None:
            raise ValueError(
                f"channels={channels} are those of the plain network, network={network!r} is another: give one of both"
            )
        else:
            made, self.smallest = _timm_network(network, num_classes, image_channels, dropout), 1
        self.network = made.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Compute float32 logits `(B, num_classes)` of images `(B, C, H, W)` in [-1, 1]."""
        return self.network(self._checked(images)).float()

    def features(self, images: Tensor) -> Tensor:
        """Compute what the last layer reads, `(B, feature_dim)`, of images `(B, C, H, W)` in [-1, 1]."""
        images, made = self._checked(images), self.network
        if isinstance(made, nn.Sequential):
            return made[:-1](images)
        network: Any = made
        return network.forward_head(network.forward_features(images), pre_logits=True)

    @property
    def feature_dim(self) -> int:
        """Width of what the last layer reads."""
        made: Any = self.network
        last: Any = made[-1] if isinstance(made, nn.Sequential) else made.get_classifier()
        return int(last.in_features)

    def _checked(self, images: Tensor) -> Tensor:
        check_channels(images, self.image_channels, "this ImageClassifier")
        if min(images.shape[-2:]) < self.smallest:
            raise ValueError(
                f"this ImageClassifier halves images too often for {size_text(size_of(images))} pixels: give "
                "it fewer channels, one for each halving"
            )
        return images.contiguous(memory_format=torch.channels_last)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images, labels = _images_of(batch)
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images, labels = _images_of(batch)
        logits = self(images)
        correct = (logits.argmax(1) == labels).float().mean()
        stage = evaluation_stage(self)
        terms = {f"{stage}/loss": F.cross_entropy(logits, labels), f"{stage}/accuracy": correct}
        self.log_dict(terms, prog_bar=True, sync_dist=True, batch_size=logged_batch_size(len(logits)))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measure what validation does, and log it under `test/`."""
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.optimizer, self.scheduler)


def _images_of(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Give the images of a batch with their labels; of clips, all frames."""
    if "image" in batch:
        return batch["image"], batch["label"]
    return frames_of(batch["video"]), batch["label"].repeat_interleave(batch["video"].shape[2])


def _plain_network(num_classes: int, channels: tuple[int, ...], image_channels: int, dropout: float) -> nn.Module:
    stages = [nn.Conv2d(image_channels, channels[0], 3, stride=2, padding=1, bias=False), *_normalized(channels[0])]
    for width_in, width_out in pairwise(channels):
        stages += [nn.Conv2d(width_in, width_out, 3, padding=1, bias=False), *_normalized(width_out)]
        stages += [nn.MaxPool2d(2)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels[-1], num_classes))
    return nn.Sequential(*stages, *head)


def _timm_network(name: str, num_classes: int, image_channels: int, dropout: float) -> nn.Module:
    from timm.models import create_model, is_model

    # A name that timm itself registered: others are addresses, which create_model would fetch and load.
    if not is_model(name):
        raise ValueError(f"network={name!r} is not a network of timm, such as resnet18: see timm.list_models()")
    return create_model(name, pretrained=False, num_classes=num_classes, in_chans=image_channels, drop_rate=dropout)


def _normalized(width: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


class ClassifierFeatures(FeatureExtractor):
    """Extract the pooled features of a classifier that was trained here: what its last layer reads.

    The distance over them is `FD-classifier-<first digits of the checkpoint's SHA-256>`: it compares sets measured by
    the same checkpoint, and nothing else.

    Args:
        checkpoint: of an `ImageClassifier`; images that are measured have at least its smallest size.

    Raises:
        ValueError: no such file, or none of an ImageClassifier.
    """

    protocol = "float32 pixels in [-1, 1], not resized"

    def __init__(self, checkpoint: str) -> None:
        super().__init__()
        classifier = load_classifier(checkpoint)
        self.weights_sha256 = file_sha256(Path(checkpoint).expanduser())
        self.name = f"classifier-{self.weights_sha256[:8]}"
        self.classifier = classifier.requires_grad_(False)
        self.dim = classifier.feature_dim

    def extract(self, images: Tensor) -> Tensor:
        # Grey ones come with three equal channels.
        return self.classifier.features(from_uint8(images[:, : self.classifier.image_channels]))


def load_classifier(path: str | Path) -> ImageClassifier:
    """Load the classifier of a checkpoint of `discrete-lit fit`, on the CPU, in eval mode; the file alone is enough.

    Raises:
        ValueError: no such file, a truncated one, or one that holds no ImageClassifier.
    """
    from discrete_lit.checkpoints import load_weights, read_checkpoint, rebuild

    checkpoint = read_checkpoint(path)
    try:
        module = rebuild(checkpoint, path, ImageClassifier)
        load_weights(module, checkpoint, path)
    except ValueError as error:
        raise ValueError(f"classifier={str(path)!r} holds no usable ImageClassifier: {error}") from error
    assert isinstance(module, ImageClassifier)
    return module.eval()
