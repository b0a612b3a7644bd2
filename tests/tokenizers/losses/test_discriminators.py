"""Discriminators: their shapes, layouts, norms, and that each can learn."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from discrete_lit.tokenizers.losses.adversarial import discriminator_loss, gradient_penalty, twice_differentiable
from discrete_lit.tokenizers.losses.discriminators import (
    BlurPoolDiscriminator,
    DINODiscriminator,
    PatchGAN,
    StyleGANDiscriminator,
    _BlurPool,
    _group_deviation,
    _norm,
)


def dino(**arguments):
    settings = {"layers": [0, 3], "image_size": 32, "kernel_size": 3, **arguments}
    return DINODiscriminator("vit_tiny_patch16_224", "random", **settings)


EACH = {
    "patch, group": lambda: PatchGAN(width=8, layers=2),
    "patch, batch": lambda: PatchGAN(width=8, layers=2, norm="batch"),
    "patch, sync": lambda: PatchGAN(width=8, layers=2, norm="sync"),
    "blur pool": lambda: BlurPoolDiscriminator(width=8, stages=2),
    "stylegan": lambda: StyleGANDiscriminator(16, width=8, max_width=16),
    "dino": dino,
    "dino, vaex": lambda: dino(norm="batch", class_token=True, embedding=True),
}
TOGETHER = ("dino, vaex",)
"""Whose norms would hide what tells a batch of images from one of reconstructions."""
each = pytest.mark.parametrize("kind", EACH)


@each
def test_it_learns_to_tell_smooth_from_noisy(kind):
    discriminator = EACH[kind]().train()
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=3e-3, betas=(0.5, 0.9))
    for _ in range(30):
        real = F.interpolate(torch.rand(4, 3, 2, 2) * 2 - 1, size=(16, 16), mode="bilinear")
        fake = torch.rand(4, 3, 16, 16) * 2 - 1
        logits = (
            discriminator(torch.cat((real, fake))).chunk(2) if kind in TOGETHER else map(discriminator, (real, fake))
        )
        loss = discriminator_loss("hinge", *logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


@each
def test_it_can_be_differentiated_twice(kind):
    discriminator = EACH[kind]().train()
    images = (torch.rand(4, 3, 16, 16) * 2 - 1).requires_grad_()
    with twice_differentiable():
        logits = discriminator(images)
    gradient_penalty(logits, images).backward()
    found = [parameter.grad for parameter in discriminator.parameters() if parameter.grad is not None]
    assert any(gradient.abs().max() > 0 for gradient in found) and all(grad.isfinite().all() for grad in found)


def test_patches_are_those_of_the_paper():
    discriminator = PatchGAN(width=4)
    assert discriminator(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = discriminator.main[0](images)  # without norms, which see the whole image
    for layer in discriminator.main[1:]:
        logits = logits if isinstance(layer, nn.GroupNorm) else layer(logits)
    (gradient,) = torch.autograd.grad(logits[0, 0, 7, 7], images)
    rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_the_synchronised_norm_has_tamings_names():
    names = {name for name in PatchGAN(width=8, norm="sync").state_dict() if name.startswith("main.3")}
    assert names == {f"main.3.{name}" for name in nn.BatchNorm2d(2).state_dict()}
    assert {"main.0.bias", "main.2.weight", "main.11.bias"} <= set(PatchGAN(norm="sync").state_dict())


@pytest.mark.parametrize("norm", ["batch", "sync"])
def test_batch_norms_are_those_of_torch(norm):
    """Of images and of sequences, in training and behind it."""
    for shape in ((5, 6, 3, 4), (5, 6, 7)):
        ours, theirs = _norm(norm, 6), nn.BatchNorm1d(6) if len(shape) == 3 else nn.BatchNorm2d(6)
        values = torch.randn(shape) * 3 + 1
        torch.testing.assert_close(ours(values), theirs(values))
        torch.testing.assert_close(ours.eval()(values), theirs.eval()(values))
        assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_the_blur_pool_discriminator_is_that_of_titok():
    """Its size, the size of its logits, the filter, and what it sees of pixels."""
    discriminator = BlurPoolDiscriminator()
    sizes = [(3, 128, 5), (128, 128, 3), (128, 256, 3), (256, 512, 3), (512, 512, 1), (512, 1, 5)]
    norms = 2 * (128 + 256 + 512)
    expected = norms + sum(enter * leave * side**2 + leave for enter, leave, side in sizes)
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == expected == 1_909_889
    assert discriminator(torch.zeros(1, 3, 128, 160)).shape == (1, 1, 16, 16)
    impulse = torch.zeros(1, 2, 8, 7)
    impulse[0, 1, 3, 3] = 64.0
    found = _BlurPool()(impulse)
    assert found.shape == (1, 2, 4, 4) and not found[0, 0].any()
    # Row i is made of rows 2i - 1 to 2i + 2, weighted 1, 3, 3, 1.
    weights = torch.zeros(4)
    weights[1], weights[2] = 3.0, 1.0
    torch.testing.assert_close(found[0, 1], torch.outer(weights, weights))
    first = discriminator.block_in[0]
    seen = []
    first.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    discriminator(torch.full((1, 3, 16, 16), -1.0))
    discriminator(torch.full((1, 3, 16, 16), 1.0))
    assert [float(pixels.unique()) for pixels in seen] == [0.0, 1.0]


def test_minibatch_deviation():
    hidden = torch.randn(6, 5, 2, 2)
    found = _group_deviation(hidden, 3)
    for start in (0, 3):
        group = hidden[start : start + 3]
        expected = ((group - group.mean(dim=0)) ** 2).mean(dim=0).sqrt().mean()
        torch.testing.assert_close(found[start : start + 3], expected.expand(3, 1, 2, 2), rtol=1e-5, atol=1e-6)
    # Of a batch that the group does not divide, the largest group that does.
    torch.testing.assert_close(_group_deviation(hidden, 4), found)


def test_dino_sees_through_frozen_weights_that_are_not_saved():
    discriminator = dino()
    assert not [name for name in discriminator.state_dict() if not name.startswith("heads.")]
    features = discriminator.features(torch.zeros(2, 3, 16, 16))
    assert [tuple(layer.shape) for layer in features] == [(2, 192, 4)] * 2
    assert discriminator(torch.zeros(2, 3, 16, 16)).shape == (2, 2, 4)
    # Building one asks for no weights.
    missing = DINODiscriminator("vit_tiny_patch16_224", "/nowhere/dino.safetensors")
    with pytest.raises(ValueError, match=r"weights_path='/nowhere/dino.safetensors': there is no such file"):
        missing.prepare()


def test_dino_reads_what_vaex_reads():
    """The tokens before the first block and behind the named ones, each with the class token added."""
    discriminator = dino(class_token=True, embedding=True)
    network = discriminator.frozen.prepare()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    hidden = ((images + 1) / 2 - network.pixel_mean) / network.pixel_std
    hidden = network.patch_embed(hidden)
    hidden = torch.cat((network.cls_token.expand(2, -1, -1), hidden), dim=1) + network.pos_embed
    expected = [hidden]
    for number, block in enumerate(network.blocks[:4]):
        hidden = block(hidden)
        expected += [hidden] if number in (0, 3) else []
    found = discriminator.features(images)
    assert len(found) == len(discriminator.heads) == 3 and discriminator(images).shape == (2, 3, 4)
    for tokens, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(tokens.mT, wanted[:, 1:] + wanted[:, :1])
    plain = dino(embedding=True)
    plain.frozen = discriminator.frozen
    torch.testing.assert_close(plain.features(images)[0].mT, expected[0][:, 1:])


def test_the_heads_of_vaex_begin_as_there():
    """Under their spectral norm the weights are normal of 0.02, biases 0; the norm adds its epsilon to variances."""
    heads = dino(norm="sync", norm_epsilon=1e-6, initial_deviation=0.02, embedding=True).heads
    convolutions = [layer for layer in heads.modules() if isinstance(layer, nn.Conv1d)]
    weights = torch.cat([layer.parametrizations.weight.original.detach().flatten() for layer in convolutions])
    assert float(weights.std()) == pytest.approx(0.02, rel=0.02) and len(convolutions) == 9
    assert all(not layer.bias.any() for layer in convolutions)
    assert {layer.eps for layer in heads.modules() if isinstance(layer, nn.BatchNorm2d)} == {1e-6}


@pytest.mark.parametrize(("size", "mode"), [(48, "area"), (20, "bicubic")])
def test_images_become_as_large_as_dino_wants(size, mode):
    discriminator = dino(resize="area").eval()
    pictures = torch.rand(2, 3, size, size) * 2 - 1
    found, resized = discriminator(pictures), F.interpolate(pictures, size=(32, 32), mode=mode)
    torch.testing.assert_close(found, discriminator(resized), rtol=1e-3, atol=1e-5)
    discriminator.resize = "bilinear"
    assert (found - discriminator(pictures)).abs().max() > 1e-3


def test_wrong_settings():
    with pytest.raises(ValueError, match="norm of PatchGAN must be 'group', 'batch' or 'sync', got 'instance'"):
        PatchGAN(norm="instance")
    with pytest.raises(ValueError, match="at least 24x24 pixels"):
        PatchGAN(width=4)(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="4 times a power of 2, got 48"):
        StyleGANDiscriminator(48)
    with pytest.raises(ValueError, match="made for image_size=16"):
        StyleGANDiscriminator(16, width=4)(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"has 12, got \[12\]"):
        dino(layers=[12])
    with pytest.raises(ValueError, match="has 0, got"):
        DINODiscriminator("resnet18", "random")
    with pytest.raises(ValueError, match="multiple of the patch"):
        dino(image_size=40)
    with pytest.raises(ValueError, match="must be odd"):
        dino(kernel_size=4)
    with pytest.raises(ValueError, match="norm of DINODiscriminator must be 'group', 'batch' or 'sync', got 'layer'"):
        dino(norm="layer")
    with pytest.raises(ValueError, match="resize of DINODiscriminator must be 'bilinear' or 'area', got 'nearest'"):
        dino(resize="nearest")
    with pytest.raises(ValueError, match="class_token of DINODiscriminator needs a ViT that has one"):
        DINODiscriminator("vit_base_patch16_siglip_224", "random", class_token=True)
    with pytest.raises(ValueError, match="at least 1, got width=0, stages=3"):
        BlurPoolDiscriminator(width=0)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_that_are_not_square(channels):
    images = torch.rand(2, channels, 16, 24)
    assert PatchGAN(width=4, layers=2, image_channels=channels)(images).shape[:2] == (2, 1)
    style = StyleGANDiscriminator([16, 24], width=4, max_width=8, image_channels=channels)
    assert style(images).shape == (2, 1) and style.hidden.in_features == 8 * 4 * 6
    assert dino(image_size=[16, 48])(images).shape == (2, 2, 3)
    with pytest.raises(ValueError, match=r"made for image_size=\(16, 24\)"):
        style(images.transpose(2, 3))
    with pytest.raises(ValueError, match=r"4 times a power of 2, got \(16, 22\)"):
        StyleGANDiscriminator((16, 22))
    for discriminator in (style, PatchGAN(width=4, layers=2, image_channels=channels)):
        with pytest.raises(ValueError, match=f"have 3 channels .*, and .* was made for {channels}"):
            discriminator(torch.rand(2, 3, 16, 24))
