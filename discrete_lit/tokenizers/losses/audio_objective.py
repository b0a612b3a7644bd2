"""The training loss of EnCodec, and the balancer of its gradients (Défossez et al., 2022, section 3.4).

Four losses pull at the decoder's output: the waveform's, the spectrum's, the discriminator's, and the distance of its
features. Their gradients have very different sizes, which change in training. The balancer gives each a fixed share of
the gradient, whatever its size (eq. 4):

    g = sum_i  R  w_i / (sum_j w_j)  g_i / <|g_i|>

with g_i the gradient of loss i at the outputs, w_i its weight, and <.> a running mean of its norm.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.core.distributed import all_reduce_sum, world_size
from discrete_lit.core.modules import FullPrecision, OfWholeBatch
from discrete_lit.metrics.spectral import SCALES, MultiScaleSpectralDistance
from discrete_lit.tokenizers.losses.adversarial import take_gradients, with_known_gradients
from discrete_lit.tokenizers.losses.objective import ObjectiveTerms
from discrete_lit.tokenizers.losses.spectrogram_discriminator import SpectrogramAdversarialLoss

WaveformLoss = Literal["l1", "l2"]


class GradientBalancer(nn.Module, OfWholeBatch):
    """Add up the gradients of several losses, each with a fixed share (eq. 4).

    The norm of a gradient is that of a clip, averaged over the batch and over ranks. Its running mean is corrected for
    its start, as Adam's are.

    Args:
        decay: of the running means, in [0, 1); 0.999 in EnCodec.
        norm: R, the size of the gradient that comes out.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(self, decay: float = 0.999, *, norm: float = 1.0) -> None:
        super().__init__()
        if not 0 <= decay < 1 or not norm > 0:
            raise ValueError(f"a gradient balancer needs decay in [0, 1) and norm > 0, got {decay} and {norm}")
        self.decay, self.reference = decay, norm

    def expect(self, names: Sequence[str]) -> None:
        """Make room for the losses of these names; called once, before a checkpoint is read."""
        for name in names:
            self.register_buffer(f"norm_{name}", torch.zeros((), dtype=torch.float64))
            self.register_buffer(f"weight_{name}", torch.zeros((), dtype=torch.float64))

    def whole_batch_terms(self) -> tuple[str]:
        return ("the balancer of gradients (balancer)",)

    @torch.no_grad()
    def forward(self, gradients: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
        """Balance gradients `(B, C, T)` by their names and weights: `(B, C, T)`.

        Those with the weight 0 are left out. In training mode the running means move.
        """
        total = sum(weights[name] for name in gradients)
        balanced = None
        for name, gradient in gradients.items():
            mean, seen = self.get_buffer(f"norm_{name}"), self.get_buffer(f"weight_{name}")
            norm = all_reduce_sum(gradient.double().flatten(1).norm(dim=1).mean()) / world_size()
            if self.training:
                mean.lerp_(norm, 1 - self.decay)
                seen.lerp_(torch.ones_like(seen), 1 - self.decay)
            average = mean / seen if self.training else torch.where(seen > 0, mean / seen, norm)
            scale = self.reference * weights[name] / total / average.clamp(min=1e-12)
            part = gradient * scale.to(gradient.dtype)
            balanced = part if balanced is None else balanced + part
        assert balanced is not None, "there is a loss"
        return balanced


class AudioObjective(FullPrecision):
    """Compare a decoder's outputs with waveforms: samples, mel spectra, and in training a discriminator.

    The loss that is logged is the weighted sum of the terms; with a balancer the gradient at the outputs is not its.

    Args:
        sample_rate: in hertz.
        waveform_weight: of the error of samples; 0.1 in EnCodec's code.
        spectral_weight: of the `MultiScaleSpectralDistance`; 2 in EnCodec's code.
        windows, log_weight: of that distance.
        waveform_loss: mean absolute (`"l1"`) or mean squared (`"l2"`) error of samples.
        adversarial_loss: with a discriminator, in training only.
        balancer: of the gradients, in training; None adds them up by their weights.

    Raises:
        ValueError: a negative weight, or none above 0.
    """

    def __init__(
        self,
        sample_rate: int,
        *,
        waveform_weight: float = 0.1,
        spectral_weight: float = 2.0,
        windows: Sequence[int] = SCALES,
        log_weight: float = 0.0,
        waveform_loss: WaveformLoss = "l1",
        adversarial_loss: SpectrogramAdversarialLoss | None = None,
        balancer: GradientBalancer | None = None,
    ) -> None:
        super().__init__()
        if waveform_loss not in get_args(WaveformLoss):
            raise ValueError(f"waveform_loss must be 'l1' or 'l2', got {waveform_loss!r}")
        if min(waveform_weight, spectral_weight) < 0 or not waveform_weight + spectral_weight > 0:
            raise ValueError(
                "waveform_weight and spectral_weight must be >= 0, and one of them above 0, got "
                f"{waveform_weight} and {spectral_weight}"
            )
        self.weights = {"waveform": waveform_weight, "spectral": spectral_weight}
        self.waveform_loss: WaveformLoss = waveform_loss
        self.spectral = MultiScaleSpectralDistance(sample_rate, windows=windows, log_weight=log_weight)
        self.adversarial = adversarial_loss
        self.balancer = balancer
        if balancer is not None:
            balancer.expect((*self.weights, "generator", "features"))

    def prepare(self) -> None:
        """Read the weights of frozen networks: there are none."""

    def forward(
        self,
        outputs: Tensor,
        images: Tensor,
        *,
        last_layer: Tensor | None = None,
        step: int | None = None,
        index: Tensor | None = None,
    ) -> ObjectiveTerms:
        """The loss of outputs `(B, C, T)`, float32 or float64, against waveforms `(B, C, T)`.

        Args:
            outputs: of the decoder.
            images: waveforms in [-1, 1].
            last_layer: not used: the balancer compares gradients at the outputs.
            step: of the optimizer, in training; without it there are no adversarial terms, and nothing is balanced.
            index: not used: nothing is drawn.
        """
        if step is None:
            terms = {name: self.weights[name] * value for name, value in self._compared(outputs, images).items()}
            return ObjectiveTerms(loss=torch.stack(list(terms.values())).sum(), terms=terms)
        # Every gradient is taken here, at the outputs cut from the decoder's graph.
        y = outputs.detach().requires_grad_()
        weights = dict(self.weights)
        values, gradients = dict[str, Tensor](), dict[str, Tensor]()
        for name, value in self._compared(y, images).items():
            (gradients[name],) = take_gradients(value, [y])
            values[name] = value.detach()
        terms, figures, parameters, own = dict[str, Tensor](), dict[str, Tensor](), list[nn.Parameter](), list[Tensor]()
        if self.adversarial is not None:
            parameters = self.adversarial.parameters_to_train()
            # Data parallelism waits for a gradient of every parameter, zero or not.
            own = [torch.zeros_like(parameter) for parameter in parameters]
            if self.adversarial.trains(step):
                players = self.adversarial(y, images, step)
                grown = self.adversarial.warmup(step)
                weights["generator"] = grown * self.adversarial.weight
                weights["features"] = grown * self.adversarial.feature_weight
                for name, (value, gradient) in players.outputs.items():
                    values[name], gradients[name] = value, gradient
                terms["discriminator"], own, figures = players.discriminator, players.gradients, players.figures
        terms |= {name: weights[name] * value for name, value in values.items()}
        used = {name: gradient for name, gradient in gradients.items() if weights[name] > 0}
        if self.balancer is None:
            gradient = torch.stack([weights[name] * each for name, each in used.items()]).sum(dim=0)
        else:
            gradient = self.balancer(used, weights)
        total = torch.stack(list(terms.values())).sum()
        loss = with_known_gradients(total, [outputs, *parameters], [gradient, *own])
        return ObjectiveTerms(loss=loss, terms=terms, figures=figures)

    def _compared(self, outputs: Tensor, images: Tensor) -> dict[str, Tensor]:
        error = F.l1_loss if self.waveform_loss == "l1" else F.mse_loss
        values = {"waveform": error(outputs, images), "spectral": self.spectral(outputs, images).mean()}
        return {name: value for name, value in values.items() if self.weights[name] > 0}
