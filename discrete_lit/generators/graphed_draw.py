"""A whole draw as one CUDA graph.

A sampler's loop over an image of 256 tokens starts some hundred thousand small operations, one after another, and
the host takes longer to start most of them than a GPU to make them. As nothing in the loop waits for the host
(`core/synchronisation.py`), all of it, every step of every family, is recorded once and then started as one
(`torch.cuda.CUDAGraph`), for each batch with its own labels and sample indices.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from discrete_lit.backbones.condition import Condition, as_condition, plain
from discrete_lit.core.random import CounterRandom
from discrete_lit.core.synchronisation import Checks, noting
from discrete_lit.generators.generator import Generator
from discrete_lit.samplers import Sampler, SamplerOutput

PAYS_FROM = 3
"""Batches of a process from which on a graph saves time: the first is drawn as ever, which warms up the kernels, the
second is recorded, which starts each operation once, as a draw does, and then replayed; from the third on all are
replayed."""


class Recorder(Protocol):
    """Records the operations that a function starts on a device, to start them again on the same memory."""

    def warm_up(self, run: Callable[[], SamplerOutput]) -> SamplerOutput:
        """Run what is to be recorded next: what is made at its first run is then there."""
        ...

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` starts, without its results, and give what starts it again."""
        ...


class CUDAGraphRecorder:
    """Records into a CUDA graph, as PyTorch's notes on CUDA semantics ask for."""

    def warm_up(self, run: Callable[[], SamplerOutput]) -> SamplerOutput:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = run()
        torch.cuda.current_stream().wait_stream(stream)
        return output

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a watchdog of collectives, may go on calling CUDA.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        return graph.replay


