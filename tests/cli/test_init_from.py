"""New runs from the weights of others: which are taken, which are new, and what is said of them."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import latent_generators
from helpers.precision_cases import SIDE, convolutional
from helpers.random_weights import randomise
from helpers.tiny_runs import TOKENIZER, generator_settings, refusal, run, write_settings
from lightning import Trainer
from safetensors.torch import save_file

from discrete_lit.backbones import SegmentTransformer, Transformer
from discrete_lit.cli.init_from import read_start, take_weights
from discrete_lit.cli.resume import check_tokenizer
from discrete_lit.generators import Autoregressive, TextVideoAudio
from discrete_lit.tokenizers import VQVAE, HybridVQ, TextTokenizer, TokenGrid

STILL = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}}  # what is taken stays as it was
AVERAGES = {"class_path": "ExponentialMovingAverage", "init_args": {"decay": 0.9}}


def weights_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_other_classes_from_the_averages_of_a_generator(
    tokenizer_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = generator_settings(tokenizer_checkpoint)
    settings["trainer"] |= {"max_steps": 3, "callbacks": [AVERAGES]}
    first = write_settings(tmp_path / "first.yaml", settings)
    run("fit", "--config", first, "--run_dir", tmp_path / "first")
    before = weights_of(tmp_path / "first")
    raw = before["current_model_state"]
    assert any(
        not torch.equal(value, raw.get(f"module.{name}", raw.get(name))) for name, value in before["state_dict"].items()
    )

    settings["model"]["init_args"] |= {"num_classes": 5, "optimizer": STILL, "label_dropout": 0.2}
    settings["data"]["init_args"]["num_classes"] = 5
    settings["trainer"] |= {"max_steps": 1, "callbacks": []}
    second = write_settings(tmp_path / "second.yaml", settings)
    caplog.clear()
    run(
        "fit",
        "--config",
        second,
        "--run_dir",
        tmp_path / "second",
        "--init_from",
        tmp_path / "first/checkpoints/last.ckpt",
    )
    after = weights_of(tmp_path / "second")["state_dict"]
    table = "backbone.class_embedding.weight"
    for name, value in before["state_dict"].items():
        if name != table:
            assert torch.equal(after[name], value), name
    assert after[table].shape == (6, 8) and torch.equal(after[table][-1], before["state_dict"][table][-1])
    assert not any(torch.equal(row, old) for row in after[table][:-1] for old in before["state_dict"][table])
    said = "\n".join(record.getMessage() for record in caplog.records)
    mine = sum(not name.startswith("tokenizer.") for name in after)
    assert f"took {mine - 1} of {mine} weights, the averages of its EMA" in said
    assert f"new: {table} (5 classes in place of 2; the row of the null label was taken)" in said
    assert "left out" not in said


def test_a_fresh_discriminator_and_revival(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = copy.deepcopy(TOKENIZER)
    settings["model"]["class_path"] = "VQVAE"
    del settings["model"]["init_args"]["levels"]
    settings["model"]["init_args"] |= {"codebook_size": 8, "code_dim": 4, "codebook_init": "normal"}
    settings["trainer"]["limit_val_batches"] = 0
    run("fit", "--config", write_settings(tmp_path / "first.yaml", settings), "--run_dir", tmp_path / "first")
    before = weights_of(tmp_path / "first")["state_dict"]

    settings["model"]["init_args"] |= {
        "revive_below": 0.5,
        "adversarial_loss": {
            "class_path": "AdversarialLoss",
            "init_args": {
                "discriminator": {"class_path": "PatchGAN", "init_args": {"width": 4, "layers": 1}},
                "start_step": 0,
            },
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.0}},
    }
    settings["trainer"]["max_steps"] = 1
    second = write_settings(tmp_path / "second.yaml", settings)
    start = ("--init_from", tmp_path / "first/checkpoints/last.ckpt")
    run("fit", "--config", second, "--run_dir", tmp_path / "second", *start)
    after = weights_of(tmp_path / "second")["state_dict"]
    networks = [name for name in before if name.startswith("network.")]
    assert networks and all(torch.equal(after[name], before[name]) for name in networks)
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert f"took {len(before)} of {len(after)} weights" in said and "EMA" not in said
    assert "new: " in said and "discriminator" in said

    # And back: a model without a discriminator leaves it out.
    caplog.clear()
    settings["model"]["init_args"].pop("adversarial_loss")
    third = write_settings(tmp_path / "third.yaml", settings)
    run(
        "fit",
        "--config",
        third,
        "--run_dir",
        tmp_path / "third",
        "--init_from",
        tmp_path / "second/checkpoints/last.ckpt",
    )
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "left out: " in said and "discriminator" in said.partition("left out: ")[2]


def test_a_generator_that_was_imported_without_its_tokenizer(
    tokenizer_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As an imported file is: its weights are the backbone's, and the configuration says which tokenizer it is for."""
    from discrete_lit.checkpoints import instantiate, save

    settings = generator_settings(tokenizer_checkpoint)
    alone = copy.deepcopy(settings["model"])
    alone["init_args"]["tokenizer"] = {
        "class_path": "TokenGrid",
        "init_args": {"vocab_size": 12, "token_shape": [4, 4]},
    }
    generator = instantiate(alone)
    save(generator, tmp_path / "imported.ckpt")
    settings["model"]["init_args"]["optimizer"] = STILL
    settings["trainer"]["max_steps"] = 1
    file = write_settings(tmp_path / "settings.yaml", settings)
    run("fit", "--config", file, "--run_dir", tmp_path / "run", "--init_from", tmp_path / "imported.ckpt")
    after = weights_of(tmp_path / "run")["state_dict"]
    for name, value in generator.backbone.state_dict(prefix="backbone.").items():
        assert torch.equal(after[name], value), name
    assert any(name.startswith("tokenizer.network.") for name in after)
    assert not [record for record in caplog.records if record.getMessage().startswith(("new: ", "left out: "))]


