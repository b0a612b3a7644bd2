"""EnCodec's autoencoder of waveforms (Défossez et al., "High Fidelity Neural Audio Compression", 2022, section 3.1).

SEANet (Tagliasacchi et al., 2020) on one axis: convolutions, residual blocks and strides, with an LSTM at the lowest
rate of encoder and decoder. With causal padding a frame's code depends on the samples up to its own alone, and a frame
decodes to `hop` samples from the codes up to its own: `streaming_decoder` gives them as the codes come, the same as
`decode` of them all.
"""

from collections.abc import Iterable, Sequence
from math import ceil, prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from discrete_lit.core.images import ImageSize
from discrete_lit.tokenizers.networks.network import Autoencoder

ConvNorm = Literal["weight", "group", "none"]
Padding = Literal["constant", "reflect", "replicate"]

Memory = dict[nn.Module, tuple[Tensor, ...]]
"""The numbers that each layer keeps of the pieces that were decoded before."""


class SEANet(Autoencoder):
    """Encode waveforms `(B, C, T)` to latents `(B, D, ceil(T / hop))`, and decode them.

    The defaults are those of EnCodec at 24 kHz, but for the padding: the published model reflects the beginning of a
    clip, which makes the first frames wait for the samples behind them.

    Args:
        code_dim, latent_dim: D of the decoder's input and of the encoder's output; a tokenizer gives them.
        audio_channels: C: 1 for mono, 2 for stereo.
        filters: channels at the highest rate; they double with every stride.
        ratios: strides of the decoder, from the lowest rate up; the encoder has them in turn. `hop` is their product.
        residual_layers: residual blocks at each rate.
        kernel: of the first convolutions of encoder and decoder.
        last_kernel: of their last ones.
        residual_kernel: of the residual blocks.
        dilation_growth: the residual block j at a rate has the dilation `dilation_growth ** j`.
        compress: the residual blocks have this many times fewer channels inside.
        conv_shortcut: a 1 x 1 convolution around a residual block, in the place of the identity.
        lstm_layers: layers of each LSTM, which is residual; 0 for none.
        norm: of the convolutions: weight normalisation, GroupNorm with one group (EnCodec at 48 kHz, which cannot be
            streamed), or none.
        causal: pad on the left alone; else on both sides (EnCodec at 32 kHz).
        padding: what the edges are padded with; 0 is `"constant"`.
        trim_right: fraction of what a transposed convolution makes too much that is cut off on the right.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        code_dim: int,
        latent_dim: int,
        *,
        audio_channels: int = 1,
        filters: int = 32,
        ratios: Sequence[int] = (8, 5, 4, 2),
        residual_layers: int = 1,
        kernel: int = 7,
        last_kernel: int = 7,
        residual_kernel: int = 3,
        dilation_growth: int = 2,
        compress: int = 2,
        conv_shortcut: bool = True,
        lstm_layers: int = 2,
        norm: ConvNorm = "weight",
        causal: bool = True,
        padding: Padding = "constant",
        trim_right: float = 1.0,
    ) -> None:
        super().__init__()
        sizes = {"audio_channels": audio_channels, "filters": filters, "compress": compress, "kernel": kernel}
        sizes |= {"last_kernel": last_kernel, "residual_kernel": residual_kernel, "dilation_growth": dilation_growth}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} of SEANet must be at least 1, got {value}")
        if not ratios or min(ratios) < 1 or min(residual_layers, lstm_layers) < 0 or filters % compress:
            raise ValueError(
                "SEANet needs ratios of at least 1, residual_layers and lstm_layers of at least 0, and a compress that "
                f"divides filters; got {list(ratios)}, {residual_layers}, {lstm_layers}, {compress} and {filters}"
            )
        if norm not in ("weight", "group", "none") or padding not in ("constant", "reflect", "replicate"):
            raise ValueError(
                "norm of SEANet must be 'weight', 'group' or 'none', and padding 'constant', 'reflect' or 'replicate'; "
                f"got {norm!r} and {padding!r}"
            )
        if not 0 <= trim_right <= 1 or (trim_right != 1 and not causal):
            raise ValueError(f"trim_right of SEANet must lie in [0, 1], and be 1 with causal: false; got {trim_right}")
        self.image_channels = audio_channels
        self.ratios = tuple(ratios)
        self.hop = prod(ratios)
        self.norm: ConvNorm = norm
        self.streams = causal and norm != "group" and trim_right == 1

        def conv(inner: int, outer: int, size: int, *, stride: int = 1, dilation: int = 1) -> PaddedConv1d:
            return PaddedConv1d(
                inner, outer, kernel=size, stride=stride, dilation=dilation, norm=norm, causal=causal, padding=padding
            )

        def residuals(width: int) -> list[nn.Module]:
            return [
                ResidualUnit(
                    conv(width, width // compress, residual_kernel, dilation=dilation_growth**number),
                    conv(width // compress, width, 1),
                    shortcut=conv(width, width, 1) if conv_shortcut else None,
                )
                for number in range(residual_layers)
            ]

        encoder: list[nn.Module] = [conv(audio_channels, filters, kernel)]
        width = filters
        for ratio in reversed(self.ratios):
            encoder += [*residuals(width), nn.ELU(), conv(width, 2 * width, 2 * ratio, stride=ratio)]
            width *= 2
        memory = [ResidualLSTM(width, lstm_layers)] if lstm_layers else []
        self.encoder = nn.ModuleList([*encoder, *memory, nn.ELU(), conv(width, latent_dim, last_kernel)])
        decoder: list[nn.Module] = [conv(code_dim, width, kernel)]
        if lstm_layers:
            decoder.append(ResidualLSTM(width, lstm_layers))
        for ratio in self.ratios:
            up = TrimmedConvTranspose1d(
                width, width // 2, kernel=2 * ratio, stride=ratio, norm=norm, causal=causal, trim_right=trim_right
            )
            width //= 2
            decoder += [nn.ELU(), up, *residuals(width)]
        self.decoder = nn.ModuleList([*decoder, nn.ELU(), conv(width, audio_channels, last_kernel)])
        # Frames that the left edge of the first convolution reflects.
        self.first_frames = kernel if padding == "reflect" else 1

    @property
    def last_layer(self) -> Tensor:
        return _weight(self.decoder[-1])

    @property
    def last_encoder_layer(self) -> Tensor:
        return _weight(self.encoder[-1])

    def grid(self, image_size: ImageSize) -> tuple[int, ...]:
        """The frames of a clip of so many samples, `(ceil(T / hop),)`; `image_size` is T or `(T,)`.

        Raises:
            ValueError: another size.
        """
        size = image_size if isinstance(image_size, int) else image_size[0]
        if not isinstance(image_size, int) and len(image_size) != 1:
            raise ValueError(f"image_size of audio is [samples], one number in a list, got {list(image_size)}")
        if size < 1:
            raise ValueError(f"image_size of audio must be at least one sample, got {size}")
        return (ceil(size / self.hop),)

    def encode(self, images: Tensor) -> Tensor:
        """Encode waveforms `(B, C, T)` in [-1, 1] to latents `(B, latent_dim, ceil(T / hop))`.

        The last frame of a clip whose length `hop` does not divide is filled up at every stride, as EnCodec does.
        """
        return _run(self.encoder, images)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode codes `(B, code_dim, n)` to waveforms `(B, C, n * hop)`, about [-1, 1] and not clamped."""
        return _run(self.decoder, latents)

    def streaming_decoder(self) -> "StreamingDecoder":
        """Make a decoder that is given the codes piece by piece.

        Raises:
            ValueError: a network that is not causal.
        """
        if not self.streams:
            raise ValueError(
                "this SEANet cannot decode piece by piece: that needs causal=true, trim_right=1 and a norm that does "
                f"not look at the whole clip, 'weight' or 'none' (it has {self.norm!r})"
            )
        return StreamingDecoder(self)


