"""The alignment loss of VA-VAE: its terms in closed form, its adaptive weight, and a KLVAE that it trains."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from discrete_lit.checkpoints import instantiate
from discrete_lit.tokenizers.losses import AlignmentLoss
from discrete_lit.tokenizers.losses.alignment import gradient_ratio

TINY = {"model_name": "test_vit.r160_in1k", "weights_path": "random", "image_size": 32}


def make(**settings: Any) -> AlignmentLoss:
    torch.manual_seed(0)
    return AlignmentLoss(3, **{**TINY, **settings})


def autoencoder(**settings: Any) -> Any:
    torch.manual_seed(0)
    network = {
        "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
        "init_args": {"channels": 8, "multipliers": [1, 1, 2], "blocks": 1, "attention": False, "norm_groups": 4},
    }
    alignment = {"class_path": "discrete_lit.tokenizers.losses.AlignmentLoss", "init_args": {**TINY, **settings}}
    arguments = {"network": network, "latent_channels": 3, "kl_weight": 1e-8, "alignment_loss": alignment}
    return instantiate({"class_path": "discrete_lit.tokenizers.KLVAE", "init_args": arguments}).train()


def test_terms_of_vectors_at_known_angles() -> None:
    """Two places with latents at 90 degrees and features at 60, each latent at an angle from its feature."""
    loss = make(cosine_margin=0.1, distance_margin=0.2)
    z = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 5.0, 0.0]]])
    features = torch.tensor([[[1.0, 0.0, 1.0], [3.0, 3.0, 0.0]]])  # cosines 1/sqrt(2) with z, 1/2 between them
    half = 0.5**0.5
    assert float(loss.cosine_term(z, features)) == pytest.approx(1 - 0.1 - half)
    # Two pairs differ by 1/2, the two on the diagonal by nothing.
    assert float(loss.distance_term(z, features)) == pytest.approx(2 * (0.5 - 0.2) / 4)
    assert float(make(cosine_margin=0.3, distance_margin=0.5).cosine_term(z, features)) == 0
    assert float(make(distance_margin=0.5).distance_term(z, features)) == 0


def test_terms_ignore_lengths_and_reach_zero_at_the_features() -> None:
    loss, features = make(cosine_margin=0.0, distance_margin=0.0), torch.randn(2, 4, 4, 6)
    scaled = features * torch.rand(2, 4, 4, 1).add(0.1)
    assert float(loss.cosine_term(scaled, features)) < 1e-6 and float(loss.distance_term(scaled, features)) < 1e-6
    # A rotation of all latents changes the first term alone.
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert float(loss.cosine_term(features @ rotation, features)) > 0.1
    assert float(loss.distance_term(features @ rotation, features)) < 1e-5


@pytest.mark.parametrize("project", ["latents", "features"])
def test_either_side_is_projected(project: str) -> None:
    loss = make(project=project)
    latents, images = torch.randn(2, 2, 2, 3, requires_grad=True), torch.rand(2, 3, 8, 8) * 2 - 1
    z, features = loss.compared(latents, loss.features(images))
    width = 3 if project == "features" else loss.feature_dim
    assert z.shape == features.shape == (2, 2, 2, width)
    assert (loss.projection.bias is None) == (project == "latents")
    loss(latents, images).backward()
    assert latents.grad is not None and loss.projection.weight.grad is not None
    assert not any(name.startswith("network") for name in loss.state_dict())
    assert not any(parameter.requires_grad for parameter in loss.network.prepare().parameters())


def test_features_are_those_of_timm() -> None:
    import timm

    loss = make(image_size=160)
    images = torch.rand(1, 3, 160, 160) * 2 - 1
    network = loss.network.prepare()
    reference = timm.create_model("test_vit.r160_in1k", num_classes=0).eval()
    reference.load_state_dict({name: network.state_dict()[name] for name in reference.state_dict()})
    mean, std = (torch.tensor(reference.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        tokens = reference.forward_features(((images + 1) / 2 - mean) / std)[:, reference.num_prefix_tokens :]
    torch.testing.assert_close(loss.features(images).flatten(1, 2), tokens)


def test_at_the_encoders_last_layer_both_gradients_are_as_long() -> None:
    module, images = autoencoder(weight=1.0), torch.rand(2, 3, 8, 8) * 2 - 1
    made = module.reconstruct(images)
    reconstruction = F.mse_loss(made.outputs, images)
    alignment = module.alignment(made.latents, images)
    (gradient,) = torch.autograd.grad(reconstruction, made.outputs, retain_graph=True)
    layer = module.network.last_encoder_layer
    ratio = gradient_ratio(alignment, made.latents, outputs=made.outputs, reconstruction_gradient=gradient, layer=layer)
    first, second = (
        torch.autograd.grad(term, layer, retain_graph=True)[0].norm() for term in (reconstruction, alignment)
    )
    assert not ratio.requires_grad
    torch.testing.assert_close(ratio, first / (second + 1e-4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_loss_of_a_step(adaptive: bool) -> None:
    module, images = autoencoder(weight=0.5, adaptive=adaptive), torch.rand(2, 3, 8, 8) * 2 - 1
    index = torch.arange(2)
    loss, terms, made = module.loss(images, step=0, index=index)
    torch.testing.assert_close(loss, torch.stack(list(terms.values())).sum())
    weight = made.figures["alignment_weight"]
    torch.testing.assert_close(terms["alignment"], weight * module.alignment(made.latents, images))
    assert adaptive == (float(weight) != 0.5)
    # Nothing is aligned in validation.
    assert set(module.eval().loss(images)[1]) == {"reconstruction", "kl"}
    # The projection is trained; what codes does not depend on it.
    (gradient,) = torch.autograd.grad(loss, module.alignment.projection.weight)
    assert bool(gradient.any())
    before = module.fingerprint()
    with torch.no_grad():
        module.alignment.projection.weight.zero_()
    assert module.fingerprint() == before


def test_training_aligns_the_latents() -> None:
    module = autoencoder(weight=1.0, cosine_margin=0.0, distance_margin=0.0)
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)

    def cosine() -> float:
        made = module.reconstruct(images, index=torch.arange(4))
        return float(module.alignment(made.latents, images).detach())

    before = cosine()  # 1.4; 0.7 after the steps
    for step in range(100):
        loss, _, _ = module.loss(images, step=step, index=torch.arange(4) + 4 * step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert cosine() < 0.6 * before


def test_features_on_another_grid_are_refused() -> None:
    module = autoencoder(image_size=48)
    with pytest.raises(ValueError, match=r"latents have the grid \(2, 2\) and features .* \(3, 3\): set .*image_size"):
        module.loss(torch.zeros(1, 3, 8, 8), step=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight of the alignment loss must be >= 0"),
        ({"cosine_margin": 2.0}, r"cosine_margin of the alignment loss must lie in \[0, 2\)"),
        ({"distance_margin": -0.1}, r"distance_margin of the alignment loss must lie in \[0, 2\)"),
        ({"project": "both"}, "project of the alignment loss must be"),
        ({"model_name": "no_such_network"}, "is not a network of timm"),
        ({"feature_dim": 0}, "feature_dim of the alignment loss must be at least 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_what_is_known_before_training() -> None:
    with pytest.raises(ValueError, match="has features of width 64, and feature_dim is 12"):
        make(feature_dim=12).prepare()
    with pytest.raises(ValueError, match="there is no such file"):
        make(weights_path="none.safetensors").prepare()


def test_a_network_without_a_last_layer_needs_a_fixed_weight() -> None:
    network = {
        "class_path": "discrete_lit.tokenizers.networks.ViTAutoencoder",
        "init_args": {
            "patch_size": 4,
            "encoder": {"width": 16, "depth": 1, "heads": 2},
            "decoder": {"width": 16, "depth": 1, "heads": 2},
        },
    }
    alignment = {"class_path": "discrete_lit.tokenizers.losses.AlignmentLoss", "init_args": TINY}
    arguments = {"network": network, "latent_channels": 3, "kl_weight": 1e-8, "alignment_loss": alignment}
    with pytest.raises(ValueError, match="needs adaptive: false"):
        instantiate({"class_path": "discrete_lit.tokenizers.KLVAE", "init_args": arguments})
