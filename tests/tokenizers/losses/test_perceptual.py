"""Perceptual losses: their formula, their gradients, and what they leave out of a checkpoint."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models, transforms
from torchvision.models.vgg import cfgs, make_layers

from discrete_lit.tokenizers.losses.perceptual import LPIPS, TimmFeatures, TorchvisionLogits, _unit


def images(count=2, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parity
def test_lpips_is_the_one_of_torchmetrics():
    from torchmetrics.functional.image.lpips import _LPIPS

    theirs = _LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    ours = LPIPS("random")
    slices = [theirs.net.slice1, theirs.net.slice2, theirs.net.slice3, theirs.net.slice4, theirs.net.slice5]
    trunk = {name: value for part in slices for name, value in part.state_dict().items()}
    ours.network.prepare()["trunk"].load_state_dict(trunk)
    expected = theirs(images(), images(seed=1)).mean()
    torch.testing.assert_close(ours(images(), images(seed=1)), expected, rtol=1e-5, atol=1e-7)
    assert float(expected) > 1e-3


def test_lpips_weights_come_from_a_file_in_torchvisions_layout(tmp_path):
    network = nn.ModuleDict({"features": make_layers(cfgs["D"]), "classifier": nn.Linear(2, 2)})
    torch.save(network.state_dict(), tmp_path / "vgg16.pth")
    loss = LPIPS(str(tmp_path / "vgg16.pth"))
    loss.prepare()
    hidden = (images() - loss.shift) / loss.scale
    with torch.no_grad():
        expected = network["features"][:4](hidden)
    torch.testing.assert_close(loss._features(images())[0], expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LPIPS("random"),
        lambda: TimmFeatures("resnet18", "random", layers=[1, 2], image_size=None),
        lambda: TimmFeatures("resnet18", "random", image_size=40),
        lambda: TimmFeatures("tf_efficientnet_lite0", layers=[1, 3], image_size=64),
        lambda: TorchvisionLogits("squeezenet1_1", "random", image_size=40),
    ],
)
def test_every_loss_is_zero_for_equal_images_and_has_a_finite_gradient(make):
    loss = make()
    outputs = images().requires_grad_()
    assert float(loss(outputs, outputs.detach()).detach()) == pytest.approx(0, abs=1e-10)
    value = loss(outputs, images(seed=1))
    (gradient,) = torch.autograd.grad(value, outputs)
    assert float(value.detach()) > 0 and gradient.isfinite().all() and gradient.abs().max() > 0
    # Black and constant: the features that vanish somewhere must not divide by zero.
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    assert torch.autograd.grad(loss(flat, images(1)), flat)[0].isfinite().all()


def test_zero_features_have_a_finite_gradient():
    """Of a length without a number under its root, the gradient at zero is not a number."""
    features = torch.zeros(1, 3, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(_unit(features).square().sum() + _unit(features).sum(), features)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    loss = LPIPS("random")
    with torch.no_grad():
        for parameter in loss.network.prepare()["trunk"].parameters():
            parameter.zero_()
    assert float(loss(images(), images(seed=1))) == 0


def test_logits_by_hand():
    loss = TimmFeatures("resnet18", "random", image_size=None)
    network = loss.network.prepare()
    mean, deviation = (torch.tensor(network.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        logits = [network(((batch + 1) / 2 - mean) / deviation) for batch in (images(), images(seed=1))]
    torch.testing.assert_close(loss(images(), images(seed=1)), (logits[0] - logits[1]).square().mean())


def test_logits_of_torchvision(tmp_path):
    """By its own weights and pixels; enlarged as TiTok does."""
    network = models.get_model("squeezenet1_1").eval()
    torch.save(network.state_dict(), tmp_path / "squeezenet.pth")
    loss = TorchvisionLogits("squeezenet1_1", str(tmp_path / "squeezenet.pth"), image_size=48)
    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    outputs = images().requires_grad_()
    logits = []
    for batch in (outputs, images(seed=1)):
        larger = F.interpolate((batch + 1) / 2, 48, mode="bilinear", align_corners=False, antialias=True)
        logits.append(network(normalise(larger)))
    expected = (logits[0] - logits[1]).square().mean()
    found = loss(outputs, images(seed=1))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, outputs)[0] for value in (found, expected)))


def test_the_frozen_network_is_no_part_of_the_module():
    module = nn.ModuleDict({"loss": LPIPS("/nowhere/vgg16.pth")})
    assert not module.state_dict() and not list(module.parameters())
    copied = deepcopy(module)
    with pytest.raises(ValueError, match=r"weights_path='/nowhere/vgg16.pth': there is no such file"):
        module["loss"].prepare()
    loss = LPIPS("random")
    loss.train()
    loss(images(), images(seed=1))
    network = loss.network.prepare()
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    assert deepcopy(loss).network.prepare() is network and copied["loss"].network is module["loss"].network


def test_wrong_settings(tmp_path):
    with pytest.raises(ValueError, match="weights_path is needed for model_name='resnet18'"):
        TimmFeatures("resnet18")
    with pytest.raises(ValueError, match="'resnet1' is not a network of timm"):
        TimmFeatures("resnet1", "random").prepare()
    with pytest.raises(ValueError, match="'raft_small' is not a classifier of torchvision"):
        TorchvisionLogits("raft_small", "random").prepare()
    with pytest.raises(ValueError, match="at least one"):
        TimmFeatures("resnet18", "random", layers=[])
    with pytest.raises(ValueError, match="must be >= 0"):
        LPIPS("random", weight=-1)
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="not a readable file of weights"):
        LPIPS(str(tmp_path / "broken.pth")).prepare()
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="weights of another network"):
        LPIPS(str(tmp_path / "other.pth")).prepare()
    with pytest.raises(ValueError, match="weights of another network"):
        TimmFeatures("resnet18", str(tmp_path / "other.pth")).prepare()


@pytest.mark.parametrize(
    "make", [lambda: LPIPS("random"), lambda: TimmFeatures("resnet18", "random", image_size=[32, 40])]
)
def test_grey_and_rgba_images_are_compared_in_colour(make):
    loss, first, second = make(), images(), images(seed=1)
    grey = loss(first[:, :1].expand(-1, 3, -1, -1), second[:, :1].expand(-1, 3, -1, -1))
    torch.testing.assert_close(loss(first[:, :1], second[:, :1]), grey)
    opaque = [torch.cat((colour, torch.ones_like(colour[:, :1])), dim=1) for colour in (first, second)]
    torch.testing.assert_close(loss(*opaque), loss(first, second))
    outputs = opaque[0].requires_grad_()
    (gradient,) = torch.autograd.grad(loss(outputs, opaque[1]), outputs)
    assert gradient.isfinite().all() and gradient[:, 3].abs().max() > 0
    with pytest.raises(ValueError, match=r"sees colour images.*got 2"):
        loss(first[:, :2], second[:, :2])


def test_images_too_small_for_lpips():
    loss, small = LPIPS("random"), torch.rand(1, 3, 15, 40)
    with pytest.raises(ValueError, match="at least 16x16 pixels, got 15x40: leave perceptual_loss"):
        loss(small, small)
    least = torch.rand(1, 3, 16, 24)
    assert float(loss(least, torch.rand(1, 3, 16, 24))) > 0
