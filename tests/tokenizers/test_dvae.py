"""DALL-E's dVAE: its schedules, its loss, and the way back to images."""

from functools import partial
from math import cos, pi

import pytest
import torch

from discrete_lit.tokenizers import DVAE
from discrete_lit.tokenizers.losses.objective import logit_laplace_loss
from discrete_lit.tokenizers.networks import ConvAutoencoder


def make(**arguments):
    settings = {"channels": 4, "multipliers": (1, 2), "blocks": 1, "attention": False, "norm_groups": 2}
    network = partial(ConvAutoencoder, **settings, out_channels=6)
    return DVAE(network, codebook_size=12, code_dim=4, latent_dim=6, **arguments)


def images():
    return torch.rand(2, 3, 8, 8) * 2 - 1


def test_schedules_of_the_paper():
    module = make()
    expected = {
        0: (1.0, 0.0),
        2_500: (None, 6.6 / 192 / 2),
        5_000: (None, 6.6 / 192),
        75_000: ((1 + 1 / 16) / 2, 6.6 / 192),
        150_000: (1 / 16, 6.6 / 192),
        900_000: (1 / 16, 6.6 / 192),
    }
    for step, (temperature, weight) in expected.items():
        annealed = module.annealed(step)
        if temperature is not None:
            assert annealed["temperature"] == pytest.approx(temperature)
        assert annealed["kl_weight"] == pytest.approx(weight)
    assert module.annealed(30_000)["temperature"] == pytest.approx(1 / 16 + 15 / 16 * (1 + cos(pi / 5)) / 2)
    assert module.annealed(None) == module.annealed(900_000)


def test_a_training_step_is_annealed(monkeypatch):
    """The optimizer's step sets temperature and weight of the training loss; validation weighs fully."""
    module, batch, logged = make(kl_warmup_steps=4, temperature_steps=8).train(), images(), {}
    monkeypatch.setattr(DVAE, "global_step", 2)
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    with torch.no_grad():
        module.training_step({"image": batch}, 0)
        module.eval().validation_step({"image": batch}, 0)
    assert float(logged["train/kl_weight"]) == pytest.approx(6.6 / 192 / 2)
    assert float(logged["train/temperature"]) == pytest.approx(1 / 16 + 15 / 16 * (1 + cos(pi / 4)) / 2)
    assert float(logged["validation/kl"]) == pytest.approx(2 * float(logged["train/kl"]), rel=1e-4)


def test_loss_and_images():
    module = make().train()
    batch = images()
    loss, terms, made = module.loss(batch)
    assert made.outputs.shape == (2, 6, 8, 8) and set(terms) == {"reconstruction", "kl"}
    torch.testing.assert_close(terms["reconstruction"], logit_laplace_loss(made.outputs, batch))
    torch.testing.assert_close(loss, terms["reconstruction"] + terms["kl"])
    assert float(made.figures["temperature"]) == 1 / 16
    loss.backward()
    assert not [name for name, parameter in module.named_parameters() if parameter.grad is None]
    module.eval()
    with torch.no_grad():
        tokens = module.encode(batch)
        decoded = module.decode(tokens)
        _, _, made = module.loss(batch)
    assert torch.equal(tokens, made.tokens) and decoded.shape == batch.shape
    expected = ((made.outputs[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1) * 2 - 1
    torch.testing.assert_close(decoded, expected)
    del module.objective  # how outputs become images is no matter of the loss
    assert torch.equal(module.decode(tokens), decoded)


def test_it_learns():
    module = make(kl_weight=0.0, final_temperature=0.5, reconstruction_loss="logit_laplace").train()
    batch = torch.full((4, 3, 8, 8), -0.9)
    batch[0, :, :4], batch[1, :, 4:], batch[2, :, :, :4], batch[3, :, :, 4:] = 0.9, 0.9, 0.9, 0.9
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(60):
        loss = module.loss(batch)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        module.eval()
        assert float((module.decode(module.encode(batch)) - batch).square().mean()) < 0.1


def test_wrong_settings():
    with pytest.raises(ValueError, match="must be >= 0, got -1 and 5"):
        make(kl_warmup_steps=-1, temperature_steps=5)
    network = partial(ConvAutoencoder, channels=4, multipliers=(1, 2), blocks=1, attention=False, norm_groups=2)
    with pytest.raises(ValueError, match=r"twice the channels of the images \(out_channels\)"):
        DVAE(network, codebook_size=12, code_dim=4).loss(images())
