"""The deviations that the authors' networks begin with, as laws of the name and shape of a parameter of ours.

A law is a list of kinds of layers. Each parameter is of the first kind whose pattern its name matches; several kinds of
one pattern are parts of one parameter. Biases and gains of norms are left out: they begin at 0 and 1.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, pi, prod, sqrt

import torch
from lightning import LightningModule
from torch import Tensor

from training_proof.laws import vector


@dataclass(frozen=True)
class Sizes:
    """What a law may need beside a shape: D and the number of blocks."""

    width: int
    depth: int


Deviation = Callable[[tuple[int, ...], Sizes], float]


@dataclass(frozen=True)
class Kind:
    """Some layers of one law."""

    label: str
    pattern: str
    deviation: Deviation
    part: Callable[[Tensor], Tensor] = lambda weight: weight


# A normal distribution of deviation 0.02 cut at twice that: the share 1 - 2 a phi(a) / (2 Phi(a) - 1) of its variance.
CUT = 0.02 * sqrt(1 - 4 * exp(-2) / sqrt(2 * pi) / 0.9544997361036416)


def fixed(deviation: float) -> Deviation:
    return lambda shape, sizes: deviation


def xavier(parts: int = 1) -> Deviation:
    """Uniform in +-sqrt(6 / (inputs + outputs)), of each of several matrices that are stacked."""
    return lambda shape, sizes: sqrt(2 / (prod(shape[1:]) + shape[0] / parts))


def by_inputs(shape: tuple[int, ...], sizes: Sizes) -> float:
    """PyTorch's own, uniform in +-1 / sqrt(inputs): of linear layers and convolutions."""
    return sqrt(1 / (3 * prod(shape[1:])))


def by_width(factor: float = 1.0, residual: bool = False) -> Deviation:
    """VAR's normal of deviation sqrt(1 / 3D), its residual outputs divided by sqrt(2 depth)."""
    return lambda shape, sizes: factor * sqrt(1 / (3 * sizes.width)) / (sqrt(2 * sizes.depth) if residual else 1)


def codes(factor: float = 1.0) -> Deviation:
    """Uniform in +-factor / K, of K codes."""
    return lambda shape, sizes: factor / shape[0] / sqrt(3)


def _chunks(*numbers: int) -> Callable[[Tensor], Tensor]:
    return lambda weight: torch.cat([weight.chunk(6)[number] for number in numbers])


_RESIDUAL = r"backbone\.blocks\..*(attention\.out|mlp\.contract)\.weight"
_MODULATION = r"backbone\.blocks\.\d+\.modulation\.project\.weight"
_LAST = r"final_modulation\.project\.weight"
_QKV = r"query_key_value\.weight"
_LOGITS = r"backbone\.(head|place_head\.heads\.\d+)\.project\.weight"
_POSITIONS = r"backbone\.positions\.embedding"
_START = r"backbone\.start$"
ZERO_MODULATIONS = Kind("modulations", r"modulation", fixed(0.0))
ALL_ELSE = ""

BERT = (ZERO_MODULATIONS, Kind("start", _START, fixed(0.0)), Kind("all else", ALL_ELSE, fixed(0.02)))
BAR = (ZERO_MODULATIONS, Kind("all else", ALL_ELSE, fixed(0.02)))
VQ_DIFFUSION = (
    Kind("convolutions", r"mlp\.(expand|contract)\.weight", by_inputs),
    Kind("all else", ALL_ELSE, fixed(0.02)),
)
CUT_BERT = (Kind("all", ALL_ELSE, fixed(CUT)),)
TAMING = (Kind("positions", _POSITIONS, fixed(0.0)), Kind("all else", ALL_ELSE, fixed(0.02)))
MASKBIT = (
    Kind("queries, keys, values", _QKV, xavier()),
    Kind("all else", ALL_ELSE, fixed(0.02)),
)
LLAMAGEN = (Kind("logits", _LOGITS, fixed(0.0)), Kind("all else", ALL_ELSE, fixed(0.02)))
IBQ = (
    Kind("logits", _LOGITS, fixed(0.0)),
    Kind("shifts, scales", _MODULATION, fixed(0.01), _chunks(0, 1, 3, 4)),
    Kind("gates", _MODULATION, fixed(2e-5), _chunks(2, 5)),
    Kind("last modulation", _LAST, fixed(0.01)),
    Kind("all else", ALL_ELSE, fixed(0.02)),
)


def var(gates: float) -> Sequence[Kind]:
    """VAR's, with `alng` for the gates; its positions also have a vector of their scale, so sqrt(2) times as much."""
    return (
        Kind("logits", _LOGITS, by_width(0.02)),
        Kind("residual outputs", _RESIDUAL, by_width(residual=True)),
        Kind("shifts, scales", _MODULATION, by_width(0.5), _chunks(0, 1, 3, 4)),
        Kind("gates", _MODULATION, by_width(gates), _chunks(2, 5)),
        Kind("last modulation", _LAST, by_width(0.5)),
        Kind("positions", _POSITIONS, by_width(sqrt(2))),
        Kind("all else", ALL_ELSE, by_width()),
    )


