"""bytedance/1d-tokenizer: the masked generators of TiTok's tokens, a BERT and a U-ViT."""

from typing import Any

from torch import Tensor

from discrete_lit.pretrained.arranging import Arrangement, cut_rows
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.reference import Reference, agree
from discrete_lit.pretrained.registry import Conversion, Tokens, register
from discrete_lit.pretrained.transformers import TIMM_BLOCK, Rules, class_count, generator, in_blocks, sampled_by

# Of the published evaluation, by the number of tokens.
_SAMPLING: dict[int, dict[str, Any]] = {
    32: {"steps": 8, "choice_temperature": 9.5, "guidance_scale": 5.5, "guidance_schedule": "linear"},
    64: {"steps": 8, "choice_temperature": 11.0, "guidance_scale": 4.0, "guidance_schedule": "linear"},
    128: {
        "steps": 64,
        "choice_temperature": 2.8,
        "guidance_scale": 6.9,
        "guidance_schedule": "power_cosine",
        "guidance_power": 3.0,
    },
}
_EMBEDDINGS = [
    ("token_embedding.table.weight", "embeddings.tokens"),
    ("class_embedding.weight", "embeddings.classes"),
]
_BERT_BLOCK = [
    ("attention.query_key_value.{rest}", "attention.self.{query|key|value}.{rest}"),
    ("attention.out.{rest}", "attention.output.dense.{rest}"),
    ("attention_norm.{rest}", "attention.output.LayerNorm.{rest}"),
    ("mlp.expand.{rest}", "intermediate.dense.{rest}"),
    ("mlp.contract.{rest}", "output.dense.{rest}"),
    ("mlp_norm.{rest}", "output.LayerNorm.{rest}"),
]
_BERT = [
    *_EMBEDDINGS,
    ("positions.embedding", "positions"),
    ("embedding_norm.{rest}", "model.embeddings.LayerNorm.{rest}"),
    *in_blocks("model.encoder.layer.{block}", _BERT_BLOCK),
    ("head.project.weight", "model.lm_head.weight"),
    ("head.bias", "model.lm_head.bias"),
]


@register(
    "titok_imagebert",
    marks=("model.embeddings.word_embeddings.weight", "model.lm_head.weight"),
    section="generator",
)
def titok_imagebert(state: State, reference: Reference) -> Conversion:
    """`generator_titok_{l32,b64}.bin`."""
    embedding, positions = "model.embeddings.word_embeddings.weight", "model.embeddings.position_embeddings.weight"
    layer = "model.encoder.layer"
    hidden = len(state[f"{layer}.0.intermediate.dense.bias"])
    backbone = {"norm_epsilon": 1e-12, "norm_first": False, "embedding_norm": True}
    return _masked(
        state,
        reference,
        (embedding, "model.lm_head.weight"),
        len(state[positions]) - 1,
        state.count(f"{layer}.{{}}"),
        hidden,
        backbone,
        _BERT,
        # Every element has the first of two types.
        [
            Arrangement(
                [positions, "model.embeddings.token_type_embeddings.weight"],
                ["positions"],
                lambda table, types: [(table + types[0])[None]],
            )
        ],
        dropped=("model.embeddings.position_ids",),
    )


@register(
    "titok_uvitbert", marks=("embeddings.weight", "mid_block.norm1.weight", "lm_head.weight"), section="generator"
)
def titok_uvitbert(state: State, reference: Reference) -> Conversion:
    """`generator_titok_s128.bin`."""
    half = state.count("in_blocks.{}")
    rules = [
        *_EMBEDDINGS,
        ("positions.embedding", "pos_embed"),
        *(rule for block in range(half) for rule in in_blocks(f"in_blocks.{block}", TIMM_BLOCK, f"blocks.{block}")),
        *in_blocks("mid_block", TIMM_BLOCK, f"blocks.{half}"),
        *(
            rule
            for block in range(half)
            for rule in in_blocks(f"out_blocks.{block}", TIMM_BLOCK, f"blocks.{half + 1 + block}")
        ),
        ("skips.{block}.{rest}", "out_blocks.{block}.skip_linear.{rest}"),
        ("final_norm.{rest}", "norm.{rest}"),
        ("head.project.weight", "lm_head.weight"),
        ("head.bias", "lm_head.bias"),
    ]
    return _masked(
        state,
        reference,
        ("embeddings.weight", "lm_head.weight"),
        state["pos_embed"].shape[1] - 1,
        2 * half + 1,
        len(state["mid_block.mlp.fc1.bias"]),
        {"norm_epsilon": 1e-5, "attention_bias": "none", "long_skips": True},
        rules,
    )


def _masked(
    state: State,
    reference: Reference,
    names: tuple[str, str],
    places: int,
    depth: int,
    hidden: int,
    switches: dict[str, Any],
    rules: Rules,
    arrangements: list[Arrangement] | None = None,
    dropped: tuple[str, ...] = (),
) -> Conversion:
    """Of `names` of the embeddings of ids, mask and classes, and of the logits."""
    table: Tensor = state[names[0]]
    vocab_size, width = state[names[1]].shape
    ids = vocab_size + 1
    num_classes = class_count(state, table, ids)
    found = {
        "hidden_size": width,
        "intermediate_size": hidden,
        "image_seq_len": places,
        "condition_num_classes": num_classes,
    }
    # The reference's even number leaves out the middle block of a U-ViT.
    layers = reference.get("num_hidden_layers", depth)
    agree(reference, found)
    if layers not in (depth, depth - int("long_skips" in switches)):
        raise ValueError(f"reference_config has num_hidden_layers={layers}, but the tensors have {depth}")
    backbone = {
        "width": width,
        "depth": depth,
        "heads": reference.get("num_attention_heads", 16),
        "mlp_hidden": hidden,
        **switches,
    }
    rows = cut_rows(names[0], {"embeddings.tokens": (0, ids), "embeddings.classes": (ids, ids + num_classes + 1)})
    return generator(
        "Masked",
        state,
        Tokens(vocab_size, (places,)),
        num_classes,
        backbone,
        rules,
        [rows, *(arrangements or [])],
        dropped,
        sampler=sampled_by(
            "TiTokSampler", **_SAMPLING.get(places, {"steps": min(8, places)}), temperature_annealing=True
        ),
    )
