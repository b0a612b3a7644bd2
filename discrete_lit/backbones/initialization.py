"""The weights that a transformer begins with: one scheme for each published code that begins in a way of its own.

The schemes differ in four places: the deviation of ordinary layers, whether the outputs of residual branches are
smaller, whether the logits begin at 0, and whether the modulations do. Each is read from the training code that it
is named after; `Transformer` takes it by name. Norms always begin with a gain of 1, and biases, unless a scheme says
otherwise, at 0.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from discrete_lit.backbones.blocks import MLP

InitializationKind = Literal[
    "gpt2", "bert", "bar", "taming", "maskgit", "maskbit", "llamagen", "ibq", "var", "xavier", "sedd"
]

# Fills a weight in place, given the width D of the network, how many matrices are stacked in the weight, and what its
# numbers are divided by.
Fill = Callable[[Tensor, int, int, float], Any]

_RESIDUAL = ("out.weight", "contract.weight")
_LOGITS = re.compile(r"(head|place_head\.(heads\.\d+|output))\.project\.weight")


def _normal(deviation: float) -> Fill:
    return lambda weight, width, stacked, divisor: nn.init.normal_(weight, std=deviation / divisor)


def _zeros(weight: Tensor, width: int, stacked: int, divisor: float) -> None:
    nn.init.zeros_(weight)


def _cut_normal(weight: Tensor, width: int, stacked: int, divisor: float) -> None:
    nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04)
    weight.div_(divisor)


def _normal_by_width(weight: Tensor, width: int, stacked: int, divisor: float) -> None:
    nn.init.normal_(weight, std=(3 * width) ** -0.5 / divisor)


def _xavier(weight: Tensor, width: int, stacked: int, divisor: float) -> None:
    for part in weight.chunk(stacked):
        nn.init.xavier_uniform_(part, gain=1 / divisor)


def _xavier_together(weight: Tensor, width: int, stacked: int, divisor: float) -> None:
    nn.init.xavier_uniform_(weight, gain=1 / divisor)


def _uniform_by_inputs(weight: Tensor, width: int, stacked: int, divisor: float) -> None:
    bound = weight.shape[-1] ** -0.5 / divisor
    nn.init.uniform_(weight, -bound, bound)


@dataclass(frozen=True, kw_only=True)
class Initialization:
    """A scheme.

    Attributes:
        linear: of linear layers.
        query_key_value: of the projection of queries, keys and values; as `linear` by default.
        table: of embeddings, positions and other learned vectors.
        positions: of learned positions added at the input; as `table` by default.
        start: of the learned elements in front of the sequence, registers among them; 0 by default.
        small_residuals: divides the output layers of residual branches by sqrt(2 depth).
        logits: multiplies the weight of the logits.
        gates, shifts: multiply the parts of the modulations of blocks that are gates, and that are shifts and scales;
            0 is adaLN-Zero.
        last_modulation: multiplies the modulation before the logits.
        linear_biases: keeps the biases that PyTorch gives linear layers, uniform in +-1 / sqrt(inputs).
    """

    linear: Fill
    query_key_value: Fill | None = None
    table: Fill
    positions: Fill | None = None
    start: Fill = _zeros
    small_residuals: bool = False
    logits: float = 1.0
    gates: float = 0.0
    shifts: float = 0.0
    last_modulation: float = 0.0
    linear_biases: bool = False


_BERT = Initialization(linear=_normal(0.02), table=_normal(0.02))
_SCHEMES: dict[str, Initialization] = {
    "gpt2": replace(_BERT, small_residuals=True),
    "bert": _BERT,
    "bar": replace(_BERT, start=_normal(0.02)),
    "taming": replace(_BERT, positions=_zeros),
    "maskgit": Initialization(linear=_cut_normal, table=_cut_normal),
    "maskbit": replace(_BERT, query_key_value=_xavier_together),
    "llamagen": replace(_BERT, logits=0.0),
    "ibq": replace(_BERT, logits=0.0, gates=1e-3, shifts=0.5, last_modulation=0.5),
    "var": Initialization(
        linear=_normal_by_width,
        table=_normal_by_width,
        small_residuals=True,
        logits=0.02,
        gates=1e-3,
        shifts=0.5,
        last_modulation=0.5,
    ),
    "xavier": Initialization(linear=_xavier, table=_normal(0.02), start=_normal(0.02), last_modulation=1.0),
    "sedd": Initialization(linear=_uniform_by_inputs, table=_uniform_by_inputs, logits=0.0, linear_biases=True),
}


@torch.no_grad()
def initialise(
    network: Any, kind: InitializationKind, *, gates: float | None = None, zero_outputs: bool = False
) -> None:
    """Give a new `Transformer` the weights that it begins with.

    - `"gpt2"`: normal with deviation 0.02, output layers of residual branches 0.02 / sqrt(2 depth) (Radford et al.,
      2019).
    - `"bert"`: 0.02 everywhere (RAR, TiTok's generator).
    - `"bar"`: the same, the start token too (BAR).
    - `"taming"`: the same, with positions of 0 (taming-transformers' minGPT).
    - `"maskgit"`: a normal distribution of deviation 0.02 cut at twice that, whose own deviation is 0.0176.
    - `"maskbit"`: `"bert"`, with queries, keys and values as `torch.nn.MultiheadAttention` makes them: uniform with
      deviation 1 / sqrt(2 D).
    - `"llamagen"`: `"bert"`, with logits of 0 (LlamaGen, Open-MAGVIT2's).
    - `"ibq"`: `"llamagen"`, with modulations of blocks of deviation 0.02 times 0.5, gates times `gates`, and the one
      before the logits times 0.5 (IBQ's generator).
    - `"var"`: normal with deviation 1 / sqrt(3 D), output layers of residual branches divided by sqrt(2 depth), the
      logits' times 0.02, modulations as in `"ibq"`. The vectors of the scales, which VAR has apart, are added to the
      positions.
    - `"xavier"`: uniform in +-sqrt(6 / (inputs + outputs)) of each matrix, learned vectors 0.02, the modulation before
      the logits not 0 (Halton-MaskGIT).
    - `"sedd"`: uniform in +-1 / sqrt(inputs), learned vectors in +-1 / sqrt(D), logits of 0 (SEDD, MDLM).

    Args:
        network: the transformer, with `width`, `depth`, `layout` and `place_head`; a head that is `initialised` keeps
            its weights.
        kind: the scheme.
        gates: what the gates among the modulations of `"var"` and `"ibq"` are multiplied by; 1e-3 by default, as in
            VAR-d16, VAR-d20 and IBQ. VAR-d24 has 1e-4, VAR-d30 1e-5, VAR-d36 5e-6 (`alng` of its commands).
        zero_outputs: begin with output layers of residual branches and logits of 0 instead (Zhang, Dauphin and Ma,
            "Fixup Initialization", 2019). The output layer of a branch whose gate begins with 0 is left as the scheme
            has it: where both are 0, neither is ever given a gradient, and the branch is never trained.

    Raises:
        ValueError: a scheme that is not known, or gates where it has none.
    """
    if kind not in _SCHEMES:
        raise ValueError(f"initialization={kind!r} is not known, accepted: {', '.join(get_args(InitializationKind))}")
    if gates is not None:
        if not _SCHEMES[kind].gates:
            raise ValueError(f"initial_gates={gates} is of initialization='var' and 'ibq', got {kind!r}")
        if not network.modulated:
            raise ValueError(f"initial_gates={gates} needs conditioning='adaln' or 'prefix_adaln'")
    scheme = _SCHEMES[kind] if gates is None else replace(_SCHEMES[kind], gates=gates)
    width, scales = network.width, network.layout.scales
    gated = network.modulated and not scheme.gates  # by gates of 0
    linear = {id(layer.weight) for layer in network.modules() if isinstance(layer, nn.Linear)}
    for name, weight in _begun(network):
        residual = name.endswith(_RESIDUAL)
        divisor = (2 * network.depth) ** 0.5 if residual and scheme.small_residuals else 1.0
        if zero_outputs and ((residual and not gated) or name == "head.project.weight"):
            nn.init.zeros_(weight)
        elif "modulation" in name:
            _modulation(name, weight, scheme, width)
        elif id(weight) in linear:
            own = scheme.query_key_value if name.endswith("query_key_value.weight") else None
            (own or scheme.linear)(weight, width, _stacked(name, network), divisor)
            if scheme.logits != 1 and _LOGITS.fullmatch(name):
                weight.mul_(scheme.logits)
        elif name == "start":
            scheme.start(weight, width, 1, 1.0)
        elif name == "positions.embedding":
            (scheme.positions or scheme.table)(weight, width, 1, 1.0)
            if kind == "var" and scales:
                _add_scales(weight[0], scales, width)
        else:
            scheme.table(weight, width, 1, divisor)
    for module in network.modules():
        if isinstance(module, nn.Linear) and module.bias is not None and not scheme.linear_biases:
            nn.init.zeros_(module.bias)


def _begun(network: Any) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the parameters that a scheme fills, by name."""
    own = network.place_head is not None and network.place_head.initialised
    for name, parameter in network.named_parameters():
        kept = own and name.startswith("place_head.")
        # Convolutions begin as PyTorch makes them.
        if not kept and 2 <= parameter.ndim < 4 and not name.endswith(("bias", "log_sharpness")):
            yield name, parameter


def _stacked(name: str, network: nn.Module) -> int:
    """Count the matrices that are one parameter here and several in the published codes."""
    if name.endswith("query_key_value.weight"):
        return 3
    if name.endswith("key_value.weight"):
        return 2
    if name.endswith("mlp.expand.weight"):
        mlp = network.get_submodule(name.removesuffix(".expand.weight"))
        return 2 if isinstance(mlp, MLP) and mlp.kind in ("swiglu", "geglu") else 1
    return 1


def _modulation(name: str, weight: Tensor, scheme: Initialization, width: int) -> None:
    """Begin with a modulation; its module made it 0."""
    if name == "final_modulation.project.weight":
        if scheme.last_modulation:
            scheme.linear(weight, width, 1, 1.0)
            weight.mul_(scheme.last_modulation)
    elif scheme.shifts and name.startswith("shared_modulation."):
        scheme.linear(weight, width, 1, 1.0)  # what is small is the offset of each block
    elif scheme.shifts and name.startswith("blocks."):
        if name.endswith("modulation_offset"):
            nn.init.normal_(weight, std=width**-0.5)
        else:
            scheme.linear(weight, width, 1, 1.0)
        # Shift, scale and gate of the attention, then of the MLP.
        for number, vector in enumerate(weight.chunk(6)):
            vector.mul_(scheme.gates if number % 3 == 2 else scheme.shifts)


def _add_scales(positions: Tensor, scales: tuple[int, ...], width: int) -> None:
    """Add VAR's vector of each scale to its positions `(N, D)`, and its start token to the first."""
    vectors = torch.empty(len(scales) + 1, width, device=positions.device, dtype=positions.dtype)
    _normal_by_width(vectors, width, 1, 1.0)
    counts = torch.tensor(scales, device=positions.device)
    of_each = vectors[:-1].repeat_interleave(counts, dim=0, output_size=sum(scales))
    positions.add_(of_each[: len(positions)])
    positions[0].add_(vectors[-1])
