"""Published models give on this device what the reference repositories' own code computes."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from helpers.golden import Case, cases_in, published
from helpers.golden_outputs import WITHIN, Compared, compare, compared, largest_network_error

from discrete_lit.pretrained import FAMILIES
from gpu_parts.part import Check, Setting, part

TOLERANCE = 1e-4
TINY = ("maskgit_jax_decode", "rar", "sedd_absorb", "titok")
# The largest error of any output of the networks under bfloat16 autocast, as a share of that output's largest value.
# About three times what a CPU gives (AMD EPYC, torch 2.14.1, 28 November 2026); weights are random, so activations
# grow from layer to layer as they do in no trained network.
BF16_TOLERANCE = {
    "bitdance_ae": 0.11,
    "dit": 0.02,
    "gidd": 0.04,
    "halton_maskgit": 0.015,
    "ibq": 0.05,
    "ldm": 0.03,
    "llamagen_gpt_c2i": 0.04,
    "llamagen_vq": 0.1,
    "magvit2_lfq": 0.03,
    "mar": 0.03,
    "mar_kl_vae": 0.045,
    "maskbit_bert": 0.025,
    "maskbit_lfqbert": 0.025,
    "maskbit_tokenizer": 0.035,
    "maskgit_vqgan": 0.14,
    "md4": 0.03,
    "mdlm": 0.015,
    "rar": 0.02,
    "sedd_absorb": 0.006,
    "sedd_uniform": 0.012,
    "sit": 0.02,
    "taming_gumbelvq": 0.07,
    "taming_net2net": 0.02,
    "taming_vqgan": 0.07,
    "titok": 0.1,
    "titok_imagebert": 0.025,
    "titok_uvitbert": 0.03,
    "titok_vae": 0.025,
    "va_vae": 0.04,
    "var_transformer": 0.02,
    "var_vqvae": 0.25,
    "vqgan_plus": 0.05,
}


@part("golden_float32", kind="right", seconds=40, what="outputs of published models against the reference's, float32")
def golden_float32(setting: Setting) -> Iterator[Check]:
    def check(case: Case, folder: Path) -> Check:
        found = compare(case, published(case, folder) if case.family in FAMILIES else None)
        return _check(case, found)

    yield from _each(setting, check)


@part("golden_bf16", kind="right", seconds=30, what="the same networks under bfloat16 autocast")
def golden_bf16(setting: Setting) -> Iterator[Check]:
    def check(case: Case, folder: Path) -> Check | None:
        if case.family not in FAMILIES:
            return None
        output, error = largest_network_error(case, folder, torch.bfloat16)
        tolerance = BF16_TOLERANCE[case.family]
        return Check(
            name=case.family,
            case=case.file.stem,
            error=error,
            tolerance=tolerance,
            ok=error <= tolerance,
            what="share of the output's largest value",
            note=f"largest in {output.rpartition(': ')[2]}",
        )

    yield from _each(setting, check)


@torch.no_grad()
def _each(setting: Setting, check: Callable[[Case, Path], Check | None]) -> Iterator[Check]:
    if setting.golden is None:
        yield Check(name="no reference outputs", ok=None, note="--golden names no folder of them")
        return
    wanted = [case for case in cases_in(setting.golden, setting.device) if compared(case.family)]
    missing = sorted({WITHIN.get(family, family) for family in FAMILIES} - {case.family for case in wanted})
    if missing:
        yield Check(name="not in the folder", case=", ".join(missing), ok=None)
    for case in wanted:
        if setting.tiny and case.family not in TINY:
            continue
        try:
            with tempfile.TemporaryDirectory(dir=setting.output) as folder:
                row = check(case, Path(folder))
        except Exception as error:  # of one case: the others are compared all the same
            note = f"{type(error).__name__}: {error}".splitlines()[0]
            row = Check(name=case.family, case=case.file.stem, ok=False, note=note)
        if row is not None:
            yield row


def _check(case: Case, found: Compared) -> Check:
    numbers = [each for each in found.differences if not each.whole]
    worst = max(numbers, key=lambda each: each.error)
    other = [each for each in found.differences if each.whole and each.error]
    ids = f"differing integers: {', '.join(each.name for each in other)}" if other else "all integers equal"
    return Check(
        name=case.family,
        case=case.file.stem,
        error=worst.error,
        tolerance=TOLERANCE,
        ok=all(each.within(max(TOLERANCE, found.tolerances.get(each.name, 0.0))) for each in found.differences),
        what="share of the output's largest value",
        note=f"{len(found.differences)} outputs, largest in {worst.name.rpartition(': ')[2]}; {ids}",
    )
