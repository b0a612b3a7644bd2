"""HART's files: what their settings say is honoured or refused, what else they hold, and other tokenizers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from safetensors.torch import save_file
from torch import Tensor

import discrete_lit
from discrete_lit.backbones.condition import Condition
from discrete_lit.checkpoints import instantiate, save
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators import HybridNextScale
from discrete_lit.pretrained import load_pretrained
from discrete_lit.pretrained.taming import CODES
from discrete_lit.pretrained.var import LAYOUT
from discrete_lit.tokenizers import HybridVQ

Tensors = dict[str, Tensor]
SIDES = [1, 2, 3]


def layer(name: str, outputs: int, inputs: int, *, bias: bool = True) -> Tensors:
    made = {f"{name}.weight": torch.randn(outputs, inputs) * 0.2}
    return made | ({f"{name}.bias": torch.randn(outputs) * 0.1} if bias else {})


def hart_state(*, sharpness: bool = True, modulated: bool = True, waves: bool = False, norm: bool = True) -> Tensors:
    """A HART of width 16, two heads and one block, of text of four vectors of width 6, over 7 codes of width 3."""
    torch.manual_seed(0)
    levels = torch.arange(3).repeat_interleave(torch.tensor([4, 4, 9]))
    block = "blocks.0"
    state = {
        **layer("word_embed", 16, 3),
        **layer("context_embed", 16, 6),
        "lvl_1L": levels[None],
        "attn_bias_for_masking": torch.zeros(1, 1, 17, 17),
        f"{block}.ln_wo_grad.weight": 1 + 0.1 * torch.randn(16),
        **layer(f"{block}.attn.qkv_proj", 48, 16, bias=False),
        f"{block}.attn.q_bias": torch.randn(16),
        f"{block}.attn.v_bias": torch.randn(16),
        f"{block}.attn.zero_k_bias": torch.zeros(16),
        **layer(f"{block}.attn.proj", 16, 16),
        **layer(f"{block}.ffn.gate_proj", 256, 16, bias=False),
        **layer(f"{block}.ffn.up_proj", 256, 16, bias=False),
        **layer(f"{block}.ffn.down_proj", 16, 256, bias=False),
        "head_nm.ln_wo_grad.weight": torch.ones(16),
        **layer("head_nm.ada_lin.1", 32, 16),
        **layer("head", 7, 16),
        "decoder_norm.weight": torch.ones(16),
        **layer("diffloss.net.time_embed.mlp.0", 8, 256),
        **layer("diffloss.net.time_embed.mlp.2", 8, 8),
        **layer("diffloss.net.cond_embed", 8, 16),
        **layer("diffloss.net.input_proj", 8, 3),
        "diffloss.net.res_blocks.0.in_ln.weight": torch.ones(8),
        "diffloss.net.res_blocks.0.in_ln.bias": torch.zeros(8),
        **layer("diffloss.net.res_blocks.0.mlp.0", 8, 8),
        **layer("diffloss.net.res_blocks.0.mlp.2", 8, 8),
        **layer("diffloss.net.res_blocks.0.adaLN_modulation.1", 24, 8),
        **layer("diffloss.net.final_layer.adaLN_modulation.1", 16, 8),
        **layer("diffloss.net.final_layer.linear", 6, 8),
    }
    if sharpness:
        state[f"{block}.attn.scale_mul_1H11"] = torch.rand(1, 2, 1, 1)
    if modulated:
        state |= layer(f"{block}.ada_lin.1", 96, 16)
    if norm:
        state["context_norm.weight"] = 1 + 0.1 * torch.randn(6)
    if waves:
        return state | layer("lvl_embed.mlp.0", 16, 256) | layer("lvl_embed.mlp.2", 16, 16)
    return state | {"lvl_embed.weight": torch.randn(3, 16)}


def tokenizer(scales: list[int] | None = None, kind: str = "HybridVQ", code_dim: int = 3) -> Any:
    """Of images of 12 pixels, with random weights."""
    network = {
        "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
        "init_args": {"channels": 32, "multipliers": [1, 1, 1], "blocks": 1, "latent_kernel": 3},
    }
    settings = {"network": network, "codebook_size": 7, "code_dim": code_dim, "scales": scales or SIDES}
    return randomise(instantiate({"class_path": f"discrete_lit.tokenizers.{kind}", "init_args": settings}), 0.3).eval()


def load(folder: Path, state: Tensors, config: Any = None, own: Any = None) -> HybridNextScale:
    save_file(state, folder / "hart.safetensors")
    given = {"patch_nums": SIDES, **(config or {})}
    made = load_pretrained(folder / "hart.safetensors", "hart", given, own or tokenizer())
    assert isinstance(made, HybridNextScale)
    return made


def text() -> Condition:
    torch.manual_seed(3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    labels = torch.zeros(2, dtype=torch.int64)
    return Condition(labels=labels, context=torch.randn(2, 4, 6), context_mask=mask)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize(
    ("switches", "said"),
    [
        ({}, {"attn_l2_norm": True, "num_heads": 2}),
        ({"sharpness": False}, {"attn_l2_norm": False, "num_heads": 2}),
        ({"modulated": False, "waves": True}, {"disable_aln": True, "use_timestep_embed": True}),
        ({"norm": False}, {"use_context_norm": False, "context_token": 4, "context_dim": 6}),
    ],
)
@torch.no_grad()
def test_what_the_tensors_tell_is_honoured(switches: dict[str, bool], said: dict[str, Any], tmp_path: Path) -> None:
    made = load(tmp_path, hart_state(**switches), said)
    drawn = made.draw_given(text(), CounterRandom(0, torch.arange(2)))
    assert drawn.tokens.shape == (2, 3, 3, 3) and drawn.tokens.isfinite().all()
    save(made, tmp_path / "ours.ckpt")
    assert discrete_lit.load(tmp_path / "ours.ckpt").hparams == made.hparams
    other = {name: not value if isinstance(value, bool) else value + 1 for name, value in said.items()}
    for name, value in other.items():
        if name == "num_heads" and not switches.get("sharpness", True):
            continue  # which the tensors do not tell then
        with pytest.raises(ValueError, match=f"has {name}={value}, but the tensors have {said[name]}"):
            load(tmp_path, hart_state(**switches), {**said, name: value})


@torch.no_grad()
def test_scores_without_unit_vectors(tmp_path: Path) -> None:
    """The released code divides them by 4 sqrt(d), and pairs the halves of a head's channels."""
    state = hart_state(sharpness=False)
    made = load(tmp_path, state, {"num_heads": 2})
    attention, x = made.backbone.blocks[0].attention, torch.randn(1, 5, 16)
    query, key, value = attention._project(x)
    weight = state["blocks.0.attn.qkv_proj.weight"]
    bias = torch.cat((state["blocks.0.attn.q_bias"], torch.zeros(16), state["blocks.0.attn.v_bias"]))
    theirs = (x @ weight.T + bias).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    expected = theirs[0] @ theirs[1].transpose(-1, -2) * 0.25 / 8**0.5
    torch.testing.assert_close(query @ key.transpose(-1, -2) / 8**0.5, expected)
    torch.testing.assert_close(value, theirs[2])
    torch.testing.assert_close(key[..., 0::2], theirs[1][..., :4])
    torch.testing.assert_close(key[..., 1::2], theirs[1][..., 4:])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"patch_nums": [1, 2, 4]}, "has 3 scales with 13 places behind the first: give their sides as patch_nums"),
        ({"mlp_ratio": 30.0}, "has mlp_ratio=30.0, but the tensors have 256 channels in the MLP"),
        ({"shared_aln": True}, "has shared_aln=True, but every model that is read has False"),
        ({"use_cross_attn": True}, "has use_cross_attn=True, but every model"),
        ({"sep_aln_pooling_mode": "avg"}, "has sep_aln_pooling_mode=avg, but every model"),
        ({"attn_type": "gpt2"}, "has attn_type=gpt2, but every model"),
        ({"num_sampling_steps": "ddim8"}, "has num_sampling_steps='ddim8', but a whole number above 0"),
        ({"sampling": {"more_smooth": True}}, "has sampling.more_smooth=True, but what is read has False"),
        ({"tokenizer": {"vocab_size": 8}}, "has tokenizer.vocab_size=8, but the tensors have 7"),
        ({"tokenizer": {"v_patch_nums": [1, 3]}}, r"v_patch_nums=\[1, 3\], but patch_nums has \[1, 2, 3\]"),
        ({"depht": 1}, "has depht=1, which is not read; did you mean depth"),
    ],
)
def test_other_settings_are_refused_by_name(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, hart_state(), config)


