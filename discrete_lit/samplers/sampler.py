"""What a sampler is."""

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor

from discrete_lit.backbones import Backbone
from discrete_lit.backbones.linear import packed_weights
from discrete_lit.processes import CounterRandom
from discrete_lit.processes.denoiser import Denoiser
from discrete_lit.samplers.categorical import draw_filtered
from discrete_lit.samplers.drawing import Drawing, SamplerOutput, ScaleQuantizer
from discrete_lit.samplers.guidance import GuidanceSchedule, guidance_scales


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
        drawing = Drawing(backbone, labels, random, known, quantizer, denoiser, trace)
        if self.attention != "causal":
            return drawing.output(self.draw(drawing))
        # A pass over one place has few rows for each weight, and there is one for each token.
        with packed_weights(backbone, rows=2 * len(labels)):
            return drawing.output(self.draw(drawing))

    @abstractmethod
    def draw(self, drawing: Drawing) -> Tensor:
        """The tokens `(B, N)`, with `drawing`'s labels and random numbers; the known ones among them."""

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
