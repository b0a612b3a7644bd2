"""`discrete-lit evaluate_video`: sets of clips against real ones, to a report."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discrete_lit.checkpoints import load
from discrete_lit.cli.clip_sets import check_splits, count_clips, real_clips, write_report
from discrete_lit.cli.devices import make_fabric
from discrete_lit.core.files import Npz, file_sha256
from discrete_lit.core.images import from_uint8, to_uint8
from discrete_lit.core.provenance import environment
from discrete_lit.data.data_module import Split
from discrete_lit.data.video_clips import VideoClips
from discrete_lit.evaluation.classifier import ImageClassifier, load_classifier
from discrete_lit.evaluation.clip_measures import ClipFeatureSource, ClipInstruments, ClipMeter, markdown
from discrete_lit.metrics.extractors import EfficientNetLite0, FeatureExtractor
from discrete_lit.metrics.i3d import I3D, LEAST_FRAMES
from discrete_lit.metrics.moments import FeatureMoments
from discrete_lit.metrics.video import ClipFeatures
from discrete_lit.tokenizers import Tokenizer, freeze
from discrete_lit.tokenizers.losses.perceptual import LPIPS


def evaluate_video(
    data: VideoClips,
    output: str,
    *,
    num_clips: int | None = None,
    num_reference: int | None = None,
    samples: dict[str, str] | None = None,
    reconstructions: dict[str, str] | None = None,
    continuations: dict[str, str] | None = None,
    extractor: FeatureExtractor | None = None,
    i3d_weights: str | None = None,
    classifier: str | None = None,
    lpips_weights: str | None = None,
    accelerator: str = "auto",
) -> dict[str, Any]:
    """Measure sets of clips at one count against the clips of training, and report them in one table.

    Each set is a row with a Fréchet distance of clips, `FD-<extractor>-clips` (see `ClipFeatures`), and FVD where I3D's
    weights are given; with a classifier, the fraction that show their class. Rows of reconstructions and continuations
    have PSNR, SSIM and LPIPS by frame too, and the error of what moves. The first row is the real clips of validation,
    the floor of the distances. Writes `report.json` and `report.md` into `output`, and prints the table.

    Args:
        data: of clips: `train` is the reference; clips of `validation` are reconstructed and continued.
        output: folder of the report.
        num_clips: of each row, the first ones; as many as validation has by default. A distance depends on it.
        num_reference: clips of the reference, the first ones; all by default.
        samples: name in the table to the `samples.npz` of `discrete-lit sample`.
        reconstructions: name in the table to the checkpoint of a tokenizer of clips.
        continuations: name in the table to the `samples.npz` that `discrete-lit sample` drew with `known` on the tokens
            of the same validation clips: sample i is compared with clip i.
        extractor: of features of single frames; EfficientNetLite0 by default.
        i3d_weights: I3D's file in the layout of pytorch-i3d, `rgb_imagenet.pt`, for FVD; clips of nine frames or more.
        classifier: checkpoint of an `ImageClassifier` of single frames, such as one trained with `image_share: 1.0`.
        lpips_weights: VGG-16's weights (torchvision's `vgg16-397923af.pth`), to measure LPIPS by frame.
        accelerator: Lightning's; `auto` takes a GPU where there is one.

    Returns:
        What `report.json` holds.

    Raises:
        ValueError: no row, a split that is missing, a set that is too small or of another size, a checkpoint of another
            kind, or clips that are too short for I3D or too small for LPIPS.
    """
    if not (samples or reconstructions or continuations):
        raise ValueError("there is nothing to measure: give samples, reconstructions or continuations")
    check_splits(data)
    if i3d_weights is not None and data.image_size[0] < LEAST_FRAMES:
        raise ValueError(f"i3d_weights need clips of at least {LEAST_FRAMES} frames, these have {data.image_size[0]}")
    count = count_clips(data, "validation", asked=num_clips, setting="num_clips")
    of_reference = count_clips(data, "train", asked=num_reference, setting="num_reference")
    device = make_fabric(accelerator).device
    of_files = {**(samples or {}), **(continuations or {})}
    drawn = {name: ClipFile(path, name, data=data, count=count) for name, path in of_files.items()}
    asked = [name for each in (samples, reconstructions, continuations) for name in each or {}]
    if len(set(asked)) < len(asked):
        raise ValueError("two rows of the table have the same name")
    tokenizers = {name: _tokenizer(path, data) for name, path in (reconstructions or {}).items()}
    judge = None if classifier is None else _classifier(classifier, data).to(device)
    images = (extractor or EfficientNetLite0()).to(device)
    extractors: list[ClipFeatureSource] = [ClipFeatures(images)]
    if i3d_weights is not None:
        extractors.append(I3D(i3d_weights).to(device))
    lpips = None
    if lpips_weights is not None:
        lpips = LPIPS(lpips_weights)
        lpips.prepare()
        lpips.check_size(data.image_size[1:])
        lpips = lpips.to(device)

    moments = [FeatureMoments(each) for each in extractors]
    for clips, _ in _real(data, "train", of_reference):
        for each, sums in zip(extractors, moments, strict=True):
            sums.update(each(clips.to(device)))
    instruments = ClipInstruments(
        extractors,
        references=[sums.compute() for sums in moments],
        reference_name=str(data.locations["train"]),
        frames=data.image_size[0],
        classifier=judge,
        lpips=lpips,
        device=device,
    )
    meters = [ClipMeter(instruments, "real clips", kind="real")]
    for name, tokenizer in tokenizers.items():
        meters.append(ClipMeter(instruments, name, kind="reconstructions", vocab_size=tokenizer.vocab_size))
    continued = {name: drawn[name].batches(data.batch_size) for name in continuations or {}}
    meters += [ClipMeter(instruments, name, kind="continuations") for name in continued]
    for clips, labels in _real(data, "validation", count):
        meters[0].update(clips, labels)
        for meter in meters[1:]:
            if meter.kind == "continuations":
                made, shown = next(continued[meter.name])
                meter.update(made, shown, originals=clips)
                continue
            tokenizer = tokenizers[meter.name].to(device)
            with torch.no_grad():
                tokens = tokenizer.encode(from_uint8(clips.to(device)))
                made = to_uint8(tokenizer.decode(tokens))
            meter.update(made, labels, originals=clips, tokens=tokens)
    for name in samples or {}:
        meters.append(ClipMeter(instruments, name, kind="samples"))
        for made, shown in drawn[name].batches(data.batch_size):
            meters[-1].update(made, shown)

    rows = [meter.row() for meter in meters]
    table = markdown(rows, reference_name=instruments.reference_name, reference_count=of_reference)
    report = {
        "rows": [row.to_dict() for row in rows],
        "reference": instruments.reference_name,
        "reference_count": of_reference,
        "image_size": list(data.image_size),
        "files": {
            name: file_sha256(path)
            for name, path in {**of_files, **(reconstructions or {}), "classifier": classifier}.items()
            if path is not None
        },
        **environment(device),
    }
    write_report(output, report, table)
    return report


def _real(data: VideoClips, split: Split, count: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Read the first clips of a split: uint8 `(B, C, T, H, W)` and labels `(B,)`."""
    for batch in real_clips(data, split, count):
        yield batch["video"], batch["label"] if data.num_classes else None


