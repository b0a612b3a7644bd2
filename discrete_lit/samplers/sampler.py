"""A sampler draws token sequences from a backbone: the contract, and what one call of it works with.

`Sampler` holds the settings that all samplers share and no state; a subclass is one algorithm, its `draw`. A call makes
a `SamplingContext` (backbone, condition, random numbers, known tokens, cost, trace), hands it to `draw`, and returns a
`SamplerOutput`. `CachedDecoder` runs a causal backbone step by step on a key-value cache.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from discrete_lit.backbones import Backbone, Cache
from discrete_lit.backbones.condition import Condition, as_condition, plain
from discrete_lit.backbones.execution import (
    cast_once,
    packed,
)
from discrete_lit.core.modules import evaluation_mode
from discrete_lit.core.random import CounterRandom
from discrete_lit.core.synchronisation import checked_at_the_end, forbid, host_sees
from discrete_lit.diffusion.noise_level import NoiseLevel
from discrete_lit.diffusion.parameterization import Denoiser
from discrete_lit.samplers.categorical import draw_filtered
from discrete_lit.samplers.guidance import GuidanceSchedule, guidance_scales, guide


class Sampler(ABC):
    """Draw sequences of tokens from a backbone, by the algorithm of the subclass's `draw`.

    Args:
        temperature: divides the guided log-probabilities, > 0.
        top_k: keep the k most probable ids, >= 1; all by default.
        top_p: keep the nucleus of this probability mass, in (0, 1]; all by default.
        guidance_scale: s of `uncond + s (cond - uncond)` on log-probabilities; 1 is off.
        guidance_schedule: how the scale changes over the steps (tokens, scales), see `guidance_scales`.
        guidance_power: exponent of the schedule `power_cosine`, >= 0.
        guidance_interval: the first guided step (token, scale) and the one after the last; all by default.

    Raises:
        ValueError: a setting out of its range.
    """

    attention: Literal["bidirectional", "causal", "block_causal"]
    """The kind of attention that the backbone must have (`SequenceLayout.attention`)."""

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
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
        condition: Condition | Tensor,
        random: CounterRandom,
        *,
        known: Tensor | None = None,
        quantizer: "ScaleQuantizer | None" = None,
        denoiser: Denoiser | None = None,
        trace: bool = False,
    ) -> "SamplerOutput":
        """Draw one sequence for each label.

        Args:
            backbone: with the attention that this sampler needs; it is sampled in eval mode, and left in its own.
            condition: labels `(B,)` int64 in [0, num_classes], the null label included, or all that the backbone reads;
                guidance drops all of it.
            random: one stream of random numbers for each sequence; it alone decides what is drawn.
            known: `(B, N)` int64, tokens to keep, and -1 where one is to be drawn: in-painting, out-painting, or
                another class for one region of an image. Each sampler says which positions it can keep.
            quantizer: makes the input of `"block_causal"` backbones.
            denoiser: process, schedule and head of a backbone that learned to undo noise, masks included.
            trace: also record what every step did.

        Raises:
            ValueError: a backbone that this sampler cannot serve; a condition, random streams or known tokens that do
                not fit; a guidance interval or steps that the sequence is too short for; a network whose logits are
                NaN, which is told at the end of the draw, the one moment at which the host waits for the device.
        """
        layout = backbone.layout
        if layout.attention != self.attention:
            raise ValueError(
                f"{type(self).__name__} needs a backbone with {self.attention} attention, "
                f"this generator's is {layout.attention}"
            )
        if len(random.indices) != len(condition):
            raise ValueError(
                f"random has {len(random.indices)} streams for {len(condition)} labels: one for each is needed"
            )
        if known is not None:
            _check_known(known, (len(condition), layout.length), layout.vocab_size)
        with evaluation_mode(backbone), checked_at_the_end():
            context = SamplingContext(
                # A pass over one position has few rows for each weight, and there is one for each token.
                packed(backbone, rows=2 * len(condition)) if self.attention == "causal" else cast_once(backbone),
                _checked_ids(as_condition(condition), layout.null_label, backbone.grid_vocab),
                random=random,
                known=known,
                quantizer=quantizer,
                denoiser=denoiser,
                trace=trace,
            )
            output = context.output(self.draw(context))
        return output

    @abstractmethod
    def draw(self, context: "SamplingContext") -> Tensor:
        """Draw the tokens `(B, N)`, the known ones among them, with the labels and random numbers of `context`."""

    def scales(self, steps: int) -> list[float]:
        """The guidance scale of each of the `steps` steps.

        Raises:
            ValueError: a guidance interval that ends after the last step.
        """
        return guidance_scales(
            self.guidance_schedule, self.guidance_scale, steps, self.guidance_power, self.guidance_interval
        )

    def choose(
        self,
        log_probabilities: Tensor,
        uniforms: Tensor,
        temperature: float | None = None,
        *,
        where: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Apply temperature and filters, then draw an id from each row.

        Args:
            log_probabilities: `(..., K)` guided, unnormalised.
            uniforms: `(...)` float64, one uniform number for each row.
            temperature: the sampler's own by default.
            where: `(...)` bool, the rows that are needed; all by default.

        Returns:
            Ids `(...)` int64, and their log-probabilities `(...)` at the temperature, before the filters: after them
            all greedily chosen ids would be equally sure.
        """
        temperature = temperature or self.temperature
        logits = log_probabilities if temperature == 1 else log_probabilities / temperature
        return draw_filtered(logits, uniforms, self.top_k, self.top_p, where=where)


