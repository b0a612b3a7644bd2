"""VA-VAE's loader: statistics of the latents, the alignment that a file was trained with, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from discrete_lit.pretrained import load_pretrained

State = dict[str, Tensor]


@pytest.fixture
def load(taming_state: Callable[[], State], tmp_path: Path) -> Callable[..., Any]:
    """`load(reference_config, extra)`: four latent channels, with more tensors."""

    def load(reference_config: Any = None, extra: State | None = None) -> Any:
        torch.manual_seed(0)
        state = taming_state()
        del state["quantize.embedding.weight"]
        state["quant_conv.weight"], state["quant_conv.bias"] = torch.randn(8, 8, 1, 1), torch.randn(8)
        save_file(state | (extra or {}), tmp_path / "vavae.safetensors")
        return load_pretrained(tmp_path / "vavae.safetensors", "va_vae", reference_config)

    return load


@torch.no_grad()
def test_latents_are_normalised_by_the_published_statistics(load: Callable[..., Any], tmp_path: Path) -> None:
    mean, std = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 0.5, 4.0])
    shaped = {name: value[None, :, None, None] for name, value in {"mean": mean, "std": std}.items()}
    torch.save(shaped, tmp_path / "latents_stats.pt")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    plain = load()
    assert plain.alignment is None and plain.scale_factor == 1 and plain.latent_mean is None
    reference = {"latents_stats": str(tmp_path / "latents_stats.pt"), "latent_multiplier": 0.5}
    scaled = load(reference)
    expected = (plain.encode(images) - shaped["mean"]) / shaped["std"] * 0.5
    torch.testing.assert_close(scaled.encode(images), expected)
    torch.testing.assert_close(scaled.decode(expected), plain.decode(plain.encode(images)))
    torch.save({"mean": mean[:3], "std": std[:3]}, tmp_path / "latents_stats.pt")
    with pytest.raises(ValueError, match="whose mean has 3 numbers for 4 latent channels"):
        load(reference)


@pytest.mark.parametrize(("reverse", "project"), [(True, "latents"), (False, "features")])
def test_the_alignment_of_a_training_file(load: Callable[..., Any], reverse: bool, project: str) -> None:
    weight = torch.randn(*((12, 4) if reverse else (4, 12)), 1, 1)
    extra = {"linear_proj.weight": weight, "foundation_model.model.cls_token": torch.zeros(1)}
    if not reverse:
        extra["linear_proj.bias"] = torch.randn(4)
    losses = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {"disc_start": 1, "kl_weight": 1e-6}}
    losses["params"] |= {"vf_weight": 0.3, "cos_margin": 0.25, "adaptive_vf": False}
    reference = {"use_vf": "mae", "reverse_proj": reverse, "vf_feature_dim": 12, "lossconfig": losses}
    module = load(reference, extra)
    alignment = module.alignment
    assert alignment.project == project and alignment.model_name == "vit_large_patch16_224.mae"
    assert (alignment.weight, alignment.cosine_margin, alignment.distance_margin) == (0.3, 0.25, 0.25)
    assert not alignment.adaptive and torch.equal(alignment.projection.weight, weight[..., 0, 0])
    assert module.bottleneck.kl_weight == pytest.approx(1e-6 / (3 * 256 * 256))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"use_vf": "clip"}, "use_vf='clip'; dinov2 and mae are read"),
        ({"vf_feature_dim": 1024}, "vf_feature_dim=1024, but with reverse_proj=True the tensors have 12"),
        ({"embed_dim": 32}, "embed_dim=32, but the tensors have 4"),
        ({"lossconfig": {"params": {"distmat_weight": 2.0}}}, r"distmat_weight=2\.0, but every model"),
        ({"proj_fix": True}, "proj_fix=True, but every model"),
        ({"use_vff": "mae"}, "use_vff='mae', which is not read"),
    ],
)
def test_settings_that_contradict_the_file(load: Callable[..., Any], reference: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(reference, {"linear_proj.weight": torch.randn(12, 4, 1, 1)})


def test_a_decoder_that_takes_noise_is_refused(tmp_path: Path) -> None:
    """BitDance's `gan_decoder`: twice as many channels as bits."""
    state = {
        "encoder.down.0.block.0.conv1.weight": torch.zeros(32, 32, 3, 3),
        "encoder.conv_out.weight": torch.zeros(8, 32, 1, 1),
        "decoder.adaptive.0.gamma.weight": torch.zeros(32, 8),
        "decoder.conv_in.weight": torch.zeros(32, 16, 3, 3),
    }
    save_file(state, tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match=r"has a decoder of 16 channels for 8 bits: .*gan_decoder"):
        load_pretrained(tmp_path / "ae.safetensors", "bitdance_ae")
