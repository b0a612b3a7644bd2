"""Alignment of latents with what a frozen vision network sees (VA-VAE).

Yao, Yang and Wang, "Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion Models", CVPR 2025.
Latents of many channels reconstruct well and are hard to generate; those whose cosines look like the features of a
foundation model are easier. For the latents z of an image, projected to the width of its features f:

    L_mcos  = mean_i  max(0, 1 - m1 - cos(z_i, f_i))                           marginal cosine similarity
    L_mdms  = mean_ij max(0, |cos(z_i, z_j) - cos(f_i, f_j)| - m2)             marginal distance matrix similarity
    L       = w |grad L_rec| / |grad (L_mcos + L_mdms)| (L_mcos + L_mdms)      gradients at the encoder's last layer
"""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.distributed import all_reduce_sum, world_size
from discrete_lit.core.images import ImageSize, height_and_width, normal_size
from discrete_lit.core.modules import FullPrecision, OfWholeBatch, at_least_float32
from discrete_lit.tokenizers.losses.adversarial import take_gradients
from discrete_lit.tokenizers.losses.frozen_networks import FrozenNetwork, make_timm, pixels_for

# Constants of the authors' code: what keeps the adaptive weight's denominator from 0, and the weight's largest value.
_LEAST_GRADIENT = 1e-4
_LARGEST_WEIGHT = 1e8


class AlignmentLoss(FullPrecision, OfWholeBatch):
    """Compare latents with the features of a frozen network of timm at the same places.

    The features are those behind the network's last layer and norm, without class or register tokens. Images are
    resized and normalised as the network was trained.

    Args:
        latent_dim: D of the latents; the autoencoder gives it.
        model_name: timm's name of the network: `vit_large_patch14_dinov2.lvd142m` in the paper.
        weights_path: its weights in timm's layout; `"random"` takes random ones, for tests.
        image_size: images are resized to it, a side or `[height, width]`, so that features have the latents' grid: 224
            for patches of 14 and a grid of 16.
        weight: of both terms together.
        cosine_margin: m1; cosines above `1 - m1` cost nothing.
        distance_margin: m2; cosines of two places that differ by less cost nothing.
        adaptive: multiply the weight by the ratio of the gradients, at most 1e8, of the joint batch of all ranks.
        project: the trained linear map, of the `latents` to the width of the features, without bias, or of the
            `features` to that of the latents.
        feature_dim: width of the features; None asks timm's network.

    Raises:
        ValueError: a setting out of its range, or no such network.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        model_name: str,
        weights_path: str,
        image_size: ImageSize = 224,
        weight: float = 0.1,
        cosine_margin: float = 0.5,
        distance_margin: float = 0.25,
        adaptive: bool = True,
        project: Literal["latents", "features"] = "latents",
        feature_dim: int | None = None,
    ) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight of the alignment loss must be >= 0, got {weight}")
        for name, margin in (("cosine_margin", cosine_margin), ("distance_margin", distance_margin)):
            if not 0 <= margin < 2:
                raise ValueError(f"{name} of the alignment loss must lie in [0, 2), got {margin}")
        if project not in ("latents", "features"):
            raise ValueError(f"project of the alignment loss must be 'latents' or 'features', got {project!r}")
        if feature_dim is None:
            with torch.device("meta"):
                shape = make_timm(model_name, "random", "alignment_loss", has_layers=True, num_classes=0)
            feature_dim = int(shape.num_features)  # type: ignore[arg-type]
        if feature_dim < 1:
            raise ValueError(f"feature_dim of the alignment loss must be at least 1, got {feature_dim}")
        self.model_name = model_name
        self.weights_path = weights_path
        self.image_size = height_and_width(image_size)
        self.weight = weight
        self.cosine_margin = cosine_margin
        self.distance_margin = distance_margin
        self.adaptive = adaptive
        self.project = project
        self.feature_dim = feature_dim
        widths = (latent_dim, feature_dim) if project == "latents" else (feature_dim, latent_dim)
        self.projection = nn.Linear(*widths, bias=project == "features")
        self.network = FrozenNetwork(self._make)

    def prepare(self) -> None:
        """Read the weights.

        Raises:
            ValueError: there are none where they should be, or they are another network's, of another width.
        """
        width = self.network.prepare().num_features
        if width != self.feature_dim:
            raise ValueError(
                f"alignment_loss.model_name={self.model_name!r} has features of width {width}, and feature_dim is "
                f"{self.feature_dim}"
            )

    def whole_batch_terms(self) -> list[str]:
        return ["the adaptive weight of the alignment loss (adaptive)"] if self.adaptive else []

    def forward(self, latents: Tensor, images: Tensor) -> Tensor:
        """Both terms together, without the weight: a scalar, float32 or better.

        Args:
            latents: `(B, *grid, D)`, those that are decoded.
            images: `(B, C, H, W)` in [-1, 1].

        Raises:
            ValueError: the features have another grid than the latents.
        """
        with torch.autocast(latents.device.type, enabled=False):
            z, features = self.compared(at_least_float32(latents), self.features(images))
            return self.cosine_term(z, features) + self.distance_term(z, features)

    def features(self, images: Tensor) -> Tensor:
        """The features `(B, *grid, width)` of images `(B, C, H, W)` in [-1, 1]; nothing is differentiated."""
        network = self.network.seeing(images)
        with torch.no_grad():
            pixels = pixels_for(network, images, self.image_size)
            (found,) = network.forward_intermediates(
                pixels, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )
            return rearrange(at_least_float32(found), "b d ... -> b ... d")

    def compared(self, latents: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and features, one of them projected, that the terms compare: `(B, *grid, width)` each.

        Raises:
            ValueError: they have different grids.
        """
        if latents.shape[:-1] != features.shape[:-1]:
            raise ValueError(
                f"latents have the grid {tuple(latents.shape[1:-1])} and features of {self.model_name!r} "
                f"{tuple(features.shape[1:-1])}: set alignment_loss.image_size, which is "
                f"{normal_size(self.image_size)}, to the side of the latents' grid times the network's patch"
            )
        if self.project == "latents":
            return self.projection(latents), features.to(latents.dtype)
        return latents, self.projection(features.to(latents.dtype))

    def cosine_term(self, z: Tensor, features: Tensor) -> Tensor:
        """L_mcos of latents and features `(B, *grid, width)`: a scalar."""
        return F.relu(1 - self.cosine_margin - F.cosine_similarity(z, features, dim=-1)).mean()

    def distance_term(self, z: Tensor, features: Tensor) -> Tensor:
        """L_mdms of latents and features `(B, *grid, width)`: a scalar, over all pairs of places of an image."""
        of_latents, of_features = (_cosines(values) for values in (z, features))
        return F.relu((of_latents - of_features).abs() - self.distance_margin).mean()

    def _make(self) -> nn.Module:
        network = make_timm(self.model_name, self.weights_path, "alignment_loss", has_layers=True, num_classes=0)
        if hasattr(network, "set_input_size"):  # a ViT's table of positions, read first, has its training's grid
            network.set_input_size(img_size=self.image_size)  # type: ignore[operator]
        return network


