"""VAR, of FoundationVision/VAR: the multi-scale tokenizer `var_vqvae`, and the generators `var_transformer`."""

import torch
from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, must_be_zero, register, reorder_chunks
from discrete_lit.pretrained.layouts import (
    IN_TRAINING,
    ConvLayout,
    class_count,
    generator_conversion,
    in_blocks,
    sampled_by,
)
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings
from discrete_lit.pretrained.taming import CODES, MARKS

LAYOUT = ConvLayout(query_key_value="qkv")
# Sides of the scales at 256 pixels. The file has only their number: the same file serves 512 pixels, with the sides 1,
# 2, 3, 4, 6, 9, 13, 18, 24, 32.
_TOKENIZER_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
# Running means of how often each scale takes each id.
DROPPED = ("quantize.ema_vocab_hit_SV",)


@register("var_vqvae", marks=(*MARKS, "quantize.embedding.weight", "quantize.ema_vocab_hit_SV"))
def var_vqvae(state: State, settings: Settings) -> Conversion:
    """Convert `vae_ch160v4096z32.pth`; `v_patch_nums` in the reference configuration chooses another image size."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    network = LAYOUT.network(state)
    sizes = {"vocab_size": codebook_size, "z_channels": code_dim, "ch": network["init_args"]["channels"]}
    settings.agree(sizes)
    # Constants of the reference's encoder and decoder.
    settings.agree({"ch_mult": network["init_args"]["multipliers"], "num_res_blocks": network["init_args"]["blocks"]})
    phi_kernels = state.count("quantize.quant_resi.qresi_ls.{}")
    settings.agree({"share_quant_resi": phi_kernels, "quant_conv_ks": network["init_args"]["latent_kernel"]})
    settings.agree({"using_znorm": False, "default_qresi_counts": 0}, "the published tokenizer has")
    settings.without_effect(IN_TRAINING, "dropout", "test_mode")
    scales = settings.take("v_patch_nums", list(_TOKENIZER_SCALES))
    if "v_patch_nums" not in settings and len(state["quantize.ema_vocab_hit_SV"]) != len(_TOKENIZER_SCALES):
        raise ValueError(
            f"{state.source!r} has {len(state['quantize.ema_vocab_hit_SV'])} scales: give their sides as v_patch_nums "
            "in reference_config"
        )
    config = {
        "class_path": "discrete_lit.tokenizers.MultiScaleVQ",
        "init_args": {
            "network": network,
            "codebook_size": codebook_size,
            "code_dim": code_dim,
            "scales": scales,
            "phi_kernels": phi_kernels,
            "phi_ratio": settings.take("quant_resi", 0.5),
            "commitment_weight": settings.take("beta", 0.25),
            "codebook_init": "uniform",
        },
    }
    rules = [CODES, ("quantizer.phi.{kernel}.{rest}", "quantize.quant_resi.qresi_ls.{kernel}.{rest}")]
    return Conversion(
        config=config, tensors=state, renaming=LAYOUT.renaming(LAYOUT.levels(state), rules), dropped=DROPPED
    )


# Sides of the scales, by the number of tokens: at 256 and at 512 pixels.
_GENERATOR_SCALES = {680: [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], 2240: [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]}
# Published: both gates, both scales, both shifts. Ours: shift, scale and gate of the attention, then of the MLP.
_MODULATION = (4, 2, 0, 5, 3, 1)
_BLOCK = [
    ("attention.query_key_value.weight", "attn.mat_qkv.weight"),
    ("attention.query_value_bias", "attn.query_value_bias"),
    ("attention.norms.log_sharpness", "attn.scale_mul_1H11"),
    ("attention.out.{rest}", "attn.proj.{rest}"),
    ("mlp.expand.{rest}", "ffn.fc1.{rest}"),
    ("mlp.contract.{rest}", "ffn.fc2.{rest}"),
    ("modulation.project.{rest}", "ada_lin.1.{rest}"),
    ("modulation_offset", "ada_gss"),
]
_RULES = [
    ("token_embedding.project.{rest}", "word_embed.{rest}"),
    ("class_embedding.weight", "class_emb.weight"),
    ("positions.embedding", "pos_1LC"),
    ("shared_modulation.project.{rest}", "shared_ada_lin.1.{rest}"),
    *in_blocks("blocks.{block}", _BLOCK),
    ("final_modulation.project.{rest}", "head_nm.ada_lin.1.{rest}"),
    ("head.project.weight", "head.weight"),
    ("head.bias", "head.bias"),
]


def _add_levels(positions: Tensor, levels: Tensor, level: Tensor, start: Tensor) -> list[Tensor]:
    """Sum all that is added to a position: its own embedding, that of its scale, and at the first the start's."""
    added = positions + levels[level[0].long()]
    return [torch.cat([added[:, :1] + start, added[:, 1:]], dim=1)]