HALTON = (
    Kind("last modulation", _LAST, xavier()),
    ZERO_MODULATIONS,
    Kind("queries, keys, values", _QKV, xavier(3)),
    Kind("MLP in", r"mlp\.expand\.weight", xavier(2)),
    Kind("linear", r"(out|contract)\.weight", xavier()),
    Kind("embeddings", ALL_ELSE, fixed(0.02)),
)
SEDD = (
    Kind("logits", _LOGITS, fixed(0.0)),
    ZERO_MODULATIONS,
    Kind("linear", r"(query_key_value|out|expand|contract|layers\.\d)\.weight", by_inputs),
    # `kaiming_uniform_(a=sqrt(5))` of a table, whose inputs are its columns.
    Kind("embeddings", ALL_ELSE, lambda shape, sizes: sqrt(1 / (3 * shape[-1]))),
)
DIT = (
    Kind("modulations, output", r"modulation|backbone\.output", fixed(0.0)),
    Kind("time, classes", r"time_embedding|class_embedding", fixed(0.02)),
    Kind("linear", r"weight", xavier()),
)
# MAR's diffusion head; BitDance's too.
_IN_HEAD = r"(head|flow)\.network\."
_HEAD = (
    Kind("head: modulations, output", _IN_HEAD + r"(modulations|final_modulation|output)", fixed(0.0)),
    Kind("head: time", _IN_HEAD + r"time_embedding", fixed(0.02)),
    Kind("head: linear", _IN_HEAD + r".*weight", xavier()),
)
_TOKENS_OF_MAR = Kind("learned vectors", r"class_embedding|positions|mask_vector|steps", fixed(0.02))
MAR = (*_HEAD, _TOKENS_OF_MAR, Kind("linear", r"weight", xavier()))
XAR = (_TOKENS_OF_MAR, Kind("linear, modulations", r"weight", xavier()))
# Its embeddings of levels are PyTorch's own.
TOKENBRIDGE = (
    Kind("head: modulations", r"head\..*modulation", fixed(0.0)),
    Kind("head: embeddings", r"head\.tables", fixed(1.0)),
    _TOKENS_OF_MAR,
    Kind("linear", r"weight", xavier()),
)
BITDANCE = (*_HEAD, Kind("all else", ALL_ELSE, fixed(0.02)))

# Convolutions and linear layers of tokenizers are PyTorch's own; PatchGAN's are normal, as in taming.
_PATCHES = Kind("discriminator", r"discriminator", fixed(0.02))
_NETWORK = Kind("network", r"weight", by_inputs)
TAMING_VQGAN = (Kind("codes", r"quantizer", codes()), _PATCHES, _NETWORK)
LLAMAGEN_VQ = (Kind("codes", r"quantizer", lambda shape, sizes: sqrt(1 / shape[1])), _PATCHES, _NETWORK)
IBQ_VQGAN = (Kind("codes", r"quantizer", fixed(1.0)), _PATCHES, _NETWORK)
WITHOUT_CODES = (_PATCHES, _NETWORK)
# Latent diffusion's U-Net: what ends a branch begins at 0, and the classes' table is PyTorch's own.
LDM = (
    Kind("ends of branches", r"conv2|project_out|conv_out", fixed(0.0)),
    Kind("classes", r"class_embedding", fixed(1.0)),
    Kind("all else", r"weight", by_inputs),
)
VAEX = (
    Kind("codes", r"quantizer\.codebook", codes(20)),
    Kind("discriminator", r"discriminator", fixed(0.02)),
    Kind("network", r"weight", lambda shape, sizes: 0.5 * sqrt(2 / (prod(shape[1:]) + shape[0] * prod(shape[2:])))),
)
# Learned vectors of TiTok are normal of 1 / sqrt(D); its other layers 0.02.
TITOK = (
    Kind("codes", r"quantizer", codes()),
    Kind("learned vectors", r"tokens?$|positions$", lambda shape, sizes: sizes.width**-0.5),
    Kind("all else", ALL_ELSE, fixed(0.02)),
)


def measured(module: LightningModule, law: Sequence[Kind], sizes: Sizes) -> dict[str, float]:
    """Measure each kind's deviation as a share of the law's; where the law is 0, 1 more than the largest weight.

    Every trained weight counts, in proportion to its numbers.
    """
    sums: dict[str, list[float]] = {}
    for kind, weight in _parts(module, law):
        share, count = sums.setdefault(kind.label, [0.0, 0])
        deviation = kind.deviation(tuple(weight.shape), sizes)
        part = kind.part(weight.detach()).double()
        found = part.square().mean() / deviation**2 if deviation else (1 + part.abs().max()) ** 2
        sums[kind.label] = [share + float(found) * part.numel(), count + part.numel()]
    return {label: sqrt(total / count) for label, (total, count) in sums.items()}


def stated(module: LightningModule, law: Sequence[Kind], sizes: Sizes) -> dict[str, tuple[float, float]]:
    """Give the smallest and the largest deviation of each kind by its law, at the shapes of a module."""
    found: dict[str, tuple[float, float]] = {}
    for kind, weight in _parts(module, law):
        deviation = kind.deviation(tuple(weight.shape), sizes)
        least, most = found.get(kind.label, (deviation, deviation))
        found[kind.label] = min(least, deviation), max(most, deviation)
    return found


def _parts(module: LightningModule, law: Sequence[Kind]) -> Iterator[tuple[Kind, Tensor]]:
    """Pair each trained weight with the kinds of the first pattern that its name matches."""
    for name, weight in module.named_parameters():
        if not weight.requires_grad or vector(name, weight):
            continue
        pattern = next((kind.pattern for kind in law if re.search(kind.pattern, name)), None)
        assert pattern is not None, f"no kind of layer of the law has {name}"
        for kind in law:
            if kind.pattern == pattern:
                yield kind, weight
