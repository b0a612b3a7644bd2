"""Samplers of next-scale prediction, on a key-value cache.

`NextScaleSampler` is VAR's, of ids (Tian et al., "Visual Autoregressive Modeling", 2024). `HybridScaleSampler` draws
vectors too: HART's residuals of the last scale (Tang et al., "HART", 2024), or all scales as vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from discrete_lit.backbones.condition import Condition, as_condition
from discrete_lit.backbones.execution import cast_once
from discrete_lit.backbones.scale_transformer import ScaleTransformer
from discrete_lit.backbones.token_diffusion import TokenDiffusionHead
from discrete_lit.core.modules import evaluation_mode
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.core.synchronisation import checked_at_the_end
from discrete_lit.diffusion import CosineSchedule
from discrete_lit.diffusion.solvers import Solver
from discrete_lit.samplers.categorical import draw_filtered
from discrete_lit.samplers.guidance import GuidanceSchedule, guidance_scales, guide, guided_steps
from discrete_lit.samplers.maskgit import masked_counts
from discrete_lit.samplers.sampler import CachedDecoder, Sampler, SamplerOutput, SamplingContext, ScaleQuantizer


class NextScaleSampler(Sampler):
    """Sample scale by scale, all tokens of a scale at once given the scales before: one pass for each scale.

    The next scale's input is f_hat, the sum of what the scales before contribute, averaged down to it. Known tokens may
    stand anywhere: they replace what is drawn at their scale. Where they are whole first scales, the rest follows its
    exact conditional law; elsewhere this is VAR's zero-shot in-painting, in which a drawn token does not see those
    given at its own or later scales.

    Where a place has several ids, as the bits of Infinity, all of them are drawn at once, each by itself.

    Args:
        guidance_scale: at the last scale; 1 plus VAR's `cfg`.
        guidance_schedule: over the scales; by default 1 + cfg i / (S - 1) at scale i of S, from 0.
        settings: of `Sampler`; VAR is published with `top_k=900`, then `top_p=0.96`, and `guidance_scale=2.5`.

    Raises:
        ValueError: a setting out of its range; in use, no quantizer, or one of other scales.
    """

    attention = "block_causal"

    def __init__(
        self, guidance_scale: float = 1.0, guidance_schedule: GuidanceSchedule = "scale_linear", **settings: Any
    ) -> None:
        super().__init__(guidance_scale=guidance_scale, guidance_schedule=guidance_schedule, **settings)

    def draw(self, context: SamplingContext) -> Tensor:
        layout, lengths, quantizer = context.layout, context.layout.scales, checked_quantizer(context)
        scales = self.scales(len(lengths))
        decoder = CachedDecoder(context, guided_steps(scales))
        uniforms = context.random.uniform(Purpose.TOKEN, layout.length)
        tokens = context.start()
        known = tokens != layout.mask_id
        # The first scale is predicted from the label alone.
        inputs, f_hat = uniforms.new_zeros(len(tokens), 0, quantizer.dim), 0.0
        start = 0
        for number, places in enumerate(lengths):
            count = places * layout.sub_tokens
            here = slice(start, start + count)
            logits = decoder.guide(decoder(inputs, number), scales[number])  # (B, s^2, K)
            drawn, log_probability = self.choose(logits, uniforms[:, here])
            tokens[:, here] = torch.where(known[:, here], tokens[:, here], drawn)
            if context.traced:
                confidence = torch.full(tokens.shape, torch.nan, dtype=torch.float64, device=tokens.device)
                confidence[:, here] = log_probability.double().masked_fill(known[:, here], torch.nan)
                context.record(tokens, confidence)
            start += count
            if number + 1 < len(lengths):
                with torch.autocast(tokens.device.type, enabled=False):
                    f_hat = f_hat + quantizer.contribution(number, tokens[:, here])
                    inputs = quantizer.at_scale(number + 1, f_hat)
        return tokens


def checked_quantizer(context: SamplingContext) -> ScaleQuantizer:
    """The tokenizer's quantizer, which makes the input of each next scale.

    Raises:
        ValueError: none was given, or one of other scales, width or ids than the generator's.
    """
    layout, quantizer = context.layout, context.quantizer
    if quantizer is None:
        raise ValueError("NextScaleSampler makes the next scale's input with the tokenizer's quantizer: give quantizer")
    theirs = (tuple(quantizer.lengths), quantizer.dim, quantizer.vocab_size)
    ours = (tuple(layout.scales), layout.input_dim, layout.vocab_size)
    if theirs != ours:
        raise ValueError(
            "the quantizer is of another tokenizer: its tokens of each scale, width and ids are "
            f"{theirs}, the generator's {ours}"
        )
    return quantizer


@dataclass(frozen=True, kw_only=True)
class ScaleVectors:
    """The latents that were drawn scale by scale, and what they cost."""

    latents: Tensor
    """`(B, D, H, W)`."""
    tokens: Tensor | None
    """`(B, N)` int64, the ids of all scales, where places have any."""
    network_calls: int
    """Evaluations of the network for each image; the conditional and the null one of a guided step count as two."""
    sequential_passes: int
    """Passes of the network that follow one another."""
    count_flops: Callable[[], int]
    """Measures the floating-point operations for each image, of the network and the head."""

    def as_output(self) -> SamplerOutput:
        """Give the latents as the tokens of a sampler's output."""
        return SamplerOutput(
            tokens=self.latents,
            network_calls=self.network_calls,
            sequential_passes=self.sequential_passes,
            count_flops=self.count_flops,
        )


