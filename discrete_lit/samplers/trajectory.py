"""The noisy sequences of a draw on their way to images."""

import torch
from torch import Tensor

from discrete_lit.processes import Purpose
from discrete_lit.processes.denoiser import Denoiser
from discrete_lit.processes.noise_level import NoiseLevel
from discrete_lit.processes.reverse import is_absorbing
from discrete_lit.samplers.drawing import Drawing
from discrete_lit.samplers.sampler import Sampler


def denoiser_of(drawing: Drawing, sampler: Sampler) -> Denoiser:
    """What a sampler of diffusion needs of the generator.

    Raises:
        ValueError: the generator did not learn to undo noise, or guidance has nothing to tell apart.
    """
    name = type(sampler).__name__
    if drawing.denoiser is None:
        raise ValueError(f"{name} needs a generator that learned to undo noise, as Masked and DiscreteDiffusion do")
    if sampler.guidance_scale != 1 and drawing.layout.num_classes < 2:
        raise ValueError(
            f"guidance_scale={sampler.guidance_scale} needs a generator of several classes, this one has "
            f"{drawing.layout.num_classes}: leave it at 1"
        )
    return drawing.denoiser


class Trajectory:
    """States of all tokens, those that are given kept in their place.

    Attributes:
        drawing: passes and random numbers.
        denoiser: process, schedule and head.
        states: `(B, N)` int64, x_t.
        fixed: `(B, N)` bool, tokens that are given.
        log_probability: `(B, N)` float64, that of each id when it was drawn; 0 where none was.
    """

    def __init__(self, drawing: Drawing, denoiser: Denoiser, level: NoiseLevel) -> None:
        self.drawing = drawing
        self.denoiser = denoiser
        self.fixed = ~drawing.unknown()
        self.log_probability = torch.zeros(self.fixed.shape, dtype=torch.float64, device=self.fixed.device)
        process, length = denoiser.process, drawing.layout.length
        self.states = drawing.start()
        if not is_absorbing(process):
            prior = process.draw_prior(drawing.random.uniform(Purpose.ORDER, length))
            self.states = torch.where(self.fixed, self.states, prior)
            self.fix(level)
            drawing.begin(self.states)

    @property
    def masked(self) -> Tensor:
        """`(B, N)` bool, where the mask stands."""
        return self.states == self.drawing.layout.mask_id

    def fix(self, level: NoiseLevel) -> None:
        """Put the tokens that are given to their places, with the noise of a level where noise is not masks alone."""
        if is_absorbing(self.denoiser.process) or not bool(self.fixed.any()):
            return
        given = torch.where(self.fixed, self.drawing.start(), 0)
        # The same numbers at every level: what is given gets rid of its noise as the rest does.
        uniforms = self.drawing.random.uniform(Purpose.MASK_ORDER, given.shape[1])
        noisy = self.denoiser.process.corrupt(given, level.alpha, uniforms)
        self.states = torch.where(self.fixed, noisy, self.states)

    def mask(self, forgotten: Tensor) -> None:
        """Mask tokens again, `(B, N)` bool."""
        self.states = self.states.masked_fill(forgotten, self.drawing.layout.mask_id)

    def move(self, moved: Tensor, states: Tensor, log_probability: Tensor) -> None:
        """Note what a pass did.

        Args:
            moved: `(B, N)` bool, tokens that were drawn.
            states: `(B, N)` after it.
            log_probability: `(B, N)` of what was drawn.
        """
        self.states = torch.where(moved, states, self.states)
        self.log_probability = torch.where(moved, log_probability.double(), self.log_probability)
        self.drawing.record(self.states, log_probability.double().masked_fill(~moved, torch.nan))
