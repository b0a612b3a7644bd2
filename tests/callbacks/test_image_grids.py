import numpy as np
import pytest
import torch
from lightning import Callback
from PIL import Image
from torch import nn
from torchvision.utils import make_grid

from discrete_lit.callbacks import ReconstructionGrid, SampleGrid
from discrete_lit.core.images import to_uint8
from discrete_lit.samplers import MaskGITSampler, RasterSampler


def expected_grid(images, columns):
    return make_grid(to_uint8(images), nrow=columns, padding=1, pad_value=255)


class Record(Callback):
    """Modes and random state around the first validation batch, seen before and after the grid."""

    def __init__(self):
        self.seen = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            modes = [module.training for module in pl_module.modules()]
            self.seen.append((modes, torch.get_rng_state()))


class DrawingDropout(nn.Dropout):
    """Takes numbers from the global generator in every mode."""

    def forward(self, input):
        torch.rand(3)
        return super().forward(input)


def test_originals_above_reconstructions(tokenizer, make_loader, make_trainer, read_images, tmp_path):
    grid = ReconstructionGrid(count=5, columns=3, save_png=True)
    trainer = make_trainer(max_steps=4, val_check_interval=2, callbacks=[grid])
    trainer.fit(tokenizer, make_loader(4), make_loader(2))
    logged = read_images("images/reconstructions")
    assert list(logged) == [2, 4]
    originals = next(iter(make_loader(1)))["image"][:5]
    with torch.no_grad():
        decoded = tokenizer.eval().decode(tokenizer.encode(originals))
    white = torch.ones_like(originals[:1])
    rows = (originals[:3], decoded[:3], originals[3:], white, decoded[3:], white)
    assert torch.equal(logged[4], expected_grid(torch.cat(rows), 3))
    assert not torch.equal(logged[2], logged[4])
    written = tmp_path / "images" / "reconstructions-00000004.png"
    assert np.array_equal(np.array(Image.open(written)), logged[4].permute(1, 2, 0))


def test_fixed_samples(generator, make_loader, make_trainer, read_images, tmp_path):
    sampler = (
        RasterSampler(temperature=0.5) if generator.backbone.layout.attention == "causal" else MaskGITSampler(steps=3)
    )
    grid = SampleGrid(count=6, columns=2, seed=5, sampler=sampler)
    trainer = make_trainer(max_steps=2, val_check_interval=1, callbacks=[grid])
    trainer.fit(generator, make_loader(2), make_loader(1))
    logged = read_images("images/samples")
    assert list(logged) == [1, 2]
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    images = generator.tokenizer.decode(generator.eval().sample(labels, sampler, seed=5))
    assert torch.equal(logged[2], expected_grid(images, 2))
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("count", "classes", "expected"),
    [(5, 1000, [0, 200, 400, 600, 800]), (4, 4, [0, 1, 2, 3]), (7, 3, [0, 1, 2, 0, 1, 2, 0]), (3, 1, [0, 0, 0])],
)
def test_labels_are_spread_over_the_classes(count, classes, expected):
    assert SampleGrid(count=count).labels(classes).tolist() == expected


def test_the_other_kind_of_module_is_left_alone(tokenizer, make_loader, make_trainer, read_images):
    trainer = make_trainer(max_steps=1, callbacks=[SampleGrid()])
    trainer.fit(tokenizer, make_loader(1), make_loader(1))
    assert read_images("images/samples") == {}


def test_reconstructions_are_not_for_generators(generator, make_loader, make_trainer, read_images):
    trainer = make_trainer(max_steps=1, callbacks=[ReconstructionGrid()])
    trainer.fit(generator, make_loader(1), make_loader(1))
    assert read_images("images/reconstructions") == {}


def test_the_sanity_check_makes_no_grid(tokenizer, make_loader, make_trainer, read_images):
    trainer = make_trainer(max_steps=1, val_check_interval=1, num_sanity_val_steps=1, callbacks=[ReconstructionGrid()])
    trainer.fit(tokenizer, make_loader(1), make_loader(1))
    assert list(read_images("images/reconstructions")) == [1]


def test_modes_and_random_state_stay(generator, make_loader, make_trainer):
    generator.backbone.dropout = DrawingDropout(0.5)
    before, after = Record(), Record()
    trainer = make_trainer(max_steps=1, callbacks=[before, SampleGrid(count=2), after])
    # A part that someone keeps in training mode during validation.
    generator.on_validation_epoch_start = generator.backbone.dropout.train
    trainer.fit(generator, make_loader(1), make_loader(1))
    (modes_before, state_before), (modes_after, state_after) = before.seen[0], after.seen[0]
    assert modes_before == modes_after and any(modes_before)
    assert torch.equal(state_before, state_after)
    assert generator.backbone.training and not generator.tokenizer.training


def test_precision_of_the_trainer(generator, make_loader, make_trainer):
    seen = set()
    generator.backbone.blocks[0].mlp.register_forward_hook(
        lambda module, inputs, output: seen.add((module.training, output.dtype))
    )
    trainer = make_trainer(max_steps=1, precision="bf16-mixed", callbacks=[SampleGrid(count=2)])
    trainer.fit(generator, make_loader(1), make_loader(1))
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}


@pytest.mark.parametrize("sizes", [{"count": 0}, {"columns": 0}])
@pytest.mark.parametrize("grid", [SampleGrid, ReconstructionGrid])
def test_sizes_are_checked(grid, sizes):
    with pytest.raises(ValueError, match="at least 1"):
        grid(**sizes)


class OfChannels(ReconstructionGrid):
    """Three fixed pictures of 6 x 10 pixels, with any number of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(columns=3, save_png=True)
        self.images = torch.rand(3, channels, 6, 10) * 2 - 1

    def make_images(self, module, batch):
        return self.images


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (4, 4), (5, 1)])
def test_pictures_of_other_channels_are_shown(
    channels, shown, tokenizer, make_loader, make_trainer, read_images, tmp_path
):
    grid = OfChannels(channels)
    make_trainer(callbacks=[grid]).validate(tokenizer, make_loader(1), verbose=False)
    expected = expected_grid(grid.images[:, :shown], 3)
    assert expected.shape[1:] == (8, 34)
    assert torch.equal(read_images("images/reconstructions")[0], expected)
    pixels = np.array(Image.open(tmp_path / "images" / "reconstructions-00000000.png"))
    assert np.array_equal(pixels, expected.permute(1, 2, 0))
