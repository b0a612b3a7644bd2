"""Settings of runs that take a second, for tests of the command line."""

import copy
from pathlib import Path
from typing import Any

import lightning  # noqa: F401 (its log handler must not hold the captured stream of the first test)
import pytest
import yaml

from discrete_lit.checkpoints import instantiate, save
from discrete_lit.cli.commands import main

QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 1,
}
TOKENIZER: dict[str, Any] = {
    "model": {
        "class_path": "discrete_lit.tokenizers.FSQ",
        "init_args": {
            "levels": [4, 3],
            "network": {
                "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
                "init_args": {
                    "channels": 4,
                    "multipliers": [1, 1],
                    "blocks": 1,
                    "attention": False,
                    "norm_groups": 2,
                },
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
    },
    "data": {"class_path": "helpers.synthetic_data.SyntheticImages", "init_args": {"count": 8, "batch_size": 4}},
    "trainer": {**QUIET, "max_steps": 2},
}


def generator_settings(tokenizer: Path) -> dict[str, Any]:
    """A Masked generator on the tokenizer of a checkpoint."""
    return {
        "model": {
            "class_path": "discrete_lit.generators.Masked",
            "init_args": {
                "tokenizer": {
                    "class_path": "discrete_lit.tokenizers.from_checkpoint",
                    "init_args": {"checkpoint": str(tokenizer)},
                },
                "image_size": 8,
                "num_classes": 2,
                "backbone": {
                    "class_path": "discrete_lit.backbones.Transformer",
                    "init_args": {"width": 8, "depth": 1, "heads": 2},
                },
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": copy.deepcopy(TOKENIZER["data"]),
        "trainer": {**QUIET, "max_steps": 2, "limit_val_batches": 0},
    }


def latent_settings(tokenizer: Path) -> dict[str, Any]:
    """A ContinuousMasked generator on the latents of a checkpoint."""
    return {
        "model": {
            "class_path": "discrete_lit.generators.ContinuousMasked",
            "init_args": {
                "tokenizer": {
                    "class_path": "discrete_lit.tokenizers.continuous_from_checkpoint",
                    "init_args": {"checkpoint": str(tokenizer)},
                },
                "image_size": 8,
                "num_classes": 2,
                "backbone": {
                    "class_path": "discrete_lit.backbones.MaskedAutoencoder",
                    "init_args": {"width": 8, "depth": 1, "heads": 2, "buffer": 2},
                },
                "head": {
                    "class_path": "discrete_lit.backbones.TokenDiffusionHead",
                    "init_args": {"width": 8, "depth": 1},
                },
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": copy.deepcopy(TOKENIZER["data"]),
        "trainer": {**QUIET, "max_steps": 1, "limit_val_batches": 0},
    }


def untrained(settings: dict[str, Any], file: Path) -> Path:
    """The checkpoint of a model that was not trained."""
    model = settings["model"]
    arguments = {name: value for name, value in model["init_args"].items() if name != "optimizer"}
    save(instantiate({"class_path": model["class_path"], "init_args": arguments}), file)
    return file


def untrained_fsq(file: Path) -> Path:
    """The checkpoint of an FSQ: 8x8 images to 4x4 ids in [0, 12)."""
    return untrained(TOKENIZER, file)


def untrained_klvae(file: Path, **settings: Any) -> Path:
    """The checkpoint of a KLVAE: 8x8 images to 4x4 latents of two channels."""
    arguments = {"network": TOKENIZER["model"]["init_args"]["network"], "latent_channels": 2, "kl_weight": 0.0}
    model = {"class_path": "discrete_lit.tokenizers.KLVAE", "init_args": {**arguments, **settings}}
    return untrained({"model": model}, file)


def write_settings(file: Path, settings: dict[str, Any]) -> Path:
    """Write a configuration file."""
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return file


def run(*arguments: Any) -> None:
    """`discrete-lit` in this process."""
    main([str(argument) for argument in arguments])


def refusal(capfd: pytest.CaptureFixture, *arguments: Any) -> str:
    """What `discrete-lit` says before it fails with the code of a user's mistake."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return said
