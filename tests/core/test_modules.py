"""Precision, mode and running statistics of modules."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from discrete_lit.core.modules import (
    FullPrecision,
    at_least_float32,
    evaluation_mode,
    full_precision,
    in_evaluation,
)


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


# Run in a process of its own: torch does not forget which kind of names was used.
SETTINGS = """
import torch
from discrete_lit.core.modules import full_precision
{user}
def get():
    found = []
    for name in ("get_float32_matmul_precision()", "backends.cudnn.allow_tf32", "backends.cuda.matmul.allow_tf32",
                 "backends.cuda.matmul.fp32_precision", "backends.cudnn.conv.fp32_precision"):
        try:
            found.append(eval("torch." + name))
        except (RuntimeError, AttributeError) as error:
            found.append(type(error))
    return found
before = get()
try:
    with full_precision(torch.device("cuda")):
        with full_precision(torch.device("cuda")):
            inside = get()
        assert get() == inside, (get(), inside)
        raise KeyError
except KeyError:
    pass
print(before == get(), inside)
assert before == get(), (before, get())
assert inside[3] in ("ieee", "none"), inside  # none: the default, which is exact
assert inside[4] == "ieee", inside
"""


@pytest.mark.slow_but(1)
@pytest.mark.parametrize(
    "user",
    [
        "",
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
    ],
)
@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9 has one kind of names")
def test_full_precision_under_old_and_new_names(user: str) -> None:
    """Settings of TF32 are off inside and as they were behind it, whichever names a user has set them by."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SETTINGS.format(user=user)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_full_precision_has_no_autocast() -> None:
    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with full_precision(x.device):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


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
