"""Draw whole latents: a solver of Gaussian noise around a network, guided by a class.

Guidance is `uncond + s (cond - uncond)` of what the network predicts (Ho & Salimans, 2022), both halves in one pass.
The scales of the published repositories:

| source | ours |
|---|---|
| DiT, SiT `cfg_scale` s | s, with `guided_channels=3`: the fourth channel of their latents is not guided |
| LDM `unconditional_guidance_scale` s | s, all channels |
| LightningDiT `cfg_interval_start` a, time from noise to data | `guidance_interval=(0, 1 - a)` |
"""

from collections.abc import Callable, Mapping
from math import cos, pi
from typing import Literal

import torch
from torch import Tensor

from discrete_lit.backbones import DenoisingNetwork
from discrete_lit.core.modules import at_least_float32
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.gaussian import Estimate, GaussianDenoiser, Times
from discrete_lit.diffusion.solvers import Solver
from discrete_lit.samplers.sampler import EstimateStep, SamplerOutput

NetworkTime = Callable[[Tensor], Tensor]
_SCHEDULES = ("constant", "linear", "power_cosine")


class GuidedSolver:
    """Draw latents by a solver, with classifier-free guidance at some times and of some channels.

    Args:
        solver: how noise is undone.
        guidance_scale: s; 1 is the conditional model itself, without a second evaluation.
        guidance_interval: the times t from the first, included, to the last, included, that are guided, with t = 1 the
            noise (Kynkäänniemi et al., "Applying Guidance in a Limited Interval", 2024).
        guidance_schedule: with r = 1 - t, `"constant"`; `"linear"`, 1 + (s - 1) r; or `"power_cosine"`,
            1 + (s - 1) (1 - cos(pi r^power)) / 2 (MDT).
        guidance_power: exponent of `power_cosine`, >= 0.
        guided_channels: how many channels are guided, the first ones; the others are those of the conditional model.
            All by default. 3 in the published figures of DiT and SiT.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        solver: Solver,
        *,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_schedule: Literal["constant", "linear", "power_cosine"] = "constant",
        guidance_power: float = 1.0,
        guided_channels: int | None = None,
    ) -> None:
        first, last = guidance_interval
        if not 0 <= first <= last <= 1:
            raise ValueError(f"guidance_interval must be two times in [0, 1], the lower one first, got {first}, {last}")
        if guidance_schedule not in _SCHEDULES:
            raise ValueError(f"guidance_schedule must be one of {', '.join(_SCHEDULES)}, got {guidance_schedule!r}")
        if guidance_scale < 0 or guidance_power < 0 or (guided_channels is not None and guided_channels < 1):
            raise ValueError(
                f"guidance_scale and guidance_power must be at least 0, and guided_channels at least 1, got "
                f"{guidance_scale}, {guidance_power} and {guided_channels}"
            )
        self.solver = solver
        self.guidance_scale = guidance_scale
        self.guidance_interval = (first, last)
        self.guidance_schedule: Literal["constant", "linear", "power_cosine"] = guidance_schedule
        self.guidance_power = guidance_power
        self.guided_channels = guided_channels

    def scale(self, t: float) -> float:
        """Return the guidance scale at a time."""
        if not self.guidance_interval[0] <= t <= self.guidance_interval[1]:
            return 1.0
        r = 1 - t
        shape = {
            "constant": 1.0,
            "linear": r,
            "power_cosine": (1 - cos(pi * r**self.guidance_power)) / 2,
        }[self.guidance_schedule]
        return 1 + (self.guidance_scale - 1) * shape

    @torch.no_grad()
    def __call__(
        self,
        network: DenoisingNetwork,
        labels: Tensor,
        random: CounterRandom,
        *,
        denoiser: GaussianDenoiser,
        network_time: NetworkTime,
        given: Mapping[str, Tensor] | None = None,
        null: Mapping[str, Tensor] | None = None,
        null_labels: Tensor | None = None,
        purposes: tuple[Purpose, Purpose] = (Purpose.DIFFUSION_START, Purpose.DIFFUSION_STEP),
        trace: bool = False,
    ) -> SamplerOutput:
        """Draw latents.

        Args:
            network: in eval mode.
            labels: `(B,)` int64 in [0, num_classes].
            random: one stream for each sample: its first noise, and the fresh noise of each step.
            denoiser: how the network's output is read, and the path of its noise.
            network_time: from times t `(B,)` float64 to the units that the network reads.
            given: the `context`, the `vectors` or the `text` of a network that reads them, `(B, ...)`.
            null: what stands for them in the unconditional half of guidance; the same by default.
            null_labels: `(B,)`, what stands there for the labels; the null label by default.
            purposes: that the first noise and the fresh noise of the steps are drawn for.
            trace: also record what the network thinks of the clean latents at every pass.

        Returns:
            The output, with latents `(B, C, H, W)` float32 or float64 as its `tokens`.

        Raises:
            ValueError: more guided channels than there are, or what the solver refuses.
        """
        layout = network.layout
        shape = (layout.channels, *layout.grid)
        if self.guided_channels is not None and self.guided_channels > layout.channels:
            raise ValueError(f"guided_channels={self.guided_channels}, but the latents have {layout.channels}")
        like = at_least_float32(torch.empty((), device=labels.device, dtype=next(network.parameters()).dtype))
        calls, passes = [0], [0]
        estimates: list[EstimateStep] | None = [] if trace else None
        random = random.ahead(self.solver.steps)
        guide = GuidedNetwork(
            network,
            labels,
            denoiser=denoiser,
            network_time=network_time,
            given=given,
            null=null,
            null_labels=null_labels,
            channels=self.guided_channels,
        )
        words = guide.given["text"].shape[1] if "text" in guide.given else 0

        def denoise(x: Tensor, t: float) -> Estimate:
            scale = self.scale(t)
            calls[0] += 1 if scale == 1 else 2
            passes[0] += 1
            estimate = guide(x, t, scale)
            if estimates is not None:
                step = EstimateStep(estimate=estimate.data, network_calls=calls[0], sequential_passes=passes[0])
                estimates.append(step)
            return estimate

        def noise(purpose: Purpose, step: int) -> Tensor:
            numbers = random.normal(purpose, shape[0] * shape[1] * shape[2], step)
            return numbers.to(like).view(len(labels), *shape)

        latents = self.solver(
            denoise,
            noise(purposes[0], 0),
            path=denoiser.path,
            noise=lambda step: noise(purposes[1], step),
        )
        return SamplerOutput(
            tokens=latents,
            network_calls=calls[0],
            sequential_passes=passes[0],
            count_flops=lambda: calls[0] * network.flops(1, words),
            estimates=None if estimates is None else tuple(estimates),
        )


class GuidedNetwork:
    """Say what a network thinks of noisy latents, given labels and a guidance scale.

    Args:
        network, labels, denoiser, network_time, given, null, null_labels: as for `GuidedSolver`.
        channels: how many are guided; all if None.
    """

    def __init__(
        self,
        network: DenoisingNetwork,
        labels: Tensor,
        *,
        denoiser: GaussianDenoiser,
        network_time: NetworkTime,
        given: Mapping[str, Tensor] | None = None,
        null: Mapping[str, Tensor] | None = None,
        null_labels: Tensor | None = None,
        channels: int | None = None,
    ) -> None:
        self.network, self.denoiser, self.network_time = network, denoiser, network_time
        self.labels, self.given = labels, dict(given or {})
        if null_labels is None:
            null_labels = torch.full_like(labels, network.layout.null_label)
        self.both_labels = torch.cat((labels, null_labels))
        absent = self.given if null is None else null
        self.given_to_both = {name: torch.cat((value, absent[name])) for name, value in self.given.items()}
        self.guided: Tensor | None = None
        if channels is not None and channels < network.layout.channels:
            self.guided = (torch.arange(network.layout.channels, device=labels.device) < channels)[:, None, None]

    def __call__(self, x: Tensor, t: float, scale: float) -> Estimate:
        """Estimate the data and the noise of `x (B, C, H, W)` at the time t."""
        return self.denoiser(self.output(x, t, scale), x, t)

    def output(self, x: Tensor, t: Times, scale: float) -> Tensor:
        """Return the network's output, guided, `(B, outputs, H, W)` float32 or float64; `t` is one time or `(B,)`."""
        times = t if isinstance(t, Tensor) else torch.full((len(x),), t, dtype=torch.float64, device=x.device)
        time = self.network_time(times).float()
        if scale == 1:
            return at_least_float32(self.network(x, time, self.labels, **self.given))
        both = self.network(x.repeat(2, 1, 1, 1), time.repeat(2), self.both_labels, **self.given_to_both)
        conditional, unconditional = at_least_float32(both).chunk(2)
        weight: float | Tensor = scale
        if self.guided is not None:
            weight = torch.where(self.guided, scale, 1.0)
        return self.denoiser.guide(conditional, unconditional, weight)
