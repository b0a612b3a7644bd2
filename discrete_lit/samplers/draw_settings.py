"""The draw of an id of a segment from the logits that a network gives: guidance, temperature, filters."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from discrete_lit.samplers.categorical import draw_filtered
from discrete_lit.samplers.guidance import guide, guide_twice


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """The settings by which the ids, or the vectors, of a segment are drawn.

    Attributes:
        temperature: divides the guided log-probabilities, > 0.
        top_k: keep the k most probable ids, >= 1; all by default.
        top_p: keep the nucleus of this probability mass, in (0, 1]; all by default.
        guidance_scale: s of `null + s (full - null)`; 1 is off. With an `image_guidance_scale`, that of the text.
        image_guidance_scale: s_img of `null + s_img (image - null) + s (full - image)`, where an image is given beside
            the text; None for guidance by both together.

    Raises:
        ValueError: a setting out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0
    image_guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}; top_k=1 is the greedy choice")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

    @property
    def contexts(self) -> int:
        """The number of contexts that the network is asked given: everything; nothing too; and the image alone."""
        if self.image_guidance_scale is not None:
            return 3
        return 1 if self.guidance_scale == 1 else 2

    def guide(self, outputs: Sequence[Tensor]) -> Tensor:
        """Guide logits given everything, the image alone if there are three, and nothing."""
        if len(outputs) == 1 or self.contexts == 1:
            return outputs[0]
        if self.image_guidance_scale is None:
            return guide(outputs[0], outputs[-1], self.guidance_scale)
        full, image, null = outputs
        return guide_twice(full, image, null, image_scale=self.image_guidance_scale, text_scale=self.guidance_scale)

    def draw(
        self, logits: Sequence[Tensor], uniforms: Tensor, *, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw ids by guided logits.

        Args:
            logits: `(B, ..., K)`, given each context, as `guide` takes them.
            uniforms: `(B, ...)` in [0, 1), a random number for each id.
            allowed: `(B, K)` bool, the ids that may be drawn; all by default.

        Returns:
            The ids `(B, ...)`, and the log-probability of each.
        """
        guided = self.guide(logits)
        if allowed is not None:
            guided = guided.masked_fill(~allowed, -torch.inf)
        if self.temperature != 1:
            guided = guided / self.temperature
        return draw_filtered(guided, uniforms, self.top_k, self.top_p)
