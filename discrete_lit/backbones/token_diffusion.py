"""Heads that predict a vector at each place by diffusion, where a softmax predicts an id (Li et al., "MAR", 2024).

`DenoisingMLP` is the network: a few residual blocks over one vector, or several that are drawn together, modulated by
the time and by the hidden state z of its place. `TokenDiffusionHead` trains it, p(x | z) being all that it knows of the
rest, and draws from it. `BinaryFlowHead` draws the bits of ids by flow matching on vectors of ±1 (BitDance, 2026).
"""

from collections.abc import Callable, Iterable
from functools import partial
from math import log
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones.backbone import (
    IdHead,
    bits_of_vocabulary,
)
from discrete_lit.backbones.blocks import BlockSettings
from discrete_lit.backbones.embeddings import TimeEmbedding
from discrete_lit.backbones.execution import count_flops
from discrete_lit.backbones.layers import Linear, Norm
from discrete_lit.core.modules import at_least_float32
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.gaussian import (
    Estimate,
    GaussianDenoiser,
    PredictionKind,
    RectifiedPath,
    SteppedPath,
    cosine_betas,
)
from discrete_lit.diffusion.gaussian_losses import DenoisingLoss, LogitNormalTimes, TrainingTimes, variational_bound
from discrete_lit.diffusion.noise_level import within_part
from discrete_lit.diffusion.solvers import DDPM, EulerMaruyama, Noise, Solver

# The last step of BitDance's sampler, and the smallest sigma that a velocity is divided by.
_LAST_STEP = 0.05
# The time at which a bound of the likelihood takes bits of ±1 by their noisy values: 1 of 30,000 is then another.
_DECIDED = 0.2


class DenoisingMLP(nn.Module):
    """Read a noisy vector, its time and a condition: residual blocks of two linear layers, modulated (MAR, app. B).

    With `heads`, vectors that are drawn together attend to one another before the two layers of each block, so that it
    is a small transformer without positions (BitDance's parallel form).

    Args:
        dim: D, of the vectors.
        condition_width: of z.
        width: of the blocks.
        depth: blocks.
        outputs: of the last layer: D, or 2 D with a learned variance.
        mlp: of a block: `"silu"`, as wide as the block (MAR), or `"swiglu"`, one and a half times as wide (BitDance).
        modulations: how many the blocks share, one after another as many each; one of each block by default. BitDance
            has 2 or 3.
        heads: of the attention among the p vectors `(M, p, D)` that are drawn together; None for vectors `(M, D)`.

    Raises:
        ValueError: blocks that the modulations do not divide, or a width that the heads do not divide.
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
        heads: int | None = None,
    ) -> None:
        super().__init__()
        if modulations is not None and (modulations < 1 or depth % modulations):
            raise ValueError(f"modulations={modulations} must divide the {depth} blocks")
        if heads is not None and (heads < 1 or width % heads):
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.vectors = 3 if heads is None else 6  # shift, scale and gate of each branch
        self.time_embedding = TimeEmbedding(width)
        self.condition_projection = Linear(condition_width, width)
        self.input_projection = Linear(dim, width)
        self.blocks = nn.ModuleList(_ModulatedBlock(width, kind=mlp, heads=heads) for _ in range(depth))
        self.modulations = nn.ModuleList(Linear(width, self.vectors * width) for _ in range(modulations or depth))
        self.final_norm = Norm(width, "layer", affine=False)
        self.final_modulation = Linear(width, 2 * width)
        self.output = Linear(width, outputs or dim)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as MAR: Xavier's uniform law, 0.02 for the time, and 0 for modulations and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for number in (0, 2):
            nn.init.normal_(cast(nn.Linear, self.time_embedding.layers[number]).weight, std=0.02)
        for layer in (*self.modulations, self.final_modulation, self.output):
            nn.init.zeros_(cast(Linear, layer).weight)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Map `x (M, D)` to `(M, outputs)`, given `time (M,)` or `(1,)` and `condition (M, condition_width)`.

        With heads all but the time have p vectors in each row: `x (M, p, D)`, `condition (M, p, condition_width)`.
        """
        return self.denoise(x, time, self.condition_projection(condition))

    def denoise(self, x: Tensor, time: Tensor, projected: Tensor, *, embedded: bool = False) -> Tensor:
        """Do as `forward`, with a condition that is projected already, `(M, width)`: it is the same at every step.

        So may the time be `embedded`, `(1, width)`: it is the same in every draw.
        """
        of_time = time if embedded else self.time_embedding(time)
        condition = F.silu((of_time if x.ndim == 2 else of_time[:, None]) + projected)
        x = self.input_projection(x.to(projected.dtype))
        shared = len(self.blocks) // len(self.modulations)
        for number, modulation in enumerate(self.modulations):
            vectors = modulation(condition).chunk(self.vectors, dim=-1)
            for block in self.blocks[number * shared : (number + 1) * shared]:
                x = block(x, *vectors)
        shift, scale = self.final_modulation(condition).chunk(2, dim=-1)
        return self.output(torch.addcmul(shift, self.final_norm(x), 1 + scale))


