"""Continuous tokenizers without a network of their own, for generators of latents.

`RawPixels` gives pixels as they are, `RawFrames` the samples of a waveform, `CodebookLatents` what another tokenizer
has before its codebook, and `LatentGrid` the shape of latents whose tokenizer is missing.
"""

from typing import NoReturn

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.checkpoints import record_config
from discrete_lit.core.images import ImageSize, check_channels, height_and_width
from discrete_lit.core.modules import at_least_float32, in_evaluation
from discrete_lit.core.random import CounterRandom
from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer
from discrete_lit.tokenizers.tokenizer import ContinuousTokenizer, Tokenizer

# Of latents that are no random variable.
LEAST_LOGVAR = -30.0


class RawPixels(ContinuousTokenizer):
    """Give a generator of latents the pixels themselves, in [-1, 1].

    Args:
        image_channels: C of the images.
        scale: what `encode` multiplies pixels by and `decode` divides them by; pixels have a deviation near 0.5.

    Raises:
        ValueError: no channels, or a scale that is not above 0.
    """

    def __init__(self, image_channels: int = 3, *, scale: float = 1.0) -> None:
        super().__init__()
        if image_channels < 1 or not 0 < scale < float("inf"):
            raise ValueError(f"image_channels and scale must be above 0, got {image_channels} and {scale}")
        self.latent_dim = self.image_channels = image_channels
        self.scale = scale

    def latent_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        return (self.latent_dim, *height_and_width(image_size))

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.encode(images)
        return latents, torch.full_like(latents, LEAST_LOGVAR)

    def encode(self, images: Tensor, random: CounterRandom | None = None) -> Tensor:
        check_channels(images, self.latent_dim, "this RawPixels")
        self.check_images(images)
        return at_least_float32(images) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        self.check_latents(latents)
        return (at_least_float32(latents) / self.scale).clamp(-1, 1)

    def coding_state(self) -> dict[str, Tensor]:
        """The channels and the scale: all that tells two of them apart."""
        return {"scale": torch.tensor((self.latent_dim, self.scale), dtype=torch.float64)}