def gradient_ratio(
    alignment: Tensor, latents: Tensor, *, outputs: Tensor, reconstruction_gradient: Tensor, layer: Tensor
) -> Tensor:
    """`|grad L_rec| / (|grad L| + 1e-4)` at the encoder's last layer, at most 1e8: a scalar, the same on every rank.

    Args:
        alignment: L, a scalar, with its graph.
        latents: `(B, *grid, D)`, those that it compared and that were decoded.
        outputs: `(B, C, H, W)` of the decoder, with their graph.
        reconstruction_gradient: `(B, C, H, W)`, of the reconstruction's terms with respect to the outputs.
        layer: the weight of the encoder's last layer.
    """
    (alignment_gradient,) = take_gradients(alignment, [latents], retain_graph=True)
    at_layer = []
    for values, gradient in ((outputs, reconstruction_gradient), (latents, alignment_gradient)):
        # At unit length nothing underflows on its way through half-precision layers.
        length = gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)
        (found,) = take_gradients([values], [layer], [gradient / length], retain_graph=True)
        at_layer.append(at_least_float32(found) * length)
    joint = all_reduce_sum(torch.stack(at_layer)) / world_size()
    of_reconstruction, of_alignment = joint.flatten(1).norm(dim=1)
    return (of_reconstruction / (of_alignment + _LEAST_GRADIENT)).clamp(max=_LARGEST_WEIGHT)


def _cosines(values: Tensor) -> Tensor:
    """The cosines of all pairs of places, `(B, N, N)`, of vectors `(B, *grid, width)`."""
    unit = F.normalize(values.flatten(1, -2), dim=-1)
    return unit @ unit.transpose(1, 2)
