"""What a sampler is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from discrete_lit.backbones import Backbone
from discrete_lit.processes import CounterRandom
from discrete_lit.samplers.categorical import draw_categorical, filter_logits
from discrete_lit.samplers.guidance import GuidanceSchedule, guide, scale_at


@dataclass(frozen=True)
class SamplerOutput:
    """Tokens and what they cost."""

    tokens: Tensor
    """`(B, N)` int64 ids in [0, K), in raster order."""
    network_calls: int
    """Network evaluations for each image; the conditional and the null one of a guided step count as two."""
    sequential_passes: int
    """Passes that follow one another; the two evaluations of a guided step are one pass."""


class Sampler(ABC):
    """Draws sequences from a backbone; holds every setting of the draw and no state.

    Args:
        temperature: divides the guided log-probabilities, > 0.
        top_k: keep the k most probable ids, >= 1; all by default.
        top_p: keep the nucleus of this mass, in (0, 1]; all by default.
        guidance_scale: s of `uncond + s (cond - uncond)` on log-probabilities; 1 is off.
        guidance_schedule: how the scale grows from 1 with the share r of steps (or tokens) done.

    Raises:
        ValueError: a setting out of its range.
    """

    attention: str
    """The layout's `attention` that the sampler needs."""

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        guidance_schedule: GuidanceSchedule = "constant",
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {temperature}; top_k=1 is the greedy choice")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.guidance_scale = guidance_scale
        self.guidance_schedule: GuidanceSchedule = guidance_schedule

    def __call__(self, backbone: Backbone, labels: Tensor, random: CounterRandom) -> SamplerOutput:
        """Draw one sequence for each label.

        Args:
            backbone: in eval mode, with the attention that this sampler needs.
            labels: `(B,)` int64 in [0, num_classes], the null label included.
            random: one stream for each sequence; it alone decides the draw.

        Raises:
            ValueError: a backbone that this sampler cannot serve, a label out of range.
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
        return self.draw(backbone, labels, random)

    @abstractmethod
    def draw(self, backbone: Backbone, labels: Tensor, random: CounterRandom) -> SamplerOutput:
        """`__call__` after its checks."""

    def scale_at(self, progress: float) -> float:
        """The guidance scale at a share `progress` in [0, 1) of the way."""
        return scale_at(self.guidance_schedule, self.guidance_scale, progress)

    def predict(self, backbone: Backbone, tokens: Tensor, labels: Tensor, progress: float) -> tuple[Tensor, int]:
        """Guided, unnormalised log-probabilities of every position of a bidirectional backbone.

        Args:
            tokens: `(B, N)`, the mask id where nothing is known.
            labels: `(B,)`.
            progress: share of the sampling that is done, for the guidance schedule.

        Returns:
            `(B, N, K)` float32, and the evaluations for each image: two, or one where the scale is 1.
        """
        scale = self.scale_at(progress)
        if scale == 1:
            return backbone(tokens, labels), 1
        null = torch.full_like(labels, backbone.layout.null_label)
        conditional, unconditional = backbone(tokens.repeat(2, 1), torch.cat((labels, null))).chunk(2)
        return guide(conditional, unconditional, scale), 2

    def choose(self, log_probabilities: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Apply temperature and filters, then draw.

        Args:
            log_probabilities: `(B, n, K)` guided, unnormalised.
            uniforms: `(B, n)` float64.

        Returns:
            Ids `(B, n)` int64, and their log-probabilities `(B, n)` under the distribution that they were drawn from.
        """
        logits = filter_logits(log_probabilities / self.temperature, self.top_k, self.top_p)
        tokens = draw_categorical(logits, uniforms)
        return tokens, logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
