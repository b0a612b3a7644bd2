"""Nothing in a draw on a GPU waits for the host but the one question at its end.

The draws run on tensors without data that say they are on a GPU: whatever reads one raises, and copies between host and
device are counted.
"""

import inspect

import pytest
import torch
from helpers.every_sampler import Drawer, make_drawer, names
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from discrete_lit import samplers
from discrete_lit.backbones.execution import outline
from discrete_lit.core import synchronisation
from discrete_lit.core.random import CounterRandom
from discrete_lit.core.synchronisation import Checks, HostWaits, has_data
from discrete_lit.samplers import MaskGITSampler, Sampler, SamplingContext

# It has to be told how often tokens jump; see `refuse_recording`.
ASKS = "tau-gaussian"


def waiting(drawer: Drawer, monkeypatch: pytest.MonkeyPatch, sampler: Sampler | None = None) -> tuple[list[str], int]:
    """What a draw of five images waits for on a GPU, and how often it asks for what was noted."""
    drawer.draw(torch.zeros(1, dtype=torch.int64), CounterRandom(0, torch.zeros(1, dtype=torch.int64)))  # with data
    asked = []
    monkeypatch.setattr(Checks, "raise_noted", lambda self, flags=None: asked.append(len(self._noted)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = Drawer(
            outline(drawer.backbone, device="cuda"),
            sampler or drawer.sampler,
            None if drawer.quantizer is None else outline(drawer.quantizer, device="cuda"),
            drawer.denoiser,
        )
        labels, indices = torch.zeros(5, dtype=torch.int64, device="cuda"), torch.arange(5, device="cuda")
        with HostWaits() as mode:
            output = on_gpu.draw(labels, CounterRandom(0, indices))
    assert output.tokens.device.type == "cuda" and not has_data(output.tokens) and output.network_calls > 0
    return mode.seen, sum(number > 0 for number in asked)


@pytest.mark.slow_but(30)
@pytest.mark.parametrize("name", [name for name in names() if name != ASKS])
def test_a_draw_waits_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert waiting(make_drawer(name), monkeypatch) == ([], 1)


def test_every_sampler_is_drawn_from() -> None:
    classes = {each for each in vars(samplers).values() if inspect.isclass(each) and issubclass(each, Sampler)}
    covered = {type(make_drawer(name).sampler) for name in names()}
    assert {each for each in classes if not inspect.isabstract(each)} - {samplers.DiffusionSampler} == covered


def test_the_one_that_asks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataDependentOutputException):
        waiting(make_drawer(ASKS), monkeypatch)


class Asking(MaskGITSampler):
    """Waits in each of the ways that a sampler may be tempted to."""

    def __init__(self, way: str) -> None:
        super().__init__(steps=2)
        self.way = way

    def draw(self, context: SamplingContext) -> torch.Tensor:
        tokens = super().draw(context)
        if self.way == "item":
            tokens.sum().item()
        elif self.way == "branch" and (tokens == 1).any():
            tokens = tokens + 1
        elif self.way == "mask":
            tokens = tokens[tokens > 1]
        elif self.way == "list":
            tokens = tokens + torch.tensor([1, 2, 3, 4, 5, 6], device=tokens.device)
        elif self.way == "number":
            tokens = tokens + torch.tensor(1, device=tokens.device)
        elif self.way == "back":
            tokens.cpu()
        return tokens


@pytest.mark.parametrize("way", ["item", "branch", "mask", "list", "number", "back"])
def test_waiting_is_seen(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawer = make_drawer("maskgit")
    if way in ("item", "branch", "mask"):
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            waiting(drawer, monkeypatch, Asking(way))
    else:
        assert len(waiting(drawer, monkeypatch, Asking(way))[0]) == 1


def test_what_is_noted_is_told_at_the_end_of_the_outermost_draw() -> None:
    flags = torch.tensor([False, True])
    with pytest.raises(ValueError, match="the second"), synchronisation.checked_at_the_end():
        synchronisation.forbid(flags[0], lambda: "the first")
        with synchronisation.checked_at_the_end():
            synchronisation.forbid(flags[1], lambda: "the second")
        reached = True
    assert reached
    with pytest.raises(ValueError, match="at once"):
        synchronisation.forbid(flags[1], lambda: "at once")
    with pytest.raises(KeyError), synchronisation.checked_at_the_end():  # an error of its own comes first
        synchronisation.forbid(flags[1], lambda: "never seen")
        raise KeyError("own")
    assert synchronisation.host_sees(flags) and synchronisation.host_may_wait(flags)
    with synchronisation.noting(Checks(blind=True)):
        assert not synchronisation.host_sees(flags) and not synchronisation.host_may_wait(flags)


def test_tables_are_made_once_for_each_device() -> None:
    made = []

    def table(size: int) -> torch.Tensor:
        made.append(size)
        return torch.arange(size)

    cpu, meta = torch.device("cpu"), torch.device("meta")
    with torch.inference_mode():
        first = synchronisation.on_device(table, 3, device=cpu)
    assert not first.is_inference() and synchronisation.on_device(table, 3, device=cpu) is first
    assert synchronisation.on_device(table, 4, device=cpu).tolist() == [0, 1, 2, 3] and made == [3, 4]
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not has_data(synchronisation.on_device(table, 5, device=cpu))
        assert not has_data(synchronisation.on_device(table, 3, device=meta))
    assert synchronisation.on_device(table, 5, device=cpu).tolist() == [0, 1, 2, 3, 4] and made == [3, 4, 5, 5]
