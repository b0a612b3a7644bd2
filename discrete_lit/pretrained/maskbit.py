"""markweberdev/maskbit: VQGAN+ and the bit tokenizers."""

from dataclasses import replace
from typing import Any

import torch

from discrete_lit.pretrained.convolutional import ConvLayout
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.reference import Reference, agree
from discrete_lit.pretrained.registry import Conversion, register
from discrete_lit.pretrained.taming import CODES, vector_quantizer, vqgan

LAYOUT = ConvLayout(
    decoder_level="decoder.up.{level}",
    block="res_blocks.{block}",
    middle="mid.res_blocks.{place}",
    downsample="down_conv",
    upsample="upsample_conv",
)
_BLOCKS = "encoder.down.0.res_blocks.0.conv1.weight"


@register("vqgan_plus", marks=(_BLOCKS, "quantize.embedding.weight"))
def vqgan_plus(state: State, reference: Reference) -> Conversion:
    """`vqgan_plus_{10,12}bit.bin`, `vqgan_plus_paper.bin`, and `maskgit_tokenizer.bin` with its older decoder."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    agree(reference, {"codebook_size": codebook_size, "token_size": code_dim})
    quantizer = vector_quantizer(
        codebook_size,
        code_dim,
        commitment_weight=reference.get("commitment_cost", 0.25),
    )
    layout = _layout(state)
    return Conversion(vqgan(_network(state, layout), quantizer), state, layout.renaming(layout.levels(state), [CODES]))


@register("maskbit_tokenizer", marks=(_BLOCKS, "quantize.codebook"))
def maskbit_tokenizer(state: State, reference: Reference) -> Conversion:
    """`maskbit_tokenizer_{10,12,14,16,18}bit.bin`."""
    bits = state["encoder.conv_out.weight"].shape[0]
    agree(reference, {"codebook_size": 2**bits, "token_size": bits})
    places = state["quantize.bits_to_indices"].tolist()
    if places != [2**bit for bit in range(bits)]:
        raise ValueError(f"{state.source!r} has 'quantize.bits_to_indices' {places}: bit k must count 2^k")
    codes = torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1
    if not torch.equal(state["quantize.codebook"], (codes * 2 - 1).to(state["quantize.codebook"].dtype)):
        raise ValueError(f"{state.source!r} has a 'quantize.codebook' other than the signs of the bits")
    quantizer = {
        "class_path": "discrete_lit.tokenizers.quantizers.LookupFreeQuantizer",
        "init_args": {
            "bits": bits,
            "commitment_weight": reference.get("commitment_cost", 0.25),
            "entropy_weight": reference.get("entropy_loss_weight", 0.02),
            "entropy_temperature": reference.get("entropy_loss_temperature", 0.01),
            "batch_entropy_weight": reference.get("entropy_gamma", 1.0),
            "bit_order": "first_least_significant",
        },
    }
    layout = _layout(state)
    config = vqgan(_network(state, layout), quantizer)
    dropped = ("quantize.codebook", "quantize.bits_to_indices")
    return Conversion(config, state, layout.renaming(layout.levels(state)), dropped, kept=("quantizer.shifts",))


def _layout(state: State) -> ConvLayout:
    """The decoder's levels from the lowest; from the full resolution, which is not upsampled, in the older decoder."""
    older = "decoder.up.0.upsample_conv.weight" not in state
    return replace(LAYOUT, decoder_level="decoder.up.{mirror}") if older else LAYOUT


def _network(state: State, layout: ConvLayout) -> dict[str, Any]:
    downsampling = "right" if "encoder.down.0.down_conv.weight" in state else "average"
    return layout.network(state, downsampling=downsampling, shortcut="output", pixels="unit")
