"""EnCodec in overlapping chunks of a fixed loudness: the model at 48 kHz (Défossez et al., 2022, section 3.1).

    waveform -> chunks that overlap a little, each divided by its root mean square -> EnCodec -> codes of each chunk
    codes -> EnCodec -> chunks, times their root mean squares -> cross-faded

So a network that looks at a whole clip (no causal padding, GroupNorm over time) codes clips of any length. The root
mean square of each chunk is a number beside the codes. A generator makes codes alone: what it draws is decoded at one
loudness.
"""

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import in_evaluation
from discrete_lit.tokenizers.autoencoder import Reconstruction
from discrete_lit.tokenizers.encodec import EnCodec


class ChunkedEnCodec(EnCodec):
    """Tokenize waveforms chunk by chunk, each at a loudness of 1: ids `(B, chunks * frames of a chunk, books)`.

    A clip of T samples has `ceil(T / (chunk_length - overlap))` chunks; the last is filled up with silence. (The
    published code adds a chunk of `overlap` samples, which is behind the clip.) Arguments that are not listed are those
    of `EnCodec`.

    Args:
        chunk_length: samples of a chunk, a multiple of the network's `hop`; 48,000 in the published model.
        overlap: samples that a chunk shares with the next; 480 in the published model.
        loudness: the root mean square that `decode` gives every chunk, where nothing else is said.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(self, *args: Any, chunk_length: int, overlap: int, loudness: float = 0.1, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if chunk_length < 1 or chunk_length % self.hop or not 0 <= overlap < chunk_length or not loudness > 0:
            raise ValueError(
                f"chunk_length={chunk_length}, overlap={overlap} and loudness={loudness}: a chunk must be a multiple "
                f"of the network's hop, {self.hop} samples, the overlap in 0..chunk_length - 1, the loudness above 0"
            )
        self.chunk_length, self.overlap, self.loudness = chunk_length, overlap, loudness

    def chunks(self, length: int) -> int:
        """The chunks of a clip of so many samples."""
        return ceil(length / (self.chunk_length - self.overlap))

    def token_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        _ = self.network.grid(image_size)  # refuses another size
        length = image_size if isinstance(image_size, int) else image_size[0]
        return (self.chunks(length) * self.chunk_length // self.hop, self.books)

    def cut(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Cut waveforms `(B, C, T)` into chunks `(B, n, C, chunk_length)`, and give the scale of each, `(B, n)`.

        The scale is the root mean square of the mean of the channels, plus 1e-8, by which the chunk is divided.
        """
        stride = self.chunk_length - self.overlap
        missing = self.chunks(images.shape[-1]) * stride + self.overlap - images.shape[-1]
        parts = rearrange(F.pad(images, (0, missing)).unfold(-1, self.chunk_length, stride), "b c n t -> b n c t")
        scales = parts.mean(dim=2).square().mean(dim=-1).sqrt() + 1e-8
        return parts / scales[..., None, None], scales

    def join(self, parts: Tensor) -> Tensor:
        """Cross-fade chunks `(B, n, C, chunk_length)` to waveforms: `(B, C, n * (chunk_length - overlap) + overlap)`.

        Each chunk weighs as a triangle over its samples; weights are divided by their sum.
        """
        place = torch.linspace(0, 1, self.chunk_length + 2, device=parts.device, dtype=parts.dtype)[1:-1]
        weight, stride = 0.5 - (place - 0.5).abs(), self.chunk_length - self.overlap
        length = parts.shape[1] * stride + self.overlap
        total, weights = parts.new_zeros(len(parts), parts.shape[2], length), parts.new_zeros(length)
        for number, part in enumerate(parts.unbind(dim=1)):
            here = slice(number * stride, number * stride + self.chunk_length)
            total[..., here] = total[..., here] + weight * part
            weights[here] += weight
        return total / weights

    def latents(self, images: Tensor) -> Tensor:
        """Waveforms `(B, C, T)` in [-1, 1] to latents `(B, chunks * frames, D)`."""
        parts, _ = self.cut(images)
        found = super().latents(parts.flatten(0, 1))
        return rearrange(found, "(b n) f d -> b (n f) d", b=len(images))

    @torch.no_grad()
    def scales(self, images: Tensor) -> Tensor:
        """Measure the root mean square of each chunk of waveforms `(B, C, T)`: `(B, n)`, which `decode` takes."""
        return self.cut(images)[1]

    @in_evaluation
    def decode(self, tokens: Tensor, scales: Tensor | None = None) -> Tensor:
        """Turn ids `(B, chunks * frames, books)` into waveforms `(B, C, T)` in [-1, 1].

        Args:
            tokens: int64 in [0, K), of whole chunks.
            scales: `(B, chunks)` of `scales`; the codec's own loudness by default.

        Raises:
            ValueError: an id outside [0, K), more books than the codec has, or frames that are no whole chunks.
        """
        self.check_tokens(tokens)
        return self.to_images(self._decoded(self.quantizer.lookup(tokens), scales))

    def streaming_decoder(self) -> Callable[[Tensor], Tensor]:
        """Refuse: a chunk is heard when all of it is there.

        Raises:
            ValueError: always.
        """
        raise ValueError("ChunkedEnCodec decodes whole chunks, which decode takes one or several at a time")

    def coding_state(self) -> dict[str, Tensor]:
        """The state of an `EnCodec`, and the settings of the chunks."""
        of_chunks = torch.tensor((self.chunk_length, self.overlap, self.loudness), dtype=torch.float64)
        return super().coding_state() | {"chunks": of_chunks}

    def _decoded(self, codes: Tensor, scales: Tensor | None) -> Tensor:
        frames = self.chunk_length // self.hop
        if codes.shape[1] % frames:
            raise ValueError(f"a chunk of this codec has {frames} frames, got ids of {codes.shape[1]} frames")
        parts = self.outputs(rearrange(codes, "b (n f) d -> (b n) f d", f=frames))
        parts = rearrange(parts, "(b n) c t -> b n c t", b=len(codes))
        scale = torch.tensor(self.loudness) if scales is None else scales[..., None, None]
        return self.join(parts * scale.to(parts))

    def reconstruct(self, images: Tensor, *, step: int | None = None, index: Tensor | None = None) -> Reconstruction:
        latents, scales = self.latents(images), self.scales(images)
        if step is not None and step < self.autoencoder_steps:
            return Reconstruction(outputs=self._decoded(latents, scales)[..., : images.shape[-1]])
        quantized = self.quantizer(latents, depth=self._books_at(step))
        outputs = self._decoded(quantized.z_q, scales)[..., : images.shape[-1]]
        return Reconstruction(outputs=outputs, losses=quantized.losses, tokens=quantized.tokens)

    def reconstruct_by(self, images: Tensor, books: int) -> Tensor:
        tokens = self.encode(images, books=books)
        return self.decode(tokens, self.scales(images))[..., : images.shape[-1]]
