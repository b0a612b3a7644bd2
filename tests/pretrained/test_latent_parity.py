"""The networks of diffusers at random weights, renamed into published layouts and loaded as such."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from discrete_lit.pretrained import load_pretrained

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def others_warnings() -> Iterator[None]:
    """Deprecations inside the other package are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def randomised(module: nn.Module) -> Any:
    """Random weights of which every one has an effect."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.2).add_("norm" in name and name.endswith("weight"))
    return module.eval()


def loaded(state: dict[str, Tensor], family: str, folder: Path, **reference: Any) -> Any:
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "published.safetensors")
    return load_pretrained(folder / "published.safetensors", family, reference)


def joined(state: dict[str, Tensor], name: str, kind: str) -> Tensor:
    return torch.cat([state[f"{name}.to_{part}.{kind}"] for part in "qkv"])


@torch.no_grad()
def test_dit_is_that_of_diffusers(tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    sizes: Any = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
    channels: Any = {"in_channels": 4, "out_channels": 8, "patch_size": 2, "num_embeds_ada_norm": 10}
    theirs = randomised(DiTTransformer2DModel(**sizes, **channels, norm_eps=1e-6))
    # Each of its blocks has a copy of the embeddings; its waves are those of DiT where they are not shifted.
    first = theirs.transformer_blocks[0].norm1.emb
    for block in theirs.transformer_blocks:
        block.norm1.emb = first
    first.time_proj.downscale_freq_shift = 0
    state = theirs.state_dict()
    published = {
        "pos_embed": theirs.pos_embed.pos_embed,
        "y_embedder.embedding_table.weight": state[
            "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
        ],
    }
    for kind in ("weight", "bias"):
        embedder = "transformer_blocks.0.norm1.emb.timestep_embedder"
        published |= {
            f"x_embedder.proj.{kind}": state[f"pos_embed.proj.{kind}"],
            f"t_embedder.mlp.0.{kind}": state[f"{embedder}.linear_1.{kind}"],
            f"t_embedder.mlp.2.{kind}": state[f"{embedder}.linear_2.{kind}"],
            f"final_layer.adaLN_modulation.1.{kind}": state[f"proj_out_1.{kind}"],
            f"final_layer.linear.{kind}": state[f"proj_out_2.{kind}"],
        }
        for layer in range(2):
            block = f"transformer_blocks.{layer}"
            published |= {
                f"blocks.{layer}.adaLN_modulation.1.{kind}": state[f"{block}.norm1.linear.{kind}"],
                f"blocks.{layer}.attn.qkv.{kind}": joined(state, f"{block}.attn1", kind),
                f"blocks.{layer}.attn.proj.{kind}": state[f"{block}.attn1.to_out.0.{kind}"],
                f"blocks.{layer}.mlp.fc1.{kind}": state[f"{block}.ff.net.0.proj.{kind}"],
                f"blocks.{layer}.mlp.fc2.{kind}": state[f"{block}.ff.net.2.{kind}"],
            }
    ours = loaded(published, "dit", tmp_path, num_heads=2).backbone
    x, time, labels = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 9, 10])
    expected = theirs(x, timestep=time, class_labels=labels).sample
    torch.testing.assert_close(ours(x, time.float(), labels), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_unet_is_that_of_diffusers(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    theirs = randomised(
        UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=2,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=2,  # the number of heads, in spite of its name
        )
    )
    classes = torch.randn(11, 24)
    published = {f"model.diffusion_model.{in_ldm(name)}": value for name, value in theirs.state_dict().items()}
    published["cond_stage_model.embedding.weight"] = classes
    unet = {"num_heads": 2, "attention_resolutions": [2]}
    ours = loaded(published, "ldm", tmp_path, image_size=8, unet_config={"params": unet}).backbone
    x, time, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 9, 10])
    expected = theirs(x, time, encoder_hidden_states=classes[labels][:, None]).sample
    torch.testing.assert_close(ours(x, time.float(), labels), expected, rtol=1e-4, atol=1e-4)


def in_ldm(name: str) -> str:
    """The name in LDM's layout of a weight of diffusers', with two levels of two blocks and attention at the second."""
    parts = {
        **{"norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1."},
        **{"norm2.": "out_layers.0.", "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection."},
    }
    tops = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    tops |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for theirs, ldm in tops.items():
        if name.startswith(theirs):
            return name.replace(theirs, ldm)
    found = re.fullmatch(r"(down_blocks|up_blocks|mid_block)(?:\.(\d))?\.(\w+)\.(\d)\.(.*)", name)
    assert found, name
    place, level, kind, number, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        rest = next(ldm + rest.removeprefix(theirs) for theirs, ldm in parts.items() if rest.startswith(theirs))
    if place == "mid_block":
        return f"middle_block.{2 * number if kind == 'resnets' else 1}.{rest}"
    index = 3 * level + number
    if kind == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * level + 2}.2.{rest}"
    entry = f"input_blocks.{index + 1}" if place == "down_blocks" else f"output_blocks.{index}"
    return f"{entry}.{0 if kind == 'resnets' else 1}.{rest}"


@torch.no_grad()
def test_adms_unet_is_that_of_diffusers() -> None:
    from diffusers import UNet2DModel

    from discrete_lit.backbones import LatentLayout, UNet

    theirs = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=6,
        layers_per_block=2,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=11,
    )
    # Beside this modulation it leaves out the middle's norm, which ADM has.
    theirs.mid_block.attentions[0].group_norm = nn.GroupNorm(32, 64, eps=1e-5)
    theirs = randomised(theirs)
    ours = UNet(
        LatentLayout(channels=3, grid=(8, 8), outputs=6, num_classes=10),
        channels=32,
        multipliers=[1, 2],
        attention=[2],
        attention_kind="self",
        head_dim=16,
        class_input="time",
        modulation="scale_shift",
    ).eval()
    state = theirs.state_dict()
    mine: dict[str, Tensor] = {"class_embedding.weight": state.pop("class_embedding.weight")}
    for name, value in state.items():
        own = in_ours(in_ldm(name))
        if own.endswith((".query.weight", ".query.bias")):
            parts = (name.replace("to_q", f"to_{part}") for part in "qkv")
            mine[own.replace("query", "query_key_value")] = torch.cat([state[part] for part in parts])
        elif ".to_" not in own:
            mine[own] = value
    ours.load_state_dict(mine)
    x, time, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 9, 10])
    expected = theirs(x, time, class_labels=labels).sample
    torch.testing.assert_close(ours(x, time.float(), labels), expected, rtol=1e-4, atol=1e-4)


def in_ours(name: str) -> str:
    """Our name of a weight in LDM's layout, with diffusers' names inside of an attention."""
    tops = {
        "time_embed.": "time_embedding.layers.",
        "input_blocks.0.0.": "conv_in.",
        "out.0.": "norm_out.",
        "out.2.": "conv_out.",
    }
    for ldm, own in tops.items():
        if name.startswith(ldm):
            return name.replace(ldm, own)
    found = re.fullmatch(r"(input_blocks\.\d+|output_blocks\.\d+|middle_block)\.(\d)\.(.*)", name)
    assert found, name
    entry, part, rest = found[1], int(found[2]), found[3]
    if entry == "middle_block":
        place = "middle.1" if part == 2 else "middle.0"
        part = 0 if part == 2 else part
    else:
        half, number = entry.split(".")
        place = f"down.{int(number) - 1}" if half == "input_blocks" else f"up.{number}"
    if rest.startswith(("op.", "conv.")):
        return f"{place}.resample.{rest.partition('.')[2]}"
    parts = {
        **{"in_layers.0.": "block.norm1.", "in_layers.2.": "block.conv1.", "emb_layers.1.": "block.time."},
        **{"out_layers.0.": "block.norm2.", "out_layers.3.": "block.conv2.", "skip_connection.": "block.shortcut."},
        **{
            "group_norm.": "attention.norm.",
            "to_q.": "attention.attention.query.",
            "to_out.0.": "attention.attention.out.",
        },
    }
    return next((f"{place}.{own}{rest.removeprefix(ldm)}" for ldm, own in parts.items() if rest.startswith(ldm)), name)