def _checked_ids(condition: Condition, null_label: int, null_id: int | None) -> Condition:
    """Give a condition back, its ids in range: others would end a GPU's whole process before it can say why.

    Raises:
        ValueError: a label out of [0, null_label], or an id of the grid out of [0, null_id]; at the end of the draw,
            unless the host sees them.
    """
    labels, grid = condition.labels, condition.grid
    labels = _in_range(labels, null_label, "labels", "label")
    if grid is not None and null_id is not None:
        grid = _in_range(grid, null_id, "the ids of a grid", "id")
    return replace(condition, labels=labels, grid=grid)


def _in_range(ids: Tensor, null: int, names: str, name: str) -> Tensor:
    if not ids.numel():
        return ids

    def message() -> str:
        return f"{names} must lie in [0, {null}] ({null} is the null {name}), got [{int(ids.min())}, {int(ids.max())}]"

    outside = ((ids < 0) | (ids > null)).any()
    if not host_sees(outside):
        forbid(outside, message)
    elif bool(outside):
        raise ValueError(message())
    return ids.clamp(0, null)


def _check_known(known: Tensor, shape: tuple[int, int], vocab_size: int) -> None:
    if tuple(known.shape) != shape or known.is_floating_point():
        raise ValueError(f"known must be int64 of shape {shape}, got {known.dtype} {tuple(known.shape)}")
    if known.numel() and not (-1 <= int(known.min()) and int(known.max()) < vocab_size):
        raise ValueError(
            f"known must lie in [-1, {vocab_size}) (-1 where a token is to be drawn), "
            f"got [{int(known.min())}, {int(known.max())}]"
        )


@dataclass(frozen=True, kw_only=True)
class TraceStep:
    """One step of a sampler, recorded; three tensors `(B, N)`, and what was spent up to its end."""

    tokens: Tensor
    """int64 after the step, K (the mask id) where nothing is drawn yet."""
    changed: Tensor
    """bool: where the tokens differ from those before the step."""
    confidence: Tensor
    """float64: the score that ordered the step's ids, or their log-probability; nan where none was drawn to stay."""
    network_calls: int
    """`SamplerOutput.network_calls`, so far."""
    sequential_passes: int
    """`SamplerOutput.sequential_passes`, so far."""


