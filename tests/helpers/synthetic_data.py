"""Batches of images and tokens that follow from their index, for tests of the command line."""

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset


class IndexedImages(Dataset):
    def __init__(self, count: int, image_size: int, num_classes: int) -> None:
        self.count, self.image_size, self.num_classes = count, image_size, num_classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        random = torch.Generator().manual_seed(index)
        image = torch.rand(3, self.image_size, self.image_size, generator=random) * 2 - 1
        return {"image": image, "label": index % self.num_classes, "index": index}


class SyntheticImages(LightningDataModule):
    """Noise images with labels.

    Args:
        count: images in an epoch.
        batch_size: images in a batch.
        image_size: side in pixels.
        num_classes: labels lie in [0, num_classes).
    """

    def __init__(self, count: int = 8, batch_size: int = 4, image_size: int = 8, num_classes: int = 2) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.images = IndexedImages(count, image_size, num_classes)

    def loader(self) -> DataLoader:
        return DataLoader(self.images, batch_size=self.batch_size)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader
