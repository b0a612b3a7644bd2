"""Means of likelihoods over held-out images."""

from math import log

import numpy as np
import pytest
import torch
from helpers.stored_images import pixels, save_folder, save_npz

from discrete_lit.core.images import from_uint8
from discrete_lit.evaluation.compared_images import Selection
from discrete_lit.evaluation.held_out_likelihood import measure_likelihood
from discrete_lit.evaluation.image_sets import open_image_set
from discrete_lit.tokenizers import PixelLevels


@pytest.fixture
def generator(make_generator, make_grid_tokenizer):
    def make(family: str):
        return make_generator(family, 4, (8, 8), 3, spread=0.5, tokenizer=make_grid_tokenizer(4, (8, 8)), image_size=8)

    return make


def figures(generator, path, batch_size: int = 5):
    images = open_image_set(path, 8)
    return measure_likelihood(
        generator,
        Selection(images, None, num_classes=images.num_classes),
        checkpoint="g.ckpt",
        batch_size=batch_size,
        device="cpu",
    )


@pytest.mark.parametrize(("family", "kind"), [("autoregressive", "exact"), ("masked", "bound")])
def test_mean_and_error_over_images(generator, family, kind, tmp_path) -> None:
    model = generator(family)
    images, labels = pixels(12, 1), np.sort(np.arange(12) % 3)
    path = save_folder(tmp_path / "real", images, labels)
    found = figures(model, path)
    tokens = model.tokenizer.encode(from_uint8(torch.from_numpy(images).movedim(-1, 1)))
    nats = -model.log_likelihood(tokens, torch.from_numpy(labels)).nats
    assert found.nats == pytest.approx(float(nats.mean()), rel=1e-5)
    assert found.standard_error == pytest.approx(float(nats.std()) / 12**0.5, rel=1e-4)
    assert (found.kind, found.count, found.tokens, found.checkpoint) == (kind, 12, 64, "g.ckpt")
    assert found.bits_per_token == pytest.approx(found.nats / log(2) / 64)
    assert found.to_dict()["bits_per_token"] == found.bits_per_token
    assert found.tokenizer_fingerprint == model.tokenizer.fingerprint()
    # The masks of a bound belong to the image, not to the batch.
    assert figures(model, path, batch_size=12).nats == pytest.approx(found.nats, rel=1e-5)


def test_images_without_labels_have_the_null_label(generator, tmp_path) -> None:
    model = generator("autoregressive")
    images = pixels(6, 2)
    found = figures(model, save_npz(tmp_path / "plain.npz", images))
    tokens = model.tokenizer.encode(from_uint8(torch.from_numpy(images).movedim(-1, 1)))
    nats = -model.log_likelihood(tokens, torch.full((6,), 3)).nats
    assert found.nats == pytest.approx(float(nats.mean()), rel=1e-5)


def test_a_label_without_a_class_is_refused(generator, tmp_path) -> None:
    path = save_npz(tmp_path / "labels.npz", pixels(6, 2), np.arange(6) % 4)
    with pytest.raises(ValueError, match=r"labels\.npz' has label 3, 'g\.ckpt' has 3 classes"):
        figures(generator("autoregressive"), path)


def test_bits_per_dimension_where_ids_are_pixels_alone(generator, make_generator, tmp_path) -> None:
    path = save_npz(tmp_path / "plain.npz", pixels(4, 2))
    coded = figures(generator("autoregressive"), path)
    assert coded.dimensions is None and coded.bits_per_dimension is None
    assert coded.to_dict()["bits_per_dimension"] is None
    model = make_generator("masked", 4, (8, 8, 3), 3, spread=0.5, tokenizer=PixelLevels(4), image_size=8)
    found = figures(model, path)
    assert found.dimensions == 192
    assert found.bits_per_dimension == pytest.approx(found.nats / log(2) / 192)
    assert found.to_dict()["bits_per_dimension"] == found.bits_per_dimension
