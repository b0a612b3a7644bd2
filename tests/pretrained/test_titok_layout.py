"""TiTok's published layout on weights of our own: every name, both heads, and what is refused."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise

from discrete_lit.checkpoints import instantiate
from discrete_lit.pretrained import load_pretrained

SIZE = {"width": 16, "depth": 2, "heads": 2}
CONVOLUTIONS = {
    "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
    "init_args": {
        "channels": 32,
        "multipliers": [2, 1, 1],
        "blocks": 1,
        "decoder_blocks": 1,
        "middle_blocks": 1,
        "attention": False,
        "bias": False,
        "shortcut": "output",
        "latent_kernel": None,
        "pixels": "unit",
    },
}
PROXY = {
    "class_path": "discrete_lit.tokenizers.titok.ProxyDecoder",
    "init_args": {"codebook_size": 9, "code_dim": 4, "network": CONVOLUTIONS},
}
QUANTIZER = {
    "class_path": "discrete_lit.tokenizers.quantizers.VectorQuantizer",
    "init_args": {
        "codebook_size": 6,
        "dim": 3,
        "codebook_update": "gradient",
        "codebook_init": "uniform",
        "normalize": True,
    },
}
HEADS = {"vit_enc_num_heads": 2, "vit_dec_num_heads": 2}


@cache
def ours(kind: str) -> Any:
    """A tiny model of ours, random weights, in eval mode; not to be changed."""
    arguments: dict[str, Any] = {"image_size": 8, "patch_size": 2, "latent_tokens": 3, "encoder": SIZE, "decoder": SIZE}
    if kind == "two_stages":
        arguments |= {"proxy": PROXY, "legacy_reshape": True}
    if kind == "other_patches":
        arguments |= {"decoder_patch_size": 4}
    network = {"class_path": "discrete_lit.tokenizers.titok.TiTokAutoencoder", "init_args": arguments}
    config = {"class_path": "discrete_lit.tokenizers.TiTok", "init_args": {"network": network, "quantizer": QUANTIZER}}
    if kind == "vae":
        settings = {"network": network, "latent_channels": 3, "kl_weight": 1e-6}
        config = {"class_path": "discrete_lit.tokenizers.KLVAE", "init_args": settings}
    return randomise(instantiate(config), 0.3).eval()


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., Path]:
    """`publish(module, change)`: a file of the module's weights under their published names."""

    def write(module: Any, change: Callable[[dict[str, torch.Tensor]], Any] | None = None) -> Path:
        from discrete_lit.pretrained.conversion import Renaming
        from discrete_lit.pretrained.titok_rar import RULES

        levels = len(CONVOLUTIONS["init_args"]["multipliers"])
        state = {}
        for name, value in module.state_dict().items():
            (published,) = Renaming(RULES, levels).published(name)
            # Linear layers on grids are 1x1 convolutions there.
            convolution = "ffn" in published or published == "encoder.conv_out.weight"
            state[published] = value[:, :, None, None] if convolution and value.dim() == 2 else value
        if change is not None:
            change(state)
        torch.save(state, tmp_path / "published.bin")
        return tmp_path / "published.bin"

    return write


@pytest.mark.parametrize("kind", ["one_stage", "two_stages", "vae", "other_patches"])
def test_weights_and_sizes_come_back(kind: str, publish: Callable[..., Path]) -> None:
    module = ours(kind)
    family = "titok_vae" if kind == "vae" else "titok"
    loaded = load_pretrained(publish(module), family, {"model": {"vq_model": HEADS}})
    assert type(loaded) is type(module)
    own = module.state_dict()
    assert own.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, own[name]) for name, value in loaded.state_dict().items())
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        codes = module.encode(images)
        assert torch.equal(loaded.encode(images), codes)  # type: ignore[operator]
        assert torch.equal(loaded.decode(codes), module.decode(codes))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("kind", "change", "reference", "message"),
    [
        (
            "two_stages",
            lambda state: state.pop("pixel_quantize.embedding.weight"),
            {},
            "files of the first stage of tr",
        ),
        ("one_stage", lambda state: state.pop("decoder.ln_pre.weight"), {}, "has no key 'decoder.ln_pre.weight'"),
        ("one_stage", lambda state: state.pop("decoder.ln_pre.bias"), {}, "'decoder.ln_pre.bias' is missing"),
        ("one_stage", lambda state: state.update(extra=torch.zeros(1)), {}, "'extra' is unexpected"),
        (
            "one_stage",
            lambda state: state.update({"decoder.positional_embedding": torch.zeros(5, 16)}),
            {},
            "'decoder.ffn.0.weight' has shape (12, 16, 1, 1) instead of (48, 16)",
        ),
        ("one_stage", None, {"vit_dec_patch_size": 4}, "has vit_dec_patch_size=4, but the tensors have 2"),
        ("one_stage", None, {"dataset": {"preprocessing": {"crop_size": 16}}}, "crop_size=16, but the tensors have 8"),
        ("one_stage", None, {"finetune_decoder": True}, "has finetune_decoder=True, but the tensors have False"),
        ("one_stage", None, {"is_legacy": True}, "reference_config has is_legacy=True, but the tensors have False"),
        ("two_stages", None, {"num_latent_tokens": 4}, "has num_latent_tokens=4, but the tensors have 3"),
        ("one_stage", None, {"codebook_size": 8192}, "has codebook_size=8192, but the tensors have 6"),
        ("vae", None, {}, "is no titok checkpoint (it has no 'quantize.embedding.weight'): it looks like titok_vae"),
    ],
)
def test_files_that_do_not_fit(
    kind: str, change: Any, reference: dict[str, Any], message: str, publish: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError) as raised:
        load_pretrained(publish(ours(kind), change), "titok", HEADS | reference)
    assert message in str(raised.value)
