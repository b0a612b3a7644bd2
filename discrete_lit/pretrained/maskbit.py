"""MaskBit, of markweberdev/maskbit.

- tokenizers: `vqgan_plus`, and `maskbit_tokenizer`, whose ids are the signs of bits (lookup-free quantization);
- masked generators: `maskbit_bert` of VQGAN+'s ids, and `maskbit_lfqbert` of groups of bits.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, register
from discrete_lit.pretrained.layouts import (
    IN_TRAINING,
    ConvLayout,
    Rules,
    class_count,
    generator_conversion,
    head_count,
    in_blocks,
    sampled_by,
    square,
)
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings
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
def vqgan_plus(state: State, settings: Settings) -> Conversion:
    """Convert `vqgan_plus_{10,12}bit.bin`, `vqgan_plus_paper.bin`, or `maskgit_tokenizer.bin`, an older decoder."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    settings.agree({"quantizer_type": "lookup", "codebook_size": codebook_size, "token_size": code_dim})
    entropy_weight = settings.take("entropy_loss_weight", 0.0)
    gamma = settings.take("entropy_gamma", 1.0)
    temperature = settings.take("entropy_loss_temperature", 0.01)
    if entropy_weight and gamma != 1:
        raise ValueError(
            f"reference_config has entropy_gamma={gamma} at entropy_loss_weight={entropy_weight}; ours has 1 alone"
        )
    if not entropy_weight:
        settings.without_effect("entropy_loss_weight is 0", "entropy_gamma")
    quantizer = vector_quantizer(
        codebook_size,
        code_dim,
        commitment_weight=settings.take("commitment_cost", 0.25),
        normalize=settings.take("use_l2_normalisation", False),
        entropy_weight=entropy_weight,
        entropy_temperature=temperature,
        entropy_log_offset=1e-5,
    )
    layout = _layout(state)
    return Conversion(
        config=vqgan(_network(state, layout, settings), quantizer),
        tensors=state,
        renaming=layout.renaming(layout.levels(state), [CODES]),
    )


@register("maskbit_tokenizer", marks=(_BLOCKS, "quantize.codebook"))
def maskbit_tokenizer(state: State, settings: Settings) -> Conversion:
    """Convert `maskbit_tokenizer_{10,12,14,16,18}bit.bin`."""
    bits = state["encoder.conv_out.weight"].shape[0]
    settings.agree({"quantizer_type": "lookup-free", "token_size": bits})
    # The published one of 14 bits says 4096.
    settings.without_effect("the reference computes it from token_size", "codebook_size")
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
            "commitment_weight": settings.take("commitment_cost", 0.25),
            "entropy_weight": settings.take("entropy_loss_weight", 0.02),
            "entropy_temperature": settings.take("entropy_loss_temperature", 0.01),
            "batch_entropy_weight": settings.take("entropy_gamma", 1.0),
            "bit_order": "first_least_significant",
        },
    }
    layout = _layout(state)
    config = vqgan(_network(state, layout, settings), quantizer)
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


def _network(state: State, layout: ConvLayout, settings: Settings) -> dict[str, Any]:
    convolved = "encoder.down.0.down_conv.weight" in state
    network = layout.network(state, downsampling="right" if convolved else "average", shortcut="output", pixels="unit")
    sizes = network["init_args"]
    settings.agree(
        {
            "num_channels": sizes["image_channels"],
            "hidden_channels": sizes["channels"],
            "channel_mult": sizes["multipliers"],
            "num_resolutions": len(sizes["multipliers"]),
            "num_res_blocks": sizes["blocks"],
            "sample_with_conv": convolved,
        }
    )
    settings.agree({"legacy": layout != LAYOUT})
    settings.agree({"model_class": "vqgan+"}, "every model that is read has")
    settings.without_effect("it is another model", "mlm_model", "discriminator")
    settings.without_effect(IN_TRAINING, "finetune_decoder")
    return network


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
def maskbit_bert(state: State, settings: Settings) -> Conversion:
    """Convert a generator of VQGAN+'s ids, or of groups of their bits with a table of embeddings for each."""
    groups, group_size = state.count("tok_emb_list.{}"), len(state["tok_emb_list.0.weight"]) - 1
    numbers = "|".join(map(str, range(groups)))
    biases = [f"bias.{group}" for group in range(groups)]
    rules = [
        (
            "token_embedding.table.weight",
            f"tok_emb_list.{{{numbers}}}.weight" if groups > 1 else "tok_emb_list.0.weight",
        ),
        ("head.bias", "biases"),
    ]
    return _masked(
        state,
        settings,
        (groups, group_size),
        rules,
        {"tied": True, "head_bias": "place"},
        # Of each position, one group behind the other.
        arrangements=[Arrangement(biases, ["biases"], lambda *groups: [torch.cat(groups, dim=1)])],
        **({"bit_groups": groups} if groups > 1 else {}),
    )


