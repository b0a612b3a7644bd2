"""bytedance/1d-tokenizer: TiTok's tokenizers.

The reference's networks have attention heads of 64 channels, whatever their size, and so have ours, unless
`reference_config` says otherwise by `vit_enc_num_heads` and `vit_dec_num_heads`.
"""

from math import isqrt
from typing import Any

from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.reference import Reference, agree
from discrete_lit.pretrained.registry import Conversion, register
from discrete_lit.pretrained.renaming import Renaming
from discrete_lit.pretrained.taming import CODES, vector_quantizer

_HEAD_WIDTH = 64
_PIXELS = "network.proxy.network.decoder"

_TRANSFORMER = [
    ("class_token", "class_embedding"),
    ("patch_positions", "positional_embedding"),
    ("latent_positions", "latent_token_positional_embedding"),
    ("first_norm.{rest}", "ln_pre.{rest}"),
    ("final_norm.{rest}", "ln_post.{rest}"),
    ("blocks.blocks.{block}.attention_norm.{rest}", "transformer.{block}.ln_1.{rest}"),
    ("blocks.blocks.{block}.attention.query_key_value.{rest}", "transformer.{block}.attn.in_proj_{rest}"),
    ("blocks.blocks.{block}.attention.out.{rest}", "transformer.{block}.attn.out_proj.{rest}"),
    ("blocks.blocks.{block}.mlp_norm.{rest}", "transformer.{block}.ln_2.{rest}"),
    ("blocks.blocks.{block}.mlp.expand.{rest}", "transformer.{block}.mlp.c_fc.{rest}"),
    ("blocks.blocks.{block}.mlp.contract.{rest}", "transformer.{block}.mlp.c_proj.{rest}"),
]
RULES = [
    CODES,
    ("network.encoder.latent_tokens", "latent_tokens"),
    ("network.encoder.patch_embedding.{rest}", "encoder.patch_embed.{rest}"),
    ("network.encoder.project.{rest}", "encoder.conv_out.{rest}"),
    ("network.decoder.code_embedding.{rest}", "decoder.decoder_embed.{rest}"),
    ("network.decoder.mask_token", "decoder.mask_token"),
    *(
        (f"network.{half}.sequence.{own}", f"{half}.{theirs}")
        for half in ("encoder", "decoder")
        for own, theirs in _TRANSFORMER
    ),
    # With a proxy, its logits and its second half; otherwise the pixels.
    ("network.proxy_head.{layer}.{rest}", "decoder.ffn.{layer}.{rest}"),
    ("network.proxy.codebook", "pixel_quantize.embedding.weight"),
    (
        f"{_PIXELS}.levels.{{level}}.blocks.{{block}}.shortcut.{{rest}}",
        "pixel_decoder.up.{mirror}.block.{block}.nin_shortcut.{rest}",
    ),
    (f"{_PIXELS}.levels.{{level}}.blocks.{{block}}.{{rest}}", "pixel_decoder.up.{mirror}.block.{block}.{rest}"),
    (f"{_PIXELS}.levels.{{level}}.resample.conv.{{rest}}", "pixel_decoder.up.{mirror}.upsample_conv.{rest}"),
    (f"{_PIXELS}.middle.{{block}}.{{rest}}", "pixel_decoder.mid.{block}.{rest}"),
    (f"{_PIXELS}.{{rest}}", "pixel_decoder.{rest}"),
    ("network.pixels.pixels.{rest}", "decoder.ffn.0.{rest}"),
    ("network.pixels.smooth.{rest}", "decoder.conv_out.{rest}"),
]
_MARKS = ("latent_tokens", "encoder.class_embedding", "decoder.mask_token")


