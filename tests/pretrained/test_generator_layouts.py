"""Names, sizes and settings of published generators."""

from typing import Any

import pytest
import torch
from helpers import published_generators as published

from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.pretrained.conversion import FAMILIES, Conversion, convert
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

IMAGENET = {"ids": 1024, "classes": 1000, "places": 256}
LLAMAGEN = {"ids": 16384, "classes": 1000}
VAR = {"ids": 4096, "classes": 1000, "code_dim": 32}
SIDES_256, SIDES_512 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
HALTON = {"ids": 16384, "classes": 1000, "places": 256}
TITOK = {"ids": 4096, "classes": 1000}
# Sizes, heads, and the published number of millions of parameters; TiTok-S-128's is that of another U-ViT.
PUBLISHED: dict[tuple[str, str], tuple[dict[str, Any], int, str | None]] = {
    ("llamagen_gpt_c2i", "B"): ({"width": 768, "depth": 12, "hidden": 2048, **LLAMAGEN}, 12, "110.9"),
    ("llamagen_gpt_c2i", "L"): ({"width": 1024, "depth": 24, "hidden": 2816, **LLAMAGEN}, 16, "342.9"),
    ("llamagen_gpt_c2i", "XL"): ({"width": 1280, "depth": 36, "hidden": 3584, **LLAMAGEN}, 20, "774.7"),
    ("llamagen_gpt_c2i", "XXL"): ({"width": 1536, "depth": 48, "hidden": 4096, **LLAMAGEN}, 24, "1411"),
    ("llamagen_gpt_c2i", "3B"): ({"width": 3200, "depth": 24, "hidden": 8704, **LLAMAGEN}, 32, "3097"),
    ("rar", "B"): ({"width": 768, "depth": 24, "hidden": 3072, "heads": 16, **IMAGENET}, 16, "260.9"),
    ("rar", "L"): ({"width": 1024, "depth": 24, "hidden": 4096, "heads": 16, **IMAGENET}, 16, "461.7"),
    ("rar", "XL"): ({"width": 1280, "depth": 32, "hidden": 5120, "heads": 16, **IMAGENET}, 16, "955.4"),
    ("rar", "XXL"): ({"width": 1408, "depth": 40, "hidden": 6144, "heads": 16, **IMAGENET}, 16, "1498.5"),
    ("maskbit_lfqbert", "14 bits"): (
        {"width": 1024, "depth": 24, "hidden": 4096, "bits": 14, "groups": 2, "classes": 1000, "places": 256},
        16,
        "304.9",
    ),
    ("var_transformer", "d16"): ({"depth": 16, "sides": SIDES_256, "shared": False, **VAR}, 16, "310.3"),
    ("var_transformer", "d20"): ({"depth": 20, "sides": SIDES_256, "shared": False, **VAR}, 20, "600.9"),
    ("var_transformer", "d24"): ({"depth": 24, "sides": SIDES_256, "shared": False, **VAR}, 24, "1033"),
    ("var_transformer", "d30"): ({"depth": 30, "sides": SIDES_256, "shared": False, **VAR}, 30, "2010"),
    ("var_transformer", "d36"): ({"depth": 36, "sides": SIDES_512, "shared": True, **VAR}, 36, "2354"),
    ("halton_maskgit", "T"): ({"width": 384, "depth": 6, "hidden": 1024, "heads": 6, **HALTON}, 6, "23"),
    ("halton_maskgit", "S"): ({"width": 512, "depth": 12, "hidden": 1536, "heads": 6, **HALTON}, 6, "69"),
    ("halton_maskgit", "B"): ({"width": 768, "depth": 12, "hidden": 2048, "heads": 12, **HALTON}, 12, "142"),
    ("halton_maskgit", "L"): ({"width": 1024, "depth": 24, "hidden": 2816, "heads": 16, **HALTON}, 16, "480"),
    ("titok_imagebert", "L32"): ({"width": 768, "depth": 24, "hidden": 3072, "places": 32, **TITOK}, 16, "177"),
    ("titok_uvitbert", "S128"): ({"width": 1024, "depth": 21, "hidden": 4096, "places": 128, **TITOK}, 16, None),
}


def backbone(conversion: Conversion, sides: tuple[int, ...], code_dim: int) -> Transformer:
    """Ours, as the generator of the configuration builds it."""
    arguments, tokens = conversion.config["init_args"], conversion.tokens
    assert tokens is not None
    kind = conversion.config["class_path"].rpartition(".")[2]
    parts = arguments.get("bit_groups", 1)
    layout = SequenceLayout(
        round(tokens.vocab_size ** (1 / parts)),
        tokens.shape,
        num_classes=arguments["num_classes"],
        attention={"Autoregressive": "causal", "Masked": "bidirectional", "NextScale": "block_causal"}[kind],
        mask_token=kind == "Masked",
        sub_tokens=parts,
        scales=tuple(side**2 for side in sides) if kind == "NextScale" else (),
        input_dim=code_dim if kind == "NextScale" else None,
        any_order="order" in arguments,
    )
    return Transformer(layout, **arguments["backbone"]["init_args"])


@pytest.mark.parametrize(("family", "size"), PUBLISHED)
def test_parameter_counts(family: str, size: str) -> None:
    """Published names at published sizes hold the published number of parameters, and fill ours, without arguments."""
    sizes, heads, millions = PUBLISHED[family, size]
    shapes = getattr(published, family)(**sizes)
    if millions is not None:
        count = published.parameter_count(shapes, tied=("head.weight",) if family == "halton_maskgit" else ())
        assert f"{count / 1e6:.{len(millions.partition('.')[2])}f}" == millions
    state = State(published.tensors(shapes, lambda shape: torch.empty(shape, device="meta")), family)
    assert [name for name, known in FAMILIES.items() if not known.lacks(state)] == [family]
    reference = {"block_size": 256} if family == "llamagen_gpt_c2i" else {}
    conversion = FAMILIES[family].convert(state, Settings(reference))
    with torch.device("meta"):
        own = backbone(conversion, sizes.get("sides", ()), sizes.get("code_dim", 0))
    assert own.heads == heads
    convert(own.state_dict(), conversion, family)
