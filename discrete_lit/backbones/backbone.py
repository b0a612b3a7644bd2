"""The contract between a generator and its network, and what can be done with any such network.

A generator describes its sequence (`SequenceLayout`) and is given a `Backbone`, which makes logits of token ids. A
vocabulary too large for one softmax is predicted by a head of its own (`IdHead`), in sub-tokens (`SubTokens`,
`SubTokenHead`) or otherwise. The rest of the file is for all backbones: their floating-point operations are counted,
their blocks compiled, their weights packed for a CPU.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from math import prod
from typing import Any, Literal, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# Counting needs two names that torch marks as its own: tensors without data that keep their device (those of
# `torch.device("meta")` lose it, and know no autocast), and a mode that sees every operation.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from discrete_lit.backbones.cache import Cache
from discrete_lit.backbones.condition import Condition, plain
from discrete_lit.backbones.cpu_kernels import PackedLinear, enabled, packing_pays
from discrete_lit.backbones.layers import Linear
from discrete_lit.core.modules import widened
from discrete_lit.core.random import CounterRandom

_Module = TypeVar("_Module", bound=nn.Module)


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
        input_dim: width of the vectors that stand for ids in the input; None where the ids themselves do.
        any_order: whether a causal sequence may come in an order of its own.
        timed: whether the backbone is told how noisy its input is.
        mask_output: whether it has a logit of the mask id too, as the last; ratios of probabilities have one.
        block_size: p, positions of a causal sequence that are predicted together, from the blocks before theirs.
    """

    vocab_size: int
    grid: tuple[int, ...]
    _: KW_ONLY
    num_classes: int
    attention: Literal["bidirectional", "causal", "block_causal"]
    mask_token: bool = False
    sub_tokens: int = 1
    scales: tuple[int, ...] = ()
    input_dim: int | None = None
    any_order: bool = False
    timed: bool = False
    mask_output: bool = False
    block_size: int = 1

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


# --- Floating-point operations ---

# What `Backbone` has measured, by module and shape; it goes with the module, and into no copy or checkpoint of it.
_counted: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], int]] = WeakKeyDictionary()


def count_flops(module: _Module, prepare: Callable[[_Module], Callable[[], object]], *, gradients: bool = False) -> int:
    """Count the floating-point operations of a computation by torch's `FlopCounterMode`, on tensors without data.

    Two for each multiplication and addition of matrix products, convolutions and attention, which is counted in full,
    also where a mask hides half of it; elementwise work is left out. Where the data decides how many elements there
    are, all of them count. Nothing is computed, no random number is drawn, and the module stays as it is.

    Args:
        module: any.
        prepare: called with an `outline` of the module, in its mode; makes the inputs, and gives back what is to be
            counted. Tensors that it makes have no data either.
        gradients: record gradients, so that a backward pass can be made.
    """
    # Of attention, the counter knows the products that stand for it on every device, but not every fused kernel.
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(gradients):
        copy = outline(module)
        run = prepare(copy if gradients else copy.requires_grad_(False))
        counter = FlopCounterMode(display=False)
        # Its tracker of modules hooks into autograd, where a loss that takes gradients of its own does not bear it.
        counter.mod_tracker = _NoModules()  # type: ignore[assignment]
        with counter, _EveryElement():
            run()
    return counter.get_total_flops()


class _NoModules:
    """Stands for the counter's tracker of modules: everything counts for the whole."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class _EveryElement(TorchDispatchMode):
    """Lets `nonzero` find every element of a tensor without data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_zeros((args[0].numel(), args[0].ndim), dtype=torch.int64)
        return func(*args, **(kwargs or {}))


def outline(module: _Module, *, device: str | None = None) -> _Module:
    """Copy a module with parameters and buffers that are made anew: without data in a `FakeTensorMode`.

    Hooks, compiled code and wrapped methods are left out; containers of other attributes are copied, everything else
    is shared.

    Args:
        module: any.
        device: of the copy; that of the module by default.
    """
    return _outline(module, device, {})


def _outline(module: Any, device: str | None, known: dict[int, Any]) -> Any:
    if id(module) in known:
        return known[id(module)]
    # Sharded modules (FSDP2) have a class that cannot be copied.
    copy = known[id(module)] = object.__new__(type(module))
    vars(copy).update(vars(module) | vars(nn.Module()), training=module.training)
    for name in vars(module):
        # Compiled code, and methods that were wrapped, belong to the module itself.
        if name == "_compiled_call_impl" or callable(getattr(type(module), name, None)):
            del vars(copy)[name]
    for name, value in vars(module).items():
        # What the copy remembers must not be found in the module.
        if isinstance(value, (dict, list, set)) and vars(copy).get(name) is value:
            setattr(copy, name, value.copy())

    def tensor(value: Tensor | None) -> Any:
        if value is None:
            return None
        if id(value) not in known:
            empty = torch.empty(value.shape, dtype=value.dtype, device=device or value.device)
            parameter = isinstance(value, nn.Parameter)
            known[id(value)] = nn.Parameter(empty, value.requires_grad) if parameter else empty
        return known[id(value)]

    for name, parameter in module._parameters.items():
        copy.register_parameter(name, tensor(parameter))
    for name, buffer in module._buffers.items():
        copy.register_buffer(name, tensor(buffer))
    for name, child in module._modules.items():
        copy.add_module(name, None if child is None else _outline(child, device, known))
    return copy


