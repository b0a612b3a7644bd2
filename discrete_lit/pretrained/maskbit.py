"""MaskBit, of markweberdev/maskbit.

- tokenizers: `vqgan_plus`, and `maskbit_tokenizer`, whose ids are the signs of bits (lookup-free quantization);
- masked generators: `maskbit_bert` of VQGAN+'s ids, and `maskbit_lfqbert` of groups of bits.
"""

from dataclasses import replace
from typing import Any

import torch

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, register
from discrete_lit.pretrained.layouts import (
    ConvLayout,
    Rules,
    class_count,
    generator_conversion,
    in_blocks,
    sampled_by,
    square,
)
from discrete_lit.pretrained.reading import Reference, State, agree
from discrete_lit.pretrained.taming import CODES, vector_quantizer, vqgan

LAYOUT = ConvLayout(
    decoder_level="decoder.up.{level}",
    block="res_blocks.{block}",
    middle="mid.res_blocks.{index}",
    downsample="down_conv",
    upsample="upsample_conv",
)
_BLOCKS = "encoder.down.0.res_blocks.0.conv1.weight"


@register("vqgan_plus", marks=(_BLOCKS, "quantize.embedding.weight"))
def vqgan_plus(state: State, reference: Reference) -> Conversion:
    """Convert `vqgan_plus_{10,12}bit.bin`, `vqgan_plus_paper.bin`, or `maskgit_tokenizer.bin`, an older decoder."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    agree(reference, {"codebook_size": codebook_size, "token_size": code_dim})
    quantizer = vector_quantizer(
        codebook_size,
        code_dim,
        commitment_weight=reference.get("commitment_cost", 0.25),
    )
    layout = _layout(state)
    return Conversion(
        config=vqgan(_network(state, layout), quantizer),
        tensors=state,
        renaming=layout.renaming(layout.levels(state), [CODES]),
    )


@register("maskbit_tokenizer", marks=(_BLOCKS, "quantize.codebook"))
def maskbit_tokenizer(state: State, reference: Reference) -> Conversion:
    """Convert `maskbit_tokenizer_{10,12,14,16,18}bit.bin`."""
    bits = state["encoder.conv_out.weight"].shape[0]
    agree(reference, {"codebook_size": 2**bits, "token_size": bits})
    weights = state["quantize.bits_to_indices"].tolist()
    if weights != [2**bit for bit in range(bits)]:
        raise ValueError(f"{state.source!r} has 'quantize.bits_to_indices' {weights}: bit k must count 2^k")
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
    return Conversion(
        config=config,
        tensors=state,
        renaming=layout.renaming(layout.levels(state)),
        dropped=dropped,
        kept=("quantizer.shifts",),
    )


def _layout(state: State) -> ConvLayout:
    """Return the layout, whose decoder counts levels from the lowest, or in older files from the full resolution.

    The level of the full resolution is not upsampled, which tells the two apart.
    """
    older = "decoder.up.0.upsample_conv.weight" not in state
    return replace(LAYOUT, decoder_level="decoder.up.{mirror}") if older else LAYOUT


def _network(state: State, layout: ConvLayout) -> dict[str, Any]:
    downsampling = "right" if "encoder.down.0.down_conv.weight" in state else "average"
    return layout.network(state, downsampling=downsampling, shortcut="output", pixels="unit")


# Steps of the published evaluation that has the fewest; its other settings are the sampler's defaults.
_STEPS = 64
_BLOCK = [
    ("attention.query_key_value.{rest}", "0.mha.in_proj_{rest}"),
    ("attention.out.{rest}", "0.mha.out_proj.{rest}"),
    ("attention_norm.{rest}", "0.norm.{rest}"),
    ("mlp.expand.{rest}", "1.net.0.{rest}"),
    ("mlp.contract.{rest}", "1.net.2.{rest}"),
    ("mlp_norm.{rest}", "1.norm.{rest}"),
]
_SHARED = [
    ("class_embedding.weight", "class_emb.weight"),
    ("positions.embedding", "pos_emb"),
    ("embedding_norm.{rest}", "first_layer.0.{rest}"),
    *in_blocks("transformer.layers.{block}", _BLOCK),
    ("head.transform.{layer}.{rest}", "last_layer.{layer}.{rest}"),
]
# The class comes first in our sequence, last in theirs.
_CLASS_FIRST = Arrangement(["pos_emb"], ["pos_emb"], lambda table: [torch.cat([table[:, -1:], table[:, :-1]], dim=1)])
_MARKS = ("class_emb.weight", "pos_emb", "first_layer.0.weight", "last_layer.0.weight")


@register("maskbit_bert", marks=(*_MARKS, "tok_emb_list.0.weight"), section="mlm_model")
def maskbit_bert(state: State, reference: Reference) -> Conversion:
    """Convert a generator of VQGAN+'s ids."""
    vocab_size = len(state["tok_emb_list.0.weight"]) - 1
    agree(reference, {"codebook_size": vocab_size})
    agree(reference, {"codebook_splits": 1}, "a table of embeddings has")
    rules = [
        ("token_embedding.table.weight", "tok_emb_list.0.weight"),
        ("head.bias", "bias.0"),
    ]
    return _masked(state, reference, vocab_size, rules, {"tied": True, "head_bias": "place"})