def test_other_tokenizers(tmp_path: Path) -> None:
    state = hart_state()
    with pytest.raises(ValueError, match=r"scales are \[1, 3\], this generator models \[1, 2, 3\]"):
        load(tmp_path, state, own=tokenizer([1, 3]))
    with pytest.raises(ValueError, match=r"gives no square image up to 2048 pixels latents of the shape \(3, 3, 3\)"):
        load(tmp_path, state, own=tokenizer([1, 2, 4]))
    with pytest.raises(ValueError, match=r"latents of the shape \(3, 3, 3\)"):
        load(tmp_path, state, own=tokenizer(code_dim=4))
    with pytest.raises(ValueError, match="models latents, which a MultiScaleVQ does not make"):
        load(tmp_path, state, own=tokenizer(kind="MultiScaleVQ"))
    save_file(state, tmp_path / "hart.safetensors")
    with pytest.raises(ValueError, match="set tokenizer to HybridLatents"):
        load_pretrained(tmp_path / "hart.safetensors", "hart", {"patch_nums": SIDES})


def published_tokenizer(module: HybridVQ) -> Tensors:
    """Its weights as they are published, with the usage of the codes and a discriminator beside."""
    rules = [CODES, ("quantizer.phi.{kernel}.{rest}", "quantize.quant_resi.qresi_ls.{kernel}.{rest}")]
    renaming, state = LAYOUT.renaming(3, rules), {}
    for name, value in module.state_dict().items():
        for theirs, part in zip(names := renaming.published(name), value.chunk(len(names)), strict=True):
            is_attention = theirs.endswith(("qkv.weight", "proj_out.weight"))
            state[f"vae.{theirs}"] = (part[..., None, None] if is_attention and part.ndim == 2 else part).clone()
    state["vae.quantize.ema_vocab_hit_SV"] = torch.zeros(3, 7)
    return state | {"disc.conv.weight": torch.zeros(3)}


