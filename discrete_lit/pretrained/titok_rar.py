"""TiTok and RAR, of bytedance/1d-tokenizer.

- tokenizers: `titok`, `titok_vae`, and `maskgit_vqgan`, the PyTorch port of MaskGIT's VQGAN (google-research/maskgit);
- masked generators of TiTok's tokens: `titok_imagebert`, a BERT, and `titok_uvitbert`, a U-ViT;
- `rar`, the generator in random orders, of the tokens of MaskGIT's VQGAN.

TiTok's networks have attention heads of 64 channels, whatever their size, and so have ours, unless `reference_config`
says otherwise by `vit_enc_num_heads` and `vit_dec_num_heads`.
"""

from math import isqrt
from typing import Any

from torch import Tensor

from discrete_lit.pretrained.conversion import (
    Arrangement,
    Conversion,
    Renaming,
    Tokens,
    cut_rows,
    register,
    reorder_chunks,
)
from discrete_lit.pretrained.layouts import (
    IN_TRAINING,
    TIMM_BLOCK,
    ConvLayout,
    Rules,
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

# Channels of an attention head.
_HEAD_WIDTH = 64
# The second half of a proxy among our names.
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
    # A two-stage TiTok has a proxy, of which these are the logits, the codebook and the decoder.
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
    # A one-stage TiTok makes pixels.
    ("network.pixels.pixels.{rest}", "decoder.ffn.0.{rest}"),
    ("network.pixels.smooth.{rest}", "decoder.conv_out.{rest}"),
]
_MARKS = ("latent_tokens", "encoder.class_embedding", "decoder.mask_token")


@register("titok", marks=(*_MARKS, "quantize.embedding.weight"))
def titok(state: State, settings: Settings) -> Conversion:
    """Convert `tokenizer_titok_{l32,b64,s128}`, of two stages, or `tokenizer_titok_{bl64,bl128,sl256}_vq8k`, of one."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    settings.agree({"codebook_size": codebook_size, "token_size": code_dim, "quantize_mode": "vq"})
    settings.agree({"clustering_vq": False}, "every model that is read has")
    quantizer = vector_quantizer(
        codebook_size,
        code_dim,
        commitment_weight=settings.take("commitment_cost", 0.25),
        normalize=settings.take("use_l2_norm", True),
    )
    config = {
        "class_path": "discrete_lit.tokenizers.TiTok",
        "init_args": {"network": _network(state, settings), "quantizer": quantizer},
    }
    return Conversion(config=config, tensors=state, renaming=_renaming(state))


@register("titok_vae", marks=(*_MARKS, "!quantize.embedding.weight"))
def titok_vae(state: State, settings: Settings) -> Conversion:
    """Convert `tokenizer_titok_{bl64,bl128,sl256,ll32}_vae_c16`, with continuous latents."""
    latent_channels = state["encoder.conv_out.weight"].shape[0] // 2
    settings.agree({"token_size": latent_channels, "quantize_mode": "vae"})
    settings.without_effect("continuous latents have no codebook", "codebook_size", "use_l2_norm", "commitment_cost")
    config = {
        "class_path": "discrete_lit.tokenizers.KLVAE",
        "init_args": {
            "network": _network(state, settings),
            "latent_channels": latent_channels,
            "kl_weight": settings.take("kl_weight", 1e-6),
        },
    }
    return Conversion(config=config, tensors=state, renaming=_renaming(state))


def _renaming(state: State) -> Renaming:
    return Renaming(RULES, levels=state.count("pixel_decoder.up.{}"))


def _network(state: State, settings: Settings) -> dict[str, Any]:
    """Return the configuration of the `TiTokAutoencoder` that fits the tensors.

    Raises:
        ValueError: a key is missing, or the reference configuration contradicts the tensors.
    """
    patch_embedding = state["encoder.patch_embed.weight"]
    patch_size, channels = patch_embedding.shape[-1], patch_embedding.shape[1]
    grid, decoded = (isqrt(len(state[f"{half}.positional_embedding"]) - 1) for half in ("encoder", "decoder"))
    # The reference decides by one flag: networks that predict a proxy's ids reshape, those that give pixels do not.
    legacy = "decoder.ffn.2.weight" in state
    image_size, latent_tokens = grid * patch_size, len(state["latent_tokens"])
    decoder_patch_size = image_size // decoded
    found = {
        "num_latent_tokens": latent_tokens,
        "vit_enc_patch_size": patch_size,
        "vit_dec_patch_size": decoder_patch_size,
        "is_legacy": legacy,
        "finetune_decoder": legacy,
    }
    settings.agree(found)
    data = settings.section("dataset", ())
    preprocessing = data.section("preprocessing")
    preprocessing.agree({"crop_size": image_size})
    about_data = "it is about the data of the training"
    preprocessing.without_effect(about_data, "resize_shorter_edge", "random_crop", "random_flip")
    data.without_effect(about_data, "params")
    settings.without_effect(
        "it is another model, or where its weights were", "generator", "pretrained_tokenizer_weight"
    )
    arguments: dict[str, Any] = {
        "image_size": image_size,
        "patch_size": patch_size,
        "latent_tokens": latent_tokens,
        "encoder": _size(state, "encoder", settings),
        "decoder": _size(state, "decoder", settings),
        "image_channels": channels,
        "legacy_reshape": legacy,
    }
    if decoder_patch_size != patch_size:
        arguments["decoder_patch_size"] = decoder_patch_size
    if legacy:
        arguments["proxy"] = _proxy(state)
    return {"class_path": "discrete_lit.tokenizers.titok.TiTokAutoencoder", "init_args": arguments}


# Width, depth and heads by the reference's names.
_SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}


def _size(state: State, half: str, settings: Settings) -> dict[str, int]:
    """Return the size of a half; `vit_enc_num_heads` and `vit_dec_num_heads` are ours, for heads of another width.

    Raises:
        ValueError: the configuration names another size than the tensors have.
    """
    width, depth = len(state[f"{half}.ln_pre.weight"]), state.count(f"{half}.transformer.{{}}")
    heads = settings.optional(f"vit_{half[:3]}_num_heads", int)
    name = f"vit_{half[:3]}_model_size"
    size = settings.take(name, "", _SIZES)
    # With heads of its own it is none of the published sizes, whatever it is called.
    if size and heads is None and _SIZES[size][:2] != (width, depth):
        raise ValueError(
            f"reference_config has {name}={size}, of width {_SIZES[size][0]} and {_SIZES[size][1]} blocks, but the "
            f"tensors have {width} and {depth}; sizes of your own need vit_{half[:3]}_num_heads too"
        )
    if heads is not None:
        settings.without_effect("the tensors tell all of it but the heads, which are given", name)
    return {
        "width": width,
        "depth": depth,
        "heads": max(1, width // _HEAD_WIDTH) if heads is None else heads,
        "mlp_hidden": len(state[f"{half}.transformer.0.mlp.c_fc.bias"]),
    }


def _proxy(state: State) -> dict[str, Any]:
    """Return the configuration of MaskGIT's codebook and decoder.

    Raises:
        ValueError: a key is missing, as in files of the first stage.
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
        "class_path": "discrete_lit.tokenizers.titok.ProxyDecoder",
        "init_args": {"codebook_size": codebook_size, "code_dim": code_dim, "network": network},
    }


