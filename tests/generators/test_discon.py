"""DisCon: what d decides, on which d it trains, its checkpoint without other files, bad input."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_runs import QUIET, TOKENIZER, generator_settings, run, write_settings
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import discrete_lit
from discrete_lit.backbones import MaskedAutoencoder, TokenDiffusionHead, Transformer, VectorLayout
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath
from discrete_lit.diffusion.solvers import DDPM, Heun
from discrete_lit.generators import DisCon, Masked
from discrete_lit.samplers import MARSampler, MaskGITSampler
from discrete_lit.tokenizers import RawPixels
from discrete_lit.tokenizers.tokenizer import TokenGrid

IDS = 6


def generator(
    fusion: Any = "mix",
    grid: tuple[int, int] = (2, 4),
    image_size: int = 4,
    image_channels: int | None = None,
    flow: bool = False,
    **settings: Any,
) -> DisCon:
    """DisCon of images of 4 pixels and one channel; the sizes given are those of d."""
    torch.manual_seed(0)
    tokenizer = TokenGrid(IDS, grid)
    if image_channels is not None:
        tokenizer.image_channels = image_channels  # type: ignore[assignment]
    discrete = Masked(
        tokenizer,
        image_size,
        num_classes=2,
        backbone=lambda layout: Transformer(layout, width=8, depth=1, heads=1),
        sampler=MaskGITSampler(2),
    )

    def network(layout: VectorLayout) -> MaskedAutoencoder:
        return MaskedAutoencoder(layout, width=16, depth=1, heads=2, buffer=2, fusion=fusion)

    def head(dim: int, width: int) -> TokenDiffusionHead:
        denoiser = GaussianDenoiser(RectifiedPath(), prediction="velocity") if flow else None
        return TokenDiffusionHead(dim, width, width=16, depth=1, repeats=1, denoiser=denoiser, solver=DDPM(3))

    given: dict[str, Any] = {"num_classes": 2, "sampler": MARSampler(3), **settings}
    made = DisCon(RawPixels(1), 4, discrete=discrete, backbone=network, head=head, **given)
    for parameter in made.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    return made


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "latents": torch.randn(6, 1, 4, 4),
        "tokens": torch.randint(IDS, (6, 2, 4)),
        "label": torch.tensor([0, 1, 1, 0, 1, 0]),
        "index": torch.arange(6),
    }


def test_an_id_stands_for_its_square_of_places() -> None:
    grid = generator().aligned(torch.arange(8).view(1, 2, 4) % IDS)
    assert grid.view(4, 4).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 0, 1], [4, 5, 0, 1]]


@pytest.mark.parametrize("fusion", ["prefix", "mix", "add", "cross"])
def test_d_decides_what_is_drawn_and_its_null_is_dropped_with_the_class(fusion: Any) -> None:
    made, data = generator(fusion).eval(), batch()
    random = CounterRandom(0, torch.arange(6))
    true = made.draw(data["label"], random, tokens=data["tokens"]).tokens
    assert true.shape == (6, 1, 4, 4)
    shuffled = made.draw(data["label"], random, tokens=data["tokens"].roll(1, dims=0)).tokens
    assert bool(((true - shuffled).abs().amax(dim=(1, 2, 3)) > 1e-3).all())
    condition = made.condition_of(data, random)
    everything = torch.ones(6, dtype=torch.bool)
    dropped, _ = made.loss(data["latents"], condition, random, dropped=everything)
    other = made.condition_of({**data, "tokens": (data["tokens"] + 1) % IDS, "label": 1 - data["label"]}, random)
    torch.testing.assert_close(made.loss(data["latents"], other, random, dropped=everything)[0], dropped)
    assert (
        made.loss(data["latents"], other, random)[0] - made.loss(data["latents"], condition, random)[0]
    ).abs() > 1e-4


@pytest.mark.parametrize("fusion", ["prefix", "cross"])
def test_d_of_any_shape_stands_in_front_or_is_attended_to(fusion: Any) -> None:
    made, data = generator(fusion, grid=(3, 4), exposure="replace").train(), batch()
    data["tokens"] = torch.randint(IDS, (6, 3, 4))
    random = CounterRandom(0, torch.arange(6))
    condition = made.condition_of(data, random)
    assert condition.grid is not None and condition.grid.shape == (6, 12)
    assert (condition.grid == data["tokens"].flatten(1)).double().mean() == pytest.approx(1 - 0.1 * 5 / 6, abs=0.1)
    assert made.loss(data["latents"], condition, random)[0].isfinite()
    made.eval()
    true = made.draw(data["label"], random, tokens=data["tokens"]).tokens
    assert torch.equal(made.draw(made.condition_of(data, random), random).tokens, true)
    assert not torch.allclose(made.draw(data["label"], random, tokens=data["tokens"].roll(1, dims=0)).tokens, true)


def test_a_draw_counts_both_generators_and_belongs_to_its_index() -> None:
    made = generator().eval()
    labels, indices = torch.tensor([0, 1, 1]), torch.tensor([4, 9, 2])
    output = made.draw(labels, CounterRandom(3, indices))
    assert (output.network_calls, output.sequential_passes) == (2 + 3, 2 + 3)
    alone = made.draw(labels[1:2], CounterRandom(3, indices[1:2])).tokens
    torch.testing.assert_close(alone[0], output.tokens[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fusion", ["prefix", "mix", "add", "cross"])
def test_its_operations_are_those_of_both_generators_and_the_head(fusion: Any) -> None:
    sampler = MARSampler(3, guidance_scale=2.0, solver=Heun(2))
    made = generator(fusion, sampler=sampler, flow=True).eval().requires_grad_(False)
    labels, random = torch.tensor([0, 1, 1]), CounterRandom(3, torch.arange(3))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = made.draw(labels, random)
    with FlopCounterMode(display=False) as of_times:  # once for each pass, whatever the batch
        made.head.network.time_embedding(torch.zeros(3))
    assert 3 * output.flops == counter.get_total_flops() - 3 * of_times.get_total_flops() > 0
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        first = made.discrete.draw(labels, random)
    assert 3 * first.flops == counter.get_total_flops() > 0
    assert made.drawing_networks() == (made.discrete.backbone, made.backbone, made.head)
    # Of d that is given, the latents alone.
    assert made.draw(labels, random, tokens=first.tokens).flops == output.flops - first.flops > 0


@pytest.mark.parametrize(("sampler", "passes"), [(None, 2), (MaskGITSampler(1), 1)])
def test_d_is_drawn_in_training_by_the_sampler_that_is_given(sampler: MaskGITSampler | None, passes: int) -> None:
    made = generator(exposure="mixture", exposure_probability=1.0, exposure_sampler=sampler).train()
    calls: list[Any] = []
    made.discrete.backbone.register_forward_hook(lambda *given: calls.append(given))
    made.condition_of(batch(), CounterRandom(0, torch.arange(6)))
    assert len(calls) == passes


def test_exposure_shows_other_d_in_training_alone() -> None:
    data, random = batch(), CounterRandom(0, torch.arange(6))
    true = generator().aligned(data["tokens"])
    for exposure, probability, changed in (("none", 1.0, 0.0), ("replace", 0.5, 0.5 * 5 / 6), ("replace", 1.0, 5 / 6)):
        made = generator(exposure=exposure, exposure_probability=probability)
        grid = made.train().condition_of(data, random).grid
        assert grid is not None
        assert 0 <= int(grid.min()) and int(grid.max()) < IDS
        assert (grid != true).double().mean().item() == pytest.approx(changed, abs=0.15)
        seen = made.eval().condition_of(data, random).grid
        assert seen is not None
        assert torch.equal(seen, true)
    made = generator(exposure="mixture", exposure_probability=0.5).train()
    grid = made.condition_of(data, random).grid
    assert grid is not None
    drawn = made.aligned(made.discrete.draw(data["label"], random).tokens)
    rows = [torch.equal(row, real) for row, real in zip(grid, true, strict=True)]
    assert 0 < sum(rows) < 6
    assert all(torch.equal(grid[row], drawn[row]) for row in range(6) if not rows[row])
    assert not made.discrete.training
    assert not any(parameter.requires_grad for parameter in made.discrete.parameters())


def test_bad_input_is_refused_by_name() -> None:
    made, data = generator(), batch()
    random = CounterRandom(0, torch.arange(6))
    with pytest.raises(ValueError, match="is it of another tokenizer"):
        made.condition_of({**data, "tokens": data["tokens"][:, :, :2]}, random)
    with pytest.raises(ValueError, match='DisCon needs "image", or "latents" and "tokens"'):
        made.condition_of({"latents": data["latents"], "label": data["label"]}, random)
    with pytest.raises(
        ValueError, match=r"d has ids in \[0, 6\], its generator has those in \[0, 6\): is it of another"
    ):
        made.condition_of({**data, "tokens": torch.arange(8).view(1, 2, 4).repeat(6, 1, 1) % (IDS + 1)}, random)
    with pytest.raises(ValueError, match=r"d has ids in .* is it of another tokenizer"):
        made.draw(data["label"], random, tokens=data["tokens"] + IDS)
    with pytest.raises(ValueError, match="the generator of d models images of 8 pixels, image_size is 4"):
        generator(image_size=8)
    with pytest.raises(ValueError, match="takes images of 1 channels, that of d 3"):
        generator(image_channels=3)
    for fusion in ("mix", "add"):
        with pytest.raises(ValueError, match=f"fusion='{fusion}' needs an id for each of the 16 places, d has 12 ids"):
            generator(fusion, grid=(3, 4))
    with pytest.raises(ValueError, match="knows 2 classes, num_classes is 3"):
        generator(num_classes=3)
    with pytest.raises(ValueError, match="exposure_sampler draws for exposure='mixture', got exposure='replace'"):
        generator(exposure="replace", exposure_sampler=MaskGITSampler(2))
    with pytest.raises(ValueError, match="exposure must be"):
        generator(exposure="some")


def test_it_trains_on_a_checkpoint_of_d_and_loads_without_it(tmp_path: Path) -> None:
    def fit(name: str, settings: dict[str, Any]) -> Path:
        run("fit", "--config", write_settings(tmp_path / f"{name}.yaml", settings), "--run_dir", tmp_path / name)
        return tmp_path / name / "checkpoints" / "last.ckpt"

    tokenizer = fit("tokenizer", TOKENIZER)
    discrete = fit("discrete", generator_settings(tokenizer))
    settings = {
        "model": {
            "class_path": "discrete_lit.generators.DisCon",
            "init_args": {
                "tokenizer": {"class_path": "discrete_lit.tokenizers.RawPixels", "init_args": {"scale": 2.0}},
                "image_size": 8,
                "num_classes": 2,
                "patch_size": 2,
                "discrete": {
                    "class_path": "discrete_lit.generators.generator_from_checkpoint",
                    "init_args": {"checkpoint": str(discrete)},
                },
                "exposure": "replace",
                "backbone": {
                    "class_path": "discrete_lit.backbones.MaskedAutoencoder",
                    "init_args": {"width": 16, "depth": 1, "heads": 2, "buffer": 2, "fusion": "prefix"},
                },
                "head": {
                    "class_path": "discrete_lit.backbones.TokenDiffusionHead",
                    "init_args": {"width": 16, "depth": 1},
                },
                "sampler": {"class_path": "discrete_lit.samplers.MARSampler", "init_args": {"steps": 4}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {"class_path": "helpers.synthetic_data.SyntheticImages", "init_args": {"count": 8, "batch_size": 4}},
        "trainer": {**QUIET, "max_steps": 2},
    }
    made = fit("discon", settings)
    tokenizer.unlink()
    discrete.unlink()
    loaded = discrete_lit.load(made)
    assert isinstance(loaded, DisCon)
    assert loaded.tokenizer.decode(loaded.sample(torch.tensor([0, 1]))).shape == (2, 3, 8, 8)
