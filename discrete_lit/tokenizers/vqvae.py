"""Image tokenizers that are an autoencoder around one quantizer: the six that papers know by a name.

    VQVAE         a learned codebook                van den Oord et al., "Neural Discrete Representation Learning", 2017
    VQGAN         the same with adversarial losses  Esser et al., "Taming Transformers", CVPR 2021
    RQVAE         several codes for each position   Lee et al., "Autoregressive Image Generation using Residual
                                                    Quantization", CVPR 2022
    MultiScaleVQ  one grid of codes for each scale  Tian et al., "Visual Autoregressive Modeling" (VAR), NeurIPS 2024
    LFQ           the signs of the latents          Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to
                                                    Visual Generation" (MAGVIT-v2), ICLR 2024
    FSQ           the latents, rounded              Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple",
                                                    ICLR 2024

Each class names the settings of its quantizer, so that a configuration lists and checks them. How ids are found stands
in the quantizer's file (`discrete_lit.tokenizers.quantizers`), encoding, decoding and training in `autoencoder.py`.

All of them take a `network` factory, which is called with two widths, that of a code and that of a latent (the same
number here, except in a `VQGAN` whose quantizer distinguishes them), and beside the arguments that are listed here
those of `ImageAutoencoder`: the losses, the optimizer, the scheduler.
"""

from collections.abc import Callable
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from discrete_lit.core.modules import in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.quantizers import (
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    MultiScaleResidualQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
)


class VQVAE(AutoencoderTokenizer):
    """Tokenize images by the nearest codes of a learned codebook.

    Args:
        network: called with `code_dim`, twice.
        codebook_size: K.
        code_dim: D, the width of a code.
        codebook_update: move codes by a running mean (`"ema"`) or train them (`"gradient"`).
        commitment_weight: beta of eq. 3.
        decay: of the running mean.
        codebook_init: first codes from the first training batch, some of its latents (`"data"`) or the centres of
            their clusters (`"kmeans"`), or random: uniform in [-1 / K, 1 / K], normal of deviation D^-1/2.
        normalize: latents and codes on the unit sphere.
        gradient: what the encoder receives: straight through, or the rotation trick.
        revive_below: codes with fewer latents a batch than this, in the running mean, are replaced by latents; None
            keeps dead codes.
    """

    def __init__(
        self,
        network: Callable[[int, int], Autoencoder],
        codebook_size: int,
        *,
        code_dim: int,
        codebook_update: Literal["ema", "gradient"] = "ema",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        codebook_init: Literal["data", "kmeans", "uniform", "normal"] = "data",
        normalize: bool = False,
        gradient: Literal["straight_through", "rotation"] = "straight_through",
        revive_below: float | None = None,
        **training: Any,
    ) -> None:
        quantizer = VectorQuantizer(
            codebook_size,
            code_dim,
            codebook_update=codebook_update,
            commitment_weight=commitment_weight,
            decay=decay,
            codebook_init=codebook_init,
            normalize=normalize,
            gradient=gradient,
            revive_below=revive_below,
        )
        super().__init__(network, quantizer, **training)


class VQGAN(AutoencoderTokenizer):
    """Tokenize images by any quantizer (the paper's: a `VectorQuantizer`); perceptual and adversarial losses train it.

    The paper's losses are `LPIPS` and an `AdversarialLoss` with a `PatchGAN`, named as `perceptual_loss` and
    `adversarial_loss`.
    """


class RQVAE(AutoencoderTokenizer):
    """Tokenize images by several codes for each position, each of what those before left.

    The ids have their depth as last dimension.

    Args:
        network: called with `code_dim`, twice.
        codebook_size: K.
        code_dim: D, the width of a code.
        depth: codes for each position; 4 in the paper.
        shared_codebook: one codebook for all depths, or one each.
        codebook_update: as for `VQVAE`.
        commitment_weight: as for `VQVAE`.
        decay: as for `VQVAE`.
        codebook_init: as for `VQVAE`.
        revive_below: as for `VQVAE`.
    """

    quantizer: ResidualQuantizer

    def __init__(
        self,
        network: Callable[[int, int], Autoencoder],
        codebook_size: int,
        *,
        code_dim: int,
        depth: int = 4,
        shared_codebook: bool = True,
        codebook_update: Literal["ema", "gradient"] = "ema",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        codebook_init: Literal["data", "kmeans", "uniform", "normal"] = "data",
        revive_below: float | None = 1.0,
        **training: Any,
    ) -> None:
        quantizer = ResidualQuantizer(
            codebook_size,
            code_dim,
            depth=depth,
            shared_codebook=shared_codebook,
            codebook_update=codebook_update,
            commitment_weight=commitment_weight,
            decay=decay,
            codebook_init=codebook_init,
            revive_below=revive_below,
        )
        super().__init__(network, quantizer, **training)

    @torch.no_grad()
    @in_evaluation
    def soft_encode(self, images: Tensor, *, temperature: float, random: CounterRandom) -> tuple[Tensor, Tensor]:
        """Draw the codes of images by their distances, see `ResidualQuantizer.soft_encode`.

        Args:
            images: `(B, C, H, W)`, float in [-1, 1].
            temperature: tau > 0; 0.5 in RQ-Transformer.
            random: one stream for each image.

        Returns:
            Ids `(B, *token_shape)` int64, and the laws that they were drawn from, `(B, *token_shape, K)`.
        """
        self.check_images(images)
        latents = self.latents(images)
        shape = self.quantizer.token_shape(tuple(latents.shape[1:-1]))
        uniforms = random.uniform(Purpose.STOCHASTIC_CODE, prod(shape)).view(-1, *shape)
        return self.quantizer.soft_encode(latents, temperature=temperature, uniforms=uniforms)