def checkpoint_of(module: Any) -> dict[str, Any]:
    return {"state_dict": {name: value.clone() for name, value in module.state_dict().items()}}


def test_frozen_parts_are_the_configurations() -> None:
    """DisCon's generator of tokens may be another, of the same tokens; what trains is taken."""
    before, now = latent_generators.make("DisCon"), latent_generators.make("DisCon")
    for module, spread in ((now.discrete.backbone, 0.5), (now.backbone, 0.5), (now.head, 0.5)):
        randomise(module, spread)
    kept = checkpoint_of(now)["state_dict"]
    check_tokenizer(now, checkpoint_of(before), "before.ckpt")
    (said,) = take_weights(now, checkpoint_of(before), "before.ckpt")
    state = before.state_dict()
    trained = [name for name in state if not name.startswith("discrete.")]
    assert f"took {len(trained)} of {len(trained)} weights" in said
    for name, value in now.state_dict().items():
        assert torch.equal(value, kept[name] if name.startswith("discrete.") else state[name]), name


@pytest.mark.parametrize("positions", ["rope_2d", "learned"])
def test_another_resolution(positions: str) -> None:
    """Rotary positions are no weights: more places take all of them. Learned ones are refused by name."""

    def make(side: int) -> Autoregressive:
        backbone = partial(Transformer, width=8, depth=1, heads=2, positions=positions)
        return Autoregressive(TokenGrid(5, (side, side)), side, num_classes=2, backbone=backbone)

    before, now = randomise(make(2), 0.5), make(4)
    if positions == "learned":
        shapes = r"backbone\.positions\.embedding has shape \(1, 4, 8\) instead of \(1, 16, 8\)"
        with pytest.raises(ValueError, match=f"does not fit this Autoregressive: {shapes}"):
            take_weights(now, checkpoint_of(before), "before.ckpt")
        return
    (said,) = take_weights(now, checkpoint_of(before), "before.ckpt")
    count = len(before.backbone.state_dict())
    assert f"took {count} of {count} weights" in said
    torch.testing.assert_close(now.backbone.state_dict(), before.backbone.state_dict())