class ScalePyramid(Protocol):
    """Add scales up to latents: of ids and residuals, or of vectors alone."""

    def draws_vectors(self, number: int) -> bool:
        """Say whether the head draws at scale `number`, counted from 0."""
        ...

    def codes(self, ids: Tensor) -> Tensor:
        """Look up codes `(B, n, D)` of ids `(B, n)`, which the head is given too."""
        ...

    def add(self, number: int, f_hat: Tensor | None, ids: Tensor | None, vectors: Tensor | None) -> Tensor:
        """Add scale `number` to f_hat `(B, D, H, W)`, None at the first: its ids `(B, n)`, its vectors `(B, n, D)`."""
        ...

    def at_scale(self, number: int, f_hat: Tensor) -> Tensor:
        """Make what scale `number` reads, `(B, n, D)`."""
        ...


class HybridScaleSampler:
    """Sample ids scale by scale, and at the last scale vectors too, each by the head (HART, 2024, section 3.2).

    The latents are f_hat of the scales before the last, and at the last the codes of the ids plus the residual that the
    head draws given the hidden state and the id. Without ids, of `ContinuousNextScale`, the head draws all scales: the
    places of a scale by themselves, or together where it attends among them.

    Args:
        guidance_scale: s of `uncond + s (cond - uncond)`, of the logits and of what the head predicts; 1 is off.
            HART's `cfg` is s - 1.
        guidance_schedule: over the scales, see `guidance_scales`; 1 + cfg i / (S - 1) at scale i of S by default.
        repeat_last_scale: guide the last scale as the one before it, as the released code does.
        temperature: divides the guided logits, > 0.
        top_k: keep the k most probable ids; of all scales, or a list with one for each. HART has 600, and 300 from the
            eighth scale on.
        top_p: keep the nucleus of this probability mass.
        last_steps: passes in which the last scale is drawn, some of its places in each; more of them by the cosine in
            the later ones. 1 in HART. Its input is the same in all: places see those that were read before, not what
            was drawn there.
        solver: of the head; its own by default.

    Raises:
        ValueError: a setting out of its range; in use, top_k for another number of scales, more steps than places, or
            more than one for a head that draws all places of a scale together.
    """

    def __init__(
        self,
        guidance_scale: float = 1.0,
        *,
        guidance_schedule: GuidanceSchedule = "scale_linear",
        repeat_last_scale: bool = False,
        temperature: float = 1.0,
        top_k: int | list[int] | None = None,
        top_p: float | None = None,
        last_steps: int = 1,
        solver: Solver | None = None,
    ) -> None:
        every_k = top_k if isinstance(top_k, list) else [] if top_k is None else [top_k]
        if temperature <= 0 or any(k < 1 for k in every_k) or (top_p is not None and not 0 < top_p <= 1):
            raise ValueError(
                f"temperature must be > 0, top_k at least 1 and top_p in (0, 1], got {temperature}, {top_k} and {top_p}"
            )
        if last_steps < 1:
            raise ValueError(f"last_steps must be at least 1, got {last_steps}")
        self.guidance_scale = guidance_scale
        self.guidance_schedule: GuidanceSchedule = guidance_schedule
        self.repeat_last_scale = repeat_last_scale
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.last_steps = last_steps
        self.solver = solver

    def scales(self, count: int) -> list[float]:
        """List the guidance scale of each of so many scales."""
        scales = guidance_scales(self.guidance_schedule, self.guidance_scale, count)
        return [*scales[:-1], scales[-2]] if self.repeat_last_scale and count > 1 else scales

    @torch.no_grad()
    def __call__(
        self,
        network: ScaleTransformer,
        head: TokenDiffusionHead,
        condition: Condition | Tensor,
        random: CounterRandom,
        *,
        pyramid: ScalePyramid,
    ) -> ScaleVectors:
        """Draw the latents of one image for each condition.

        Args:
            network: makes hidden states and logits.
            head: draws vectors.
            condition: labels `(B,)` int64 in [0, num_classes], or a condition with a context.
            random: one stream for each image, which alone decides what is drawn.
            pyramid: makes of what is drawn what the next scale reads.

        Raises:
            ValueError: settings that do not fit the scales, or logits that are NaN, told at the end.
        """
        lengths, condition = network.layout.lengths, as_condition(condition)
        if isinstance(self.top_k, list) and len(self.top_k) != len(lengths):
            raise ValueError(f"top_k has {len(self.top_k)} numbers for {len(lengths)} scales")
        if self.last_steps > lengths[-1]:
            raise ValueError(f"last_steps={self.last_steps} exceeds the {lengths[-1]} places of the last scale")
        if self.last_steps > 1 and head.drawn_together:
            raise ValueError(f"last_steps={self.last_steps} draws parts of a scale, and this head draws whole ones")
        drawing = _ScaleDrawing(self, cast_once(network), head=cast_once(head), condition=condition, random=random)
        with evaluation_mode(network), evaluation_mode(head), checked_at_the_end():
            tokens: list[Tensor] = []
            inputs = f_hat = None
            for number in range(len(lengths)):
                ids, vectors = drawing.scale(number, inputs, pyramid)
                if ids is not None:
                    tokens.append(ids)
                with torch.autocast(random.indices.device.type, enabled=False):
                    f_hat = pyramid.add(number, f_hat, ids, vectors)
                    if number + 1 < len(lengths):
                        inputs = pyramid.at_scale(number + 1, f_hat)
        assert f_hat is not None
        return ScaleVectors(
            latents=f_hat,
            tokens=torch.cat(tokens, dim=1) if tokens else None,
            network_calls=sum(made.evaluations for made in drawing.passes),
            sequential_passes=len(drawing.passes),
            count_flops=partial(_flops_of_scales, network, head, drawing.passes, self.solver or head.solver),
        )


