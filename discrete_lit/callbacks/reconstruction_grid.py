"""What an autoencoder makes of the same images as it trains."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from discrete_lit.callbacks.image_grid import ImageGrid
from discrete_lit.tokenizers import KLVAE, Tokenizer


class ReconstructionGrid(ImageGrid):
    """Rows of original images, each above the row of its reconstructions; nothing for other modules.

    The images are the first ones of the first validation batch. Written as in `ImageGrid`, tag
    `images/reconstructions`.

    Args:
        count: originals at most.
        columns: images in a row.
        save_png: also write a PNG into the run's folder.
    """

    name = "reconstructions"

    def __init__(self, count: int = 16, columns: int = 8, save_png: bool = False) -> None:
        super().__init__(count, columns, save_png)

    def applies_to(self, module: LightningModule) -> bool:
        return isinstance(module, Tokenizer | KLVAE)

    def make_images(self, module: LightningModule, batch: dict[str, Any]) -> Tensor:
        assert isinstance(module, Tokenizer | KLVAE)
        originals = batch["image"][: self.count]
        reconstructions = module.decode(module.encode(originals))
        rows = zip(originals.split(self.columns), reconstructions.split(self.columns), strict=True)
        # A short row is filled up, or its reconstructions would move beside it.
        return torch.cat([self._fill(part) for row in rows for part in row])

    def _fill(self, images: Tensor) -> Tensor:
        missing = self.columns - len(images)
        return torch.cat((images.float(), images.new_ones((missing, *images.shape[1:]), dtype=torch.float32)))