class _ModulatedBlock(nn.Module):
    def __init__(self, width: int, *, kind: Literal["silu", "swiglu"], heads: int | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.attention = None if heads is None else _Attention(width, heads)
        hidden = width if kind == "silu" else int(1.5 * width)
        self.norm = Norm(width, "layer")
        self.expand = Linear(width, hidden if kind == "silu" else 2 * hidden)
        self.contract = Linear(hidden, width)

    def forward(self, x: Tensor, *vectors: Tensor) -> Tensor:
        if self.attention is not None:
            x = self.attention(x, *vectors[:3])
        shift, scale, gate = vectors[-3:]
        hidden = self.expand(torch.addcmul(shift, self.norm(x), 1 + scale))
        if self.kind == "silu":
            hidden = F.silu(hidden)
        else:
            gated, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gated) * value
        return torch.addcmul(x, gate, self.contract(hidden))


class _Attention(nn.Module):
    """Attention among vectors that are drawn together, modulated and residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Norm(width, "layer")
        self.query_key_value = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:  # x: (M, p, width)
        projected = self.query_key_value(torch.addcmul(shift, self.norm(x), 1 + scale))
        query, key, value = rearrange(projected, "m p (three heads d) -> three m heads p d", three=3, heads=self.heads)
        mixed = rearrange(F.scaled_dot_product_attention(query, key, value), "m heads p d -> m p (heads d)")
        return torch.addcmul(x, gate, self.out(mixed))


class TokenDiffusionHead(nn.Module):
    """Predict the vector x of a place given its hidden state z, by diffusion (Li et al., "MAR", 2024, section 3.2).

    MAR's by default: 1,000 steps of the cosine schedule, of which 100 are drawn, the noise with a learned variance.

    Args:
        dim: D, of the vectors.
        condition_width: of z.
        width, depth, mlp, modulations, heads: of `DenoisingMLP`; with heads, M rows below are of p vectors each, which
            are `drawn_together`.
        denoiser: how the network's output is read, and the path of its noise.
        times: how times of training are drawn; uniformly by default.
        error_of: see `DenoisingLoss`.
        repeats: draws of time and noise for each vector and step of training; MAR has 4.
        stratified: the uniform numbers of a vector's times come one from each of `repeats` equal parts of (0, 1), whose
            mean loss has less noise (Kingma et al., "VDM", 2021, appendix I.1); MAR's come from anywhere.
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
        heads: int | None = None,
        denoiser: GaussianDenoiser | None = None,
        times: TrainingTimes | None = None,
        error_of: PredictionKind | None = None,
        repeats: int = 4,
        stratified: bool = False,
        solver: Solver | None = None,
        time_input: Literal["noise", "data"] = "noise",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if repeats < 1 or scale <= 0:
            raise ValueError(f"repeats must be at least 1 and scale above 0, got {repeats} and {scale}")
        self.dim = dim
        self.drawn_together = heads is not None
        self.denoiser = denoiser or GaussianDenoiser(SteppedPath(cosine_betas()), learned_variance=True)
        self.objective = DenoisingLoss(self.denoiser, times=times, error_of=error_of)
        self.repeats = repeats
        self.stratified = stratified
        self.solver = solver or DDPM(100)
        self.time_input: Literal["noise", "data"] = time_input
        self.scale = scale
        self._flops: dict[tuple[int, ...], tuple[int, int]] = {}
        outputs = 2 * dim if self.denoiser.learned_variance else dim
        self.network = DenoisingMLP(
            dim,
            condition_width,
            width=width,
            depth=depth,
            outputs=outputs,
            mlp=mlp,
            modulations=modulations,
            heads=heads,
        )

    def losses(self, condition: Tensor, data: Tensor, *, uniforms: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Return the terms of the loss of each vector, `(M,)` each; their sum is what training minimises.

        Args:
            condition: z `(M, condition_width)`.
            data: x `(M, D)`.
            uniforms: `(repeats, M)` float64 in (0, 1), which decide the times.
            noise: `(repeats, M, D)` standard normal.
        """
        data = (at_least_float32(data) / self.scale).expand(self.repeats, *data.shape).flatten(0, 1)
        if self.stratified:
            part = torch.arange(self.repeats, device=uniforms.device)[:, None]
            uniforms = within_part(uniforms, part, parts=self.repeats)
        t, noise = self.objective.times(uniforms.flatten()), noise.flatten(0, 1).to(data.dtype)
        x_t = self.denoiser.path.add_noise(data, noise, t)
        projected = self.network.condition_projection(condition)
        projected = projected.expand(self.repeats, *projected.shape).flatten(0, 1)
        output = self.network.denoise(x_t, self._network_time(t, x_t), projected)
        terms = self.objective(output, data, noise, x_t=x_t, t=t)
        return {name: term.view(self.repeats, -1).mean(dim=0) for name, term in terms.items()}

    def estimate(self, x: Tensor, t: Tensor | float, projected: Tensor) -> Estimate:
        """Read what the network says of noisy vectors `x (M, D)`.

        Args:
            x: of the path, divided by `scale`.
            t: one time, or `(M,)`.
            projected: `(M, width)`, conditions behind the network's `condition_projection`.
        """
        output = at_least_float32(self.network.denoise(x, self._network_time(t, x), projected))
        return self.denoiser(output, x, t)

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

        bound = variational_bound(
            lambda x, t: self.estimate(x, t, projected),
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
            both = torch.cat((x, x)) if guided else x  # one call for both halves
            output = at_least_float32(self.network.denoise(both, time, projected, embedded=True))
            if guided:
                conditional, unconditional = output.chunk(2)
                output = self.denoiser.guide(conditional, unconditional, guidance_scale)
            return self.denoiser(output, x, t)

        return solver(denoise, at_least_float32(start), path=self.denoiser.path, noise=noise) * self.scale

    def fsdp_units(self) -> Iterable[nn.Module]:
        """Give the modules that FSDP gathers one after another: the head is small, and gathered at once."""
        return ()

    def flops(self, rows: int, solver: Solver, *, together: int | None = None) -> int:
        """Count the floating-point operations of a draw of so many rows, the null ones among them.

        The embedding of the times is left out: it is the same for all rows of all draws.

        Args:
            rows: M.
            solver: which draws.
            together: p, vectors of each row; none of a head that draws each vector by itself.
        """
        shape = (rows,) if together is None else (rows, together)
        if shape not in self._flops:

            def evaluate(network: DenoisingMLP) -> Callable[[], object]:
                projected = network.output.weight.new_zeros(*shape, network.output.in_features)
                x, time = projected.new_zeros(*shape, self.dim), projected.new_zeros(1, projected.shape[-1])
                return partial(network.denoise, x, time, projected, embedded=True)

            def project(network: DenoisingMLP) -> Callable[[], object]:
                layer = network.condition_projection
                return partial(layer, layer.weight.new_zeros(*shape, layer.in_features))

            self._flops[shape] = count_flops(self.network, evaluate), count_flops(self.network, project)
        evaluation, projection = self._flops[shape]
        return solver.evaluations * evaluation + projection

    def _network_time(self, t: Tensor | float, like: Tensor) -> Tensor:
        """`(M,)` or `(1,)` on the device of the vectors, in the units that the network reads."""
        times = t if isinstance(t, Tensor) else torch.full((1,), t, dtype=torch.float64, device=like.device)
        path = self.denoiser.path
        if isinstance(path, SteppedPath):
            return path.network_time(times).round()
        return 1000 * (times if self.time_input == "noise" else 1 - times)


class BinaryFlowHead(IdHead):
    """Predict all bits of an id at once, by flow matching on vectors of ±1, with the sign taken at the end (BitDance).

    A `place_head` of an autoregressive `Transformer`. The network predicts the data, and training minimises the squared
    error of the velocity; times have a normal logit, on the noisy side. In eval mode the loss is an estimate of a bound
    of -log p in nats, see `log_likelihood`.

    With `block_size` p the ids of p positions are drawn together: the network is a transformer over them.

    Args:
        block: settings of the trunk's blocks; their width is that of z.
        vocab_size: K = 2^b.
        width, depth, modulations: of `DenoisingMLP`, whose blocks are SwiGLU.
        block_size: p, as the generator's.
        heads: of the attention among p > 1 positions; by default of 64 channels each.
        solver: 100 steps of Euler and Maruyama and a last one of 0.05 without noise, by default.
        times: of training; by default a normal logit of mean 0.8 and deviation 0.8.
        repeats: draws of time and noise for each id, or block of them, and step of training.
        likelihood_draws: noisy vectors for each bound of the likelihood, in eval mode.

    Raises:
        ValueError: a vocabulary that is no power of two, or a setting out of its range.
    """

    reads_norm = True
    initialised = True
    likelihood_kind = "bound"

    def __init__(
        self,
        block: BlockSettings,
        vocab_size: int,
        *,
        width: int = 768,
        depth: int = 6,
        modulations: int | None = 2,
        block_size: int = 1,
        heads: int | None = None,
        solver: Solver | None = None,
        times: TrainingTimes | None = None,
        repeats: int = 4,
        likelihood_draws: int = 16,
    ) -> None:
        bits = bits_of_vocabulary(vocab_size, "BinaryFlowHead")
        super().__init__((2,) * bits, vocab_size, width=block.width)
        if block_size < 1 or likelihood_draws < 1:
            raise ValueError(
                f"block_size and likelihood_draws must be at least 1, got {block_size} and {likelihood_draws}"
            )
        if block_size == 1 and heads is not None:
            raise ValueError(f"heads={heads} are of the attention among positions: block_size must be above 1")
        self.bits = bits
        self.block_size = block_size
        self.likelihood_draws = likelihood_draws
        self.flow = TokenDiffusionHead(
            bits,
            block.width,
            width=width,
            depth=depth,
            modulations=modulations,
            heads=None if block_size == 1 else heads or max(1, width // 64),
            mlp="swiglu",
            denoiser=GaussianDenoiser(RectifiedPath(), prediction="data", smallest_sigma=_LAST_STEP),
            # Time runs from noise to data in the paper, where the mean is -0.8.
            times=times or LogitNormalTimes(0.8, 0.8),
            error_of="velocity",
            repeats=repeats,
            solver=solver or EulerMaruyama(101, last_step=_LAST_STEP, last_drift="velocity"),
            time_input="data",
        )

    def signs(self, ids: Tensor) -> Tensor:
        """Make vectors of -1 and 1, `(..., b)` float32, of ids `(...)`: the least significant bit first."""
        return self.sub_tokens.split(ids).float().mul_(2).sub_(1)

    def ids(self, vectors: Tensor) -> Tensor:
        """Make ids `(...)` int64 of the signs of vectors `(..., b)`; an exact 0 counts as above it."""
        return self.sub_tokens.join((vectors >= 0).long())

    def losses(self, hidden: Tensor, ids: Tensor, random: CounterRandom) -> tuple[Tensor, Tensor]:
        if not self.training:
            nats = -self.log_likelihood(hidden, ids, random)
            return nats, torch.ones_like(nats)
        repeats = self.flow.repeats
        rows, data = self._blocks(hidden), self._blocks(self.signs(ids))
        count = ids.shape[1] // self.block_size  # blocks of a sequence
        uniforms = random.uniform(Purpose.DIFFUSION_TIME, repeats * count)
        noise = random.normal(Purpose.DIFFUSION_NOISE, repeats * ids.shape[1] * self.bits).to(data.dtype)
        terms = self.flow.losses(
            rows,
            data,
            uniforms=rearrange(uniforms, "b (r n) -> r (b n)", r=repeats),
            noise=rearrange(noise, "b (r n) -> r (b n)", r=repeats).view(repeats, *data.shape),
        )
        values = torch.stack(list(terms.values())).sum(dim=0).view(len(ids), count)
        values = values.repeat_interleave(self.block_size, dim=1)
        return values, torch.ones_like(values)

    def log_likelihood(self, hidden: Tensor, ids: Tensor, random: CounterRandom | None = None) -> Tensor:
        """Estimate a lower bound of log p of each id in nats, that of diffusion in continuous time; see `IdHead`.

        With gamma the ratio of signal to noise at time t, -log p(x) is at most half the integral of |x - x_hat(x_t)|^2
        over gamma (Kingma et al., "Variational Diffusion Models", 2021, eq. 15), here down to t = 0.2, where each bit
        is drawn given its noisy value alone: one of 30,000 is then another. With the best x_hat it is -log p(x) itself
        (Kong et al., "Information-Theoretic Diffusion", 2023). The law that it bounds is the one that many steps reach,
        not that of a sampler with few. Of positions that are drawn together each has an equal share.
        """
        assert random is not None, "a bound is estimated by drawing"
        rows, data = self._blocks(hidden), self._blocks(self.signs(ids))
        count, numbers = ids.shape[1] // self.block_size, ids.shape[1] * self.bits
        projected = self.flow.network.condition_projection(rows)
        shift = rearrange(random.uniform(Purpose.DIFFUSION_TIME, count), "b n -> (b n)")
        total = data.new_zeros(len(data), dtype=torch.float64)
        for number in range(self.likelihood_draws):
            noise = random.normal(Purpose.DIFFUSION_NOISE, numbers, number).to(data.dtype).view(data.shape)
            # Stratified times: their mean over the draws has little variance.
            t = _DECIDED + (1 - _DECIDED) * (number + shift) / self.likelihood_draws
            x_t = self.flow.denoiser.path.add_noise(data, noise, t)
            estimate = self.flow.estimate(x_t, t, projected)
            error = (data - estimate.data).double().square().flatten(1).sum(dim=1)
            total = total + (1 - _DECIDED) * (1 - t) / t**3 * error / self.likelihood_draws
        noise = random.normal(Purpose.DIFFUSION_NOISE, numbers, self.likelihood_draws).to(data.dtype).view(data.shape)
        last = self.flow.denoiser.path.add_noise(data, noise, _DECIDED)
        odds = 2 * (1 - _DECIDED) / _DECIDED**2 * last * data
        total = total + F.softplus(-odds).double().flatten(1).sum(dim=1)
        nats = (total / self.block_size).view(len(ids), count)
        return -nats.repeat_interleave(self.block_size, dim=1)

    def sample(
        self,
        hidden: Tensor,
        start: Tensor,
        *,
        noise: Noise,
        guidance_scale: float = 1.0,
        solver: Solver | None = None,
    ) -> Tensor:
        """Draw vectors of a block, whose signs are its bits.

        Args:
            hidden: `(B, p, D)`; with guidance `(2 B, p, D)`, the null states last.
            start: `(B, p, b)` standard normal noise.
            noise: makes the fresh noise `(B, p, b)` of a step.
            guidance_scale: s of `uncond + s (cond - uncond)`.
            solver: the head's own by default.

        Returns:
            `(B, p, b)` float32 or float64.
        """
        drawn = self.flow.sample(
            self._blocks(hidden),
            self._blocks(start),
            noise=lambda step: self._blocks(noise(step)),
            guidance_scale=guidance_scale,
            solver=solver,
        )
        return drawn.view(start.shape)

    def one_pass(self, hidden: Tensor, known: int) -> Callable[[], object]:
        rows = self._blocks(hidden)
        x = rows.new_zeros(*rows.shape[:-1], self.bits)
        projected = rows.new_zeros(*rows.shape[:-1], self.flow.network.output.in_features)
        return partial(self.flow.network.denoise, x, x.new_zeros(1), projected)

    def _blocks(self, values: Tensor) -> Tensor:
        """Make rows `(B n, width)` of values `(B, n, width)`, or `(B n / p, p, width)`."""
        if self.block_size == 1:
            return values.flatten(0, 1)
        return rearrange(values, "b (n p) d -> (b n) p d", p=self.block_size)


def ids_of_signs(latents: Tensor) -> Tensor:
    """Make ids of latents of signs, such as BitDance's: channel 0 is the lowest bit.

    Args:
        latents: `(B, b, *grid)`, -1 and 1.

    Returns:
        `(B, *grid)` int64 in [0, 2^b).

    Raises:
        ValueError: other values than -1 and 1, or more channels than an id has bits.
    """
    bits = latents.shape[1]
    if bits > 62:
        raise ValueError(f"an id has at most 62 bits, the latents have {bits} channels")
    outside = int(((latents != 1) & (latents != -1)).sum())
    if outside:
        raise ValueError(
            f"{outside} of {latents.numel()} latents are neither -1 nor 1: these are no signs of a binary tokenizer "
            "(latents before its quantizer, or of a continuous one?)"
        )
    shifts = torch.arange(bits, device=latents.device).view(-1, *(1,) * (latents.ndim - 2))
    return ((latents > 0).long() << shifts).sum(dim=1)