class MultiScaleVQ(AutoencoderTokenizer):
    """Tokenize images scale by scale, from one code over 2 x 2 to the latent grid: each codes what those before left.

    Args:
        network: called with `code_dim`, twice.
        codebook_size: K; 4096 in VAR.
        code_dim: D, the width of a code; 32 in VAR.
        scales: in growing order, the last that of the latent grid: sides of squares, or `[height, width]` each; those
            of VAR at 256 pixels by default.
        phi_kernels: convolutions behind the interpolation, shared by neighbouring scales.
        phi_ratio: weight of the convolution in its output, against the identity's.
        codebook_update: as for `VQVAE`.
        commitment_weight: as for `VQVAE`.
        decay: as for `VQVAE`.
        codebook_init: as for `VQVAE`.
        revive_below: as for `VQVAE`.
    """

    quantizer: MultiScaleResidualQuantizer

    def __init__(
        self,
        network: Callable[[int, int], Autoencoder],
        codebook_size: int = 4096,
        *,
        code_dim: int = 32,
        scales: tuple[int | tuple[int, int], ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        phi_kernels: int = 4,
        phi_ratio: float = 0.5,
        codebook_update: Literal["ema", "gradient"] = "gradient",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        codebook_init: Literal["data", "kmeans", "uniform", "vaex", "normal"] = "normal",
        revive_below: float | None = None,
        **training: Any,
    ) -> None:
        quantizer = MultiScaleResidualQuantizer(
            codebook_size,
            code_dim,
            scales=scales,
            phi_kernels=phi_kernels,
            phi_ratio=phi_ratio,
            codebook_update=codebook_update,
            commitment_weight=commitment_weight,
            decay=decay,
            codebook_init=codebook_init,
            revive_below=revive_below,
        )
        super().__init__(network, quantizer, **training)


class LFQ(AutoencoderTokenizer):
    """Tokenize images by signs instead of a codebook: K = 2^bits ids, kept in use by entropy terms.

    Args:
        network: called with `bits`, twice.
        bits: channels of the latents; 10 to 18 in MaskBit, 18 in Open-MAGVIT2.
        commitment_weight: of the commitment term.
        entropy_weight: of the entropy terms.
        entropy_temperature: of the affinities to codes.
        batch_entropy_weight: of the batch entropy against the per-sample one.
        entropy_groups: groups of equally many bits for the batch entropy; 1 is exact.
        entropy_log_offset: added to probabilities inside the logarithm of the batch entropy; 1e-5 in Open-MAGVIT2.
        entropy_across_ranks: the batch entropy of the joint batch of all ranks, or of each rank as in Open-MAGVIT2.
        bit_order: whether the first channel is the least or the most significant bit of the id.
    """

    def __init__(
        self,
        network: Callable[[int, int], Autoencoder],
        bits: int,
        *,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        entropy_temperature: float = 0.01,
        batch_entropy_weight: float = 1.0,
        entropy_groups: int = 1,
        entropy_log_offset: float = 0.0,
        entropy_across_ranks: bool = True,
        bit_order: Literal["first_least_significant", "first_most_significant"] = "first_least_significant",
        **training: Any,
    ) -> None:
        quantizer = LookupFreeQuantizer(
            bits,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature,
            batch_entropy_weight=batch_entropy_weight,
            entropy_groups=entropy_groups,
            entropy_log_offset=entropy_log_offset,
            entropy_across_ranks=entropy_across_ranks,
            bit_order=bit_order,
        )
        super().__init__(network, quantizer, **training)


class FSQ(AutoencoderTokenizer):
    """Tokenize images by rounding instead of a codebook: no codebook loss, no collapse.

    Args:
        network: called with the number of channels, the width of a code, twice.
        levels: levels of each channel; K is their product. The paper's table 1 recommends `[8, 6, 5]` for K near 2^8,
            `[8, 5, 5, 5]` for 2^10, `[7, 5, 5, 5, 5]` for 2^12, `[8, 8, 8, 6, 5]` for 2^14,
            `[8, 8, 8, 5, 5, 5]` for 2^16.
        formula: the paper's, or that of vector-quantize-pytorch and Cosmos (`"atanh"`).
        codebook_size: K, to be checked against the levels.
    """

    def __init__(
        self,
        network: Callable[[int, int], Autoencoder],
        levels: list[int],
        *,
        formula: Literal["paper", "atanh"] = "paper",
        codebook_size: int | None = None,
        **training: Any,
    ) -> None:
        super().__init__(
            network, FiniteScalarQuantizer(levels, formula=formula, codebook_size=codebook_size), **training
        )
