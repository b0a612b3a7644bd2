"""RandAR, of ziqipang/RandAR: LlamaGen's transformer in random orders, with an instruction before each token."""

from discrete_lit.pretrained.conversion import Conversion, Tokens, register
from discrete_lit.pretrained.layouts import (
    IN_TRAINING,
    class_count,
    generator_conversion,
    given_length,
    head_count,
    in_blocks,
    sampled_by,
    square,
)
from discrete_lit.pretrained.llamagen import LLAMA_BLOCK, check_hidden
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

_PUBLISHED_LENGTH = 256
_RULES = [
    ("token_embedding.table.weight", "tok_embeddings.weight"),
    ("class_embedding.weight", "cls_embedding.embedding_table.weight"),
    ("instructions.vector", "pos_instruct_embeddings"),
    *in_blocks("layers.{block}", LLAMA_BLOCK),
    ("final_norm.weight", "norm.weight"),
    ("head.project.weight", "output.weight"),
]


@register("randar", marks=("pos_instruct_embeddings", "tok_embeddings.weight", "cls_embedding.embedding_table.weight"))
def randar(state: State, settings: Settings) -> Conversion:
    """Convert `randar_{0.3b,0.7b}_llamagen_360k_bs_1024_lr_0.0004.safetensors`.

    Nothing in the file tells the number of tokens, 256 but for another `block_size` in the reference configuration.
    """
    vocab_size, width = state["tok_embeddings.weight"].shape
    classes = class_count(state, state["cls_embedding.embedding_table.weight"])
    depth, hidden = state.count("layers.{}"), len(state["layers.0.feed_forward.w1.weight"])
    settings.agree({"vocab_size": vocab_size, "dim": width, "n_layer": depth, "num_classes": classes})
    settings.agree({"cls_token_num": 1, "model_type": "c2i"}, "the published models have")
    settings.agree({"n_kv_head": None}, "the published models have")
    order = settings.take("position_order", "random", ("random", "raster"))
    settings.without_effect(
        IN_TRAINING,
        *("token_dropout_p", "attn_dropout_p", "resid_dropout_p", "ffn_dropout_p", "drop_path_rate"),
        *("initializer_range", "grad_checkpointing", "zero_class_qk"),
    )
    heads = head_count(settings, "n_head", max(1, width // 64), width)
    check_hidden(settings, width, hidden)
    length = given_length(settings, _PUBLISHED_LENGTH)
    rotary_base = settings.take("rope_base", 10000.0)
    steps = settings.take("num_inference_steps", min(88, length))
    # -1 is a token at a step.
    return generator_conversion(
        "Autoregressive",
        state,
        tokens=Tokens(vocab_size, square(state, length)),
        num_classes=classes,
        backbone={
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_hidden": hidden,
            "mlp": "swiglu",
            "norm": "rms",
            "norm_epsilon": settings.take("norm_eps", 1e-5),
            "positions": "rope_2d",
            "start_rotation": "zero",
            "position_instructions": True,
            "bias": False,
            **({} if rotary_base == 10000 else {"rotary_base": rotary_base}),
        },
        rules=_RULES,
        dropped=("freqs_cis*", "causal_mask", "layers.*.attention.kv_cache.*"),
        order="random",
        sampler=sampled_by(
            "RandARSampler",
            steps=None if steps < 1 else steps,
            order=order,
            guidance_scale=4.0,
        ),
        label_dropout=settings.take("class_dropout_prob", 0.1),
    )
