"""Scores from the logits of a classifier: the Inception Score, and the fraction of images that show their class."""

from __future__ import annotations

import torch
from torch import Tensor

from discrete_lit.core.distributed import rank, world_size
from discrete_lit.metrics.binned_mean import SumsInFloat64
from discrete_lit.metrics.extractors import LOGITS, FeatureSource
from discrete_lit.metrics.moments import check_width


class InceptionScore(SumsInFloat64):
    """Measure the Inception Score (Salimans et al. 2016), exp of the mutual information of image and class.

        mean over s of exp( mean over x in s of KL(p(c|x) || p(c)) ),   p(c) the mean of p(c|x) over the split s

    The splits are consecutive in the images' indices, not permuted, as in ADM's evaluator: 10 of 5,000 images. So
    samples that are sorted by class score lower: each split has but a tenth of the classes. p(c|x) is the softmax of
    Inception's 1008 logits without their bias, as in ADM's evaluator and in torch-fidelity. `compute` gives
    `inception_score`, the mean over splits, and `inception_score_std`, the standard deviation (divided by their
    number). Only sums are kept: 80 kB for each ten splits.

    Args:
        extractor: where the logits come from, `inception.space("logits")`; only read.
        num_images: N, how many images there will be over all ranks: image i belongs to split i·splits // N.
        splits: their number.

    Raises:
        ValueError: features that are no logits; fewer images than splits; in `update`, an index beyond N; in `compute`,
            another number of images than N, or logits that are not finite.
    """

    count: Tensor
    probabilities: Tensor
    negative_entropy: Tensor

    def __init__(self, extractor: FeatureSource, num_images: int = 50_000, *, splits: int = 10) -> None:
        super().__init__()
        if extractor.part != LOGITS:
            raise ValueError(
                f"the Inception Score is taken over logits, {extractor.name} names {extractor.part!r} features: give "
                'inception.space("logits")'
            )
        if not 1 <= splits <= num_images:
            raise ValueError(f"splits={splits} must be at least 1 and at most num_images={num_images}")
        self.part = extractor.part
        self.extractor_name = extractor.name
        self.dim = extractor.dim
        self.num_images = num_images
        self.splits = splits
        self._seen = 0
        self.add_state("count", torch.zeros(splits, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("probabilities", torch.zeros(splits, self.dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("negative_entropy", torch.zeros(splits, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, *, indices: Tensor | None = None) -> None:
        """Add logits of a batch.

        Args:
            features: logits `(B, K)`.
            indices: `(B,)` int64 in [0, N), which of all images these are. By default those of rank r of W are r,
                r + W, r + 2W, ..., as `DistributedSampler` deals them out.
        """
        check_width(features, self.dim, self.extractor_name)
        if indices is None:
            indices = torch.arange(self._seen, self._seen + len(features)) * world_size() + rank()
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.num_images:
            raise ValueError(f"image {int(indices.max()):,} is none of num_images={self.num_images:,}")
        self._seen += len(features)
        log_probabilities = features.detach().to(self.count.device).double().log_softmax(1)
        probabilities = log_probabilities.exp()
        # Split s begins at floor(s N / splits).
        split = ((indices.to(self.count.device) + 1) * self.splits - 1) // self.num_images
        self.count.index_add_(0, split, torch.ones_like(split, dtype=torch.float64))
        self.probabilities.index_add_(0, split, probabilities)
        # 0 log 0 is 0.
        terms = torch.where(probabilities > 0, probabilities * log_probabilities, 0.0)
        self.negative_entropy.index_add_(0, split, terms.sum(1))

    def compute(self) -> dict[str, Tensor]:
        if int(self.count.sum()) != self.num_images:
            raise ValueError(
                f"the Inception Score of num_images={self.num_images:,} images was asked for, there were "
                f"{int(self.count.sum()):,}"
            )
        if not bool(self.probabilities.isfinite().all()):
            raise ValueError("logits that are not finite have no Inception Score")
        marginal = self.probabilities / self.count[:, None]
        entropy = -torch.special.xlogy(marginal, marginal).sum(1)
        scores = (self.negative_entropy / self.count + entropy).exp()
        return {"inception_score": scores.mean(), "inception_score_std": scores.std(correction=0)}

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self._seen = 0


class ClassAccuracy(SumsInFloat64):
    """Measure the fraction of images that show the intended class, according to a classifier, over batches and ranks.

    `compute` gives the fraction of all images, float64 in [0, 1], or that of each class.

    Args:
        num_classes: K.
        per_class: give `(K,)` float64, NaN for a class without images, instead.

    Raises:
        ValueError: in `update`, labels that are missing or none of K, logits of another shape or that are not finite;
            in `compute`, no image.
    """

    count: Tensor
    correct: Tensor

    def __init__(self, num_classes: int, *, per_class: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.per_class = per_class
        for name in ("count", "correct"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor | None = None) -> None:
        """Add logits `(B, K)` of images that should show the classes `labels` `(B,)`; label -1 counts for nothing."""
        check_width(logits, self.num_classes, "a classifier of as many classes")
        if labels is None:
            raise ValueError("the accuracy needs the labels that images were made for, which are missing")
        if not bool(logits.isfinite().all()):
            raise ValueError("logits that are not finite choose no class")
        labels = labels.to(logits.device)
        if len(labels) and int(labels.max()) >= self.num_classes:
            raise ValueError(f"label {int(labels.max())} is none of {self.num_classes} classes")
        known = labels >= 0
        hits = (logits.argmax(1) == labels)[known].to(self.count.device, torch.float64)
        labels = labels[known].to(self.count.device)
        self.count.index_add_(0, labels, torch.ones_like(hits))
        self.correct.index_add_(0, labels, hits)

    def compute(self) -> Tensor:
        if not bool(self.count.any()):
            raise ValueError("the accuracy of no labelled image was asked for")
        return self.correct / self.count if self.per_class else self.correct.sum() / self.count.sum()