def test_layers_around_another_codebook(
    tokenizer_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are named by the refusal, and begin new; all others are taken, also by a run that goes on in between."""
    before = torch.load(tokenizer_checkpoint, weights_only=True)["state_dict"]
    settings = copy.deepcopy(TOKENIZER)
    settings["model"]["init_args"] |= {"levels": [4, 3, 2, 2], "optimizer": STILL}
    settings["trainer"]["max_steps"] = 1
    file = write_settings(tmp_path / "other.yaml", settings)
    start = ("fit", "--config", file, "--run_dir", tmp_path / "run", "--init_from", tokenizer_checkpoint)
    message = refusal(capfd, *start)
    named = message.partition("`--init_anew ")[2].partition("`")[0]
    assert json.loads(named), message
    run(*start, "--init_anew", named, "--ckpt_path", "last")
    after = weights_of(tmp_path / "run")["state_dict"]
    of_other_shape = [name for name in after if after[name].shape != before[name].shape]
    assert {name.rpartition(".")[0] for name in of_other_shape} == set(json.loads(named))
    for name, value in after.items():
        begins_new = name.startswith(tuple(json.loads(named)))
        assert torch.equal(value, before[name]) != begins_new or not value.numel(), name
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert all(f"{name}." in said.partition("new: ")[2] for name in json.loads(named))

    settings["init_from"], settings["init_anew"] = str(tokenizer_checkpoint), ["network.nowhere"]
    wrong = write_settings(tmp_path / "wrong.yaml", settings)
    for arguments, words in (
        (
            ("--config", wrong, "--run_dir", tmp_path / "wrong"),
            "init_anew: this FSQ has no weights named network.nowhere",
        ),
        (("--config", file, "--init_anew", named), "there is no init_from"),
    ):
        assert words in refusal(capfd, "fit", *arguments)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    published, run_folder = tmp_path / "model.safetensors", tmp_path / "run"
    save_file({"weight": torch.zeros(1)}, published)
    (run_folder / "checkpoints").mkdir(parents=True)
    (run_folder / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"is no checkpoint.*discrete-lit import --weights .*model.safetensors"):
        read_start(str(published))
    with pytest.raises(ValueError, match=r"is the folder of a run: its last checkpoint is .*last\.ckpt"):
        read_start(str(run_folder))


@pytest.mark.parametrize("init", ["data", "kmeans"])
def test_codes_that_are_taken_stay(init: Any) -> None:
    """A file of codes alone, as published ones are, for a codebook that would draw its first codes from data and has
    running means."""
    before = randomise(VQVAE(convolutional, 8, code_dim=3, codebook_update="gradient", codebook_init="uniform"), 0.5)
    now = VQVAE(convolutional, 8, code_dim=3, codebook_init=init, decay=0.9999, revive_below=0.5).train()
    said = take_weights(now, checkpoint_of(before), "before.ckpt")
    codes = now.quantizer.codebook.codes
    assert torch.equal(codes, before.quantizer.codebook.codes) and any("codebook.started" in line for line in said)
    kept = codes.clone()
    now.reconstruct(torch.rand(1, 3, SIDE, SIDE) * 2 - 1)
    assert not torch.equal(codes, kept)
    torch.testing.assert_close(codes, kept, rtol=0.0, atol=0.2 * float(kept.std()))


def test_codes_that_begin_anew_are_not_taken_for_old_ones() -> None:
    """A codebook that is named starts from the data, as that of a new run does."""
    before = randomise(VQVAE(convolutional, 8, code_dim=3, codebook_update="gradient", codebook_init="uniform"), 0.5)
    now = VQVAE(convolutional, 8, code_dim=3, codebook_init="kmeans", decay=0.9999).train()
    take_weights(now, checkpoint_of(before), "before.ckpt", anew=["quantizer.codebook"])
    torch.testing.assert_close(now.network.state_dict(), before.network.state_dict())
    codes = now.quantizer.codebook.codes.clone()
    assert not torch.equal(codes, before.quantizer.codebook.codes)
    now.reconstruct(torch.rand(1, 3, SIDE, SIDE) * 2 - 1)
    assert (now.quantizer.codebook.codes - codes).abs().max() > 0.01


def test_a_first_stage_does_not_replace_what_was_taken() -> None:
    make = partial(HybridVQ, convolutional, 8, code_dim=3, scales=[1, 2, 8])
    before, now = randomise(make(), 0.5), make(first_stage="nowhere.ckpt")
    assert "first_stage is not read" in take_weights(now, checkpoint_of(before), "before.ckpt")[1]
    now.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    now.on_fit_start()
    torch.testing.assert_close(now.state_dict(), before.state_dict())
    fresh = make(first_stage="nowhere.ckpt")
    fresh.trainer = now.trainer
    with pytest.raises((ValueError, FileNotFoundError), match=r"nowhere\.ckpt"):
        fresh.on_fit_start()


def test_a_decoder_of_other_tokens() -> None:
    before, now = latent_generators.make("TokenDiffusionDecoder"), latent_generators.make("TokenDiffusionDecoder")
    check_tokenizer(now, checkpoint_of(before), "before.ckpt")
    randomise(now.discrete, 0.5)
    with pytest.raises(
        ValueError, match=r"'before.ckpt' was trained on another tokenizer than model.init_args.discrete"
    ):
        check_tokenizer(now, checkpoint_of(before), "before.ckpt")


def test_frozen_tokenizers_of_a_generator_over_segments() -> None:
    """Another one than training had is refused, the codec as well; neither is taken in place of the configuration's."""

    def make() -> TextVideoAudio:
        class Coded(TokenGrid):
            def __init__(self, vocab_size: int, token_shape: tuple[int, ...]) -> None:
                super().__init__(vocab_size, token_shape)
                self.book = torch.nn.Linear(2, 2)

        return TextVideoAudio(
            Coded(2, (2, 1, 1)),
            Coded(2, (1, 2)),
            image_size=(3, 4, 4),
            audio_length=8,
            text_tokenizer=TextTokenizer.characters("ab"),
            text_length=4,
            backbone=partial(SegmentTransformer, width=8, depth=1, heads=2),
        )

    before, now = make(), make()
    now.load_state_dict(before.state_dict())
    check_tokenizer(now, checkpoint_of(before), "before.ckpt")
    randomise(now.backbone, 0.5)
    (said,) = take_weights(now, checkpoint_of(before), "before.ckpt")
    assert f"of {sum(not name.startswith(('tokenizer.', 'audio_tokenizer.')) for name in now.state_dict())} " in said
    torch.testing.assert_close(now.backbone.state_dict(), before.backbone.state_dict())
    for name in ("tokenizer", "audio_tokenizer"):
        other = make()
        other.load_state_dict(before.state_dict())
        randomise(getattr(other, name), 0.5)
        with pytest.raises(ValueError, match=rf"another tokenizer than model\.init_args\.{name} gives"):
            check_tokenizer(other, checkpoint_of(before), "before.ckpt")
