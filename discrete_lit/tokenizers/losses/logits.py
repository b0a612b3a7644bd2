"""What discriminator and generator lose on logits: high for real images."""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from discrete_lit.distributed import all_reduce_sum, world_size
from discrete_lit.tokenizers.losses.known_gradients import take_gradients

LogitLoss = Literal["hinge", "non_saturating", "vanilla"]
"""Kinds of adversarial loss. For the discriminator `"hinge"`, or the logistic loss under the two other names; for the
generator the logistic `"non_saturating"`, or the mean logit itself under the two other names."""


def discriminator_loss(kind: LogitLoss, real: Tensor, fake: Tensor) -> Tensor:
    """Half the sum of the losses on logits `(B, ...)` of real images and of reconstructions; scalar, float32.

    `"hinge"`: `(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2` (Lim & Ye 2017, as in taming);
    `"non_saturating"` and `"vanilla"`: `(mean -log sigmoid(real) + mean -log sigmoid(-fake)) / 2` (Goodfellow et al.
    2014, eq. 1).
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def generator_loss(kind: LogitLoss, fake: Tensor) -> Tensor:
    """On logits `(B, ...)` of reconstructions; scalar, float32.

    `"non_saturating"`: `mean -log sigmoid(fake)` (Goodfellow et al. 2014, section 3); `"hinge"` and `"vanilla"`:
    `-mean fake`, in taming for both.
    """
    fake = fake.float()
    return F.softplus(-fake).mean() if kind == "non_saturating" else -fake.mean()


class LeCam(nn.Module):
    """LeCam regularisation (Tseng et al., "Regularizing GANs Under Limited Data", CVPR 2021, eq. 4 and 5).

    Keeps the logits of either kind near the running mean of the other kind's. As in the authors' code, only where they
    lie outside: `mean max(0, real - m_fake)^2 + mean max(0, m_real - fake)^2`. The means are over the logits of all
    ranks; they begin at 0 and are part of a checkpoint.

    Args:
        decay: of the running means.
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"lecam_decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Move the means by logits `(B, ...)`, then give the scalar penalty."""
        real, fake = real.float(), fake.float()
        means = all_reduce_sum(torch.stack((real.mean(), fake.mean()))) / world_size()
        self.real_mean.lerp_(means[0], 1 - self.decay)
        self.fake_mean.lerp_(means[1], 1 - self.decay)
        return F.relu(real - self.fake_mean).square().mean() + F.relu(self.real_mean - fake).square().mean()


def twice_differentiable() -> AbstractContextManager[object]:
    """A context for the forward pass behind a gradient penalty: fused attention kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """R1 of Mescheder et al., "Which Training Methods for GANs do actually Converge?" (ICML 2018), eq. 9.

    Without its factor gamma / 2: the mean over images of `|grad D(x)|^2`, where `D(x)` is the mean of an image's
    logits. Differentiable.

    Args:
        logits: `(B, ...)` made of the images under `twice_differentiable`.
        images: `(B, C, H, W)` requiring a gradient.
    """
    of_each = logits.float().flatten(1).mean(dim=1).sum()
    (gradient,) = take_gradients(of_each, [images], create_graph=True)
    return gradient.float().square().flatten(1).sum(dim=1).mean()