class StreamingDecoder:
    """Decode codes as they come: the pieces that it gives are `SEANet.decode` of all codes, cut.

    Args:
        network: causal.
    """

    def __init__(self, network: SEANet) -> None:
        self._network = network
        self._memory: Memory = {}
        self._waiting: Tensor | None = None

    def __call__(self, codes: Tensor) -> Tensor:
        """Decode the next codes `(B, code_dim, n)`: the samples `(B, C, m)` that are known by now.

        m is n * hop, except that reflected padding needs the first `kernel` frames together: until then m is 0.
        """
        if self._waiting is not None:
            codes = torch.cat((self._waiting, codes), dim=-1)
            self._waiting = None
        if not self._memory and codes.shape[-1] < self._network.first_frames:
            self._waiting = codes
            return codes.new_zeros(len(codes), self._network.image_channels, 0)
        return _run(self._network.decoder, codes, self._memory)

    def finish(self) -> Tensor | None:
        """Decode what waits for more codes, of a clip shorter than the first convolution; None if nothing does."""
        waiting, self._waiting = self._waiting, None
        return None if waiting is None else self._network.decode(waiting)


class PaddedConv1d(nn.Module):
    """A convolution whose input is padded so that n samples give ceil(n / stride)."""

    def __init__(
        self,
        inner: int,
        outer: int,
        *,
        kernel: int,
        stride: int,
        dilation: int,
        norm: ConvNorm,
        causal: bool,
        padding: Padding,
    ) -> None:
        super().__init__()
        self.conv = _normed(nn.Conv1d(inner, outer, kernel, stride, dilation=dilation), norm)
        self.norm = nn.GroupNorm(1, outer) if norm == "group" else None
        self.stride = stride
        self.missing = (kernel - 1) * dilation + 1 - stride
        self.causal, self.padding = causal, padding

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:  # (B, D, n) -> (B, D', ceil(n / stride))
        if memory is not None and self in memory:
            padded = torch.cat((memory[self][0], x), dim=-1)
        else:
            extra = -x.shape[-1] % self.stride  # the last frame is filled up
            right = 0 if self.causal else self.missing // 2
            padded = _padded(x, self.missing - right, right + extra, self.padding)
        if memory is not None:
            assert self.stride == 1, "a decoder has no strides"
            memory[self] = (padded[..., padded.shape[-1] - self.missing :],)
        x = self.conv(padded)
        return x if self.norm is None else self.norm(x)


