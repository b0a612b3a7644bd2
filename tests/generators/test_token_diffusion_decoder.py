"""TokenDiffusionDecoder: exact on Gaussian data given tokens, of grids and rows, in place of a tokenizer's decoder."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.random_weights import randomise
from helpers.sounds import waveforms
from torch import Tensor, nn

import discrete_lit
from discrete_lit.backbones import DenoisingNetwork, DiT, LatentLayout, UNet
from discrete_lit.backbones.condition import Condition
from discrete_lit.backbones.denoising_network import nearest_grid
from discrete_lit.callbacks import ReconstructionGrid, SampleGrid
from discrete_lit.checkpoints import instantiate, save
from discrete_lit.cli.sample import sample
from discrete_lit.core.images import to_uint8
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.consistency import ConsistencyLoss
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath
from discrete_lit.diffusion.solvers import DDIM, ConsistencySampler, Euler
from discrete_lit.evaluation.inputs import Run, _load_autoencoders
from discrete_lit.generators import TokenDiffusionDecoder
from discrete_lit.generators.counted_step import count_step
from discrete_lit.metrics.reconstruction import ReconstructionMeter
from discrete_lit.samplers import GuidedSolver
from discrete_lit.tokenizers import FSQ, EnCodec, PerturbedTokenizer, RawFrames, RawPixels, TokenGrid
from discrete_lit.tokenizers.networks import ConvAutoencoder, SEANet

DEVIATION = 0.3
NETWORK = {
    "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
    "init_args": {"channels": 4, "multipliers": [1, 1], "blocks": 1, "attention": False, "norm_groups": 2},
}


class BestGiven(DenoisingNetwork):
    """The best velocity where an image given its tokens is N(their code's first channel, DEVIATION^2)."""

    def __init__(self, layout: LatentLayout) -> None:
        super().__init__(layout)
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(
        self, x: Tensor, time: Tensor, labels: Tensor, context: Tensor | None = None, vectors: Tensor | None = None
    ) -> Tensor:
        assert context is not None
        t, mean = time.double()[:, None, None, None] / 1000, nearest_grid(context, self.layout.grid)[:, :1].double()
        variance = (1 - t) ** 2 * DEVIATION**2 + t**2
        centred = x - (1 - t) * mean
        return t / variance * centred - mean - (1 - t) * DEVIATION**2 / variance * centred

    def fsdp_units(self) -> Iterable[nn.Module]:
        return []


class JumpGiven(BestGiven):
    """The velocity that leads in one step where the ODE of `BestGiven` leads."""

    def forward(
        self, x: Tensor, time: Tensor, labels: Tensor, context: Tensor | None = None, vectors: Tensor | None = None
    ) -> Tensor:
        assert context is not None
        t, mean = time.double()[:, None, None, None] / 1000, nearest_grid(context, self.layout.grid)[:, :1].double()
        data = mean + DEVIATION * (x - (1 - t) * mean) / ((1 - t) ** 2 * DEVIATION**2 + t**2).sqrt()
        return (x - data) / t.clamp(min=1e-9)


def network(code_dim: int, latent_dim: int) -> ConvAutoencoder:
    return ConvAutoencoder(
        code_dim, latent_dim, channels=4, multipliers=(1, 1), blocks=1, attention=False, norm_groups=2
    )


def tokenizer() -> FSQ:
    """8x8 images to 4x4 tokens of 16 ids."""
    torch.manual_seed(0)
    return randomise(FSQ(network, levels=[4, 4]), 0.3).eval()


def small_dit(layout: LatentLayout) -> DiT:
    return DiT(layout, width=16, depth=1, heads=2)


def small_unet(layout: LatentLayout) -> UNet:
    return UNet(layout, channels=8, multipliers=[1, 2], blocks=1, attention=[2], heads=2, norm_groups=4, class_width=8)


def decoder(*, spread: float | None = 0.2, **settings: Any) -> TokenDiffusionDecoder:
    arguments: dict[str, Any] = {
        "discrete": tokenizer(),
        "backbone": small_dit,
        "denoiser": GaussianDenoiser(RectifiedPath(), prediction="velocity"),
        "sampler": GuidedSolver(Euler(3)),
        **settings,
    }
    made = TokenDiffusionDecoder(RawPixels(), 8, **arguments)
    if spread is not None and arguments["backbone"] is not BestGiven:
        randomise(made.backbone, spread)
        randomise(made.token_embedding, spread)
    return made.eval()


def ids(count: int = 4, shape: tuple[int, ...] = (4, 4), most: int = 16) -> Tensor:
    return torch.randint(most, (count, *shape), generator=torch.Generator().manual_seed(1))


# Exact laws.


@pytest.mark.parametrize("scale", [None, 5.0])
def test_images_have_their_law_given_the_tokens(scale: float | None) -> None:
    residual: dict[str, Any] = {} if scale is None else {"target": "residual", "residual_scale": scale}
    exact = decoder(backbone=BestGiven, **residual)
    tokens = ids(1).repeat(400, 1, 1)
    drawn = exact.draw(
        torch.zeros(400).long(), CounterRandom(0, torch.arange(400)), GuidedSolver(Euler(60)), tokens=tokens
    ).tokens
    mean = nearest_grid(exact.discrete.embed(tokens[:1]), (8, 8))[:, :1].expand(-1, 3, -1, -1)
    if scale is not None:
        mean = exact.discrete.decode(tokens[:1]) + mean / scale
    away = (drawn - mean) * (scale or 1.0)
    # 400 draws of each of 192 numbers, and the error of 60 steps.
    assert float(away.mean(dim=0).abs().max()) < 5 * DEVIATION / 20
    assert float(away.std()) == pytest.approx(DEVIATION, rel=0.03)


def test_the_likelihood_of_a_residual_is_that_of_the_image() -> None:
    """Two models of one law: of the image, and of ten times what the decoder misses."""
    plain = decoder(backbone=BestGiven, target="residual", residual_scale=1.0)
    scaled = decoder(backbone=BestGiven, target="residual", residual_scale=10.0)
    tokens = ids(2)
    residual = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    condition = Condition(labels=torch.zeros(2).long(), grid=tokens.flatten(1))
    one = plain.log_likelihood(plain.base(tokens) + residual, condition).nats
    other = scaled.log_likelihood(scaled.base(tokens) + residual / 10, condition).nats
    # A density of numbers a tenth as wide is ten times as high, in each of 192.
    torch.testing.assert_close(other, one + 192 * float(np.log(10)), rtol=1e-4, atol=1e-2)
    with pytest.raises(ValueError, match="needs tokens"):
        plain.log_likelihood(residual, torch.zeros(2).long())


# What is read, and whose noise it is.


@pytest.mark.parametrize("backbone", [small_dit, small_unet])
@pytest.mark.parametrize("shape", [(4, 4), (5,)])
def test_grids_and_rows_are_read(shape: tuple[int, ...], backbone: Any) -> None:
    made = decoder(
        discrete=TokenGrid(16, shape), token_input="learned", token_width=6, backbone=backbone, label_dropout=0.5
    )
    assert (made.layout().vectors, made.layout().context_channels) == ((None, 6) if len(shape) == 2 else ((5, 6), None))
    tokens = ids(3, shape)
    images = made.decode(tokens)
    assert images.shape == (3, 3, 8, 8)
    alone = made.decode(tokens[1:2], indices=torch.tensor([1]))
    torch.testing.assert_close(alone, images[1:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(made.decode((tokens + 1) % 16), images, atol=1e-3)
    assert not torch.allclose(made.decode(tokens.flip(-1)), images, atol=1e-3)  # the order counts in a row too
    assert not torch.allclose(made.decode(tokens, seed=1), images, atol=1e-2)
    guided = made.decode(tokens, sampler=GuidedSolver(Euler(3), guidance_scale=2.0))
    assert not torch.allclose(guided, images, atol=1e-3)

    made.train()
    batch = {"image": torch.rand(3, 3, 8, 8) * 2 - 1, "tokens": tokens, "index": torch.arange(3)}
    random = made.random_of(batch, 0)
    loss, _ = made.loss(
        made.data_of(batch, random), made.condition_of(batch, random), random, dropped=torch.arange(3) == 1
    )
    loss.backward()
    still = [
        name for name, value in made.token_embedding.named_parameters() if value.grad is None or not value.grad.any()
    ]
    assert still == []


def test_tokens_are_those_of_the_images() -> None:
    made = decoder()
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    batch = {"image": images, "index": torch.arange(3)}
    condition = made.condition_of(dict(batch), made.random_of(batch, 0))
    assert condition.grid is not None and torch.equal(condition.grid, made.discrete.encode(images).flatten(1))
    labelled = {**batch, "label": torch.tensor([0, 7, 2])}
    assert made.condition_of(labelled, made.random_of(batch, 0)).labels.tolist() == [0, 0, 0]
    assert decoder(num_classes=8).condition_of(labelled, made.random_of(batch, 0)).labels.tolist() == [0, 7, 2]
    cached = {**batch, "tokens": ids(3)}
    given = made.condition_of(cached, made.random_of(cached, 0)).grid
    assert given is not None and torch.equal(given, ids(3).flatten(1))
    assert torch.equal(made.predict_step(dict(cached), 0), made.decode(ids(3), indices=torch.arange(3)))
    assert made.train().discrete.training is False and made.discrete.late_checks is None


def test_a_residual_is_what_the_decoder_misses() -> None:
    made = decoder(target="residual", residual_scale=2.0, check_scale=False)
    batch = {"image": torch.rand(3, 3, 8, 8) * 2 - 1, "index": torch.arange(3)}
    residual = made.data_of(dict(batch), made.random_of(batch, 0))
    missed = batch["image"] - made.discrete.decode(made.discrete.encode(batch["image"]))
    torch.testing.assert_close(residual, 2 * missed)
    with pytest.raises(ValueError, match=r"residual_scale=0\.01; it should be about 1: take residual_scale="):
        checked = decoder(target="residual", residual_scale=0.01)
        checked.data_of(dict(batch), checked.random_of(batch, 0))
    assert count_step(decoder(target="residual"), batch) > count_step(decoder(), batch), "the decoder's pass counts too"


def test_a_consistency_function_is_drawn_in_one_step() -> None:
    made = decoder(
        consistency=lambda denoiser: ConsistencyLoss(denoiser, intervals=4, first_intervals=2, doubling_steps=9),
        sampler=None,
    )
    assert isinstance(made.sampler.solver, ConsistencySampler)
    drawn = made.draw(torch.zeros(2).long(), CounterRandom(0, torch.arange(2)), tokens=ids(2))
    assert drawn.network_calls == 1
    condition = Condition(labels=torch.zeros(2).long(), grid=ids(2).flatten(1))
    loss, _ = made.train().loss(torch.randn(2, 3, 8, 8), condition)
    loss.backward()
    assert loss.isfinite() and any(value.grad is not None and value.grad.any() for value in made.backbone.parameters())
    with pytest.raises(ValueError, match="a consistency function draws by jumps, and has no density"):
        made.log_likelihood(torch.randn(2, 3, 8, 8), condition)
    with pytest.raises(ValueError, match="error_of='data' is of the denoising loss"):
        decoder(consistency=ConsistencyLoss, error_of="data")


@torch.no_grad()
def test_a_few_step_decoder_is_distilled_given_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher knows the mean of each image by its tokens: without them it would lead elsewhere."""
    monkeypatch.setattr("discrete_lit.generators.latent_diffusion.load", lambda path: decoder(backbone=BestGiven))
    student = decoder(
        backbone=JumpGiven,
        consistency=lambda denoiser: ConsistencyLoss(denoiser, intervals=256),
        sampler=None,
        teacher="trained.ckpt",
    )
    condition = Condition(labels=torch.zeros(8).long(), grid=ids(8).flatten(1))
    mean = nearest_grid(student.given(condition)["context"], (8, 8))[:, :1].double()
    data = mean + DEVIATION * torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    random = CounterRandom(0, torch.arange(8))
    assert float(student.losses(data, condition, random).terms["error"].max()) < 0.02
    other = Condition(labels=condition.labels, grid=ids(8).flip(0).flatten(1))
    monkeypatch.setattr(student, "_teacher_given", partial(_given_another, student._teacher_given, other))
    assert float(student.losses(data, condition, random).terms["error"].max()) > 1
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"has the target and residual_scale residual, 2\.0, and this decoder image"):
        student.check_teacher(decoder(target="residual", residual_scale=2.0))


def test_a_distilled_step_is_counted_with_its_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discrete_lit.generators.latent_diffusion.load", lambda path: decoder())
    settings: dict[str, Any] = {
        "consistency": lambda denoiser: ConsistencyLoss(denoiser, intervals=16),
        "sampler": None,
    }
    untaught, student = decoder(**settings), decoder(**settings, teacher="trained.ckpt")
    student.begin_with_teacher()
    batch = {"image": torch.rand(3, 3, 8, 8) * 2 - 1, "index": torch.arange(3)}
    assert count_step(student, batch) > count_step(untaught, batch)
    assert "check_tokens" not in vars(student._teacher().discrete), "what is counted is a copy of the teacher"


def _given_another(teacher_given: Any, other: Condition, condition: Condition) -> Any:
    return teacher_given(other)


def test_its_noise_is_drawn_by_no_generator() -> None:
    drawn: set[Purpose] = set()

    class Recorded(CounterRandom):
        def normal(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
            drawn.add(purpose)
            return super().normal(purpose, count, step)

        def ahead(self, steps: int) -> CounterRandom:
            return self

    labels, sampler = torch.zeros(2).long(), GuidedSolver(ConsistencySampler(2))
    decoder().draw(labels, Recorded(0, torch.arange(2)), sampler, tokens=ids(2))
    assert drawn == {Purpose.DECODER_START, Purpose.DECODER_STEP}


def test_reconstructions_do_not_depend_on_the_batch() -> None:
    made = decoder()
    both = made.autoencoder()
    tokens = ids(4)
    images = both.decode(tokens)
    torch.testing.assert_close(both.decode(tokens[2:3]), images[2:3], rtol=1e-4, atol=1e-5)
    assert both.vocab_size == 16 and both.token_shape(8) == (4, 4) and both.image_channels == 3
    pictures = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(both.encode(pictures), made.discrete.encode(pictures))
    with pytest.raises(ValueError, match="told one of 3 classes"):
        decoder(num_classes=3).autoencoder()
    grid = ReconstructionGrid(2, 2)
    assert grid.applies_to(made) and not SampleGrid().applies_to(made)
    assert grid.make_images(made, {"image": pictures, "index": torch.arange(2)}).shape == (4, 3, 8, 8)


# In place of a tokenizer's decoder.


def described(kind: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": f"discrete_lit.{kind}", "init_args": settings}


def saved(folder: Path, *, levels: list[int] | None = None, seed: int = 0) -> tuple[str, str, Any]:
    """Write a decoder and a generator of one tokenizer's tokens; give their files and the decoder."""
    torch.manual_seed(seed)
    codes: Any = instantiate(described("tokenizers.FSQ", levels=levels or [4, 4], network=NETWORK))
    save(randomise(codes, 0.3), folder / "tokenizer.ckpt")
    frozen = {
        "class_path": "discrete_lit.tokenizers.from_checkpoint",
        "init_args": {"checkpoint": str(folder / "tokenizer.ckpt")},
    }
    made: Any = instantiate(
        described(
            "generators.TokenDiffusionDecoder",
            tokenizer=described("tokenizers.RawPixels"),
            image_size=8,
            discrete=frozen,
            backbone=described("backbones.DiT", width=16, depth=1, heads=2),
            denoiser=described(
                "diffusion.gaussian.GaussianDenoiser",
                path=described("diffusion.gaussian.RectifiedPath"),
                prediction="velocity",
            ),
            sampler=described("samplers.GuidedSolver", solver=described("diffusion.solvers.Euler", steps=3)),
        )
    )
    randomise(made.backbone, 0.2)
    save(made, folder / "decoder.ckpt")
    generator: Any = instantiate(
        described(
            "generators.Masked",
            tokenizer=frozen,
            image_size=8,
            num_classes=2,
            backbone=described("backbones.Transformer", width=16, depth=1, heads=2),
        )
    )
    save(generator, folder / "generator.ckpt")
    return str(folder / "generator.ckpt"), str(folder / "decoder.ckpt"), made.eval()


def test_it_replaces_the_decoder_of_a_generators_tokenizer(tmp_path: Path) -> None:
    generator, file, made = saved(tmp_path)
    (tmp_path / "tokenizer.ckpt").unlink()  # both checkpoints carry it
    run = sample(
        generator,
        str(tmp_path / "out"),
        num_samples=5,
        batch_size=2,
        seed=7,
        accelerator="cpu",
        decoder=file,
        decoder_steps=2,
    )
    assert run["decoder"]["checkpoint"] == file and run["decoder"]["sampler"]["solver"]["steps"] == 2
    tokens = discrete_lit.load(generator).sample(torch.arange(5) % 2, seed=7)
    expected = made.decode(tokens, seed=7, sampler=GuidedSolver(Euler(2)))
    with np.load(tmp_path / "out" / "samples.npz") as written:
        # Another batch rounds otherwise.
        apart = np.abs(written["arr_0"].astype(int) - to_uint8(expected).movedim(1, -1).numpy())
    assert apart.max() <= 1 and (tmp_path / "out" / "grid.png").is_file()


@pytest.mark.slow
def test_decoders_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("one", "other", "larger"):
        (tmp_path / name).mkdir()
    generator, file, made = saved(tmp_path / "one")
    other = saved(tmp_path / "other", seed=1)[1]
    larger = saved(tmp_path / "larger", levels=[4, 5])[1]
    settings: dict[str, Any] = {"num_samples": 1, "accelerator": "cpu"}

    def refused(message: str, checkpoint: str = generator, **given: Any) -> None:
        with pytest.raises(ValueError, match=message):
            sample(checkpoint, str(tmp_path / "out"), **settings, **given)

    refused("does not fit this Masked: the decoder was made for tokens of another tokenizer", decoder=other)
    refused("tokens of another vocabulary: 20, and these are of 16", decoder=larger)
    refused("decoder=.* holds a Masked, not a TokenDiffusionDecoder", decoder=generator)
    refused("decoder_sampler and decoder_steps are of a decoder: give decoder too", decoder_steps=3)
    refused("steps must be at least 1, got 0", decoder=file, decoder_steps=0)
    refused(
        "decoder_steps=3 is of the decoder's own sampler",
        decoder=file,
        decoder_steps=3,
        decoder_sampler=GuidedSolver(Euler(2)),
    )
    refused("holds a TokenDiffusionDecoder, which decodes tokens and draws none: give it as decoder", file)
    for grid, image_size, what in (
        (TokenGrid(16, (2, 8)), 8, "token shape"),
        (TokenGrid(16, (4, 4)), 16, "image size"),
    ):
        with pytest.raises(ValueError, match=f"tokens of another {what}"):
            made.check_source(grid, image_size, num_classes=2)
    made.check_source(TokenGrid(16, (4, 4)), 8, num_classes=2)
    with pytest.raises(ValueError, match="another number of classes: 3, and these are of 2"):
        decoder(num_classes=3).check_source(tokenizer(), 8, num_classes=2)


# What is refused.


def test_batches_and_tokens_that_do_not_fit_are_refused() -> None:
    made, random = decoder(), CounterRandom(0, torch.arange(2))
    with pytest.raises(ValueError, match='needs "image", or "latents" and "tokens" of the same images'):
        made.condition_of({"latents": torch.randn(2, 3, 8, 8)}, random)
    for tokens in (ids(2, (2, 8)), ids(2).float()):
        with pytest.raises(ValueError, match=r"tokens must be ids of the shape \(4, 4\) for each image"):
            made.decode(tokens)
    with pytest.raises(ValueError, match="decodes tokens and draws none"):
        made.sample(torch.zeros(2).long())
    with pytest.raises(ValueError, match="this decoder knows 3 classes: give a label"):
        decoder(num_classes=3).decode(ids(2))
    with pytest.raises(ValueError, match="learned the null label"):
        decoder(label_dropout=0.0).decode(ids(2), sampler=GuidedSolver(DDIM(2), guidance_scale=2.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_input": "ids"}, "token_input must be 'codes' or 'learned'"),
        ({"target": "latent"}, "target 'image' or 'residual'"),
        ({"residual_scale": 2.0}, "residual_scale=2.0 is of target='residual'"),
        ({"target": "residual", "residual_scale": 0.0}, "residual_scale must be above 0"),
        ({"token_width": 0}, "token_width at least 1"),
        ({"discrete": TokenGrid(16, (4, 4))}, "has no code vectors and no decoder"),
        ({"discrete": TokenGrid(16, (2, 2, 2)), "token_input": "learned"}, "as a grid of two axes or as a row"),
        (
            {
                "discrete": TokenGrid(16, (5,)),
                "token_input": "learned",
                "backbone": lambda layout: UNet(
                    layout,
                    channels=8,
                    multipliers=[1],
                    attention=[1],
                    attention_kind="self",
                    class_input="time",
                    heads=2,
                    norm_groups=4,
                ),
            },
            "vectors to attend to, as rows of tokens are, need attention_kind='transformer'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder(**settings)


def test_evaluation_measures_its_reconstructions(tmp_path: Path) -> None:
    _, file, made = saved(tmp_path)
    meter = ReconstructionMeter(_load_autoencoders([Run("decoder", "decoder", file)], 3)["decoder"])
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    both = made.autoencoder()
    expected = to_uint8(both.decode(both.encode(images / 127.5 - 1)))
    assert (meter(images).int() - expected.int()).abs().max() <= 1
    figures = meter.figures()
    assert figures.vocab_size == 16 and figures.tokens == 16 and figures.psnr > 0
    # Its ids can be perturbed as the tokenizer's own, to the same ones.
    pictures = images / 127.5 - 1
    perturbed = [PerturbedTokenizer(each, 0.5, neighbours=3) for each in (both, made.discrete)]
    assert torch.equal(perturbed[0].encode(pictures), perturbed[1].encode(pictures))
    assert not torch.equal(perturbed[0].decode(perturbed[0].encode(pictures)), both.decode(both.encode(pictures)))


def test_a_waveform_is_drawn_given_its_codes() -> None:
    """Frames of samples beside the codes of the same frames: it learns from clips, and decodes by the tokens."""
    torch.manual_seed(0)
    codec = EnCodec(
        partial(SEANet, filters=4, ratios=(4, 2), lstm_layers=0),
        16,
        code_dim=4,
        depth=2,
        sample_rate=8000,
        codebook_init="normal",
    )
    decoder = TokenDiffusionDecoder(
        RawFrames(8, scale=5.0),
        [60],
        discrete=codec,
        backbone=partial(DiT, width=16, depth=1, heads=2, patch_size=1),
        denoiser=GaussianDenoiser(RectifiedPath(), prediction="velocity"),
        sampler=GuidedSolver(Euler(steps=2)),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
    )
    randomise(decoder.backbone, 0.1)
    clips = waveforms(3, 1, 60)
    random = CounterRandom(0, torch.arange(3))
    batch = {"audio": clips}
    condition = decoder.condition_of(batch, random)
    latents = decoder.data_of(batch, random)
    assert latents.shape == (3, 8, 8, 1) and torch.equal(batch["tokens"], codec.encode(clips))
    assert torch.allclose(decoder.tokenizer.decode(latents)[..., :60], clips, atol=1e-6)
    assert torch.allclose(latents[0, :, 2, 0], 5 * clips[0, 0, 16:24])
    loss, _ = decoder.loss(latents, condition, random)
    loss.backward()
    assert decoder.token_embedding.absent.grad is not None
    tokens = batch["tokens"].clone()
    made = decoder.decode(tokens)
    assert made.shape == (3, 1, 64) and torch.equal(made, decoder.decode(tokens))
    tokens[0, 5, 1] = (tokens[0, 5, 1] + 1) % 16
    other = decoder.decode(tokens)
    assert torch.equal(made[1:], other[1:]) and not torch.equal(made[0], other[0])
    with pytest.raises(ValueError, match=r"image_size of audio is \[samples\]"):
        RawFrames(8).latent_shape(64)
    with pytest.raises(ValueError, match=r"waveforms \(B, 1, T\) are taken, got \(3, 2, 60\)"):
        RawFrames(8).encode(waveforms(3, 2, 60))
    with pytest.raises(ValueError, match="hop, audio_channels and scale must be above 0"):
        RawFrames(0)
    with pytest.raises(ValueError, match='holds image: TokenDiffusionDecoder needs "audio"'):
        decoder.tokens_of({"image": clips})
