"""Published generators of latents: what their settings say is honoured or refused, and what else their files hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import discrete_lit
from discrete_lit.backbones.embeddings import grid_coordinates, sine_cosine_table
from discrete_lit.checkpoints import save
from discrete_lit.diffusion.gaussian import TrigonometricPath, scaled_linear_betas
from discrete_lit.pretrained import load_pretrained
from discrete_lit.tokenizers import CodebookLatents, LatentGrid, TokenGrid

Tensors = dict[str, Tensor]


def layer(name: str, outputs: int, inputs: int, *kernel: int, bias: bool = True) -> Tensors:
    made = {f"{name}.weight": torch.randn(outputs, inputs, *kernel) * 0.1}
    return made | ({f"{name}.bias": torch.randn(outputs) * 0.1} if bias else {})


def norm(name: str, width: int) -> Tensors:
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def dit_state(*, rows: int = 4, outputs: int = 8) -> Tensors:
    """A DiT of width 16 and one block over latents of four channels, 4 x 4, in patches of 2."""
    torch.manual_seed(0)
    return {
        **layer("x_embedder.proj", 16, 4, 2, 2),
        "pos_embed": sine_cosine_table(grid_coordinates((2, 2)).flip(1), 16)[None],
        **layer("t_embedder.mlp.0", 16, 256),
        **layer("t_embedder.mlp.2", 16, 16),
        "y_embedder.embedding_table.weight": torch.randn(rows, 16),
        **layer("blocks.0.attn.qkv", 48, 16),
        **layer("blocks.0.attn.proj", 16, 16),
        **layer("blocks.0.mlp.fc1", 64, 16),
        **layer("blocks.0.mlp.fc2", 16, 64),
        **layer("blocks.0.adaLN_modulation.1", 96, 16),
        **layer("final_layer.adaLN_modulation.1", 32, 16),
        **layer("final_layer.linear", 4 * outputs, 16),
    }


def ldm_state(*, rows: int = 5) -> Tensors:
    """A U-Net of one level with attention, over latents of four channels."""
    torch.manual_seed(0)
    unet: Tensors = {**layer("time_embed.0", 128, 32), **layer("time_embed.2", 128, 128)}
    unet |= layer("input_blocks.0.0", 32, 4, 3, 3)

    def block(name: str, inputs: int) -> None:
        unet.update(norm(f"{name}.in_layers.0", inputs) | layer(f"{name}.in_layers.2", 32, inputs, 3, 3))
        unet.update(layer(f"{name}.emb_layers.1", 32, 128) | norm(f"{name}.out_layers.0", 32))
        unet.update(layer(f"{name}.out_layers.3", 32, 32, 3, 3))
        if inputs != 32:
            unet.update(layer(f"{name}.skip_connection", 32, inputs, 1, 1))

    def attention(name: str) -> None:
        unet.update(norm(f"{name}.norm", 32) | layer(f"{name}.proj_in", 32, 32, 1, 1))
        unet.update(layer(f"{name}.proj_out", 32, 32, 1, 1))
        inner = f"{name}.transformer_blocks.0"
        for number, width in ((1, 32), (2, 8)):
            unet.update(layer(f"{inner}.attn{number}.to_q", 32, 32, bias=False))
            for part in "kv":
                unet.update(layer(f"{inner}.attn{number}.to_{part}", 32, width, bias=False))
            unet.update(layer(f"{inner}.attn{number}.to_out.0", 32, 32))
        for number in (1, 2, 3):
            unet.update(norm(f"{inner}.norm{number}", 32))
        unet.update(layer(f"{inner}.ff.net.0.proj", 256, 32) | layer(f"{inner}.ff.net.2", 32, 128))

    for name, inputs in (("input_blocks.1", 32), ("output_blocks.0", 64), ("output_blocks.1", 64)):
        block(f"{name}.0", inputs)
        attention(f"{name}.1")
    block("middle_block.0", 32)
    attention("middle_block.1")
    block("middle_block.2", 32)
    unet |= {**norm("out.0", 32), **layer("out.2", 4, 32, 3, 3)}
    betas = torch.tensor(scaled_linear_betas())
    return {
        **{f"model.diffusion_model.{name}": value for name, value in unet.items()},
        "cond_stage_model.embedding.weight": torch.randn(rows, 8),
        "alphas_cumprod": torch.cumprod(1 - betas, dim=0).float(),
        "betas": betas.float(),
    }


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    def read(state: Tensors, family: str, tokenizer: Any = None, **reference: Any) -> Any:
        save_file(state, tmp_path / "published.safetensors")
        return load_pretrained(tmp_path / "published.safetensors", family, reference, tokenizer)

    return read


def test_the_published_evaluation_is_the_sampler(load: Callable[..., Any]) -> None:
    for family, solver in (("dit", "DDPM"), ("sit", "EulerMaruyama")):
        generator = load(dit_state(), family, num_heads=2)
        sampler = generator.sampler
        assert type(sampler.solver).__name__ == solver and sampler.solver.steps == 250
        assert (sampler.guidance_scale, sampler.guided_channels, generator.num_classes) == (1.5, 3, 3)
    assert isinstance(load(dit_state(), "sit", num_heads=2, path_type="GVP").denoiser.path, TrigonometricPath)
    ldm = load(ldm_state(), "ldm")
    assert (ldm.sampler.guidance_scale, ldm.num_classes, ldm.latent_shape) == (1.5, 4, (4, 64, 64))


def test_a_model_without_dropped_labels_has_no_null(load: Callable[..., Any]) -> None:
    generator = load(dit_state(), "dit", num_heads=2, class_dropout_prob=0.0)
    assert (generator.num_classes, generator.label_dropout, generator.sampler.guidance_scale) == (4, 0.0, 1.0)
    assert not generator.backbone.class_embedding.weight[4].any()
    generator = load(ldm_state(rows=1000), "ldm")
    assert (generator.num_classes, generator.label_dropout, generator.sampler.guidance_scale) == (1000, 0.0, 1.0)


def test_sit_without_a_second_half_is_the_same(load: Callable[..., Any]) -> None:
    state = dit_state()
    first = {**state}
    for kind in ("weight", "bias"):
        by_channel = state[f"final_layer.linear.{kind}"].unflatten(0, (4, 8))
        first[f"final_layer.linear.{kind}"] = by_channel[:, :4].flatten(0, 1).contiguous()
    x = torch.randn(2, 4, 4, 4)
    outputs = [
        load(each, "sit", num_heads=2).backbone(x, torch.zeros(2), torch.tensor([0, 1])) for each in (state, first)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("family", "reference", "message"),
    [
        ("dit", {"hidden_size": 32}, "hidden_size=32, but the tensors have 16"),
        ("dit", {"input_size": 8}, "input_size=8, but the tensors have 4"),
        ("dit", {"learn_sigma": False}, "learn_sigma=False, but the tensors have True"),
        (
            "dit",
            {"num_classes": 4},
            r"has 4 class embeddings; reference_config has num_classes=4 and class_dropout_prob",
        ),
        ("dit", {"num_heads": 3}, "num_heads=3, which does not divide the 16 channels"),
        ("dit", {"path_type": "Linear"}, "path_type='Linear', which is not read"),
        ("sit", {"path_type": "VP"}, "path_type='VP'; Linear and GVP are read"),
        ("sit", {"prediction": "score"}, "prediction=score, but every model that is read has velocity"),
        ("ldm", {"linear_end": 0.02}, "has another schedule than timesteps=1000, linear_start=0.0015, linear_end=0.02"),
        ("ldm", {"channels": 3}, "channels=3, but the tensors have 4"),
        ("ldm", {"parameterization": "v"}, "parameterization='v'; eps and x0 are read"),
        ("ldm", {"conditioning_key": "concat"}, "conditioning_key=concat, but every model that is read has crossattn"),
        (
            "ldm",
            {"unet_config": {"params": {"attention_resolutions": [2]}}},
            r"rates of down-sampling, other than those",
        ),
        ("ldm", {"unet_config": {"params": {"num_heads": 5}}}, "heads=5, head_dim=None must divide 32 channels"),
        ("ldm", {"unet_config": {"params": {"resblock_updown": True}}}, "resblock_updown=True, but every model"),
        ("ldm", {"cond_stage_config": {"params": {"n_classes": 6}}}, "n_classes=6, but the tensors have 5"),
        (
            "ldm",
            {"image_size": 32, "unet_config": {"params": {"image_size": 64}}},
            "image_size=64, but the model has 32",
        ),
    ],
)
def test_settings_that_contradict_the_file_are_refused(
    load: Callable[..., Any], family: str, reference: dict[str, Any], message: str
) -> None:
    state = ldm_state() if family == "ldm" else dit_state()
    with pytest.raises(ValueError, match=message):
        load(state, family, **reference)


def test_positions_other_than_dits_are_refused(load: Callable[..., Any]) -> None:
    rows_first = {**dit_state(), "pos_embed": sine_cosine_table(grid_coordinates((2, 2)), 16)[None]}
    with pytest.raises(ValueError, match="has a 'pos_embed' other than the fixed sines and cosines"):
        load(rows_first, "dit")


def test_averaged_weights_are_taken_unless_the_model_has_none(load: Callable[..., Any]) -> None:
    state = ldm_state()
    names = [name for name in state if name.startswith("model.")]
    state |= {f"model_ema.{name.removeprefix('model.').replace('.', '')}": state[name] + 1 for name in names}
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    biases = [load(state, "ldm", use_ema=averaged).backbone.conv_out.bias for averaged in (True, False)]
    torch.testing.assert_close(biases[0], biases[1] + 1)
    del state["model_ema.decay"]
    assert torch.equal(load(state, "ldm").backbone.conv_out.bias, biases[0])


def test_the_first_stage_of_the_file_is_the_tokenizer(
    load: Callable[..., Any], taming_state: Callable[[], Tensors], tmp_path: Path
) -> None:
    vqgan = taming_state()
    first = {f"first_stage_model.{name}": value for name, value in vqgan.items()}
    stage = {"target": "ldm.models.autoencoder.VQModelInterface", "params": {"n_embed": 16, "embed_dim": 4}}
    generator = load({**ldm_state(), **first}, "ldm", image_size=4, first_stage_config=stage)
    assert isinstance(generator.tokenizer, CodebookLatents) and generator.image_size == 8
    inner = load(vqgan, "taming_vqgan")
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    latents = generator.tokenizer.encode(images)
    assert latents.shape == (2, 4, 4, 4)
    torch.testing.assert_close(latents, inner.latents(images).movedim(-1, 1))
    save(generator, tmp_path / "ours.ckpt")
    again = discrete_lit.load(tmp_path / "ours.ckpt")
    assert torch.equal(again.tokenizer.encode(images), latents)
    assert torch.equal(again.tokenizer.decode(latents), generator.tokenizer.decode(latents))
    with pytest.raises(ValueError, match="holds its own tokenizer: give no other"):
        load({**ldm_state(), **first}, "ldm", LatentGrid((4, 4, 4)), image_size=4)


def test_tokenizers_of_another_kind_or_shape_are_refused(load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="family='dit' models latents, which a TokenGrid does not make"):
        load(dit_state(), "dit", TokenGrid(16, (4, 4)), num_heads=2)
    with pytest.raises(ValueError, match=r"gives no square image up to 2048 pixels latents of the shape \(4, 4, 4\)"):
        load(dit_state(), "dit", LatentGrid((4, 8, 8)), num_heads=2)