@register("maskbit_lfqbert", marks=(*_MARKS, "input_proj.weight", "bits_to_indices"), section="mlm_model")
def maskbit_lfqbert(state: State, reference: Reference) -> Conversion:
    """Convert `maskbit_generator_{10,12,14,16,18}bit.bin`, a generator of groups of bits."""
    bits, group = state["input_proj.weight"].shape[1], len(state["bits_to_indices"])
    if bits % group:
        raise ValueError(f"{state.source!r} has {bits} bits in groups of {group}")
    agree(reference, {"codebook_size": 2**bits, "codebook_splits": bits // group})
    if state["bits_to_indices"].tolist() != [2**bit for bit in range(group)]:
        raise ValueError(f"{state.source!r} has a 'bits_to_indices' in which bit k does not count 2^k")
    rules = [
        ("token_embedding.project.{rest}", "input_proj.{rest}"),
        ("head.project.weight", "prediction_layer.weight"),
        ("head.bias", "prediction_layer.bias"),
    ]
    return _masked(
        state,
        reference,
        2**bits,
        rules,
        {"token_embedding": "bits"},
        dropped=("bits_to_indices",),
        bit_groups=bits // group,
    )


def _masked(
    state: State,
    reference: Reference,
    vocab_size: int,
    rules: Rules,
    switches: dict[str, Any],
    dropped: tuple[str, ...] = (),
    **options: Any,
) -> Conversion:
    width, depth = state["class_emb.weight"].shape[1], state.count("transformer.layers.{}")
    num_classes = class_count(state, state["class_emb.weight"])
    hidden = len(state["transformer.layers.0.1.net.0.bias"])
    agree(reference, {"hidden_dim": width, "depth": depth, "mlp_dim": hidden, "nclass": num_classes})
    agree(reference, {"use_prenorm": False}, "every published model has")
    backbone = {
        "width": width,
        "depth": depth,
        "heads": reference.get("heads", 16),
        "mlp_hidden": hidden,
        "norm_epsilon": 1e-12,
        "norm_first": False,
        "embedding_norm": True,
        "head_transform": True,
        **switches,
    }
    length = state["pos_emb"].shape[1] - 1
    return generator_conversion(
        "Masked",
        state,
        tokens=Tokens(vocab_size, square(state, length)),
        num_classes=num_classes,
        backbone=backbone,
        rules=[*_SHARED, *rules],
        arrangements=[_CLASS_FIRST],
        dropped=dropped,
        sampler=sampled_by("MaskBitSampler", steps=min(_STEPS, length)),
        **options,
    )
