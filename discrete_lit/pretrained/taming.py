"""VQGAN and its class-conditional GPT, of CompVis/taming-transformers, and the VQGANs of CompVis/latent-diffusion.

- tokenizers: `taming_vqgan`, and `taming_gumbelvq` (DALL-E's relaxation);
- `taming_net2net`: the GPT, with its VQGAN in the same file.

Many later repositories began with taming's code: `LAYOUT`, `vqgan`, `vector_quantizer` and the names here serve them.
"""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, register
from discrete_lit.pretrained.layouts import ConvLayout, generator_conversion, in_blocks, square
from discrete_lit.pretrained.reading import Reference, State, agree, read_reference

LAYOUT = ConvLayout()
# Our name of the codebook, and the published one.
CODES = ("quantizer.codebook.codes", "quantize.embedding.weight")
# The losses with their networks; the random projection that shows segmentations as colours.
DROPPED = ("loss.*", "colorize")
WRAPPERS = ("state_dict",)
MARKS = ("encoder.down.0.block.0.conv1.weight", "quant_conv.weight")


@register(
    "taming_vqgan",
    marks=(*MARKS, "quantize.embedding.weight", "!model_ema.decay", "!quantize.ema_vocab_hit_SV"),
    wrappers=WRAPPERS,
)
def taming_vqgan(state: State, reference: Reference) -> Conversion:
    """Convert `last.ckpt` of taming's VQGANs, or `model.ckpt` of LDM's first stages."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    agree(reference, {"n_embed": codebook_size, "embed_dim": code_dim})
    quantizer = vector_quantizer(
        codebook_size,
        code_dim,
        # The published models were trained with beta on the codebook term, not on the commitment.
        weighted_term="codebook",
    )
    return Conversion(
        config=vqgan(network(state, reference), quantizer),
        tensors=state,
        renaming=LAYOUT.renaming(LAYOUT.levels(state), [CODES]),
        dropped=DROPPED,
    )


@register(
    "taming_gumbelvq",
    marks=(*MARKS, "quantize.embed.weight", "quantize.proj.weight"),
    wrappers=WRAPPERS,
)
def taming_gumbelvq(state: State, reference: Reference) -> Conversion:
    """Convert `last.ckpt` of `vqgan_gumbel_f8`."""
    codebook_size, code_dim = state["quantize.embed.weight"].shape
    agree(reference, {"n_embed": codebook_size, "embed_dim": code_dim})
    quantizer = {
        "class_path": "discrete_lit.tokenizers.quantizers.GumbelQuantizer",
        "init_args": {
            "codebook_size": codebook_size,
            "dim": code_dim,
            "kl_weight": reference.get("kl_weight", 1e-8),
            "temperature": 0.9,
            "hard": True,
        },
    }
    codes = [
        ("quantizer.codes", "quantize.embed.weight"),
        ("quantizer.to_logits.{rest}", "quantize.proj.{rest}"),
    ]
    config = vqgan(network(state, reference), quantizer)
    return Conversion(
        config=config,
        tensors=state,
        renaming=LAYOUT.renaming(LAYOUT.levels(state), codes),
        dropped=DROPPED,
        kept=("quantizer.steps",),
    )


def network(state: State, reference: Reference) -> dict[str, Any]:
    """Return the configuration of the network whose tensors have taming's layout."""
    config = LAYOUT.network(state)
    sizes = config["init_args"]
    found = {"ch": "channels", "ch_mult": "multipliers", "num_res_blocks": "blocks", "z_channels": "z_channels"}
    agree(reference.get("ddconfig", {}), {theirs: sizes[ours] for theirs, ours in found.items() if ours in sizes})
    return config


