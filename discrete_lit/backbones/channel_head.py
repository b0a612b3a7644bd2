"""A head that predicts the ids of a place, one for each channel of its latent, in turn (TokenBridge).

Wang et al., "Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation", 2025, section 3.3. A latent
of D channels in B levels each has B^D values; a small causal transformer over the channels needs D softmaxes of B.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones.blocks import Block, BlockSettings, Modulation
from discrete_lit.backbones.cache import Cache, new_buffers
from discrete_lit.backbones.execution import count_flops
from discrete_lit.backbones.layers import Linear, LogitHead, Norm

# CUDA's attention kernels take fewer than 2^16 sequences (pytorch/pytorch#146704).
_MOST_ROWS = 2**16 - 1

Choose = Callable[[Tensor, Tensor], Tensor]
"""From logits `(M, B)` and uniform numbers `(M,)` to an id of each row, `(M,)` int64."""


@dataclass(frozen=True, kw_only=True)
class ChannelLayout:
    """The ids of a place; a generator asks for a head by calling `head(layout)`.

    Attributes:
        channels: D.
        levels: B, ids of each channel.
        condition_width: of z, the hidden state of a place.
    """

    channels: int
    levels: int
    condition_width: int


class ChannelHead(nn.Module):
    """Predict the D ids of a place given its hidden state z, each from those before it in an order of the channels.

    Element j of the sequence is an embedding of the id before it, the first one a projection of z; all are modulated by
    that projection and by a vector of their own, and each has a softmax of its own.

    TokenBridge's code adds the first of these vectors to the first element where it draws, but not where it trains. A
    published model gives its figures so; `shifted_start` does the same.

    Args:
        layout: the ids; a generator gives it.
        width: of the blocks. TokenBridge-L has 1024.
        depth: blocks: 4.
        heads: attention heads: 8.
        order: the channel that each step predicts; as they stand by default.
        mlp_ratio: inner width of the MLPs over the width.
        dropout: of attention weights and residual branches; 0.1 in TokenBridge's training.
        shifted_start: whether drawing, and a likelihood with it, begins otherwise than training does.

    Raises:
        ValueError: a setting out of its range, or an order that is none of these channels.
    """

    fsdp_methods = ("losses", "log_likelihood", "sample")
    _channels: Tensor

    def __init__(
        self,
        layout: ChannelLayout,
        *,
        width: int = 1024,
        depth: int = 4,
        heads: int = 8,
        order: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        shifted_start: bool = False,
    ) -> None:
        super().__init__()
        channels, levels = layout.channels, layout.levels
        if depth < 1 or heads < 1 or width % heads:
            raise ValueError(f"depth must be at least 1 and heads divide width={width}, got {depth} and {heads}")
        order = list(range(channels)) if order is None else list(order)
        if sorted(order) != list(range(channels)):
            raise ValueError(
                f"order must have each of the {channels} channels of the tokenizer's latents once, got {order}: is it "
                "that of another tokenizer?"
            )
        self.layout = layout
        self.width, self.heads = width, heads
        self.order = order
        self.turn = [order.index(channel) for channel in range(channels)]
        self.shifted_start = shifted_start
        self.register_buffer("_channels", torch.tensor(order), persistent=False)
        self._flops: dict[int, int] = {}
        settings = BlockSettings(
            width=width,
            heads=heads,
            head_dim=width // heads,
            mlp_hidden=round(mlp_ratio * width),
            modulation="own",
            qk_norm="layer",
            dropout=dropout,
        )
        self.condition_projection = Linear(layout.condition_width, width)
        self.tables = nn.ModuleList(nn.Embedding(levels, width) for _ in range(channels - 1))
        self.positions = nn.Parameter(torch.empty(channels, width))
        self.steps = nn.Parameter(torch.empty(channels, width))
        self.blocks = nn.ModuleList(Block(settings) for _ in range(depth))
        self.norm = Norm(width, "layer")
        self.final_norm = Norm(width, "layer", affine=False)
        self.final_modulation = Modulation(width, width, vectors=2)
        self.logits = nn.ModuleList(LogitHead(width, levels, bias=True) for _ in range(channels))
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as TokenBridge: Xavier's uniform law, 0.02 for vectors, 1 for embeddings, 0 for modulations."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and "modulation" not in name:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.steps, std=0.02)

    def losses(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Average -log p over the channels of each place: `(M,)` nats, float32 or better.

        Args:
            hidden: z `(M, condition_width)`.
            ids: `(M, D)` int64 in [0, B), in the order of the latents' channels.
        """
        return self._cross_entropies(hidden, ids, drawn=False).mean(dim=1)

    def log_likelihood(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Compute log p of the ids of each place in nats, exactly, of the law that is drawn from: `(M,)`.

        Arguments as for `losses`, from which the law differs with a `shifted_start`.
        """
        return -self._cross_entropies(hidden, ids, drawn=True).sum(dim=1)

    def _cross_entropies(self, hidden: Tensor, ids: Tensor, *, drawn: bool) -> Tensor:  # (M, D)
        nats = []
        for rows, targets in zip(hidden.split(_MOST_ROWS), ids.split(_MOST_ROWS), strict=True):
            logits, targets = self.all_logits(rows, targets, drawn=drawn), targets.index_select(1, self._channels)
            nats.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape))
        return torch.cat(nats)

    def all_logits(self, hidden: Tensor, ids: Tensor, *, drawn: bool = False) -> Tensor:
        """Make the logits of every channel given the ids before it, in the head's order.

        Args:
            hidden: z `(M, condition_width)`.
            ids: `(M, D)` int64 in [0, B), in the order of the latents' channels.
            drawn: whether the sequence begins as where ids are drawn.

        Returns:
            `(M, D, B)` float32 or float64.
        """
        projected = self.condition_projection(hidden)
        condition = projected[:, None] + self.steps
        elements = [condition[:, 0] if drawn and self.shifted_start else projected]
        pairs = zip(self.tables, self.order, strict=False)  # the last channel is read by none
        elements += [table(ids[:, channel]).to(projected.dtype) for table, channel in pairs]
        x = torch.stack(elements, dim=1) + self.positions
        for block in self.blocks:
            x = block(x, condition, None, None, True)
        x = self._last(x, condition)
        return torch.stack([head(x[:, step]) for step, head in enumerate(self.logits)], dim=1)

    def _last(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.final_modulation(condition)
        return self.final_norm(self.norm(x)) * (1 + scale) + shift

    @torch.no_grad()
    def sample(self, hidden: Tensor, uniforms: Tensor, choose: Choose) -> Tensor:
        """Draw the ids of each place, one channel after another, on a cache of keys and values.

        Args:
            hidden: z `(M, condition_width)`.
            uniforms: `(M, D)` float64 in (0, 1), a number for each step.
            choose: draws an id from each row's logits.

        Returns:
            `(M, D)` int64 in [0, B), in the order of the latents' channels.
        """
        pairs = zip(hidden.split(_MOST_ROWS), uniforms.split(_MOST_ROWS), strict=True)
        return torch.cat([self._sample(rows, numbers, choose) for rows, numbers in pairs])

    def _sample(self, hidden: Tensor, uniforms: Tensor, choose: Choose) -> Tensor:
        projected = self.condition_projection(hidden)
        cache = self._new_cache(len(hidden), projected.dtype)
        drawn: list[Tensor] = []
        x = projected + self.steps[0] if self.shifted_start else projected
        for step, head in enumerate(self.logits):
            condition = (projected + self.steps[step])[:, None]
            element = (x + self.positions[step])[:, None]
            for number, block in enumerate(self.blocks):
                element = block(element, condition, None, None, True, cache.layer(number))
            cache.advance(1)
            drawn.append(choose(head(self._last(element, condition)[:, 0]), uniforms[:, step]))
            if step < len(self.tables):
                x = self.tables[step](drawn[-1]).to(projected.dtype)
        return torch.stack([drawn[turn] for turn in self.turn], dim=1)

    def _new_cache(self, rows: int, dtype: torch.dtype) -> Cache:
        buffers = new_buffers(
            layers=len(self.blocks),
            batch=rows,
            heads=self.heads,
            length=self.layout.channels,
            head_dim=self.width // self.heads,
            device=self.positions.device,
            dtype=dtype,
        )
        return Cache([], buffers)

    def flops(self, rows: int) -> int:
        """Count the floating-point operations of drawing the ids of so many places, once for each number."""
        if rows not in self._flops:

            def prepare(head: ChannelHead) -> Callable[[], object]:
                weight = head.condition_projection.weight
                hidden = torch.zeros(rows, head.layout.condition_width, device=weight.device, dtype=weight.dtype)
                uniforms = torch.zeros(rows, head.layout.channels, device=weight.device)
                return partial(head.eval().sample, hidden, uniforms, lambda logits, _: logits.argmax(dim=-1))

            self._flops[rows] = count_flops(self, prepare)
        return self._flops[rows]

    def fsdp_units(self) -> Iterable[nn.Module]:
        """Give the modules that FSDP gathers one after another: the head is small, and gathered at once."""
        return ()