@dataclass(frozen=True, kw_only=True)
class EstimateStep:
    """One pass of a solver of whole latents, recorded, and what was spent up to its end."""

    estimate: Tensor
    """`(B, C, H, W)`: the latents without noise, as the network thinks of them at this pass."""
    network_calls: int
    """`SamplerOutput.network_calls`, so far."""
    sequential_passes: int
    """`SamplerOutput.sequential_passes`, so far."""


@dataclass(frozen=True, kw_only=True)
class SamplerOutput:
    """The drawn tokens or vectors and what they cost."""

    tokens: Tensor
    """`(B, N)` int64 ids in [0, K), in raster order; of a sampler of vectors `(B, N, D)`; of a generator a grid of
    these."""
    network_calls: int
    """Network evaluations for each image; the conditional and the null one of a guided step count as two."""
    sequential_passes: int
    """Passes that follow one another; the two evaluations of a guided step are one pass."""
    count_flops: Callable[[], int]
    """Measures `flops`."""
    trace: tuple[TraceStep, ...] | None = None
    """One entry for each pass, where it was asked for."""
    trace_start: Tensor | None = None
    """`(B, N)` int64: the tokens before the first step of the trace, masks or noise."""
    estimates: tuple[EstimateStep, ...] | None = None
    """The same of a solver of whole latents."""

    def with_tokens(self, tokens: Tensor) -> "SamplerOutput":
        """Give the same output with its tokens laid out in another way."""
        return replace(self, tokens=tokens)

    @property
    def flops(self) -> int:
        """Floating-point operations of the network for each image, as `Backbone.flops` counts them.

        Null evaluations are included, and those of a sub-token head, whose passes over one position are not counted
        otherwise. Measured when it is asked for.
        """
        return self.count_flops()


