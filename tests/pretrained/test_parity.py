"""Independent implementations at random weights, renamed into published layouts and loaded as such."""

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from discrete_lit.pretrained import load_pretrained

pytestmark = pytest.mark.parity

Rules = Sequence[tuple[str, str]]

DIFFUSERS: Rules = [
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2"),
    (r"encoder\.down_blocks\.(\d+)\.attentions\.(\d+)", r"encoder.down.\1.attn.\2"),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"decoder\.up_blocks\.(\d+)\.resnets", r"decoder.up_blocks.\1.block"),
    (r"decoder\.up_blocks\.(\d+)\.attentions", r"decoder.up_blocks.\1.attn"),
    (r"upsamplers\.0", "upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("group_norm", "norm"),
    (r"to_([qkv])", r"\1"),
    (r"to_out\.0", "proj_out"),
]
JANUS_TO_LLAMAGEN: Rules = [
    (r"coder\.(?:down|up)\.(\d+)\.block\.(\d+)", r"coder.conv_blocks.\1.res.\2"),
    (r"coder\.(?:down|up)\.(\d+)\.", r"coder.conv_blocks.\1."),
    (r"mid\.block_1", "mid.0"),
    (r"mid\.attn_1", "mid.1"),
    (r"mid\.block_2", "mid.2"),
]


@pytest.fixture(autouse=True)
def others_warnings() -> Iterator[None]:
    """Deprecations inside the other packages are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def randomised(module: nn.Module) -> Any:
    """Random weights of which every one has an effect."""
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.2).add_("norm" in name and name.endswith("weight"))
    return module.eval()


def renamed(module: nn.Module, rules: Rules, levels: int = 0) -> dict[str, Tensor]:
    """A state dict by the names of a published layout; a decoder whose levels run upwards is numbered from below."""
    state = {}
    for name, value in module.state_dict().items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
        is_linear_attention = value.dim() == 2 and "embedding" not in name
        state[name] = value[:, :, None, None] if is_linear_attention else value
    return state


def load(state: dict[str, Tensor], family: str, folder: Path, **reference: Any) -> Any:
    torch.save(state, folder / "weights.pt")
    return load_pretrained(folder / "weights.pt", family, reference)


@torch.no_grad()
def test_diffusers_vq_model(tmp_path: Path) -> None:
    from diffusers import VQModel

    theirs = randomised(
        VQModel(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(32, 32, 64),
            layers_per_block=2,
            latent_channels=16,
            num_vq_embeddings=64,
            vq_embed_dim=8,
        )
    )
    ours = load(renamed(theirs, DIFFUSERS, levels=3), "taming_vqgan", tmp_path)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = theirs.encode(images).latents
    torch.testing.assert_close(ours.network.encode(images), latents, rtol=1e-4, atol=1e-5)
    codes, commitment, (_, _, indices) = theirs.quantize(latents)
    tokens = ours.encode(images)
    assert torch.equal(tokens.flatten(), indices.flatten()) and len(indices.unique()) > 20
    torch.testing.assert_close(ours.embed(tokens), codes, rtol=1e-4, atol=1e-5)
    losses = ours.quantizer(latents.movedim(1, -1)).losses
    torch.testing.assert_close(sum(losses.values()), commitment, rtol=1e-4, atol=1e-6)
    expected = theirs.decode(latents).sample
    torch.testing.assert_close(ours.network.decode(ours.embed(tokens)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_diffusers_autoencoder_kl(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    theirs = randomised(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 32, 64),
            layers_per_block=2,
            latent_channels=4,
        )
    )
    ours = load(renamed(theirs, DIFFUSERS, levels=3), "mar_kl_vae", tmp_path, scale_factor=0.18215)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    law, expected = ours.posterior(images), theirs.encode(images).latent_dist
    torch.testing.assert_close(law.mean.movedim(-1, 1), expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(law.logvar.movedim(-1, 1), expected.logvar, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(law.kl(), expected.kl(), rtol=1e-4, atol=1e-4)
    decoded = theirs.decode(expected.mean).sample
    torch.testing.assert_close(ours.decode(0.18215 * expected.mean), decoded.clamp(-1, 1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_transformers_chameleon(tmp_path: Path) -> None:
    """It has no decoder: one of ours stands in for it."""
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

    theirs = randomised(
        ChameleonVQVAE(
            ChameleonVQVAEConfig(
                embed_dim=8,
                num_embeddings=64,
                latent_channels=16,
                resolution=32,
                base_channels=32,
                channel_multiplier=[1, 1, 2],
                num_res_blocks=2,
                attn_resolutions=[8],
                attn_type="vanilla",
            )
        )
    )
    state = theirs.state_dict() | stand_in_decoder(16, 8)
    ours = load(state, "taming_vqgan", tmp_path)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    found = theirs.encode(images)
    assert torch.equal(ours.encode(images).flatten(), found.image_tokens.flatten())
    assert len(found.image_tokens.unique()) > 20


def stand_in_decoder(z_channels: int, code_dim: int) -> dict[str, Tensor]:
    """A taming decoder of three levels of 32 channels without attention at any level, by its published names."""
    from discrete_lit.pretrained.taming import LAYOUT
    from discrete_lit.tokenizers.networks import ConvAutoencoder

    settings = {"channels": 32, "multipliers": (1, 1, 2), "z_channels": z_channels, "decoder_attention": []}
    weights = ConvAutoencoder(code_dim, **settings).decoder.state_dict()
    made = {}
    for name, value in weights.items():
        names = LAYOUT.renaming(3).published(f"network.decoder.{name}")
        made |= dict(zip(names, value.chunk(len(names)), strict=True))
    return made


@torch.no_grad()
def test_transformers_janus(tmp_path: Path) -> None:
    """Decoding is LlamaGen's. Encoding leaves the l2 norm out, so its ids are those of the bare nearest code."""
    from transformers import JanusVQVAE, JanusVQVAEConfig

    theirs = randomised(
        JanusVQVAE(
            JanusVQVAEConfig(
                embed_dim=8,
                num_embeddings=64,
                latent_channels=16,
                num_patches=8,
                base_channels=32,
                channel_multiplier=[1, 1, 2],
                num_res_blocks=2,
            )
        )
    )
    ours = load(renamed(theirs, JANUS_TO_LLAMAGEN), "llamagen_vq", tmp_path)
    tokens = torch.randint(64, (2, 8, 8))
    expected = theirs.decode(tokens.flatten(1))
    torch.testing.assert_close(ours.network.decode(ours.embed(tokens)), expected, rtol=1e-4, atol=1e-4)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = theirs.quant_conv(theirs.encoder(images))
    torch.testing.assert_close(ours.network.encode(images), latents, rtol=1e-4, atol=1e-5)
    theirs_ids = theirs.encode(images).image_tokens.flatten()
    rows = latents.movedim(1, -1).flatten(0, 2)
    codes = theirs.quantize.embedding.weight
    assert torch.equal(theirs_ids, torch.cdist(rows, codes).argmin(dim=1))
    agreement = (ours.encode(images).flatten() == theirs_ids).float().mean()
    assert agreement < 0.9
