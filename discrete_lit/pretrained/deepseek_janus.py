"""Janus, of DeepSeek, in the layout of huggingface/transformers: `janus`."""

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Renaming, TextPart, register
from discrete_lit.pretrained.layouts import IN_TRAINING, ConvLayout, in_blocks, sampled_by
from discrete_lit.pretrained.llama_layout import (
    ABOUT_THE_FILE,
    FILE_KEYS,
    LlamaLayout,
    agree_network,
    head_number,
    ids_of,
    image_tokenizer_apart,
    unified_conversion,
)
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings
from discrete_lit.pretrained.taming import CODES, vector_quantizer, vqgan

_JANUS_LAYOUT = ConvLayout(decoder_level="decoder.up.{level}")
_VISION = "model.vision_model."


@register(
    "janus",
    marks=(
        "model.language_model.embed_tokens.weight",
        "model.generation_embeddings.weight",
        f"{_VISION}post_layernorm.weight",
    ),
    section=None,
    reads_text=True,
)
def janus(state: State, settings: Settings) -> Conversion:
    """Convert the folder of `deepseek-community/Janus-Pro-1B`, `Janus-Pro-7B` or `Janus-1.3B`.

    Images that are drawn have an embedding and a head of their own. Images that are described are read by a vision
    encoder, whose features begin by an id of their own here; its embedding is that of the begin of an image.
    """
    own, first = image_tokenizer_apart(state)
    tokenizer = _janus_tokenizer(first, settings.section("vq_config"))
    text = settings.section("text_config")
    language = LlamaLayout(
        own, text, prefix="model.language_model", heads=16, context=16384, rotary_base=10000.0, epsilon=1e-6
    )
    settings.without_effect(ABOUT_THE_FILE, *FILE_KEYS)
    settings.without_effect("it marks where features stand", "image_token_id")
    settings.agree({"tie_word_embeddings": language.tied})
    begins, ends = ids_of(settings.tokens, "<begin_of_image>", "<end_of_image>")
    vision, weights = _janus_vision(own, settings.section("vision_config"))
    images = settings.section("vq_config")
    embedding, layers = (
        own["model.generation_embeddings.weight"],
        1 + own.count("model.generation_aligner.hidden_layers.{}"),
    )
    inner = len(own["model.generation_head.proj_out.weight"])
    side = images.take("num_patches", vision["image_size"] // vision["patch_size"])
    images.agree({"num_hidden_layers": layers, "projection_dim": inner, "image_token_embed_dim": language.width})
    images.agree({"hidden_act": "gelu"}, "what is read has")
    if own.count("model.aligner.hidden_layers.{}") != layers - 1:
        raise ValueError(f"{state.source!r} has aligners of different numbers of layers, which is not read")
    special: dict[str, int | str] = {
        "pad": text.take("pad_token_id", 100002),
        "begin": text.take("bos_token_id", 100000),
        "end": text.take("eos_token_id", 100001),
    }
    tables = ["model.language_model.embed_tokens.weight", *([] if language.tied else ["lm_head.weight"])]

    def with_begin_of_features(table: Tensor) -> list[Tensor]:
        return [torch.cat((table, table[begins : begins + 1]))]

    rules: list[tuple[str, str]] = [("own_embeddings.image.table.weight", "model.generation_embeddings.weight")]
    for ours, theirs in (("own_embeddings.image.aligner", "generation_aligner"), ("aligners.features", "aligner")):
        rules.append((f"{ours}.0.{{rest}}", f"model.{theirs}.fc1.{{rest}}"))
        for layer in range(1, layers):
            rules.append((f"{ours}.{2 * layer}.{{rest}}", f"model.{theirs}.hidden_layers.{layer - 1}.{{rest}}"))
    rules += [
        ("own_heads.image.expand.{rest}", "model.generation_head.proj_out.{rest}"),
        ("own_heads.image.output.{rest}", "model.generation_head.vision_head.{rest}"),
    ]
    return unified_conversion(
        language,
        tokenizer=tokenizer,
        grid=(side, side),
        codes=len(embedding),
        text=TextPart(special=special, size=language.size),
        vocabulary={
            "size": language.size,
            "image_first": language.size + 1,
            "image_begin": begins,
            "image_end": [ends],
            "features": [(vision["image_size"] // vision["patch_size"]) ** 2, vision["width"]],
        },
        surrounding=2,
        arrangements=[Arrangement([name], [name], with_begin_of_features) for name in tables],
        rules=rules,
        backbone={
            "own_embeddings": {"image": embedding.shape[1]},
            "own_heads": {"image": inner},
            "aligner_layers": layers,
        },
        beside=weights,
        vision={"class_path": "discrete_lit.backbones.VisionEncoder", "init_args": vision},
        # Training would read images in front as ids, which no published training did.
        image_first=0.0,
        null_text="padding",
        label_dropout=0.1,
        sampler=sampled_by("SegmentSampler", settings={"image": {"guidance_scale": 5.0}}),
    )


def _janus_tokenizer(state: State, settings: Settings) -> Conversion:
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    network = _JANUS_LAYOUT.network(state)
    agree_network(settings, network["init_args"], codebook_size, code_dim)
    settings.agree({"out_channels": network["init_args"]["out_channels"]})
    # The published search compares codes as they are; what is decoded are their directions.
    quantizer = vector_quantizer(codebook_size, code_dim, weighted_term="codebook", unit_lookup=True)
    return Conversion(
        config=vqgan(network, quantizer),
        tensors=state,
        renaming=_JANUS_LAYOUT.renaming(_JANUS_LAYOUT.levels(state), [CODES]),
    )


def _janus_vision(state: State, settings: Settings) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take the vision encoder out of the tensors: the arguments of ours, and its weights by our names."""
    published = {name.removeprefix(_VISION): state.pop(name) for name in list(state) if name.startswith(_VISION)}
    found = State(published, state.source)
    patches, layer = found["embeddings.patch_embedding.weight"], "encoder.layers.{}"
    width, depth, side = len(patches), found.count(layer), patches.shape[-1]
    image_size = side * isqrt(len(found["embeddings.position_embedding.weight"]))
    hidden = len(found["encoder.layers.0.mlp.fc1.weight"])
    settings.agree(
        {
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_channels": patches.shape[1],
            "image_size": image_size,
            "patch_size": side,
            "num_image_tokens": len(found["embeddings.position_embedding.weight"]),
            "projection_dim": len(state["model.aligner.fc1.weight"]),
            "depth": 1 + state.count("model.aligner.hidden_layers.{}"),
        }
    )
    settings.agree({"attention_bias": True, "use_qk_norm": False, "hidden_act": "gelu"}, "what is read has")
    settings.without_effect(
        IN_TRAINING, "hidden_dropout_rate", "attention_dropout", "projection_dropout", "initializer_range"
    )
    settings.without_effect(ABOUT_THE_FILE, *FILE_KEYS)
    ratio = settings.take("mlp_ratio", 4.0)
    if int(width * ratio) != hidden:
        raise ValueError(
            f"reference_config has vision_config.mlp_ratio={ratio}, but the tensors have {hidden} channels"
        )
    rules = Renaming(
        [
            ("patches.{rest}", "embeddings.patch_embedding.{rest}"),
            ("positions.{rest}", "embeddings.position_embedding.{rest}"),
            ("final_norm.{rest}", "post_layernorm.{rest}"),
            *in_blocks(
                "encoder.layers.{block}",
                [
                    ("attention.query_key_value.{rest}", "self_attn.{q_proj|k_proj|v_proj}.{rest}"),
                    ("attention.out.{rest}", "self_attn.projection_layer.{rest}"),
                    ("attention_norm.{rest}", "layer_norm1.{rest}"),
                    ("mlp_norm.{rest}", "layer_norm2.{rest}"),
                    ("mlp.expand.{rest}", "mlp.fc1.{rest}"),
                    ("mlp.contract.{rest}", "mlp.fc2.{rest}"),
                ],
            ),
        ]
    )
    parts = ("attention.query_key_value", "attention.out", "attention_norm", "mlp_norm", "mlp.expand", "mlp.contract")
    modules = ["patches", "final_norm", *(f"blocks.{block}.{part}" for block in range(depth) for part in parts)]
    names = ["positions.weight", *(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))]
    weights: dict[str, Tensor] = {}
    for name in names:
        given = (
            [found.pop(key) for key in rules.published(name)] if all(k in found for k in rules.published(name)) else []
        )
        if not given:
            raise ValueError(f"{state.source!r} has no {_VISION}{rules.published(name)[0]}")
        weights[f"vision.{name}"] = torch.cat(given)
    if found:
        raise ValueError(f"the weights of {state.source!r} do not fit: '{_VISION}{next(iter(found))}' is unexpected")
    arguments = {
        "width": width,
        "depth": depth,
        "heads": head_number(settings, "num_attention_heads", 16, width),
        "image_size": image_size,
        "patch_size": side,
        "mlp_hidden": hidden,
        "image_channels": patches.shape[1],
        "norm_epsilon": settings.take("layer_norm_eps", 1e-6),
    }
    return arguments, weights
