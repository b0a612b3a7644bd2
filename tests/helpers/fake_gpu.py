"""What a draw of latents waits for on a GPU, found on tensors without data that say they are on one."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from discrete_lit.backbones.execution import outline
from discrete_lit.core.random import CounterRandom
from discrete_lit.core.synchronisation import Checks, HostWaits, has_data

Draw = Callable[[Sequence[Any], Tensor, CounterRandom], Tensor]


def waits_of_a_draw(modules: Sequence[nn.Module], draw: Draw, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], int]:
    """The operators that wait, and how often a draw asks for what was noted.

    Args:
        modules: that the draw uses.
        draw: called with them as they are on the GPU, the labels, and the random streams of five images.
        monkeypatch: counts what is asked for.
    """
    asked: list[int] = []
    monkeypatch.setattr(Checks, "raise_noted", lambda self, flags=None: asked.append(len(self._noted)))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        on_gpu = [outline(module, device="cuda") for module in modules]
        labels, indices = torch.zeros(5, dtype=torch.int64, device="cuda"), torch.arange(5, device="cuda")
        with HostWaits() as mode:
            drawn = draw(on_gpu, labels, CounterRandom(0, indices))
    assert drawn.device.type == "cuda" and not has_data(drawn)
    return mode.seen, sum(number > 0 for number in asked)
