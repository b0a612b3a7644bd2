"""What the command line says to mistakes of latents, of tokens beside them, and of what draws and decodes them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_runs import (
    generator_settings,
    latent_settings,
    refusal,
    untrained,
    untrained_fsq,
    untrained_klvae,
    write_settings,
)

from discrete_lit.checkpoints import load
from discrete_lit.data.latent_arrays import LatentWriter

STEPS_OF_10 = {
    "class_path": "discrete_lit.diffusion.gaussian.GaussianDenoiser",
    "init_args": {
        "path": {
            "class_path": "discrete_lit.diffusion.gaussian.ScheduledPath",
            "init_args": {"schedule": "cosine", "steps": 10},
        },
        "learned_variance": True,
    },
}


def frozen(checkpoint: Path, function: str = "tokenizers.from_checkpoint") -> dict[str, Any]:
    return {"class_path": f"discrete_lit.{function}", "init_args": {"checkpoint": str(checkpoint)}}


def decoder_settings(of_latents: Path, of_ids: Path, image_size: int = 8) -> dict[str, Any]:
    """A decoder of an FSQ's ids into a KLVAE's latents, trained on 10 steps of noise."""
    settings = latent_settings(of_latents)
    backbone = {"class_path": "discrete_lit.backbones.DiT", "init_args": {"width": 8, "depth": 1, "heads": 2}}
    settings["model"] = {
        "class_path": "discrete_lit.generators.TokenDiffusionDecoder",
        "init_args": {
            "tokenizer": settings["model"]["init_args"]["tokenizer"],
            "image_size": image_size,
            "discrete": frozen(of_ids),
            "backbone": backbone,
            "denoiser": STEPS_OF_10,
            "optimizer": settings["model"]["init_args"]["optimizer"],
        },
    }
    return settings


def discon_settings(of_latents: Path, discrete: Path, *, fusion: str = "prefix") -> dict[str, Any]:
    settings = latent_settings(of_latents)
    settings["model"]["class_path"] = "discrete_lit.generators.DisCon"
    arguments = settings["model"]["init_args"]
    arguments["discrete"] = frozen(discrete, "generators.generator_from_checkpoint")
    arguments["backbone"]["init_args"]["fusion"] = fusion
    return settings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of models that were not trained, by what they are."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    of_ids, of_latents = untrained_fsq(folder / "ids.ckpt"), untrained_klvae(folder / "latents.ckpt")
    other_ids = untrained_fsq(folder / "other_ids.ckpt")
    at_16 = generator_settings(of_ids)
    at_16["model"]["init_args"]["image_size"] = 16
    more_classes = generator_settings(of_ids)
    more_classes["model"]["init_args"]["num_classes"] = 3
    masked = untrained(generator_settings(of_ids), folder / "masked.ckpt")
    return {
        "ids": of_ids,
        "latents": of_latents,
        "wide latents": untrained_klvae(folder / "wide.ckpt", scale_factor=4.3),
        "masked": masked,
        "masked at 16 pixels": untrained(at_16, folder / "masked_16.ckpt"),
        "masked of 3 classes": untrained(more_classes, folder / "masked_3.ckpt"),
        "mar": untrained(latent_settings(of_latents), folder / "mar.ckpt"),
        "decoder": untrained(decoder_settings(of_latents, of_ids), folder / "decoder.ckpt"),
        "decoder at 16 pixels": untrained(decoder_settings(of_latents, of_ids, 16), folder / "decoder_16.ckpt"),
        "decoder of another": untrained(decoder_settings(of_latents, other_ids), folder / "decoder_other.ckpt"),
        "discon": untrained(discon_settings(of_latents, masked), folder / "discon.ckpt"),
    }


def fit_says(settings: dict[str, Any], folder: Path, capfd: pytest.CaptureFixture, *arguments: str) -> str:
    file = write_settings(folder / "settings.yaml", settings)
    return refusal(capfd, "fit", "--config", file, "--run_dir", folder / "run", *arguments)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("family", ["mar", "decoder", "discon"])
def test_latents_of_another_scale(
    family: str, made: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    settings = {
        "mar": lambda: latent_settings(made["wide latents"]),
        "decoder": lambda: decoder_settings(made["wide latents"], made["ids"]),
        "discon": lambda: discon_settings(made["wide latents"], made["masked"]),
    }[family]()
    said = fit_says(settings, tmp_path, capfd)
    assert "the first batch of latents: latents must have about unit deviation, between 0.5 and 2.0, and these" in said
    assert "The scale is the tokenizer's: its scale_factor" in said and "measure_latents" in said


def test_latents_of_another_tokenizer(made: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    LatentWriter.create(
        tmp_path / "latents",
        count=4,
        latent_shape=(2, 4, 4),
        storage="sample",
        dtype="float16",
        image_size=8,
        num_classes=2,
        classes=["zero", "one"],
        source="noise",
        tokenizer=load(made["wide latents"]).fingerprint(),
    )
    writer = LatentWriter(tmp_path / "latents")
    writer.write(torch.arange(4), torch.randn(4, 2, 4, 4), torch.arange(4) % 2)
    writer.close()
    LatentWriter.finalise(tmp_path / "latents")
    data = {
        "class_path": "discrete_lit.data.LatentArrays",
        "init_args": {"train": str(tmp_path / "latents"), "batch_size": 2},
    }
    said = fit_says({**latent_settings(made["latents"]), "data": data}, tmp_path, capfd)
    assert f"the latents in {tmp_path / 'latents'} were made by the tokenizer" in said
    assert "use that tokenizer's checkpoint, or make the latents anew with `discrete-lit tokenize`" in said
    # And arrays of latents alone, where tokens of the same images are needed.
    said = fit_says({**discon_settings(made["latents"], made["masked"]), "data": data}, tmp_path, capfd)
    assert "were made by the tokenizer" in said


@pytest.mark.parametrize(
    ("discrete", "message"),
    [
        ("ids", "holds a FSQ, not a Generator"),
        ("mar", "holds a ContinuousMasked, not a Generator"),
        ("masked at 16 pixels", "the generator of d models images of 16 pixels, image_size is 8: both"),
        ("masked of 3 classes", "the generator of d knows 3 classes, num_classes is 2"),
    ],
)
def test_d_of_another_tokenizer(
    discrete: str, message: str, made: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert message in fit_says(discon_settings(made["latents"], made[discrete]), tmp_path, capfd)


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        (
            "mar",
            ["--model.init_args.sampler=MARSampler", "--model.init_args.sampler.init_args.steps=17"],
            "steps=17 exceeds the 16 places of an image",
        ),
        (
            "mar",
            [
                "--model.init_args.sampler=MARSampler",
                "--model.init_args.sampler.init_args.steps=4",
                "--model.init_args.sampler.init_args.solver=DDPM",
                "--model.init_args.sampler.init_args.solver.init_args.steps=1001",
            ],
            "steps=1001 exceeds the 1000 steps that the network was trained on",
        ),
        (
            "decoder",
            [
                "--model.init_args.sampler=GuidedSolver",
                "--model.init_args.sampler.init_args.solver=DDPM",
                "--model.init_args.sampler.init_args.solver.init_args.steps=11",
            ],
            "steps=11 exceeds the 10 steps that the network was trained on",
        ),
    ],
)
def test_steps_over_the_trained_schedule_in_training(
    family: str, arguments: list[str], message: str, made: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    settings = latent_settings(made["latents"]) if family == "mar" else decoder_settings(made["latents"], made["ids"])
    assert message in fit_says(settings, tmp_path, capfd, *arguments)


@pytest.mark.slow_but(4)
@pytest.mark.parametrize(
    ("checkpoint", "arguments", "message"),
    [
        ("mar", ["--sampler=MARSampler", "--sampler.steps=17"], "steps=17 exceeds the 16 places of an image"),
        (
            "mar",
            ["--sampler=MARSampler", "--sampler.steps=4", "--sampler.solver=DDPM", "--sampler.solver.steps=1001"],
            "steps=1001 exceeds the 1000 steps that the network was trained on",
        ),
        (
            "masked",
            ["--decoder=decoder", "--decoder_steps=11"],
            "steps=11 exceeds the 10 steps that the network was trained on",
        ),
        (
            "masked",
            ["--decoder=decoder at 16 pixels"],
            "the decoder was made for tokens of another token shape: (8, 8)",
        ),
        ("masked", ["--decoder=decoder of another"], "the decoder was made for tokens of another tokenizer: "),
        ("masked", ["--decoder=mar"], "holds a ContinuousMasked, not a TokenDiffusionDecoder"),
        ("mar", ["--decoder=decoder"], "decoder is for generators of ids, and this one is a ContinuousMasked"),
        (
            "discon",
            ["--sampler=MaskGITSampler"],
            "sampler=MaskGITSampler does not draw from a DisCon, which needs a MAR",
        ),
        ("decoder", [], "holds a TokenDiffusionDecoder, which decodes tokens and draws none"),
        ("latents", [], "holds a KLVAE, not a Generator"),
    ],
)
def test_draws_that_cannot_be(
    checkpoint: str,
    arguments: list[str],
    message: str,
    made: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    given = [
        f"--decoder={made[value]}" if (value := argument.removeprefix("--decoder=")) != argument else argument
        for argument in arguments
    ]
    fixed = ("--num_samples", 2, "--output", tmp_path / "out", "--accelerator", "cpu")
    assert message in refusal(capfd, "sample", "--ckpt_path", made[checkpoint], *fixed, *given)
    assert not (tmp_path / "out" / "samples.npz").exists()


@pytest.mark.parametrize("fusion", ["mix", "add"])
def test_a_fusion_that_the_layout_cannot_hold(
    fusion: str, made: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """4 x 4 ids do not stand for squares of 2 x 2 places."""
    settings = discon_settings(made["latents"], made["masked"], fusion=fusion)
    settings["model"]["init_args"]["patch_size"] = 2
    said = fit_says(settings, tmp_path, capfd)
    assert (
        f"fusion='{fusion}' needs an id for each of the 4 places, d has 16 ids, which do not stand for squares" in said
    )
    assert "use fusion='prefix' or 'cross'" in said


def test_a_fusion_without_ids(made: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    settings = copy.deepcopy(latent_settings(made["latents"]))
    settings["model"]["init_args"]["backbone"]["init_args"]["fusion"] = "add"
    said = fit_says(settings, tmp_path, capfd)
    assert "fusion='add' says how a grid of ids enters, and this network is given none" in said