@register("maskbit_lfqbert", marks=(*_MARKS, "input_proj.weight", "bits_to_indices"), section="mlm_model")
def maskbit_lfqbert(state: State, settings: Settings) -> Conversion:
    """Convert `maskbit_generator_{10,12,14,16,18}bit.bin`, a generator of groups of bits."""
    bits, group = state["input_proj.weight"].shape[1], len(state["bits_to_indices"])
    if bits % group:
        raise ValueError(f"{state.source!r} has {bits} bits in groups of {group}")
    if state["bits_to_indices"].tolist() != [2**bit for bit in range(group)]:
        raise ValueError(f"{state.source!r} has a 'bits_to_indices' in which bit k does not count 2^k")
    rules = [
        ("token_embedding.project.{rest}", "input_proj.{rest}"),
        ("head.project.weight", "prediction_layer.weight"),
        ("head.bias", "prediction_layer.bias"),
    ]
    return _masked(
        state,
        settings,
        (bits // group, 2**group),
        rules,
        {"token_embedding": "bits"},
        dropped=("bits_to_indices",),
        bit_groups=bits // group,
    )


def _masked(
    state: State,
    settings: Settings,
    groups: tuple[int, int],
    rules: Rules,
    switches: dict[str, Any],
    arrangements: Sequence[Arrangement] = (),
    **options: Any,
) -> Conversion:
    """Return the conversion of a generator of ids in `groups`, their number and the values of each."""
    width, depth = state["class_emb.weight"].shape[1], state.count("transformer.layers.{}")
    num_classes = class_count(state, state["class_emb.weight"])
    hidden, length = len(state["transformer.layers.0.1.net.0.bias"]), state["pos_emb"].shape[1] - 1
    vocab_size = groups[1] ** groups[0]
    prenorm = "norm_after_transformer.weight" in state
    found = {
        "hidden_dim": width,
        "depth": depth,
        "mlp_dim": hidden,
        "nclass": num_classes,
        "codebook_size": vocab_size,
        "codebook_splits": groups[0],
        "use_prenorm": prenorm,
    }
    settings.agree(found)
    settings.take("model_cls", "", ("bert", "lfq_bert"))
    settings.without_effect("the tensors tell which of the two it is", "model_cls")
    settings.without_effect(IN_TRAINING, "dropout", "train_mask_schedule_strategy")
    _same_length(settings, length)
    settings.section("vq_model").agree({"codebook_size": vocab_size})
    settings.section("vq_model").without_effect(
        "the tokenizer is loaded by itself, and compares it",
        *("model_class", "quantizer_type", "token_size", "commitment_cost", "entropy_loss_weight", "num_channels"),
        *("entropy_loss_temperature", "entropy_gamma", "hidden_channels", "channel_mult", "num_resolutions"),
        *("num_res_blocks", "sample_with_conv", "use_l2_normalisation"),
    )
    backbone = {
        "width": width,
        "depth": depth,
        "heads": head_count(settings, "heads", 16, width),
        "mlp_hidden": hidden,
        "norm_epsilon": 1e-12,
        "norm_first": prenorm,
        "embedding_norm": True,
        "head_transform": True,
        **switches,
    }
    return generator_conversion(
        "Masked",
        state,
        tokens=Tokens(vocab_size, square(state, length)),
        num_classes=num_classes,
        backbone=backbone,
        rules=[*_SHARED, ("final_norm.{rest}", "norm_after_transformer.{rest}"), *rules],
        arrangements=[_CLASS_FIRST, *arrangements],
        sampler=_sampler(settings, length),
        label_dropout=settings.take("class_label_dropout", 0.1),
        **options,
    )


def _same_length(settings: Settings, length: int) -> None:
    """Compare the number of tokens with that of the image size and stride, where one is given.

    Raises:
        ValueError: they make another number.
    """
    size, stride = settings.take("img_size", 256), settings.take("input_stride", 16)
    if ("img_size" in settings or "input_stride" in settings) and (stride < 1 or (size // stride) ** 2 != length):
        raise ValueError(
            f"reference_config has img_size={size} and input_stride={stride}, but the tensors have {length} tokens"
        )
    settings.without_effect("they make the number of tokens that the tensors have", "img_size", "input_stride")


_GUIDANCE = {"none": "constant", "linear": "linear", "cosine": "power_cosine"}
_SCHEDULES = {"arccos": "Arccos", "cosine": "Cosine", "linear": "Linear", "square": "Square"}


def _sampler(settings: Settings, length: int) -> dict[str, Any]:
    """Return the sampler with the settings of the published evaluation, in the reference's units where given."""
    sampling: dict[str, Any] = {"steps": settings.take("num_steps", min(_STEPS, length))}
    if "guidance_scale" in settings:
        sampling["guidance_scale"] = 1 + settings.take("guidance_scale", 0.0)
    if "guidance_annealing" in settings:
        sampling["guidance_schedule"] = _GUIDANCE[settings.take("guidance_annealing", "cosine", _GUIDANCE)]
    if "gen_mask_schedule_strategy" in settings:
        schedule = _SCHEDULES[settings.take("gen_mask_schedule_strategy", "arccos", _SCHEDULES)]
        sampling["mask_schedule"] = {"class_path": f"discrete_lit.diffusion.{schedule}Schedule"}
    named = {
        "scale_pow": ("guidance_power", 3.0),
        "randomize_temperature": ("choice_temperature", 7.8),
        "softmax_temperature": ("temperature", 1.0),
    }
    for theirs, (ours, default) in named.items():
        if theirs in settings:
            sampling[ours] = settings.take(theirs, default)
    if settings.take("use_sampling_annealing", False):
        sampling["temperature_annealing"] = True
    return sampled_by("MaskBitSampler", **sampling)
