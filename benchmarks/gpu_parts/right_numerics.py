"""Searches and products that choose their own way on a device give what float64 gives."""

from collections.abc import Iterator

import torch
from torch import Tensor

from discrete_lit.backbones.layers import full_precision_linear
from discrete_lit.tokenizers.quantizers.nearest import nearest_codes
from gpu_parts.part import Check, Setting, part

# Rounding of a float32 sum of D products, relative to the sum of their sizes, is at most D times this.
FLOAT32 = 2.0**-24


@part("nearest_code", kind="right", seconds=20, what="ids of the nearest codes against a search in float64")
@torch.no_grad()
def nearest_code(setting: Setting) -> Iterator[Check]:
    cases = [(4096, 8), (1000, 64)] if setting.tiny else [(16_384, 8), (16_384, 256), (262_144, 18), (262_144, 256)]
    rows = 2048 if setting.tiny else 4096
    for codes, dim in cases:
        generator = torch.Generator().manual_seed(codes + dim)
        latents, table = (torch.randn(count, dim, generator=generator).to(setting.device) for count in (rows, codes))
        expected = float64_search(latents, table)
        for allowed in ("highest", "high"):
            torch.set_float32_matmul_precision(allowed)
            found = nearest_codes(latents, table)
            torch.set_float32_matmul_precision("highest")
            other = found != expected
            # Of two codes that are equally far to within rounding, either is the nearest.
            error = float(excess(latents[other], table, found[other], expected[other]).max()) if other.any() else 0.0
            yield Check(
                name=f"K = {codes:,}, D = {dim}",
                case=f"TF32 {'allowed' if allowed == 'high' else 'off'}",
                error=error,
                tolerance=2.0,
                ok=error <= 2.0,
                what="distance beyond the nearest, in roundings of float32",
                note=f"{int(other.sum())} of {rows:,} ids are another code",
            )


def float64_search(latents: Tensor, codes: Tensor) -> Tensor:
    """Ids `(n,)` by float64 scores, some rows at a time."""
    codes = codes.double()
    offsets = codes.square().sum(dim=1) / 2
    return torch.cat([(part.double() @ codes.T - offsets).argmax(dim=1) for part in latents.split(512)])


def excess(latents: Tensor, codes: Tensor, found: Tensor, expected: Tensor) -> Tensor:
    """How much worse the score `z.e - |e|^2 / 2` of the found codes is, in units of the rounding of its float32 sum:
    `D 2^-24 (sum |z| |e| + |e|^2 / 2)`."""
    z, theirs, ours = (values.double() for values in (latents, codes[expected], codes[found]))
    scores = [(z * e).sum(dim=1) - e.square().sum(dim=1) / 2 for e in (theirs, ours)]
    sizes = (z.abs() * ours.abs()).sum(dim=1) + ours.square().sum(dim=1) / 2
    return (scores[0] - scores[1]) / (latents.shape[1] * FLOAT32 * sizes)


@part("float32_logits", kind="right", seconds=15, what="logits under bfloat16 autocast against float64")
@torch.no_grad()
def float32_logits(setting: Setting) -> Iterator[Check]:
    """Each logit is exact to 2^-15 of the sum of its products' sizes, and to the rounding of a float32 sum."""
    rows, width, ids = (64, 96, 500) if setting.tiny else (4096, 768, 16_384)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(count, width, generator=generator) for count in (rows, ids))
    # A few channels are far larger than the others, as in trained transformers.
    hidden[:, ::97] *= 100
    hidden, weight = hidden.to(setting.device), weight.to(setting.device)
    for dtype in (torch.float32, torch.bfloat16):
        given = hidden.to(dtype)
        exact, sizes = given.double() @ weight.double().T, given.double().abs() @ weight.double().abs().T
        with torch.autocast(setting.device.type, torch.bfloat16):
            found = full_precision_linear(given, weight)
        tolerance = 2.0**-15 + width * FLOAT32
        error = float(((found.double() - exact).abs() / sizes).max())
        yield Check(
            name="logits",
            case=f"{rows:,} rows of width {width}, K = {ids:,}, hidden {str(dtype).removeprefix('torch.')}",
            error=error,
            tolerance=tolerance,
            ok=found.dtype == torch.float32 and error <= tolerance,
            what="share of the sum of sizes",
            note=f"bfloat16 products alone: {2.0**-7:.1e}",
        )
