"""Tiny labelled sets of images on disk."""

import numpy as np
import pytest
from helpers.stored_images import pixels, save_folder

from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources.class_folders import ClassFolders


@pytest.fixture
def folder(tmp_path) -> str:
    """24 images of 3 classes in one subfolder per class."""
    return save_folder(tmp_path / "folder", pixels(24, 0), np.arange(24) % 3)


@pytest.fixture
def shards(tmp_path, folder) -> str:
    """The images of `folder` in shards of 5, shuffled."""
    write_shards(ClassFolders(folder), tmp_path / "shards", split="test", samples_per_shard=5)
    return str(tmp_path / "shards")
