"""In which precision and in which mode a module computes, and when its running statistics move.

Precision. Sensitive parts (norms, logits, log-probabilities, distances to codes, running means, fixed tables) are
computed in float32 at least: under autocast, and in modules whose weights are in half precision. In a module of float64
nothing is rounded to float32. `at_least_float32` widens a tensor, `FullPrecision` keeps weights and buffers from being
narrowed, and within `full_precision` products of float32 numbers are what they are called.

Mode. Samples, likelihoods and codes are those of evaluation mode, whatever mode the module is in: `in_evaluation`.

Statistics. Those that drive training move once an optimizer step, by all of its micro-batches: `RunningStatistics`.
What no micro-batches can give is an `OfWholeBatch`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_Module = TypeVar("_Module", bound=nn.Module)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def at_least_float32(values: Tensor) -> Tensor:
    """Widen numbers in half precision to float32; float32 and float64 stay as they are."""
    return values.to(widened(values.dtype))


def widened(dtype: torch.dtype) -> torch.dtype:
    """Give the precision that sensitive parts have beside numbers of a dtype: float32, or float64 beside float64."""
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in the precision of the operands: without autocast, and without TF32 or bfloat16 in float32's place.

    A GPU convolves float32 numbers in TF32 unless it is told otherwise, and multiplies matrices so where a user allowed
    it for speed: with 11 bits, of which ids are not sure. These settings are the process's: meanwhile they hold for
    other threads too, and the compiler does not look inside.

    Args:
        device: what is computed on; the settings of others stay.
    """
    with torch.autocast(device.type, enabled=False), ExitStack() as stack:
        for backend, name, exact in _settings_of_float32(device.type):
            allowed = getattr(backend, name)
            if allowed not in (exact, "none"):  # none: the default of products, which are exact
                stack.callback(setattr, backend, name, allowed)
                setattr(backend, name, exact)
        yield


def _settings_of_float32(device: str) -> list[tuple[Any, str, Any]]:
    """List the settings of float32 products and convolutions on a kind of device: of what, its name, and "exactly".

    They have other names since torch 2.9, which are what it looks at; those of before can be read no more where a user
    has set the new, but where he has not they go with them.
    """
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):
        return [(_legacy_products, "precision", "highest"), (backends.cudnn, "allow_tf32", False)]
    if device == "cuda":
        return [(backend, "fp32_precision", "ieee") for backend in (backends.cuda.matmul, backends.cudnn.conv)]
    return [(backends.mkldnn.matmul, "fp32_precision", "ieee")] if device == "cpu" else []


class _LegacyProducts:
    """Holds the setting of torch 2.8 for products of float32 matrices as an attribute."""

    @property
    def precision(self) -> str:
        return torch.get_float32_matmul_precision()

    @precision.setter
    def precision(self, precision: str) -> None:
        torch.set_float32_matmul_precision(precision)


_legacy_products = _LegacyProducts()


class FullPrecision(nn.Module):
    """A module whose weights and buffers stay in float32 where the modules around it are put into half precision.

    It follows them to other devices, and to float64.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(never_narrower(fn), recurse)


class RunningStatistics(FullPrecision):
    """A module with statistics that training moves, once for each optimizer step.

    By itself every batch is a step. Where the gradients of several micro-batches are accumulated, whoever trains sets
    `accumulating` and calls `end_step` behind the last of them: what they all saw together then moves the statistics,
    as one batch of them would.
    """

    accumulating: bool = False
    """Whether a step has several micro-batches, and ends where `end_step` is called."""

    def end_step(self) -> None:
        """Move the statistics by what was seen since the last step; nothing where nothing was."""

    def forget_step(self) -> None:
        """Forget what was seen since the last step, as where the step is not taken."""


class OfWholeBatch:
    """A part of a training step that is no mean over samples: it is computed from all samples of a batch at once.

    So no accumulated micro-batches give it; `discrete_lit.accumulation.check_accumulation` asks.
    """

    def whole_batch_terms(self) -> Iterable[str]:
        """Name, for a message, what is computed of a whole batch; nothing where the settings have no such thing."""
        return ()


def whole_batch_terms(module: nn.Module) -> list[str]:
    """Name what the trained parts of a module compute from all samples of a batch at once, batch norms among it."""
    found: list[str] = []
    for part in module.modules():
        if not part.training:
            continue
        if isinstance(part, OfWholeBatch):
            found += part.whole_batch_terms()
        elif isinstance(part, _BATCH_NORMS):
            found.append("batch norms")
    return list(dict.fromkeys(found))


def accumulate_statistics(module: nn.Module, accumulating: bool) -> None:
    """Set whether the gradients of several micro-batches make a step, in all `RunningStatistics` of a module."""
    for each in module.modules():
        if isinstance(each, RunningStatistics):
            each.accumulating = accumulating


def end_statistics_step(module: nn.Module) -> None:
    """End the step of all `RunningStatistics` of a module."""
    for each in module.modules():
        if isinstance(each, RunningStatistics):
            each.end_step()


def forget_statistics_step(module: nn.Module) -> None:
    """Forget the unfinished step of all `RunningStatistics` of a module."""
    for each in module.modules():
        if isinstance(each, RunningStatistics):
            each.forget_step()


def never_narrower(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make a function that moves a tensor as `move` does, but to float32 where `move` makes it half precision."""

    def moved(values: Tensor) -> Tensor:
        result = move(values)
        if not result.is_floating_point() or result.dtype == widened(result.dtype):
            return result
        # From the numbers themselves: those of the result have lost their digits.
        return at_least_float32(values).to(result.device)

    return moved


@contextmanager
def evaluation_mode(module: object) -> Iterator[None]:
    """Put a module into eval mode, and each of its submodules back into the mode that it had.

    What is no module, as a function that stands for a network, has no mode.
    """
    trained = [each for each in module.modules() if each.training] if isinstance(module, nn.Module) else []
    for each in trained:
        each.training = False
    try:
        yield
    finally:
        for each in trained:
            each.training = True


def in_evaluation(
    method: Callable[Concatenate[_Module, _Parameters], _Result],
) -> Callable[Concatenate[_Module, _Parameters], _Result]:
    """Make a method of a module compute as in eval mode, whatever mode the module is in: without dropout, say."""

    @wraps(method)
    def evaluated(self: _Module, *args: _Parameters.args, **kwargs: _Parameters.kwargs) -> Any:
        with evaluation_mode(self):
            return method(self, *args, **kwargs)

    return evaluated