class SamplingContext:
    """Hold what one call of a sampler works with, run its network passes, and count them.

    Args:
        backbone: in eval mode.
        condition: what each sequence is given; or its labels `(B,)` int64 alone.
        random: one stream of random numbers for each sequence.
        known: `(B, N)` int64, tokens to keep, -1 elsewhere; None where nothing is known.
        quantizer: of the tokenizer, for next-scale samplers.
        denoiser: process, schedule and head of a generator that learned to undo noise.
        trace: whether to record every step.
    """

    def __init__(
        self,
        backbone: Backbone,
        condition: Condition | Tensor,
        *,
        random: CounterRandom,
        known: Tensor | None = None,
        quantizer: "ScaleQuantizer | None" = None,
        denoiser: Denoiser | None = None,
        trace: bool = False,
    ) -> None:
        self.backbone = backbone
        self.layout = backbone.layout
        self.condition = as_condition(condition)
        self.labels = self.condition.labels
        self.random = random
        self.known = known
        self.quantizer = quantizer
        self.denoiser = denoiser
        self._calls = 0
        self._passes = 0
        # How often each pass was made: what counts its operations, and the shapes that this takes.
        self._made: Counter[tuple[Callable[..., int], tuple[int | None, ...]]] = Counter()
        self._trace: list[TraceStep] | None = [] if trace else None
        self._trace_start = self._before = self.start()
        self._prepared: dict[bool, tuple[Condition | Tensor, Cache]] = {}

    # What is known.

    def start(self) -> Tensor:
        """`(B, N)`: the known tokens, and the mask id everywhere else."""
        mask_id = self.layout.mask_id
        if self.known is None:
            return self.labels.new_full((len(self.labels), self.layout.length), mask_id)
        return torch.where(self.known < 0, mask_id, self.known)

    def unknown(self) -> Tensor:
        """`(B, N)` bool: the positions to be drawn."""
        return self.start() == self.layout.mask_id

    def unknown_counts(self) -> list[int]:
        """Count the tokens of each sequence that are to be drawn; the device is asked where some may be known."""
        if self.known is None:
            return [self.layout.length] * len(self.labels)
        return self.unknown().sum(dim=1).tolist()

    # Passes of the network.

    def predict(self, tokens: Tensor, scale: float = 1.0) -> Tensor:
        """Predict every position of partly masked tokens with a bidirectional backbone, guided.

        The null pass is left out where the scale is 1; what depends on the condition alone is computed once for all
        steps.

        Args:
            tokens: `(B, N)`, the mask id where nothing is drawn yet.
            scale: guidance scale s.

        Returns:
            `(B, N, K)` unnormalised log-probabilities.
        """
        level = None
        if self.layout.timed:
            assert self.denoiser is not None, "a timed backbone comes with its denoiser"
            level = self.denoiser.level_of_masks(tokens == self.layout.mask_id)
        conditional, unconditional = self.evaluate(tokens, scale != 1, level)
        logits = conditional if unconditional is None else guide(conditional, unconditional, scale)
        return logits[..., : self.layout.vocab_size]

    def evaluate(self, tokens: Tensor, guided: bool, level: NoiseLevel | None = None) -> tuple[Tensor, Tensor | None]:
        """Run a bidirectional backbone once.

        Args:
            tokens: `(B, N)`.
            guided: whether the logits given nothing are wanted too.
            level: how noisy the tokens are, for a timed backbone; of each sequence, or of all.

        Returns:
            Logits `(B, N, outputs)` given the condition, and given the null one or None.
        """
        condition, cache = self.prepare(guided)
        self.count(1 + guided, tokens.shape[1], cache)
        time = None if self.denoiser is None or level is None else self.denoiser.network_time(level)
        time = None if time is None else time.expand(len(tokens))
        if not guided:
            return self.backbone(tokens, condition, cache, None, time), None
        doubled = None if time is None else time.repeat(2)
        conditional, unconditional = self.backbone(tokens.repeat(2, 1), condition, cache, None, doubled).chunk(2)
        return conditional, unconditional

    def prepare(self, guided: bool) -> tuple[Condition | Tensor, Cache]:
        """The condition of B sequences, or of 2 B with the null one behind, and the backbone's cache for it."""
        if guided not in self._prepared:
            condition = self.condition
            if guided:
                condition = condition.with_null(null_label=self.layout.null_label, null_id=self.backbone.grid_vocab)
            given = plain(condition)
            self._prepared[guided] = given, self.backbone.new_cache(given)
            self._made[self.backbone.cache_flops, (1 + guided, *self._attended)] += 1
        return self._prepared[guided]

    @property
    def _attended(self) -> tuple[int, ...]:
        """The number of vectors that each sequence attends to, where it does."""
        return () if self.condition.context is None else (self.condition.context.shape[1],)

    # What they cost.

    def count(self, evaluations: int, tokens: int, cache: Cache | None) -> None:
        """Count one pass, before it is made.

        Args:
            evaluations: network evaluations for each image, 2 where the pass is guided.
            tokens: how many tokens each of them reads.
            cache: the backbone's, if it has one, as it is before the pass.
        """
        self._calls += evaluations
        self._passes += 1
        filled = None if cache is None else cache.filled
        of_pass = evaluations, tokens, filled, *self._attended
        if cache is not None and cache.ahead:
            of_pass = (*of_pass, 0, cache.ahead) if not self._attended else (*of_pass, cache.ahead)
        self._made[self.backbone.flops, of_pass] += 1

    def count_head(self, evaluations: int, known: int) -> None:
        """Count one pass of a sub-token head over one position.

        Args:
            evaluations: evaluations of the head for each image.
            known: how many sub-tokens of the id it is given.
        """
        self._made[self.backbone.head_flops, (evaluations, known)] += 1

    # The trace.

    @property
    def traced(self) -> bool:
        """Whether a trace was asked for."""
        return self._trace is not None

    def begin(self, tokens: Tensor) -> None:
        """Start the trace from `tokens (B, N)`, for samplers that do not start from masks."""
        self._trace_start = self._before = tokens

    def record(self, tokens: Tensor, confidence: Tensor) -> None:
        """Add a step to the trace, if there is one.

        Args:
            tokens: `(B, N)` after the step.
            confidence: `(B, N)` of the ids that the step drew; what is not finite is recorded as nan.
        """
        if self._trace is not None:
            confidence = confidence.double()
            finite = torch.where(confidence.isfinite(), confidence, torch.nan)
            self._trace.append(
                TraceStep(
                    tokens=tokens.clone(),
                    changed=tokens != self._before,
                    confidence=finite,
                    network_calls=self._calls,
                    sequential_passes=self._passes,
                )
            )
            self._before = tokens.clone()

    def output(self, tokens: Tensor) -> SamplerOutput:
        """The result of the call, given its tokens `(B, N)`."""
        trace = None if self._trace is None else tuple(self._trace)
        return SamplerOutput(
            tokens=tokens,
            network_calls=self._calls,
            sequential_passes=self._passes,
            count_flops=partial(_total_flops, self._made),
            trace=trace,
            trace_start=None if trace is None else self._trace_start,
        )


