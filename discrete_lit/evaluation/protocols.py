"""Protocols by name: what a published number is of, and the refusal of inputs that would make it another number.

Most disputes about a distance are mix-ups of the reference, the crop, the resize or the count. A protocol fixes all of
them, and its name stands over the column of the report in place of the metric's:

- `gfid_adm50k`: FID of 50,000 samples against the statistics of ADM's reference file (Dhariwal & Nichol 2021), with
  sFID, the Inception Score, and precision and recall against the file's images.
- `rfid_val50k`: FID of the reconstructions of the 50,000 validation images against the same crops of these images.
- `fd_dinov2`: distance of 50,000 samples over the features of DINOv2 (Stein et al. 2023).
- `fd_efficientnet`: distance over the features of EfficientNet-Lite0, which need no download; it is no FID.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from discrete_lit.core.files import Npz
from discrete_lit.core.images import ImageSize, height_and_width, size_text
from discrete_lit.evaluation.compared_images import NO_CLASS, Selection
from discrete_lit.evaluation.image_sets import ImageSet
from discrete_lit.metrics.extractors import DINOv2, EfficientNetLite0, FeatureExtractor, InceptionV3

ProtocolName = Literal["gfid_adm50k", "rfid_val50k", "fd_dinov2", "fd_efficientnet"]

ADM_ARRAYS = ("arr_0", "mu", "mu_s", "sigma", "sigma_s")
"""The arrays of a reference file of ADM: 10,000 images, and moments of all training images, pooled and spatial."""

CROP = "ADM's centre crop of image files (box filter by halves, then bicubic); arrays of images as they are"
QUANTISATION = "clamp to [-1, 1], round to 8 bits"


@dataclass(frozen=True, kw_only=True)
class EvaluationInputs:
    """The inputs that a protocol looks at, opened and not yet measured."""

    extractor: FeatureExtractor
    reference: str
    reference_images: ImageSet | None
    """None of a file of moments."""
    held_out: ImageSet | None
    samples: tuple[str, ...]
    """Names of the rows of samples."""
    reconstructions: tuple[str, ...]
    count: int | None
    """Images of a row."""
    sizes: dict[str, int]
    """Images of each set of samples."""
    num_reference: int | None
    image_size: ImageSize
    image_channels: int
    apply_exif: bool


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """One way to make a number that others make too."""

    name: str
    extractor: type[FeatureExtractor]
    metric: str
    """The name of the extractor's metric: `FID` and `FD-DINOv2` with the published weights alone."""
    rows: Literal["samples", "reconstructions", "both"]
    count: int | None
    """Images of a row; None where any number goes, all rows alike."""
    reference: Literal["adm", "held_out", "known"]
    """A file of ADM; the held-out images themselves; or images, or moments that say which network made them."""

    def default_extractor(self) -> FeatureExtractor:
        """Build the protocol's extractor, with its published weights.

        Raises:
            ValueError: they are not there.
        """
        return self.extractor()

    def check(self, given: EvaluationInputs) -> None:
        """Refuse inputs that do not meet the protocol.

        Raises:
            ValueError: names the protocol, and what differs.
        """
        extractor = given.extractor
        if extractor.metric_name != self.metric:
            self._refuse(
                f"its extractor is {self.extractor.__name__}, whose distance is called {self.metric}; extractor gives "
                f"{extractor.metric_name} (weights {extractor.weights_sha256[:16]})"
            )
        if given.image_channels != 3 and self.metric == "FID":
            self._refuse(f"it is of colour images, image_channels is {given.image_channels}")
        if given.apply_exif and self.metric == "FID":
            self._refuse("image files are read as they are stored, apply_exif turns them")
        if self.rows == "samples" and given.reconstructions:
            self._refuse(f"it is of samples, {given.reconstructions[0]!r} is of reconstructions: see rfid_val50k")
        if self.rows == "reconstructions" and given.samples:
            self._refuse(f"it is of reconstructions, {given.samples[0]!r} is of samples: see gfid_adm50k")
        if self.count is not None and given.count != self.count:
            self._refuse(f"it is of {self.count:,} images a row, num_images is {given.count or 0:,}")
        if small := {name: size for name, size in given.sizes.items() if size < (self.count or 0)}:
            name, size = next(iter(small.items()))
            self._refuse(f"it is of {self.count:,} images a row, {name} has {size:,}")
        {"adm": self._check_adm, "held_out": self._check_held_out, "known": self._check_known}[self.reference](given)

    def _check_adm(self, given: EvaluationInputs) -> None:
        if given.reference_images is not None:
            self._refuse(
                f"its reference is ADM's file of the statistics of all training images, reference={given.reference!r} "
                "is of images"
            )
        with Npz(given.reference) as file:
            missing = [name for name in ADM_ARRAYS if name not in file.headers]
            if missing:
                self._refuse(
                    f"reference={given.reference!r} has no {', '.join(missing)}; ADM's file of the data set holds "
                    f"{', '.join(ADM_ARRAYS)}"
                )
            shape = file.headers["arr_0"].shape
        if len(shape) != 4 or tuple(shape[1:3]) != height_and_width(given.image_size):
            self._refuse(
                f"the images of reference={given.reference!r} are {shape}, image_size is "
                f"{size_text(given.image_size)}: the statistics are of another crop"
            )

    def _check_held_out(self, given: EvaluationInputs) -> None:
        if given.reference_images is None:
            self._refuse(
                f"both sides are the same crops of one set, and moments do not say their crop: give the images of "
                f"{given.reference!r}"
            )
        if given.held_out is None:
            self._refuse("the validation images are its reference and what is reconstructed: give held_out too")
        assert given.reference_images is not None and given.held_out is not None
        counts = given.reference_images.count, given.num_reference or given.reference_images.count
        if counts != (self.count, self.count):
            self._refuse(
                f"its reference is all {self.count:,} validation images, reference={given.reference!r} has "
                f"{counts[0]:,}, num_reference takes {counts[1]:,}"
            )
        same = str(given.reference_images.path.resolve()) == str(given.held_out.path.resolve())
        if not same and given.reference_images.fingerprint() != given.held_out.fingerprint():
            self._refuse(
                f"both sides are the same images, reference={given.reference!r} and "
                f"held_out={str(given.held_out.path)!r} are not"
            )

    def _check_known(self, given: EvaluationInputs) -> None:
        if given.reference_images is not None:
            return
        with Npz(given.reference) as file:
            if "weights_sha256" not in file.headers:
                self._refuse(
                    f"reference={given.reference!r} does not say which network its moments are of: give images, or "
                    "moments that an evaluation here kept"
                )

    def _refuse(self, reason: str) -> None:
        raise ValueError(f"protocol={self.name}: {reason}")


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        EvaluationProtocol(
            name="gfid_adm50k", extractor=InceptionV3, metric="FID", rows="samples", count=50_000, reference="adm"
        ),
        EvaluationProtocol(
            name="rfid_val50k",
            extractor=InceptionV3,
            metric="FID",
            rows="reconstructions",
            count=50_000,
            reference="held_out",
        ),
        EvaluationProtocol(
            name="fd_dinov2", extractor=DINOv2, metric="FD-DINOv2", rows="samples", count=50_000, reference="known"
        ),
        EvaluationProtocol(
            name="fd_efficientnet",
            extractor=EfficientNetLite0,
            metric="FD-EffNetLite0",
            rows="both",
            count=None,
            reference="known",
        ),
    )
}


def labels_of(selection: Selection, num_classes: int | None) -> str:
    """Say in words how the labels of samples that were measured are distributed: evenly, at random, or not at all."""
    if selection.images.num_classes is None:
        return "no labels"
    counts = {label: count for label, count in selection.by_class.items() if count}
    without = counts.pop(NO_CLASS, 0)
    if not counts:
        return "no class"
    classes = num_classes or len(counts)
    each = set(counts.values())
    if len(each) == 1 and len(counts) == classes and not without:
        return f"{each.pop():,} of each of {classes:,} classes"
    rest = f", {without:,} without a class" if without else ""
    return f"uneven: {min(each):,} to {max(each):,} of each of {len(counts):,} of {classes:,} classes{rest}"
