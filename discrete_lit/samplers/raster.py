"""Token after token in the generator's order, with a key-value cache."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from discrete_lit.processes import Purpose
from discrete_lit.samplers.decoder import GuidedDecoder
from discrete_lit.samplers.drawing import Drawing
from discrete_lit.samplers.sampler import Sampler


class RasterSampler(Sampler):
    """Ancestral sampling of an autoregressive generator: N single-token passes, fewer where the first are given.

    It can keep tokens that come first in the order (a prefix), whose conditional law is then exact; with
    `order="random"` those at any places, since the order begins with them.

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

    def draw(self, drawing: Drawing) -> Tensor:
        order = self._order(drawing)
        length = drawing.layout.length
        scales = self.scales(length)
        tokens = drawing.start() if order is None else drawing.start().gather(1, order)
        given = tokens != drawing.layout.mask_id
        first = self._common_prefix(given)
        decoder = GuidedDecoder(drawing, scales, order)
        uniforms = drawing.random.uniform(Purpose.TOKEN, length)
        unread = 0
        for place in range(first, length):
            logits = decoder(tokens[:, unread:place], place)[:, -1:]  # (B, 1, K)
            unread = place
            drawn, log_probability = self.choose(logits, uniforms[:, place : place + 1])
            here = slice(place, place + 1)
            tokens[:, here] = torch.where(given[:, here], tokens[:, here], drawn)
            self._record(drawing, tokens, order, place, log_probability.masked_fill(given[:, here], torch.nan))
        return _to_raster(tokens, order)

    def _order(self, drawing: Drawing) -> Tensor | None:
        """`(B, N)`, or None for the raster order."""
        layout, labels = drawing.layout, drawing.labels
        if isinstance(self.order, str) and self.order == "raster":
            return None
        if not layout.any_order:
            raise ValueError(
                f"order={self.order!r} needs a generator of any order, this one has the raster order alone"
            )
        if isinstance(self.order, str):
            # Drawn places come in random order, after those that are given.
            return (drawing.random.uniform(Purpose.CONFIDENCE, layout.length) + drawing.unknown()).argsort(dim=1)
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

    def _record(self, drawing: Drawing, tokens: Tensor, order: Tensor | None, place: int, score: Tensor) -> None:
        confidence = torch.full(tokens.shape, torch.nan, dtype=torch.float64, device=tokens.device)
        confidence[:, place : place + 1] = score
        drawing.record(_to_raster(tokens, order), _to_raster(confidence, order))


def _to_raster(values: Tensor, order: Tensor | None) -> Tensor:
    """`(B, N)` in the order to raster order."""
    return values if order is None else torch.empty_like(values).scatter_(1, order, values)
