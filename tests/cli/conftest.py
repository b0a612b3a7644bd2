"""Checkpoints of tiny, untrained models, as `discrete-lit fit` writes them."""

from pathlib import Path
from typing import Any

import pytest

NETWORK = {
    "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
    "init_args": {"channels": 4, "multipliers": [1, 1], "blocks": 1, "attention": False, "norm_groups": 2},
}


def save(module: Any, path: Path) -> Path:
    """Write a module's checkpoint without a fit."""
    from lightning import Trainer

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
    return path


@pytest.fixture(autouse=True)
def uncounted_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting the operations of a step is a quarter of a tiny run; tests/callbacks/test_throughput.py counts them."""
    from discrete_lit.callbacks import Throughput

    monkeypatch.setattr(Throughput, "_flops", lambda *_: 0)


@pytest.fixture(scope="session")
def tokenizer_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FSQ of 12 ids on 4x4 grids of 8x8 images."""
    from discrete_lit.checkpoints import instantiate

    config = {"class_path": "discrete_lit.tokenizers.FSQ", "init_args": {"levels": [4, 3], "network": NETWORK}}
    return save(instantiate(config), tmp_path_factory.mktemp("tokenizer") / "tokenizer.ckpt")


@pytest.fixture(scope="session")
def generator_checkpoints(tokenizer_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Masked and an Autoregressive of three classes on that tokenizer, with weights far from uniform."""
    import torch

    from discrete_lit.checkpoints import instantiate

    paths = {}
    for family in ("Masked", "Autoregressive"):
        config = {
            "class_path": f"discrete_lit.generators.{family}",
            "init_args": {
                "tokenizer": {
                    "class_path": "discrete_lit.tokenizers.from_checkpoint",
                    "init_args": {"checkpoint": str(tokenizer_checkpoint)},
                },
                "image_size": 8,
                "num_classes": 3,
                "backbone": {
                    "class_path": "discrete_lit.backbones.Transformer",
                    "init_args": {"width": 16, "depth": 2, "heads": 2},
                },
            },
        }
        generator = instantiate(config)
        for parameter in generator.backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        paths[family] = save(generator, tmp_path_factory.mktemp(family) / "generator.ckpt")
    return paths
