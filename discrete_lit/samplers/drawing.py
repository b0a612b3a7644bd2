"""One draw of a sampler: what it reads, what it costs, and its trace."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from discrete_lit.backbones import Backbone, Cache
from discrete_lit.processes import CounterRandom
from discrete_lit.processes.denoiser import Denoiser
from discrete_lit.processes.noise_level import NoiseLevel
from discrete_lit.samplers.guidance import guide


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


class Drawing:
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
