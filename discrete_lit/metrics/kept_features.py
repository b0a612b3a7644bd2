"""The features of a set of images, kept: for measures that a sum over them cannot give.

`KeptFeatures` gathers them batch by batch and over ranks, in float16, in the order of the images' indices; `FeatureSet`
is what it gives, and what a reference of such a measure is. Measures over kept features are subclasses: those in one
`torchmetrics.MetricCollection` share what they keep.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discrete_lit.core.distributed import all_gather_rows, rank, world_size
from discrete_lit.core.files import Npz, atomic_write
from discrete_lit.metrics.binned_mean import SumsInFloat64
from discrete_lit.metrics.extractors import FeatureSource
from discrete_lit.metrics.moments import check_reference, check_width

NO_LABEL = -1
"""The label of an image without a class."""


class FeatureSet:
    """Features of a set of images, and what they are of.

    A plain class, like `Moments`.

    Args:
        features: `(n, D)`, of any floating type.
        labels: `(n,)` int64, -1 for an image without a class; None for a set without labels.
        extractor: name of the network; None where it is not known, like the next one.
        weights_sha256: hash of its weights.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        *,
        extractor: str | None = None,
        weights_sha256: str | None = None,
    ) -> None:
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(
                f"features must be (n, D) of a floating type, got {features.dtype} {tuple(features.shape)}"
            )
        if labels is not None and labels.shape != features.shape[:1]:
            raise ValueError(f"{len(features):,} features need as many labels, got {tuple(labels.shape)}")
        self.features = features
        self.labels = labels
        self.extractor = extractor
        self.weights_sha256 = weights_sha256

    def __len__(self) -> int:
        return len(self.features)

    @property
    def dim(self) -> int:
        return self.features.shape[1]

    def save(self, path: str | Path) -> None:
        """Write an npz, whole or not at all: `features` as they are, `labels`, `extractor` and `weights_sha256`."""
        labels = {} if self.labels is None else {"labels": self.labels.cpu().numpy()}
        known = {
            key: np.asarray(value)
            for key in ("extractor", "weights_sha256")
            if (value := getattr(self, key)) is not None
        }
        with atomic_write(path) as file:
            np.savez(file, allow_pickle=False, features=self.features.cpu().numpy(), **labels, **known)

    @staticmethod
    def load(path: str | Path, extractor: FeatureSource | None = None) -> FeatureSet:
        """Read what `save` wrote.

        Args:
            path: the file.
            extractor: whose features they must be; any by default.

        Raises:
            ValueError: a file that cannot be read, or does not hold finite features, or ones of another extractor.
        """
        name = repr(os.fspath(path))
        with Npz(path) as file:
            if "features" not in file.headers:
                raise ValueError(f"{name} holds {sorted(file.headers)}; a file of features holds 'features' (n, D)")
            header = file.headers["features"]
            if len(header.shape) != 2 or header.dtype.kind != "f":
                raise ValueError(f"{name}: its features are {header.dtype} {header.shape}, they must be floats (n, D)")
            labels = torch.from_numpy(file.read("labels").astype(np.int64)) if "labels" in file.headers else None
            known = {key: str(file.read(key)) for key in ("extractor", "weights_sha256") if key in file.headers}
            found = FeatureSet(torch.from_numpy(file.read("features")), labels, **known)
        finite(found.features, name)
        if extractor is not None:
            check_reference(extractor, found, name)
        return found


def finite(features: Tensor, what: str = "features") -> Tensor:
    """Refuse features that are not finite, and give others back.

    Raises:
        ValueError: how many are not finite; the extractor gave them, or they are beyond the 65,504 of float16.
    """
    if broken := int((~features.isfinite()).any(dim=1).sum()):
        reason = " (float16 ends at 65,504: keep float32)" if features.dtype == torch.float16 else ""
        raise ValueError(f"{what}: {broken:,} of {len(features):,} are not finite and have no distances{reason}")
    return features


class KeptFeatures(SumsInFloat64):
    """Keep the features of images, over all batches and ranks.

    They lie on the CPU until `.to(device)`: 50,000 features of width 2,048 take 205 MB in float16. Whatever the ranks
    and batches are, the result is in the order of the images' indices, so that a subset drawn by a seed is the same.

    Args:
        extractor: where the features come from: gives their width D, and the name in what is saved. Only read.
        dtype: in which they are kept. Float16 keeps 11 bits of each number.
    """

    features: list[Tensor]
    labels: list[Tensor]
    indices: list[Tensor]

    def __init__(self, extractor: FeatureSource, *, dtype: torch.dtype = torch.float16) -> None:
        # `kept` gathers: torchmetrics cannot where a rank has seen no image.
        super().__init__(sync_on_compute=False)
        self.part = extractor.part
        self.dim = extractor.dim
        self.extractor_name = extractor.name
        self.weights_sha256 = extractor.weights_sha256
        self.feature_dtype = dtype
        for name in ("features", "labels", "indices"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, features: Tensor, labels: Tensor | None = None, *, indices: Tensor | None = None) -> None:
        """Add features of a batch.

        Args:
            features: `(B, D)`.
            labels: `(B,)` in [0, K), or -1; needed by measures of each class.
            indices: `(B,)` int64, which of all images these are. By default the images of rank r of W are r, r + W,
                r + 2W, ..., as `DistributedSampler` deals them out.
        """
        check_width(features, self.dim, self.extractor_name)
        count = len(features)
        if indices is None:
            seen = sum(map(len, self.indices))
            indices = torch.arange(seen, seen + count) * world_size() + rank()
        if labels is None:
            labels = torch.full((count,), NO_LABEL)
        self.features.append(features.detach().to(self.device, self.feature_dtype))
        self.labels.append(labels.to(self.device, torch.int64))
        self.indices.append(indices.to(self.device, torch.int64))

    def kept(self) -> FeatureSet:
        """Gather the features of all ranks, in the order of their indices; every rank has to call it.

        Raises:
            ValueError: features that are not finite.
        """
        # A rank without images has none of the width and type; the others wait for it.
        no_features = torch.zeros(0, self.dim, dtype=self.feature_dtype, device=self.device)
        no_integers = torch.zeros(0, dtype=torch.int64, device=self.device)
        features = all_gather_rows(torch.cat([no_features, *self.features]))
        labels = all_gather_rows(torch.cat([no_integers, *self.labels]))
        indices = all_gather_rows(torch.cat([no_integers, *self.indices]))
        order = indices.argsort(stable=True)
        return FeatureSet(
            finite(features[order]), labels[order], extractor=self.extractor_name, weights_sha256=self.weights_sha256
        )

    def compute(self) -> Any:
        """The `FeatureSet` so far, of all ranks."""
        return self.kept()
