"""`discrete-lit import` and `discrete-lit export`: there and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

NETWORK = {"channels": 32, "multipliers": [1, 2], "blocks": 1, "z_channels": 8}
CODEBOOK = {"codebook_size": 16, "dim": 4, "codebook_update": "gradient", "codebook_init": "uniform"}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(network={}, quantizer={}, kind="VectorQuantizer")`: the checkpoint of an untrained VQGAN."""

    def write(network: Any = None, quantizer: Any = None, kind: str = "VectorQuantizer") -> Path:
        from discrete_lit.checkpoints import instantiate, save

        config = {
            "class_path": "discrete_lit.tokenizers.VQGAN",
            "init_args": {
                "network": {
                    "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
                    "init_args": {**NETWORK, **(network or {})},
                },
                "quantizer": {
                    "class_path": f"discrete_lit.tokenizers.quantizers.{kind}",
                    "init_args": {**CODEBOOK, **(quantizer or {})} if kind == "VectorQuantizer" else quantizer,
                },
            },
        }
        save(instantiate(config), tmp_path / "ours.ckpt")
        return tmp_path / "ours.ckpt"

    return write


def run(*arguments: Any) -> None:
    from discrete_lit.cli.commands import main

    main([str(argument) for argument in arguments])


def export(checkpoint: Path, family: str, output: Path) -> Path:
    run("export", "--ckpt_path", checkpoint, "--family", family, "--output", output)
    return output


@pytest.mark.slow_but(1)
@pytest.mark.parametrize(
    ("family", "network", "name"),
    [
        ("taming_vqgan", {"attention": [0, 1], "multipliers": [2, 1, 1]}, "theirs.ckpt"),
        ("taming_vqgan", {"attention": False, "image_channels": 1}, "theirs.safetensors"),
        ("llamagen_vq", {"decoder_multipliers": [2, 1]}, "theirs.pt"),
    ],
)
def test_there_and_back_is_the_same_to_the_bit(
    family: str, network: Any, name: str, write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import discrete_lit

    checkpoint = write(network, {"normalize": family == "llamagen_vq"})
    theirs = export(checkpoint, family, tmp_path / name)
    run("import", "--weights", theirs, "--family", family, "--output", tmp_path / "back.ckpt")
    first, back = discrete_lit.load(checkpoint), discrete_lit.load(tmp_path / "back.ckpt")
    assert back.fingerprint() == first.fingerprint() and f"fingerprint {back.fingerprint()}" in capsys.readouterr().out
    again = export(tmp_path / "back.ckpt", family, tmp_path / f"again_{name}")
    read = load_file if name.endswith("safetensors") else torch.load
    first_file, second_file = (read(file) for file in (theirs, again))
    if not name.endswith("safetensors"):
        (wrapper,) = first_file
        assert wrapper == {"taming_vqgan": "state_dict", "llamagen_vq": "model"}[family]
        first_file, second_file = first_file[wrapper], second_file[wrapper]
    assert first_file.keys() == second_file.keys()
    assert all(torch.equal(value, second_file[key]) for key, value in first_file.items())
    assert ("quantize.codebook_used" in first_file) == (family == "llamagen_vq")


@torch.no_grad()
def test_running_means_stay_behind(tmp_path: Path) -> None:
    """A VQVAE's codebook of running means goes out as its codes: the ids and the images are the same."""
    from discrete_lit.checkpoints import instantiate, load, save

    network = {"class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder", "init_args": NETWORK}
    arguments = {"network": network, "codebook_size": 16, "code_dim": 4, "codebook_update": "ema"}
    save(instantiate({"class_path": "discrete_lit.tokenizers.VQVAE", "init_args": arguments}), tmp_path / "ours.ckpt")
    theirs = export(tmp_path / "ours.ckpt", "taming_vqgan", tmp_path / "theirs.ckpt")
    run("import", "--weights", theirs, "--family", "taming_vqgan", "--output", tmp_path / "back.ckpt")
    first, back = load(tmp_path / "ours.ckpt"), load(tmp_path / "back.ckpt")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    tokens = first.encode(images)
    assert torch.equal(back.encode(images), tokens) and torch.equal(back.decode(tokens), first.decode(tokens))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("taming_vqgan", {"network": {"norm_groups": 8}}, "network.norm_groups is 8, the layout has 32"),
        ("taming_vqgan", {"network": {"downsampling": "average", "pixels": "unit"}}, "downsampling is average.*pixels"),
        ("taming_vqgan", {"network": {"decoder_attention": []}}, r"decoder_attention is \[\], the layout has \[1\]"),
        ("taming_vqgan", {"network": {"decoder_multipliers": [2, 2]}}, "decoder_multipliers is"),
        ("taming_vqgan", {"network": {"decoder_blocks": 1}}, "decoder_blocks is 1, the layout has 2"),
        ("taming_vqgan", {"network": {"middle_blocks": 1}}, "middle_blocks is 1"),
        ("taming_vqgan", {"quantizer": {"normalize": True}}, "normalize is True, the layout has False"),
        ("llamagen_vq", {}, "normalize is False, the layout has True"),
        ("llamagen_vq", {"network": {"attention": False}, "quantizer": {"normalize": True}}, "attention is False"),
        (
            "taming_vqgan",
            {"kind": "FiniteScalarQuantizer", "quantizer": {"levels": [3, 3]}},
            "a VQGAN with a FiniteScalarQuantizer cannot be written as taming_vqgan",
        ),
        (
            "var_vqvae",
            {},
            "family='var_vqvae' is not written; the layouts are taming_vqgan, llamagen_vq, checkpoint, hub, diffusers",
        ),
    ],
)
def test_what_a_layout_cannot_express(
    family: str,
    settings: Any,
    message: str,
    write: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    checkpoint = write(**settings)
    with pytest.raises(SystemExit):
        export(checkpoint, family, tmp_path / "theirs.ckpt")
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.glob("theirs*"))


def test_a_generators_checkpoint_is_refused(
    generator_checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        export(generator_checkpoints["Masked"], "taming_vqgan", tmp_path / "theirs.ckpt")
    assert "a Masked cannot be written as taming_vqgan" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["published file", "mapping", "settings file"])
def test_a_reference_configuration_reaches_the_family(
    form: str, write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = export(write(), "taming_vqgan", tmp_path / "theirs.ckpt")
    reference, settings = tmp_path / "model.yaml", tmp_path / "settings.yaml"
    reference.write_text("model: {target: taming.models.vqgan.VQModel, params: {n_embed: 1024}}")
    settings.write_text("reference_config: {n_embed: 1024}")
    more = {
        "published file": ["--reference_config", reference],
        "mapping": ["--reference_config.n_embed", 1024],
        "settings file": ["--config", settings],
    }[form]
    arguments = ["--weights", theirs, "--family", "taming_vqgan", "--output", tmp_path / "back.ckpt"]
    with pytest.raises(SystemExit):
        run("import", *arguments, *more)
    assert "reference_config has n_embed=1024, but the tensors have 16" in capsys.readouterr().err
    assert not (tmp_path / "back.ckpt").exists()


def test_import_of_something_else_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(SystemExit):
        run("import", "--weights", tmp_path / "w.pt", "--family", "taming_vqgan", "--output", tmp_path / "ours.ckpt")
    assert "it looks like none of the known families" in capsys.readouterr().err
    assert not (tmp_path / "ours.ckpt").exists()
