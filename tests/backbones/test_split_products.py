"""Split products as tensor cores compute them, emulated on a CPU: their error bound, gradients, and who takes them."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from discrete_lit.backbones import split_products
from discrete_lit.backbones.layers import Linear, LogitHead, full_precision_linear
from discrete_lit.backbones.split_products import pays, prepare, split_product

BOUND = 2.0**-15
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def emulated(monkeypatch) -> None:
    monkeypatch.setattr(split_products, "_EMULATED", True)


def relative_error(found: Tensor, rows: Tensor, weight: Tensor) -> float:
    """The largest error, relative to the sum of |x| |w|."""
    exact = rows.double() @ weight.double().T
    return float(((found.double() - exact).abs() / (rows.double().abs() @ weight.double().abs().T)).max())


def numbers(kind: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(kind))
    normal = torch.randn(shape, generator=generator)
    exponents = torch.randint(-40, 41, shape, generator=generator)
    halfway = 1 + torch.randint(2**7, shape, generator=generator) * 2.0**-7 + 2.0**-8  # between two of bfloat16
    return {
        "normal": normal,
        "scales": torch.ldexp(normal, exponents),
        "ones": (2 - 2.0**-23) * normal.sign(),
        "halfway": halfway + (2.0**-17 - 2.0**-23) * normal.sign(),
        "cancelling": torch.cat((normal[:, : shape[1] // 2], -normal[:, : shape[1] // 2]), dim=1) + 1e-4 * normal,
        "zeros": normal * (normal > 1),
    }[kind]


@pytest.mark.parametrize("of_weight", ["normal", "scales", "halfway", "cancelling"])
@pytest.mark.parametrize("of_rows", ["normal", "scales", "ones", "halfway", "cancelling", "zeros"])
def test_the_bound_holds_for_adversarial_numbers(of_rows: str, of_weight: str) -> None:
    rows, weight = numbers(of_rows, 40, 48).clamp(min=-(2.0**60)), numbers(of_weight, 32, 48)
    rows[:, 0] += 1e-20  # of zeros, something
    found = split_product(rows, weight)
    assert found.dtype == torch.float32 and found.shape == (40, 32)
    assert relative_error(found, rows, weight) <= BOUND


def test_the_bound_is_near_the_worst_case() -> None:
    """Single products have no rounding of sums: the error is that of the terms left out, at most 2 u^2."""
    rows, weight = numbers("halfway", 2000, 1), numbers("halfway", 2000, 1)
    error = relative_error(split_product(rows, weight), rows, weight)
    assert 0.9 * BOUND < error <= BOUND
    one_part = relative_error((rows.bfloat16().float() @ weight.bfloat16().float().T), rows, weight)
    assert one_part > 100 * BOUND


@pytest.mark.parametrize("dtype", HALF)
def test_operands_in_the_same_half_precision_are_exact(dtype: torch.dtype) -> None:
    rows, weight = torch.randn(30, 48).to(dtype), torch.randn(20, 48).to(dtype)
    assert relative_error(split_product(rows, weight), rows, weight) < 48 * 2.0**-24


@pytest.mark.parametrize(("of_rows", "of_weight"), [(0, 2), (2, 0), (1, 2), (2, 1), (0, 1), (1, 0)])
def test_mixed_precisions_keep_the_bound(of_rows: int, of_weight: int) -> None:
    """What is rounded to bfloat16 has one part: two products are left."""
    dtypes = (*HALF, torch.float32)
    rows, weight = torch.randn(30, 48).to(dtypes[of_rows]), torch.randn(20, 48).to(dtypes[of_weight])
    assert relative_error(split_product(rows, weight), rows, weight) <= BOUND
    assert prepare(weight, rows.dtype).shape == (20, 48 * (2 if 0 in (of_rows, of_weight) else 3))


def test_a_prepared_weight_gives_the_same() -> None:
    rows, weight = torch.randn(2, 3, 48), torch.randn(20, 48)
    expected = split_product(rows, weight)
    assert expected.shape == (2, 3, 20)
    assert torch.equal(split_product(rows, weight, prepared=prepare(weight, rows.dtype)), expected)


def test_what_is_not_finite_stays_so() -> None:
    rows = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [0.0, 1.0]])
    assert split_product(rows, torch.ones(3, 2)).isfinite().all(dim=1).tolist() == [False, False, True]


def test_compiled_products_are_the_same() -> None:
    """The compiler would drop the low parts, if it saw them."""
    torch._dynamo.reset()
    rows, weight = torch.randn(30, 48), torch.randn(20, 48)
    compiled = torch.compile(split_product, fullgraph=True)
    assert relative_error(compiled(rows, weight), rows, weight) <= BOUND
    torch._dynamo.reset()


@pytest.mark.parametrize("outputs", [80, 83])
@pytest.mark.parametrize("dtype", HALF)
def test_the_head_under_autocast(dtype: torch.dtype, outputs: int, emulated) -> None:
    """Logits within the bound, and the gradients those of plain float32 under autocast: to the last bit where there is
    a multiple of 8 logits; else the sum over them has zeros more."""
    head, hidden = LogitHead(48, outputs), torch.randn(3, 5, 48, requires_grad=True)
    assert head.project is not None
    weight, weights = head.project.weight, torch.randn(3, 5, outputs)
    assert split_products.missing_rows(weight) == {80: 0, 83: 5}[outputs]

    def logits_and_gradients() -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.autocast("cpu", dtype):
            logits = head(hidden)
        return logits, torch.autograd.grad((logits * weights).sum(), (hidden, weight))

    logits, gradients = logits_and_gradients()
    split_products._EMULATED = False  # the fixture puts back what was before
    plain, expected = logits_and_gradients()
    assert logits.dtype == torch.float32 and not torch.equal(logits, plain)
    assert relative_error(logits.detach().flatten(0, 1), hidden.detach().flatten(0, 1), weight.detach()) <= BOUND
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32 and gradient.shape == wanted.shape
        torch.testing.assert_close(gradient, wanted, rtol=0 if outputs == 80 else 2.0**-6, atol=0)


@torch.no_grad()
def test_without_gradients_it_is_the_same_product(emulated) -> None:
    layer, rows = Linear(48, 80, autocast=False), torch.randn(5, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(rows), split_product(rows, layer.weight) + layer.bias)


@pytest.mark.parametrize("dtype", HALF)
def test_a_layer_in_half_precision(dtype: torch.dtype, emulated) -> None:
    """One exact product; gradients in the layer's precision."""
    weight = torch.randn(80, 48).to(dtype).requires_grad_()
    hidden = torch.randn(5, 48).to(dtype).requires_grad_()
    logits = full_precision_linear(hidden, weight)
    torch.testing.assert_close(logits, hidden.float() @ weight.float().T, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(logits.sum(), (hidden, weight))
    expected = weight.float().sum(dim=0).expand(5, -1), hidden.float().sum(dim=0).expand(80, -1)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.float(), wanted, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_and_float64_outside_of_it_are_untouched(autocast: bool, emulated) -> None:
    rows, weight = torch.randn(5, 48), torch.randn(80, 48)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wide = full_precision_linear(rows.double(), weight.double())
    assert wide.dtype == torch.float64 and torch.equal(wide, nn.functional.linear(rows.double(), weight.double()))
    if not autocast:
        assert torch.equal(full_precision_linear(rows, weight), nn.functional.linear(rows, weight))


def test_which_products_are_split(monkeypatch) -> None:
    def wins(capability: tuple[int, int], rows: int = 256, outputs: int = 256) -> bool:
        monkeypatch.setattr(split_products, "_capability", lambda device: capability)
        monkeypatch.setattr(split_products, "FakeTensor", ())  # the tensors below have a device, and no data
        with FakeTensorMode():
            operands = [torch.empty(count, 8, device="cuda") for count in (rows, outputs)]
            return pays(*operands)

    assert wins((9, 0)) and wins((8, 0)) and wins((10, 0))
    assert not any(wins(each) for each in [(7, 0), (7, 5), (8, 6), (8, 9), (12, 0)])
    assert not wins((9, 0), rows=255) and not wins((9, 0), outputs=64)
    assert not pays(torch.empty(512, 8), torch.empty(512, 8)), "on a CPU"


def test_operations_are_counted_as_of_plain_products(monkeypatch) -> None:
    monkeypatch.setattr(split_products, "_capability", lambda device: (9, 0))
    with FakeTensorMode():
        assert not pays(*(torch.empty(512, 8, device="cuda") for _ in range(2)))
