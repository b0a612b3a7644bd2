"""BAR, of amazon-far/BAR: ids in turn, the bits of each unmasked by a head."""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.backbones.embeddings import grid_coordinates, rotary_table
from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, cut_rows, register, reorder_chunks
from discrete_lit.pretrained.layouts import (
    IN_TRAINING,
    class_count,
    generator_conversion,
    head_count,
    in_blocks,
    sampled_by,
    square,
)
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

# Rows of the tables of positions and of modulations beyond those of the tokens, most of which no sequence reaches.
_SPARE_POSITIONS, _SPARE_STEPS = 128, 100
# Ids of bits, the mask among them, stand before the classes in their table.
_IDS_BEFORE_CLASSES = 3
_MOST_BITS = 62
# Guidance scale and temperature of the published evaluation, by width; bits that are unmasked in each step.
_EVALUATION = {768: (5.0, 2.5), 1024: (5.3, 3.0)}
_ALLOCATION = {16: [2, 2, 5, 7]}
_SWIGLU = [("mlp.expand.{rest}", "mlp.w12.{rest}"), ("mlp.contract.{rest}", "mlp.w3.{rest}")]
_BLOCK = [
    ("attention.query_key_value.{rest}", "attn.qkv.{rest}"),
    ("attention.out.{rest}", "attn.proj.{rest}"),
    ("attention.norms.query.{rest}", "attn.q_norm.{rest}"),
    ("attention.norms.key.{rest}", "attn.k_norm.{rest}"),
    ("attention_norm.{rest}", "norm1.{rest}"),
    ("mlp_norm.{rest}", "norm2.{rest}"),
    ("modulation.project.{rest}", "adaLN_modulation.1.{rest}"),
    *_SWIGLU,
]
_HEAD = [
    ("hidden_norm.weight", "norm.weight"),
    ("hidden_projection.{rest}", "latent_condition_proj.{rest}"),
    ("bit_embedding.weight", "lm_head.input_embed.weight"),
    ("input_projection.{rest}", "lm_head.input_proj.{rest}"),
    ("input_norm.{rest}", "lm_head.ln_pre.{rest}"),
    ("ratio_embedding.frequencies", "lm_head.t_embedder.W"),
    ("ratio_embedding.layers.{layer}.{rest}", "lm_head.t_embedder.mlp.{layer}.{rest}"),
    ("last.norm.weight", "lm_head.adaln_before_head.norm_final.weight"),
    ("last.modulation.project.{rest}", "lm_head.adaln_before_head.adaLN_modulation.1.{rest}"),
    ("output.project.weight", "lm_head.output_embed.weight"),
    ("output.bias", "lm_head.output_embed.bias"),
]
_HEAD_BLOCK = [
    ("norm.{rest}", "in_ln.{rest}"),
    ("modulation.project.{rest}", "adaLN_modulation.1.{rest}"),
    *_SWIGLU,
]
_RULES = [
    ("token_embedding.table.weight", "input_embeddings.weight"),
    ("token_embedding.project.{rest}", "input_merge.{rest}"),
    ("class_embedding.weight", "embeddings.weight"),
    ("start", "cls_token"),
    ("positions.embedding", "pos_embed"),
    ("target_embedding", "target_aware_pos_embed"),
    ("condition_positions", "timesteps_embeddings"),
    *in_blocks("blocks.{block}", _BLOCK),
    *((f"place_head.{own}", theirs) for own, theirs in _HEAD),
    *in_blocks("lm_head.transformer.{block}", _HEAD_BLOCK, ours="place_head.blocks.{block}"),
]


