"""Precision, mode and running statistics of modules."""

import pytest
import torch
from torch import nn

from discrete_lit.core.modules import FullPrecision, at_least_float32, evaluation_mode, in_evaluation


class Sensitive(FullPrecision):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1 / 3]))
        self.register_buffer("count", torch.tensor(7))
        self.inner = nn.Linear(2, 2)


def test_half_precision_is_widened_and_nothing_narrowed() -> None:
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2):
        assert at_least_float32(torch.ones(1, dtype=dtype)).dtype == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_full_precision_keeps_every_digit(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(2, 2), Sensitive())
    before = {name: value.clone() for name, value in module[1].state_dict().items()}
    module.to(dtype)
    assert module[0].weight.dtype == dtype and module[1].inner.weight.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in module[1].state_dict().items())
    module.double()
    assert module[1].weight.dtype == torch.float64 and module[1].count.dtype == torch.int64


class Mixed(nn.Module):
    """Some parts in training mode, some frozen in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
        self.frozen = nn.Dropout(0.5).eval()

    @in_evaluation
    def modes(self, fail: bool = False) -> set[bool]:
        if fail:
            raise ValueError("broken")
        return {module.training for module in self.modules()}


def test_every_mode_is_put_back() -> None:
    module = Mixed().train()
    module.frozen.eval()
    before = [each.training for each in module.modules()]
    assert module.modes() == {False}
    assert [each.training for each in module.modules()] == before and True in before and False in before
    with pytest.raises(ValueError, match="broken"):
        module.modes(fail=True)
    with evaluation_mode(module):
        pass
    assert [each.training for each in module.modules()] == before
