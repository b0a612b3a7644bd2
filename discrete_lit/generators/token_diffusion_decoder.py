"""Decode the tokens of any tokenizer by diffusion: the hybrid of discrete tokens and a continuous decoder.

A tokenizer's own decoder gives the mean of all images that have the same tokens, or what a discriminator makes of it. A
diffusion model of images given their tokens draws one of them, with the detail that the tokens do not hold (OpenAI's
consistency decoder of DALL-E 3, 2023; Zhao et al., "epsilon-VAE", 2024; LLaDA-Image and GLM-Image, 2026, put one behind
a generator of ids). The tokenizer stays as it is: its generators are sampled with either decoder.

With `target="residual"` the tokenizer's decoder stays too, and diffusion adds what it misses: x = decoder(d) + r (Tang
et al., "HART", 2024, whose residual is of the latents of a tokenizer that was trained with it).
"""

from collections.abc import Iterable
from dataclasses import replace
from math import log
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from discrete_lit.backbones import LatentLayout
from discrete_lit.backbones.condition import Condition, as_condition, check_parts, plain
from discrete_lit.checkpoints import load, loadable
from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import at_least_float32, in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose, indices_of_ids, streams_of
from discrete_lit.generators.generator import Likelihood
from discrete_lit.generators.latent_diffusion import LatentDiffusion
from discrete_lit.metrics.latent_statistics import scale_complaint
from discrete_lit.samplers.guided_solver import GuidedSolver
from discrete_lit.samplers.sampler import SamplerOutput
from discrete_lit.tokenizers.quantizers.quantizer import Component
from discrete_lit.tokenizers.tokenizer import ContinuousTokenizer, TokenGrid, Tokenizer, freeze

TokenInput = Literal["codes", "learned"]


