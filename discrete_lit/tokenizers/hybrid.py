"""HART's hybrid tokenizer: ids of several scales, and the residual that they leave of the latents (Tang et al., "HART:
Efficient Visual Generation with Hybrid Autoregressive Transformer", 2024, section 3.1).

    f = before_residual(ids) + residual

The ids are VAR's, and alone make VAR's image. With the residual the latents are whole again, so that one decoder must
bear both: it is trained with the residual left out for some images.

    HybridVQ        the tokenizer: `encode` and `decode` of ids, and both with the residual
    HybridLatents   the same for generators of latents, which take f and give it back
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from discrete_lit.checkpoints import record_config
from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import at_least_float32, in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer, Reconstruction
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.quantizers import MultiScaleResidualQuantizer
from discrete_lit.tokenizers.tokenizer import ContinuousTokenizer, Tokenizer, from_checkpoint
from discrete_lit.tokenizers.uncoded_latents import LEAST_LOGVAR
from discrete_lit.tokenizers.vqvae import MultiScaleVQ


class HybridTokens(NamedTuple):
    """The ids of images, and what they leave of the latents."""

    tokens: Tensor
    """`(B, sum of h w)` int64 in [0, K), the scales from the smallest on."""
    residual: Tensor
    """`(B, D, H, W)` float32 or float64."""


class HybridVQ(MultiScaleVQ):
    """Tokenize images by the ids of several scales as VAR does, and keep the residual beside them.

    `encode` and `decode` are those of `MultiScaleVQ`; `encode_with_residual` and `decode_with_residual` go through the
    latents without loss. The last scale's codes, which the residual is added to, do without the convolution phi there,
    as in the released code.

    In training each image's residual is skipped with a probability, drawn by its number in the run (`"index"`); the
    released code draws once for a batch. Validation and reconstruction have the residual. The quantizer's losses are
    the same either way.

    Args:
        network: called with `code_dim`, twice.
        codebook_size: K; 4096 in HART.
        skip_residual: probability that training leaves the residual of an image out; 0.5 in HART.
        first_stage: the checkpoint of a `MultiScaleVQ`, which training begins from; read when it starts.
        decoder_only: train the decoder alone, so that the ids stay those of the first stage.
        seed: of the skipped residuals.
        settings: the others of `MultiScaleVQ`. `code_dim` is 32 in HART, and `scales` are 1, 2, 3, 4, 5, 7, 9, 12, 16,
            21, 27, 36, 48, 64 at 1024 pixels.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        network: Callable[[int, int], Autoencoder],
        codebook_size: int = 4096,
        *,
        skip_residual: float = 0.5,
        first_stage: str | None = None,
        decoder_only: bool = False,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        if not 0 <= skip_residual <= 1:
            raise ValueError(f"skip_residual must lie in [0, 1], got {skip_residual}")
        super().__init__(network, codebook_size, **settings)
        self.skip_residual = skip_residual
        self.first_stage = first_stage
        self.begins_from_first_stage = first_stage is not None
        self.decoder_only = decoder_only
        self.seed = seed
        if decoder_only:
            for part in self._frozen():
                part.requires_grad_(False)

    # Ids with their residual.

    @in_evaluation
    def encode_with_residual(self, images: Tensor) -> HybridTokens:
        """Turn images `(B, C, H, W)` in [-1, 1] into ids and residuals.

        Raises:
            ValueError: as for `encode`.
        """
        self.check_images(images)
        return self.split(rearrange(at_least_float32(self.latents(images)), "b h w d -> b d h w"))

    @in_evaluation
    def decode_with_residual(self, tokens: Tensor, residual: Tensor) -> Tensor:
        """Turn ids `(B, sum of h w)` and residuals `(B, D, H, W)` into images `(B, C, H, W)` in [-1, 1].

        Raises:
            ValueError: ids outside [0, K), or of other scales; residuals of another shape.
        """
        return self.decode_latents(self.join(tokens, residual))

    @in_evaluation
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Turn latents f `(B, D, H, W)` into images `(B, C, H, W)` in [-1, 1]."""
        return self.to_images(self.outputs(rearrange(latents, "b d h w -> b h w d")))

    @torch.no_grad()
    def split(self, latents: Tensor) -> HybridTokens:
        """Split latents f `(B, D, H, W)` into ids and residuals; `join` inverts it.

        Raises:
            ValueError: another grid than that of the last scale.
        """
        tokens = self.quantizer.encode(rearrange(latents, "b d h w -> b h w d"))
        return HybridTokens(tokens, latents - self.quantizer.before_residual(tokens).to(latents.dtype))

    def join(self, tokens: Tensor, residual: Tensor) -> Tensor:
        """Add residuals `(B, D, H, W)` to what ids `(B, sum of h w)` stand for: latents f `(B, D, H, W)`."""
        self.check_tokens(tokens)
        coded = self.quantizer.before_residual(tokens)
        if residual.shape != coded.shape or not residual.is_floating_point():
            raise ValueError(
                f"the residuals are {residual.dtype} {tuple(residual.shape)}, those of these ids are "
                f"{tuple(coded.shape)}: are they of another tokenizer or image size?"
            )
        return coded + residual

    # Its training.

    def reconstruct(self, images: Tensor, *, step: int | None = None, index: Tensor | None = None) -> Reconstruction:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.decoder_only):
            latents = self.latents(images)
            quantized = self.quantizer(latents)
        codes = latents.to(quantized.z_q.dtype)  # the ids and all that they leave
        if self.training and self.skip_residual > 0:
            skipped = self._skipped(images, index)[:, None, None, None]
            codes = torch.where(skipped, quantized.z_q, codes)
        losses = {} if self.decoder_only else quantized.losses
        return Reconstruction(outputs=self.outputs(codes), losses=losses, tokens=quantized.tokens)

    def _skipped(self, images: Tensor, index: Tensor | None) -> Tensor:
        """`(B,)` bool: the images whose residual is left out."""
        if index is None:
            return torch.rand(len(images), device=images.device) < self.skip_residual
        random = CounterRandom(self.seed, index.to(images.device))
        return random.uniform(Purpose.RESIDUAL, 1)[:, 0] < self.skip_residual

    def on_fit_start(self) -> None:
        """Take the weights of the first stage, unless a run goes on from its own checkpoint, or begins from another.

        Raises:
            ValueError: no such checkpoint, or one that does not fit.
        """
        if self.first_stage is not None and self.begins_from_first_stage and self.trainer.ckpt_path is None:
            self._begin_from(self.first_stage)

    def _begin_from(self, checkpoint: str) -> None:
        first = from_checkpoint(checkpoint)
        quantizer = getattr(first, "quantizer", None)
        if not isinstance(first, AutoencoderTokenizer) or not isinstance(quantizer, MultiScaleResidualQuantizer):
            raise ValueError(f"first_stage={checkpoint!r} holds a {type(first).__name__}, not a MultiScaleVQ")
        if quantizer.scales != self.quantizer.scales:
            raise ValueError(
                f"first_stage={checkpoint!r} has the scales {list(quantizer.scales)}, this HybridVQ "
                f"{list(self.quantizer.scales)}"
            )
        try:
            self.network.load_state_dict(first.network.state_dict(), strict=True)
            self.quantizer.load_state_dict(quantizer.state_dict(), strict=True)
        except RuntimeError as error:
            raise ValueError(f"first_stage={checkpoint!r} is a tokenizer of other sizes: {error}") from error

    def train(self, mode: bool = True) -> Self:
        """Set the mode as PyTorch does, but keep encoder and quantizer in eval mode where they are not trained."""
        super().train(mode)
        if self.decoder_only:
            for part in self._frozen():
                part.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        """The parts that make the ids: what networks call `encoder`, and the quantizer."""
        of_encoder = [part for name, part in self.network.named_children() if name.startswith("encoder")]
        return [*of_encoder, self.quantizer]


class HybridLatents(ContinuousTokenizer):
    """Give a generator of latents those of a `HybridVQ`: f, of which ids and residual are two parts.

    Args:
        tokenizer: frozen here; `discrete_lit.tokenizers.from_checkpoint` in a YAML.

    Raises:
        ValueError: another tokenizer than a `HybridVQ`.
    """

    tokenizer: HybridVQ

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        if not isinstance(tokenizer, HybridVQ):
            raise ValueError(
                f"HybridLatents are those of a HybridVQ, ids with a residual; got a {type(tokenizer).__name__}"
            )
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.latent_dim = tokenizer.quantizer.latent_dim
        if "class_path" in tokenizer.hparams:
            # Not by the file that it came from.
            inner = {name: tokenizer.hparams[name] for name in ("class_path", "init_args")}
            record_config(
                self, {"class_path": "discrete_lit.tokenizers.HybridLatents", "init_args": {"tokenizer": inner}}
            )

    @property
    def quantizer(self) -> MultiScaleResidualQuantizer:
        """The quantizer of the ids."""
        return self.tokenizer.quantizer

    def latent_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        grid = self.tokenizer.network.grid(image_size)
        self.quantizer.token_shape(grid)  # refuses other grids than the last scale's
        return (self.latent_dim, *grid)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.encode(images)
        return latents, torch.full_like(latents, LEAST_LOGVAR)

    @in_evaluation
    def encode(self, images: Tensor, random: CounterRandom | None = None) -> Tensor:
        self.check_images(images)
        return rearrange(at_least_float32(self.tokenizer.latents(images)), "b ... d -> b d ...")

    @in_evaluation
    def decode(self, latents: Tensor) -> Tensor:
        self.check_latents(latents)
        return self.tokenizer.decode_latents(latents)

    def coding_state(self) -> dict[str, Tensor]:
        """The weights of the tokenizer."""
        return {f"tokenizer.{name}": value for name, value in self.tokenizer.coding_state().items()}

    def train(self, mode: bool = True) -> Self:
        """Set the mode as PyTorch does, but keep the frozen tokenizer in eval mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self