_ARRANGEMENTS = [
    Arrangement(["pos_1LC", "lvl_embed.weight", "lvl_1L", "pos_start"], ["pos_1LC"], _add_levels),
    Arrangement(
        ["blocks.{block}.attn.q_bias", "blocks.{block}.attn.v_bias"],
        ["blocks.{block}.attn.query_value_bias"],
        lambda query, value: [torch.stack([query, value])],
    ),
    Arrangement(
        ["blocks.{block}.attn.scale_mul_1H11"], ["blocks.{block}.attn.scale_mul_1H11"], lambda sharpness: [sharpness[0]]
    ),
    must_be_zero("blocks.{block}.attn.zero_k_bias"),
    reorder_chunks("blocks.{block}.ada_lin.1.{rest}", _MODULATION),
    reorder_chunks("shared_ada_lin.1.{rest}", _MODULATION),
    Arrangement(
        ["blocks.{block}.ada_gss"], ["blocks.{block}.ada_gss"], lambda chunks: [chunks[0, 0, list(_MODULATION)]]
    ),
    # Published: scale, shift. Ours: shift, scale.
    reorder_chunks("head_nm.ada_lin.1.{rest}", (1, 0)),
]


@register(
    "var_transformer",
    marks=("word_embed.weight", "lvl_embed.weight", "pos_1LC", "pos_start"),
    wrappers=("trainer.var_wo_ddp",),
)
def var_transformer(state: State, settings: Settings) -> Conversion:
    """Convert `var_d{16,20,24,30}.pth` at 256 pixels, `var_d36.pth` at 512, or a trainer's file.

    Its input at a scale is made of the codes of the scales before, so it needs its tokenizer. Scales other than the
    published ones need `patch_nums` in the reference configuration.
    """
    width = len(state["word_embed.weight"])
    length, scales = state["pos_1LC"].shape[1], len(state["lvl_embed.weight"])
    vocab_size, depth = len(state["head.weight"]), state.count("blocks.{}")
    num_classes = class_count(state, state["class_emb.weight"])
    shared = "shared_ada_lin.1.weight" in state
    settings.agree({"depth": depth, "embed_dim": width, "num_classes": num_classes, "shared_aln": shared})
    heads, hidden = state["blocks.0.attn.scale_mul_1H11"].shape[1], len(state["blocks.0.ffn.fc1.bias"])
    settings.agree({"num_heads": heads, "attn_l2_norm": True, "mlp_ratio": hidden / width})
    settings.without_effect(IN_TRAINING, "drop_rate", "attn_drop_rate", "drop_path_rate")
    settings.without_effect("they say how attention is computed", "flash_if_available", "fused_if_available")
    _same_tokenizer(settings, settings.section("vae"), vocab_size, state["word_embed.weight"].shape[1])
    sides = settings.take("patch_nums", _GENERATOR_SCALES.get(length, []))
    if sum(side**2 for side in sides) != length or len(sides) != scales:
        raise ValueError(
            f"{state.source!r} has {scales} scales with {length} tokens: give their sides as patch_nums in "
            f"reference_config, got {sides}"
        )
    backbone = {
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_hidden": hidden,
        "mlp": "gelu_tanh",
        "norm_epsilon": settings.take("norm_eps", 1e-6),
        "conditioning": "prefix_adaln",
        "shared_modulation": shared,
        "qk_norm": "unit",
        "attention_bias": "query_value",
    }
    return generator_conversion(
        "NextScale",
        state,
        tokens=Tokens(vocab_size, (length,), needs_tokenizer=True),
        num_classes=num_classes,
        backbone=backbone,
        rules=_RULES,
        arrangements=_ARRANGEMENTS,
        dropped=("attn_bias_for_masking",),
        sampler=sampled_by("NextScaleSampler", guidance_scale=2.5, top_k=min(900, vocab_size), top_p=0.96),
        label_dropout=settings.take("cond_drop_rate", 0.1),
    )


def _same_tokenizer(settings: Settings, tokenizer: Settings, vocab_size: int, code_dim: int) -> None:
    """Compare what is said of the tokenizer, which is loaded by itself, with the tensors of the generator.

    Raises:
        ValueError: it has other codes or other scales.
    """
    tokenizer.agree({"vocab_size": vocab_size, "z_channels": code_dim})
    if "patch_nums" in settings:
        tokenizer.agree({"v_patch_nums": settings.take("patch_nums", [])}, "patch_nums has")
    tokenizer.without_effect(
        "the tokenizer is loaded by itself, and compares it",
        *("ch", "ch_mult", "num_res_blocks", "test_mode", "dropout", "beta", "quant_resi", "share_quant_resi"),
        *("using_znorm", "quant_conv_ks", "default_qresi_counts", "v_patch_nums"),
    )
