"""Predicted costs of drawing images by a recipe, before anything is trained.

`count_draw` draws once on tensors without data, or for real where that is quicker; `time_draw` draws for real. Weights
are random: no cost depends on them. A deep network is not built whole: two of few blocks are drawn from, and all that
grows with the blocks (time, operations, weights, memory) lies on a line through the two. Operations are the sampler's
own count, as `discrete-lit sample` writes it into run.json.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from math import nan
from statistics import median
from typing import Any

import torch
from torch import Tensor

# As in `backbones.execution`, which counts in the same way.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from discrete_lit.backbones.execution import count_flops, outline
from discrete_lit.checkpoints import instantiate
from discrete_lit.core.random import CounterRandom
from discrete_lit.core.synchronisation import Checks, noting
from discrete_lit.evaluation.machine_speed import seconds_of
from discrete_lit.generators import Generator, LatentGenerator, Unified
from discrete_lit.generators.counted_step import count_step

AnyGenerator = Generator | LatentGenerator | Unified
SHALLOW = (1, 3)
"""Blocks of the two networks that stand for a deeper one; odd, as U-ViT's skips need."""
_LONG = 1.0
_PROMPT = "a six"


@dataclass(frozen=True, kw_only=True)
class DrawCost:
    """The costs of drawing and decoding; of one image where nothing else is said."""

    network_calls: float
    """Network evaluations, two for a guided step, as `SamplerOutput.network_calls`."""
    sequential_passes: float
    """Passes that wait for one another, as `SamplerOutput.sequential_passes`."""
    flops: float
    """Floating-point operations of the network, without decoding, two for a multiply-add."""
    decoding_flops: float
    """Operations of the tokenizer's decoder."""
    training_flops: float
    """Operations of a training step for one image, forward and backward, with the tokenizer's encoding where the recipe
    encodes images; nan where a step cannot be counted."""
    parameters: float
    """Weights that a draw reads, of the generator and of the tokenizer."""
    memory: float
    """Bytes at once: all weights, and the most that a whole batch takes beside them."""


Clock = Callable[[Callable[[], object]], float]
"""Runs a function, once or several times, and gives the seconds that one run takes."""


def count_draw(model: Mapping[str, Any], *, batch_size: int) -> DrawCost:
    """Count what drawing and decoding a batch takes.

    Args:
        model: configuration of a generator whose frozen parts are configurations too.
        batch_size: images in a batch.
    """
    return DrawCost(**_on_line(model, lambda shallow: asdict(_counted(shallow, batch_size))))


def time_draw(
    model: Mapping[str, Any],
    *,
    batch_size: int,
    clock: Clock,
    device: torch.device | str = "cpu",
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """Predict the seconds of drawing and decoding a batch, by image, from draws of shallow networks on this machine.

    Args:
        model, batch_size: as of `count_draw`.
        clock: as `median_seconds` is, for this device.
        device: to draw on.
        precision: makes the context to draw in, such as autocast.
    """

    def timed(shallow: Mapping[str, Any]) -> dict[str, float]:
        generator = _built(shallow).to(device)
        given = _given(generator, batch_size)

        def draw() -> None:
            with torch.inference_mode(), precision():
                generator.tokenizer.decode(generator.draw(*given, None).tokens)

        return {"seconds": clock(draw) / batch_size}

    return _on_line(model, timed)["seconds"]


def median_seconds(run: Callable[[], object], *, device: torch.device) -> float:
    """Give the median time of three runs behind one that warms up, with all that the device has still to do; of a run
    above a second that of one run."""
    times: list[float] = []
    while len(times) < (4 if not times or times[0] < _LONG else 2):
        times.append(seconds_of(run, device))
    return median(times[1:])


def _on_line(model: Mapping[str, Any], measure: Callable[[Mapping[str, Any]], dict[str, float]]) -> dict[str, float]:
    """Measure a network; a deep one by the line through two of few blocks."""
    depth = model["init_args"]["backbone"]["init_args"].get("depth", 0)
    if depth <= max(SHALLOW):
        return measure(model)
    low, high = (measure(_with_depth(model, blocks)) for blocks in SHALLOW)
    steps = (depth - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0])
    return {name: low[name] + steps * (high[name] - low[name]) for name in low}


