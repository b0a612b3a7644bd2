"""BAR's sampler (Yu et al., "Autoregressive Image Generation with Masked Bit Modeling", 2026).

The loop over the positions is `RasterSampler.draw`; the bits of one position are drawn as MaskGIT draws tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from discrete_lit.backbones import MaskedBitHead, SubTokenHead
from discrete_lit.samplers.categorical import draw_categorical, filter_logits
from discrete_lit.samplers.guidance import GuidanceSchedule
from discrete_lit.samplers.raster import RasterSampler
from discrete_lit.samplers.sampler import CachedDecoder


class BARSampler(RasterSampler):
    """Sample token by token; the bits of an id in a few steps, each of which unmasks the most confident bits.

    With tau = `choice_temperature (1 - i / T)` at step i of T, a bit is drawn from softmax(logits / tau), by the larger
    logit where tau is 0; its confidence is the guided logit of what was drawn plus tau times Gumbel noise. Logits are
    divided by the temperature before. The last step unmasks all bits.

    Args:
        bit_counts: how many bits are unmasked in each of the T steps; they add up to the bits of an id. (2, 2, 5, 7) of
            16 is published.
        choice_temperature: of both noises, >= 0; 2.5 for BAR-B, 3.0 for BAR-L.
        guidance_scale: 5.0 for BAR-B, 5.3 for BAR-L; on the logits of the bits.
        guidance_schedule: over the positions; `linear` is BAR's.
        settings: of `RasterSampler` and `Sampler`.

    Raises:
        ValueError: a setting out of its range; in use, a generator without a `MaskedBitHead`, or one of ids of another
            number of bits.
    """

    def __init__(
        self,
        bit_counts: Sequence[int] = (2, 2, 5, 7),
        choice_temperature: float = 2.5,
        *,
        guidance_scale: float = 5.0,
        guidance_schedule: GuidanceSchedule = "linear",
        **settings: Any,
    ) -> None:
        super().__init__(guidance_scale=guidance_scale, guidance_schedule=guidance_schedule, **settings)
        if not bit_counts or min(bit_counts) < 1:
            raise ValueError(f"bit_counts must have one step or more, of at least 1 bit each, got {list(bit_counts)}")
        if choice_temperature < 0:
            raise ValueError(f"choice_temperature must be >= 0, got {choice_temperature}")
        self.bit_counts = tuple(bit_counts)
        self.choice_temperature = choice_temperature

    def draw_id(
        self, head: SubTokenHead, decoder: CachedDecoder, hidden: Tensor, scales: Sequence[float], uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        head, steps = self._checked(head), len(self.bit_counts)
        noise = uniforms.unflatten(-1, (steps, 2, head.bits))  # for the draw and the confidence of each bit
        bits = torch.full_like(noise[:, :, 0, 0], head.masked_bit, dtype=torch.int64)  # (B, 1, b)
        total = uniforms.new_zeros((len(uniforms), 1))
        still_masked = head.bits
        for step, count in enumerate(self.bit_counts):
            # Predict every bit, given the position's output and the bits that are unmasked.
            decoder.context.count_head(1 + decoder.doubled, 0)
            logits = decoder.guide(head.bit_logits(hidden, decoder.rows(bits)), scales[0]) / self.temperature
            # Draw all bits; their confidence is the logit plus Gumbel noise.
            tau = self.choice_temperature * (1 - step / steps)
            drawn = self._draw_bits(logits, noise[:, :, step, 0], tau)
            score = logits.gather(-1, drawn[..., None])[..., 0]
            confidence = score - tau * torch.log(-torch.log(noise[:, :, step, 1]))
            # Unmask the most confident of the masked bits.
            masked = bits == head.masked_bit
            still_masked -= count
            rank = confidence.masked_fill(~masked, torch.inf).argsort(dim=-1).argsort(dim=-1)
            unmasked = masked & (rank >= still_masked)
            bits = torch.where(unmasked, drawn, bits)
            total = total + ((score - logits.logsumexp(dim=-1)) * unmasked).sum(dim=-1)
        return head.sub_tokens.join(bits), total

    def _draw_bits(self, logits: Tensor, uniforms: Tensor, tau: float) -> Tensor:
        if tau == 0:
            return logits.argmax(dim=-1)
        return draw_categorical(filter_logits(logits, self.top_k, self.top_p) / tau, uniforms)

    def uniforms_per_id(self, head: SubTokenHead | None) -> int:
        return 2 * len(self.bit_counts) * len(self._checked(head).sub_tokens)

    def sub_token_scales(self, steps: int, head: SubTokenHead | None) -> list[list[float]]:
        return [self.scales(steps)]

    def _checked(self, head: SubTokenHead | None) -> MaskedBitHead:
        if not isinstance(head, MaskedBitHead):
            raise ValueError(
                f"BARSampler draws the bits of a generator with a MaskedBitHead, this one has "
                f"{'no place_head' if head is None else 'a ' + type(head).__name__}"
            )
        if sum(self.bit_counts) != head.bits:
            raise ValueError(
                f"bit_counts={list(self.bit_counts)} unmask {sum(self.bit_counts)} bits, "
                f"an id of this generator has {head.bits}"
            )
        return head
