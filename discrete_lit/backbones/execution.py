"""Ways to run any network: its operations are counted, its blocks compiled, its weights packed or cast once.

`count_flops` counts without computing anything; `compile_blocks` makes one compiled function for all blocks; `packed`
lays weights out for a CPU, and `cast_once` keeps them in the precision of autocast.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

# Counting needs two names that torch marks as its own: tensors without data that keep their device (those of
# `torch.device("meta")` lose it, and know no autocast), and a mode that sees every operation.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from discrete_lit.backbones.cpu_kernels import PackedLinear, enabled, packing_pays
from discrete_lit.backbones.layers import Linear

_Module = TypeVar("_Module", bound=nn.Module)
# What a backbone counts of itself; a copy with other layers gives its counts.
_COUNTS = ("flops", "cache_flops", "head_flops")


# --- Floating-point operations ---


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

    Hooks, compiled code and wrapped methods are left out; containers of other attributes are copied, with the modules
    in a list, as one keeps a teacher that is not to be saved; everything else is shared.

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
            kept = value.copy()
            if isinstance(kept, list):
                kept = [_outline(each, device, known) if isinstance(each, nn.Module) else each for each in kept]
            setattr(copy, name, kept)

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
            if all(hasattr(module, name) for name in _COUNTS):
                vars(copy).update({name: getattr(module, name) for name in _COUNTS})
    return known[id(module)]
