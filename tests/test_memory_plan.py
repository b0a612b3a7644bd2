"""The memory that a recipe needs on each GPU, by arithmetic and on tensors without values."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def memory_plan() -> Any:
    file = Path(__file__).parents[1] / "benchmarks" / "memory_plan.py"
    spec = importlib.util.spec_from_file_location("memory_plan", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rar_xxl_fits_eight_gpus_of_80_gb(memory_plan: Any) -> None:
    found = memory_plan.plan("rar_xxl_imagenet256", ranks=8, batch_size=64)
    assert found["parameters"] == pytest.approx(1.5e9, rel=0.03)
    # Weights, averages, gradients and two moments: 20 bytes of each parameter, an eighth on each rank.
    states = sum(found[name] for name in ("weights", "averages", "gradients", "AdamW's moments"))
    assert states == pytest.approx(20 * found["parameters"] / 8, rel=0.01)
    assert found["total"] < 80e9
    # A block keeps at least its input, queries, keys, values, attention output, and the inner layer, in bfloat16.
    least = 40 * 64 * 257 * (5 * 1408 + 6144) * 2
    assert least < found["kept for the backward pass"] < 6 * least
    alone = memory_plan.plan("rar_xxl_imagenet256", ranks=1, batch_size=64)
    assert alone["total"] - found["total"] == pytest.approx(states * 7, rel=0.01)


def test_what_is_kept_is_what_autograd_keeps(memory_plan: Any) -> None:
    """Of a layer whose tensors can be counted by hand."""

    class Layer(torch.nn.Module):
        token_shape = (4,)

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)

        def loss(self, tokens: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return self.second(torch.sigmoid(self.first(tokens.float().requires_grad_()))).sum()

    kept = memory_plan._kept(Layer(), 3)
    # In bfloat16: the input, both weights, and the sigmoid's output, which the second layer keeps too.
    assert sum(kept) == 2 * (3 * 4 + 4 * 8 + 8 * 2 + 3 * 8)