class _Pass(NamedTuple):
    """A pass of the network, and what the head draws behind it."""

    evaluations: int
    """For each image."""
    vectors: int
    """That are read."""
    filled: int
    """Elements in the cache before."""
    drawn: int
    """Places that the head draws."""
    halves: int
    """Rows of each of them: 2 with guidance."""


class _ScaleDrawing:
    """One call of a `HybridScaleSampler`: its cache, and its passes so far."""

    def __init__(
        self,
        sampler: HybridScaleSampler,
        network: ScaleTransformer,
        *,
        head: TokenDiffusionHead,
        condition: Condition,
        random: CounterRandom,
    ) -> None:
        layout = network.layout
        self.sampler, self.network, self.head, self.random = sampler, network, head, random
        self.batch = len(condition)
        self.guides = sampler.scales(len(layout.sizes))
        self.doubled = any(scale != 1 for scale in self.guides)
        if self.doubled:
            condition = condition.with_null(null_label=layout.num_classes, null_id=None)
        self.condition = condition
        self.cache = network.new_cache(condition)
        self.dtype = next(network.parameters()).dtype
        self.uniforms = random.uniform(Purpose.TOKEN, sum(layout.lengths)).split(layout.lengths, dim=1)
        self.solver = sampler.solver or head.solver
        self.passes: list[_Pass] = []
        self.draws = 0

    def scale(self, number: int, inputs: Tensor | None, pyramid: ScalePyramid) -> tuple[Tensor | None, Tensor | None]:
        """Draw ids `(B, n)` and vectors `(B, n, D)` of scale `number`, as far as it has them."""
        length = self.network.layout.lengths[number]
        if inputs is None:
            dim = self.network.layout.dim
            inputs = torch.zeros(self.batch, 0, dim, dtype=self.dtype, device=self.random.indices.device)
        if number + 1 < len(self.guides) or self.sampler.last_steps == 1:
            return self.pass_over(number, inputs, pyramid, None)
        turn = self.random.uniform(Purpose.ORDER, length).argsort(dim=1)
        ids, vectors, first = None, None, 0
        for left in masked_counts(CosineSchedule(), self.sampler.last_steps, length):
            places = turn[:, first : length - left].sort(dim=1).values
            wide = places[..., None].expand(-1, -1, inputs.shape[-1])
            new_ids, new_vectors = self.pass_over(number, inputs.gather(1, wide), pyramid, places)
            if new_ids is not None:
                ids = new_ids.new_zeros(self.batch, length) if ids is None else ids
                ids = ids.scatter(1, places, new_ids)
            assert new_vectors is not None
            vectors = new_vectors.new_zeros(*inputs.shape[:1], length, inputs.shape[-1]) if vectors is None else vectors
            vectors = vectors.scatter(1, wide, new_vectors)
            first = length - left
        return ids, vectors

    def pass_over(
        self, number: int, inputs: Tensor, pyramid: ScalePyramid, places: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run the network once, and draw what it predicts."""
        evaluations, guide_by = 1 + self.doubled, self.guides[number]
        filled = self.cache.filled
        rows = inputs.repeat(evaluations, 1, 1)
        doubled = None if places is None else places.repeat(evaluations, 1)
        states = self.network(rows, self.condition, self.cache, places=doubled)
        count = states.hidden.shape[1]
        ids = vectors = None
        if states.logits is not None:
            logits = states.logits[: self.batch]
            if self.doubled:
                logits = guide(logits, states.logits[self.batch :], guide_by)
            uniforms = self.uniforms[number] if places is None else self.uniforms[number].gather(1, places)
            top_k = self.sampler.top_k[number] if isinstance(self.sampler.top_k, list) else self.sampler.top_k
            ids, _ = draw_filtered(logits / self.sampler.temperature, uniforms, top_k, self.sampler.top_p)
        drawn, guided = 0, guide_by != 1
        if pyramid.draws_vectors(number):
            drawn = count
            hidden = states.hidden if guided else states.hidden[: self.batch]
            codes = None if ids is None else pyramid.codes(ids).repeat(1 + guided, 1, 1)
            vectors = self.draw_vectors(self.network.head_condition(hidden, codes), guide_by)
        self.passes.append(_Pass(evaluations, inputs.shape[1], filled, drawn, 1 + guided))
        return ids, vectors

    def draw_vectors(self, z: Tensor, guide_by: float) -> Tensor:
        """Draw vectors `(B, n, D)` of `z (B, n, W)`, or with the null states behind them `(2 B, n, W)`."""
        count, dim, first = z.shape[1], self.head.dim, self.draws
        self.draws += self.solver.steps + 1

        def rows(values: Tensor) -> Tensor:
            return values if self.head.drawn_together else values.flatten(0, 1)

        def noise(number: int) -> Tensor:
            numbers = self.random.normal(Purpose.LATENT_NOISE, count * dim, first + number)
            return rows(numbers.to(self.dtype).view(self.batch, count, dim))

        vectors = self.head.sample(
            rows(z), noise(0), noise=lambda i: noise(i + 1), guidance_scale=guide_by, solver=self.solver
        )
        return vectors.view(self.batch, count, dim)


def _flops_of_scales(network: ScaleTransformer, head: TokenDiffusionHead, passes: list[_Pass], solver: Solver) -> int:
    """Floating-point operations for an image: of each pass of the network, and of the head at the places it draws."""
    total = 0
    for made in passes:
        total += network.flops(made.evaluations, made.vectors, made.filled)
        if made.drawn and head.drawn_together:
            total += head.flops(made.halves, solver, together=made.drawn)
        elif made.drawn:
            total += head.flops(made.halves * made.drawn, solver)
    return total
