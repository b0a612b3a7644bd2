"""One draw of a sampler: what it reads, what it costs, and its trace."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from discrete_lit.backbones import Backbone, Cache
from discrete_lit.processes import CounterRandom
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
    trace: tuple[TraceStep, ...] | None = None
    """One entry for each pass, where it was asked for."""


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
    """

    def __init__(
        self,
        backbone: Backbone,
        labels: Tensor,
        random: CounterRandom,
        known: Tensor | None,
        quantizer: ScaleQuantizer | None,
        trace: bool,
    ) -> None:
        self.backbone = backbone
        self.layout = backbone.layout
        self.labels = labels
        self.random = random
        self.known = known
        self.quantizer = quantizer
        self._calls = 0
        self._passes = 0
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
        guided = scale != 1
        labels, cache = self.prepare(guided)
        self.count(1 + guided)
        if not guided:
            return self.backbone(tokens, labels, cache)
        conditional, unconditional = self.backbone(tokens.repeat(2, 1), labels, cache).chunk(2)
        return guide(conditional, unconditional, scale)

    def prepare(self, guided: bool) -> tuple[Tensor, Cache]:
        """Labels `(B,)`, or with as many null labels behind them, and the backbone's cache for them."""
        if guided not in self._prepared:
            null = torch.full_like(self.labels, self.layout.null_label)
            labels = torch.cat((self.labels, null)) if guided else self.labels
            self._prepared[guided] = labels, self.backbone.new_cache(labels)
        return self._prepared[guided]

    def count(self, evaluations: int) -> None:
        """Note one pass with this many network evaluations for each image."""
        self._calls += evaluations
        self._passes += 1

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
        return SamplerOutput(tokens, self._calls, self._passes, trace)
