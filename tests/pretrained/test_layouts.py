"""Names and sizes of published layouts."""

from typing import Any

import pytest
import torch

from discrete_lit.pretrained import llamagen, maskbit, seed_voken, taming, var
from discrete_lit.pretrained import titok_rar as maskgit
from discrete_lit.pretrained.conversion import Renaming
from discrete_lit.pretrained.layouts import ConvLayout
from discrete_lit.pretrained.reading import State
from discrete_lit.tokenizers.networks import ConvAutoencoder

BARE: dict[str, Any] = {"attention": False, "bias": False, "encoder_out_kernel": 1, "latent_kernel": None}
MAGVIT2 = BARE | {
    "blocks": 4,
    "decoder_blocks": 4,
    "middle_blocks": 4,
    "downsampling": "symmetric",
    "upsampling": "depth_to_space",
    "adaptive_norm": True,
}
MASKGIT = BARE | {"decoder_blocks": 2, "shortcut": "output", "downsampling": "average", "pixels": "unit"}
# Layout, widths of codes and latents, settings; tensors and numbers of encoder, decoder and the convolutions between.
PUBLISHED: dict[str, tuple[ConvLayout, tuple[int, int], dict[str, Any], tuple[int, int]]] = {
    # 344 tensors and 71.9M numbers with the codebook and its usage.
    "llamagen_vq": (llamagen.LAYOUT, (8, 8), {"z_channels": 256}, (342, 71_752_331)),
    # 324 tensors and 108.9M numbers with the codebook, four convolutions of the quantizer, and a usage.
    "var_vqvae": (var.LAYOUT, (32, 32), {"channels": 160, "latent_kernel": 3}, (314, 108_780_291)),
    # 159 tensors in the encoder, 180 in the decoder.
    "magvit2_lfq": (seed_voken.MAGVIT2, (18, 18), MAGVIT2, (339, 115_127_829)),
    "taming_vqgan": (taming.LAYOUT, (256, 256), {}, (342, 71_879_555)),
    "ibq": (taming.LAYOUT, (256, 256), {"blocks": 4}, (542, 106_787_715)),
    "mar_kl_vae": (taming.LAYOUT, (16, 32), {"decoder_attention": []}, (312, 66_456_019)),
    "maskgit_vqgan": (maskgit.LAYOUT, (256, 256), MASKGIT, (167, 54_253_443)),
    "maskbit_tokenizer": (maskbit.LAYOUT, (14, 14), MASKGIT | {"downsampling": "right"}, (175, 54_489_489)),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_settings_of_each_published_network(family: str) -> None:
    """Built by the settings that `ConvAutoencoder` documents, named in the layout, and told from the shapes alone."""
    layout, (code_dim, latent_dim), settings, (tensors, numbers) = PUBLISHED[family]
    with torch.device("meta"):
        network = ConvAutoencoder(code_dim, latent_dim, **settings)
    weights = network.state_dict()
    renaming = layout.renaming(5)
    state = State({}, family)
    for name, value in weights.items():
        names = renaming.published(f"network.{name}")
        assert names and not state.keys() & set(names)
        state.update(zip(names, value.chunk(len(names)), strict=True))
    assert (len(state), sum(value.numel() for value in weights.values())) == (tensors, numbers)

    assert layout.levels(state) == 5
    told = layout.sizes(state)
    if family == "mar_kl_vae":
        del told["z_channels"]  # twice as wide in the encoder, before the moments, as in the decoder
    with torch.device("meta"):
        again = ConvAutoencoder(code_dim, latent_dim, **{**settings, **told})
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in weights.items()
    }


def test_names() -> None:
    renaming = Renaming(
        [
            ("a.{level}.special.{rest}", "first.{mirror}.{rest}"),
            ("a.{level}.{rest}", "other.{level}.{rest}"),
            ("b.{place}.joined.{rest}", "c.{place}.{q|k|v}.{rest}"),
        ],
        levels=3,
    )
    assert renaming.published("a.0.special.x.weight") == ("first.2.x.weight",)
    assert renaming.published("a.2.plain") == ("other.2.plain",)
    assert renaming.published("b.1.joined.bias") == ("c.1.q.bias", "c.1.k.bias", "c.1.v.bias")
    assert renaming.published("a.x.plain") == renaming.published("unknown") == ()
