"""Matrix products of float32 numbers on tensor cores that multiply bfloat16, far more exactly than by TF32.

An H100 multiplies float32 matrices at 67 TFLOP/s and bfloat16 ones at 990 (NVIDIA's data sheet, 2023), so that logits
in float32 could take longer than all blocks. But a float32 number x is nearly the sum of two bfloat16 numbers,

    h = bf16(x),  l = bf16(x - h):    |l| <= u |x|,  |x - h - l| <= u^2 |x| / 2,  u = 2^-8,

and products of bfloat16 numbers are exact in the float32 that tensor cores add them up in. So of x w the terms
h h' + h l' + l h' are kept, as one product of matrices with three times as many columns, `[h, h, l] [h', l', h']^T`.
What is left out, l l' and the remainders times x and w, is at most 2 u^2 |x| |w|: each entry of the product is exact to

    2^-15 sum |x| |w|,

and to the rounding of a float32 sum, which no float32 product escapes: its bound is D 2^-24 sum |x| |w|, 2^-14 for
D = 1024. TF32 rounds each operand by u = 2^-11, an error of up to 2^-10; bfloat16 alone gives 2^-7. (Henry, Tang and
Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", 2019, call it
BF16x3.) Numbers of less than 2^-100 keep fewer digits, and such as round to infinity in bfloat16, above 3.39e38, make
NaN. An operand in bfloat16 has one part, not two, and a product of two in the same half precision is exact as it
stands.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Below, what it takes to split the operands is more than what their product saves: reading and writing 16 bytes for an
# entry at 3.3 TB/s are 5 ps, and a multiplication and addition take 30 fs at 67 TFLOP/s.
_FEWEST = 256
# Compute capabilities whose tensor cores multiply bfloat16 at least 15 times as fast as float32 is multiplied: A100,
# H100 and H200, B200 and B300. Of other cards it is 4 (L40S, A10) or 2 (GeForce), which three products gain nothing by.
_WORTH_IT = frozenset({(8, 0), (9, 0), (10, 0), (10, 3)})
# Tests set it, to compute on a CPU what tensor cores do: products of the same parts, added up in float32.
_EMULATED = False


def pays(rows: Tensor, weight: Tensor) -> bool:
    """Say whether `split_product` of these operands saves time.

    It does on GPUs with fast tensor cores, where there are many rows and many outputs. While operations are counted
    on tensors without data it does not: the operations of a model are those of plain products.

    Args:
        rows: `(..., D)` float32 or half precision.
        weight: `(K, D)`, likewise.
    """
    if torch.float64 in (rows.dtype, weight.dtype) or (isinstance(rows, FakeTensor) and not _EMULATED):
        return False
    if _EMULATED:
        return True
    if rows.device.type != "cuda" or min(rows.numel() // max(rows.shape[-1], 1), len(weight)) < _FEWEST:
        return False
    return torch.version.hip is None and _capability(rows.device.index or 0) in _WORTH_IT


def missing_rows(weight: Tensor) -> int:
    """Count the rows that a weight `(K, D)` lacks for products in half precision that sum over K to be fast on a GPU.

    Tensor cores read 16 bytes, 8 numbers, at a time, where the rows of a matrix begin at multiples of so many; of a
    vocabulary of 50,257 they do not.
    """
    return -len(weight) % 8 if weight.is_cuda or _EMULATED else 0


@lru_cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def split_product(rows: Tensor, weight: Tensor, *, prepared: Tensor | None = None) -> Tensor:
    """Multiply rows by a weight on tensor cores, exactly to `2^-15 sum |x| |w|` and a float32 sum's rounding.

    Of operands that are in the same half precision, to a float32 sum's rounding alone. It records no gradients.

    Args:
        rows: `(..., D)` float32, float16 or bfloat16.
        weight: `(K, D)`, likewise.
        prepared: what `prepare` made of this weight for rows of this precision; by default it is made anew.

    Returns:
        `(..., K)` float32.
    """
    if torch.compiler.is_compiling():
        # The compiler takes x - float(bf16(x)) for zero: of a chain of conversions it keeps the last.
        return split_product_op(rows, weight, prepared)
    return _split_product(rows, weight, prepared)


def prepare(weight: Tensor, rows: torch.dtype) -> Tensor:
    """Split a weight that many products need, and that does not change meanwhile.

    Args:
        weight: `(K, D)`, as for `split_product`.
        rows: the precision of the rows to come.

    Returns:
        `(K, D)`, `(K, 2 D)` or `(K, 3 D)` in half precision: at most one and a half times a float32 weight's memory.
    """
    return weight if _exact(rows, weight.dtype) else _side_by_side(weight, [part for _, part in _terms(rows, weight)])


def _split_product(rows: Tensor, weight: Tensor, prepared: Tensor | None) -> Tensor:
    left = rows.reshape(-1, rows.shape[-1])
    if not _exact(rows.dtype, weight.dtype):
        left = _side_by_side(left, [part for part, _ in _terms(rows.dtype, weight)])
    right = prepare(weight, rows.dtype) if prepared is None else prepared
    return _multiply(left, right).view(*rows.shape[:-1], len(weight))


def _exact(rows: torch.dtype, weight: torch.dtype) -> bool:
    """Whether tensor cores multiply two precisions as they are."""
    return rows == weight and rows in (torch.bfloat16, torch.float16)


def _terms(rows: torch.dtype, weight: Tensor) -> list[tuple[int, int]]:
    """List the products that are kept, each by the parts of both operands: 0 the high one, 1 the low one."""
    of_rows, of_weight = (1 if dtype == torch.bfloat16 else 2 for dtype in (rows, weight.dtype))
    return [(part, other) for part in range(of_rows) for other in range(of_weight) if part + other < 2]


def _side_by_side(values: Tensor, parts: list[int]) -> Tensor:
    """Lay out the bfloat16 parts, 0 and 1, of `(n, D)` in the order of a list: `(n, len(parts) D)`."""
    if parts == [0]:
        return values
    laid = values.new_empty(len(values), len(parts), values.shape[1], dtype=torch.bfloat16)
    columns = laid.unbind(dim=1)
    high = columns[parts.index(0)].copy_(values)
    low = None
    for part, column in zip(parts, columns, strict=True):
        if part == 0:
            if column is not high:
                column.copy_(high)
        elif low is None:
            low = torch.sub(values, high, out=column)  # in float32, rounded where it is written
        else:
            column.copy_(low)
    return laid.flatten(1)


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Multiply `(n, m)` by the transpose of `(K, m)`, both in half precision, and add up in float32: `(n, K)`."""
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda:
            return torch.mm(left, right.T, out_dtype=torch.float32)
        return torch.mm(left.float(), right.float().T)


@torch.library.custom_op("discrete_lit::split_product", mutates_args=())
def split_product_op(rows: Tensor, weight: Tensor, prepared: Tensor | None) -> Tensor:
    """`split_product` as one operator, into which the compiler does not look."""
    return _split_product(rows, weight, prepared)


@split_product_op.register_fake
def _shape_of_split_product(rows: Tensor, weight: Tensor, prepared: Tensor | None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], len(weight), dtype=torch.float32)
