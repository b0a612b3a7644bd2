"""HART, of mit-han-lab/hart: the hybrid tokenizer `hart_tokenizer`, and the text-to-image generator `hart`."""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.pretrained.conversion import (
    Arrangement,
    Conversion,
    Renaming,
    arrange,
    must_be_zero,
    register,
    reorder_chunks,
)
from discrete_lit.pretrained.layouts import IN_TRAINING, in_blocks
from discrete_lit.pretrained.mar import HEAD_RULES
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings
from discrete_lit.pretrained.taming import CODES, MARKS
from discrete_lit.pretrained.var import DROPPED, LAYOUT

_OF_THE_FILE = "it is about the file, and about Hugging Face's reader of it"
_FILE_KEYS = ("architectures", "model_type", "torch_dtype", "transformers_version", "_name_or_path")
# Sides of the scales at 256 pixels, VAR's; `v_patch_nums` of the published configuration says others.
_SCALES: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@register("hart_tokenizer", marks=(*MARKS, "quantize.embedding.weight", "quantize.ema_vocab_hit_SV"))
def hart_tokenizer(state: State, settings: Settings) -> Conversion:
    """Convert `tokenizer/model.safetensors` of `hart-0.7b-1024px`, whose discriminator is not read."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    network = LAYOUT.network(state)
    sizes = network["init_args"]
    settings.agree({"vocab_size": codebook_size, "z_channels": code_dim, "ch": sizes["channels"]})
    settings.agree({"ch_mult": sizes["multipliers"]})
    phi_kernels = state.count("quantize.quant_resi.qresi_ls.{}")
    settings.agree({"share_quant_resi": phi_kernels, "quant_conv_ks": sizes["latent_kernel"]})
    settings.agree(
        {
            "using_znorm": False,
            "default_qresi_counts": 0,
            "quantizer_type": "var_hybrid",
            "hybrid": True,
            "double_decoder": False,
        },
        "the published tokenizer has",
    )
    settings.without_effect(IN_TRAINING, "dropout", "test_mode")
    settings.without_effect("it is of another quantizer of the same code", "levels", "disable_quant_resi")
    settings.without_effect(_OF_THE_FILE, *_FILE_KEYS)
    scales = settings.take("v_patch_nums", list(_SCALES))
    hits = len(state["quantize.ema_vocab_hit_SV"])
    if "v_patch_nums" not in settings and hits != len(_SCALES):
        raise ValueError(
            f"{state.source!r} has {hits} scales: give their sides as v_patch_nums in reference_config, as its "
            "config.json does"
        )
    config = {
        "class_path": "discrete_lit.tokenizers.HybridVQ",
        "init_args": {
            "network": network,
            "codebook_size": codebook_size,
            "code_dim": code_dim,
            "scales": scales,
            "phi_kernels": phi_kernels,
            "phi_ratio": settings.take("quant_resi", 0.5),
            "commitment_weight": settings.take("beta", 0.25),
            "decoder_only": settings.take("freeze_codebook_for_hybrid", True),
            "codebook_init": "uniform",
        },
    }
    rules = [CODES, ("quantizer.phi.{kernel}.{rest}", "quantize.quant_resi.qresi_ls.{kernel}.{rest}")]
    return Conversion(
        config=config, tensors=state, renaming=LAYOUT.renaming(LAYOUT.levels(state), rules), dropped=DROPPED
    )


# Published: both gates, both scales, both shifts. Ours: shift, scale and gate of the attention, then of the MLP.
_MODULATION = (4, 2, 0, 5, 3, 1)
_BLOCK = [
    ("attention_norm.weight", "ln_of_attention.weight"),
    ("mlp_norm.weight", "ln_of_mlp.weight"),
    ("attention.query_key_value.weight", "attn.qkv_proj.weight"),
    ("attention.query_value_bias", "attn.query_value_bias"),
    ("attention.norms.log_sharpness", "attn.scale_mul_1H11"),
    ("attention.out.{rest}", "attn.proj.{rest}"),
    ("mlp.expand.weight", "ffn.{gate_proj|up_proj}.weight"),
    ("mlp.contract.weight", "ffn.down_proj.weight"),
    ("modulation.project.{rest}", "ada_lin.1.{rest}"),
]
_RULES = [
    ("backbone.context_norm.weight", "context_norm.weight"),
    ("backbone.context_embedding.{rest}", "context_embed.{rest}"),
    ("backbone.vector_embedding.{rest}", "word_embed.{rest}"),
    ("backbone.level_embedding.weight", "lvl_embed.weight"),
    ("backbone.level_embedding.layers.{layer}.{rest}", "lvl_embed.mlp.{layer}.{rest}"),
    *in_blocks("blocks.{block}", _BLOCK, ours="backbone.blocks.{block}"),
    ("backbone.final_norm.weight", "head_nm.ln_wo_grad.weight"),
    ("backbone.final_modulation.project.{rest}", "head_nm.ada_lin.1.{rest}"),
    ("backbone.logit_head.project.weight", "head.weight"),
    ("backbone.logit_head.bias", "head.bias"),
    ("backbone.head_norm.weight", "decoder_norm.weight"),
    *HEAD_RULES,
]
# Constants of the released code.
_HEAD_SCALE, _LATE_SCALE = 0.6, 7
_TOP_K, _LATE_TOP_K = 600, 300


@register(
    "hart",
    marks=("context_embed.weight", "lvl_1L", "diffloss.net.cond_embed.weight", "decoder_norm.weight"),
    section="transformer",
)
def hart(state: State, settings: Settings) -> Conversion:
    """Convert `llm/model.safetensors` of `hart-0.7b-1024px`, which is loaded with its tokenizer.

    Its text encoder is not part of it: the generator is given that one's hidden states.
    """
    width, dim = state["word_embed.weight"].shape
    depth, levels = state.count("blocks.{}"), int(state["lvl_1L"].max()) + 1
    length, context = int((state["lvl_1L"] == 0).sum()), state["context_embed.weight"].shape[1]
    sharpness = "blocks.0.attn.scale_mul_1H11" in state
    modulated = "blocks.0.ada_lin.1.weight" in state
    waves = "lvl_embed.mlp.0.weight" in state
    hidden, head_width = len(state["blocks.0.ffn.gate_proj.weight"]), len(state["diffloss.net.input_proj.weight"])
    head_depth = state.count("diffloss.net.res_blocks.{}")
    settings.agree(
        {
            "depth": depth,
            "embed_dim": width,
            "attn_l2_norm": sharpness,
            "disable_aln": not modulated,
            "use_timestep_embed": waves,
            "context_token": length,
            "context_dim": context,
            "use_context_norm": "context_norm.weight" in state,
            "diff_width": head_width,
            "diff_depth": head_depth,
        }
    )
    heads = _heads(state, settings, width)
    ratio = settings.take("mlp_ratio", 4.0)
    if int(width * ratio * 2 / 3 + 255) // 256 * 256 != hidden:
        raise ValueError(f"reference_config has mlp_ratio={ratio}, but the tensors have {hidden} channels in the MLP")
    settings.without_effect("it is rounded to the width that the tensors tell", "mlp_ratio")
    settings.agree(
        {
            "mlp_type": "llama",
            "attn_type": "llama",
            "shared_aln": False,
            "use_cross_attn": False,
            "sep_aln_pooling_mode": "max",
            "sampler": "iddpm",
        },
        "every model that is read has",
    )
    settings.without_effect(
        IN_TRAINING, "drop_rate", "attn_drop_rate", "drop_path_rate", "context_norm_scale", "diffusion_head_repeats"
    )
    settings.without_effect("they say how attention is computed", "flash_if_available", "fused_if_available")
    settings.without_effect("the tokenizer is given by itself", "vae_path")
    settings.without_effect(_OF_THE_FILE, *_FILE_KEYS)
    sides = settings.take("patch_nums", list(_SCALES))
    if sum(side**2 for side in sides[1:]) + length != state["lvl_1L"].shape[1] or len(sides) != levels:
        raise ValueError(
            f"{state.source!r} has {levels} scales with {state['lvl_1L'].shape[1] - length} places behind the first: "
            f"give their sides as patch_nums in reference_config, as its config.json does; got {sides}"
        )
    vocab_size = len(state["head.weight"])
    _same_tokenizer(settings, vocab_size, dim, sides)
    steps = settings.take("num_sampling_steps", "8")
    if not steps.isdecimal() or int(steps) < 1:
        raise ValueError(f"reference_config has num_sampling_steps={steps!r}, but a whole number above 0 is read")
    sampling = settings.section("sampling")
    sampling.agree({"more_smooth": False, "final_stage": 0}, "what is read has")
    backbone = {
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_hidden": hidden,
        "qk_norm": "unit" if sharpness else None,
        "modulated": modulated,
        "level_embedding": "waves" if waves else "table",
        "context_norm": "context_norm.weight" in state,
        "norm_epsilon": settings.take("norm_eps", 1e-6),
    }
    head = {
        "width": head_width,
        "depth": head_depth,
        "repeats": settings.take("diffusion_batch_mul", 4),
        "scale": _HEAD_SCALE,
        "solver": {"class_path": "discrete_lit.diffusion.solvers.DDPM", "init_args": {"steps": int(steps)}},
        "denoiser": {
            "class_path": "discrete_lit.diffusion.gaussian.GaussianDenoiser",
            "init_args": {
                "path": {
                    "class_path": "discrete_lit.diffusion.gaussian.ScheduledPath",
                    "init_args": {"schedule": "cosine"},
                },
                "learned_variance": True,
                "clip": 1.0,
            },
        },
    }
    sampler = {
        "guidance_scale": 1 + sampling.take("cfg", 4.5),
        "repeat_last_scale": True,
        "top_k": [min(vocab_size, _TOP_K if number < _LATE_SCALE else _LATE_TOP_K) for number in range(levels)],
        "last_steps": sampling.take("num_maskgit_iters", 1),
    }
    top_p = sampling.optional("top_p", float)
    if top_p:
        sampler["top_p"] = top_p
    config: dict[str, Any] = {
        "class_path": "discrete_lit.generators.HybridNextScale",
        "init_args": {
            "num_classes": 1,
            "context": [length, context],
            "scales": sides,
            "backbone": {"class_path": "discrete_lit.backbones.ScaleTransformer", "init_args": backbone},
            "head": {"class_path": "discrete_lit.backbones.TokenDiffusionHead", "init_args": head},
            "sampler": {"class_path": "discrete_lit.samplers.HybridScaleSampler", "init_args": sampler},
            "label_dropout": settings.take("cond_drop_rate", 0.1),
        },
    }
    return Conversion(
        config=config,
        tensors=arrange(state, _arrangements(heads, sharpness=sharpness)),
        renaming=Renaming(_RULES),
        dropped=("lvl_1L", "attn_bias_for_masking"),
        latents=(dim, sides[-1], sides[-1]),
    )


def _heads(state: State, settings: Settings, width: int) -> int:
    """Return the number of heads, which the sharpness of each tells where there is one.

    Raises:
        ValueError: it does not divide the width into multiples of 4.
    """
    if "blocks.0.attn.scale_mul_1H11" in state:
        heads = state["blocks.0.attn.scale_mul_1H11"].shape[1]
        settings.agree({"num_heads": heads})
        return heads
    heads = settings.take("num_heads", 16)
    if heads < 1 or width % heads or width // heads % 4:
        raise ValueError(
            f"reference_config has num_heads={heads}, which does not divide the {width} channels into multiples of 4"
        )
    return heads


def _same_tokenizer(settings: Settings, vocab_size: int, dim: int, sides: list[int]) -> None:
    """Compare what is said of the tokenizer, which is loaded by itself, with the generator's tensors.

    Raises:
        ValueError: it has other codes or other scales.
    """
    tokenizer = settings.section("tokenizer")
    tokenizer.agree({"vocab_size": vocab_size, "z_channels": dim})
    tokenizer.agree({"v_patch_nums": sides}, "patch_nums has")
    tokenizer.without_effect(
        "the tokenizer is loaded by itself, and compares it",
        *("ch", "ch_mult", "test_mode", "dropout", "beta", "quant_resi", "share_quant_resi", "using_znorm", "levels"),
        *("quant_conv_ks", "default_qresi_counts", "quantizer_type", "hybrid", "double_decoder", "disable_quant_resi"),
        *("freeze_codebook_for_hybrid", *_FILE_KEYS),
    )


def _arrangements(heads: int, *, sharpness: bool) -> list[Arrangement]:
    """Say how the published tensors become ours: one norm of a block is two, and a head's channels stand in pairs."""

    def paired(rows: Tensor) -> Tensor:
        """Put the second half of a head's channels between those of the first."""
        return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    # Without unit vectors the released code divides scores by 4 sqrt(d), which the queries take over.
    weight = 1.0 if sharpness else 0.25

    def queries_and_keys(joined: Tensor) -> list[Tensor]:
        query, key, value = joined.chunk(3)
        return [torch.cat((weight * paired(query), paired(key), value))]

    arrangements = [
        Arrangement(["blocks.{block}.attn.qkv_proj.weight"], ["blocks.{block}.attn.qkv_proj.weight"], queries_and_keys),
        Arrangement(
            ["blocks.{block}.attn.q_bias", "blocks.{block}.attn.v_bias"],
            ["blocks.{block}.attn.query_value_bias"],
            lambda query, value: [torch.stack([weight * paired(query), value])],
        ),
        Arrangement(
            ["blocks.{block}.ln_wo_grad.weight"],
            ["blocks.{block}.ln_of_attention.weight", "blocks.{block}.ln_of_mlp.weight"],
            lambda gain: [gain, gain],
        ),
        must_be_zero("blocks.{block}.attn.zero_k_bias"),
        reorder_chunks("blocks.{block}.ada_lin.1.{rest}", _MODULATION),
        # Published: scale, shift. Ours: shift, scale.
        reorder_chunks("head_nm.ada_lin.1.{rest}", (1, 0)),
    ]
    if sharpness:
        name = "blocks.{block}.attn.scale_mul_1H11"
        arrangements.append(Arrangement([name], [name], lambda logs: [logs[0]]))
    return arrangements
