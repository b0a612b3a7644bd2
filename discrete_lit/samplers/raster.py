"""Token after token in the generator's order, with a key-value cache.

Open-MAGVIT2's sampler (Luo et al., "Open-MAGVIT2", 2024): each part of an id with settings of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from discrete_lit.backbones import SubTokenHead
from discrete_lit.core.random import Purpose
from discrete_lit.samplers.guidance import GuidanceSchedule, guided_steps
from discrete_lit.samplers.sampler import CachedDecoder, Sampler, SamplingContext


class RasterSampler(Sampler):
    """Ancestral sampling of an autoregressive generator: N single-token passes, fewer where the first are given.

    It can keep tokens that come first in the order (a prefix), whose conditional law is then exact; with
    `order="random"` those at any places, since the order begins with them. Where the generator has a place head, the
    parts of an id (its bits) are drawn in turn, each with the settings below: the law is exactly that of
    `log_likelihood`.

    Args:
        order: `"raster"`; of a backbone of any order also `"random"`, another order for each sequence, or the places in
            turn.
        settings: of `Sampler`; steps of the guidance are tokens, r = n / N at token n from 0 (as RAR's).

    Raises:
        ValueError: a setting out of its range; in use, an order that the generator does not have, or known tokens that
            are no prefix.
    """

    attention = "causal"

    def __init__(self, order: Literal["raster", "random"] | Sequence[int] = "raster", **settings: Any) -> None:
        super().__init__(**settings)
        if isinstance(order, str):
            if order not in ("raster", "random"):
                raise ValueError(f"order must be 'raster', 'random' or the places in turn, got {order!r}")
        elif sorted(order) != list(range(len(order))):
            raise ValueError(f"order must hold each place from 0 on once, got {list(order)}")
        self.order = order

    def draw(self, context: SamplingContext) -> Tensor:
        order = self._order(context)
        length, head = context.layout.length, context.backbone.place_head
        scales = self.sub_token_scales(length, head)
        tokens = context.start() if order is None else context.start().gather(1, order)
        given = tokens != context.layout.mask_id
        first = self._common_prefix(given)
        decoder = CachedDecoder(context, max(guided_steps(part) for part in scales), order)
        uniforms = context.random.uniform(Purpose.TOKEN, length * self.draws(head)).unflatten(1, (length, -1))
        unread = 0
        for place in range(first, length):
            output = decoder(tokens[:, unread:place], place)[:, -1:]  # (B, 1, K), or (B, 1, D) for a head
            unread = place
            here = slice(place, place + 1)
            at_place = [part[place] for part in scales]
            if head is None:
                drawn, log_probability = self.choose(decoder.guide(output, at_place[0]), uniforms[:, here, 0])
            else:
                drawn, log_probability = self.draw_id(head, decoder, output, at_place, uniforms[:, here])
            tokens[:, here] = torch.where(given[:, here], tokens[:, here], drawn)
            self._record(context, tokens, order, place, log_probability.masked_fill(given[:, here], torch.nan))
        return _to_raster(tokens, order)

    def draws(self, head: SubTokenHead | None) -> int:
        """Uniform numbers for each id."""
        return 1 if head is None else len(head.sub_tokens)

    def sub_token_scales(self, steps: int, head: SubTokenHead | None) -> list[list[float]]:
        """The guidance scale of each part of an id at each of the `steps` places."""
        return [self.scales(steps)] * (1 if head is None else len(head.sub_tokens))

    def sub_token_sampler(self, number: int) -> Sampler:
        """Whose temperature and filters a part of an id is drawn with."""
        return self

    def draw_id(
        self, head: SubTokenHead, decoder: CachedDecoder, hidden: Tensor, scales: Sequence[float], uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw the parts of one id.

        Args:
            head: of the backbone.
            decoder: which rows of this step are guided.
            hidden: `(B or 2 B, 1, D)` of the place.
            scales: of the guidance of each part.
            uniforms: `(B, 1, draws)`.

        Returns:
            Ids `(B, 1)` and their log-probabilities `(B, 1)`.
        """
        known = uniforms.new_zeros((len(uniforms), 1, 0), dtype=torch.int64)
        total = uniforms.new_zeros((len(uniforms), 1))
        for number, scale in enumerate(scales):
            decoder.context.count_head(1 + decoder.doubled, number)
            logits = decoder.guide(head.sub_token_logits(hidden, decoder.rows(known)), scale)
            part, log_probability = self.sub_token_sampler(number).choose(logits, uniforms[..., number])
            known, total = torch.cat((known, part[..., None]), dim=-1), total + log_probability
        return head.sub_tokens.join(known), total

    def _order(self, context: SamplingContext) -> Tensor | None:
        """`(B, N)`, or None for the raster order."""
        layout, labels = context.layout, context.labels
        if isinstance(self.order, str) and self.order == "raster":
            return None
        if not layout.any_order:
            raise ValueError(
                f"order={self.order!r} needs a generator of any order, this one has the raster order alone"
            )
        if isinstance(self.order, str):
            # Drawn places come in random order, after those that are given.
            return (context.random.uniform(Purpose.CONFIDENCE, layout.length) + context.unknown()).argsort(dim=1)
        if len(self.order) != layout.length:
            raise ValueError(f"order has {len(self.order)} places, this generator's sequences have {layout.length}")
        return torch.tensor(self.order, device=labels.device).expand(len(labels), -1)

    def _common_prefix(self, given: Tensor) -> int:
        """How many tokens are given in every row of `(B, N)` bool, in their order.

        Raises:
            ValueError: a token is given after one that is not.
        """
        if bool((given[:, 1:] & ~given[:, :-1]).any()):
            raise ValueError(
                "known must be the first tokens in the generator's order (a prefix): what is drawn cannot depend on "
                "later ones; a bidirectional generator, or order='random' of one of any order, keeps any"
            )
        return int(given.sum(dim=1).min()) if len(given) else 0

    def _record(
        self, context: SamplingContext, tokens: Tensor, order: Tensor | None, place: int, score: Tensor
    ) -> None:
        if not context.traced:
            return
        confidence = torch.full(tokens.shape, torch.nan, dtype=torch.float64, device=tokens.device)
        confidence[:, place : place + 1] = score
        context.record(_to_raster(tokens, order), _to_raster(confidence, order))


def _to_raster(values: Tensor, order: Tensor | None) -> Tensor:
    """`(B, N)` in the order to raster order."""
    return values if order is None else torch.empty_like(values).scatter_(1, order, values)


@dataclass(frozen=True)
class SubTokenSettings:
    """How one part of an id is drawn; the settings are those of `Sampler`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0


class OpenMAGVIT2Sampler(RasterSampler):
    """Place after place, the parts of an id in turn.

    Args:
        parts: settings of each part, least significant first; published for (2^6, 2^12) with guidance scales 1.9 and
            2.0 for 343M parameters, 1.9 and 1.9 for 804M, 1.75 and 1.85 for 1.5B, and temperatures 1.0 and 1.0, of the
            larger two 1.1 and 1.0.
        order: of the places, as in `RasterSampler`.
        guidance_schedule, guidance_power, guidance_interval: of all parts, as in `Sampler`.

    Raises:
        ValueError: a setting out of its range; in use, a generator without as many parts of an id.
    """

    def __init__(
        self,
        parts: Sequence[SubTokenSettings],
        order: Literal["raster", "random"] | Sequence[int] = "raster",
        guidance_schedule: GuidanceSchedule = "constant",
        guidance_power: float = 1.0,
        guidance_interval: tuple[int, int] | None = None,
    ) -> None:
        if not parts:
            raise ValueError("parts must have settings for each part of an id, got none")
        over_places: dict[str, Any] = {
            "guidance_schedule": guidance_schedule,
            "guidance_power": guidance_power,
            "guidance_interval": guidance_interval,
        }
        super().__init__(order, **over_places)
        self.sub_token_samplers = [
            RasterSampler(
                temperature=part.temperature,
                top_k=part.top_k,
                top_p=part.top_p,
                guidance_scale=part.guidance_scale,
                **over_places,
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
