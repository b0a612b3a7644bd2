"""What our modules give for a golden case of any family, beside how it is compared with the reference's outputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from discrete_lit.pretrained import FAMILIES
from helpers import (
    golden_audio,
    golden_autoregressive,
    golden_bits,
    golden_decoding,
    golden_diffusion,
    golden_flax,
    golden_generators,
    golden_latents,
    golden_remasking,
    golden_replacing,
    golden_segments,
    golden_stacked,
    golden_text_diffusion,
    golden_texts,
    golden_tokenizers,
    golden_turns,
    golden_unified,
    golden_video,
)
from helpers.golden import Case, Difference, Load, Tensors, differences, published

KINDS = (
    golden_tokenizers,
    golden_generators,
    golden_diffusion,
    golden_latents,
    golden_turns,
    golden_bits,
    golden_autoregressive,
    golden_flax,
    golden_stacked,
    golden_replacing,
    golden_text_diffusion,
    golden_texts,
    golden_unified,
    golden_video,
    golden_audio,
)
SAMPLERS = (golden_decoding, golden_remasking, golden_segments)
"""Of families without a checkpoint: published algorithms on toy networks, or alone."""
NOT_YET: tuple[str, ...] = ()
"""Families with golden cases that no code of ours loads."""
WITHIN = {"maskgit_flax_tokenizer": "maskgit_flax"}
"""Families that are compared in the case of another, which holds both."""


def kind_of(family: str) -> Any:
    """The helper module that makes the outputs of a family's modules; None if there is none."""
    return next((kind for kind in KINDS if family in kind.OUTPUTS), None)


def compared(family: str) -> bool:
    """Whether there are outputs of ours to compare: of a loaded family, or of a sampler that needs no checkpoint."""
    return family in FAMILIES or any(family in kind.OUTPUTS for kind in SAMPLERS)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A case's outputs: how far each is from the reference's, and within which share numbers must be."""

    differences: list[Difference]
    tolerance: float
    tolerances: Mapping[str, float] = field(default_factory=dict)
    """Of outputs that the case itself says to be less exact, by name."""

    def off(self) -> list[Difference]:
        """The outputs that differ by more than they may."""
        return [each for each in self.differences if not each.within(self.tolerances.get(each.name, self.tolerance))]


def compare(case: Case, load: Load | None) -> Compared:
    """Compare every output of a case with the reference's, on the case's device.

    Args:
        case: of a family that is `compared`.
        load: of `published`; None for a sampler, which has no checkpoint.
    """
    kind: Any
    with torch.device(case.device):
        if load is None:
            kind = next(kind for kind in SAMPLERS if case.family in kind.OUTPUTS)
            found = kind.OUTPUTS[case.family](case)
        else:
            kind = kind_of(case.family)
            found = kind.OUTPUTS[case.family](load, case)
        of_kind = kind.NO_PLACE.get(case.family, {}), getattr(kind, "COMPARED", {})
        tolerances = {
            f"{case}: out.{name}": share
            for (family, name), share in getattr(kind, "TOLERANCES", {}).items()
            if family == case.family
        }
        return Compared(
            differences=list(differences(case, found, *of_kind)), tolerance=kind.TOLERANCE, tolerances=tolerances
        )


def network_outputs(module: Any, case: Case) -> Tensors:
    """What the network alone gives for the case's inputs, by the names of the reference's outputs.

    No id that is chosen on the way decides any of it: so it can be compared in half precision, which chooses other ids
    where two are nearly as probable.
    """
    with torch.device(case.device):
        return kind_of(case.family).network_outputs(module, case)


def largest_network_error(case: Case, folder: Path, dtype: torch.dtype) -> tuple[str, float]:
    """The output of the network under autocast that is furthest from the reference's, and how far as a share."""
    module = published(case, folder)()
    with torch.autocast(case.device.type, dtype):
        found = network_outputs(module, case)
    made = {name: value.float() for name, value in found.items() if value.is_floating_point()}
    others = {name: "not the network's alone" for name in case.expected.keys() - made.keys()}
    worst = max(differences(case, made, others, kind_of(case.family).COMPARED), key=lambda each: each.error)
    return worst.name, worst.error
