"""ContinuousMasked: masks and losses, its bound on an exact law, training and checkpoints, bad input."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.counted_operations import counted
from helpers.tiny_runs import QUIET, run, write_settings
from torch import Tensor

import discrete_lit
from discrete_lit.backbones import MaskedAutoencoder, TokenDiffusionHead, VectorLayout
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath
from discrete_lit.diffusion.solvers import DDPM, Euler
from discrete_lit.generators import ContinuousMasked
from discrete_lit.generators.continuous_masked import step_masks
from discrete_lit.generators.counted_step import count_step
from discrete_lit.samplers import MARSampler
from discrete_lit.tokenizers import LatentGrid, RawPixels


def small_network(layout: VectorLayout) -> MaskedAutoencoder:
    return MaskedAutoencoder(layout, width=16, depth=1, heads=2, buffer=2)


def small_head(dim: int, width: int) -> TokenDiffusionHead:
    return TokenDiffusionHead(dim, width, width=16, depth=1, repeats=2, solver=DDPM(3))


def generator(**settings: Any) -> ContinuousMasked:
    torch.manual_seed(0)
    given: dict[str, Any] = {"backbone": small_network, "head": small_head, "check_scale": False, **settings}
    made = ContinuousMasked(RawPixels(1), 4, num_classes=2, **given)
    for parameter in made.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return made


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 1, 0, 1])


def test_patches_are_places_and_back() -> None:
    made, (latents, _) = generator(patch_size=2), batch()
    vectors = made.to_sequence(latents)
    assert vectors.shape == (5, 4, 4)
    assert vectors[0, 1].tolist() == latents[0, 0, :2, 2:].flatten().tolist()
    torch.testing.assert_close(made.to_grid(vectors), latents, rtol=0, atol=0)


def test_in_training_a_step_masks_as_many_places_in_each_image() -> None:
    made, (latents, labels) = generator().train(), batch()
    random = CounterRandom(0, torch.arange(5))

    def masks(of_images: CounterRandom) -> tuple[torch.Tensor, int]:
        masked, count = step_masks(of_images, 16, share=made.step_share())
        return masked, 16 - count

    masked, known = masks(random)
    assert masked.sum(dim=1).tolist() == [16 - known] * 5
    assert 0.7 * 16 <= 16 - known <= 16
    assert not torch.equal(masked[0], masked[1])
    losses = made.losses(latents, labels, random)
    assert losses.terms["error"].shape == (5, 16 - known)
    assert losses.weights is None
    # The ratio belongs to the step: other images have the same.
    assert masks(CounterRandom(0, torch.arange(90, 95)))[1] == known


def test_the_operations_of_a_step_are_counted_for_the_mean_share_of_its_places() -> None:
    made, (latents, labels) = generator().train(), batch()
    given = {"latents": latents, "label": labels, "index": torch.arange(5)}
    measured = count_step(made, given)
    share = made.mean_step_share()
    assert share is not None and 0.7 < share < 1
    made.log_dict = lambda *_, **__: None
    made.fixed_share = share
    assert measured == counted(made, given) > 0
    made.fixed_share = 1.0
    assert count_step(made, given) == measured, "the count's own share is the mean"
    assert counted(made, given) != measured


@torch.no_grad()
def test_in_validation_a_loss_belongs_to_its_image() -> None:
    made, (latents, labels) = generator().eval(), batch()
    indices = torch.tensor([3, 17, 40, 41, 9])
    together = made.validation_losses(latents, labels, CounterRandom(0, indices))
    ratios = together[2][:, 0]
    assert len(set(ratios.tolist())) > 1
    torch.testing.assert_close(ratios, together[1].double().mean(dim=1))
    for row in range(5):
        alone = made.validation_losses(
            latents[row : row + 1], labels[row : row + 1], CounterRandom(0, indices[row : row + 1])
        )
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_of_them[row], rtol=1e-4, atol=1e-4)


class Standard(TokenDiffusionHead):
    """A head that knows that every place is standard normal, whatever its hidden state."""

    def __init__(self, dim: int, width: int) -> None:
        denoiser = GaussianDenoiser(RectifiedPath(), prediction="velocity")
        super().__init__(dim, width, width=8, depth=1, denoiser=denoiser, solver=Euler(2))
        head = self

        class Exact(torch.nn.Module):
            def condition_projection(self, condition: Tensor) -> Tensor:
                return condition

            def denoise(self, x: Tensor, time: Tensor, projected: Tensor) -> Tensor:
                t = (time / 1000).to(x.dtype)[:, None]
                # Of standard normal data, E[eps - x | x_t] = (2 t - 1) x_t / (t^2 + (1 - t)^2).
                return (2 * t - 1) * x / (t**2 + (1 - t) ** 2)

        head.network = Exact()


@torch.no_grad()
def test_the_bound_approaches_the_exact_density() -> None:
    latents = CounterRandom(9, torch.arange(200)).normal(Purpose.LATENT_NOISE, 16).float().view(200, 1, 4, 4)
    labels = torch.zeros(200, dtype=torch.int64)
    exact = torch.distributions.Normal(0.0, 1.0).log_prob(latents).flatten(1).sum(dim=1).double()

    def gap(steps: int) -> float:
        made = generator(head=Standard, likelihood_samples=8, likelihood_steps=steps).eval()
        likelihood = made.log_likelihood(latents, labels)
        assert likelihood.kind == "bound"
        return (exact - likelihood.nats).mean().item()

    few, many = gap(6), gap(100)
    assert -0.1 < many < 0.3, many  # of 22.7 nats
    assert many < few / 2, (few, many)


@torch.no_grad()
def test_a_draw_belongs_to_its_index_and_says_what_it_costs() -> None:
    made = generator(sampler=MARSampler(4, guidance_scale=2.0)).eval()
    labels, indices = torch.tensor([0, 1, 2]), torch.tensor([5, 6, 900])
    together = made.sample(labels, seed=3, indices=indices)
    assert together.shape == (3, 1, 4, 4)
    for row in range(3):
        alone = made.sample(labels[row : row + 1], seed=3, indices=indices[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-3, atol=1e-3)
    output = made.draw(labels, CounterRandom(3, indices))
    assert (output.network_calls, output.sequential_passes) == (8, 4)
    # The cosine leaves 14, 11, 6 and 0 of 16 places masked.
    passes = ((0, 2), (2, 3), (5, 5), (10, 6))
    expected = sum(made.backbone.flops(2, known) + made.head.flops(2 * drawn, DDPM(3)) for known, drawn in passes)
    assert output.flops == expected > 0


def test_bad_input_is_refused_by_name() -> None:
    made, (latents, labels) = generator(), batch()
    with pytest.raises(ValueError, match="are these the ids of a discrete tokenizer"):
        made.loss(torch.zeros(5, 4, 4, dtype=torch.int64), labels)
    with pytest.raises(ValueError, match="latents have the shape"):
        made.loss(latents[:, :, :2], labels)
    with pytest.raises(ValueError, match="patch_size=3 does not divide latents of 4 x 4"):
        generator(patch_size=3)
    with pytest.raises(ValueError, match="needs a generator that learned the null label"):
        generator(label_dropout=0.0).sample(labels, MARSampler(2, guidance_scale=3.0))
    with pytest.raises(ValueError, match="exceeds the 1000 steps"):
        generator(sampler=MARSampler(2, solver=DDPM(2000)))
    random = CounterRandom(0, torch.arange(5))
    checked = ContinuousMasked(
        LatentGrid((1, 4, 4)), 4, num_classes=2, backbone=small_network, head=small_head, sampler=MARSampler(2)
    )
    with pytest.raises(ValueError, match="deviation"):
        checked.data_of({"latents": 20 * latents}, random)
    # Of pixels the deviation is what it is.
    generator(check_scale=True).data_of({"latents": 20 * latents}, random)


def test_it_trains_from_a_configuration_and_loads_again(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": {
            "class_path": "discrete_lit.generators.ContinuousMasked",
            "init_args": {
                "tokenizer": {"class_path": "discrete_lit.tokenizers.RawPixels", "init_args": {"scale": 2.0}},
                "image_size": 8,
                "num_classes": 2,
                "patch_size": 2,
                "check_scale": False,
                "backbone": {
                    "class_path": "discrete_lit.backbones.MaskedAutoencoder",
                    "init_args": {"width": 16, "depth": 1, "heads": 2, "buffer": 2},
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
    run("fit", "--config", write_settings(tmp_path / "mar.yaml", settings), "--run_dir", tmp_path / "run")
    loaded = discrete_lit.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert isinstance(loaded, ContinuousMasked)
    images = loaded.tokenizer.decode(loaded.sample(torch.tensor([0, 1])))
    assert images.shape == (2, 3, 8, 8)