class ClipFile:
    """The clips that `discrete-lit sample` wrote: uint8 `arr_0` (N, T, H, W, C), and `labels`.

    Args:
        path: of the `.npz`.
        name: of the set, for messages.
        data: that says the size of the clips.
        count: how many are read.

    Raises:
        ValueError: no such file, or of fewer clips, or of another size.
    """

    def __init__(self, path: str, name: str, *, data: VideoClips, count: int) -> None:
        self.path, self.count = Path(path).expanduser(), count
        if not self.path.is_file():
            raise ValueError(f"{name}: {path!r} does not exist; `discrete-lit sample` writes samples.npz")
        with Npz(self.path) as file:
            header = file.headers.get("arr_0")
            labels = file.read("labels") if "labels" in file.headers else None
        expected = (*data.image_size, data.image_channels)
        if header is None or header.dtype != np.uint8 or header.shape[1:] != expected:
            raise ValueError(
                f"{name}: {path!r} must hold uint8 clips arr_0 (N, {', '.join(map(str, expected))}), got "
                f"{'none' if header is None else f'{header.dtype} {header.shape}'}"
            )
        shape = header.shape
        if shape[0] < count:
            raise ValueError(f"{name}: {path!r} has {shape[0]:,} clips, {count:,} are measured: set num_clips")
        self.labels = None if labels is None or not data.num_classes else torch.from_numpy(labels.astype(np.int64))

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Read them: uint8 `(B, C, T, H, W)` and labels `(B,)`."""
        with Npz(self.path) as file:
            rows, first = islice(file.rows("arr_0"), self.count), 0
            while batch := list(islice(rows, size)):
                labels = None if self.labels is None else self.labels[first : first + len(batch)]
                yield torch.from_numpy(np.stack(batch)).movedim(-1, 1).contiguous(), labels
                first += len(batch)


def _tokenizer(path: str, data: VideoClips) -> Tokenizer:
    tokenizer = load(path)
    if not isinstance(tokenizer, Tokenizer) or tokenizer.modality != "video":
        raise ValueError(f"reconstructions={path!r} holds a {type(tokenizer).__name__} that is no tokenizer of clips")
    channels = getattr(tokenizer, "image_channels", data.image_channels)
    if channels != data.image_channels:
        raise ValueError(
            f"reconstructions={path!r} takes clips of {channels} channels: set data.init_args.image_channels to that, "
            f"it is {data.image_channels}"
        )
    tokenizer.token_shape(data.image_size)
    return freeze(tokenizer)


def _classifier(path: str, data: VideoClips) -> ImageClassifier:
    classifier = load_classifier(path)
    if classifier.num_classes != data.num_classes or classifier.image_channels != data.image_channels:
        raise ValueError(
            f"classifier={path!r} tells {classifier.num_classes} classes of images of {classifier.image_channels} "
            f"channels, and the data have {data.num_classes} of {data.image_channels}"
        )
    return classifier
