"""The contract between a generator and its network.

A generator describes its sequence (`SequenceLayout`) and is given a `Backbone`, which makes logits of token ids. A
vocabulary too large for one softmax is predicted by a head of its own (`IdHead`), in sub-tokens (`SubTokens`,
`SubTokenHead`) or otherwise. How a network is counted, compiled and packed stands in `execution.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from math import prod
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from discrete_lit.backbones.cache import Cache
from discrete_lit.backbones.condition import Condition, plain
from discrete_lit.backbones.execution import count_flops
from discrete_lit.core.modules import widened
from discrete_lit.core.random import CounterRandom

# What `Backbone` has measured, by module and shape; it goes with the module, and into no copy or checkpoint of it.
_counted: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], int]] = WeakKeyDictionary()


@dataclass(frozen=True)
class SequenceLayout:
    """The sequence that a generator models; it asks for a backbone by calling `backbone(layout)`.

    Attributes:
        vocab_size: K, the ids that the backbone predicts.
        grid: shape of the token grid; the sequence is its raster order unless an order says otherwise.
        num_classes: labels lie in [0, num_classes); the null label is `num_classes`.
        attention: which positions see which: all, those before, or those of the scales before and of the same scale.
        mask_token: whether the mask id K may stand in the input.
        sub_tokens: ids at each position, which stand one after another in the sequence, as the bit groups of a code do.
        scales: positions of each scale in turn, of `"block_causal"` attention; the first has one.
        scale_sizes: height and width of each scale, where the generator tells them.
        input_dim: width of the vectors that stand for ids in the input; None where the ids themselves do.
        any_order: whether a causal sequence may come in an order of its own.
        timed: whether the backbone is told how noisy its input is.
        mask_output: whether it has a logit of the mask id too, as the last; ratios of probabilities have one.
        block_size: p, positions of a causal sequence that are predicted together, from the blocks before theirs.
        delays: of a causal sequence of several ids at each position, which are predicted together: how many positions
            each of them stands behind the frame that it belongs to (`DelayPattern`); the mask id stands where none is.
    """

    vocab_size: int
    grid: tuple[int, ...]
    _: KW_ONLY
    num_classes: int
    attention: Literal["bidirectional", "causal", "block_causal"]
    mask_token: bool = False
    sub_tokens: int = 1
    scales: tuple[int, ...] = ()
    scale_sizes: tuple[tuple[int, int], ...] = ()
    input_dim: int | None = None
    any_order: bool = False
    timed: bool = False
    mask_output: bool = False
    block_size: int = 1
    delays: tuple[int, ...] = ()

    @property
    def positions(self) -> int:
        """Positions of the grid."""
        return prod(self.grid)

    @property
    def length(self) -> int:
        """N, ids in a sequence."""
        return self.positions * self.sub_tokens

    @property
    def mask_id(self) -> int:
        """The id of the mask token: K."""
        return self.vocab_size

    @property
    def outputs(self) -> int:
        """Logits of each id: K, or K + 1 with that of the mask id."""
        return self.vocab_size + int(self.mask_output)

    @property
    def null_label(self) -> int:
        """The label that stands for no class."""
        return self.num_classes


class Backbone(nn.Module, ABC):
    """A network from token ids and what they are given, a label and where it reads them more, to logits.

    Args:
        layout: the sequence.

    Attributes:
        place_head: the `IdHead` of a causal backbone that predicts ids otherwise than by logits of them all: it reads
            the hidden states that `forward` then gives in the place of logits. None for others.
        visible_start: elements at the beginning of a causal sequence that see each other both ways; 0 where each sees
            those before it alone.
        grid_vocab: ids that its condition has for each position beside the label; None where it reads no grid. The id
            `grid_vocab` stands for none.
        context_dim: E, width of the vectors that it attends to; None where it attends to none.
    """

    place_head: "IdHead | None"
    visible_start: int
    grid_vocab: int | None
    context_dim: int | None

    def __init__(self, layout: SequenceLayout) -> None:
        super().__init__()
        self.layout = layout
        self.place_head = None
        self.visible_start = 0
        self.grid_vocab = self.context_dim = None

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        condition: Condition | Tensor,
        cache: Cache | None = None,
        order: Tensor | None = None,
        time: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> Tensor:
        """Make logits for the tokens.

        Bidirectional: `tokens (B, N)` to `(B, N, K)`, the prediction of each id.
        Causal: a prefix `tokens (B, n)`, 0 <= n < N, to `(B, n + 1, K)`; row i predicts token i from the tokens before
        it. With a cache, `tokens` are those that follow what the cache holds, and one row is returned for each; the
        first call on an empty cache also returns row 0, so it may be given no token at all. In blocks of p: whole
        blocks, `(B, n + p, K)`, and with a cache one block at a time behind the first call.
        Block-causal: the same with whole scales: row i predicts position i from the input at that position, which is
        made of the scales before; the first scale has no input of its own.

        Args:
            tokens: int64 ids, the mask id K only where the layout allows it; `(B, n, input_dim)` vectors where the
                layout has them.
            condition: labels `(B,)` int64 in [0, num_classes], the null label included, or these with a grid
                `(B, positions)` in raster order and vectors, where the backbone reads them; what the cache knows of it
                is taken from there.
            cache: of `new_cache`; filled as a causal sequence grows.
            order: `(B, N)` int64, of an any-order layout: the position in the grid of each token in turn; raster order
                by default.
            time: `(B,)` float, of a timed layout: how noisy the input is, in the units that the generator chose.
            predicted: `(M,)` int64, of a bidirectional layout: the ids whose logits are asked for, numbered through all
                sequences from 0 to B N - 1.

        Returns:
            float32 or float64 logits over the K ids, the mask id not among them unless the layout has its output; of a
            `place_head` what it reads, `(B, rows, D)`. Where some are `predicted`, those `(M, K)`.

        Raises:
            ValueError: more tokens than the layout has, an incomplete scale or block, or a condition with other parts
                than the backbone reads.
        """

    @abstractmethod
    def fsdp_units(self) -> Iterable[nn.Module]:
        """Give the modules that FSDP gathers one after another: the blocks. They are also compiled one by one."""

    @abstractmethod
    def new_cache(self, condition: Condition | Tensor) -> Cache:
        """Compute what can be computed once for labels `(B,)` or all that B sequences are given, and make room for the
        keys and values of their N tokens."""

    def flops(self, batch: int, tokens: int, filled: int | None = None, context: int = 0, ahead: int = 0) -> int:
        """Count the floating-point operations of a forward pass by `count_flops`, once for each shape.

        A causal pass must cost an amount that is linear in what its cache holds: two such passes are measured, the
        others lie on the line through them.

        Args:
            batch: sequences B.
            tokens: input ids, or vectors, of each.
            filled: elements that the cache holds before the pass; None for a pass without a cache.
            context: vectors that each sequence is given to attend to.
            ahead: positions beyond the next one that are asked for, see `Cache.ahead`.
        """
        counted = _counted.setdefault(self, {})
        key = batch, tokens, context, ahead, filled
        if key not in counted:
            line: list[tuple[Any, ...]] = []
            if filled and self.layout.attention == "causal":
                line = [other for other in counted if other[:4] == key[:4] and other[4]]
            if filled and len(line) >= 2:
                (*_, first), (*_, second) = line[:2]
                slope = (counted[line[1]] - counted[line[0]]) // (second - first)
                counted[key] = counted[line[0]] + (filled - first) * slope
            else:
                counted[key] = count_flops(
                    self, lambda network: network.eval()._pass(batch, tokens, filled, context, ahead)
                )
        return counted[key]

    def cache_flops(self, batch: int, context: int = 0) -> int:
        """Count the floating-point operations of `new_cache` for B sequences, as `flops` does."""
        counted = _counted.setdefault(self, {})
        key = batch, context
        if key not in counted:
            counted[key] = count_flops(self, lambda network: partial(network.new_cache, network._given(*key)))
        return counted[key]

    def head_flops(self, batch: int, known: int) -> int:
        """Count the operations of one pass of the `place_head` at one position, or block of positions, of B sequences.

        Args:
            batch: sequences B.
            known: sub-tokens of the id that a `SubTokenHead` is given; 0 for other heads.
        """
        assert self.place_head is not None
        counted = _counted.setdefault(self.place_head, {})
        if (batch, known) not in counted:

            def prepare(head: IdHead) -> Callable[[], object]:
                device, dtype = (weight := next(head.parameters())).device, weight.dtype
                hidden = torch.zeros(batch, self.layout.block_size, head.width, device=device, dtype=dtype)
                return head.one_pass(hidden, known)

            counted[batch, known] = count_flops(self.place_head, prepare)
        return counted[batch, known]

    def _given(self, batch: int, context: int) -> Condition | Tensor:
        """A condition with the parts that the backbone reads, all zeros, of so many vectors to attend to."""
        weight = next(self.parameters())
        labels = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        grid = None if self.grid_vocab is None else labels[:, None].expand(-1, self.layout.positions)
        vectors = mask = None
        if self.context_dim is not None:
            vectors = torch.zeros(batch, context, self.context_dim, device=weight.device, dtype=weight.dtype)
            mask = torch.ones(batch, context, dtype=torch.bool, device=weight.device)
        return plain(Condition(labels=labels, grid=grid, context=vectors, context_mask=mask))

    def _pass(self, batch: int, tokens: int, filled: int | None, context: int, ahead: int) -> Callable[[], Tensor]:
        """A forward pass of these shapes, not yet made."""
        given, vectors = self._given(batch, context), self.layout.input_dim
        device = next(self.parameters()).device
        inputs = torch.zeros(batch, 1, dtype=torch.int64, device=device).expand(batch, tokens)
        if vectors is not None:
            inputs = torch.zeros(batch, tokens, vectors, device=device)
        time = torch.zeros(batch, device=device) if self.layout.timed else None
        cache = None
        if filled is not None:
            cache = self.new_cache(given)
            cache.advance(filled)
            cache.ahead = ahead
        return partial(self, inputs, given, cache, None, time)


class IdHead(nn.Module, ABC):
    """A head that predicts ids from hidden states, where there are too many ids (2^18, say) for a softmax over all.

    The transformer makes it by calling `place_head(settings of its blocks, K)`, and gives hidden states instead of
    logits. Heads that predict an id in sub-tokens are `SubTokenHead`s; `BinaryFlowHead` draws all bits of an id at
    once.

    Args:
        sizes: of the P sub-tokens of an id, least significant first; their product is K.
        vocab_size: K.
        width: D, of the hidden states.

    Attributes:
        reads_norm: whether the transformer ends with its norm; else the head has one of its own.
        initialised: whether its weights stay as it made them; else the transformer initialises them as its own.
        block_size: p, positions that it predicts together, as the generator's.
        likelihood_kind: of `log_likelihood`.

    Raises:
        ValueError: sub-tokens that do not make up the vocabulary.
    """

    reads_norm = False
    initialised = False
    likelihood_kind: Literal["exact", "bound"] = "exact"

    def __init__(self, sizes: Sequence[int], vocab_size: int, *, width: int) -> None:
        super().__init__()
        self.width = width
        self.sub_tokens = SubTokens(sizes, vocab_size)
        self.block_size = 1

    def read_input(self, embedding: nn.Module) -> None:
        """See the embedding of the transformer's input, whose tables a head may share."""

    @abstractmethod
    def losses(self, hidden: Tensor, ids: Tensor, random: CounterRandom) -> tuple[Tensor, Tensor]:
        """Compute what training minimises in training mode, and in eval mode -log p of each id, or an estimate of its
        bound.

        Args:
            hidden: `(B, n, D)`.
            ids: `(B, n)` int64 in [0, K).
            random: one stream for each of the B sequences.

        Returns:
            Nats of each id (in training what stands for them) and the weights of their mean, both `(B, n)` float32 or
            float64.
        """

    @abstractmethod
    def log_likelihood(self, hidden: Tensor, ids: Tensor, random: CounterRandom | None = None) -> Tensor:
        """Compute log p of each id in nats, or a lower bound of it, as `likelihood_kind` says.

        Args:
            hidden: `(B, n, D)`.
            ids: `(B, n)` int64 in [0, K).
            random: one stream for each sequence, for a bound that is estimated by drawing.

        Returns:
            `(B, n)` float32 or float64.
        """

    @abstractmethod
    def one_pass(self, hidden: Tensor, known: int) -> Callable[[], object]:
        """Prepare one pass as a sampler makes it, to be counted.

        Args:
            hidden: `(B, p, D)`.
            known: sub-tokens that are known.
        """