class RawFrames(ContinuousTokenizer):
    """Give a generator of latents the samples of a waveform, those of a frame as the channels of one place.

    Waveforms `(B, C, T)` become latents `(B, C * hop, ceil(T / hop), 1)`: a column of places, for the networks of a
    grid. The last frame is filled up with silence; decoded are whole frames.

    Args:
        hop: samples of a frame; with that of a codec its codes and these frames stand side by side.
        audio_channels: C of the waveforms.
        scale: what `encode` multiplies samples by and `decode` divides them by, 1 / their deviation.

    Raises:
        ValueError: a setting that is not above 0.
    """

    modality = "audio"
    makes_images = False

    def __init__(self, hop: int, *, audio_channels: int = 1, scale: float = 1.0) -> None:
        super().__init__()
        if min(hop, audio_channels) < 1 or not 0 < scale < float("inf"):
            raise ValueError(f"hop, audio_channels and scale must be above 0, got {hop}, {audio_channels} and {scale}")
        self.hop, self.image_channels, self.scale = hop, audio_channels, scale
        self.latent_dim = audio_channels * hop

    def latent_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        if isinstance(image_size, int) or len(image_size) != 1 or image_size[0] < 1:
            raise ValueError(f"image_size of audio is [samples], one number in a list, got {image_size}")
        return (self.latent_dim, -(-image_size[0] // self.hop), 1)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.encode(images)
        return latents, torch.full_like(latents, LEAST_LOGVAR)

    def encode(self, images: Tensor, random: CounterRandom | None = None) -> Tensor:
        """Turn waveforms `(B, C, T)`, float in [-1, 1], into latents `(B, C * hop, frames, 1)`.

        Raises:
            ValueError: another shape, or samples that are not finite numbers.
        """
        if images.ndim != 3 or images.shape[1] != self.image_channels or images.shape[2] < 1:
            raise ValueError(f"waveforms (B, {self.image_channels}, T) are taken, got {tuple(images.shape)}")
        self.check_images(images)
        whole = F.pad(at_least_float32(images), (0, -images.shape[-1] % self.hop))
        return rearrange(whole, "b c (n hop) -> b (c hop) n 1", hop=self.hop) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents `(B, C * hop, frames, 1)` into waveforms `(B, C, frames * hop)` in [-1, 1]."""
        self.check_latents(latents)
        waveforms = rearrange(latents, "b (c hop) n 1 -> b c (n hop)", hop=self.hop)
        return (at_least_float32(waveforms) / self.scale).clamp(-1, 1)

    def coding_state(self) -> dict[str, Tensor]:
        """The frame, the channels and the scale: all that tells two of them apart."""
        return {"scale": torch.tensor((self.hop, self.image_channels, self.scale), dtype=torch.float64)}


class LatentGrid(ContinuousTokenizer):
    """Say how many channels latents have and on what grid, in place of a tokenizer that is not there.

    A generator around it models and samples latents; images need the tokenizer that these are of.

    Args:
        latent_shape: `(D, *grid)`, whatever the image size.

    Raises:
        ValueError: an empty shape; in use, whenever images are asked for.
    """

    makes_images = False

    def __init__(self, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(latent_shape) < 2 or min(latent_shape) < 1:
            raise ValueError(f"latent_shape must be (D, *grid), positive numbers, got {tuple(latent_shape)}")
        self.latent_dim = latent_shape[0]
        self.shape = tuple(latent_shape)

    def latent_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        return self.shape

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self._refuse()

    def encode(self, images: Tensor, random: CounterRandom | None = None) -> Tensor:
        self._refuse()

    def decode(self, latents: Tensor) -> Tensor:
        self._refuse()

    def coding_state(self) -> dict[str, Tensor]:
        """The shape: all that tells two of them apart."""
        return {"shape": torch.tensor(self.shape)}

    def _refuse(self) -> NoReturn:
        shape = " x ".join(map(str, self.shape))
        raise ValueError(
            f"this generator was loaded without its tokenizer, which codes images as {shape} latents: give it the "
            "tokenizer that its latents are of to go from or to images"
        )


class CodebookLatents(ContinuousTokenizer):
    """Give a generator of latents what a tokenizer of ids has before its codebook, which then only decodes (LDM).

    Latents are the encoder's; `decode` gives each the nearest code first, as LDM's `VQModelInterface` does.

    Args:
        tokenizer: with an autoencoder and a quantizer, such as `VQGAN`; frozen here. `from_checkpoint` in a YAML.
        scale_factor: what `encode` multiplies latents by and `decode` divides them by; 1 in LDM.

    Raises:
        ValueError: a tokenizer without them, or a scale that is not above 0.
    """

    tokenizer: AutoencoderTokenizer

    def __init__(self, tokenizer: Tokenizer, *, scale_factor: float = 1.0) -> None:
        super().__init__()
        if not isinstance(tokenizer, AutoencoderTokenizer):
            raise ValueError(
                f"CodebookLatents needs a tokenizer with a codebook behind an autoencoder, got a "
                f"{type(tokenizer).__name__}"
            )
        if not 0 < scale_factor < float("inf"):
            raise ValueError(f"scale_factor must be above 0 and finite, got {scale_factor}")
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.latent_dim = tokenizer.quantizer.latent_dim
        self.scale_factor = scale_factor
        if "class_path" in tokenizer.hparams:
            # Not by the file that it came from.
            inner = {name: tokenizer.hparams[name] for name in ("class_path", "init_args")}
            record_config(
                self,
                {
                    "class_path": "discrete_lit.tokenizers.CodebookLatents",
                    "init_args": {"tokenizer": inner, "scale_factor": scale_factor},
                },
            )

    def latent_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        return (self.latent_dim, *self.tokenizer.network.grid(image_size))

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.encode(images)
        return latents, torch.full_like(latents, LEAST_LOGVAR)

    @in_evaluation
    def encode(self, images: Tensor, random: CounterRandom | None = None) -> Tensor:
        self.check_images(images)
        return rearrange(at_least_float32(self.tokenizer.latents(images)), "b ... d -> b d ...") * self.scale_factor

    @in_evaluation
    def decode(self, latents: Tensor) -> Tensor:
        self.check_latents(latents)
        places = rearrange(latents / self.scale_factor, "b d ... -> b ... d")
        return self.tokenizer.decode(self.tokenizer.quantizer.encode(places))

    def coding_state(self) -> dict[str, Tensor]:
        """The weights of the tokenizer, and the scale."""
        weights = {f"tokenizer.{name}": value for name, value in self.tokenizer.coding_state().items()}
        return weights | {"scale_factor": torch.tensor(self.scale_factor, dtype=torch.float64)}
