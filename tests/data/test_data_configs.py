"""Every file of lightning_configs/data builds its DataModule, and says nothing that is not read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning import LightningDataModule

from discrete_lit.data import ImageFolder, ImageShards, LatentArrays, TokenArrays
from discrete_lit.data.data_module import ResumableDataModule

FOLDER = Path(__file__).parents[2] / "lightning_configs" / "data"
FILES = sorted(FOLDER.glob("*.yaml"))


def build(content: dict) -> ResumableDataModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser.instantiate(parser.parse_object(content)).data


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_builds_a_data_module_that_reads(
    path: Path,
    tmp_path: Path,
    make_shards: Callable[..., Path],
    make_class_folder: Callable[..., Path],
    make_token_folder: Callable[..., Path],
    make_latent_folder: Callable[..., Path],
) -> None:
    content = yaml.safe_load(path.read_text())
    arguments = content["data"]["init_args"]
    make = {
        "ImageShards": lambda folder: make_shards(folder, [9]),
        "ImageFolder": lambda folder: make_class_folder(folder, {"ant": 4, "bee": 5}),
        "TokenArrays": lambda folder: make_token_folder(folder, count=9),
        "LatentArrays": lambda folder: make_latent_folder(folder, count=9),
    }[content["data"]["class_path"]]
    tiny = {"batch_size": 4, "num_workers": 0}
    tiny |= {split: str(make(tmp_path / split)) for split in ("train", "validation")}
    data = build({"data": content["data"] | {"init_args": arguments | tiny}})
    assert isinstance(data, ImageFolder | ImageShards | LatentArrays | TokenArrays)
    assert len(list(data.train_dataloader())) == 2
    assert sum(len(batch["index"]) for batch in data.evaluation_loader("validation")) == 9
    assert len(path.read_text().splitlines()) <= 40 and path.read_text().startswith("# discrete-lit fit")


def test_there_is_a_file_for_each_data_module_and_a_wrong_key_is_refused() -> None:
    assert len(FILES) == 4
    content = yaml.safe_load(FILES[0].read_text())
    content["data"]["init_args"] |= {"batch_size": 4, "batchsize": 4}
    with pytest.raises(Exception, match="batchsize"):
        build(content)