@loadable
class TokenDiffusionDecoder(LatentDiffusion):
    """Draw images, or their latents, given their tokens d, by undoing Gaussian noise.

    Tokens on a grid are a context, of which each place reads the nearest vector; a row of tokens without a place, as
    TiTok's, is a set of vectors that every place attends to, with learned positions. The codes of a codec's frames are
    a grid of one column, which `RawFrames` gives the samples too: so a waveform is drawn given its codes. A batch holds
    images, which both tokenizers encode, or `"tokens"` beside `"image"` or `"latents"`. The class is one more
    condition, where `num_classes` is above 1, and so is a text, where the network has a `context_dim`; guidance drops
    all of them together.

    Args:
        tokenizer: of what is drawn, frozen here: `RawPixels`, `RawFrames`, or a `KLVAE` by
            `continuous_from_checkpoint`.
        image_size: of the images in pixels: the side of a square, or `[height, width]`.
        discrete: the tokenizer of the tokens, frozen here; `from_checkpoint` in a YAML.
        num_classes: labels lie in [0, num_classes); 1 for a decoder that is told no class.
        token_input: the tokens as the tokenizer's own code vectors (`"codes"`), or as vectors that are learned here
            (`"learned"`).
        token_width: of learned vectors.
        target: draw all of the image (`"image"`), or what the tokenizer's decoder misses of it (`"residual"`).
        residual_scale: multiplies residuals, whose deviation should be near 1; the first batch is looked at.
        settings: further ones of `LatentDiffusion`. `label_dropout` drops the tokens too.

    Raises:
        ValueError: a setting out of its range, tokens that stand for no grid and no row, or latents that are no grid.
    """

    # Without a text there are still the tokens.
    empty_text_is_null = False

    def __init__(
        self,
        tokenizer: ContinuousTokenizer,
        image_size: ImageSize,
        *,
        discrete: Tokenizer,
        num_classes: int = 1,
        token_input: TokenInput = "codes",
        token_width: int = 64,
        target: Literal["image", "residual"] = "image",
        residual_scale: float = 1.0,
        **settings: Any,
    ) -> None:
        if token_input not in ("codes", "learned") or target not in ("image", "residual"):
            raise ValueError(
                f"token_input must be 'codes' or 'learned' and target 'image' or 'residual', got {token_input!r} and "
                f"{target!r}"
            )
        if residual_scale <= 0 or token_width < 1:
            raise ValueError(
                f"residual_scale must be above 0 and token_width at least 1, got {residual_scale} and {token_width}"
            )
        if target == "image" and residual_scale != 1:
            raise ValueError(f"residual_scale={residual_scale} is of target='residual', got target='image'")
        if isinstance(discrete, TokenGrid) and (token_input == "codes" or target == "residual"):
            raise ValueError(
                "a tokenizer that is not there has no code vectors and no decoder: take token_input='learned' and "
                "target='image', and batches with tokens"
            )
        self.null_id = discrete.vocab_size
        self.token_shape = tuple(discrete.token_shape(image_size))
        # Of what the network reads: (E, *grid).
        self.read_shape = _shape_read(discrete, self.token_shape, token_input, token_width)
        super().__init__(tokenizer, image_size, num_classes=num_classes, **settings)
        self.reads_labels = num_classes > 1  # others are trained on the images of any classes
        self.discrete = freeze(discrete)
        self.token_input: TokenInput = token_input
        self.token_embedding = TokenEmbedding(
            self.read_shape, vocab_size=discrete.vocab_size if token_input == "learned" else None
        )
        self.target: Literal["image", "residual"] = target
        self.residual_scale = residual_scale
        if target == "residual":  # of pixels too
            self._unchecked = settings.get("check_scale", True)

    def layout(self) -> LatentLayout:
        width, *grid = self.read_shape
        if len(grid) == 2:
            return replace(super().layout(), context_channels=width)
        return replace(super().layout(), vectors=(grid[0], width))

    def train(self, mode: bool = True) -> Self:
        """Set the mode, but keep the frozen tokenizer of the tokens in eval mode."""
        super().train(mode)
        if "discrete" in self._modules:
            self.discrete.eval()
        return self

    def trained_networks(self) -> Iterable[Any]:
        return (self.backbone, self.token_embedding)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe both tokenizers in the checkpoint, so that it loads without their files."""
        super().on_save_checkpoint(checkpoint)
        if self.discrete.hparams:
            checkpoint["discrete_config"] = dict(self.discrete.hparams)

    # Batches.

    def tokens_of(self, batch: dict[str, Any]) -> Tensor:
        """Return the ids `(B, *token_shape)` of a batch, of its images where it holds none, and keep them in it."""
        if "tokens" not in batch:
            if (coded := self.discrete.modality) not in batch:
                raise ValueError(
                    f'a batch holds {", ".join(map(str, batch))}: TokenDiffusionDecoder needs "{coded}", or "latents" '
                    'and "tokens" of the same images'
                )
            # The same images are checked by `tokenizer`, later if it can be.
            self.discrete.late_checks = None if "latents" in batch else []
            with torch.no_grad():
                batch["tokens"] = self.discrete.encode(batch[coded])
            self.discrete.late_checks = None
        self.check_tokens(batch["tokens"])
        return batch["tokens"]

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise a ValueError unless these are ids of the shape of this decoder's tokens, `(B, *token_shape)`."""
        if tuple(tokens.shape[1:]) != self.token_shape or tokens.is_floating_point():
            raise ValueError(
                f"tokens must be ids of the shape {self.token_shape} for each image, got {tokens.dtype} "
                f"{tuple(tokens.shape[1:])}: are they of another tokenizer, or of another image size than "
                f"{self.image_size}?"
            )

    def condition_of(self, batch: dict[str, Any], random: CounterRandom) -> Condition:
        grid = self.tokens_of(batch).flatten(1)
        return Condition(labels=self.labels_of(batch), grid=grid, **self.context_of(batch))

    def modelled(self, latents: Tensor, batch: dict[str, Any]) -> Tensor:
        if self.target == "image":
            return latents
        return self.residual_scale * (latents - self.base(self.tokens_of(batch)))

    def check_scale(self, data: Tensor) -> None:
        if self.target == "image" or not self._unchecked:
            return super().check_scale(data)
        deviation = float(data.square().mean().sqrt())
        if scale_complaint(deviation) is not None:
            raise ValueError(
                f"the residuals of the first batch have a deviation of {deviation:.4g} with residual_scale="
                f"{self.residual_scale}; it should be about 1: take residual_scale="
                f"{self.residual_scale / max(deviation, 1e-12):.4g}"
            )
        self._unchecked = False

    @torch.no_grad()
    def base(self, tokens: Tensor) -> Tensor:
        """Return the latents `(B, D, H, W)` of the images that the tokenizer's own decoder makes of ids."""
        return at_least_float32(self.tokenizer.encode(self.discrete.decode(tokens)))

    def check_teacher(self, teacher: Any) -> None:
        super().check_teacher(teacher)
        teacher.check_source(self.discrete, self.image_size, num_classes=self.num_classes)
        own, other = ((model.target, model.residual_scale) for model in (self, teacher))
        if own != other:
            raise ValueError(
                f"teacher={self.teacher!r} has the target and residual_scale {other[0]}, {other[1]}, and this decoder "
                f"{own[0]}, {own[1]}"
            )

    # What the network reads of the tokens.

    def given(self, condition: Condition) -> dict[str, Tensor]:
        ids = condition.grid
        assert ids is not None and self.null_id is not None
        dropped = ids[:, 0] == self.null_id
        codes = None
        if self.token_input == "codes":
            with torch.no_grad():
                codes = self.discrete.embed(ids.clamp(max=self.null_id - 1).reshape(-1, *self.token_shape))
                codes = codes.reshape(-1, *self.read_shape)
        read, text = self.token_embedding(ids, codes, dropped), super().given(condition)
        if len(self.read_shape) == 3:
            return {"context": read, **text}
        return {"vectors": read.transpose(1, 2), **text}

    # The likelihood.

    def log_likelihood(
        self, latents: Tensor, condition: Condition | Tensor, *, indices: Tensor | None = None
    ) -> Likelihood:
        """Estimate a lower bound of the log density of latents given their tokens, in nats.

        Args:
            latents: `(B, D, H, W)`, scaled.
            condition: with the ids as its `grid`, `(B, N)`, and the vectors of a text, where it reads any.
            indices: `(B,)` int64, each sample's position in its data set; 0 to B - 1 by default.

        Raises:
            ValueError: a condition without tokens.
        """
        condition = as_condition(condition)
        if condition.grid is None:
            raise ValueError("a TokenDiffusionDecoder needs tokens: give Condition(labels=..., grid=ids)")
        if self.target == "image":
            return super().log_likelihood(latents, condition, indices=indices)
        self.check_latents(latents)
        base = self.base(condition.grid.reshape(-1, *self.token_shape))
        found = super().log_likelihood(self.residual_scale * (latents - base), condition, indices=indices)
        # A density of numbers that are so many times as wide.
        return found._replace(nats=found.nats + latents[0].numel() * log(self.residual_scale))

    # Decoding.

    @torch.no_grad()
    @in_evaluation
    def draw(
        self,
        labels: Condition | Tensor,
        random: CounterRandom,
        sampler: GuidedSolver | None = None,
        *,
        tokens: Tensor | None = None,
        trace: bool = False,
    ) -> SamplerOutput:
        """Draw latents given tokens.

        Args:
            labels: `(B,)` int64 in [0, num_classes], or these with the vectors of a text.
            random: one stream for each sample: numbers that no generator of its tokens draws.
            sampler: this decoder's own by default.
            tokens: `(B, *token_shape)` int64 in [0, K).
            trace: also return the `estimates` of every pass.

        Returns:
            The sampler's output, with latents as its `tokens`.

        Raises:
            ValueError: no tokens, tokens of another shape, or as of `LatentGenerator.draw`.
        """
        if tokens is None:
            raise ValueError(
                "a TokenDiffusionDecoder decodes tokens and draws none: give tokens, or give it to a generator's "
                "`discrete-lit sample` as --decoder"
            )
        self.check_tokens(tokens)
        sampler, condition = sampler or cast(GuidedSolver, self.sampler), as_condition(labels)
        self.check_draw(condition.labels, sampler.guidance_scale)
        check_parts(replace(condition, grid=None), places=0, grid_vocab=None, context_dim=self.backbone.context_dim)
        condition = replace(condition, labels=condition.labels.long(), grid=tokens.flatten(1))
        purposes = (Purpose.DECODER_START, Purpose.DECODER_STEP)
        output = self.draw_given(condition, random, sampler, purposes=purposes, trace=trace)
        if self.target == "image":
            return output
        base, estimates = self.base(tokens), output.estimates
        if estimates is not None:
            estimates = tuple(replace(step, estimate=base + step.estimate / self.residual_scale) for step in estimates)
        return replace(output, tokens=base + output.tokens / self.residual_scale, estimates=estimates)

    def decode(
        self,
        tokens: Tensor,
        labels: Condition | Tensor | None = None,
        *,
        sampler: GuidedSolver | None = None,
        seed: int = 0,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Decode ids `(B, *token_shape)` to images `(B, C, H, W)` in [-1, 1].

        Args:
            tokens: int64 in [0, K).
            labels: `(B,)`, needed by a decoder of several classes; or these with the vectors of a text, which
                `condition_of_texts` makes, needed by a decoder that reads one.
            sampler: this decoder's own by default.
            seed: of the noise.
            indices: `(B,)` int64, to which with the seed the noise belongs, whatever the batch; 0 to B - 1 by default.

        Raises:
            ValueError: no labels where they are needed, or the reasons of `draw`.
        """
        if labels is None and self.num_classes > 1:
            raise ValueError(f"this decoder knows {self.num_classes} classes: give a label for each of its images")
        if labels is None:
            labels = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        if self.backbone.context_dim is not None and as_condition(labels).context is None:
            raise ValueError(
                "this decoder reads a text for each of its images: give condition_of_texts of it as labels"
            )
        random = streams_of(tokens, seed=seed, indices=indices)
        return self.tokenizer.decode(self.draw(labels, random, sampler, tokens=tokens).tokens)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Decode the tokens of a batch to images `(B, C, H, W)` in [-1, 1], by this decoder's seed."""
        indices = self.random_of(batch, batch_idx).indices
        condition = plain(Condition(labels=self.labels_of(batch), **self.context_of(batch)))
        return self.decode(self.tokens_of(batch), condition, seed=self.seed, indices=indices)

    def autoencoder(self) -> "RedecodedTokenizer":
        """Make a tokenizer of this decoder and the one whose tokens it decodes, to measure reconstructions by.

        Raises:
            ValueError: a decoder of several classes or of texts, which a tokenizer is not told.
        """
        if self.backbone.context_dim is not None:
            raise ValueError("this decoder reads a text, which a tokenizer does not know")
        if self.num_classes > 1:
            raise ValueError(f"this decoder is told one of {self.num_classes} classes, which a tokenizer does not know")
        return RedecodedTokenizer(self)

    def check_source(self, tokenizer: Tokenizer, image_size: ImageSize, *, num_classes: int) -> None:
        """Refuse to decode what another tokenizer codes, by its shape, its vocabulary and the hash of its weights.

        A tokenizer that is not there (`TokenGrid`), here or there, is compared by shape and vocabulary alone.

        Args:
            tokenizer: of the tokens to decode.
            image_size: of the images that they are of.
            num_classes: of their labels.

        Raises:
            ValueError: another one.
        """
        shape = tuple(tokenizer.token_shape(image_size))
        found = {"token shape": shape, "vocabulary": tokenizer.vocab_size, "image size": image_size}
        made = {"token shape": self.token_shape, "vocabulary": self.null_id, "image size": self.image_size}
        if self.num_classes > 1:
            found["number of classes"], made["number of classes"] = num_classes, self.num_classes
        if not (isinstance(tokenizer, TokenGrid) or isinstance(self.discrete, TokenGrid)):
            found["tokenizer"], made["tokenizer"] = tokenizer.fingerprint(), self.discrete.fingerprint()
        for name, value in made.items():
            if found[name] != value:
                raise ValueError(
                    f"the decoder was made for tokens of another {name}: {value}, and these are of {found[name]}"
                )


class RedecodedTokenizer(Tokenizer):
    """Encode images by a tokenizer, and decode the tokens by a diffusion decoder of one class.

    The noise of a sample is a function of its tokens, so that neither batch nor order changes an image.

    Args:
        decoder: of the tokens.
    """

    def __init__(self, decoder: TokenDiffusionDecoder) -> None:
        super().__init__()
        self.decoder = decoder.eval()
        self.vocab_size = decoder.discrete.vocab_size

    @property
    def image_channels(self) -> int:
        """C of the images."""
        return getattr(self.decoder.discrete, "image_channels", 3)

    @property
    def quantizer(self) -> Any:
        """The quantizer of the ids; None of a tokenizer without one."""
        return getattr(self.decoder.discrete, "quantizer", None)

    def token_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        return self.decoder.discrete.token_shape(image_size)

    def encode(self, images: Tensor) -> Tensor:
        return self.decoder.discrete.encode(images)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.decoder.discrete.embed(tokens)

    def components(self, tokens: Tensor) -> dict[str, Component]:
        return self.decoder.discrete.components(tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.decoder.decode(tokens, indices=indices_of_ids(tokens.flatten(1)))


class TokenEmbedding(nn.Module):
    """Turn tokens into the vectors that a network of latents reads, and dropped ones into a learned vector.

    Args:
        shape: `(E, h, w)` of a grid, or `(E, N)` of a row, whose vectors get learned positions.
        vocab_size: K of learned vectors; None where the tokenizer's own codes are given.
    """

    def __init__(self, shape: tuple[int, ...], *, vocab_size: int | None) -> None:
        super().__init__()
        width, *self.grid = shape
        self.table = None if vocab_size is None else nn.Embedding(vocab_size, width)
        self.absent = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(0.02 * torch.randn(width, *self.grid)) if len(self.grid) == 1 else None

    def forward(self, ids: Tensor, codes: Tensor | None, dropped: Tensor) -> Tensor:
        """Return `(B, E, *grid)`.

        Args:
            ids: `(B, N)` in [0, K], K for tokens that are dropped.
            codes: `(B, E, *grid)`, of a tokenizer; None where vectors are learned.
            dropped: `(B,)` bool, the samples whose tokens are.
        """
        if self.table is not None:
            looked_up = self.table(ids.clamp(max=self.table.num_embeddings - 1))  # (B, N, E)
            codes = looked_up.transpose(1, 2).unflatten(2, self.grid)
        assert codes is not None
        ones = (1,) * len(self.grid)
        vectors = codes.to(self.absent.dtype)
        vectors = torch.where(dropped.view(-1, 1, *ones), self.absent.view(1, -1, *ones), vectors)
        return vectors if self.positions is None else vectors + self.positions

    def fsdp_units(self) -> Iterable[nn.Module]:
        """Give no parts: FSDP gathers it whole."""
        return ()


def _shape_read(
    discrete: Tokenizer, token_shape: tuple[int, ...], token_input: TokenInput, width: int
) -> tuple[int, ...]:
    """The shape `(E, *grid)` of what the network reads of the tokens of one image: of a grid, or of a row.

    Raises:
        ValueError: neither.
    """
    shape = (width, *token_shape)
    if token_input == "codes":
        with torch.no_grad():
            ids = torch.zeros(1, *token_shape, dtype=torch.int64, device=discrete.device)
            shape = tuple(discrete.embed(ids).shape[1:])
    if discrete.modality == "audio" and len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) not in (2, 3):
        raise ValueError(
            f"a decoder reads tokens as a grid of two axes or as a row; token_input={token_input!r} gives "
            f"{type(discrete).__name__}'s tokens of shape {token_shape} as {shape}"
        )
    return shape


def decoder_from_checkpoint(path: str) -> TokenDiffusionDecoder:
    """Load the decoder of a checkpoint, frozen.

    Raises:
        ValueError: the file is missing, broken, or holds no TokenDiffusionDecoder.
    """
    decoder = load(path)
    if not isinstance(decoder, TokenDiffusionDecoder):
        raise ValueError(f"decoder={path!r} holds a {type(decoder).__name__}, not a TokenDiffusionDecoder")
    return decoder.eval().requires_grad_(False)