def _with_depth(model: Mapping[str, Any], depth: int) -> dict[str, Any]:
    changed = deepcopy(dict(model))
    changed["init_args"]["backbone"]["init_args"]["depth"] = depth
    return changed


def _built(model: Mapping[str, Any]) -> AnyGenerator:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        generator = instantiate(dict(model))
    assert isinstance(generator, Generator | LatentGenerator | Unified)
    return generator.eval()


def _given(generator: AnyGenerator, batch_size: int) -> tuple[Any, CounterRandom]:
    """Make the condition and the random numbers of a batch."""
    images = torch.arange(batch_size, device=generator.device)
    if isinstance(generator, Unified):
        return generator.condition_of_texts([_PROMPT] * batch_size), CounterRandom(0, images)
    return images % generator.num_classes, CounterRandom(0, images)


def _counted(model: Mapping[str, Any], batch_size: int) -> DrawCost:
    generator = _built(model)
    real = _draws_for_real(generator)
    # The checks at the end of a draw would read what is not there.
    with nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), noting(Checks()):
        copy = generator if real else outline(generator)
        if not real:
            copy.tokenizer.check_tokens = lambda tokens: None
        given = _given(copy, batch_size)
        with most_held() as held:
            drawn = copy.draw(*given, None)
            copy.tokenizer.decode(drawn.tokens)
    networks = {id(network): network for network in (*generator.drawing_networks(), generator.tokenizer)}
    weights = {id(weight): weight for network in networks.values() for weight in network.parameters()}
    shape, dtype = drawn.tokens.shape[1:], drawn.tokens.dtype
    return DrawCost(
        network_calls=drawn.network_calls,
        sequential_passes=drawn.sequential_passes,
        flops=drawn.flops,
        decoding_flops=_decoding_flops(generator, shape, dtype),
        training_flops=_training_flops(generator, shape, dtype),
        parameters=sum(weight.numel() for weight in weights.values()),
        memory=sum(weight.nbytes for weight in weights.values()) + held[0],
    )


def _draws_for_real(generator: AnyGenerator) -> bool:
    """Say whether a real draw is needed, or quicker than one without data.

    `Unified` reads what it drew, to know what may follow. A cache of keys and values has another shape at each pass,
    which tensors without data have to work out anew, and a pass over one position computes little.
    """
    if isinstance(generator, Unified):
        return True
    return isinstance(generator, Generator) and generator.backbone.layout.attention == "causal"


def _decoding_flops(generator: AnyGenerator, shape: torch.Size, dtype: torch.dtype) -> int:
    def prepare(copy: Any) -> Callable[[], object]:
        copy.check_tokens = lambda tokens: None
        return partial(copy.decode, torch.zeros(1, *shape, dtype=dtype))

    return count_flops(generator.tokenizer, prepare)


def _training_flops(generator: AnyGenerator, shape: torch.Size, dtype: torch.dtype) -> float:
    batch = {
        generator.content: torch.zeros(1, *shape, dtype=dtype),
        "label": torch.zeros(1, dtype=torch.int64),
        "index": torch.zeros(1, dtype=torch.int64),
    }
    try:
        return count_step(generator.train(), batch)
    except ValueError:
        return nan
    finally:
        generator.eval()


@contextmanager
def most_held() -> Iterator[list[int]]:
    """Watch the memory of the tensors that are made inside.

    Yields:
        A list whose only number is the most bytes that they held at once, so far.
    """
    watch = _Held()
    with watch:
        yield watch.most


class _Held(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, as long as a tensor of theirs is there."""

    def __init__(self) -> None:
        super().__init__()
        self.most = [0]
        self._now = 0
        self._tensors: dict[int, int] = {}  # of each storage: how many tensors of it are there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_place(each)[0] for each in _tensors(args)} - self._tensors.keys()
        for tensor in _tensors(result):
            key, size = _place(tensor)
            if key in given:  # a view of something that was there before
                continue
            if key not in self._tensors:
                self._tensors[key] = 0
                self._now += size
                self.most[0] = max(self.most[0], self._now)
            self._tensors[key] += 1
            weakref.finalize(tensor, self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self._now -= size


def _place(tensor: Tensor) -> tuple[int, int]:
    """Give what tells a tensor's memory apart, and its bytes; weights that are packed for a CPU have no storage."""
    if tensor.layout != torch.strided:
        return id(tensor), tensor.numel() * tensor.itemsize
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
