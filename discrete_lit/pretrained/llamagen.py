"""FoundationVision/LlamaGen: its tokenizers, and its generators of classes and of texts."""

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from discrete_lit.backbones.embeddings import grid_coordinates, rotary_table
from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, register
from discrete_lit.pretrained.layouts import (
    IN_TRAINING,
    ConvLayout,
    class_count,
    generator_conversion,
    head_count,
    in_blocks,
    sampled_by,
    square,
)
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings
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
def llamagen_vq(state: State, settings: Settings) -> Conversion:
    """Convert `vq_ds16_c2i.pt`, `vq_ds8_c2i.pt`, or `vq_ds16_t2i.pt`; the EMA weights where a file has them."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    network = LAYOUT.network(state)
    sizes = network["init_args"]
    found = {
        "codebook_size": codebook_size,
        "codebook_embed_dim": code_dim,
        "encoder_ch_mult": sizes["multipliers"],
        "decoder_ch_mult": sizes["decoder_multipliers"],
        "z_channels": sizes["z_channels"],
        # Constants of the reference's encoder and decoder.
        "ch": sizes["channels"],
        "num_res_blocks": sizes["blocks"],
    }
    settings.agree(found)
    settings.without_effect(IN_TRAINING, "dropout_p", "codebook_show_usage")
    quantizer = vector_quantizer(
        codebook_size,
        code_dim,
        commitment_weight=settings.take("commit_loss_beta", 0.25),
        normalize=settings.take("codebook_l2_norm", True),
        entropy_weight=settings.take("entropy_loss_ratio", 0.0),
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
# XL, XXL and 3B are published at 384 pixels alone; B and L at 256 too, with the same shapes.
_ONLY_LARGE = {1280: 576, 1536: 576, 3200: 576}
# Tables and buffers that are computed.
_COMPUTED = ("freqs_cis", "causal_mask", "layers.*.attention.kv_cache.*")
LLAMA_BLOCK = [
    ("attention.query_key_value.weight", "attention.wqkv.weight"),
    ("attention.out.weight", "attention.wo.weight"),
    ("attention_norm.weight", "attention_norm.weight"),
    ("mlp_norm.weight", "ffn_norm.weight"),
    ("mlp.expand.weight", "feed_forward.{w1|w3}.weight"),
    ("mlp.contract.weight", "feed_forward.w2.weight"),
]
_RULES = [
    ("token_embedding.table.weight", "tok_embeddings.weight"),
    *in_blocks("layers.{block}", LLAMA_BLOCK),
    ("final_norm.weight", "norm.weight"),
    ("head.project.weight", "output.weight"),
]


@register(
    "llamagen_gpt_c2i",
    marks=("tok_embeddings.weight", "cls_embedding.embedding_table.weight", "!pos_instruct_embeddings"),
    wrappers=("model", "module", "state_dict"),
)
def llamagen_gpt_c2i(state: State, settings: Settings) -> Conversion:
    """Convert `c2i_{B,L}_{256,384}.pt`, or `c2i_{XL,XXL,3B}_384.pt`.

    The weights do not tell the number of tokens, unless the file has the table `freqs_cis`: B and L at 384 pixels need
    `block_size: 576` in the reference configuration. Models that were trained without dropping labels
    (`class_dropout_prob: 0`) have no null label, and guidance is refused.
    """
    vocab_size, width = state["tok_embeddings.weight"].shape
    classes, dropped = "cls_embedding.embedding_table.weight", settings.take("class_dropout_prob", 0.1)
    num_classes = class_count(state, state[classes]) if dropped else len(state[classes])
    settings.agree({"num_classes": num_classes}, f"at class_dropout_prob={dropped} the tensors have")
    settings.agree({"cls_token_num": 1, "model_type": "c2i"}, "the published class-conditional models have")
    settings.without_effect("it is about text", "caption_dim")
    length = _length(state, settings, _ONLY_LARGE.get(width))
    backbone = _backbone(state, settings)
    sampler = sampled_by("RasterSampler", guidance_scale=_GUIDANCE.get(width, 1.0) if dropped else 1.0)
    tokens = Tokens(vocab_size, square(state, length))
    arrangements = [_all_heads(state, settings, backbone["heads"])]
    if not dropped:
        no_class = Arrangement([classes], [classes], lambda table: [torch.cat([table, torch.zeros_like(table[:1])])])
        arrangements.append(no_class)
    return generator_conversion(
        "Autoregressive",
        state,
        tokens=tokens,
        num_classes=num_classes,
        backbone=backbone,
        rules=[("class_embedding.weight", classes), *_RULES],
        arrangements=arrangements,
        dropped=_COMPUTED,
        sampler=sampler,
        label_dropout=dropped,
    )


_NO_CAPTION = "cls_embedding.uncond_embedding"


@register(
    "llamagen_t2i",
    marks=("tok_embeddings.weight", "cls_embedding.cap_proj.fc1.weight", _NO_CAPTION),
    wrappers=("model", "module", "state_dict"),
)
def llamagen_t2i(state: State, settings: Settings) -> Conversion:
    """Convert `t2i_XL_stage1_256.pt` (`block_size: 256`) or `t2i_XL_stage2_512.pt` (`block_size: 1024`).

    A batch has features of its captions, the hidden states of T5-XL, as `"context"`.
    """
    vocab_size, _ = state["tok_embeddings.weight"].shape
    places, dim = state[_NO_CAPTION].shape
    settings.agree({"cls_token_num": places, "caption_dim": dim})
    settings.agree({"model_type": "t2i"}, "the published text-conditional models have")
    settings.without_effect("it is about classes", "num_classes")
    length = _length(state, settings, None, before=places)
    backbone = _backbone(state, settings)
    return generator_conversion(
        "Autoregressive",
        state,
        tokens=Tokens(vocab_size, square(state, length)),
        num_classes=1,
        backbone=backbone | {"context_dim": dim, "context_prefix": places},
        rules=[
            ("context_prefix.expand.weight", "cls_embedding.cap_proj.fc1.weight"),
            ("context_prefix.contract.weight", "cls_embedding.cap_proj.fc2.weight"),
            ("context_prefix.null", _NO_CAPTION),
            *_RULES,
        ],
        arrangements=[_all_heads(state, settings, backbone["heads"])],
        dropped=_COMPUTED,
        sampler=sampled_by("RasterSampler", guidance_scale=7.5, top_k=min(1000, vocab_size)),
        label_dropout=settings.take("class_dropout_prob", 0.1),
    )


def _backbone(state: State, settings: Settings) -> dict[str, Any]:
    """Return the switches of the transformer, which both kinds of generators have."""
    vocab_size, width = state["tok_embeddings.weight"].shape
    depth, hidden = state.count("layers.{}"), len(state["layers.0.feed_forward.w1.weight"])
    settings.agree({"vocab_size": vocab_size, "dim": width, "n_layer": depth})
    settings.without_effect(
        IN_TRAINING,
        *("token_dropout_p", "attn_dropout_p", "resid_dropout_p", "ffn_dropout_p", "drop_path_rate"),
        "initializer_range",
    )
    settings.without_effect("ours makes room for what is sampled", "max_batch_size", "max_seq_len")
    check_hidden(settings, width, hidden)
    rotary_base = settings.take("rope_base", 10000.0)
    return {
        "width": width,
        "depth": depth,
        "heads": head_count(settings, "n_head", _HEADS.get(width, max(1, width // 64)), width),
        "mlp_hidden": hidden,
        "mlp": "swiglu",
        "norm": "rms",
        "norm_epsilon": settings.take("norm_eps", 1e-5),
        "positions": "rope_2d",
        **({} if rotary_base == 10000 else {"rotary_base": rotary_base}),
        "start_rotation": "zero",
        "bias": False,
    }


def _length(state: State, settings: Settings, usual: int | None, *, before: int = 1) -> int:
    """Return the number of tokens of an image: from the file's rotary table, the configuration, or what is usual.

    Args:
        usual: of the published models of this size, where all have the same.
        before: elements in front of them.

    Raises:
        ValueError: the configuration contradicts the table, or nothing tells the number.
    """
    if "freqs_cis" in state:
        length = len(state["freqs_cis"]) - before
        settings.agree({"block_size": length})
        base, table = settings.take("rope_base", 10000.0), state["freqs_cis"][before:].float()
        if not torch.allclose(
            table, rotary_table(grid_coordinates(square(state, length)), 2 * table.shape[1], base=base)
        ):
            raise ValueError(f"{state.source!r} has a table 'freqs_cis' that is not that of rope_base={base}")
        return length
    given = settings.optional("block_size", int)
    length = usual if given is None else given
    if length is None:
        raise ValueError(
            f"the weights of {state.source!r} do not tell the number of tokens: give block_size in reference_config, "
            "256 for a model of 256 pixels, 576 for one of 384, 1024 for one of 512"
        )
    if length < 1 or isqrt(length) ** 2 != length:
        raise ValueError(f"reference_config has block_size={length}, which is no square grid")
    return length


def _all_heads(state: State, settings: Settings, heads: int) -> Arrangement:
    """Repeat the keys and values that several heads share (`n_kv_head`), so that each has its own.

    Raises:
        ValueError: the configuration contradicts the tensors.
    """
    rows, width = state["layers.0.attention.wqkv.weight"].shape
    # As many rows for queries as there are channels, the others half for keys and half for values.
    shared = (rows - width) // 2
    key_heads = shared * heads // width
    settings.agree({"n_kv_head": key_heads if "n_kv_head" in settings else None})

    def make(weight: Tensor) -> list[Tensor]:
        query, key, value = weight.split([width, shared, shared])
        repeated = [
            part.unflatten(0, (key_heads, -1)).repeat_interleave(heads // key_heads, dim=0).flatten(0, 1)
            for part in (key, value)
        ]
        return [torch.cat([query, *repeated])]

    name = "layers.{layer}.attention.wqkv.weight"
    return Arrangement([name], [name], make)


def check_hidden(settings: Settings, width: int, hidden: int) -> None:
    """Compare the inner width of the MLP with what the reference computes it from.

    Raises:
        ValueError: it is another.
    """
    multiple, multiplier = settings.take("multiple_of", 256), settings.optional("ffn_dim_multiplier", float)
    if "multiple_of" not in settings and multiplier is None:
        return
    expected = int(2 * 4 * width / 3)
    if multiplier is not None:
        expected = int(multiplier * expected)
    expected = multiple * -(-expected // multiple) if multiple > 0 else 0
    if expected != hidden:
        raise ValueError(
            f"reference_config has multiple_of={multiple} and ffn_dim_multiplier={multiplier}, which make "
            f"{expected} channels inside the MLP, but the tensors have {hidden}"
        )