def vqgan(network: dict[str, Any], quantizer: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a `VQGAN`."""
    return {"class_path": "discrete_lit.tokenizers.VQGAN", "init_args": {"network": network, "quantizer": quantizer}}


def vector_quantizer(codebook_size: int, code_dim: int, **settings: Any) -> dict[str, Any]:
    """Return the configuration of a `VectorQuantizer` whose codes were trained by gradient, as taming's are."""
    trained = {"codebook_update": "gradient", "codebook_init": "uniform"}
    return {
        "class_path": "discrete_lit.tokenizers.quantizers.VectorQuantizer",
        "init_args": {"codebook_size": codebook_size, "dim": code_dim, **trained, **settings},
    }


_FIRST_STAGE = "first_stage_model."
_BLOCK = [
    ("attention.query_key_value.{rest}", "attn.{query|key|value}.{rest}"),
    ("attention.out.{rest}", "attn.proj.{rest}"),
    ("attention_norm.{rest}", "ln1.{rest}"),
    ("mlp_norm.{rest}", "ln2.{rest}"),
    ("mlp.expand.{rest}", "mlp.0.{rest}"),
    ("mlp.contract.{rest}", "mlp.2.{rest}"),
]
_RULES = [
    ("token_embedding.table.weight", "transformer.tok_emb.weight"),
    ("class_embedding.weight", "transformer.tok_emb.classes"),
    ("positions.embedding", "transformer.pos_emb"),
    *in_blocks("transformer.blocks.{block}", _BLOCK),
    ("final_norm.{rest}", "transformer.ln_f.{rest}"),
    ("head.project.weight", "transformer.head.weight"),
]


@register(
    "taming_net2net",
    marks=("transformer.tok_emb.weight", "transformer.pos_emb", f"{_FIRST_STAGE}quantize.embedding.weight"),
    wrappers=WRAPPERS,
)
def taming_net2net(state: State, reference: Reference) -> Conversion:
    """Convert `last.ckpt` of `cin_transformer`.

    Class k has the embedding of id k. The null label has zeros, as the published model never saw it.
    """
    vocab_size, width = state["transformer.tok_emb.weight"].shape
    length, depth = state["transformer.pos_emb"].shape[1], state.count("transformer.blocks.{}")
    arguments = read_reference(reference.get("transformer_config"))
    agree(arguments, {"vocab_size": vocab_size, "block_size": length, "n_layer": depth, "n_embd": width})
    agree(arguments, {"n_unmasked": 0}, "a causal sequence has")
    if reference.get("permuter_config") is not None or any(name.startswith("permuter.") for name in state):
        raise ValueError(f"{state.source!r} has a permuter: only models of the raster order are loaded")
    num_classes = read_reference(reference.get("cond_stage_config")).get("n_classes", 1000)
    if not 0 < num_classes <= vocab_size:
        raise ValueError(f"n_classes={num_classes} in reference_config must lie in [1, {vocab_size}]: classes are ids")
    backbone: dict[str, Any] = {
        "width": width,
        "depth": depth,
        "heads": arguments.get("n_head", max(1, width // 64)),
        "mlp_hidden": len(state["transformer.blocks.0.mlp.0.bias"]),
        "norm_epsilon": 1e-5,
        "head_bias": False,
    }

    def with_classes(table: Tensor) -> list[Tensor]:
        return [table, torch.cat([table[:num_classes], torch.zeros_like(table[:1])])]

    embedding = "transformer.tok_emb.weight"
    own = {name: value for name, value in state.items() if not name.startswith(_FIRST_STAGE)}
    first = {name.removeprefix(_FIRST_STAGE): state[name] for name in state if name not in own}
    return generator_conversion(
        "Autoregressive",
        State(own, state.source),
        tokens=Tokens(vocab_size, square(state, length)),
        num_classes=num_classes,
        backbone=backbone,
        rules=_RULES,
        arrangements=[Arrangement([embedding], [embedding, "transformer.tok_emb.classes"], with_classes)],
        dropped=("transformer.blocks.*.attn.mask",),
        tokenizer=taming_vqgan(State(first, state.source), read_reference(reference.get("first_stage_config"))),
    )
