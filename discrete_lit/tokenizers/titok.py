"""TiTok: an image as a row of a few tokens, in no spatial order.

Yu et al., "An Image is Worth 32 Tokens for Reconstruction and Generation", NeurIPS 2024. A ViT reads the patches of the
image beside N learned latent tokens, and only these are quantised (`LatentTokenEncoder`); a second one reads their
codes beside a mask token for every patch, and gives the patches back (`LatentTokenDecoder`). `TiTokAutoencoder` is the
network, `TiTok` the tokenizer, which can be trained in the paper's two stages: first to predict the ids of another
tokenizer, a *proxy*, whose decoder makes the pixels (`ProxyDecoder`), then on the pixels.
"""

from collections.abc import Callable, Iterable
from math import prod
from typing import Any, Self, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.images import ImageSize, normal_size, size_of
from discrete_lit.core.modules import at_least_float32
from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer, Reconstruction
from discrete_lit.tokenizers.losses.frozen_networks import FrozenNetwork
from discrete_lit.tokenizers.networks.convolutional import ConvAutoencoder
from discrete_lit.tokenizers.networks.network import Autoencoder
from discrete_lit.tokenizers.networks.vit import (
    TransformerBlocks,
    TransformerSize,
    check_learned_size,
    initialise,
    layer_norm,
    patch_grid,
    tanh_head,
    transformer_blocks,
)
from discrete_lit.tokenizers.quantizers import Quantizer
from discrete_lit.tokenizers.tokenizer import from_checkpoint


class TiTokAutoencoder(Autoencoder):
    """Encode an image as a row of N latents, in no spatial order, and decode them.

    The positions of latents and patches are learned, so that one network fits one image size.

    Args:
        code_dim: D of the codes that the decoder takes; a tokenizer gives it.
        latent_dim: width of the encoder's latents; `code_dim` by default. A tokenizer gives it.
        image_size: of the images in pixels: the side of a square, or `[height, width]`.
        latent_tokens: N.
        patch_size: side of a patch in pixels.
        decoder_patch_size: side of a patch of the decoder; by default that of the encoder. With a `proxy` the image
            has the size that the proxy's decoder makes of as many patches.
        encoder, decoder: sizes. The paper's small, base and large have 512, 768 and 1024 wide sequences with 8, 12 and
            24 blocks and 8, 12 and 16 heads.
        image_channels: C of the images.
        proxy: the decoder predicts another tokenizer's ids, and that tokenizer's decoder makes the pixels (the paper's
            two stages). By default it makes them itself.
        legacy_reshape: read the N x D outputs of the encoder as D x N, without transposing them, before they are
            projected to latents, as the networks behind the checkpoints L-32, B-64 and S-128 do by mistake. Every
            latent then mixes several tokens.

    Raises:
        ValueError: an image size that the patches do not divide, a width that the heads do not divide.
    """

    def __init__(
        self,
        code_dim: int,
        latent_dim: int | None = None,
        *,
        image_size: ImageSize,
        latent_tokens: int,
        encoder: TransformerSize,
        decoder: TransformerSize,
        patch_size: int = 16,
        decoder_patch_size: int | None = None,
        image_channels: int = 3,
        proxy: "ProxyDecoder | None" = None,
        legacy_reshape: bool = False,
    ) -> None:
        super().__init__()
        if latent_tokens < 1:
            raise ValueError(f"latent_tokens must be positive, got {latent_tokens}")
        self.image_channels = image_channels
        self.image_size = normal_size(image_size)
        self.latent_tokens = latent_tokens
        decoder_patch_size = patch_size if decoder_patch_size is None else decoder_patch_size
        self.patch_grid = patch_grid(image_size, decoder_patch_size)
        latent_dim = code_dim if latent_dim is None else latent_dim
        self.encoder = LatentTokenEncoder(
            encoder,
            grid=patch_grid(image_size, patch_size),
            patch_size=patch_size,
            latent_tokens=latent_tokens,
            latent_dim=latent_dim,
            image_channels=image_channels,
            legacy_reshape=legacy_reshape,
        )
        self.decoder = LatentTokenDecoder(decoder, grid=self.patch_grid, latent_tokens=latent_tokens, code_dim=code_dim)
        if proxy is None:
            self.pixels = PatchPixels(
                decoder.width, grid=self.patch_grid, patch_size=decoder_patch_size, channels=image_channels
            )
        else:
            self.proxy_head = tanh_head(decoder.width, 2 * decoder.width, len(proxy.codebook))
        initialise(self)
        self.proxy = proxy  # with its own initialisation

    @property
    def last_layer(self) -> Tensor:
        return self.pixels.smooth.weight if self.proxy is None else self.proxy.network.last_layer

    def grid(self, image_size: ImageSize) -> tuple[int]:
        check_learned_size(image_size, self.image_size)
        return (self.latent_tokens,)

    def encode(self, images: Tensor) -> Tensor:
        self.grid(size_of(images))
        return self.encoder((images + 1) / 2)

    def decode(self, latents: Tensor) -> Tensor:
        if self.proxy is not None:
            return self.proxy(self.proxy_logits(latents))
        return self.pixels(self.decoder(latents)) * 2 - 1

    def hidden_layers(self) -> Iterable[nn.Module]:
        return transformer_blocks(self)

    def proxy_logits(self, latents: Tensor) -> Tensor:
        """Turn codes `(B, code_dim, N)` into logits `(B, K', h, w)` over the other tokenizer's ids, for each patch."""
        assert self.proxy is not None
        logits = self.proxy_head(self.decoder(latents))  # (B, P, K')
        return rearrange(logits, "b (h w) k -> b k h w", h=self.patch_grid[0])