@register(
    "bar",
    marks=("lm_head.t_embedder.W", "target_aware_pos_embed", "input_merge.weight", "latent_condition_proj.weight"),
    section="generator",
)
def bar(state: State, settings: Settings) -> Conversion:
    """Convert `generator/bar_b.bin`, `bar_l.bin` or `bar_l_res512.bin`.

    Channel i of its FSQ is bit i of an id. `bar_b_patch2.bin` and `bar_b_patch4.bin` predict the bits of several codes
    at a place, more than an id holds, and are refused. How often the class stands in front is read from the tables.
    """
    width = state["cls_token"].shape[-1]
    bits = len(state["lm_head.output_embed.bias"]) // 2
    length = state["pos_embed"].shape[1] - _SPARE_POSITIONS
    repeats = len(state["blocks.0.attn.rope.freqs_cos"]) - length - 1
    num_classes = class_count(state, state["embeddings.weight"], _IDS_BEFORE_CLASSES)
    depth, head_depth = state.count("blocks.{}"), state.count("lm_head.transformer.{}")
    head_width, hidden = len(state["latent_condition_proj.bias"]), state["blocks.0.mlp.w3.weight"].shape[1]
    if bits > _MOST_BITS:
        raise ValueError(
            f"{state.source!r} predicts {bits} bits at a place, but an id has at most {_MOST_BITS}: models of patches "
            "of several codes are not read"
        )
    if repeats < 1:
        raise ValueError(f"{state.source!r} has no rotation for a class in front of its {length} tokens")
    heads = head_count(settings, "num_attention_heads", 16 if width >= 1024 else 12, width)
    settings.agree(
        {
            "hidden_size": width,
            "num_hidden_layers": depth,
            "image_seq_len": length,
            "condition_num_classes": num_classes,
            "repeat_class_condition": repeats,
        }
    )
    settings.agree({"target_codebook_size": 2, "patch_size": 1}, "every model that is read has")
    head = settings.section("mbm_head")
    head.agree({"width": head_width, "num_layers": head_depth})
    tokenizer = settings.section("vq_model")
    tokenizer.agree({"token_size": bits})
    tokenizer.without_effect("the tokenizer is loaded by itself", "codebook_size", "quantize_mode", "in_channel")
    settings.without_effect(IN_TRAINING, "dropout", "attn_drop", "use_checkpoint")
    sampling = settings.section("sampling")
    scale, temperature = _EVALUATION.get(width, (1.0, 1.0))
    allocation = sampling.take("tokens_allocation", _ALLOCATION.get(bits, [1] * bits))
    backbone: dict[str, Any] = {
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_hidden": hidden,
        "mlp": "swiglu",
        "norm": "rms",
        "norm_affine": True,
        "positions": "learned_rope_2d",
        "target_positions": "all",
        "target_rotations": True,
        "token_embedding": "bit_table",
        "conditioning": "prefix_adaln",
        "class_repeats": repeats,
        "condition_positions": True,
        "registers": 1,
        "qk_norm": "rms",
        "place_head": {
            "class_path": "discrete_lit.backbones.MaskedBitHead",
            "init_args": {"width": head_width, "depth": head_depth, "told_ratio": "drawn"},
        },
    }
    grid = square(state, length)
    starts = 1 + repeats

    def check_rotations(*tables: Tensor) -> list[Tensor]:
        turned = rotary_table(grid_coordinates(grid), width // heads).repeat_interleave(2, dim=1)
        expected = torch.cat((torch.tensor((1.0, 0.0)).expand(starts, turned.shape[1], 2), turned))
        if not all(
            table.shape == expected.shape[:2] and torch.allclose(table.float(), expected[..., part], atol=1e-4)
            for part, table in enumerate(tables)
        ):
            raise ValueError(f"{state.source!r} has other rotations than those of the places of {grid}")
        return []

    def one_table(first: int, count: int) -> Any:
        return lambda table: [table[0, first : first + count]]

    arrangements = [
        Arrangement([f"blocks.{{block}}.attn.rope.freqs_{part}" for part in ("cos", "sin")], [], check_rotations),
        cut_rows("embeddings.weight", {"embeddings.weight": (_IDS_BEFORE_CLASSES, len(state["embeddings.weight"]))}),
        # The mask stands in no input.
        cut_rows("input_embeddings.weight", {"input_embeddings.weight": (0, 2)}),
        Arrangement(["pos_embed"], ["pos_embed"], lambda table: [table[:, : starts + length]]),
        Arrangement(["target_aware_pos_embed"], ["target_aware_pos_embed"], one_table(starts, length)),
        # The last element is never read.
        Arrangement(["timesteps_embeddings"], ["timesteps_embeddings"], one_table(0, starts + length - 1)),
        # Published: scale, shift. Ours: shift, scale.
        reorder_chunks("lm_head.adaln_before_head.adaLN_modulation.1.{rest}", (1, 0)),
    ]
    return generator_conversion(
        "Autoregressive",
        state,
        tokens=Tokens(2**bits, grid),
        num_classes=num_classes,
        backbone=backbone,
        rules=_RULES,
        arrangements=arrangements,
        order="random_annealed",
        sampler=sampled_by(
            "BARSampler",
            bit_counts=allocation,
            choice_temperature=sampling.take("randomize_temperature_noisy", temperature),
            # Below 1 the code does not guide.
            guidance_scale=max(1.0, sampling.take("guidance_scale", scale)),
            guidance_schedule="linear",
        ),
        label_dropout=settings.take("class_label_dropout", 0.1),
    )