class TrimmedConvTranspose1d(nn.Module):
    """A transposed convolution that gives n * stride samples of n."""

    def __init__(
        self, inner: int, outer: int, *, kernel: int, stride: int, norm: ConvNorm, causal: bool, trim_right: float
    ) -> None:
        super().__init__()
        self.conv = _normed(nn.ConvTranspose1d(inner, outer, kernel, stride), norm)
        self.norm = nn.GroupNorm(1, outer) if norm == "group" else None
        self.stride = stride
        surplus = kernel - stride
        self.right = ceil(surplus * trim_right) if causal else surplus // 2
        self.left = surplus - self.right
        self.context = ceil(surplus / stride)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:  # (B, D, n) -> (B, D', n * stride)
        new = x.shape[-1]
        if memory is not None and self in memory:
            x = torch.cat((memory[self][0], x), dim=-1)
        if memory is not None:
            memory[self] = (x[..., max(x.shape[-1] - self.context, 0) :],)
        before = (x.shape[-1] - new) * self.stride
        x = self.conv(x)
        # The norm of the published code sees what is cut off too.
        x = x if self.norm is None else self.norm(x)
        return x[..., self.left + before : x.shape[-1] - self.right]


class ResidualUnit(nn.Module):
    """Two convolutions behind ELUs, and a way around them."""

    def __init__(self, first: PaddedConv1d, second: PaddedConv1d, *, shortcut: PaddedConv1d | None) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = first, second, shortcut

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:  # (B, D, n) -> (B, D, n)
        inside = self.second(F.elu(self.first(F.elu(x), memory)), memory)
        return inside + (x if self.shortcut is None else self.shortcut(x, memory))


class ResidualLSTM(nn.Module):
    """An LSTM along the frames, added to its input."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, layers)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:  # (B, D, n) -> (B, D, n)
        frames = x.permute(2, 0, 1)
        state = None if memory is None else memory.get(self)
        read, state = self.lstm(frames, state)
        if memory is not None:
            memory[self] = state
        return (read + frames).permute(1, 2, 0)


def _run(layers: Iterable[nn.Module], x: Tensor, memory: Memory | None = None) -> Tensor:
    for layer in layers:
        x = layer(x) if isinstance(layer, nn.ELU) else layer(x, memory)
    return x


def _normed(conv: nn.Conv1d | nn.ConvTranspose1d, norm: ConvNorm) -> nn.Module:
    return weight_norm(conv) if norm == "weight" else conv


def _weight(layer: nn.Module) -> Tensor:
    """The weight of a convolution that is trained: of a normalised one its direction, before the norm."""
    assert isinstance(layer, PaddedConv1d)
    parameters = dict(layer.conv.named_parameters())
    return parameters.get("parametrizations.weight.original1", parameters.get("weight"))  # type: ignore[return-value]


def _padded(x: Tensor, left: int, right: int, mode: Padding) -> Tensor:
    """Pad the last axis; what is too short to be reflected is filled up with zeros before, as EnCodec does."""
    most, length = max(left, right), x.shape[-1]
    if mode != "reflect" or length > most:
        return F.pad(x, (left, right), mode=mode)
    short = most - length + 1
    padded = F.pad(F.pad(x, (0, short)), (left, right), mode="reflect")
    return padded[..., : padded.shape[-1] - short]