LAYOUT = ConvLayout(middle="mid.{index}", upsample="upsample_conv")


@register(
    "maskgit_vqgan",
    marks=("encoder.down.0.block.0.conv1.weight", "encoder.mid.0.conv1.weight", "quantize.embedding.weight"),
)
def maskgit_vqgan(state: State, settings: Settings) -> Conversion:
    """Convert `maskgit-vqgan-imagenet-f16-256.bin`."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    settings.agree({"num_embeddings": codebook_size, "embedding_dim": code_dim})
    quantizer = vector_quantizer(
        codebook_size,
        code_dim,
        commitment_weight=settings.take("commitment_cost", 0.25),
        weighted_term="codebook",
    )
    network = LAYOUT.network(state, downsampling="average", shortcut="output", pixels="unit")
    sizes, conf = network["init_args"], settings.section("conf")
    conf.agree(
        {
            "channel_mult": sizes["multipliers"],
            "num_resolutions": len(sizes["multipliers"]),
            "hidden_channels": sizes["channels"],
            "num_channels": sizes["image_channels"],
            "num_res_blocks": sizes["blocks"],
            "z_channels": code_dim,
        }
    )
    conf.without_effect(IN_TRAINING, "dropout")
    conf.without_effect("the networks take any image size", "resolution")
    return Conversion(
        config=vqgan(network, quantizer), tensors=state, renaming=LAYOUT.renaming(LAYOUT.levels(state), [CODES])
    )


# Settings of the published evaluation, by the number of tokens.
_TITOK_SAMPLING: dict[int, dict[str, Any]] = {
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
def titok_imagebert(state: State, settings: Settings) -> Conversion:
    """Convert `generator_titok_{l32,b64}.bin`."""
    embedding, positions = "model.embeddings.word_embeddings.weight", "model.embeddings.position_embeddings.weight"
    layer = "model.encoder.layer"
    hidden = len(state[f"{layer}.0.intermediate.dense.bias"])
    backbone = {"norm_epsilon": 1e-12, "norm_first": False, "embedding_norm": True}
    return _masked(
        state,
        settings,
        names=(embedding, "model.lm_head.weight"),
        length=len(state[positions]) - 1,
        depth=state.count(f"{layer}.{{}}"),
        hidden=hidden,
        switches=backbone,
        rules=_BERT,
        # Every element has the first of two types.
        arrangements=[
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
def titok_uvitbert(state: State, settings: Settings) -> Conversion:
    """Convert `generator_titok_s128.bin`."""
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
        settings,
        names=("embeddings.weight", "lm_head.weight"),
        length=state["pos_embed"].shape[1] - 1,
        depth=2 * half + 1,
        hidden=len(state["mid_block.mlp.fc1.bias"]),
        switches={"norm_epsilon": 1e-5, "attention_bias": "none", "long_skips": True},
        rules=rules,
    )


def _masked(
    state: State,
    settings: Settings,
    *,
    names: tuple[str, str],
    length: int,
    depth: int,
    hidden: int,
    switches: dict[str, Any],
    rules: Rules,
    arrangements: list[Arrangement] | None = None,
    dropped: tuple[str, ...] = (),
) -> Conversion:
    """Return the conversion of a masked generator of `length` tokens.

    `names` are those of the table of embeddings, with the ids, the mask and the classes, and of the logits.
    """
    table: Tensor = state[names[0]]
    vocab_size, width = state[names[1]].shape
    ids = vocab_size + 1
    num_classes = class_count(state, table, ids)
    found = {
        "hidden_size": width,
        "intermediate_size": hidden,
        "image_seq_len": length,
        "condition_num_classes": num_classes,
    }
    settings.agree(found)
    # The reference's number is even: it leaves out the middle block of a U-ViT.
    layers, skips = settings.take("num_hidden_layers", depth), "long_skips" in switches
    settings.take("model_type", "", ("ViT", "UViT"))
    settings.without_effect("the tensors tell which of the two it is", "model_type")
    _around(settings, vocab_size, length)
    if (layers // 2 if skips else layers) != (depth // 2 if skips else depth):
        raise ValueError(f"reference_config has num_hidden_layers={layers}, but the tensors have {depth}")
    if skips:
        settings.without_effect("a U-ViT has the half of it twice, as the tensors do", "num_hidden_layers")
    settings.take("model_type", "", ("ViT", "UViT"))
    settings.without_effect("the tensors tell which of the two it is", "model_type")
    _around(settings, vocab_size, length)
    if layers not in (depth, depth - int("long_skips" in switches)):
        raise ValueError(f"reference_config has num_hidden_layers={layers}, but the tensors have {depth}")
    backbone = {
        "width": width,
        "depth": depth,
        "heads": head_count(settings, "num_attention_heads", 16, width),
        "mlp_hidden": hidden,
        **switches,
    }
    rows = cut_rows(names[0], {"embeddings.tokens": (0, ids), "embeddings.classes": (ids, ids + num_classes + 1)})
    return generator_conversion(
        "Masked",
        state,
        tokens=Tokens(vocab_size, (length,)),
        num_classes=num_classes,
        backbone=backbone,
        rules=rules,
        arrangements=[rows, *(arrangements or [])],
        dropped=dropped,
        sampler=_titok_sampler(settings, length),
        label_dropout=settings.take("class_label_dropout", 0.1),
    )


def _around(settings: Settings, vocab_size: int, length: int) -> None:
    """Read what stands beside a generator's arguments: the tokenizer's, and what is about training.

    Raises:
        ValueError: the tokenizer has other ids or another number of tokens.
    """
    tokenizer = settings.section("vq_model")
    tokenizer.agree({"codebook_size": vocab_size, "num_latent_tokens": length})
    tokenizer.without_effect(
        "the tokenizer is loaded by itself, and compares it",
        *("quantize_mode", "token_size", "use_l2_norm", "commitment_cost", "vit_enc_model_size", "vit_dec_model_size"),
        *("vit_enc_patch_size", "vit_dec_patch_size", "finetune_decoder", "pretrained_tokenizer_weight", "is_legacy"),
    )
    settings.without_effect(IN_TRAINING, "dropout", "attn_drop", "use_checkpoint", "mask_schedule_strategy")


def _titok_sampler(settings: Settings, length: int) -> dict[str, Any]:
    """Return the sampler of the published evaluation, with what the configuration says of it in place of that."""
    sampling = {**_TITOK_SAMPLING.get(length, {"steps": min(8, length)}), "temperature_annealing": True}
    sampling["steps"] = settings.take("num_steps", sampling["steps"])
    if "randomize_temperature" in settings:
        sampling["choice_temperature"] = settings.take("randomize_temperature", 9.5)
    if "guidance_decay" in settings:
        decays = ("constant", "linear", "power-cosine")
        sampling["guidance_schedule"] = settings.take("guidance_decay", "linear", decays).replace("-", "_")
    if "guidance_scale_pow" in settings:
        sampling["guidance_power"] = settings.take("guidance_scale_pow", 3.0)
    if "guidance_scale" in settings:
        # Only the power cosine is a schedule of what ours calls the scale; the others count from 0.
        scale = settings.take("guidance_scale", 3.0)
        of_ours = sampling.get("guidance_schedule") == "power_cosine"
        sampling["guidance_scale"] = scale if of_ours else 1 + scale
    return sampled_by("TiTokSampler", **sampling)


# Rows of the position tables that no sequence reaches.
_SPARE_POSITIONS = 1024
# Optimizer steps between which the orders of training become the raster order.
_ANNEAL_STEPS = {"start": 125_000, "end": 187_500}
# Guidance scale, its exponent and the temperature of the published evaluation, by width.
_RAR_SAMPLING = {768: (16.0, 2.75, 1.0), 1024: (15.5, 2.5, 1.02), 1280: (6.9, 1.5, 1.02), 1408: (8.0, 1.2, 1.02)}
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
def rar(state: State, settings: Settings) -> Conversion:
    """Convert `rar_{b,l,xl,xxl}.bin`."""
    vocab_size, width = state["lm_head.weight"].shape
    ids = vocab_size + 1
    num_classes = class_count(state, state["embeddings.weight"], ids)
    length = state["pos_embed"].shape[1] - _SPARE_POSITIONS
    depth, hidden = state.count("blocks.{}"), len(state["blocks.0.mlp.fc1.bias"])
    found = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "intermediate_size": hidden,
        "image_seq_len": length,
        "condition_num_classes": num_classes,
    }
    settings.agree(found)
    _around(settings, vocab_size, length)
    backbone = {
        "width": width,
        "depth": depth,
        "heads": head_count(settings, "num_attention_heads", 16, width),
        "mlp_hidden": hidden,
        "norm_affine": True,
        "conditioning": "prefix_adaln",
        "condition_positions": True,
        "target_positions": True,
        "registers": 1,
        "qk_norm": "layer",
    }
    guidance_scale, guidance_power, temperature = _RAR_SAMPLING.get(width, (1.0, 1.0, 1.0))
    anneal_steps = [settings.take(f"randomness_anneal_{end}", step) for end, step in _ANNEAL_STEPS.items()]
    options: dict[str, Any] = {}
    if anneal_steps != list(_ANNEAL_STEPS.values()):
        options["anneal_steps"] = anneal_steps
    sampler = sampled_by(
        "RasterSampler",
        temperature=settings.take("randomize_temperature", temperature),
        # No guidance at all is 0 there and 1 here.
        guidance_scale=settings.take("guidance_scale", guidance_scale) or 1.0,
        guidance_schedule="power_cosine",
        guidance_power=settings.take("guidance_scale_pow", guidance_power),
    )
    arrangements = [
        # The mask id between the two is never read.
        cut_rows(
            "embeddings.weight",
            {"embeddings.tokens": (0, vocab_size), "embeddings.classes": (ids, ids + num_classes + 1)},
        ),
        Arrangement(["pos_embed"], ["pos_embed"], lambda table: [table[:, : length + 2]]),
        Arrangement(["target_aware_pos_embed"], ["target_aware_pos_embed"], lambda table: [table[0, 2 : length + 2]]),
        Arrangement(["timesteps_embeddings"], ["timesteps_embeddings"], lambda table: [table[0, : length + 1]]),
        # Published: scale, shift. Ours: shift, scale.
        reorder_chunks("adaln_before_head.adaLN_modulation.1.{rest}", (1, 0)),
    ]
    # The norm before the head has no gain of its own: ones and zeros.
    return generator_conversion(
        "Autoregressive",
        state,
        tokens=Tokens(vocab_size, square(state, length)),
        num_classes=num_classes,
        backbone=backbone,
        rules=_RULES,
        arrangements=arrangements,
        kept=("final_norm.*",),
        order="random_annealed",
        sampler=sampler,
        label_dropout=settings.take("class_label_dropout", 0.1),
        **options,
    )
