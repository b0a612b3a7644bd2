"""Emu3, of BAAI, in the layout of huggingface/transformers: `emu3`."""

from math import isqrt

from discrete_lit.pretrained.conversion import Conversion, Renaming, TextPart, register
from discrete_lit.pretrained.layouts import IN_TRAINING, Rules, sampled_by
from discrete_lit.pretrained.llama_layout import (
    ABOUT_THE_FILE,
    FILE_KEYS,
    LlamaLayout,
    ids_of,
    image_tokenizer_apart,
    unified_conversion,
    vocabulary_of,
)
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings
from discrete_lit.pretrained.taming import CODES, vector_quantizer, vqgan

_EMU3_AREA = 720 * 720
_SYSTEM = "You are a helpful assistant. USER: "


@register(
    "emu3",
    marks=("model.text_model.embed_tokens.weight", "model.vqmodel.quant_conv.conv.weight"),
    section=None,
    older=(
        ("text_model.model.", "model.text_model."),
        ("text_model.lm_head", "lm_head"),
        ("vqmodel.", "model.vqmodel."),
    ),
    reads_text=True,
)
def emu3(state: State, settings: Settings) -> Conversion:
    """Convert the folder of `Emu3-community/Emu3-Gen-hf` or `Emu3-Chat-hf`: a text, then an image by rows.

    Images are squares of `image_area` pixels, 720 x 720 unless reference_config says otherwise. With a `question`
    there, such as "Please describe the image.", the model answers it of an image, as Emu3-Chat does.
    """
    own, first = image_tokenizer_apart(state)
    names = vocabulary_of(settings, "<|extra_200|>", "<|visual token 000000|>")
    tokenizer = _emu3_tokenizer(first, settings.section("vq_config"))
    codes = len(first["quantize.embedding.weight"])
    area, factor = settings.take("image_area", _EMU3_AREA), 2 ** (first.count("encoder.down_block.down.{}") - 1)
    side = isqrt(max(area, 0)) // factor
    if side < 1 or (side * factor) ** 2 != area:
        raise ValueError(
            f"reference_config has image_area={area}: accepted are squares whose side is a multiple of {factor}"
        )
    question = settings.optional("question", str)
    text = settings.section("text_config")
    language = LlamaLayout(own, text, prefix="model.text_model", heads=32, context=9216, rotary_base=1e6)
    settings.without_effect(ABOUT_THE_FILE, *FILE_KEYS)
    structure = ("boi_token_id", "eoi_token_id", "eof_token_id", "eol_token_id", "img_token_id")
    for said in (settings, text):
        said.without_effect("the tokenizer.json says which", *structure)
    settings.agree({"tie_word_embeddings": language.tied})
    if "<image>" in names:
        settings.agree({"image_token_id": names["<image>"]}, "the vocabulary has")
    visual = ids_of(names, *(f"<|visual token {code:06d}|>" for code in range(codes)))
    if visual != list(range(visual[0], visual[0] + codes)):
        raise ValueError(
            "vocabulary_map has the codes of images in another order than their numbers, which is not read"
        )
    begins, rows, row_end, frame_end, ends = ids_of(
        names, "<|image start|>", "<|image token|>", "<|extra_200|>", "<|extra_201|>", "<|image end|>"
    )
    special = {
        "pad": text.take("pad_token_id", 151643),
        "begin": text.take("bos_token_id", 151849),
        "end": text.take("eos_token_id", 151850),
    }
    return unified_conversion(
        language,
        tokenizer=tokenizer,
        grid=(side, side),
        codes=codes,
        text=TextPart(special=special, size=language.size),
        vocabulary={
            "size": language.size,
            "image_first": visual[0],
            "image_begin": begins,
            "image_end": [frame_end, ends],
            "rows_begin": rows,
            "row_end": row_end,
            "never": [names["<image>"]] if "<image>" in names else [],
            "question": None if question is None else [_SYSTEM, f"{question} ASSISTANT:"],
        },
        # Begin, size, begin of the rows, their ends, and what stands behind.
        surrounding=2 + 2 * len(str(side)) + 1 + side + 3,
        order="text_first",
        image_format="rows",
        label_dropout=0.05,
        sampler=sampled_by("SegmentSampler", settings={"image": {"guidance_scale": 3.0, "top_k": min(2048, codes)}}),
    )


_EMU3_NORM: Rules = (
    ("norm.{rest}", "norm_layer.{rest}"),
    ("gain.{rest}", "conv_y.{rest}"),
    ("offset.{rest}", "conv_b.{rest}"),
)


