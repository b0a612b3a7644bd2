"""The DataModule of video clips in folders and shards: frames of one number and size, cut by keyed randomness."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from discrete_lit.core.images import clip_size
from discrete_lit.core.random import augmentation_uniforms
from discrete_lit.data.captions import Captions
from discrete_lit.data.clips import Clips, clip_uniform
from discrete_lit.data.image_batches import EvaluationCrops, LabelledSample, SamplePipeline, label_batch, pixels_of
from discrete_lit.data.loaders import BadSample, Batch, BatchSource
from discrete_lit.data.media import VIDEOS
from discrete_lit.data.transforms import MODES, center_crop, mirrored, random_crop
from discrete_lit.data.video_files import read_frames


@dataclass(frozen=True)
class VideoPipeline(SamplePipeline):
    """Decoding and cropping of clips in time and space; every frame of a clip is cut alike.

    Args:
        image_size: of what comes out: frames, height, width.
        seed: decides the crops.
        image_channels: C: 1 for grey, 3 for RGB, 4 for RGBA.
        frame_rate: see `VideoClips`.
        crop: `"random"` or `"center"`.
        minimum_crop, maximum_crop: see `transforms.random_crop`.
        flip: mirror half of the training clips.
    """

    image_size: tuple[int, int, int]
    seed: int
    _: KW_ONLY
    image_channels: int
    frame_rate: float | None
    crop: Literal["random", "center"]
    minimum_crop: float
    maximum_crop: float
    flip: bool

    def __post_init__(self) -> None:
        if self.image_channels not in MODES:
            raise ValueError(f"image_channels is {self.image_channels}; it must be 1 (grey), 3 (RGB) or 4 (RGBA)")
        if self.frame_rate is not None and not 0 < self.frame_rate <= 1000:
            raise ValueError(f"frame_rate is {self.frame_rate}; it must be in (0, 1000], or null for every frame")
        if self.crop not in ("random", "center"):
            raise ValueError(f"crop {self.crop!r} is not known; of clips it is 'random' or 'center'")
        if not 0 < self.minimum_crop <= self.maximum_crop <= 1:
            raise ValueError(
                f"minimum_crop is {self.minimum_crop} and maximum_crop {self.maximum_crop}; they must rise in (0, 1]"
            )

    def training(self, data: bytes, epoch: int, key: str) -> np.ndarray:
        """Decode and cut a clip: uint8 `(T, H, W, C)`, the same for the same (seed, epoch, key)."""
        randomness = augmentation_uniforms(self.seed, epoch, key)
        if self.crop == "random":
            cut = partial(
                random_crop,
                size=self.image_size[1:],
                randomness=randomness,
                minimum_crop=self.minimum_crop,
                maximum_crop=self.maximum_crop,
                flip=False,
            )
        else:
            cut = partial(center_crop, size=self.image_size[1:])
        clip = self._clip(data, clip_uniform(self.seed, epoch, key), cut)
        return mirrored(clip) if self.flip and randomness[3] < 0.5 else clip

    def evaluation(self, data: bytes, crops: EvaluationCrops) -> np.ndarray:
        """Decode a clip and cut out its middle in time and space: uint8 `(T, H, W, C)`."""
        return self._clip(data, None, partial(center_crop, size=self.image_size[1:]))

    def evaluation_settings(self) -> dict[str, Any]:
        return {"frame_rate": self.frame_rate}

    def batch(self, samples: Sequence[LabelledSample]) -> Batch:
        """Make a batch: `{"video": uint8 (B, C, T, H, W) in 0..255, ...}`, the rest as `label_batch` says."""
        clips = pixels_of(samples, (*self.image_size, self.image_channels))
        return {"video": clips.movedim(-1, 1), **label_batch(samples)}

    def _clip(self, data: bytes, uniform: float | None, cut: partial[np.ndarray]) -> np.ndarray:
        frames = read_frames(
            data,
            self.image_size[0],
            frame_rate=self.frame_rate,
            uniform=uniform,
            image_channels=self.image_channels,
        )
        return np.stack([cut(frame) for frame in frames])


class VideoClips(Clips):
    """Batches of clips, `{"video": uint8 (B, C, T, H, W), "label": (B,), "key", "index"}`, of a folder or shards.

    Files are GIFs (read by Pillow) and MP4, MOV, WebM, MKV and AVI (by PyAV: `pip install 'discrete-lit[video]'`). A
    folder is `<folder>/<class>/**/<clip>`, or clips alone; shards are those of `ImageShards`, with clips in place of
    images. Order, resume, captions and bad samples are as there.

    Of each file, training takes T consecutive frames that begin anywhere, and a part of them; evaluation takes the
    middle of both. A shorter file is a bad sample, as is one whose frames are not evenly spaced where no `frame_rate`
    is given.

    Args:
        train: folder or shards of training clips; None where only the other split is used.
        validation: the same of validation.
        image_size: of the clips that come out: `[frames, height, width]`.
        batch_size: clips of a batch on each rank.
        num_workers: processes that decode; 0 decodes in the training process.
        seed: decides the order and the crops.
        frame_rate: frames a second: of each file, the frames that are shown at so many instants a second. By default
            every frame is taken, at whatever rate it comes.
        image_share: fraction of the training batches that are images, one frame of each of their clips, under
            `"image" (B, C, H, W)`: MAGVIT-v2 trains on both. A tokenizer with a causal time takes them.
        crop: `random` resizes the shorter side and cuts out a random rectangle, `center` is the crop of evaluation.
        minimum_crop, maximum_crop: smallest and largest fraction of the shorter side that a random crop covers.
        flip: mirror half of the training clips.
        image_channels: 1 for grey, 3 for RGB, 4 for RGBA.
        max_bad_fraction: fraction of an epoch's clips that may be unreadable before the run fails.
        labels: False reads every clip below a folder, at any depth, without a label.
        captions: where the captions are, see `captions.Captions`; by default none are read.
        shuffle_window: of shards, see `ImageShards`; a worker holds about that many files in memory.
        train_count, validation_count: of shards behind a URL without a manifest, see `ImageShards`.
        num_classes: of shards without a manifest, see `ImageShards`.
        persistent_workers: keep the processes between epochs.

    Raises:
        ValueError: a setting is out of range; else as `Clips`.
    """

    modality = "video"

    def __init__(
        self,
        train: str | list[str] | None,
        validation: str | list[str] | None = None,
        *,
        image_size: tuple[int, int, int],
        batch_size: int,
        num_workers: int = 2,
        seed: int = 0,
        frame_rate: float | None = None,
        image_share: float = 0.0,
        crop: Literal["random", "center"] = "random",
        minimum_crop: float = 1.0,
        maximum_crop: float = 1.0,
        flip: bool = False,
        image_channels: int = 3,
        max_bad_fraction: float = 0.01,
        labels: bool = True,
        captions: Captions | None = None,
        shuffle_window: int = 100,
        train_count: int | list[int] | None = None,
        validation_count: int | list[int] | None = None,
        num_classes: int | None = None,
        persistent_workers: bool = False,
    ) -> None:
        if not 0 <= image_share <= 1:
            raise ValueError(f"image_share is {image_share}; it must be in [0, 1]")
        pipeline = VideoPipeline(
            clip_size(image_size),
            seed,
            image_channels=image_channels,
            frame_rate=frame_rate,
            crop=crop,
            minimum_crop=minimum_crop,
            maximum_crop=maximum_crop,
            flip=flip,
        )
        super().__init__(
            pipeline,
            VIDEOS,
            train=train,
            validation=validation,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            max_bad_fraction=max_bad_fraction,
            labels=labels,
            captions=captions,
            shuffle_window=shuffle_window,
            train_count=train_count,
            validation_count=validation_count,
            num_classes=num_classes,
            persistent_workers=persistent_workers,
        )
        self.image_size = pipeline.image_size
        self.image_channels = image_channels
        self.image_share = image_share

    def training_source(self, rank: int, world_size: int) -> BatchSource:
        source = super().training_source(rank, world_size)
        return ImagesBetweenClips(source, self.image_share, seed=self.seed) if self.image_share else source


class ImagesBetweenClips:
    """Make images of a fraction of the batches of clips: of each clip one of its frames.

    Which batches, decides (seed, epoch, number of the batch), on all ranks alike; which frame, (seed, epoch, key).

    Args:
        source: of batches with `"video"`.
        share: the fraction, in [0, 1].
        seed: decides both.
    """

    def __init__(self, source: BatchSource, share: float, *, seed: int) -> None:
        self.source, self.share, self.seed = source, share, seed
        self.batches = source.batches
        self.samples = source.samples
        self.samples_per_step = source.samples_per_step

    def batch(self, epoch: int, number: int) -> tuple[Batch, list[BadSample]]:
        batch, bad = self.source.batch(epoch, number)
        if augmentation_uniforms(self.seed, epoch, f"images of batch {number}")[0] >= self.share:
            return batch, bad
        clips = batch.pop("video")
        drawn = [augmentation_uniforms(self.seed, epoch, f"frame of {key}")[0] for key in batch["key"]]
        frames = torch.tensor([int(uniform * clips.shape[2]) for uniform in drawn], dtype=torch.int64)
        images = clips[torch.arange(len(clips)), :, frames]
        return {"image": images.contiguous(), **batch}, bad

    def identity(self) -> Mapping[str, int | str]:
        return {**self.source.identity(), "image_share": str(self.share)}

    def layout(self) -> Mapping[str, int]:
        return self.source.layout()

    def follow(self, layout: Mapping[str, int]) -> None:
        self.source.follow(layout)
