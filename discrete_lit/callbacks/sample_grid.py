"""What a generator draws from the same seed as it trains."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from discrete_lit.callbacks.image_grid import ImageGrid
from discrete_lit.generators import Generator
from discrete_lit.samplers import Sampler


class SampleGrid(ImageGrid):
    """Samples of a fixed seed, decoded by the generator's tokenizer; nothing for other modules, nor for text.

    The labels are spread evenly over the classes and repeat in the same order, so that with as many columns as classes
    each column is a class. Written as in `ImageGrid`, tag `images/samples`.

    Args:
        count: samples.
        columns: images in a row.
        seed: of the draw.
        sampler: the generator's own by default.
        save_png: also write a PNG into the run's folder.
    """

    name = "samples"

    def __init__(
        self,
        count: int = 40,
        columns: int = 10,
        seed: int = 0,
        sampler: Sampler | None = None,
        save_png: bool = False,
    ) -> None:
        super().__init__(count, columns, save_png)
        self.seed = seed
        self.sampler = sampler

    def applies_to(self, module: LightningModule) -> bool:
        return isinstance(module, Generator) and module.tokenizer.makes_images

    def make_images(self, module: LightningModule, batch: dict[str, Any]) -> Tensor:
        assert isinstance(module, Generator)
        labels = self.labels(module.num_classes).to(module.device)
        return module.tokenizer.decode(module.sample(labels, self.sampler, self.seed))

    def labels(self, num_classes: int) -> Tensor:
        """`(count,)` int64: as many classes as there are images for, evenly spaced, over and over."""
        shown = min(self.count, num_classes)
        classes = torch.arange(shown) * num_classes // shown
        return classes[torch.arange(self.count) % shown]
