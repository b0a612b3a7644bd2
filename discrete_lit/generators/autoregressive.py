"""Autoregressive generators: next-token prediction, in one order or in many.

In raster order (Esser et al., "Taming Transformers", 2021, section 3.2; Sun et al., "LlamaGen", 2024), in another fixed
order, or in random orders that give way to the raster order (RAR; Yu et al., "Randomized Autoregressive Visual
Generation", 2024). Where the vocabulary is too large for one softmax, a token is predicted by the backbone's sub-token
head: next sub-token prediction (Luo et al., "Open-MAGVIT2", 2024; for the codes of a position Lee et al.,
"RQ-Transformer", 2022), masked bits (BAR; Yu et al., "Autoregressive Image
Generation with Masked Bit Modeling", 2026), or bits drawn together by flow matching, of one token or of a block of them
(BitDance, 2026).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from discrete_lit.backbones import Backbone, Cache, FactorisedHead, SequenceLayout
from discrete_lit.backbones.backbone import SubTokens, bits_of_vocabulary
from discrete_lit.backbones.condition import Condition
from discrete_lit.backbones.embeddings import CodeProjection
from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose, streams_of
from discrete_lit.generators.generator import Generator, Likelihood, TokenLosses, check_permutation, cross_entropies
from discrete_lit.samplers import RasterSampler, Sampler
from discrete_lit.samplers.sampler import SamplerOutput
from discrete_lit.tokenizers.tokenizer import Tokenizer
from discrete_lit.tokenizers.vqvae import RQVAE


class Autoregressive(Generator):
    """Predicts each token from those before it: p(x | y) is the product over n of p(x_n | x_1 ... x_{n-1}, y).

    The loss is the cross-entropy of every token; its sum is -log p(x | y).

    RAR (`order="random_annealed"`) trains on the product over n of p(x_o(n) | x_o(1) ... x_o(n-1), y) for a permutation
    o of the positions, which is drawn uniformly with a probability that falls to 0 in training, and else is the raster
    order. The backbone's `target_positions` tell it which position comes next. Validation and sampling keep to the
    raster order.

    A backbone with a `place_head` makes no softmax over all ids: the head predicts the sub-tokens of an id in turn
    (`FactorisedHead`: Open-MAGVIT2, or groups of bits), or its bits (`MaskedBitHead`: BAR, drawn by the `BARSampler`;
    `BinaryFlowHead`: BitDance, drawn by the `BinaryFlowSampler`, whose likelihood is a bound).

    RQ-Transformer (`stacked_codes`) reads the D codes of a position, RQ-VAE's, as one element of the sequence, and
    predicts them in turn by a `FactorisedHead` with D equal sub-tokens; the loss is that of a code. The paper trains it
    with `soft_labels`.

    With `block_size` p (BitDance's parallel form), the p tokens of a block are predicted together from the blocks
    before it, by a `BinaryFlowHead` with the same `block_size`.

    Arguments that are not listed are those of every `Generator`.

    Args:
        order: `"raster"`; the N positions of the grid, numbered in raster order, in the order in which they are
            predicted; `"blocks"`, squares of `block_size` positions in raster order, and so within each; `"random"`,
            in training a random order of each sequence (RandAR); or `"random_annealed"`, RAR's random orders that give
            way to the raster order.
        block_size: p, tokens that are predicted together.
        stacked_codes: the last axis of the tokens' grid is the D codes of one element of the sequence, as RQ-VAE's is.
        soft_labels: temperature tau of RQ-Transformer's training, which draws each code of an image by its distance,
            Q ~ exp(-distance^2 / tau), and takes the cross-entropy with Q in the place of the code (Lee et al., 2022,
            section 3.2.3; 0.5 in its code). It needs `stacked_codes`, an `RQVAE`, and images in the batches.
        perturb_rate: in training, each bit of the input (not of what is predicted) is flipped with a probability of its
            own, uniform in [0, perturb_rate]: as sampling reads what it drew, which may be wrong (BitDance has 0.1).
        anneal_steps: optimizer steps until which every order is random and from which none is; the probability falls
            linearly between them. RAR's by default, of 250,000.
        sampler: `RasterSampler()` by default; it draws in this generator's order.
        common: `backbone`, `label_dropout`, `gradient_of`, `optimizer`, `scheduler`, `weight_decay_rule` and `seed` of
            every generator.

    Raises:
        ValueError: an order that is no permutation of the positions, steps that fall, blocks that do not divide the
            grid, a `perturb_rate` for ids without bits, or stacks without a head of their codes.
    """

    coordinate_name = "position"
    fixed_order: Tensor | None

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        order: Literal["raster", "blocks", "random", "random_annealed"] | tuple[int, ...] = "raster",
        block_size: int = 1,
        stacked_codes: bool = False,
        soft_labels: float | None = None,
        perturb_rate: float = 0.0,
        anneal_steps: tuple[int, int] = (125_000, 187_500),
        sampler: Sampler | None = None,
        **common: Any,
    ) -> None:
        vocab_size, grid = tokenizer.vocab_size, tokenizer.token_shape(image_size)
        codes = 1
        if stacked_codes:
            *places, codes = grid
            vocab_size, grid = _stack_size(vocab_size, codes, places), tuple(places)
        layout = SequenceLayout(
            vocab_size,
            grid,
            num_classes=num_classes,
            attention="causal",
            any_order=order != "raster",
            block_size=block_size,
        )
        if block_size < 1 or layout.length % block_size:
            raise ValueError(
                f"block_size={block_size} must divide the {layout.length} tokens of an image, a grid of {layout.grid}"
            )
        if not 0 <= perturb_rate <= 1:
            raise ValueError(f"perturb_rate must lie in [0, 1], got {perturb_rate}")
        if stacked_codes and perturb_rate:
            raise ValueError(f"perturb_rate={perturb_rate} flips bits of single ids: stacked_codes must be false")
        if soft_labels is not None and not (stacked_codes and soft_labels > 0):
            raise ValueError(f"soft_labels={soft_labels} must be above 0, and needs stacked_codes=true")
        if isinstance(order, str):
            if order not in ("raster", "blocks", "random", "random_annealed"):
                raise ValueError(
                    f"order must be 'raster', 'blocks', 'random', 'random_annealed' or a permutation of positions, got "
                    f"{order!r}"
                )
            if order == "blocks":
                order = block_order(layout.grid, block_size)
        else:
            check_permutation(order, layout.length)
        if not 0 <= anneal_steps[0] <= anneal_steps[1]:
            raise ValueError(f"anneal_steps must not fall and be >= 0, got {anneal_steps}")
        super().__init__(
            tokenizer,
            image_size,
            num_classes=num_classes,
            layout=layout,
            sampler=sampler or RasterSampler(),
            **common,
        )
        self.stack = None
        if stacked_codes:
            self.stack = SubTokens((self.vocab_size,) * codes, layout.vocab_size)
            self._check_stack(codes)
        self.soft_labels = soft_labels
        self.read_tokenizer()
        self.random, self.annealed = order in ("random", "random_annealed"), order == "random_annealed"
        self.anneal_steps = anneal_steps
        self.block_size = block_size
        self.perturb_rate = perturb_rate
        self.bits = bits_of_vocabulary(self.vocab_size, f"perturb_rate={perturb_rate}") if perturb_rate else 0
        fixed = None if isinstance(order, str) else torch.tensor(order)
        self.register_buffer("fixed_order", fixed, persistent=False)

    def _check_stack(self, codes: int) -> None:
        head = self.backbone.place_head
        if not isinstance(head, FactorisedHead) or head.sub_tokens.sizes != (self.vocab_size,) * codes:
            found = "none" if head is None else f"{type(head).__name__} of {list(head.sub_tokens.sizes)}"
            raise ValueError(
                f"stacked_codes=true needs a backbone whose place_head is a FactorisedHead of the {codes} codes of a "
                f"position, sizes={[self.vocab_size] * codes}; got {found}"
            )

    def read_tokenizer(self) -> None:
        """Copy the tokenizer's code vectors into a backbone that embeds ids by them."""
        embedding, tables = getattr(self.backbone, "token_embedding", None), self.tokenizer.code_tables()
        if isinstance(embedding, CodeProjection) and tables is not None:
            embedding.read_codes(tables)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        embedding = getattr(self.backbone, "token_embedding", None)
        if isinstance(embedding, CodeProjection) and bool(embedding.vectors.isnan().any()):
            raise ValueError(
                "token_embedding='codes' reads the code vectors of the tokenizer, and a "
                f"{type(self.tokenizer).__name__} has none: give the tokenizer that the tokens are of"
            )

    def to_sequence(self, tokens: Tensor) -> Tensor:
        """Lay out token grids `(B, *token_shape)` as sequences `(B, N)` in the fixed order, or else in raster order."""
        if self.stack is not None:
            tokens = self.stack.join(tokens).masked_fill((tokens < 0).any(dim=-1), -1)
        raster = tokens.flatten(1)
        return raster if self.fixed_order is None else raster[:, self.fixed_order]

    def to_grid(self, sequences: Tensor) -> Tensor:
        raster = sequences if self.fixed_order is None else sequences[:, self.fixed_order.argsort()]
        return super().to_grid(raster if self.stack is None else self.stack.split(raster))

    def data_of(self, batch: dict[str, Any], random: CounterRandom) -> Any:
        if self.soft_labels is None or not self.training:
            return super().data_of(batch, random)
        if not isinstance(self.tokenizer, RQVAE) or "image" not in batch:
            raise ValueError(
                f"soft_labels={self.soft_labels} draws the codes of images by an RQVAE in every step, got a "
                f"{type(self.tokenizer).__name__} and a batch of {', '.join(map(str, batch))}: give both, or train "
                "without soft_labels on tokens"
            )
        codes, laws = self.tokenizer.soft_encode(batch["image"], temperature=self.soft_labels, random=random)
        return SoftCodes(codes, laws)

    def losses_of(self, data: Any, condition: Condition | Tensor, random: CounterRandom) -> TokenLosses:
        if not isinstance(data, SoftCodes):
            return super().losses_of(data, condition, random)
        return self.token_losses(self.to_sequence(data.codes), condition, random, data.laws)

    def token_losses(
        self, tokens: Tensor, condition: Condition | Tensor, random: CounterRandom, laws: Tensor | None = None
    ) -> TokenLosses:
        """Cost the prediction of each token, or of the laws `(B, *token_shape, K)` of stacked codes."""
        orders = self._fixed_orders(len(tokens))
        if laws is not None:
            laws = laws.flatten(1, -3)  # (B, N, D, K)
            laws = laws if self.fixed_order is None else laws[:, self.fixed_order]
        if self.random and self.training:
            orders = self._training_orders(random)
            tokens = tokens.gather(1, orders)
            laws = None if laws is None else laws[torch.arange(len(laws), device=laws.device)[:, None], orders]
        read = self._perturbed(tokens, random)[:, : -self.block_size]
        outputs = self.backbone(read, condition, order=orders)  # (B, N, K), or (B, N, D) for a place_head
        head = self.backbone.place_head
        if head is None:
            values = cross_entropies(outputs, tokens)
            weights = torch.ones_like(values)
        elif laws is None:
            values, weights = head.losses(outputs, tokens, random)
        else:
            values = cast(FactorisedHead, head).soft_losses(outputs, tokens, laws)
            weights = torch.ones_like(values)
        if self.stack is not None:  # the mean is that of a code
            values, weights = values / len(self.stack), weights * len(self.stack)
        position = (torch.arange(self.length, device=tokens.device, dtype=torch.float32) + 0.5) / self.length
        return TokenLosses(values, weights, position.expand_as(values))

    @torch.no_grad()
    @in_evaluation
    def log_likelihood(
        self,
        tokens: Tensor,
        condition: Condition | Tensor,
        *,
        indices: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Likelihood:
        """Give log p(tokens | condition) in nats, exact, in this generator's order or along another.

        The sub-tokens or bits of an id come in turn, the least significant first. Of bits that are drawn by flow
        matching it is a bound, see `BinaryFlowHead.log_likelihood`.

        Args:
            tokens: `(B, *token_shape)` int64 in [0, K).
            condition: labels `(B,)` int64 in [0, num_classes], or all that the generator is given.
            indices: of the random numbers of a bound; see `Generator`.
            order: `(N,)` int64, a permutation of the positions; raster order for a generator of random orders by
                default.

        Raises:
            ValueError: an order given to a generator of the raster order alone, or one that is no permutation.
        """
        if order is None:
            sequences, orders = self.to_sequence(tokens), self._fixed_orders(len(tokens))
        else:
            if not self.backbone.layout.any_order:
                raise ValueError(
                    "this generator knows the raster order alone: train it with order='random' or 'random_annealed'"
                )
            check_permutation(order.tolist(), self.length)
            sequences, orders = tokens.flatten(1)[:, order], order.expand(len(tokens), -1)
        outputs = self.backbone(sequences[:, : -self.block_size], condition, order=orders)
        # A visible start sees what it predicts: its rows are those of what was known.
        for row in range(min(self.backbone.visible_start, self.length) - 1):
            outputs[:, row] = self.backbone(sequences[:, :row], condition, order=orders)[:, -1]
        head = self.backbone.place_head
        if head is None:
            return Likelihood(-cross_entropies(outputs, sequences).double().sum(dim=1), "exact")
        random = streams_of(tokens, seed=self.seed, indices=indices)
        nats = head.log_likelihood(outputs, sequences, random)
        return Likelihood(nats.double().sum(dim=1), head.likelihood_kind)

    def draw(
        self,
        condition: Condition | Tensor,
        random: CounterRandom,
        sampler: Sampler | None = None,
        *,
        known: Tensor | None = None,
        trace: bool = False,
    ) -> SamplerOutput:
        if self.stack is not None and known is not None:
            unknown = known < 0
            if bool((unknown.any(dim=-1) != unknown.all(dim=-1)).any()):
                raise ValueError("known must give all codes of a position, the last axis of the tokens, or none (-1)")
        return super().draw(condition, random, sampler, known=known, trace=trace)

    def sampled_backbone(self) -> Backbone:
        return self.backbone if self.fixed_order is None else OrderedBackbone(self.backbone, self.fixed_order)

    def random_order_probability(self) -> float:
        """Return the probability of a random order at this step of training: 1, then a line, then 0 (RAR); or always 1
        (RandAR)."""
        start, end = self.anneal_steps
        if self.global_step < start or not self.annealed:
            return 1.0
        return 0.0 if self.global_step >= end else 1 - (self.global_step - start) / (end - start)

    def _perturbed(self, tokens: Tensor, random: CounterRandom) -> Tensor:
        """Flip bits of the input of training `(B, N)`, each where u < perturb_rate v for uniform u and v."""
        if not (self.training and self.perturb_rate):
            return tokens
        numbers = random.uniform(Purpose.EXPOSURE, 2 * tokens.shape[1] * self.bits)
        u, v = numbers.view(len(tokens), 2, tokens.shape[1], self.bits).unbind(dim=1)
        flipped = (u < self.perturb_rate * v).long() << torch.arange(self.bits, device=tokens.device)
        return tokens ^ flipped.sum(dim=-1)

    def _training_orders(self, random: CounterRandom) -> Tensor:
        """Draw each sample's order o `(B, N)`: a function of the sample and the step alone."""
        uniforms = random.uniform(Purpose.ORDER, self.length + 1)
        raster = torch.arange(self.length, device=uniforms.device)
        return torch.where(uniforms[:, :1] < self.random_order_probability(), uniforms[:, 1:].argsort(dim=1), raster)

    def _fixed_orders(self, batch: int) -> Tensor | None:
        """Return the fixed order, `(B, N)`; None for raster order."""
        return None if self.fixed_order is None else self.fixed_order.expand(batch, -1)


@dataclass(frozen=True)
class SoftCodes:
    """Codes that were drawn, `(B, *grid, D)` int64, and the laws that they were drawn from, `(B, *grid, D, K)`."""

    codes: Tensor
    laws: Tensor

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def device(self) -> torch.device:
        """The device of both."""
        return self.codes.device


def _stack_size(vocab_size: int, codes: int, places: Sequence[int]) -> int:
    """Count the stacks of `codes` codes.

    Raises:
        ValueError: tokens without a grid before their last axis, or more stacks than int64 has numbers.
    """
    if not places:
        raise ValueError("stacked_codes=true needs tokens with the codes of a position as last axis, as RQVAE's are")
    if vocab_size**codes >= 2**63:
        raise ValueError(
            f"stacked_codes=true numbers the stacks of codes by int64: {codes} codes of {vocab_size} are too many, "
            f"{vocab_size}^{codes} must be below 2^63"
        )
    return vocab_size**codes


def block_order(grid: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    """List the positions of a grid by squares of `block_size`, in raster order as the positions within each are.

    Raises:
        ValueError: no grid of two axes, no square number, or squares that do not divide the grid.
    """
    side = isqrt(block_size)
    if len(grid) != 2 or side**2 != block_size or grid[0] % side or grid[1] % side:
        raise ValueError(
            f"order='blocks' needs a block_size that is a square whose side divides both sides of a grid, got "
            f"block_size={block_size} for a grid of {grid}"
        )
    positions = torch.arange(grid[0] * grid[1]).view(grid)
    return tuple(rearrange(positions, "(h p) (w q) -> (h w p q)", p=side, q=side).tolist())


class OrderedBackbone(Backbone):
    """Fixes the order of an any-order backbone, so that a sampler needs to know of none.

    Args:
        backbone: of an any-order layout; shared, not copied.
        order: `(N,)` int64, the position in the grid of each token in turn.
    """

    def __init__(self, backbone: Backbone, order: Tensor) -> None:
        super().__init__(replace(backbone.layout, any_order=False))
        self.backbone = backbone
        self.place_head = backbone.place_head
        self.visible_start = backbone.visible_start
        self.grid_vocab, self.context_dim = backbone.grid_vocab, backbone.context_dim
        self.order = order

    def forward(
        self,
        tokens: Tensor,
        condition: Condition | Tensor,
        cache: Cache | None = None,
        order: Tensor | None = None,
        time: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> Tensor:
        assert order is None and predicted is None, "the order is fixed"
        return self.backbone(tokens, condition, cache, self.order.expand(len(tokens), -1), time)

    def fsdp_units(self) -> Iterable[nn.Module]:
        return self.backbone.fsdp_units()

    def new_cache(self, condition: Condition | Tensor) -> Cache:
        return self.backbone.new_cache(condition)

    def flops(self, batch: int, tokens: int, filled: int | None = None, context: int = 0, ahead: int = 0) -> int:
        return self.backbone.flops(batch, tokens, filled, context, ahead)

    def cache_flops(self, batch: int, context: int = 0) -> int:
        return self.backbone.cache_flops(batch, context)
