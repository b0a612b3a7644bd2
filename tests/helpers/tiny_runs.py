"""Settings of runs that take a second, for tests of the command line."""

import copy
from pathlib import Path
from typing import Any

import lightning  # noqa: F401 (its log handler must not hold the captured stream of the first test)
import yaml

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


def write_settings(file: Path, settings: dict[str, Any]) -> Path:
    """Write a configuration file."""
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return file


def run(*arguments: Any) -> None:
    """`discrete-lit` in this process."""
    main([str(argument) for argument in arguments])