class SubTokenHead(IdHead):
    """A head that predicts an id as a product: each sub-token given those before it and the hidden state.

    The transformer ends without a norm. Two heads stand in `sub_token_heads.py`.

    Args:
        sizes: of the P sub-tokens of an id, least significant first; their product is K.
        vocab_size: K.
        width: D, of the hidden states.

    Raises:
        ValueError: sub-tokens that do not make up the vocabulary.
    """

    @abstractmethod
    def sub_token_logits(self, hidden: Tensor, known: Tensor) -> Tensor:
        """Make logits of the next sub-token.

        Args:
            hidden: `(B, n, D)`.
            known: `(B, n, p)` int64, the first p < P sub-tokens of each id.

        Returns:
            `(B, n, size of sub-token p)` float32 or float64.
        """

    def one_pass(self, hidden: Tensor, known: int) -> Callable[[], object]:
        return partial(self.sub_token_logits, hidden, hidden.new_zeros(*hidden.shape[:2], known, dtype=torch.int64))

    def log_likelihood(self, hidden: Tensor, ids: Tensor, random: CounterRandom | None = None) -> Tensor:
        """Compute log p of each id in nats, exactly: the sum over sub-tokens in turn; arguments as of `IdHead`."""
        sub_tokens = self.sub_tokens.split(ids)
        total = hidden.new_zeros(ids.shape, dtype=widened(hidden.dtype))
        for number in range(len(self.sub_tokens)):
            logits = self.sub_token_logits(hidden, sub_tokens[..., :number])
            total = total + logits.log_softmax(dim=-1).gather(-1, sub_tokens[..., number, None])[..., 0]
        return total


