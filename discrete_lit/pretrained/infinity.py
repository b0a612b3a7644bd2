"""Infinity, of FoundationVision/Infinity: `infinity`, bitwise next-scale prediction from text."""

import re
from typing import Any

import torch
from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, must_be_zero, register, reorder_chunks
from discrete_lit.pretrained.layouts import IN_TRAINING, generator_conversion, in_blocks, sampled_by
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

# Sides of the scales of square images, by the name of their area: 256, 512 and 1024 pixels.
_SCALES = {
    "0.06M": (1, 2, 4, 6, 8, 12, 16),
    "0.25M": (1, 2, 4, 6, 8, 12, 16, 20, 24, 32),
    "1M": (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64),
}
# Published: both gates, both scales, both shifts. Ours: shift, scale and gate of the attention, then of the MLP.
_MODULATION = (4, 2, 0, 5, 3, 1)
# Of published tokenizers.
_MOST_BITS = 32
_GATED = "blocks.{block}.ffn.fcg.weight"
_BLOCK = [
    ("attention.query_key_value.weight", "sa.mat_qkv.weight"),
    ("attention.query_value_bias", "sa.query_value_bias"),
    ("attention.norms.log_sharpness", "sa.scale_mul_1H11"),
    ("attention.out.{rest}", "sa.proj.{rest}"),
    ("context_norm.{rest}", "ca_norm.{rest}"),
    ("context_attention.query.{rest}", "ca.mat_q.{rest}"),
    ("context_attention.key_value.{rest}", "ca.mat_kv.{rest}"),
    ("context_attention.null", "ca.null"),
    ("context_attention.out.{rest}", "ca.proj.{rest}"),
    ("mlp.contract.{rest}", "ffn.fc2.{rest}"),
    ("modulation.project.{rest}", "ada_lin.1.{rest}"),
    ("modulation_offset", "ada_gss"),
]
_IN_CHUNKS = re.compile(r"block_chunks\.(\d+)\.(?:module\.)?(\d+)\.(.+)")
_RULES = [
    ("token_embedding.project.{rest}", "word_embed.{rest}"),
    ("context_pool.norm.weight", "text_norm.weight"),
    ("context_pool.query", "text_proj_for_sos.ca.mat_q"),
    ("context_pool.key_value.{rest}", "text_proj_for_sos.ca.mat_kv.{rest}"),
    ("context_pool.out.{rest}", "text_proj_for_sos.ca.proj.{rest}"),
    ("context_pool.expand.{rest}", "text_proj_for_ca.0.{rest}"),
    ("context_pool.contract.{rest}", "text_proj_for_ca.2.{rest}"),
    ("context_pool.null", "cfg_uncond"),
    ("positions.start", "pos_start"),
    ("positions.level_embedding.weight", "lvl_embed.weight"),
    ("shared_modulation.project.{rest}", "shared_ada_lin.1.{rest}"),
    ("final_modulation.project.{rest}", "head_nm.ada_lin.1.{rest}"),
    ("head.project.weight", "head.weight"),
    ("head.bias", "head.bias"),
]


