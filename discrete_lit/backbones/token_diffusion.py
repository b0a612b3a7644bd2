"""Heads that predict a vector at each place by diffusion, where a softmax predicts an id (Li et al., "MAR", 2024).

`DenoisingMLP` is the network: a few residual blocks over one vector, modulated by the time and by the hidden state z of
its place. `TokenDiffusionHead` trains it, p(x | z) being all that it knows of the rest, and draws from it.
`BinaryFlowHead` draws signs by flow matching on vectors of ±1 (BitDance, 2026).
"""

from collections.abc import Callable, Iterable
from functools import partial
from math import log
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones.backbone import count_flops
from discrete_lit.backbones.embeddings import TimeEmbedding
from discrete_lit.backbones.layers import Linear, Norm
from discrete_lit.core.modules import at_least_float32
from discrete_lit.diffusion.gaussian import (
    Estimate,
    GaussianDenoiser,
    PredictionKind,
    RectifiedPath,
    SteppedPath,
    cosine_betas,
)
from discrete_lit.diffusion.gaussian_losses import DenoisingLoss, LogitNormalTimes, TrainingTimes, variational_bound
from discrete_lit.diffusion.solvers import DDPM, EulerMaruyama, Noise, Solver


class DenoisingMLP(nn.Module):
    """Read a noisy vector, its time and a condition: residual blocks of two linear layers, modulated (MAR, app. B).

    Args:
        dim: D, of the vectors.
        condition_width: of z.
        width: of the blocks.
        depth: blocks.
        outputs: of the last layer: D, or 2 D with a learned variance.
        mlp: of a block: `"silu"`, as wide as the block (MAR), or `"swiglu"`, one and a half times as wide (BitDance).
        modulations: how many the blocks share, one after another as many each; one of each block by default. BitDance
            has 2 or 3.

    Raises:
        ValueError: blocks that the modulations do not divide.
    """

    def __init__(
        self,
        dim: int,
        condition_width: int,
        *,
        width: int = 1024,
        depth: int = 6,
        outputs: int | None = None,
        mlp: Literal["silu", "swiglu"] = "silu",
        modulations: int | None = None,
    ) -> None:
        super().__init__()
        if modulations is not None and (modulations < 1 or depth % modulations):
            raise ValueError(f"modulations={modulations} must divide the {depth} blocks")
        self.time_embedding = TimeEmbedding(width)
        self.condition_projection = Linear(condition_width, width)
        self.input_projection = Linear(dim, width)
        self.blocks = nn.ModuleList(_ModulatedBlock(width, kind=mlp) for _ in range(depth))
        self.modulations = nn.ModuleList(Linear(width, 3 * width) for _ in range(modulations or depth))
        self.final_norm = Norm(width, "layer", affine=False)
        self.final_modulation = Linear(width, 2 * width)
        self.output = Linear(width, outputs or dim)
        for layer in (*self.modulations, self.final_modulation, self.output):
            nn.init.zeros_(cast(Linear, layer).weight)
            nn.init.zeros_(cast(Tensor, cast(Linear, layer).bias))

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Map `x (M, D)` to `(M, outputs)`, given `time (M,)` or `(1,)` and `condition (M, condition_width)`."""
        return self.denoise(x, time, self.condition_projection(condition))

    def denoise(self, x: Tensor, time: Tensor, projected: Tensor, *, embedded: bool = False) -> Tensor:
        """Do as `forward`, with a condition that is projected already, `(M, width)`: it is the same at every step.

        So may the time be `embedded`, `(1, width)`: it is the same in every draw.
        """
        condition = F.silu((time if embedded else self.time_embedding(time)) + projected)
        x = self.input_projection(x)
        shared = len(self.blocks) // len(self.modulations)
        for number, modulation in enumerate(self.modulations):
            vectors = modulation(condition).chunk(3, dim=-1)
            for block in self.blocks[number * shared : (number + 1) * shared]:
                x = block(x, *vectors)
        shift, scale = self.final_modulation(condition).chunk(2, dim=-1)
        return self.output(torch.addcmul(shift, self.final_norm(x), 1 + scale))


class _ModulatedBlock(nn.Module):
    def __init__(self, width: int, *, kind: Literal["silu", "swiglu"]) -> None:
        super().__init__()
        self.kind = kind
        hidden = width if kind == "silu" else int(1.5 * width)
        self.norm = Norm(width, "layer")
        self.expand = Linear(width, hidden if kind == "silu" else 2 * hidden)
        self.contract = Linear(hidden, width)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        hidden = self.expand(torch.addcmul(shift, self.norm(x), 1 + scale))
        if self.kind == "silu":
            hidden = F.silu(hidden)
        else:
            gated, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gated) * value
        return torch.addcmul(x, gate, self.contract(hidden))


class TokenDiffusionHead(nn.Module):
    """Predict the vector x of a place given its hidden state z, by diffusion (Li et al., "MAR", 2024, section 3.2).

    MAR's by default: 1,000 steps of the cosine schedule, of which 100 are drawn, the noise with a learned variance.

    Args:
        dim: D, of the vectors.
        condition_width: of z.
        width, depth, mlp, modulations: of `DenoisingMLP`.
        denoiser: how the network's output is read, and the path of its noise.
        times: how times of training are drawn; uniformly by default.
        error_of: see `DenoisingLoss`.
        repeats: draws of time and noise for each vector and step of training; MAR has 4.
        solver: how vectors are drawn.
        time_input: what the network reads where the path is in continuous time: `"noise"`, 1,000 t, or `"data"`,
            1,000 (1 - t), as networks whose authors count time from noise to data.
        scale: the deviation of the data: vectors are divided by it before noise is added (HART has 0.6).

    Raises:
        ValueError: a setting out of its range.
    """

    fsdp_methods = ("losses", "bound", "sample")

    def __init__(
        self,
        dim: int,
        condition_width: int,
        *,
        width: int = 1024,
        depth: int = 6,
        mlp: Literal["silu", "swiglu"] = "silu",
        modulations: int | None = None,
        denoiser: GaussianDenoiser | None = None,
        times: TrainingTimes | None = None,
        error_of: PredictionKind | None = None,
        repeats: int = 4,
        solver: Solver | None = None,
        time_input: Literal["noise", "data"] = "noise",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if repeats < 1 or scale <= 0:
            raise ValueError(f"repeats must be at least 1 and scale above 0, got {repeats} and {scale}")
        self.dim = dim
        self.denoiser = denoiser or GaussianDenoiser(SteppedPath(cosine_betas()), learned_variance=True)
        self.objective = DenoisingLoss(self.denoiser, times=times, error_of=error_of)
        self.repeats = repeats
        self.solver = solver or DDPM(100)
        self.time_input: Literal["noise", "data"] = time_input
        self.scale = scale
        self._flops: dict[int, int] = {}
        outputs = 2 * dim if self.denoiser.learned_variance else dim
        self.network = DenoisingMLP(
            dim, condition_width, width=width, depth=depth, outputs=outputs, mlp=mlp, modulations=modulations
        )

    def losses(self, condition: Tensor, data: Tensor, *, uniforms: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Return the terms of the loss of each vector, `(M,)` each; their sum is what training minimises.

        Args:
            condition: z `(M, condition_width)`.
            data: x `(M, D)`.
            uniforms: `(repeats, M)` float64 in (0, 1), which decide the times.
            noise: `(repeats, M, D)` standard normal.
        """
        data = (at_least_float32(data) / self.scale).expand(self.repeats, -1, -1).flatten(0, 1)
        t, noise = self.objective.times(uniforms.flatten()), noise.flatten(0, 1).to(data.dtype)
        x_t = self.denoiser.path.add_noise(data, noise, t)
        projected = self.network.condition_projection(condition).repeat(self.repeats, 1)
        output = self.network.denoise(x_t, self._network_time(t, x_t), projected)
        terms = self.objective(output, data, noise, x_t=x_t, t=t)
        return {name: term.view(self.repeats, -1).mean(dim=0) for name, term in terms.items()}

    @torch.no_grad()
    def bound(self, condition: Tensor, data: Tensor, *, solver: Solver, noise: Noise) -> Tensor:
        """Estimate an upper bound of -log p(x | z) of each vector in nats, `(M,)` float64, as `variational_bound` does.

        Args:
            condition: z `(M, condition_width)`.
            data: x `(M, D)`.
            solver: whose steps the model takes.
            noise: makes the noise `(M, D)` at the i-th time.
        """
        projected = self.network.condition_projection(condition)

        def denoise(x: Tensor, t: float) -> Estimate:
            return self.denoiser(self.network.denoise(x, self._network_time(t, x), projected), x, t)

        bound = variational_bound(
            denoise,
            at_least_float32(data) / self.scale,
            path=self.denoiser.path,
            times=solver.times(self.denoiser.path)[:-1],
            noise=noise,
            variance="learned" if self.denoiser.learned_variance else "largest",
        )
        # The density of x is that of x / scale over scale^D.
        return bound + self.dim * log(self.scale)

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        start: Tensor,
        *,
        noise: Noise | None = None,
        guidance_scale: float | Tensor = 1.0,
        solver: Solver | None = None,
    ) -> Tensor:
        """Draw a vector for each hidden state.

        Args:
            condition: z `(M, condition_width)`; with guidance `(2 M, condition_width)`, the null states last.
            start: `(M, D)` standard normal noise, the same for both halves.
            noise: makes the solver's fresh noise `(M, D)` of a step.
            guidance_scale: s of `uncond + s (cond - uncond)` of what the network predicts, one or `(M, 1)`.
            solver: the head's own by default.

        Returns:
            `(M, D)` float32 or better.
        """
        guided = len(condition) == 2 * len(start)
        assert guided or len(condition) == len(start), "a condition for each vector, or two"
        projected = self.network.condition_projection(condition)
        solver = solver or self.solver
        # All steps at once; what a solver visits between them is embedded when it is asked for.
        times = solver.times(self.denoiser.path)
        at_once = torch.cat([self._network_time(t, projected) for t in times])
        vectors = dict(zip(times, self.network.time_embedding(at_once).split(1), strict=True))

        def denoise(x: Tensor, t: float) -> Estimate:
            time = vectors.get(t)
            if time is None:
                time = self.network.time_embedding(self._network_time(t, x))
            both = x.repeat(2, 1) if guided else x  # one call for both halves
            output = self.network.denoise(both, time, projected, embedded=True)
            if guided:
                conditional, unconditional = output.chunk(2)
                output = self.denoiser.guide(conditional, unconditional, guidance_scale)
            return self.denoiser(output, x, t)

        return solver(denoise, at_least_float32(start), path=self.denoiser.path, noise=noise) * self.scale

    def fsdp_units(self) -> Iterable[nn.Module]:
        """Give the modules that FSDP gathers one after another: the head is small, and gathered at once."""
        return ()

    def flops(self, rows: int) -> int:
        """Count the floating-point operations of a step of the solver for so many rows, once for each number."""
        if rows not in self._flops:

            def prepare(network: DenoisingMLP) -> Callable[[], object]:
                weight = network.output.weight
                x = torch.zeros(rows, self.dim, device=weight.device, dtype=weight.dtype)
                projected = x.new_zeros(rows, network.output.in_features)
                return partial(network.denoise, x, x.new_zeros(1), projected)

            self._flops[rows] = count_flops(self.network, prepare)
        return self._flops[rows]

    def _network_time(self, t: Tensor | float, like: Tensor) -> Tensor:
        """`(M,)` or `(1,)` on the device of the vectors, in the units that the network reads."""
        times = t if isinstance(t, Tensor) else torch.full((1,), t, dtype=torch.float64, device=like.device)
        path = self.denoiser.path
        if isinstance(path, SteppedPath):
            return path.network_time(times).round()
        return 1000 * (times if self.time_input == "noise" else 1 - times)