class LatentTokenEncoder(nn.Module):
    """Encode images in [0, 1] as the latents of learned tokens that read the patches.

    Args:
        size: of the transformer.
        grid: rows and columns of patches.
        patch_size: side of a patch in pixels.
        latent_tokens: N.
        latent_dim: width of a latent.
        image_channels: C of the images.
        legacy_reshape: as for `TiTokAutoencoder`.
    """

    def __init__(
        self,
        size: TransformerSize,
        *,
        grid: tuple[int, int],
        patch_size: int,
        latent_tokens: int,
        latent_dim: int,
        image_channels: int,
        legacy_reshape: bool,
    ) -> None:
        super().__init__()
        self.legacy_reshape = legacy_reshape
        self.patch_embedding = nn.Conv2d(image_channels, size.width, patch_size, stride=patch_size)
        self.latent_tokens = nn.Parameter(size.width**-0.5 * torch.randn(latent_tokens, size.width))
        self.sequence = JointSequence(size, patches=prod(grid), latent_tokens=latent_tokens)
        self.project = nn.Linear(size.width, latent_dim)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, latent_dim, N)
        patches = rearrange(self.patch_embedding(images), "b d h w -> b (h w) d")
        _, latents = self.sequence(patches, self.latent_tokens.expand(len(images), -1, -1))  # (B, N, D)
        if self.legacy_reshape:
            batch, count, width = latents.shape
            latents = latents.reshape(batch, width, count).transpose(1, 2)  # the mistake: D x N, where N x D was meant
        return rearrange(self.project(latents), "b n d -> b d n")


class LatentTokenDecoder(nn.Module):
    """Decode the codes of the latent tokens to a vector for each patch, for which a mask token stands.

    Args:
        size: of the transformer.
        grid: rows and columns of patches.
        latent_tokens: N.
        code_dim: width of a code.
    """

    def __init__(self, size: TransformerSize, *, grid: tuple[int, int], latent_tokens: int, code_dim: int) -> None:
        super().__init__()
        self.code_embedding = nn.Linear(code_dim, size.width)
        self.mask_token = nn.Parameter(size.width**-0.5 * torch.randn(1, 1, size.width))
        self.sequence = JointSequence(size, patches=prod(grid), latent_tokens=latent_tokens)

    def forward(self, codes: Tensor) -> Tensor:  # (B, code_dim, N) -> (B, P, D)
        latents = self.code_embedding(rearrange(codes, "b d n -> b n d"))
        masks = self.mask_token.expand(len(codes), self.sequence.patches, -1).to(latents.dtype)
        return self.sequence(masks, latents)[0]