def _emu3_block(ours: str, theirs: str, *, norms: Rules) -> Rules:
    """Give the rules of a residual block, with norms of its own, or those that read codes."""
    of_norms = [
        (f"{ours}.norm{place}.{own}", f"{theirs}.norm{place}.{published}")
        for place in (1, 2)
        for own, published in norms
    ]
    rest = [(f"{ours}.{name}.{{rest}}", f"{theirs}.{name}.{{rest}}") for name in ("conv1", "conv2")]
    return [*of_norms, *rest, (f"{ours}.shortcut.{{rest}}", f"{theirs}.nin_shortcut.{{rest}}")]


def _emu3_attention(ours: str, theirs: str, norm: str, *, norms: Rules) -> Rules:
    return [
        *((f"{ours}.norm.{own}", f"{norm}.{published}") for own, published in norms),
        (f"{ours}.query_key_value.{{rest}}", f"{theirs}.{{q_proj|k_proj|v_proj}}.{{rest}}"),
        (f"{ours}.out.{{rest}}", f"{theirs}.out_proj.{{rest}}"),
    ]


def _emu3_rules() -> Rules:
    plain: Rules = (("{rest}", "{rest}"),)
    rules: list[tuple[str, str]] = [CODES]
    for half, levels, level, resample, norms in (
        ("encoder", "down_block.down", "level", "downsample", plain),
        ("decoder", "up_block.up", "mirror", "upsample", _EMU3_NORM),
    ):
        ours, own = f"network.{half}.levels.{{level}}", f"{half}.{levels}.{{{level}}}"
        rules += _emu3_block(f"{ours}.blocks.{{block}}", f"{own}.block.{{block}}", norms=norms)
        rules += _emu3_attention(
            f"{ours}.attention.{{block}}", f"{own}.attn.{{block}}", f"{own}.attn_norms.{{block}}", norms=norms
        )
        rules.append((f"{ours}.resample.conv.{{rest}}", f"{own}.{resample}.conv.{{rest}}"))
        middle, published = f"network.{half}.middle", f"{half}.middle_block"
        for number, name in ((0, "block_1"), (2, "block_2")):
            rules += _emu3_block(f"{middle}.{number}", f"{published}.{name}", norms=norms)
        rules += _emu3_attention(f"{middle}.1", f"{published}.attn_1", f"{published}.attn_norm", norms=norms)
        rules += [(f"network.{half}.norm_out.{own}", f"{half}.norm_out.{name}") for own, name in norms]
        rules += [(f"network.{half}.{name}.{{rest}}", f"{half}.{name}.{{rest}}") for name in ("conv_in", "conv_out")]
        rules.append((f"network.{half}_time.{{block}}.{{rest}}", f"{half}.time_res_stack.{{block}}.{{rest}}"))
    return [
        *rules,
        ("network.halvings.{number}.conv.{rest}", "encoder.time_conv.{number}.conv.conv.{rest}"),
        ("network.doublings.{number}.conv.{rest}", "decoder.time_conv.{number}.conv.conv.{rest}"),
        ("network.to_latents.{rest}", "quant_conv.{rest}"),
        ("network.from_codes.{rest}", "post_quant_conv.{rest}"),
    ]


def _emu3_tokenizer(state: State, settings: Settings) -> Conversion:
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    levels = state.count("encoder.down_block.down.{}")
    channels = len(state["encoder.conv_in.weight"])
    down = "encoder.down_block.down"
    widths = [len(state[f"{down}.{level}.block.0.conv1.weight"]) for level in range(levels)]
    attention = [level for level in range(levels) if f"{down}.{level}.attn.0.q_proj.weight" in state]
    halvings, blocks = state.count("encoder.time_conv.{}"), state.count(f"{down}.0.block.{{}}")
    settings.agree(
        {
            "codebook_size": codebook_size,
            "embed_dim": code_dim,
            "latent_channels": len(state["encoder.conv_out.weight"]),
            "in_channels": state["encoder.conv_in.weight"].shape[1],
            "out_channels": len(state["decoder.conv_out.weight"]),
            "base_channels": channels,
            "channel_multiplier": [width // channels for width in widths],
            "num_res_blocks": blocks,
            "attn_resolutions": attention,
            "hidden_size": widths[-1],
            "temporal_downsample_factor": 2**halvings,
        }
    )
    settings.agree({"double_latent": False, "num_attention_heads": 1}, "the published tokenizer has")
    settings.without_effect(IN_TRAINING, "attention_dropout", "dropout", "initializer_range")
    settings.without_effect(ABOUT_THE_FILE, *FILE_KEYS)
    network = {
        "class_path": "discrete_lit.tokenizers.networks.Emu3Autoencoder",
        "init_args": {
            "image_channels": state["encoder.conv_in.weight"].shape[1],
            "channels": channels,
            "multipliers": [width // channels for width in widths],
            "blocks": blocks,
            "attention": attention,
            "frames": 2**halvings,
        },
    }
    return Conversion(
        config=vqgan(network, vector_quantizer(codebook_size, code_dim)),
        tensors=state,
        renaming=Renaming(_emu3_rules(), levels),
    )
