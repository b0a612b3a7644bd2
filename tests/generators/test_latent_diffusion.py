"""LatentDiffusion: exact on Gaussian latents, independent of the batch, guided where it says, trained and refused."""

import warnings
from collections.abc import Iterable
from math import log, pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.random_weights import randomise
from helpers.synthetic_data import SyntheticImages
from lightning import Trainer
from torch import Tensor, nn

import discrete_lit
from discrete_lit.backbones import DenoisingNetwork, DiT, LatentLayout
from discrete_lit.backbones.condition import Condition
from discrete_lit.callbacks import ExponentialMovingAverage
from discrete_lit.checkpoints import instantiate, save
from discrete_lit.cli.sample import sample
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion.consistency import ConsistencyLoss
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath, ScheduledPath, TrigonometricPath
from discrete_lit.diffusion.solvers import DDIM, DDPM, Euler, EulerMaruyama, Solver
from discrete_lit.generators import LatentDiffusion
from discrete_lit.generators.counted_step import count_step
from discrete_lit.samplers import GuidedSolver, MaskGITSampler
from discrete_lit.tokenizers import FSQ, KLVAE, CodebookLatents, LatentGrid, RawPixels
from discrete_lit.tokenizers.networks import ConvAutoencoder

DEVIATION = 0.6
SHAPE = (3, 2, 4)


class Best(DenoisingNetwork):
    """The best velocity where the latents of class k are N(k, DEVIATION^2), and of no class N(0, DEVIATION^2)."""

    def __init__(self, layout: LatentLayout) -> None:
        super().__init__(layout)
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, labels: Tensor, context: Tensor | None = None) -> Tensor:
        t = time.double()[:, None, None, None] / 1000
        mean = torch.where(labels == self.layout.null_label, 0, labels)[:, None, None, None].double()
        variance = (1 - t) ** 2 * DEVIATION**2 + t**2
        centred = x - (1 - t) * mean
        data = mean + (1 - t) * DEVIATION**2 / variance * centred
        return t / variance * centred - data

    def fsdp_units(self) -> Iterable[nn.Module]:
        return []


def best(**settings: Any) -> LatentDiffusion:
    arguments: dict[str, Any] = {
        "num_classes": 3,
        "backbone": Best,
        "denoiser": GaussianDenoiser(RectifiedPath(), prediction="velocity"),
        "label_dropout": 0.1,
        **settings,
    }
    return LatentDiffusion(LatentGrid(SHAPE), 4, **arguments).eval()


