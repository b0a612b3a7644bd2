"""A backbone along one order of the places."""

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn

from discrete_lit.backbones import Backbone, Cache


class OrderedBackbone(Backbone):
    """An any-order backbone whose sequences come in one fixed order, so that a sampler needs to know of none.

    Args:
        backbone: of an any-order layout; shared, not copied.
        order: `(N,)` int64, the place of the grid that each token in turn stands at.
    """

    def __init__(self, backbone: Backbone, order: Tensor) -> None:
        super().__init__(replace(backbone.layout, any_order=False))
        self.backbone = backbone
        self.place_head = backbone.place_head
        self.order = order

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        cache: Cache | None = None,
        order: Tensor | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        assert order is None, "the order is fixed"
        return self.backbone(tokens, labels, cache, self.order.expand(len(labels), -1), time)

    def shards(self) -> Iterable[nn.Module]:
        return self.backbone.shards()

    def new_cache(self, labels: Tensor) -> Cache:
        return self.backbone.new_cache(labels)

    def flops(self, batch: int, tokens: int, filled: int | None = None) -> int:
        return self.backbone.flops(batch, tokens, filled)

    def cache_flops(self, batch: int) -> int:
        return self.backbone.cache_flops(batch)
