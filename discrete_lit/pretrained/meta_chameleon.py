"""Chameleon, of Meta, in the layout of huggingface/transformers: `chameleon`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, TextPart, register
from discrete_lit.pretrained.layouts import ConvLayout, sampled_by
from discrete_lit.pretrained.llama_layout import (
    LlamaLayout,
    agree_network,
    ids_of,
    image_tokenizer_apart,
    unified_conversion,
    vocabulary_of,
)
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings
from discrete_lit.pretrained.taming import CODES, vector_quantizer, vqgan


@register(
    "chameleon",
    marks=("model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight", "model.vqmodel.quant_conv.weight"),
    section=None,
    reads_text=True,
)
def chameleon(state: State, settings: Settings) -> Conversion:
    """Convert the folder of `facebook/chameleon-7b` or `chameleon-30b`.

    Its image tokenizer has no decoder: images need that of Meta's own release, `vqgan.ckpt`, which the family
    `taming_vqgan` reads, as `tokenizer`. The ids of images stand in the vocabulary in the order of their names; here
    they stand in the order of their codes, and the rows of both tables with them.
    """
    own, first = image_tokenizer_apart(state)
    special = ("<pad>", "<s>", "</s>", "<racm3:break>", "<eoss>")
    names = vocabulary_of(settings, *special, "IMGIMGAZ")
    image_ids = chameleon_codes(names)
    tokenizer = _chameleon_tokenizer(first, settings.section("vq_config"))
    codes, resolution = len(first["quantize.embedding.weight"]), settings.section("vq_config").take("resolution", 512)
    side, rest = divmod(resolution, 2 ** (ConvLayout().levels(first) - 1))
    if side < 1 or rest:
        raise ValueError(
            f"reference_config has vq_config.resolution={resolution}: accepted are multiples of "
            f"{2 ** (ConvLayout().levels(first) - 1)}"
        )
    if len(image_ids) != codes:
        raise ValueError(
            f"the vocabulary names {len(image_ids)} codes of images and {state.source!r} has {codes}: give the "
            "vocabulary_map of its config.json as reference_config"
        )
    language = LlamaLayout(own, settings, prefix="model", heads=32, context=4096, rotary_base=10000.0)
    settings.without_effect("the vocabulary says which", "bos_token_id", "eos_token_id", "pad_token_id")
    settings.without_effect("the published training was split so", "model_parallel_size")
    pad, begin, end, begins, ends = ids_of(names, *special)
    if "<image>" in names:
        settings.agree({"image_token_id": names["<image>"]}, "the vocabulary has")
    least = min(image_ids)

    def in_order(table: Tensor) -> list[Tensor]:
        order = torch.arange(len(table))
        order[least : least + codes] = torch.tensor(image_ids)
        return [table[order]]

    tables = [Arrangement([name], [name], in_order) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    never = [names["<image>"]] if "<image>" in names else []
    return unified_conversion(
        language,
        tokenizer=tokenizer,
        grid=(side, side),
        codes=codes,
        text=TextPart(special={"pad": pad, "begin": begin, "end": end}, size=language.size),
        vocabulary={
            "size": language.size,
            "image_first": least,
            "image_begin": begins,
            "image_end": [ends],
            "never": never,
        },
        surrounding=2,
        arrangements=tables,
        encodes_only=True,
        backbone={"norm_outputs": settings.take("swin_norm", False), "qk_norm": "layer_per_head"},
        softmax_over="vocabulary",
        z_loss=1e-5,
        label_dropout=0.1,
        sampler=sampled_by(
            "SegmentSampler", settings={"image": {"temperature": 0.7, "top_p": 0.9, "guidance_scale": 3.0}}
        ),
    )


def chameleon_codes(names: Mapping[str, int]) -> list[int]:
    """Return the id of each code, whose name has its digits as letters: `IMGIMGBAZ` is that of code 10.

    Raises:
        ValueError: there are none, codes are missing, or their ids are not a range.
    """
    ids: dict[int, int] = {}
    for name, number in names.items():
        letters = name.removeprefix("IMGIMG").removesuffix("Z")
        if name == f"IMGIMG{letters}Z" and letters and set(letters) <= set("ABCDEFGHIJ"):
            ids[int("".join(str(ord(letter) - ord("A")) for letter in letters))] = number
    found = sorted(ids.values())
    if not ids or sorted(ids) != list(range(len(ids))) or found != list(range(found[0], found[0] + len(found))):
        raise ValueError(
            f"the vocabulary names {len(ids)} codes of images (IMGIMGAZ, ...), which are not all of a range: give the "
            "vocabulary_map of the model's config.json as reference_config"
        )
    return [ids[code] for code in range(len(ids))]


def _chameleon_tokenizer(state: State, settings: Settings) -> Conversion:
    layout = ConvLayout()
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    network = layout.network(state, with_decoder=False)
    settings.without_effect("the file has no decoder", "out_channels")
    agree_network(settings, network["init_args"], codebook_size, code_dim)
    resolution, named = settings.take("resolution", 512), settings.optional("attn_resolutions", list)  # type: ignore[type-var]
    found = network["init_args"]["attention"] or []
    settings.agree({"attn_type": "none" if network["init_args"]["attention"] is False else "vanilla"})
    if (
        named is not None
        and [level for level in range(layout.levels(state)) if resolution // 2**level in named] != found
    ):
        raise ValueError(f"reference_config has attn_resolutions={named}, but the tensors have attention at {found}")
    quantizer = vector_quantizer(codebook_size, code_dim, weighted_term="codebook")
    return Conversion(
        config=vqgan(network, quantizer),
        tensors=state,
        renaming=layout.renaming(layout.levels(state), [CODES]),
        dropped=("post_quant_conv.*",),
    )