def _total_flops(made: Counter[tuple[Callable[..., int], tuple[int | None, ...]]]) -> int:
    return sum(times * count(*shape) for (count, shape), times in made.items())


class ScaleQuantizer(Protocol):
    """The part of `MultiScaleResidualQuantizer` that next-scale sampling uses; the names are explained there."""

    vocab_size: int
    dim: int
    lengths: list[int]

    def contribution(self, number: int, ids: Tensor) -> Tensor: ...
    def at_scale(self, number: int, f_hat: Tensor) -> Tensor: ...


class CachedDecoder:
    """Run a causal backbone step by step on one key-value cache, with classifier-free guidance.

    As long as a guided step is to come, the batch is doubled: the rows of the condition first, those of the null
    one behind them. The null rows read every token from the first step on, also while the scale is still 1, since later
    steps attend to their keys and values; after the last guided step they are dropped.

    Args:
        context: backbone, condition and cost of this call.
        guided_steps: how many steps there are up to the last guided one, itself included; 0 without guidance.
        order: `(B, N)` for an any-order backbone.
    """

    def __init__(self, context: SamplingContext, guided_steps: int, *, order: Tensor | None = None) -> None:
        self.context = context
        self.guided_steps = guided_steps
        self.doubled = guided_steps > 0
        self.condition, self.cache = context.prepare(self.doubled)
        self.order = None if order is None else order.repeat(1 + self.doubled, 1)

    def __call__(self, tokens: Tensor, step: int, *, null_tokens: Tensor | None = None, ahead: int = 0) -> Tensor:
        """Read the next tokens.

        Args:
            tokens: `(B, n)` ids, or `(B, n, D)` vectors, which follow those of the calls before.
            step: from 0; it decides whether the null rows are still needed.
            null_tokens: what the null rows read instead, while there are any; the same tokens by default.
            ahead: positions beyond the next one that are also asked for, see `Cache.ahead`.

        Returns:
            `(B, rows, K)` logits, or hidden states for a sub-token head; or `(2 B, rows, ...)`, the null rows last.
        """
        if self.doubled and step >= self.guided_steps:
            batch = len(tokens)
            self.doubled, self.condition, self.cache = False, self.condition[:batch], self.cache.first_rows(batch)
            self.order = None if self.order is None else self.order[:batch]
        self.cache.ahead = ahead
        self.context.count(1 + self.doubled, tokens.shape[1], self.cache)
        rows = self.rows(tokens)
        if self.doubled and null_tokens is not None:
            rows = torch.cat((tokens, null_tokens))
        return self.context.backbone(rows, self.condition, self.cache, self.order)

    def rows(self, values: Tensor) -> Tensor:
        """Repeat `values (B, ...)` for the null rows, while there are any."""
        return torch.cat((values, values)) if self.doubled else values

    def guide(self, logits: Tensor, scale: float) -> Tensor:
        """Guided, unnormalised log-probabilities `(B, ..., K)` from the logits of every row."""
        if not self.doubled:
            return logits
        conditional, unconditional = logits.chunk(2)
        return guide(conditional, unconditional, scale)