@register(
    "infinity",
    marks=("word_embed.weight", "text_proj_for_sos.ca.mat_q", "lvl_embed.weight", "cfg_uncond"),
    wrappers=("trainer.gpt_fsdp", "gpt_fsdp"),
    section=None,
)
def infinity(state: State, settings: Settings) -> Conversion:
    """Convert `infinity_125M_256x256.pth` or `infinity_2b_reg.pth`.

    It is given T5's hidden states of a text, and models the ids of square images of 256 x 256 pixels; `pn` in the
    reference configuration chooses another area, or `scales` lists height and width of each. Its tokenizer is another
    file that has no family here: without it the generator draws ids.
    """
    state = _in_blocks(state)
    model, vae = settings.section("model"), settings.section("vae")
    width, bits = state["word_embed.weight"].shape
    depth, (places, text_dim) = state.count("blocks.{}"), state["cfg_uncond"].shape
    swiglu, shared = _GATED.format(block=0) in state, "shared_ada_lin.1.weight" in state
    cosine = "blocks.0.sa.scale_mul_1H11" in state
    if not cosine or "head_nm.ada_lin.1.weight" not in state or "head.weight" not in state:
        raise ValueError(
            f"{state.source!r} has no scale_mul_1H11, no modulation before its logits, or logits of two layers: what "
            "is read has cos_attn, head_aln and head_depth=1"
        )
    sharpness = state["blocks.0.sa.scale_mul_1H11"]
    heads = sharpness.numel()
    if len(state["head.weight"]) != 2 * bits:
        raise ValueError(f"{state.source!r} has {len(state['head.weight'])} logits for {bits} bits: 2 of each are read")
    if bits > _MOST_BITS and "apply_spatial_patchify" not in model:
        raise ValueError(
            f"{state.source!r} has {bits} bits, which may be those of four places together (8B): say "
            "model.apply_spatial_patchify in reference_config; 0 is read"
        )
    vae.agree({"codebook_dim": bits})
    hidden = len(state["blocks.0.ffn.fc1.weight"])
    model.agree(
        {
            "text_channels": text_dim,
            "text_maxlen": places,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "shared_aln": shared,
            "head_aln": True,
            "cos_attn": True,
            "swiglu": swiglu,
            "head_depth": 1,
        }
    )
    model.agree(
        {
            "nm0": False,
            "use_bit_label": 1,
            "add_lvl_embeding_only_first_block": 1,
            "rope2d_each_sa_layer": 1,
            "rope2d_normalized_by_hw": 2,
            "apply_spatial_patchify": 0,
            "video_frames": 1,
        },
        "what is read has",
    )
    ratio = round(width * model.take("mlp_ratio", 4.0) / 256) * 256
    if hidden != (round(2 * ratio / 3 / 256) * 256 if swiglu else ratio):
        raise ValueError(f"reference_config has model.mlp_ratio, with which the MLP has other than {hidden} channels")
    model.without_effect("the tensors tell the width that it is rounded to", "mlp_ratio")
    model.without_effect(IN_TRAINING, "rand_uncond", "drop_rate", "drop_path_rate", "checkpointing", "batch_size")
    model.without_effect(
        "they say how it is computed, and how the tensors lie in the file",
        *("fused_norm", "block_chunks", "customized_flash_attn", "fused_mlp", "use_flex_attn", "pad_to_multiplier"),
        *("inference_mode", "train_h_div_w_list", "always_training_scales", "cross_attn_layer_scale"),
    )
    scales = _scales(settings, model, len(state["lvl_embed.weight"]))
    sampling = settings.section("sampling")
    sampling.agree({"cfg_insertion_layer": [0]}, "what is read has")
    length = sum(height * wide for height, wide in scales)
    backbone: dict[str, Any] = {
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_hidden": hidden,
        "mlp": "swiglu" if swiglu else "gelu_tanh",
        "norm": "rms" if model.take("rms_norm", False) else "layer",
        "norm_epsilon": model.take("norm_eps", 1e-6),
        "positions": "rope_scales",
        "conditioning": "prefix_adaln",
        "shared_modulation": shared,
        "qk_norm": "unit",
        "attention_bias": "query_value",
        "bias": not swiglu,
        "out_bias": True,
        "norm_bias": True,
        "head_bias": True,
        "context_dim": text_dim,
        "context_pool": [places, _pooling_heads(text_dim, width)],
        "context_bias": True,
    }
    mlp = ("mlp.expand.weight", "ffn.{fcg|fc1}.weight") if swiglu else ("mlp.expand.{rest}", "ffn.fc1.{rest}")
    return generator_conversion(
        "BitwiseNextScale",
        state,
        tokens=Tokens(2**bits, (length,)),
        num_classes=1,
        backbone=backbone,
        rules=[*_RULES, *in_blocks("blocks.{block}", [*_BLOCK, mlp])],
        arrangements=_arrangements(state, len(scales), width),
        scales=[list(size) for size in scales],
        sampler=sampled_by(
            "NextScaleSampler",
            guidance_scale=sampling.take("cfg", 4.0),
            guidance_schedule="constant",
            temperature=sampling.take("tau", 0.5),
            top_p=0.97,
        ),
        label_dropout=model.take("cond_drop_rate", 0.1),
    )