class JointSequence(nn.Module):
    """Pass a class token, the patches of the image and the latent tokens, in this order, through one transformer.

    Args:
        size: of the transformer.
        patches: how many there are.
        latent_tokens: how many there are, N.
    """

    def __init__(self, size: TransformerSize, *, patches: int, latent_tokens: int) -> None:
        super().__init__()
        self.patches = patches
        scale = size.width**-0.5
        self.class_token = nn.Parameter(scale * torch.randn(1, size.width))
        self.patch_positions = nn.Parameter(scale * torch.randn(1 + patches, size.width))  # with the class token's
        self.latent_positions = nn.Parameter(scale * torch.randn(latent_tokens, size.width))
        self.first_norm = layer_norm(size.width)
        self.blocks = TransformerBlocks(size)
        self.final_norm = layer_norm(size.width)

    def forward(self, patches: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Pass patches `(B, P, D)` and latent tokens `(B, N, D)` through it; returns both, in the same shapes."""
        start = self.class_token.expand(len(patches), 1, -1).to(patches.dtype)
        patches = torch.cat((start, patches), dim=1) + self.patch_positions
        sequence = self.first_norm(torch.cat((patches, latents + self.latent_positions), dim=1))
        _, patches, latents = self.final_norm(self.blocks(sequence)).split((1, self.patches, latents.shape[1]), dim=1)
        return patches, latents


class PatchPixels(nn.Module):
    """Make the pixels of each patch by a linear layer, and smooth the image by a 3x3 convolution.

    Args:
        width: D of a patch's vector.
        grid: rows and columns of patches.
        patch_size: side of a patch in pixels.
        channels: of the image.
    """

    def __init__(self, width: int, *, grid: tuple[int, int], patch_size: int, channels: int) -> None:
        super().__init__()
        self.grid, self.patch_size = grid, patch_size
        self.pixels = nn.Linear(width, patch_size**2 * channels)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, patches: Tensor) -> Tensor:  # (B, P, D) -> (B, C, H, W)
        pixels = rearrange(
            self.pixels(patches),
            "b (rows columns) (y x c) -> b c (rows y) (columns x)",
            rows=self.grid[0],
            y=self.patch_size,
            x=self.patch_size,
        )
        return self.smooth(pixels)


class ProxyDecoder(nn.Module):
    """Decode logits over another tokenizer's codes by its decoder, for TiTok's two-stage training.

    The codes are mixed by the softmax of the logits, without a choice, so that gradients pass.

    Args:
        codebook_size: K' of the other tokenizer.
        code_dim: D' of its codes.
        network: its network, called with `code_dim` twice; the encoder is not kept.
    """

    def __init__(self, codebook_size: int, code_dim: int, *, network: Callable[[int, int], ConvAutoencoder]) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))
        self.network = network(code_dim, code_dim)
        del self.network.encoder

    @torch.no_grad()
    def copy_from(self, codebook: Tensor, network: ConvAutoencoder) -> None:
        """Take the codes `(K', D')` and the decoder of the other tokenizer.

        Raises:
            ValueError: they have other shapes.
        """
        if codebook.shape != self.codebook.shape:
            raise ValueError(
                f"the proxy tokenizer has a codebook of shape {tuple(codebook.shape)}, this network's proxy one of "
                f"{tuple(self.codebook.shape)}: set proxy.init_args.codebook_size and code_dim"
            )
        self.codebook.copy_(codebook)
        own, given = self.network.decoder, network.decoder
        if own is None or given is None:
            raise ValueError("a proxy tokenizer decodes: neither network may have with_decoder: false")
        try:
            own.load_state_dict(given.state_dict(), strict=True)
        except RuntimeError as error:
            raise ValueError(
                f"the proxy tokenizer's decoder is another than proxy.init_args.network describes: {error}"
            ) from error

    def forward(self, logits: Tensor) -> Tensor:  # (B, K', h, w) -> (B, C, H, W) in [-1, 1]
        with torch.autocast(logits.device.type, enabled=False):
            probabilities, codebook = at_least_float32(logits).softmax(dim=1), at_least_float32(self.codebook)
            codes = torch.einsum("bkhw,kd->bdhw", probabilities, codebook)
        return self.network.decode(codes.to(self.network.dtype))


class TiTok(AutoencoderTokenizer):
    """Tokenize a whole image as a row of a few tokens.

    Trained in one stage like any autoencoder, or in the paper's two, whose network has a `proxy`:

    1. `proxy_tokenizer`: the decoder predicts the ids that another, frozen tokenizer (the paper's is MaskGIT's) gives
       the patches. The loss is their cross-entropy, `train/proxy`, and the quantizer's terms; no pixel loss applies.
    2. `first_stage`: what stage 1 learned begins; encoder and quantizer stay as they are, and the decoder with the
       proxy's is trained on the pixels.

    Args:
        network: called with the quantizer's `dim` and `latent_dim`.
        quantizer: the paper's is a `VectorQuantizer` of 4096 codes of width 12 on the unit sphere.
        proxy_tokenizer: for stage 1, the checkpoint of the other tokenizer, with a `ConvAutoencoder`. It is read when
            training starts.
        first_stage: for stage 2, the checkpoint of stage 1. It is read when training starts.
        training: settings of `ImageAutoencoder`: the losses, the optimizer, the scheduler.

    Raises:
        ValueError: both stages at once, or one without a proxy in the network.
    """

    network: TiTokAutoencoder

    def __init__(
        self,
        network: Callable[[int, int], TiTokAutoencoder],
        quantizer: Quantizer,
        *,
        proxy_tokenizer: str | None = None,
        first_stage: str | None = None,
        **training: Any,
    ) -> None:
        super().__init__(network, quantizer, **training)
        if proxy_tokenizer is not None and first_stage is not None:
            raise ValueError("proxy_tokenizer makes this stage 1 of two, first_stage makes it stage 2: set one of them")
        if (proxy_tokenizer or first_stage) and self.network.proxy is None:
            raise ValueError("training in two stages needs a network with a proxy: set network.init_args.proxy")
        if proxy_tokenizer and (self.objective.perceptual or self.objective.adversarial):
            raise ValueError("with proxy_tokenizer no pixels are compared: leave out perceptual_loss, adversarial_loss")
        self.first_stage = first_stage
        self.begins_from_first_stage = first_stage is not None
        self.proxy_tokenizer = None
        if proxy_tokenizer is not None:
            assert self.network.proxy is not None
            self.proxy_tokenizer = FrozenNetwork(lambda: _read_proxy(proxy_tokenizer))
            self.network.proxy.requires_grad_(False)
        if first_stage is not None:
            self.network.encoder.requires_grad_(False)
            self.quantizer.requires_grad_(False)

    def setup(self, stage: str) -> None:
        """Take the proxy's decoder, for stage 1.

        Raises:
            ValueError: no such checkpoint, or one that does not fit.
        """
        super().setup(stage)
        if stage == "fit" and self.proxy_tokenizer is not None:
            self._begin_from_proxy(cast(AutoencoderTokenizer, self.proxy_tokenizer.prepare()))

    def on_fit_start(self) -> None:
        """Take what stage 1 learned, for stage 2, unless a run goes on from its own checkpoint, or begins from another.

        Raises:
            ValueError: no such checkpoint, or one that does not fit.
        """
        if self.first_stage is not None and self.begins_from_first_stage and self.trainer.ckpt_path is None:
            self._begin_from_first_stage(self.first_stage)

    def _begin_from_proxy(self, tokenizer: AutoencoderTokenizer) -> None:
        network = self.network
        patches = network.patch_grid
        if tokenizer.token_shape(network.image_size) != patches:
            raise ValueError(
                f"the proxy tokenizer makes {tokenizer.token_shape(network.image_size)} ids of "
                f"{network.image_size} pixels, and this network has {patches} patches: set "
                "network.init_args.patch_size"
            )
        assert network.proxy is not None
        codes = tokenizer.quantizer.lookup(torch.arange(tokenizer.vocab_size)[None])[0]
        network.proxy.copy_from(codes, cast(ConvAutoencoder, tokenizer.network))

    def _begin_from_first_stage(self, checkpoint: str) -> None:
        first = from_checkpoint(checkpoint)
        if not isinstance(first, TiTok):
            raise ValueError(f"first_stage={checkpoint!r} holds a {type(first).__name__}, not a TiTok")
        try:
            self.network.load_state_dict(first.network.state_dict(), strict=True)
            self.quantizer.load_state_dict(first.quantizer.state_dict(), strict=True)
        except RuntimeError as error:
            raise ValueError(f"first_stage={checkpoint!r} is a TiTok of other sizes: {error}") from error

    def train(self, mode: bool = True) -> Self:
        """Set the mode as PyTorch does, but keep encoder and quantizer in eval mode in stage 2: no code may move."""
        super().train(mode)
        if self.first_stage is not None:
            self.network.encoder.eval()
            self.quantizer.eval()
        return self

    def loss(
        self, images: Tensor, *, step: int | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Reconstruction]:
        if self.proxy_tokenizer is None:
            return super().loss(images, step=step, index=index)
        with torch.no_grad():
            ids = self.proxy_tokenizer.on(images.device).encode(images)  # (B, h, w)
        quantized = self.quantizer(self.latents(images))
        codes = rearrange(quantized.z_q, "b n d -> b d n").to(self.network.dtype)
        logits = at_least_float32(self.network.proxy_logits(codes))  # (B, K', h, w)
        terms = {"proxy": F.cross_entropy(logits, ids), **quantized.losses}
        # Pixels are for validation alone.
        assert self.network.proxy is not None
        outputs = logits if self.training else at_least_float32(self.network.proxy(logits))
        made = Reconstruction(outputs=outputs, losses=quantized.losses, tokens=quantized.tokens)
        return torch.stack(list(terms.values())).sum(), terms, made

    def reconstruct(self, images: Tensor, *, step: int | None = None, index: Tensor | None = None) -> Reconstruction:
        made = super().reconstruct(images, step=step, index=index)
        if self.first_stage is not None:
            made.losses = {}  # encoder and quantizer do not learn
        return made


def _read_proxy(checkpoint: str) -> AutoencoderTokenizer:
    """The frozen tokenizer whose ids stage 1 predicts.

    Raises:
        ValueError: not a checkpoint of a tokenizer around a `ConvAutoencoder`.
    """
    tokenizer = from_checkpoint(checkpoint)
    if not (isinstance(tokenizer, AutoencoderTokenizer) and isinstance(tokenizer.network, ConvAutoencoder)):
        raise ValueError(
            f"proxy_tokenizer={checkpoint!r} holds a {type(tokenizer).__name__}; the proxy must be a tokenizer around "
            "a ConvAutoencoder"
        )
    return tokenizer
