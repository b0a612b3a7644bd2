"""bytedance/1d-tokenizer: RAR."""

from discrete_lit.pretrained.arranging import Arrangement, cut_rows, reorder_chunks
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.reference import Reference, agree
from discrete_lit.pretrained.registry import Conversion, Tokens, register
from discrete_lit.pretrained.transformers import TIMM_BLOCK, class_count, generator, in_blocks, sampled_by, square

# Rows of the position tables that no sequence reaches.
_SPARE_POSITIONS = 1024
# Guidance, its exponent and the temperature of the published evaluation, by width.
_SAMPLING = {768: (16.0, 2.75, 1.0), 1024: (15.5, 2.5, 1.02), 1280: (6.9, 1.5, 1.02), 1408: (8.0, 1.2, 1.02)}
_RULES = [
    ("token_embedding.table.weight", "embeddings.tokens"),
    ("class_embedding.weight", "embeddings.classes"),
    ("start", "cls_token"),
    ("positions.embedding", "pos_embed"),
    ("target_embedding", "target_aware_pos_embed"),
    ("condition_positions", "timesteps_embeddings"),
    ("head.project.weight", "lm_head.weight"),
    ("head.bias", "lm_head.bias"),
    ("final_modulation.project.{rest}", "adaln_before_head.adaLN_modulation.1.{rest}"),
    ("blocks.{block}.attention.norms.query.{rest}", "blocks.{block}.attn.q_norm.{rest}"),
    ("blocks.{block}.attention.norms.key.{rest}", "blocks.{block}.attn.k_norm.{rest}"),
    ("blocks.{block}.modulation.project.{rest}", "blocks.{block}.adaLN_modulation.1.{rest}"),
    *in_blocks("blocks.{block}", TIMM_BLOCK),
]


@register("rar", marks=("target_aware_pos_embed", "timesteps_embeddings", "lm_head.weight"), section="generator")
def rar(state: State, reference: Reference) -> Conversion:
    """`rar_{b,l,xl,xxl}.bin`."""
    vocab_size, width = state["lm_head.weight"].shape
    ids = vocab_size + 1
    num_classes = class_count(state, state["embeddings.weight"], ids)
    places = state["pos_embed"].shape[1] - _SPARE_POSITIONS
    depth, hidden = state.count("blocks.{}"), len(state["blocks.0.mlp.fc1.bias"])
    found = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "intermediate_size": hidden,
        "image_seq_len": places,
        "condition_num_classes": num_classes,
    }
    agree(reference, found)
    backbone = {
        "width": width,
        "depth": depth,
        "heads": reference.get("num_attention_heads", 16),
        "mlp_hidden": hidden,
        "norm_affine": True,
        "conditioning": "prefix_adaln",
        "condition_positions": True,
        "target_positions": True,
        "registers": 1,
        "qk_norm": "layer",
    }
    guidance_scale, guidance_power, temperature = _SAMPLING.get(width, (1.0, 1.0, 1.0))
    sampler = sampled_by(
        "RasterSampler",
        temperature=temperature,
        guidance_scale=guidance_scale,
        guidance_schedule="power_cosine",
        guidance_power=guidance_power,
    )
    arrangements = [
        # The mask id between them is never read.
        cut_rows(
            "embeddings.weight",
            {"embeddings.tokens": (0, vocab_size), "embeddings.classes": (ids, ids + num_classes + 1)},
        ),
        Arrangement(["pos_embed"], ["pos_embed"], lambda table: [table[:, : places + 2]]),
        Arrangement(["target_aware_pos_embed"], ["target_aware_pos_embed"], lambda table: [table[0, 2 : places + 2]]),
        Arrangement(["timesteps_embeddings"], ["timesteps_embeddings"], lambda table: [table[0, : places + 1]]),
        # Scale, shift.
        reorder_chunks("adaln_before_head.adaLN_modulation.1.{rest}", (1, 0)),
    ]
    # The norm before the head has no gain of its own: ones and zeros.
    return generator(
        "Autoregressive",
        state,
        Tokens(vocab_size, square(state, places)),
        num_classes,
        backbone,
        _RULES,
        arrangements,
        kept=("final_norm.*",),
        order="random_annealed",
        sampler=sampler,
    )
