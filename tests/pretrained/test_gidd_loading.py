"""GIDD's Hugging Face layout, and ReMDM's settings of a model of MDLM: sizes, settings, what is refused."""

from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.published_generators import ddit
from safetensors.torch import save_file
from torch import Tensor

from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.pretrained import load_pretrained
from discrete_lit.pretrained.conversion import FAMILIES, convert
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.sedd_mdlm import sampler
from discrete_lit.pretrained.settings import Settings

TINY: dict[str, Any] = {"width": 16, "depth": 2, "condition_width": 8, "rows": 9}
REFERENCE = {"p_uniform": 0.1, "num_attention_heads": 2, "model_type": "dit", "architectures": ["DIT"]}


def tables(length: int, head_dim: int, base: float = 10000.0) -> dict[str, Tensor]:
    angles = torch.arange(length)[:, None] * base ** -(torch.arange(0, head_dim, 2) / head_dim)
    turned = torch.cat((angles, angles), dim=1)[None, :, None, None].repeat(1, 1, 3, 1, 1)
    turned[:, :, 2] = 0
    return {"rotary_emb.cos_cached": turned.cos(), "rotary_emb.sin_cached": turned.sin()}


def published(length: int, heads: int, make: Callable[..., Tensor], **sizes: int) -> dict[str, Tensor]:
    named = {name: make(shape) for name, shape in ddit(**sizes).items() if "inv_freq" not in name}
    return named | tables(length, sizes["width"] // heads)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    """`load(change, **reference)`: a tiny checkpoint after a change of its tensors."""

    def load(change: dict[str, Tensor] | None = None, **reference: Any) -> Any:
        torch.manual_seed(0)
        state = published(12, 2, lambda shape: torch.randn(shape) * 0.1, **TINY)
        save_file(state | (change or {}), tmp_path / "model.safetensors")
        given = {name: value for name, value in {**REFERENCE, **reference}.items() if value is not None}
        return load_pretrained(tmp_path / "model.safetensors", "gidd", given)

    return load


@pytest.mark.parametrize(("size", "millions"), [((768, 12, 12), "169.6"), ((1024, 24, 16), "424.5")])
def test_published_sizes(size: tuple[int, int, int], millions: str) -> None:
    """Small and base, on GPT-2's vocabulary and a mask."""
    width, depth, heads = size
    sizes = {"width": width, "depth": depth, "condition_width": 128, "rows": 50258}
    state = State(published(512, heads, lambda shape: torch.empty(shape, device="meta"), **sizes), "gidd")
    count = sum(value.numel() for name, value in state.items() if "cached" not in name)
    assert f"{count / 1e6:.1f}" == millions
    assert [name for name, known in FAMILIES.items() if not known.lacks(state)] == ["gidd"]
    conversion = FAMILIES["gidd"].convert(state, Settings({"p_uniform": 0.2}))
    assert conversion.tokens is not None and (conversion.tokens.vocab_size, conversion.tokens.shape) == (50257, (512,))
    layout = SequenceLayout(50257, (512,), num_classes=1, attention="bidirectional", mask_token=True, timed=True)
    with torch.device("meta"):
        own = Transformer(layout, **conversion.config["init_args"]["backbone"]["init_args"])
    assert own.heads == heads
    convert(own.state_dict(), conversion, "gidd")


def test_they_sample_ids_and_have_a_likelihood(load: Callable[..., Any]) -> None:
    generator = load(steps=6)
    labels = torch.zeros(3, dtype=torch.int64)
    tokens = generator.sample(labels)
    assert tokens.shape == (3, 12) and 0 <= int(tokens.min()) and int(tokens.max()) < 8
    likelihood = generator.log_likelihood(tokens, labels)
    assert likelihood.kind == "bound" and bool((likelihood.nats < 0).all()) and bool(likelihood.nats.isfinite().all())
    assert generator.objective_kind == "not a bound"


def test_settings(load: Callable[..., Any]) -> None:
    generator = load(p_uniform=0.2, t_eps=1e-3, max_loss_weight=5.0, loss_weighting="clip", steps=7, min_p=0.01)
    parts, loss = generator.denoiser(), generator.objective
    assert (parts.process.uniform_fraction, parts.schedule.uniform_fraction) == (0.2, 0.2)
    assert (loss.weighting, loss.lowest, loss.highest, loss.time_margin) == ("clip", 0.0, 5.0, 1e-3)
    assert (generator.sampler.steps, generator.sampler.min_p) == (7, 0.01)
    assert load(p_uniform=0.0).denoiser().process.uniform_fraction == pytest.approx(exp(-20))
    masks = load(diffusion_process="mdlm", p_uniform=None)
    assert type(masks.denoiser().process).__name__ == "AbsorbingProcess" and masks.objective_kind == "not a bound"


@pytest.mark.parametrize(
    ("change", "reference", "message"),
    [
        ({}, {"p_uniform": None}, "do not tell how many ids noise draws uniformly: give p_uniform in reference_config"),
        ({}, {"mask_token_id": 3}, "mask_token_id=3, but its mask is the last of all ids, which is 8"),
        ({}, {"hidden_size": 32}, "hidden_size=32, but the tensors have 16"),
        ({}, {"max_seq_len": 16}, "max_seq_len=16, but the tensors have 12"),
        ({}, {"num_attention_heads": 3}, "num_attention_heads=3, which does not divide the 16 channels"),
        ({}, {"loss_weighting": "snr"}, "loss_weighting='snr'; dynamic and clip and none are read"),
        ({}, {"gamma": 2.0}, "gamma=2.0, but every model that is read has 1.0"),
        ({}, {"p_unif": 0.1}, "has p_unif=0.1, which is not read; did you mean p_uniform"),
        (tables(12, 8, base=500.0), {}, "rotary_emb.cos_cached or sin_cached is not that of base 10000"),
        ({"logit_bias": torch.zeros(9)}, {}, "'logit_bias' is unexpected"),
    ],
)
def test_what_is_refused(
    change: dict[str, Tensor], reference: dict[str, Any], message: str, load: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        load(change, **reference)


def described(**sampling: Any) -> dict[str, Any]:
    settings = Settings(sampling)
    found = sampler(settings, {"ddpm_cache": "AncestralSampler"}, "ddpm_cache", 128, "argmax")
    settings.finish()
    return {"kind": found["class_path"].rpartition(".")[2], **found["init_args"]}


def test_the_samplers_of_remdm_by_their_names() -> None:
    """With the settings of the scripts of its repository."""
    common = {"steps": 128, "clean_up": "argmax"}
    assert described() == described(sampler="mdlm", eta=0.1) == {"kind": "AncestralSampler", **common}
    common["kind"] = "RemaskingSampler"
    nucleus = {**common, "nucleus": 0.9}
    assert described(nucleus_p=0.9) == {**nucleus, "strategy": "rescale", "eta": 0.0}
    assert described(sampler="remdm-cap", eta=0.008, nucleus_p=0.9) == {**nucleus, "strategy": "cap", "eta": 0.008}
    assert described(sampler="remdm-rescale", eta=0.015) == {**common, "strategy": "rescale", "eta": 0.015}
    assert described(sampler="remdm-conf", eta=0.1) == {**common, "strategy": "conf"}
    looped = described(sampler="remdm-loop", eta=0.02, t_on=0.55, t_off=0.05, alpha_on=0.9)
    assert looped.pop("loop") == pytest.approx([0.45, 0.95])
    assert looped == {**common, "strategy": "loop", "eta": 0.02, "loop_alpha": 0.9}
    assert described(sampler="forward-backward") == {**common, "strategy": "forward_backward"}
    assert described(dfm=True, nucleus_p=0.9) == {**nucleus, "strategy": "flow_matching"}
    with pytest.raises(ValueError, match="sampler='remdm'; mdlm and forward-backward and remdm-cap and"):
        described(sampler="remdm")