def _in_blocks(state: State) -> State:
    """Number the blocks one after another, which most files have in chunks of as many each.

    Their names are `block_chunks.0.module.0`, of which `module` is left out where a file is read.
    """
    found = {name: _IN_CHUNKS.fullmatch(name) for name in state}
    each = 1 + max((int(name[2]) for name in found.values() if name), default=0)
    renamed = {
        name: f"blocks.{int(parts[1]) * each + int(parts[2])}.{parts[3]}" if parts else name
        for name, parts in found.items()
    }
    return State({renamed[name]: value for name, value in state.items()}, state.source)


def _pooling_heads(text_dim: int, width: int) -> int:
    """Return the heads of the attention that pools a text: of 128 channels of the text each, 64 in wide models."""
    return text_dim // (64 if width > 4096 else 128)


def _scales(settings: Settings, model: Settings, most: int) -> list[tuple[int, int]]:
    """Return height and width of each scale.

    Raises:
        ValueError: an area that is not known, or scales of other than one frame, or more than the file tells apart.
    """
    area, given = model.take("pn", "0.06M"), settings.take("scales", [])
    if not given:
        if area not in _SCALES:
            raise ValueError(
                f"reference_config has model.pn={area!r}: {', '.join(_SCALES)} are known; give scales for others"
            )
        given = [(1, side, side) for side in _SCALES[area]]
    else:
        model.without_effect("scales say what an area stands for", "pn")
    if any(not isinstance(size, list | tuple) or len(size) != 3 or size[0] != 1 for size in given) or len(given) > most:
        raise ValueError(
            f"reference_config has scales={given}: at most {most} of [1, height, width], one frame, are read"
        )
    return [(height, width) for _, height, width in given]


def _arrangements(state: State, scales: int, width: int) -> list[Arrangement]:
    block = "blocks.{block}"

    def keys_and_values(prefix: str) -> Arrangement:
        """Join the biases of keys, which are 0, and values."""
        return Arrangement(
            [f"{prefix}.zero_k_bias", f"{prefix}.v_bias"],
            [f"{prefix}.mat_kv.bias"],
            lambda zero, value: [torch.cat((zero, value))],
        )

    made = [
        Arrangement(["lvl_embed.weight"], ["lvl_embed.weight"], lambda levels: [levels[:scales]]),
        Arrangement(["pos_start"], ["pos_start"], lambda start: [start.flatten(0, 1)]),
        Arrangement(
            ["text_proj_for_sos.ca.mat_q"], ["text_proj_for_sos.ca.mat_q"], lambda query: [query.reshape(1, width)]
        ),
        Arrangement(
            [f"{block}.sa.q_bias", f"{block}.sa.v_bias"],
            [f"{block}.sa.query_value_bias"],
            lambda query, value: [torch.stack([query, value])],
        ),
        must_be_zero(f"{block}.sa.zero_k_bias"),
        Arrangement(
            [f"{block}.sa.scale_mul_1H11"], [f"{block}.sa.scale_mul_1H11"], lambda logs: [logs.reshape(-1, 1, 1)]
        ),
        # Its null vector is never seen: the table stands for a text that is dropped.
        Arrangement(
            [f"{block}.ca.proj.bias"],
            [f"{block}.ca.proj.bias", f"{block}.ca.null"],
            lambda bias: [bias, _nothing(bias)],
        ),
        reorder_chunks(f"{block}.ada_lin.1.{{rest}}", _MODULATION),
        reorder_chunks("shared_ada_lin.1.{rest}", _MODULATION),
        Arrangement([f"{block}.ada_gss"], [f"{block}.ada_gss"], lambda chunks: [chunks[0, 0, list(_MODULATION)]]),
        # Published: scale, shift. Ours: shift, scale.
        reorder_chunks("head_nm.ada_lin.1.{rest}", (1, 0)),
    ]
    made += [keys_and_values("text_proj_for_sos.ca"), keys_and_values(f"{block}.ca")]
    if "blocks.0.ca_gamma" in state:
        made.append(
            Arrangement(
                [f"{block}.ca_gamma", f"{block}.ca.proj.weight", f"{block}.ca.proj.bias"],
                [f"{block}.ca.proj.weight", f"{block}.ca.proj.bias"],
                lambda gamma, weight, bias: [gamma[:, None] * weight, gamma * bias],
            )
        )
    return made


def _nothing(like: Tensor) -> Tensor:
    return like.new_zeros(1, len(like))
