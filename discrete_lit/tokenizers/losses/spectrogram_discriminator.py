"""The discriminator of EnCodec, and its losses (Défossez et al., "High Fidelity Neural Audio Compression", 2022, 3.4).

It looks at the complex spectrum of a waveform at several scales, each with a network of its own, D_1 ... D_K:

    L_D    = 1/K sum_k  mean max(0, 1 - D_k(x)) + mean max(0, 1 + D_k(y))                    trains D; y is a constant
    L_G    = 1/K sum_k  mean max(0, 1 - D_k(y))                                              trains the autoencoder
    L_feat = 1/(K L) sum_k sum_l  mean |D_k^l(x) - D_k^l(y)| / mean |D_k^l(x)|               trains it too

with D^l the feature maps of layer l. When each trains, and how one backward pass serves both, stands in
`adversarial.py`. EnCodec leaves out two of three updates of D at 24 kHz; here it trains at every step, with a learning
rate of its own (`learning_rate_factor`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from discrete_lit.core.modules import at_least_float32
from discrete_lit.tokenizers.losses.adversarial import AdversarialLoss, take_gradients
from discrete_lit.tokenizers.losses.discriminators import Discriminator

_TIME_DILATIONS = (1, 2, 4)


class MultiScaleSTFTDiscriminator(Discriminator):
    """Tell waveforms from reconstructions by their complex spectra at several scales (EnCodec's MS-STFT).

    Args:
        audio_channels: C of the waveforms.
        filters: channels of every convolution.
        windows: of the scales in samples; neighbouring ones overlap by three quarters.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self, *, audio_channels: int = 1, filters: int = 32, windows: Sequence[int] = (2048, 1024, 512, 256, 128)
    ) -> None:
        super().__init__()
        if audio_channels < 1 or filters < 1 or not windows or min(windows) < 16:
            raise ValueError(
                "MultiScaleSTFTDiscriminator needs audio_channels and filters of at least 1 and windows of at least 16 "
                f"samples, got {audio_channels}, {filters} and {list(windows)}"
            )
        self.windows = tuple(windows)
        self.networks = nn.ModuleList(_STFTNetwork(audio_channels, filters, window=window) for window in windows)

    def scales(self, waveforms: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        """Give logits and feature maps of `(B, C, T)` at each scale.

        Raises:
            ValueError: clips that are shorter than the longest window.
        """
        if waveforms.shape[-1] < max(self.windows):
            raise ValueError(
                f"this discriminator takes clips of at least {max(self.windows)} samples, its longest window, got "
                f"{waveforms.shape[-1]}: give it shorter windows, or the data a longer length"
            )
        return [network(waveforms) for network in self.networks]

    def forward(self, images: Tensor) -> Tensor:  # (B, C, T) -> (B, n)
        return torch.cat([logits.flatten(1) for logits, _ in self.scales(images)], dim=1)


class _STFTNetwork(nn.Module):
    """Convolutions over time and frequency of one scale."""

    def __init__(self, audio_channels: int, filters: int, *, window: int) -> None:
        super().__init__()
        self.window = window
        layers = [_conv(2 * audio_channels, filters, (3, 9))]
        layers += [_conv(filters, filters, (3, 9), dilation=dilation) for dilation in _TIME_DILATIONS]
        layers.append(_conv(filters, filters, (3, 3)))
        self.layers = nn.ModuleList(layers)
        self.last = _conv(filters, 1, (3, 3))

    def forward(self, waveforms: Tensor) -> tuple[Tensor, list[Tensor]]:  # (B, C, T) -> (B, 1, frames, f), features
        batch, channels = waveforms.shape[:2]
        waveforms = at_least_float32(waveforms)
        hann = torch.hann_window(self.window, device=waveforms.device, dtype=waveforms.dtype)
        spectrum = torch.stft(
            waveforms.flatten(0, 1),
            self.window,
            hop_length=self.window // 4,
            window=hann,
            center=False,
            normalized=True,
            return_complex=True,
        )
        spectrum = torch.view_as_real(spectrum).unflatten(0, (batch, channels))  # (B, C, f, frames, 2)
        x = spectrum.permute(0, 1, 4, 3, 2).flatten(1, 2)  # (B, 2 C, frames, f)
        x = x.to(next(self.parameters()).dtype)
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.last(x), features


def _conv(inner: int, outer: int, kernel: tuple[int, int], *, dilation: int | None = None) -> nn.Module:
    """A convolution over time and frequency; with a dilation, in time, it halves the frequencies."""
    padding = (kernel[0] - 1) // 2 * (dilation or 1), (kernel[1] - 1) // 2
    stride = (1, 1) if dilation is None else (1, 2)
    return weight_norm(
        nn.Conv2d(inner, outer, kernel, stride=stride, padding=padding, dilation=(dilation or 1, 1)), dim=0
    )


@dataclass(kw_only=True)
class SpectrogramTerms:
    """The losses of both players on one batch, and their gradients: the discriminator's graph is gone."""

    outputs: dict[str, tuple[Tensor, Tensor]]
    """`"generator"` and `"features"`, scalars without weight, each with its gradient at the outputs; none while the
    autoencoder does not meet the discriminator yet."""
    discriminator: Tensor
    """L_D, a scalar."""
    gradients: list[Tensor]
    """The gradient of L_D with respect to each of `parameters_to_train()`."""
    figures: dict[str, Tensor]
    """The mean logits of waveforms and of reconstructions."""


class SpectrogramAdversarialLoss(AdversarialLoss):
    """Train a `MultiScaleSTFTDiscriminator`, and take from it the gradients of L_G and L_feat at the outputs.

    Args:
        discriminator: of several scales.
        weight: of L_G; with a balancer its share of the gradient. 4 in EnCodec's code.
        feature_weight: of L_feat; 4 in EnCodec's code.
        start_step: first step at which the autoencoder meets the discriminator.
        lead_steps: the discriminator trains alone this long before `start_step`.
        warmup_steps: both weights grow linearly over them.
        idle_steps: see `AdversarialLoss`.
        learning_rate_factor: the discriminator's learning rate as a multiple of the autoencoder's.
        scheduler: of the discriminator's learning rate, see `AdversarialLoss`.
        weight_decay: of the discriminator; None takes the autoencoder's.

    Raises:
        ValueError: a setting out of its range.
    """

    discriminator: MultiScaleSTFTDiscriminator

    def __init__(
        self,
        discriminator: MultiScaleSTFTDiscriminator,
        weight: float = 4.0,
        *,
        feature_weight: float = 4.0,
        start_step: int = 0,
        lead_steps: int = 0,
        warmup_steps: int = 0,
        idle_steps: Literal["skipped", "counted"] = "skipped",
        learning_rate_factor: float = 1.0,
        scheduler: Callable[[Optimizer], LambdaLR] | None = None,
        weight_decay: float | None = None,
    ) -> None:
        if feature_weight < 0:
            raise ValueError(f"feature_weight of the adversarial loss must be >= 0, got {feature_weight}")
        super().__init__(
            discriminator,
            weight,
            adaptive=False,
            start_step=start_step,
            lead_steps=lead_steps,
            warmup_steps=warmup_steps,
            idle_steps=idle_steps,
            learning_rate_factor=learning_rate_factor,
            scheduler=scheduler,
            weight_decay=weight_decay,
        )
        self.feature_weight = feature_weight

    def whole_batch_terms(self) -> Iterator[str]:
        if self.feature_weight:
            yield "the distance of features, a ratio of means (feature_weight)"

    def forward(  # type: ignore[override]
        self, outputs: Tensor, images: Tensor, step: int, *, index: Tensor | None = None
    ) -> SpectrogramTerms:
        """Compute the losses and gradients of outputs and waveforms `(B, C, T)`.

        Args:
            outputs: of the decoder, cut from its graph, requiring a gradient.
            images: real waveforms.
            step: of the optimizer; `trains(step)`.
            index: not used: nothing is drawn.
        """
        meets = self.warmup(step) > 0
        fake = self.discriminator.scales(outputs if meets else outputs.detach())
        real = self.discriminator.scales(images)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        if meets:
            generator = torch.stack([F.relu(1 - at_least_float32(logits)).mean() for logits, _ in fake]).mean()
            matched = torch.stack(
                [
                    _feature_distance(own, other.detach())
                    for (_, of_fake), (_, of_real) in zip(fake, real, strict=True)
                    for own, other in zip(of_fake, of_real, strict=True)
                ]
            ).mean()
            for name, value in (("generator", generator), ("features", matched)):
                (gradient,) = take_gradients(value, [outputs], retain_graph=True)
                found[name] = value.detach(), gradient
        losses = [
            F.relu(1 - at_least_float32(of_real)).mean() + F.relu(1 + at_least_float32(of_fake)).mean()
            for (of_real, _), (of_fake, _) in zip(real, fake, strict=True)
        ]
        discriminator = torch.stack(losses).mean()
        gradients = take_gradients(discriminator, self.parameters_to_train(), materialize_grads=True)
        figures = {
            "discriminator_real": torch.stack([logits.detach().mean() for logits, _ in real]).mean(),
            "discriminator_fake": torch.stack([logits.detach().mean() for logits, _ in fake]).mean(),
        }
        return SpectrogramTerms(
            outputs=found, discriminator=discriminator.detach(), gradients=list(gradients), figures=figures
        )


def _feature_distance(own: Tensor, other: Tensor) -> Tensor:
    own, other = at_least_float32(own), at_least_float32(other)
    return (own - other).abs().mean() / other.abs().mean().clamp(min=1e-8)