@register("titok", marks=(*_MARKS, "quantize.embedding.weight"))
def titok(state: State, reference: Reference) -> Conversion:
    """`tokenizer_titok_{l32,b64,s128}`, of two stages, and `tokenizer_titok_{bl64,bl128,sl256}_vq8k`, of one."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    agree(reference, {"codebook_size": codebook_size, "token_size": code_dim, "quantize_mode": "vq"})
    quantizer = vector_quantizer(
        codebook_size,
        code_dim,
        commitment_weight=reference.get("commitment_cost", 0.25),
        normalize=reference.get("use_l2_norm", True),
    )
    config = {
        "class_path": "discrete_lit.tokenizers.TiTok",
        "init_args": {"network": _network(state, reference), "quantizer": quantizer},
    }
    return Conversion(config, state, _renaming(state))


@register("titok_vae", marks=(*_MARKS, "!quantize.embedding.weight"))
def titok_vae(state: State, reference: Reference) -> Conversion:
    """`tokenizer_titok_{bl64,bl128,sl256,ll32}_vae_c16`, with continuous latents."""
    latent_channels = state["encoder.conv_out.weight"].shape[0] // 2
    agree(reference, {"token_size": latent_channels, "quantize_mode": "vae"})
    config = {
        "class_path": "discrete_lit.tokenizers.KLVAE",
        "init_args": {
            "network": _network(state, reference),
            "latent_channels": latent_channels,
            "kl_weight": reference.get("kl_weight", 1e-6),
        },
    }
    return Conversion(config, state, _renaming(state))


def _renaming(state: State) -> Renaming:
    return Renaming(RULES, levels=state.count("pixel_decoder.up.{}"))


def _network(state: State, reference: Reference) -> dict[str, Any]:
    """The configuration of the `TiTokAutoencoder` of published tensors.

    Raises:
        ValueError: a missing key, a reference configuration that contradicts the tensors, patches of two sizes.
    """
    patch_embedding = state["encoder.patch_embed.weight"]
    patch_size = patch_embedding.shape[-1]
    grid = isqrt(len(state["encoder.positional_embedding"]) - 1)
    # The reference decides by one flag: networks that predict a proxy's ids reshape, those that give pixels do not.
    legacy = "decoder.ffn.2.weight" in state
    found = {
        "num_latent_tokens": len(state["latent_tokens"]),
        "vit_enc_patch_size": patch_size,
        "vit_dec_patch_size": patch_size,
        "is_legacy": legacy,
    }
    agree(reference, found)
    if len(state["decoder.positional_embedding"]) != grid**2 + 1:
        raise ValueError(f"{state.source!r} has patches of another size in the decoder, which no published TiTok has")
    arguments: dict[str, Any] = {
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "latent_tokens": found["num_latent_tokens"],
        "encoder": _size(state, "encoder", reference.get("vit_enc_num_heads")),
        "decoder": _size(state, "decoder", reference.get("vit_dec_num_heads")),
        "in_channels": patch_embedding.shape[1],
        "legacy_reshape": legacy,
    }
    if legacy:
        arguments["proxy"] = _proxy(state)
    return {"class_path": "discrete_lit.tokenizers.networks.TiTokAutoencoder", "init_args": arguments}


def _size(state: State, half: str, heads: int | None) -> dict[str, int]:
    width = len(state[f"{half}.ln_pre.weight"])
    return {
        "width": width,
        "depth": state.count(f"{half}.transformer.{{}}"),
        "heads": max(1, width // _HEAD_WIDTH) if heads is None else heads,
        "mlp_hidden": len(state[f"{half}.transformer.0.mlp.c_fc.bias"]),
    }


def _proxy(state: State) -> dict[str, Any]:
    """The configuration of MaskGIT's codebook and decoder.

    Raises:
        ValueError: a missing key, as in files of the first stage.
    """
    if "pixel_quantize.embedding.weight" not in state:
        raise ValueError(
            f"{state.source!r} has no key 'pixel_quantize.embedding.weight': files of the first "
            "stage of training, which make no pixels, are not loaded"
        )
    codebook_size, code_dim = state["pixel_quantize.embedding.weight"].shape
    levels = state.count("pixel_decoder.up.{}")
    widths = [len(state[f"pixel_decoder.up.{level}.block.0.conv1.weight"]) for level in range(levels)]
    # The encoder, which is not kept, has the first width of its own; a width that divides the others will do.
    channels = min(widths)
    network = {
        "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
        "init_args": {
            "channels": channels,
            "multipliers": [width // channels for width in widths],
            "blocks": 1,
            "decoder_blocks": state.count("pixel_decoder.up.0.block.{}"),
            "middle_blocks": state.count("pixel_decoder.mid.{}"),
            "attention": False,
            "bias": False,
            "shortcut": "output",
            "latent_kernel": None,
            "pixels": "unit",
        },
    }
    return {
        "class_path": "discrete_lit.tokenizers.networks.ProxyDecoder",
        "init_args": {"codebook_size": codebook_size, "code_dim": code_dim, "network": network},
    }
