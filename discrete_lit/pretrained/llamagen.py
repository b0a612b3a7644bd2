"""FoundationVision/LlamaGen: its tokenizers and its class-conditional generators."""

from discrete_lit.pretrained.conversion import Conversion, Tokens, register
from discrete_lit.pretrained.layouts import ConvLayout, class_count, generator_conversion, in_blocks, sampled_by, square
from discrete_lit.pretrained.reading import Reference, State, agree
from discrete_lit.pretrained.taming import CODES, vector_quantizer, vqgan

LAYOUT = ConvLayout(
    encoder_level="encoder.conv_blocks.{level}",
    decoder_level="decoder.conv_blocks.{level}",
    block="res.{block}",
    middle="mid.{index}",
)
# The window of the ids used last, which only training reads.
DROPPED = ("quantize.codebook_used",)


@register(
    "llamagen_vq",
    marks=("encoder.conv_blocks.0.res.0.conv1.weight", "quantize.embedding.weight"),
    wrappers=("ema", "model", "state_dict"),
)
def llamagen_vq(state: State, reference: Reference) -> Conversion:
    """Convert `vq_ds16_c2i.pt`, `vq_ds8_c2i.pt`, or `vq_ds16_t2i.pt`; the EMA weights where a file has them."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    network = LAYOUT.network(state)
    sizes = network["init_args"]
    found = {
        "codebook_size": codebook_size,
        "codebook_embed_dim": code_dim,
        "encoder_ch_mult": sizes["multipliers"],
        "decoder_ch_mult": sizes["decoder_multipliers"],
    }
    agree(reference, found)
    quantizer = vector_quantizer(
        codebook_size,
        code_dim,
        commitment_weight=reference.get("commit_loss_beta", 0.25),
        normalize=reference.get("codebook_l2_norm", True),
        entropy_weight=reference.get("entropy_loss_ratio", 0.0),
        entropy_log_offset=1e-5,
    )
    return Conversion(
        config=vqgan(network, quantizer),
        tensors=state,
        renaming=LAYOUT.renaming(LAYOUT.levels(state), [CODES]),
        dropped=DROPPED,
    )


# The number of heads, where it is not width / 64.
_HEADS = {3200: 32}
# Guidance scale of the published evaluation, by width.
_GUIDANCE = {768: 2.0, 1024: 2.0, 1280: 1.75, 1536: 1.75, 3200: 1.65}
_BLOCK = [
    ("attention.query_key_value.weight", "attention.wqkv.weight"),
    ("attention.out.weight", "attention.wo.weight"),
    ("attention_norm.weight", "attention_norm.weight"),
    ("mlp_norm.weight", "ffn_norm.weight"),
    ("mlp.expand.weight", "feed_forward.{w1|w3}.weight"),
    ("mlp.contract.weight", "feed_forward.w2.weight"),
]
_RULES = [
    ("token_embedding.table.weight", "tok_embeddings.weight"),
    ("class_embedding.weight", "cls_embedding.embedding_table.weight"),
    *in_blocks("layers.{block}", _BLOCK),
    ("final_norm.weight", "norm.weight"),
    ("head.project.weight", "output.weight"),
]


@register(
    "llamagen_gpt_c2i",
    marks=("tok_embeddings.weight", "cls_embedding.embedding_table.weight"),
    wrappers=("model", "module", "state_dict"),
)
def llamagen_gpt_c2i(state: State, reference: Reference) -> Conversion:
    """Convert `c2i_{B,L}_{256,384}.pt`, or `c2i_{XL,XXL,3B}_384.pt`.

    The weights do not tell the number of tokens: those of 384 pixels need `block_size: 576` in the reference
    configuration.
    """
    vocab_size, width = state["tok_embeddings.weight"].shape
    num_classes = class_count(state, state["cls_embedding.embedding_table.weight"])
    depth, hidden = state.count("layers.{}"), len(state["layers.0.feed_forward.w1.weight"])
    agree(reference, {"vocab_size": vocab_size, "dim": width, "n_layer": depth, "num_classes": num_classes})
    agree(reference, {"cls_token_num": 1, "model_type": "c2i"}, "the published class-conditional models have")
    length = reference.get("block_size", 256)
    backbone = {
        "width": width,
        "depth": depth,
        "heads": reference.get("n_head", _HEADS.get(width, max(1, width // 64))),
        "mlp_hidden": hidden,
        "mlp": "swiglu",
        "norm": "rms",
        "norm_epsilon": reference.get("norm_eps", 1e-5),
        "positions": "rope_2d",
        "start_rotation": "zero",
        "bias": False,
    }
    sampler = sampled_by("RasterSampler", guidance_scale=_GUIDANCE.get(width, 1.0))
    tokens = Tokens(vocab_size, square(state, length))
    return generator_conversion(
        "Autoregressive",
        state,
        tokens=tokens,
        num_classes=num_classes,
        backbone=backbone,
        rules=_RULES,
        sampler=sampler,
    )