class SubTokens(nn.Module):
    """Ids in [0, K) as digits of unequal bases, the least significant first.

    With sizes 2^6 and 2^12 the first sub-token of an 18-bit id is its low 6 bits (Luo et al., "Open-MAGVIT2", 2024).

    Args:
        sizes: of the P sub-tokens; their product is K.
        vocab_size: K.

    Raises:
        ValueError: sub-tokens of fewer than two values, or whose product is not K.
    """

    moduli: Tensor
    units: Tensor

    def __init__(self, sizes: Sequence[int], vocab_size: int) -> None:
        super().__init__()
        if not sizes or min(sizes) < 2 or prod(sizes) != vocab_size:
            raise ValueError(
                f"the sub-tokens of an id must have 2 or more values each, and {vocab_size} together, the tokenizer's "
                f"vocabulary; got sizes={list(sizes)}, which multiply to {prod(sizes)}"
            )
        self.sizes = tuple(sizes)
        units = [prod(sizes[:number]) for number in range(len(sizes))]
        self.register_buffer("moduli", torch.tensor(sizes), persistent=False)
        self.register_buffer("units", torch.tensor(units), persistent=False)

    def __len__(self) -> int:
        return len(self.sizes)

    def split(self, ids: Tensor) -> Tensor:
        """Split ids `(...)` int64 in [0, K) into `(..., P)`, sub-token p in [0, size of p)."""
        return ids[..., None] // self.units % self.moduli

    def join(self, sub_tokens: Tensor) -> Tensor:
        """Undo `split`."""
        return (sub_tokens * self.units).sum(dim=-1)


def bits_of_vocabulary(vocab_size: int, what_needs_them: str) -> int:
    """Give b of a vocabulary of 2^b ids.

    Raises:
        ValueError: a vocabulary that is no power of two, or of one id; it names `what_needs_them`.
    """
    bits = vocab_size.bit_length() - 1
    if vocab_size != 2**bits or bits == 0:
        raise ValueError(f"{what_needs_them} needs a vocabulary that is a power of 2, the tokenizer's is {vocab_size}")
    return bits