class GraphedDraw:
    """Draw batch after batch as `draw(condition, CounterRandom(seed, indices), sampler)` does, by a CUDA graph.

    The first batch is drawn as ever, the second recorded; a smaller one is filled up to `batch_size`, which changes no
    sample. The precision of autocast is that of the call; where it changes, or the shape of a grid or of vectors beside
    the labels, the draw is recorded anew. Weights may
    change between two batches in place, but not be replaced, nor may the sampler's settings change.

    What cannot be recorded is drawn as ever, and `reason` says why: on other devices than CUDA's, with sharded weights
    (FSDP), by a sampler that has to read what it drew. Where recording fails, a warning says so, once. Draws with known
    tokens or a trace are the generator's `draw`.

    Args:
        generator: on its device; in the mode and with the weights that it is to draw with.
        sampler: the generator's own by default.
        seed: of all draws.
        batch_size: rows of the recorded draw; its memory is kept as long as this object.
        recorder: what records; a CUDA graph by default.
    """

    def __init__(
        self,
        generator: Generator,
        sampler: Sampler | None = None,
        *,
        seed: int = 0,
        batch_size: int,
        recorder: Recorder | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.generator = generator
        self.sampler = sampler or generator.sampler
        self.seed = seed
        self.batch_size = batch_size
        self.reason: str | None = None
        device = next(generator.backbone.parameters()).device
        if recorder is None and device.type != "cuda":
            self.reason = f"a {device.type} has no CUDA graphs"
        elif any(_is_sharded(parameter) for parameter in generator.backbone.parameters()):
            self.reason = "the weights are sharded"
        self._recorder = recorder or CUDAGraphRecorder()
        with torch.inference_mode(False):  # written to in any mode
            self._held = Condition(labels=torch.zeros(batch_size, dtype=torch.int64, device=device))
            self._indices = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._precision: tuple[bool, torch.dtype] | None = None
        self._recorded: _Recorded | None = None

    @property
    def recorded(self) -> bool:
        """Whether a draw has been recorded, which the next batch is replayed from."""
        return self._recorded is not None

    @torch.no_grad()
    def __call__(self, condition: Condition | Tensor, indices: Tensor) -> SamplerOutput:
        """Draw one image for each label.

        Args:
            condition: labels `(B,)` int64 in [0, num_classes], B at most `batch_size`, or all that the generator is
                given.
            indices: `(B,)` int64, each sample's index among all that are drawn.

        Returns:
            As `Generator.draw`; the tokens are a copy.

        Raises:
            ValueError: more rows than `batch_size`, or the reasons of `Generator.draw`.
        """
        condition = as_condition(condition)
        labels = condition.labels
        if len(labels) > self.batch_size:
            raise ValueError(f"GraphedDraw was made for {self.batch_size} labels at a time, got {len(labels)}")
        if self.reason is not None or not len(labels) or labels.shape != indices.shape:
            return self._plain(condition, indices)
        same = self._hold(condition)
        self._fill(self._indices, indices)
        device = self._indices.device.type
        precision = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        if precision != self._precision or not same:
            self._recorded, self._precision = None, precision
            output = self._recorder.warm_up(self._draw_held)
            return replace(output, tokens=output.tokens[: len(labels)].clone())
        if self._recorded is None:
            try:
                self._recorded = self._record()
            except RuntimeError as error:
                self.reason = _first_cause(error)
                warnings.warn(f"the draw is not recorded as a CUDA graph: {self.reason}", stacklevel=3)
                return self._plain(condition, indices)
        recorded = self._recorded
        recorded.replay()
        recorded.checks.raise_noted(recorded.flags)
        return replace(recorded.output, tokens=recorded.output.tokens[: len(labels)].clone())

    def _hold(self, condition: Condition) -> bool:
        """Copy a condition to where the recorded draw reads it; say whether there was one of its shape before."""

        def kind(of: Condition) -> dict[str, tuple[torch.Size, torch.dtype]]:
            beside = ((name, part) for name, part in of.parts().items() if name != "labels" and part is not None)
            return {name: (part.shape[1:], part.dtype) for name, part in beside}

        kinds = kind(condition)
        same = kinds == kind(self._held)
        if not same:
            rows, device = self.batch_size, self._indices.device
            with torch.inference_mode(False):
                held = {
                    name: torch.zeros(rows, *shape, dtype=dtype, device=device)
                    for name, (shape, dtype) in kinds.items()
                }
                self._held = Condition(labels=self._held.labels, **held)
        for held_part, part in zip(self._held.parts().values(), condition.parts().values(), strict=True):
            if held_part is not None and part is not None:
                self._fill(held_part, part)
        return same

    def _fill(self, held: Tensor, given: Tensor) -> None:
        """Copy the rows that are given, and the first of them to all that are left."""
        held[: len(given)].copy_(given)
        held[len(given) :].copy_(given[:1].expand(self.batch_size - len(given), *given.shape[1:]))

    def _plain(self, condition: Condition, indices: Tensor) -> SamplerOutput:
        return self.generator.draw(plain(condition), CounterRandom(self.seed, indices), self.sampler)

    def _draw_held(self) -> SamplerOutput:
        """Draw what is held, in a way that can be recorded."""
        device = self._indices.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        # Weights that autocast keeps for the next operation would be freed behind the graph's back. Without them while
        # the kernels warm up, too: compiled blocks are compiled for the one or the other.
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            return self._plain(self._held, self._indices)

    def _record(self) -> "_Recorded":
        recorded = _Recorded()

        def run() -> None:
            with noting(recorded.checks):
                recorded.output = self._draw_held()
                recorded.flags = recorded.checks.flags()

        recorded.replay = self._recorder.record(run)
        return recorded


class _Recorded:
    """A recorded draw: what starts it, and the memory that its results are in."""

    replay: Callable[[], None]
    output: SamplerOutput
    flags: Tensor

    def __init__(self) -> None:
        self.checks = Checks(blind=True)


def _is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is more than a plain one: FSDP2's are."""
    return type(parameter) is not nn.Parameter


def _first_cause(error: BaseException) -> str:
    """The first line of the error that others followed: the end of a broken recording is one itself."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return str(error).partition("\n")[0]