def learner(*, spread: float | None = 0.2, **settings: Any) -> LatentDiffusion:
    """A small DiT over latents `(3, 2, 4)`, ten steps of diffusion."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "num_classes": 3,
        "backbone": lambda layout: DiT(layout, width=16, depth=1, heads=2),
        "denoiser": GaussianDenoiser(ScheduledPath("cosine", steps=10), learned_variance=True),
        **settings,
    }
    generator = LatentDiffusion(LatentGrid(SHAPE), 4, **arguments)
    if spread is not None:
        randomise(generator.backbone, spread)
    return generator.eval()


# Exact laws.


def test_samples_have_the_law_of_the_data() -> None:
    drawn = best().sample(torch.tensor([2]).repeat(2000), GuidedSolver(Euler(100)))
    assert drawn.dtype == torch.float64 and drawn.shape == (2000, *SHAPE)
    # 48,000 numbers: four standard errors, and the error of 100 steps.
    assert abs(float(drawn.mean()) - 2) < 0.02 and abs(float(drawn.std()) - DEVIATION) < 0.02


def test_guidance_moves_the_mean_by_its_scale() -> None:
    """Both laws have one deviation, so that the guided one is that of the class at twice its distance."""
    labels = torch.tensor([1]).repeat(500)
    guided = best().sample(labels, GuidedSolver(Euler(50), guidance_scale=2.0))
    plain = best().sample(labels * 2, GuidedSolver(Euler(50)))
    torch.testing.assert_close(guided, plain, rtol=1e-9, atol=1e-9)
    first = best().sample(labels, GuidedSolver(Euler(50), guidance_scale=2.0, guided_channels=1))
    torch.testing.assert_close(first[:, :1], plain[:, :1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(first[:, 1:], best().sample(labels, GuidedSolver(Euler(50)))[:, 1:])


def test_the_bound_is_near_the_entropy_and_below_the_truth() -> None:
    labels = torch.arange(300) % 3
    noise = torch.randn(300, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latents = labels[:, None, None, None] + DEVIATION * noise
    true = -((noise**2) / 2 + log(DEVIATION * (2 * pi) ** 0.5)).flatten(1).sum(dim=1)
    few, some, many = (best(likelihood_steps=steps).log_likelihood(latents, labels) for steps in (20, 100, 200))
    assert many.kind == "bound" and many.nats.dtype == torch.float64
    gaps = [float((true - bound.nats).mean()) for bound in (few, some, many)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    # The standard error of each is 0.8, of an entropy of 26 nats; they share their noise.
    assert gaps[2] < 1.6, gaps
    again = best(likelihood_steps=20).log_likelihood(latents[5:7], labels[5:7], indices=torch.tensor([5, 6]))
    torch.testing.assert_close(again.nats, few.nats[5:7])


# A sample is its index's.


@pytest.mark.parametrize("solver", [DDPM(5), DDIM(5, eta=0.5)])
def test_a_sample_does_not_depend_on_its_batch(solver: Solver) -> None:
    generator, sampler = learner(), GuidedSolver(solver, guidance_scale=3.0, guided_channels=2)
    labels = torch.tensor([0, 1, 2, 3])
    together = generator.sample(labels, sampler, seed=7)
    alone = generator.sample(labels[2:3], sampler, seed=7, indices=torch.tensor([2]))
    torch.testing.assert_close(alone, together[2:3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(generator.sample(labels, sampler, seed=8), together, atol=1e-2)
    generator.train()
    assert torch.equal(generator.sample(labels, sampler, seed=7), together) and generator.training


def test_a_loss_belongs_to_the_sample() -> None:
    generator = learner()
    data, labels = torch.randn(4, *SHAPE), torch.tensor([0, 1, 2, 3])
    terms, times, _ = generator.losses(data, Condition(labels=labels), CounterRandom(3, torch.arange(4)))
    part, later, _ = generator.losses(data[2:], Condition(labels=labels[2:]), CounterRandom(3, torch.tensor([2, 3])))
    assert torch.equal(times[2:], later) and set(terms) == {"error", "bound"}
    for name, term in terms.items():
        torch.testing.assert_close(part[name], term[2:], rtol=1e-4, atol=1e-6)
    loss, named = generator.loss(data, labels.clamp(max=2), CounterRandom(3, torch.arange(4)), dropped=labels == 3)
    torch.testing.assert_close(loss, sum(terms.values(), start=torch.zeros(4)).mean())
    torch.testing.assert_close(named["error"], terms["error"].mean())
    loss.backward()
    with pytest.raises(ValueError, match="1 of 4 labels are no classes"):
        generator.loss(data, labels)


@pytest.mark.parametrize(("time_input", "expected"), [("noise", [0.0, 250.0, 1000.0]), ("data", [1000.0, 750.0, 0.0])])
def test_the_time_that_a_network_reads(time_input: Any, expected: list[float]) -> None:
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    assert best(time_input=time_input).network_time(t).tolist() == expected
    assert best(time_input=time_input, time_scale=1.0).network_time(t).tolist() == [value / 1000 for value in expected]
    steps = learner().network_time(torch.tensor([0.1, 1.0], dtype=torch.float64))
    assert steps.dtype == torch.float32 and steps.tolist() == [0, 9]


# What guidance costs, and when.


def test_the_second_evaluation_is_made_where_guidance_is() -> None:
    generator, random = best(), CounterRandom(0, torch.arange(2))
    labels, solver = torch.tensor([0, 1]), Euler(4)  # at 1, 3/4, 1/2, 1/4
    calls = {
        "none": GuidedSolver(solver),
        "all": GuidedSolver(solver, guidance_scale=2.0),
        "interval": GuidedSolver(solver, guidance_scale=2.0, guidance_interval=(0.25, 0.5)),
        "linear": GuidedSolver(solver, guidance_scale=2.0, guidance_schedule="linear"),
    }
    drawn = {name: generator.draw(labels, random, sampler) for name, sampler in calls.items()}
    assert {name: output.network_calls for name, output in drawn.items()} == {
        **{"none": 4, "all": 8, "interval": 6, "linear": 7}
    }
    assert all(output.sequential_passes == 4 for output in drawn.values())
    assert learner().draw(labels, random, GuidedSolver(DDPM(2))).flops == 2 * learner().backbone.flops(1)
    ramp = GuidedSolver(solver, guidance_scale=3.0, guidance_schedule="power_cosine", guidance_power=2.0)
    assert [ramp.scale(t) for t in (1.0, 0.0)] == [1, 3] and ramp.scale(0.5) == pytest.approx(1 + 1 - np.cos(pi / 4))


# Training.


@pytest.mark.parametrize("make", [best, learner])
def test_the_operations_of_a_step_are_counted(make: Any) -> None:
    generator = make(backbone=lambda layout: DiT(layout, width=16, depth=1, heads=2))
    batch = {"latents": torch.randn(4, *SHAPE), "label": torch.zeros(4, dtype=torch.int64), "index": torch.arange(4)}
    # Twice as many backwards, but for what has no gradient: the inputs of the patches' layer and of the time's first.
    inputs = 2 * 4 * (2 * 12 * 16 + 256 * 16)
    assert count_step(generator, batch) == 3 * generator.backbone.flops(4) - inputs


def pixels(**settings: Any) -> dict[str, Any]:
    """A configuration of a small DiT on raw pixels."""
    return {
        "class_path": "discrete_lit.generators.LatentDiffusion",
        "init_args": {
            "tokenizer": {"class_path": "discrete_lit.tokenizers.RawPixels"},
            "image_size": 8,
            "num_classes": 2,
            "backbone": {"class_path": "discrete_lit.backbones.DiT", "init_args": {"width": 8, "depth": 1, "heads": 2}},
            "denoiser": {
                "class_path": "discrete_lit.diffusion.gaussian.GaussianDenoiser",
                "init_args": {
                    "path": {"class_path": "discrete_lit.diffusion.gaussian.RectifiedPath"},
                    "prediction": "velocity",
                },
            },
            "sampler": {
                "class_path": "discrete_lit.samplers.GuidedSolver",
                "init_args": {
                    "solver": {"class_path": "discrete_lit.diffusion.solvers.Heun", "init_args": {"steps": 2}},
                    "guidance_scale": 2.0,
                },
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            **settings,
        },
    }


def test_it_trains_on_pixels_reloads_and_is_sampled(tmp_path: Path) -> None:
    generator: Any = instantiate(pixels())
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        callbacks=[ExponentialMovingAverage(0.9)],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        # Its tokenizer is, and stays so.
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")
        trainer.fit(generator, datamodule=SyntheticImages(count=8, batch_size=4))
    logged = {name for name in trainer.logged_metrics if name.startswith("validation/")}
    assert "validation/loss" in logged and any(name.startswith("validation/loss_by_time/") for name in logged)
    save(generator, tmp_path / "model.ckpt")
    again = discrete_lit.load(tmp_path / "model.ckpt")
    assert isinstance(again, LatentDiffusion) and again.hparams == generator.hparams
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(again.sample(labels), generator.sample(labels))

    run = sample(
        str(tmp_path / "model.ckpt"), str(tmp_path / "samples"), num_samples=3, batch_size=2, accelerator="cpu"
    )
    with np.load(tmp_path / "samples" / "samples.npz") as written:
        assert written["arr_0"].shape == (3, 8, 8, 3) and written["arr_0"].dtype == np.uint8
    assert run["network_calls"] == 8 and run["sampler"]["solver"]["steps"] == 2
    with pytest.raises(ValueError, match="MaskGITSampler does not draw from a LatentDiffusion"):
        sample(str(tmp_path / "model.ckpt"), str(tmp_path), num_samples=1, sampler=MaskGITSampler())


def test_latents_without_a_tokenizer_are_written_as_latents(tmp_path: Path) -> None:
    grid = {"class_path": "discrete_lit.tokenizers.LatentGrid", "init_args": {"latent_shape": [4, 2, 2]}}
    save(instantiate(pixels(tokenizer=grid)), tmp_path / "model.ckpt")
    sample(str(tmp_path / "model.ckpt"), str(tmp_path), num_samples=2, accelerator="cpu")
    with np.load(tmp_path / "samples.npz") as written:
        assert written["latents"].shape == (2, 4, 2, 2) and written["latents"].dtype == np.float32
    with pytest.raises(ValueError, match="loaded without its tokenizer, which codes images as 4 x 2 x 2 latents"):
        discrete_lit.load(tmp_path / "model.ckpt").tokenizer.encode(torch.zeros(1, 3, 8, 8))


# A consistency function distilled from a teacher.


class Jump(Best):
    """The velocity that leads in one step where the ODE of `Best` leads, given the mean of each class."""

    scale = 1.0

    def forward(self, x: Tensor, time: Tensor, labels: Tensor, context: Tensor | None = None) -> Tensor:
        t = time.double()[:, None, None, None] / 1000
        mean = self.scale * torch.where(labels == self.layout.null_label, 0, labels)[:, None, None, None].double()
        data = mean + DEVIATION * (x - (1 - t) * mean) / ((1 - t) ** 2 * DEVIATION**2 + t**2).sqrt()
        return (x - data) / t.clamp(min=1e-9)


class GuidedJump(Jump):
    """The same where the teacher is guided by 2, which doubles the distance of a class, see above."""

    scale = 2.0


@pytest.mark.parametrize(("jump", "scale", "small"), [(Jump, 1.0, True), (GuidedJump, 2.0, True), (Jump, 2.0, False)])
def test_a_consistency_function_is_what_the_ode_of_its_teacher_leads_to(
    jump: type[Jump], scale: float, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("discrete_lit.generators.latent_diffusion.load", lambda path: best())
    settings: dict[str, Any] = {"backbone": jump, "sampler": None}
    distilled = best(consistency=lambda denoiser: ConsistencyLoss(denoiser, intervals=256), **settings)
    taught = best(
        consistency=lambda denoiser: ConsistencyLoss(denoiser, intervals=256),
        teacher="trained.ckpt",
        teacher_guidance=scale,
        **settings,
    )
    labels = torch.tensor([0, 1, 2, 3]).repeat(16)  # 3 is the null class
    noise = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = torch.where(labels == 3, 0, labels)[:, None, None, None] + DEVIATION * noise
    losses = taught.losses(data, Condition(labels=labels), CounterRandom(0, torch.arange(64))).terms["error"]
    without = distilled.losses(data, Condition(labels=labels), CounterRandom(0, torch.arange(64))).terms["error"]
    assert (float(losses.max()) < 0.02) == small
    assert float(without.min()) > 0.5, "points with one noise do not lie on one way of the ODE"


def test_distillation_begins_with_its_teacher_and_leaves_it_out_of_its_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "teacher.ckpt"
    trained: Any = instantiate(pixels())
    randomise(trained.backbone, 0.2)
    save(trained, file)
    few: dict[str, Any] = {
        "consistency": {"class_path": "discrete_lit.diffusion.consistency.ConsistencyLoss"},
        "sampler": None,
        "teacher": str(file),
    }
    student: Any = instantiate(pixels(**few, teacher_guidance=2.0))
    student.begin_with_teacher()
    for name, value in student.backbone.state_dict().items():
        assert torch.equal(value, trained.backbone.state_dict()[name]), name
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")
        trainer.fit(student, datamodule=SyntheticImages(count=8, batch_size=4))
    assert trainer.callback_metrics["validation/loss"].isfinite()
    assert student.state_dict().keys() == trained.state_dict().keys()
    for name, value in student._teacher().state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), "the teacher is not trained"
    batch = {"image": torch.zeros(2, 3, 8, 8), "label": torch.zeros(2, dtype=torch.int64), "index": torch.arange(2)}
    assert count_step(student, batch) > count_step(trained, batch)
    save(student, tmp_path / "student.ckpt")
    file.unlink()
    again = discrete_lit.load(tmp_path / "student.ckpt")
    assert torch.equal(again.sample(torch.tensor([0])), student.sample(torch.tensor([0])))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"num_classes": 2}, "has another number of classes: 2, and this model 3"),
        ({"denoiser": GaussianDenoiser(TrigonometricPath(), prediction="velocity")}, "has another path; alpha and"),
        (
            {"denoiser": GaussianDenoiser(RectifiedPath(), prediction="v")},
            "has another prediction: v, and this model velo",
        ),
        ({"consistency": ConsistencyLoss, "sampler": None}, "holds a consistency function: give the model before it"),
        ({"label_dropout": 0.0}, r"teacher_guidance=2\.0 needs a teacher that learned the null label"),
        ({"backbone": lambda layout: DiT(layout, width=8, depth=1, heads=2)}, "has a network of other sizes"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(
    teacher: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("discrete_lit.generators.latent_diffusion.load", lambda path: best(**teacher))
    student = best(consistency=ConsistencyLoss, sampler=None, teacher="trained.ckpt", teacher_guidance=2.0)
    with pytest.raises(ValueError, match=r"teacher='trained\.ckpt' " * ("guidance" not in message) + message):
        student.begin_with_teacher()
    with pytest.raises(ValueError, match=r"teacher='trained\.ckpt' is for distillation: give consistency"):
        best(teacher="trained.ckpt")
    with pytest.raises(ValueError, match=r"teacher_guidance=2\.0 must be at least 0, and is of a teacher, got"):
        best(consistency=ConsistencyLoss, teacher_guidance=2.0)


def network(code_dim: int, latent_dim: int) -> ConvAutoencoder:
    return ConvAutoencoder(
        code_dim, latent_dim, channels=4, multipliers=(1, 1), blocks=1, attention=False, norm_groups=2
    )


def test_images_are_encoded_with_noise_of_their_own() -> None:
    tokenizer = KLVAE(network, latent_channels=4, kl_weight=0.0)
    settings: dict[str, Any] = {"backbone": lambda layout: DiT(layout, width=8, depth=1, heads=2), "check_scale": False}
    generator = LatentDiffusion(tokenizer, 8, num_classes=2, **settings)
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    batch = {"image": images, "label": torch.zeros(3, dtype=torch.int64), "index": torch.tensor([5, 6, 7])}
    latents = generator.data_of(batch, generator.random_of(batch, 0))
    assert latents.shape == (3, 4, 4, 4) and not latents.requires_grad
    part = {name: value[1:] for name, value in batch.items()}
    torch.testing.assert_close(generator.data_of(part, generator.random_of(part, 9)), latents[1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(latents, tokenizer.encode(images), atol=0.1)
    given = {"latents": latents.half(), "label": batch["label"]}
    assert generator.data_of(given, generator.random_of(given, 0)).dtype == torch.float32


def test_latents_before_a_codebook_are_decoded_by_it() -> None:
    tokenizer = randomise(FSQ(network, levels=[4, 4]), 0.3).eval()
    latents = CodebookLatents(tokenizer, scale_factor=0.5)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    coded = latents.encode(images)
    assert coded.shape == (2, *latents.latent_shape(8)) == (2, 2, 4, 4)
    torch.testing.assert_close(coded * 2, tokenizer.latents(images).movedim(-1, 1))
    torch.testing.assert_close(latents.decode(coded), tokenizer.decode(tokenizer.encode(images)))
    assert latents.fingerprint() != CodebookLatents(tokenizer).fingerprint()
    with pytest.raises(ValueError, match="needs a tokenizer with a codebook behind an autoencoder, got a TokenGrid"):
        CodebookLatents(discrete_lit.tokenizers.TokenGrid(4, (2, 2)))
    scaled = RawPixels(scale=2.0)
    torch.testing.assert_close(scaled.decode(scaled.encode(images)), images)


# What is refused.


def test_batches_that_are_no_latents_of_this_model_are_refused() -> None:
    generator, random = learner(), CounterRandom(0, torch.arange(2))
    with pytest.raises(ValueError, match="are these the ids of a discrete tokenizer"):
        generator.data_of({"latents": torch.zeros(2, *SHAPE, dtype=torch.int64)}, random)
    with pytest.raises(ValueError, match=r"the latents have the shape \(4, 4, 4\), this generator models \(3, 2, 4\)"):
        generator.data_of({"latents": torch.randn(2, 4, 4, 4)}, random)
    with pytest.raises(ValueError, match="a batch holds tokens, label: LatentDiffusion needs"):
        generator.data_of({"tokens": torch.zeros(2, 4), "label": torch.zeros(2)}, random)
    latents = torch.randn(2, *SHAPE)
    with pytest.raises(ValueError, match=r"latents must have about unit deviation, between 0\.5 and 2\.0"):
        generator.data_of({"latents": 4.3 * latents}, random)
    generator.data_of({"latents": latents}, random)
    generator.data_of({"latents": 4.3 * latents}, random)  # the first batch alone is looked at
    learner(check_scale=False).data_of({"latents": 4.3 * latents}, random)


def test_draws_that_cannot_be_are_refused() -> None:
    guided = GuidedSolver(DDPM(5), guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 needs a generator that learned the null label"):
        learner(label_dropout=0.0).sample(torch.tensor([0]), guided)
    with pytest.raises(ValueError, match="guided_channels=4, but the latents have 3"):
        learner().sample(torch.tensor([0]), GuidedSolver(DDPM(5), guided_channels=4))
    with pytest.raises(ValueError, match=r"the labels are torch.float32 \(1,\)"):
        learner().sample(torch.tensor([0.0]))
    with pytest.raises(ValueError, match="steps=11 exceeds the 10 steps"):
        learner(sampler=GuidedSolver(DDPM(11)))
    with pytest.raises(ValueError, match="EulerMaruyama needs a path in continuous time"):
        learner().sample(torch.tensor([0]), GuidedSolver(EulerMaruyama(5)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"time_scale": 0.0}, "time_scale must be above 0"),
        ({"likelihood_steps": 0}, "likelihood_steps at least 1"),
        ({"label_dropout": 1.5}, r"label_dropout must lie in \[0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner(**settings)
    with pytest.raises(ValueError, match=r"models a grid \(D, H, W\), the tokenizer's latents are \(4, 8\)"):
        LatentDiffusion(LatentGrid((4, 8)), 8, num_classes=1, backbone=Best)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_interval": (0.6, 0.2)}, r"guidance_interval must be two times in \[0, 1\], the lower one first"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule must be one of constant, linear, power_cosine"),
        ({"guidance_scale": -1.0}, "must be at least 0"),
        ({"guided_channels": 0}, "guided_channels at least 1"),
    ],
)
def test_guidance_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuidedSolver(Euler(2), **settings)
