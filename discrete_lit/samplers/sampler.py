"""One draw of a sampler: what it reads, what it costs, and its trace.

What a sampler is.

Passes of a causal backbone, one after another on one cache, with guidance where a step has it.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import floor
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from discrete_lit.backbones import Backbone, Cache
from discrete_lit.backbones.backbone import packed
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import MaskSchedule
from discrete_lit.diffusion.parameterization import Denoiser
from discrete_lit.diffusion.processes import is_absorbing
from discrete_lit.diffusion.schedules import NoiseLevel
from discrete_lit.samplers.categorical import draw_filtered
from discrete_lit.samplers.guidance import GuidanceSchedule, guidance_scales, guide


@dataclass(frozen=True)
class TraceStep:
    """What one step of a sampler did; three tensors `(B, N)`."""

    tokens: Tensor
    """int64 after the step, K where nothing is drawn yet."""
    changed: Tensor
    """bool: where they differ from those before the step."""
    confidence: Tensor
    """float64: what the sampler ordered or drew the step's ids by, nan where it drew none that could stay."""


@dataclass(frozen=True)
class SamplerOutput:
    """Tokens and what they cost."""

    tokens: Tensor
    """`(B, N)` int64 ids in [0, K), in raster order."""
    network_calls: int
    """Network evaluations for each image; the conditional and the null one of a guided step count as two."""
    sequential_passes: int
    """Passes that follow one another; the two evaluations of a guided step are one pass."""
    count_flops: Callable[[], int]
    """Measures `flops`."""
    trace: tuple[TraceStep, ...] | None = None
    """One entry for each pass, where it was asked for."""

    @property
    def flops(self) -> int:
        """Floating-point operations of the network for each image, as `Backbone.flops` counts them.

        Null evaluations are included, and those of a place head, whose passes over one place are not counted
        otherwise. Measured when it is asked for.
        """
        return self.count_flops()


class ScaleQuantizer(Protocol):
    """What next-scale sampling needs of `MultiScaleResidualQuantizer`, which explains the names."""

    vocab_size: int
    dim: int
    lengths: list[int]

    def contribution(self, number: int, ids: Tensor) -> Tensor: ...
    def at_scale(self, number: int, f_hat: Tensor) -> Tensor: ...