class BinaryFlowHead(TokenDiffusionHead):
    """Predict the signs of a place by flow matching on vectors of ±1, with the sign taken at the end (BitDance, 2026).

    The network predicts the data, and the error is the velocity's; times have a normal logit, on the noisy side. The
    law of a vector is that of the flow, whose likelihood is not known in closed form.

    Args:
        dim: bits of an id.
        condition_width: of z.
        width, depth, modulations: of `DenoisingMLP`, whose blocks are SwiGLU.
        solver: 100 steps of Euler and Maruyama, the last of 0.05 without noise, by default.
        settings: further ones of `TokenDiffusionHead`.
    """

    def __init__(
        self,
        dim: int,
        condition_width: int,
        *,
        width: int = 768,
        depth: int = 6,
        modulations: int | None = 2,
        solver: Solver | None = None,
        **settings: Any,
    ) -> None:
        given: dict[str, Any] = {
            "denoiser": GaussianDenoiser(RectifiedPath(), prediction="data", smallest_sigma=0.05),
            # Time runs from noise to data in the paper, where the mean is -0.8.
            "times": LogitNormalTimes(0.8, 0.8),
            "error_of": "velocity",
            "mlp": "swiglu",
            "time_input": "data",
        }
        super().__init__(
            dim,
            condition_width,
            width=width,
            depth=depth,
            modulations=modulations,
            solver=solver or EulerMaruyama(101, last_step=0.05, last_drift="velocity"),
            **{**given, **settings},
        )

    def signs(self, vectors: Tensor) -> Tensor:
        """Take the signs of `(M, D)` vectors, as bits 0 and 1 int64; an exact 0 is 1."""
        return (vectors >= 0).long()
