"""Autoregressive sampling on a key-value cache: one token after another, in raster order or any other.

`RasterSampler.draw` is the loop. Where an id is predicted in sub-tokens (groups of bits, single bits), the loop inside
one position is `draw_id`. Open-MAGVIT2's sampler (Luo et al., "Open-MAGVIT2", 2024) gives each sub-token settings of
its own; BAR's, in `bar.py`, draws the bits of a position in another way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from discrete_lit.backbones import IdHead, SubTokenHead
from discrete_lit.core.random import Purpose
from discrete_lit.core.synchronisation import on_device
from discrete_lit.samplers.guidance import GuidanceSchedule, guided_steps
from discrete_lit.samplers.sampler import CachedDecoder, Sampler, SamplingContext

Order = Literal["raster", "random"] | Sequence[int]


class RasterSampler(Sampler):
    """Sample an autoregressive generator token by token: N passes over one position each.

    Known tokens must come first in the order (a prefix), which is read in one pass; what is drawn follows its exact
    conditional law. With `order="random"` any positions may be known, since the order begins with them. Where the
    generator has a sub-token head, the sub-tokens of an id are drawn in turn, each with the settings below: the law is
    exactly that of `log_likelihood`.

    Args:
        order: `"raster"`; for a backbone of any order also `"random"`, another order for each sequence, or the
            positions in turn.
        settings: of `Sampler`; steps of the guidance are tokens, r = n / N at token n from 0 (as RAR's).

    Raises:
        ValueError: a setting out of its range; in use, an order that the generator does not have, or known tokens that
            are no prefix.
    """

    attention = "causal"

    def __init__(self, order: Order = "raster", **settings: Any) -> None:
        super().__init__(**settings)
        if isinstance(order, str):
            if order not in ("raster", "random"):
                raise ValueError(f"order must be 'raster', 'random' or the positions in turn, got {order!r}")
        elif sorted(order) != list(range(len(order))):
            raise ValueError(f"order must hold each position from 0 on once, got {list(order)}")
        self.order = order

    def draw(self, context: SamplingContext) -> Tensor:
        length, mask_id = context.layout.length, context.layout.mask_id
        if context.layout.delays:
            raise ValueError(
                f"{type(self).__name__} draws one id at each position, this generator has "
                f"{context.layout.sub_tokens} that are delayed: DelaySampler draws them"
            )
        head = self._sub_token_head(context.backbone.place_head)
        order = self._order(context)  # (B, N), or None for raster order
        scales = self.sub_token_scales(length, head)  # of each sub-token at each position
        uniforms = context.random.uniform(Purpose.TOKEN, length * self.uniforms_per_id(head))
        uniforms = rearrange(uniforms, "b (n u) -> b n u", n=length)
        decoder = CachedDecoder(context, max(guided_steps(over_positions) for over_positions in scales), order=order)

        tokens = context.start() if order is None else context.start().gather(1, order)  # in the order drawn
        known = tokens != mask_id
        read = 0  # the cache holds the tokens before this position
        first = 0 if context.known is None else common_prefix(known)
        for position in range(first, length):
            output = decoder(tokens[:, read:position], position)[:, -1:]  # (B, 1, K), or (B, 1, D) for a head
            read = position
            here = slice(position, position + 1)
            scales_here = [over_positions[position] for over_positions in scales]
            if head is None:
                drawn, log_probability = self.choose(decoder.guide(output, scales_here[0]), uniforms[:, here, 0])
            else:
                drawn, log_probability = self.draw_id(head, decoder, output, scales_here, uniforms[:, here])
            tokens[:, here] = torch.where(known[:, here], tokens[:, here], drawn)
            if context.traced:
                confidence = torch.full(tokens.shape, torch.nan, dtype=torch.float64, device=tokens.device)
                confidence[:, here] = log_probability.masked_fill(known[:, here], torch.nan)
                context.record(self.to_raster(tokens, order), self.to_raster(confidence, order))
        return self.to_raster(tokens, order)

    def draw_id(
        self, head: SubTokenHead, decoder: CachedDecoder, hidden: Tensor, scales: Sequence[float], uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw one id, its sub-tokens in turn.

        Args:
            head: the backbone's sub-token head.
            decoder: knows which rows of this position are guided.
            hidden: `(B or 2 B, 1, D)`, the backbone's output at the position.
            scales: guidance scale of each sub-token.
            uniforms: `(B, 1, uniforms_per_id)` float64.

        Returns:
            Ids `(B, 1)` and their log-probabilities `(B, 1)`.
        """
        drawn = uniforms.new_zeros((len(uniforms), 1, 0), dtype=torch.int64)
        total = uniforms.new_zeros((len(uniforms), 1))
        for number, scale in enumerate(scales):
            decoder.context.count_head(1 + decoder.doubled, number)
            logits = decoder.guide(head.sub_token_logits(hidden, decoder.rows(drawn)), scale)
            sub_token, log_probability = self.sub_token_sampler(number).choose(logits, uniforms[..., number])
            drawn, total = torch.cat((drawn, sub_token[..., None]), dim=-1), total + log_probability
        return head.sub_tokens.join(drawn), total

    def uniforms_per_id(self, head: SubTokenHead | None) -> int:
        """Count the uniform numbers that an id takes."""
        return 1 if head is None else len(head.sub_tokens)

    def sub_token_scales(self, steps: int, head: SubTokenHead | None) -> list[list[float]]:
        """The guidance scales: for each sub-token of an id one at each of the `steps` positions."""
        return [self.scales(steps)] * (1 if head is None else len(head.sub_tokens))

    def sub_token_sampler(self, number: int) -> Sampler:
        """The sampler whose temperature and filters a sub-token is drawn with."""
        return self

    @staticmethod
    def to_raster(values: Tensor, order: Tensor | None) -> Tensor:
        """Put values `(B, N)` that stand in an order into raster order."""
        return values if order is None else torch.empty_like(values).scatter_(1, order, values)

    def _sub_token_head(self, head: IdHead | None) -> SubTokenHead | None:
        if head is None or isinstance(head, SubTokenHead):
            return head
        raise ValueError(
            f"{type(self).__name__} draws ids by their probabilities, or sub-token by sub-token; this generator has a "
            f"{type(head).__name__}, which gives neither: BinaryFlowSampler draws from a BinaryFlowHead"
        )

    def _order(self, context: SamplingContext) -> Tensor | None:
        """`(B, N)`: the positions in turn, or None for the raster order."""
        layout, labels = context.layout, context.labels
        if isinstance(self.order, str) and self.order == "raster":
            return None
        if not layout.any_order:
            raise ValueError(
                f"order={self.order!r} needs a generator of any order, this one has the raster order alone"
            )
        if isinstance(self.order, str):
            # Unknown positions come in random order, after those that are known.
            return (context.random.uniform(Purpose.CONFIDENCE, layout.length) + context.unknown()).argsort(dim=1)
        if len(self.order) != layout.length:
            raise ValueError(f"order has {len(self.order)} positions, this generator's sequences have {layout.length}")
        return on_device(torch.tensor, tuple(self.order), device=labels.device).expand(len(labels), -1)


def common_prefix(known: Tensor) -> int:
    """Count the first tokens that are known in every row of `known (B, N)` bool.

    Raises:
        ValueError: a token is known after one that is not.
    """
    # Asked before the first pass, and where tokens are known alone.
    if bool((known[:, 1:] & ~known[:, :-1]).any()):
        raise ValueError(
            "known must be the first tokens in the generator's order (a prefix): what is drawn cannot depend on "
            "later ones; a bidirectional generator, or order='random' of one of any order, keeps any"
        )
    return int(known.sum(dim=1).min()) if len(known) else 0


@dataclass(frozen=True, kw_only=True)
class SubTokenSettings:
    """Settings that one sub-token of an id is drawn with; they are those of `Sampler`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0


class OpenMAGVIT2Sampler(RasterSampler):
    """Sample token by token, with settings of their own for the sub-tokens of an id.

    Args:
        parts: settings of each sub-token, least significant first; published for (2^6, 2^12) with guidance scales 1.9
            and 2.0 for 343M parameters, 1.9 and 1.9 for 804M, 1.75 and 1.85 for 1.5B, and temperatures 1.0 and 1.0, of
            the larger two 1.1 and 1.0.
        order: of the positions, as in `RasterSampler`.
        guidance_schedule, guidance_power, guidance_interval: of all sub-tokens, as in `Sampler`.

    Raises:
        ValueError: a setting out of its range; in use, a generator without as many sub-tokens.
    """

    def __init__(
        self,
        parts: Sequence[SubTokenSettings],
        order: Order = "raster",
        *,
        guidance_schedule: GuidanceSchedule = "constant",
        guidance_power: float = 1.0,
        guidance_interval: tuple[int, int] | None = None,
    ) -> None:
        if not parts:
            raise ValueError("parts must have settings for each part of an id, got none")
        over_positions: dict[str, Any] = {
            "guidance_schedule": guidance_schedule,
            "guidance_power": guidance_power,
            "guidance_interval": guidance_interval,
        }
        super().__init__(order, **over_positions)
        self.sub_token_samplers = [
            RasterSampler(
                temperature=part.temperature,
                top_k=part.top_k,
                top_p=part.top_p,
                guidance_scale=part.guidance_scale,
                **over_positions,
            )
            for part in parts
        ]

    def sub_token_scales(self, steps: int, head: SubTokenHead | None) -> list[list[float]]:
        found = 1 if head is None else len(head.sub_tokens)
        if found != len(self.sub_token_samplers):
            raise ValueError(
                f"parts has settings for {len(self.sub_token_samplers)} parts of an id, this generator predicts {found}"
            )
        return [sampler.scales(steps) for sampler in self.sub_token_samplers]

    def sub_token_sampler(self, number: int) -> Sampler:
        return self.sub_token_samplers[number]