class SamplingContext:
    """What a sampler works with while it draws one batch; it counts the passes that are made through it.

    Attributes:
        backbone: in eval mode.
        layout: its layout.
        labels: `(B,)` int64.
        random: one stream for each sequence.
        known: `(B, N)` int64, tokens to keep, -1 elsewhere; None where nothing is given.
        quantizer: of a next-scale sampler.
        denoiser: process, schedule and head of a generator that learned to undo noise.
    """

    def __init__(
        self,
        backbone: Backbone,
        labels: Tensor,
        random: CounterRandom,
        known: Tensor | None,
        quantizer: ScaleQuantizer | None,
        denoiser: Denoiser | None,
        trace: bool,
    ) -> None:
        self.backbone = backbone
        self.layout = backbone.layout
        self.labels = labels
        self.random = random
        self.known = known
        self.quantizer = quantizer
        self.denoiser = denoiser
        self._calls = 0
        self._passes = 0
        # What was computed how often, by what counts its operations and the shapes that this takes.
        self._made: Counter[tuple[Callable[..., int], tuple[int | None, ...]]] = Counter()
        self._trace: list[TraceStep] | None = [] if trace else None
        self._before = self.start()
        self._prepared: dict[bool, tuple[Tensor, Cache]] = {}

    def start(self) -> Tensor:
        """`(B, N)`: the tokens that are given, and the mask id."""
        mask_id = self.layout.mask_id
        if self.known is None:
            return self.labels.new_full((len(self.labels), self.layout.length), mask_id)
        return torch.where(self.known < 0, mask_id, self.known)

    def unknown(self) -> Tensor:
        """`(B, N)` bool, where nothing is given."""
        return self.start() == self.layout.mask_id

    def predict(self, tokens: Tensor, scale: float = 1.0) -> Tensor:
        """Guided, unnormalised log-probabilities of every position of a bidirectional backbone.

        The null pass is left out where the scale is 1; what depends on the labels alone is computed once for all steps.

        Args:
            tokens: `(B, N)`, the mask id where nothing is known.
            scale: of the guidance.

        Returns:
            `(B, N, K)` float32.
        """
        level = None
        if self.layout.timed:
            assert self.denoiser is not None, "a timed backbone comes with its denoiser"
            level = self.denoiser.level_of_masks(tokens == self.layout.mask_id)
        conditional, unconditional = self.evaluate(tokens, scale != 1, level)
        logits = conditional if unconditional is None else guide(conditional, unconditional, scale)
        return logits[..., : self.layout.vocab_size]

    def evaluate(self, tokens: Tensor, guided: bool, level: NoiseLevel | None = None) -> tuple[Tensor, Tensor | None]:
        """One pass of a bidirectional backbone.

        Args:
            tokens: `(B, N)`.
            guided: whether the null label's logits are wanted too.
            level: how noisy the tokens are, for a timed backbone.

        Returns:
            Logits `(B, N, outputs)` given the labels, and given the null label or None.
        """
        labels, cache = self.prepare(guided)
        self.count(1 + guided, tokens.shape[1], cache)
        time = None if self.denoiser is None or level is None else self.denoiser.network_time(level)
        if not guided:
            return self.backbone(tokens, labels, cache, None, time), None
        doubled = None if time is None else time.repeat(2)
        conditional, unconditional = self.backbone(tokens.repeat(2, 1), labels, cache, None, doubled).chunk(2)
        return conditional, unconditional

    def prepare(self, guided: bool) -> tuple[Tensor, Cache]:
        """Labels `(B,)`, or with as many null labels behind them, and the backbone's cache for them."""
        if guided not in self._prepared:
            null = torch.full_like(self.labels, self.layout.null_label)
            labels = torch.cat((self.labels, null)) if guided else self.labels
            self._prepared[guided] = labels, self.backbone.new_cache(labels)
            self._made[self.backbone.cache_flops, (1 + guided,)] += 1
        return self._prepared[guided]

    def count(self, evaluations: int, tokens: int, cache: Cache | None) -> None:
        """Note one pass before it is made.

        Args:
            evaluations: of the network for each image.
            tokens: that each of them reads.
            cache: as it is before.
        """
        self._calls += evaluations
        self._passes += 1
        self._made[self.backbone.flops, (evaluations, tokens, None if cache is None else cache.filled)] += 1

    def count_head(self, evaluations: int, known: int) -> None:
        """Note a pass of the place head over one place.

        Args:
            evaluations: of the head for each image.
            known: parts of the id that it is given.
        """
        self._made[self.backbone.head_flops, (evaluations, known)] += 1

    @property
    def traced(self) -> bool:
        """Whether a trace was asked for."""
        return self._trace is not None

    def begin(self, tokens: Tensor) -> None:
        """Let the trace begin with `tokens (B, N)`, where it is not with the mask id at all that is to be drawn."""
        self._before = tokens

    def record(self, tokens: Tensor, confidence: Tensor) -> None:
        """Add a step to the trace, if there is one.

        Args:
            tokens: `(B, N)` after the step.
            confidence: `(B, N)`, of the ids that the step drew; what is not finite is recorded as nan.
        """
        if self._trace is not None:
            confidence = confidence.double()
            finite = torch.where(confidence.isfinite(), confidence, torch.nan)
            self._trace.append(TraceStep(tokens.clone(), tokens != self._before, finite))
            self._before = tokens.clone()

    def output(self, tokens: Tensor) -> SamplerOutput:
        """The result."""
        trace = None if self._trace is None else tuple(self._trace)
        return SamplerOutput(tokens, self._calls, self._passes, partial(_total_flops, self._made), trace)


def _total_flops(made: Counter[tuple[Callable[..., int], tuple[int | None, ...]]]) -> int:
    return sum(times * count(*shape) for (count, shape), times in made.items())


