"""A tiny tokenizer, generator and data set, a trainer that logs to TensorBoard, and a reader of what it wrote."""

from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch.utils.data import DataLoader

from discrete_lit.backbones import Transformer
from discrete_lit.generators import Autoregressive, Masked
from discrete_lit.tokenizers import VQVAE
from discrete_lit.tokenizers.networks import ConvAutoencoder

IMAGE_SIZE, CLASSES = 8, 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Lightning's advice on speed: more workers, a validation set.
    advice = "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(advice))


@pytest.fixture
def tokenizer() -> VQVAE:
    seed_everything(0, verbose=False)
    network = partial(ConvAutoencoder, channels=4, multipliers=(1, 2), blocks=1, attention=False, norm_groups=2)
    return VQVAE(network, codebook_size=16, code_dim=4, optimizer=partial(torch.optim.SGD, lr=0.1))


@pytest.fixture(params=[Masked, Autoregressive])
def generator(request: pytest.FixtureRequest, tokenizer: VQVAE) -> Any:
    return request.param(
        tokenizer,
        IMAGE_SIZE,
        num_classes=CLASSES,
        backbone=partial(Transformer, width=16, depth=2, heads=2),
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )


def _images(count: int) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=random) * 2 - 1
    return [{"image": image, "label": place % CLASSES, "index": place} for place, image in enumerate(images)]


@pytest.fixture
def make_loader() -> Callable[..., DataLoader]:
    """`make_loader(batches)`: that many batches of 6 fixed noise images with label and index."""
    return lambda batches: DataLoader(_images(6 * batches), batch_size=6)  # type: ignore[arg-type]


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer on the CPU with a TensorBoard log in `tmp_path`; arguments as for `Trainer`."""

    def build(**settings: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
            "logger": TensorBoardLogger(tmp_path, name="", version="log"),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }
        return Trainer(**(defaults | settings))

    return build


@pytest.fixture
def read_scalars(tmp_path: Path) -> Callable[[str], dict[int, float]]:
    """`read_scalars(tag)`: value by step."""
    return lambda tag: {event.step: event.value for event in _events(tmp_path).Scalars(tag)}


@pytest.fixture
def read_images(tmp_path: Path) -> Callable[[str], dict[int, torch.Tensor]]:
    """`read_images(tag)`: uint8 `(3, H, W)` by step."""

    def read(tag: str) -> dict[int, torch.Tensor]:
        events = _events(tmp_path)
        if tag not in events.Tags()["images"]:
            return {}
        encoded = {event.step: event.encoded_image_string for event in events.Images(tag)}
        pixels = {step: np.array(Image.open(BytesIO(data))) for step, data in encoded.items()}
        return {step: torch.from_numpy(values).permute(2, 0, 1) for step, values in pixels.items()}

    return read


def _events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "log"), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator
