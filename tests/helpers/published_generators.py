"""Names and shapes of published generators, written by hand."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
Sizes = dict[str, int]


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def norm(name: str, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (width,), **({f"{name}.bias": (width,)} if bias else {})}


def timm_block(name: str, width: int, hidden: int, bias: bool = True) -> Shapes:
    return {
        **norm(f"{name}.norm1", width),
        **linear(f"{name}.attn.qkv", width, 3 * width, bias),
        **linear(f"{name}.attn.proj", width, width),
        **norm(f"{name}.norm2", width),
        **linear(f"{name}.mlp.fc1", width, hidden),
        **linear(f"{name}.mlp.fc2", hidden, width),
    }


def ddit(width: int, depth: int, condition_width: int, rows: int) -> Shapes:
    """Of SEDD, MDLM and GIDD, in the order of the reference's modules."""
    made: Shapes = {
        "vocab_embed.embedding": (rows, width),
        **linear("sigma_map.mlp.0", 256, condition_width),
        **linear("sigma_map.mlp.2", condition_width, condition_width),
        "rotary_emb.inv_freq": (width // 4,),
    }
    for name in (f"blocks.{block}" for block in range(depth)):
        made |= {f"{name}.norm1.weight": (width,)}
        made |= linear(f"{name}.attn_qkv", width, 3 * width, False) | linear(f"{name}.attn_out", width, width, False)
        made |= {f"{name}.norm2.weight": (width,)}
        made |= linear(f"{name}.mlp.0", width, 4 * width) | linear(f"{name}.mlp.2", 4 * width, width)
        made |= linear(f"{name}.adaLN_modulation", condition_width, 6 * width)
    made |= {"output_layer.norm_final.weight": (width,)}
    made |= linear("output_layer.linear", width, rows)
    return made | linear("output_layer.adaLN_modulation", condition_width, 2 * width)


def llamagen_gpt_c2i(width: int, depth: int, hidden: int, ids: int, classes: int) -> Shapes:
    shapes: Shapes = {
        "tok_embeddings.weight": (ids, width),
        "cls_embedding.embedding_table.weight": (classes + 1, width),
        "norm.weight": (width,),
        "output.weight": (ids, width),
    }
    for name in (f"layers.{layer}" for layer in range(depth)):
        shapes |= linear(f"{name}.attention.wqkv", width, 3 * width, False)
        shapes |= linear(f"{name}.attention.wo", width, width, False)
        shapes |= linear(f"{name}.feed_forward.w1", width, hidden, False)
        shapes |= linear(f"{name}.feed_forward.w2", hidden, width, False)
        shapes |= linear(f"{name}.feed_forward.w3", width, hidden, False)
        shapes |= {f"{name}.attention_norm.weight": (width,), f"{name}.ffn_norm.weight": (width,)}
    return shapes


def rar(width: int, depth: int, hidden: int, ids: int, classes: int, places: int, heads: int) -> Shapes:
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "embeddings.weight": (ids + classes + 2, width),
        "pos_embed": (1, places + 1024, width),
        "target_aware_pos_embed": (1, places + 1024, width),
        "timesteps_embeddings": (1, places + 100, width),
        **linear("adaln_before_head.adaLN_modulation.1", width, 2 * width),
        **linear("lm_head", width, ids),
    }
    for name in (f"blocks.{layer}" for layer in range(depth)):
        shapes |= timm_block(name, width, hidden) | linear(f"{name}.adaLN_modulation.1", width, 6 * width)
        shapes |= norm(f"{name}.attn.q_norm", width // heads) | norm(f"{name}.attn.k_norm", width // heads)
    return shapes


def halton_maskgit(width: int, depth: int, hidden: int, ids: int, classes: int, places: int, heads: int) -> Shapes:
    inner = width // heads * heads
    shapes: Shapes = {
        "tok_emb.weight": (ids + 1, width),
        "cls_emb.weight": (classes + 1, width),
        "pos_emb.weight": (places, width),
        "reg_tokens.weight": (1, width),
        **norm("last_norm.norm_final", width),
        **linear("last_norm.mlp.1", width, 2 * width),
        **linear("head", width, ids + 1),
    }
    for name in (f"transformer.layers.{layer}" for layer in range(depth)):
        shapes |= linear(f"{name}.mlp.1", width, 6 * width)
        shapes |= {f"{name}.ln1.weight": (width,), f"{name}.ln2.weight": (width,)}
        shapes |= {f"{name}.attn.w{part}.weight": (inner, width) for part in "qkv"}
        shapes |= linear(f"{name}.attn.wo", inner, width, False)
        shapes |= linear(f"{name}.ff.w1", width, hidden, False) | linear(f"{name}.ff.w3", width, hidden, False)
        shapes |= linear(f"{name}.ff.w2", hidden, width, False)
    return shapes


def titok_imagebert(width: int, depth: int, hidden: int, ids: int, classes: int, places: int) -> Shapes:
    embeddings = "model.embeddings"
    shapes: Shapes = {
        f"{embeddings}.word_embeddings.weight": (ids + classes + 2, width),
        f"{embeddings}.position_embeddings.weight": (places + 1, width),
        f"{embeddings}.token_type_embeddings.weight": (2, width),
        **norm(f"{embeddings}.LayerNorm", width),
        **linear("model.lm_head", width, ids),
    }
    for name in (f"model.encoder.layer.{layer}" for layer in range(depth)):
        for part in ("query", "key", "value"):
            shapes |= linear(f"{name}.attention.self.{part}", width, width)
        shapes |= linear(f"{name}.attention.output.dense", width, width)
        shapes |= norm(f"{name}.attention.output.LayerNorm", width) | norm(f"{name}.output.LayerNorm", width)
        shapes |= linear(f"{name}.intermediate.dense", width, hidden) | linear(f"{name}.output.dense", hidden, width)
    return shapes


def titok_uvitbert(width: int, depth: int, hidden: int, ids: int, classes: int, places: int) -> Shapes:
    shapes: Shapes = {
        "embeddings.weight": (ids + classes + 2, width),
        "pos_embed": (1, places + 1, width),
        **norm("norm", width),
        **linear("lm_head", width, ids),
        **timm_block("mid_block", width, hidden, bias=False),
    }
    for layer in range(depth // 2):
        shapes |= timm_block(f"in_blocks.{layer}", width, hidden, bias=False)
        shapes |= timm_block(f"out_blocks.{layer}", width, hidden, bias=False)
        shapes |= linear(f"out_blocks.{layer}.skip_linear", 2 * width, width)
    return shapes


def maskbit_lfqbert(width: int, depth: int, hidden: int, bits: int, groups: int, classes: int, places: int) -> Shapes:
    shapes: Shapes = {
        "bits_to_indices": (bits // groups,),
        "class_emb.weight": (classes + 1, width),
        "pos_emb": (1, places + 1, width),
        **linear("input_proj", bits, width),
        **norm("first_layer.0", width),
        **linear("last_layer.0", width, width),
        **norm("last_layer.2", width),
        **linear("prediction_layer", width, groups * 2 ** (bits // groups)),
    }
    for name in (f"transformer.layers.{layer}" for layer in range(depth)):
        shapes |= {f"{name}.0.mha.in_proj_weight": (3 * width, width), f"{name}.0.mha.in_proj_bias": (3 * width,)}
        shapes |= linear(f"{name}.0.mha.out_proj", width, width) | norm(f"{name}.0.norm", width)
        shapes |= linear(f"{name}.1.net.0", width, hidden) | linear(f"{name}.1.net.2", hidden, width)
        shapes |= norm(f"{name}.1.norm", width)
    return shapes


def var_transformer(depth: int, ids: int, classes: int, sides: tuple[int, ...], shared: bool, code_dim: int) -> Shapes:
    width, places = 64 * depth, sum(side**2 for side in sides)
    shapes: Shapes = {
        **linear("word_embed", code_dim, width),
        "class_emb.weight": (classes + 1, width),
        "pos_start": (1, 1, width),
        "pos_1LC": (1, places, width),
        "lvl_embed.weight": (len(sides), width),
        "lvl_1L": (1, places),
        "attn_bias_for_masking": (1, 1, places, places),
        **linear("head_nm.ada_lin.1", width, 2 * width),
        **linear("head", width, ids),
        **(linear("shared_ada_lin.1", width, 6 * width) if shared else {}),
    }
    for name in (f"blocks.{layer}" for layer in range(depth)):
        shapes |= linear(f"{name}.attn.mat_qkv", width, 3 * width, False) | linear(f"{name}.attn.proj", width, width)
        shapes |= {f"{name}.attn.{part}": (width,) for part in ("q_bias", "v_bias", "zero_k_bias")}
        shapes |= {f"{name}.attn.scale_mul_1H11": (1, depth, 1, 1)}
        shapes |= linear(f"{name}.ffn.fc1", width, 4 * width) | linear(f"{name}.ffn.fc2", 4 * width, width)
        shapes |= {f"{name}.ada_gss": (1, 1, 6, width)} if shared else linear(f"{name}.ada_lin.1", width, 6 * width)
    return shapes


def taming_net2net(width: int, depth: int, ids: int, places: int) -> Shapes:
    """Without its first stage."""
    shapes: Shapes = {
        "tok_emb.weight": (ids, width),
        "pos_emb": (1, places, width),
        **norm("ln_f", width),
        "head.weight": (ids, width),
    }
    for name in (f"blocks.{layer}" for layer in range(depth)):
        for part in ("query", "key", "value", "proj"):
            shapes |= linear(f"{name}.attn.{part}", width, width)
        shapes |= (
            {f"{name}.attn.mask": (1, 1, places, places)} | norm(f"{name}.ln1", width) | norm(f"{name}.ln2", width)
        )
        shapes |= linear(f"{name}.mlp.0", width, 4 * width) | linear(f"{name}.mlp.2", 4 * width, width)
    return {f"transformer.{name}": shape for name, shape in shapes.items()}


# Buffers, which are no parameters, and their values.
BUFFERS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "bits_to_indices": lambda shape: 2 ** torch.arange(*shape),
    "zero_k_bias": torch.zeros,
    "lvl_1L": lambda shape: torch.zeros(shape, dtype=torch.int64),
    "attn_bias_for_masking": lambda shape: torch.zeros(1),
    "mask": lambda shape: torch.ones(shape).tril(),
}


def tensors(shapes: Shapes, make: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Tensors of these shapes, `make(shape)` but for buffers and for what is tied, which is compared."""
    made: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        made[name] = BUFFERS.get(name.rpartition(".")[2], make)(shape)
    if "head.weight" in made and "tok_emb.weight" in made:
        made["tok_emb.weight"] = torch.randn(shapes["tok_emb.weight"])
        made["head.weight"] = made["tok_emb.weight"].clone()
    return made


def parameter_count(shapes: Shapes, tied: tuple[str, ...] = ()) -> int:
    """Of what is trained, tied tensors once."""
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if name.rpartition(".")[2] not in BUFFERS and name not in tied
    )