class Sampler(ABC):
    """Draws sequences from a backbone; holds every setting of the draw and no state.

    Args:
        temperature: divides the guided log-probabilities, > 0.
        top_k: keep the k most probable ids, >= 1; all by default.
        top_p: keep the nucleus of this mass, in (0, 1]; all by default.
        guidance_scale: s of `uncond + s (cond - uncond)` on log-probabilities; 1 is off.
        guidance_schedule: how the scale changes over the steps (tokens, scales), see `guidance_scales`.
        guidance_power: of the schedule `power_cosine`, >= 0.
        guidance_interval: the first guided step (token, scale) and the one after the last; all by default.

    Raises:
        ValueError: a setting out of its range.
    """

    attention: Literal["bidirectional", "causal", "block_causal"]
    """The layout's `attention` that the sampler needs."""

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        guidance_schedule: GuidanceSchedule = "constant",
        guidance_power: float = 1.0,
        guidance_interval: tuple[int, int] | None = None,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {temperature}; top_k=1 is the greedy choice")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        if guidance_power < 0:
            raise ValueError(f"guidance_power must be >= 0, got {guidance_power}")
        if guidance_interval is not None and not 0 <= guidance_interval[0] < guidance_interval[1]:
            raise ValueError(f"guidance_interval must be [first, end] with 0 <= first < end, got {guidance_interval}")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.guidance_scale = guidance_scale
        self.guidance_schedule: GuidanceSchedule = guidance_schedule
        self.guidance_power = guidance_power
        self.guidance_interval = guidance_interval

    def __call__(
        self,
        backbone: Backbone,
        labels: Tensor,
        random: CounterRandom,
        known: Tensor | None = None,
        quantizer: ScaleQuantizer | None = None,
        denoiser: Denoiser | None = None,
        trace: bool = False,
    ) -> SamplerOutput:
        """Draw one sequence for each label.

        Args:
            backbone: in eval mode, with the attention that this sampler needs.
            labels: `(B,)` int64 in [0, num_classes], the null label included.
            random: one stream for each sequence; it alone decides the draw.
            known: `(B, N)` int64, tokens to keep and -1 where one is to be drawn: in-painting, out-painting, or another
                class for a part of an image. Each sampler says what it can keep.
            quantizer: of `"block_causal"` backbones, whose input is made by it.
            denoiser: of backbones that learned to undo noise, masks among it.
            trace: also give what every step did.

        Raises:
            ValueError: a backbone that this sampler cannot serve; labels, random streams or known tokens that do not
                fit; a guidance interval or steps that the sequence is too short for.
        """
        layout = backbone.layout
        if layout.attention != self.attention:
            raise ValueError(
                f"{type(self).__name__} needs a backbone with {self.attention} attention, "
                f"this generator's is {layout.attention}"
            )
        if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) <= layout.null_label):
            raise ValueError(
                f"labels must lie in [0, {layout.null_label}] ({layout.null_label} is the null label), "
                f"got [{int(labels.min())}, {int(labels.max())}]"
            )
        if len(random.indices) != len(labels):
            raise ValueError(
                f"random has {len(random.indices)} streams for {len(labels)} labels: one for each is needed"
            )
        if known is not None:
            self._check_known(known, (len(labels), layout.length), layout.vocab_size)
        if self.attention == "causal":
            # A pass over one position has few rows for each weight, and there is one for each token.
            backbone = packed(backbone, rows=2 * len(labels))
        context = SamplingContext(backbone, labels, random, known, quantizer, denoiser, trace)
        return context.output(self.draw(context))

    @abstractmethod
    def draw(self, context: SamplingContext) -> Tensor:
        """The tokens `(B, N)`, with `context`'s labels and random numbers; the known ones among them."""

    def scales(self, steps: int) -> list[float]:
        """The guidance scale of each of the `steps` steps.

        Raises:
            ValueError: a guidance interval that ends after the last step.
        """
        return guidance_scales(
            self.guidance_schedule, self.guidance_scale, steps, self.guidance_power, self.guidance_interval
        )

    def choose(
        self, log_probabilities: Tensor, uniforms: Tensor, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Apply temperature and filters, then draw.

        Args:
            log_probabilities: `(B, n, K)` guided, unnormalised.
            uniforms: `(B, n)` float64.
            temperature: the sampler's own by default.

        Returns:
            Ids `(B, n)` int64, and their log-probabilities `(B, n)` at the temperature before the filters: after them
            all greedily chosen ids would be equally sure.
        """
        temperature = temperature or self.temperature
        logits = log_probabilities if temperature == 1 else log_probabilities / temperature
        return draw_filtered(logits, uniforms, self.top_k, self.top_p)

    def _check_known(self, known: Tensor, shape: tuple[int, int], vocab_size: int) -> None:
        if tuple(known.shape) != shape or known.is_floating_point():
            raise ValueError(f"known must be int64 of shape {shape}, got {known.dtype} {tuple(known.shape)}")
        if known.numel() and not (-1 <= int(known.min()) and int(known.max()) < vocab_size):
            raise ValueError(
                f"known must lie in [-1, {vocab_size}) (-1 where a token is to be drawn), "
                f"got [{int(known.min())}, {int(known.max())}]"
            )


class CachedDecoder:
    """What follows the tokens so far, step by step, given the labels and, behind them in the batch, the null label.

    The null rows' keys and values must be there from the first step on, also where the scale is still 1; after the last
    guided step those rows are left out.

    Args:
        drawing: its backbone, labels and counts.
        guided_steps: steps until the last guided one, itself included.
        order: `(B, N)` of an any-order backbone.
    """

    def __init__(self, context: SamplingContext, guided_steps: int, order: Tensor | None = None) -> None:
        self.context = context
        self.guided_steps = guided_steps
        self.doubled = guided_steps > 0
        self.labels, self.cache = context.prepare(self.doubled)
        self.order = None if order is None else order.repeat(1 + self.doubled, 1)

    def __call__(self, tokens: Tensor, step: int) -> Tensor:
        """What the backbone makes of `tokens (B, n)` or their vectors, which follow those of the calls before.

        Returns:
            `(B, rows, K)` logits, or hidden states for a place head; or `(2 B, rows, ...)`, the null rows last.
        """
        if self.doubled and step >= self.guided_steps:
            batch = len(tokens)
            self.doubled, self.labels, self.cache = False, self.labels[:batch], self.cache.first_rows(batch)
            self.order = None if self.order is None else self.order[:batch]
        self.context.count(1 + self.doubled, tokens.shape[1], self.cache)
        return self.context.backbone(self.rows(tokens), self.labels, self.cache, self.order)

    def rows(self, values: Tensor) -> Tensor:
        """`(B, ...)` for each row of this step, those of the null label included."""
        return torch.cat((values, values)) if self.doubled else values

    def guide(self, logits: Tensor, scale: float) -> Tensor:
        """Logits of every row to guided, unnormalised log-probabilities `(B, ..., K)`."""
        if not self.doubled:
            return logits
        conditional, unconditional = logits.chunk(2)
        return guide(conditional, unconditional, scale)


class ParallelSampler(Sampler):
    """Fills a sequence in a number of steps. It can keep tokens at any places.

    Args:
        steps: T, at least 1; of samplers that reveal so many tokens at a step, at most N.
        settings: of `Sampler`.

    Raises:
        ValueError: a setting out of its range; in use, more steps than tokens.
    """

    attention = "bidirectional"

    def __init__(self, steps: int, **settings: Any) -> None:
        super().__init__(**settings)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps = steps

    def check_steps(self, context: SamplingContext) -> None:
        """Raises ValueError where there are more steps than tokens, or noise that does more than mask."""
        if context.denoiser is not None and not is_absorbing(context.denoiser.process):
            raise ValueError(
                f"{type(self).__name__} needs a generator of masked tokens, {type(context.denoiser.process).__name__} "
                "does more than mask: use AncestralSampler"
            )
        if self.steps > context.layout.length:
            raise ValueError(
                f"steps={self.steps} exceeds the {context.layout.length} tokens of a sequence: "
                "each step reveals at least one"
            )

    def choose_at(
        self, logits: Tensor, where: Tensor, width: int, uniforms: Tensor, progress: float
    ) -> tuple[Tensor, Tensor]:
        """Draw at some of the places alone: a draw over the vocabulary costs far more than its gathering.

        Args:
            logits: `(B, N, K)` guided.
            where: `(B, N)` bool.
            width: the most places of a row.
            uniforms: `(B, N)` float64.
            progress: the share of the steps that is done after this one.

        Returns:
            Ids `(B, N)` and what they are ordered by `(B, N)` float64; of no meaning elsewhere.
        """
        places = where.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        chosen = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1]))
        ids, score = self.choose_with_score(chosen, uniforms.gather(1, places), progress)
        return (
            ids.new_zeros(where.shape).scatter(1, places, ids),
            score.new_zeros(where.shape, dtype=torch.float64).scatter(1, places, score.double()),
        )

    def choose_with_score(self, logits: Tensor, uniforms: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """Ids `(B, n)` of guided logits `(B, n, K)`, and what they are ordered by: their log-probability."""
        return self.choose(logits, uniforms)


def masked_counts(schedule: MaskSchedule, steps: int, unknown: int) -> list[int]:
    """Tokens still masked after each of the T steps where `unknown` were masked at the start.

    `floor(unknown m(1 - (i + 1) / T))` after step i, but at most one fewer than before and at least one for each step
    to come, as far as there are so many; none after the last.
    """
    counts, masked = [], unknown
    for step in range(1, steps):
        t = torch.tensor(1 - step / steps, dtype=torch.float64)
        # Rounding must not decide a count: 128 of 256 tokens, not 127, where m is 0.5 - 6e-17.
        wanted = floor(unknown * float(schedule.mask_probability(t)) + 1e-9)
        masked = max(min(steps - step, masked), min(wanted, masked - 1))
        counts.append(masked)
    return [*counts, 0]


def column(counts: Iterable[int], like: Tensor) -> Tensor:
    """`(B, 1)` int64 of one count for each row."""
    return torch.tensor(list(counts), dtype=torch.int64, device=like.device)[:, None]
