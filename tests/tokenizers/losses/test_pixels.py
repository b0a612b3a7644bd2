"""Losses between pixels."""

import pytest
import torch

from discrete_lit.tokenizers.autoencoder import logit_laplace_images
from discrete_lit.tokenizers.losses.objective import Objective, logit_laplace_loss


def test_logit_laplace_is_a_density_of_the_pixel():
    """exp(-loss) integrates over the mapped pixel, in (0, 1), to one, and is what the formula says."""
    mean, log_scale = 0.7, -0.4
    mapped = torch.linspace(0, 1, 200_003, dtype=torch.float64)[1:-1]
    scale = torch.tensor(log_scale, dtype=torch.float64).exp()
    density = torch.exp(-(torch.logit(mapped) - mean).abs() / scale) / (2 * scale * mapped * (1 - mapped))
    assert float(torch.trapezoid(density, mapped)) == pytest.approx(1, abs=1e-3)
    for place in (30_000, 150_000):
        image = ((mapped[place] - 0.1) / 0.8 * 2 - 1).float().expand(1, 1, 1, 1)
        outputs = torch.tensor([mean, log_scale]).reshape(1, 2, 1, 1)
        assert float(logit_laplace_loss(outputs, image)) == pytest.approx(-float(density[place].log()), rel=1e-4)


def test_logit_laplace_images_undo_the_map():
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    mean = torch.logit(0.8 * (images + 1) / 2 + 0.1)
    outputs = torch.cat((mean, torch.zeros_like(mean)), dim=1)
    torch.testing.assert_close(logit_laplace_images(outputs), images)
    assert float(logit_laplace_images(outputs + 100).max()) == 1
    # The best mean for an image is its own.
    other = Objective("logit_laplace")(outputs + 0.1, images).loss
    assert Objective("logit_laplace")(outputs, images).loss < other


def test_several_losses_have_weights():
    outputs, images = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    compared = Objective({"l1": 0.2, "l2": 1.5})(outputs, images)
    expected = {
        "reconstruction_l1": 0.2 * (outputs - images).abs().mean(),
        "reconstruction_l2": 1.5 * (outputs - images).square().mean(),
    }
    torch.testing.assert_close(compared.terms, expected)
    torch.testing.assert_close(compared.loss, sum(expected.values()))


def test_wrong_settings():
    with pytest.raises(ValueError, match="one of l1, l2, logit_laplace, got 'l3'"):
        Objective("l3")
    with pytest.raises(ValueError, match="weights >= 0"):
        Objective({"l1": -1.0})
    with pytest.raises(ValueError, match="give it alone"):
        Objective({"logit_laplace": 1.0, "l2": 1.0})
    with pytest.raises(ValueError, match=r"twice the channels of the images \(out_channels\), and its outputs have 3"):
        Objective("logit_laplace")(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))