# --- Compiled blocks ---


class InBlocks(Protocol):
    """A network that is made of blocks: a `Backbone`, or a network of whole latents."""

    def fsdp_units(self) -> Iterable[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def compile_blocks(backbone: InBlocks, **options: Any) -> None:
    """Compile each block of a backbone on its own, so that checkpoints do not change.

    The blocks are alike, so the compiler works through one of them, not through all; what it makes serves the others.

    Args:
        backbone: changed in place; its parameters and their names stay.
        options: of `torch.compile`.
    """
    # As `nn.Module.compile` does, but with one compiled function for all blocks, and for their packed copies.
    compiled = torch.compile(nn.Module._call_impl, **options)
    for block in backbone.fsdp_units():
        block._compiled_call_impl = partial(compiled, block)


def compile_for_sampling(backbone: InBlocks) -> None:
    """Compile the blocks with the least work between two of them, for passes over few rows.

    Args:
        backbone: changed in place, on the device that it samples on.
    """
    on_cpu = next(backbone.parameters()).device.type == "cpu"
    compile_blocks(backbone, options={"cpp_wrapper": on_cpu})


# --- Packed weights ---


def packed(module: _Module, *, rows: int) -> _Module:
    """Give a module like this one whose `Linear` layers multiply by weights laid out for the processor.

    The weights are packed in the precision that products have now, under autocast or not, in which the module is then
    to be called. Everything else is shared with the module, on which nothing changes: parameters, buffers, hooks,
    compiled blocks, the count of operations. The copies take as much memory as the weights. The module itself comes
    back where packing does not pay: on other devices, for sharded weights, in float32 for very few rows, while
    gradients are recorded (the packed product has none), and where `cpu_kernels.enabled` says so.

    Args:
        module: a backbone, or any other; its weights must not change while the packed one is used.
        rows: of the inputs to most products.
    """
    if torch.is_grad_enabled():
        return module

    def pack(layer: nn.Linear) -> nn.Module | None:
        if not isinstance(layer, Linear) or not enabled(layer.weight.device):
            return None
        pays = packing_pays(layer.weight, layer.product_dtype, rows=rows)
        return PackedLinear(layer, layer.product_dtype, rows=rows) if pays else None

    return _with_layers(cast_once(module), pack, {})


def cast_once(module: _Module) -> _Module:
    """Give a module like this one whose linear layers do not cast their weights at each pass under autocast.

    The weights and biases are cast here, to the precision that products have now, in which the module is then to be
    called: its outputs are autocast's, bit for bit. Everything else is shared with the module, as by `packed`, and what
    multiplies in full precision whatever autocast says. The module itself comes back without autocast, on a CPU (whose
    way is `packed`), for sharded weights, and while gradients are recorded.

    Args:
        module: a backbone, or any other; its weights must not change while the other is used.
    """
    if torch.is_grad_enabled() or not isinstance(module, nn.Module):  # a function that stands for a network has none
        return module

    def cast(layer: nn.Linear) -> nn.Module | None:
        device = layer.weight.device.type
        if type(layer) not in (nn.Linear, Linear) or not getattr(layer, "autocast", True):
            return None
        if not casting_pays(layer.weight.device) or not torch.is_autocast_enabled(device):
            return None
        dtype = torch.get_autocast_dtype(device)
        # Autocast leaves float64 alone, and a sharded weight is no plain parameter.
        if type(layer.weight) is not nn.Parameter or layer.weight.dtype in (dtype, torch.float64):
            return None
        return CastLinear(layer, dtype)

    return _with_layers(module, cast, {})


def casting_pays(device: torch.device) -> bool:
    """Say whether `cast_once` casts the weights of a device."""
    return device.type != "cpu" and torch.amp.is_autocast_available(device.type)


class CastLinear(nn.Linear):
    """A linear layer that multiplies by a copy of another one's weight in the precision of autocast.

    It shares parameters, hooks and attributes with the other layer, whose weight must not change meanwhile.

    Args:
        layer: the other one; it stays as it is.
        dtype: precision of the product.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(layer))
        self.cast_weight = layer.weight.detach().to(dtype)
        self.cast_bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(self, input: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        return nn.functional.linear(input.to(self.cast_weight.dtype), self.cast_weight, self.cast_bias)


def _with_layers(module: Any, replace: Callable[[nn.Linear], nn.Module | None], known: dict[int, Any]) -> Any:
    """Give a module like this one, with other linear layers where `replace` makes one; all else is shared."""
    if id(module) in known:
        return known[id(module)]
    known[id(module)] = module
    compiled = vars(module).get("_compiled_call_impl")
    if isinstance(module, nn.Linear):
        known[id(module)] = replace(module) or module
    # Code that `compile_blocks` has not made belongs to the module itself.
    elif compiled is None or isinstance(compiled, partial):
        children = {
            name: None if child is None else _with_layers(child, replace, known)
            for name, child in module._modules.items()
        }
        if any(child is not module._modules[name] for name, child in children.items()):
            copy = known[id(module)] = object.__new__(type(module))
            vars(copy).update(vars(module), _modules=children)
            if compiled is not None:
                copy._compiled_call_impl = partial(compiled.func, copy)
            if isinstance(module, Backbone):
                vars(copy).update(flops=module.flops, cache_flops=module.cache_flops, head_flops=module.head_flops)
    return known[id(module)]