def test_a_published_tokenizer_with_its_discriminator(tmp_path: Path) -> None:
    own = tokenizer()
    save_file(published_tokenizer(own), tmp_path / "model.safetensors")
    config = {
        "v_patch_nums": SIDES,
        "quantizer_type": "var_hybrid",
        "hybrid": True,
        "ch": 32,
        "transformers_version": "4",
    }
    with pytest.warns(UserWarning, match=r"the part vae\.\* is read; the others are not: disc"):
        module = load_pretrained(tmp_path / "model.safetensors", "hart_tokenizer", config)
    assert isinstance(module, HybridVQ) and module.decoder_only
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        name: tuple(value.shape) for name, value in own.state_dict().items()
    }
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in module.state_dict().items())
    for wrong, message in (
        ({"quantizer_type": "var"}, "has quantizer_type=var, but the published tokenizer has var_hybrid"),
        ({"double_decoder": True}, "has double_decoder=True, but"),
        ({"using_znorm": True}, "has using_znorm=True, but"),
    ):
        with pytest.warns(UserWarning, match="disc"), pytest.raises(ValueError, match=message):
            load_pretrained(tmp_path / "model.safetensors", "hart_tokenizer", {**config, **wrong})
    with pytest.warns(UserWarning, match="disc"), pytest.raises(ValueError, match="has 3 scales: give their sides"):
        load_pretrained(tmp_path / "model.safetensors", "hart_tokenizer")
