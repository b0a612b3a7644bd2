"""A backbone along one order of the places.

Next-token prediction in raster order (Esser et al., "Taming Transformers", 2021; Sun et al., "LlamaGen", 2024), in
another one, or in random orders that give way to it (Yu et al., "Randomized Autoregressive Visual Generation", 2024).
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones import Backbone, Cache, SequenceLayout
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.generators.generator import Generator, Likelihood, TokenLosses
from discrete_lit.samplers import RasterSampler, Sampler
from discrete_lit.tokenizers.tokenizer import Tokenizer


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

    def fsdp_units(self) -> Iterable[nn.Module]:
        return self.backbone.fsdp_units()

    def new_cache(self, labels: Tensor) -> Cache:
        return self.backbone.new_cache(labels)

    def flops(self, batch: int, tokens: int, filled: int | None = None) -> int:
        return self.backbone.flops(batch, tokens, filled)

    def cache_flops(self, batch: int) -> int:
        return self.backbone.cache_flops(batch)


class Autoregressive(Generator):
    """p(x | y) as the product over an order of p(x_n | x_1 ... x_{n-1}, y).

    A large vocabulary needs no softmax over all ids: with a `place_head` the backbone predicts the parts of an id
    (`FactorisedHead`: Open-MAGVIT2, or groups of bits) or its bits (`MaskedBitHead`: BAR), which the `BARSampler` draws
    in a few steps.

    Args:
        tokenizer: frozen here; `discrete_lit.tokenizers.from_checkpoint` in a YAML.
        image_size: side of the images in pixels.
        num_classes: labels lie in [0, num_classes).
        backbone: called with the `SequenceLayout`.
        sampler: `RasterSampler()` by default; it draws in this generator's order.
        order: `"raster"`; the N places of the grid, numbered in raster order, in the order they are predicted in; or
            `"random_annealed"`, RAR's: an image is trained on in an order drawn uniformly with a probability that
            falls to 0, else in raster order, in which the model is validated and sampled. The backbone's
            `target_positions` tell it which place comes next.
        anneal_steps: optimizer steps until which every order is random and from which none is; the probability falls
            linearly between them. RAR's by default, of 250,000.
        training: of `Generator`: label_dropout, optimizer, scheduler, seed.

    Raises:
        ValueError: an order that is no permutation of the places, or steps that fall.
    """

    coordinate_name = "position"
    fixed_order: Tensor | None

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: int,
        num_classes: int,
        backbone: Callable[[SequenceLayout], Backbone],
        sampler: Sampler | None = None,
        order: Literal["raster", "random_annealed"] | tuple[int, ...] = "raster",
        anneal_steps: tuple[int, int] = (125_000, 187_500),
        **training: Any,
    ) -> None:
        layout = SequenceLayout(
            tokenizer.vocab_size,
            tokenizer.token_shape(image_size),
            num_classes=num_classes,
            attention="causal",
            any_order=order != "raster",
        )
        if isinstance(order, str):
            if order not in ("raster", "random_annealed"):
                raise ValueError(f"order must be 'raster', 'random_annealed' or a permutation of places, got {order!r}")
        elif sorted(order) != list(range(layout.length)):
            raise ValueError(f"order must have each of the {layout.length} places 0 to {layout.length - 1} once")
        if not 0 <= anneal_steps[0] <= anneal_steps[1]:
            raise ValueError(f"anneal_steps must not fall and be >= 0, got {anneal_steps}")
        super().__init__(
            tokenizer,
            image_size,
            num_classes,
            layout,
            backbone,
            sampler or RasterSampler(),
            **training,
        )
        self.annealed = order == "random_annealed"
        self.anneal_steps = anneal_steps
        fixed = None if isinstance(order, str) else torch.tensor(order)
        self.register_buffer("fixed_order", fixed, persistent=False)

    def to_sequence(self, tokens: Tensor) -> Tensor:
        raster = tokens.flatten(1)
        return raster if self.fixed_order is None else raster[:, self.fixed_order]

    def to_grid(self, sequences: Tensor) -> Tensor:
        raster = sequences if self.fixed_order is None else sequences[:, self.fixed_order.argsort()]
        return super().to_grid(raster)

    def token_losses(self, tokens: Tensor, labels: Tensor, random: CounterRandom) -> TokenLosses:
        if self.annealed and self.training:
            orders = self._training_orders(random)
            values, weights = self._losses(tokens.gather(1, orders), labels, orders, random)
        else:
            values, weights = self._losses(tokens, labels, self._given_order(len(tokens)), random)
        place = (torch.arange(self.length, device=tokens.device) + 0.5) / self.length
        return TokenLosses(values, weights, place.expand_as(values))

    @torch.no_grad()
    def log_likelihood(
        self, tokens: Tensor, labels: Tensor, indices: Tensor | None = None, order: Tensor | None = None
    ) -> Likelihood:
        """log p(tokens | label) in nats, exact, in this generator's order or along another.

        The parts or bits of an id come in turn, the least significant first.

        Args:
            tokens: `(B, *token_shape)` int64 in [0, K).
            labels: `(B,)` int64 in [0, num_classes].
            indices: not needed here.
            order: `(N,)` int64, a permutation of the places; raster order for a generator of random orders by default.

        Raises:
            ValueError: an order given to a generator of the raster order alone, or one that is no permutation.
        """
        if order is None:
            sequences, orders = self.to_sequence(tokens), self._given_order(len(tokens))
        else:
            if not self.backbone.layout.any_order:
                raise ValueError("this generator knows the raster order alone: train it with order='random_annealed'")
            if sorted(order.tolist()) != list(range(self.length)):
                raise ValueError(f"order must have each of the {self.length} places 0 to {self.length - 1} once")
            sequences, orders = tokens.flatten(1)[:, order], order.expand(len(tokens), -1)
        outputs = self.backbone(sequences[:, :-1], labels, order=orders)
        head = self.backbone.place_head
        nats = -self._cross_entropy(outputs, sequences) if head is None else head.log_likelihood(outputs, sequences)
        return Likelihood(nats.double().sum(dim=1), "exact")

    def sampled_backbone(self) -> Backbone:
        return self.backbone if self.fixed_order is None else OrderedBackbone(self.backbone, self.fixed_order)

    def random_order_probability(self) -> float:
        """The probability of a random order at this step of training."""
        start, end = self.anneal_steps
        if self.global_step < start:
            return 1.0
        return 0.0 if self.global_step >= end else 1 - (self.global_step - start) / (end - start)

    def _training_orders(self, random: CounterRandom) -> Tensor:
        """`(B, N)`, a function of the sample and the step alone."""
        uniforms = random.uniform(Purpose.ORDER, self.length + 1)
        raster = torch.arange(self.length, device=uniforms.device)
        return torch.where(uniforms[:, :1] < self.random_order_probability(), uniforms[:, 1:].argsort(dim=1), raster)

    def _given_order(self, count: int) -> Tensor | None:
        return None if self.fixed_order is None else self.fixed_order.expand(count, -1)

    def _losses(
        self, sequences: Tensor, labels: Tensor, orders: Tensor | None, random: CounterRandom
    ) -> tuple[Tensor, Tensor]:
        """Nats and weights `(B, N)` of every token given those before it; `orders (B, N)` of their places."""
        outputs = self.backbone(sequences[:, :-1], labels, order=orders)  # (B, N, K), or (B, N, D) for a head
        if self.backbone.place_head is not None:
            return self.backbone.place_head.losses(outputs, sequences, random)
        values = self._cross_entropy(outputs, sequences)
        return values, torch.ones_like(values)

    def _cross_entropy(self, logits: Tensor, sequences: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), sequences.flatten(), reduction="none").view_as(sequences)
