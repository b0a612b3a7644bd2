"""One loss for both players, against what two passes and two optimizers give; and the losses of pixels."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from discrete_lit.tokenizers.autoencoder import logit_laplace_images
from discrete_lit.tokenizers.losses import AdversarialLoss, Objective, TimmFeatures
from discrete_lit.tokenizers.losses.adversarial import (
    AdaptiveWeight,
    LeCam,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)
from discrete_lit.tokenizers.losses.augmentation import DifferentiableAugmentation
from discrete_lit.tokenizers.losses.discriminators import DINODiscriminator, PatchGAN
from discrete_lit.tokenizers.losses.objective import logit_laplace_loss


class Decoder(nn.Module):
    """Two convolutions, the second with the last weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, images):
        return self.last(torch.tanh(self.first(images)))


def images(count=4, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def patch(**arguments):
    return PatchGAN(width=4, layers=2, **arguments)


def dino():
    return DINODiscriminator("vit_tiny_patch16_224", "random", layers=[1, 3], image_size=32, kernel_size=3)


def objective(discriminator=None, perceptual=None, **adversarial):
    loss = AdversarialLoss(discriminator or patch(), **adversarial)
    return Objective({"l1": 1.0}, perceptual_loss=perceptual, adversarial_loss=loss)


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def of_the_definition(decoder, whole):
    """Gradients by autograd through everything: the generator's by a frozen discriminator, the discriminator's apart.

    Of fixed and adaptive weights; the latter by the definition, from the gradients of two whole losses.
    """
    adversarial, decoder = whole.adversarial, deepcopy(decoder)
    discriminator = deepcopy(adversarial.discriminator)
    outputs = decoder(images())
    reconstruction = F.l1_loss(outputs, images())
    if whole.perceptual is not None:
        reconstruction = reconstruction + whole.perceptual.weight * whole.perceptual(outputs, images())
    generator = generator_loss(adversarial.generator_loss, discriminator.requires_grad_(False)(outputs))
    weight = adversarial.weight
    if adversarial.adaptive:
        at_last = [
            torch.autograd.grad(term, decoder.last.weight, retain_graph=True)[0].norm()
            for term in (reconstruction, generator)
        ]
        weight = weight * (at_last[0] / (at_last[1] + 1e-4)).clamp(0, 1e4)
    (reconstruction + weight * generator).backward()
    discriminator.requires_grad_(True)
    real, fake = discriminator(images()), discriminator(outputs.detach())
    discriminator_loss(adversarial.loss, real, fake).backward()
    return weight, generator.detach(), gradients(decoder), gradients(discriminator)


@pytest.mark.parametrize(
    ("make", "kind", "adaptive"),
    [
        (patch, "hinge", True),
        (patch, "hinge", False),
        (patch, "non_saturating", True),
        (dino, "hinge", True),
    ],
)
def test_gradients_are_those_of_two_passes(make, kind, adaptive):
    decoder = Decoder()
    features = TimmFeatures("resnet18", "random", layers=[1], image_size=None, weight=0.5)
    whole = objective(make(), features, weight=0.3, adaptive=adaptive, loss="hinge", generator_loss=kind).train()
    weight, generator, of_decoder, of_discriminator = of_the_definition(decoder, whole)
    compared = whole(decoder(images()), images(), last_layer=decoder.last.weight, step=0)
    compared.loss.backward()
    torch.testing.assert_close(compared.figures["generator_weight"], torch.as_tensor(weight), rtol=1e-4, atol=0)
    torch.testing.assert_close(compared.terms["generator"], weight * generator, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(compared.loss.detach(), sum(compared.terms.values()))
    torch.testing.assert_close(gradients(decoder), of_decoder, rtol=1e-3, atol=1e-6)
    found = gradients(whole.adversarial.discriminator)
    # Spectral norms have taken another power iteration; with the definition's the gradients are the same.
    tolerance = {"rtol": 0.2, "atol": 1e-3} if make is dino else {"rtol": 1e-3, "atol": 1e-6}
    torch.testing.assert_close(found, of_discriminator, **tolerance)
    assert all(gradient.abs().max() > 0 for name, gradient in found.items() if "bias" not in name)


def test_a_step_of_sgd_is_tamings_two():
    """taming's two optimizers, each with its own backward pass, on the reconstructions made before the step."""
    decoder, whole = Decoder(), objective(weight=0.8)
    twins = deepcopy(decoder), deepcopy(whole.adversarial.discriminator)
    *_, of_decoder, of_discriminator = of_the_definition(decoder, whole)
    for twin, expected in zip(twins, (of_decoder, of_discriminator), strict=True):
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        for name, parameter in twin.named_parameters():
            parameter.grad = expected[name]
        optimizer.step()
    both = torch.optim.SGD([*decoder.parameters(), *whole.parameters()], lr=0.1)
    whole(decoder(images()), images(), last_layer=decoder.last.weight, step=0).loss.backward()
    both.step()
    torch.testing.assert_close(decoder.state_dict(), twins[0].state_dict())
    torch.testing.assert_close(whole.adversarial.discriminator.state_dict(), twins[1].state_dict())


def test_regularisers_join_the_discriminators_loss():
    whole = objective(lecam_weight=0.1, lecam_decay=0.5, r1_weight=2.0, r1_every=3).train()
    twin, lecam = deepcopy(whole.adversarial.discriminator), LeCam(0.5)
    decoder = Decoder()
    outputs = decoder(images()).detach()
    for step in (6, 7):
        compared = whole(decoder(images()), images(), last_layer=decoder.last.weight, step=step)
        whole.zero_grad()
        compared.loss.backward()
        real_images = images().requires_grad_()
        real, fake = twin(real_images), twin(outputs)
        expected = {"discriminator": discriminator_loss("hinge", real, fake), "lecam": 0.1 * lecam(real, fake)}
        if step == 6:
            expected["r1"] = 2.0 * 3 * gradient_penalty(real, real_images)
        twin.zero_grad()
        sum(expected.values()).backward()
        found = {
            name: compared.terms[name] for name in compared.terms if name not in ("reconstruction_l1", "generator")
        }
        torch.testing.assert_close(found, {name: term.detach() for name, term in expected.items()})
        torch.testing.assert_close(gradients(whole.adversarial.discriminator), gradients(twin), rtol=1e-3, atol=1e-6)


def test_a_joint_batch_is_normalised_together():
    """Of a discriminator that normalises the batch, the logits are those of images and reconstructions at once."""
    decoder, whole = Decoder(), objective(patch(norm="batch"), joint_batch=True, weight=0.3, adaptive=False).train()
    plain, twin = deepcopy(decoder), deepcopy(whole.adversarial.discriminator)
    whole(decoder(images()), images(), last_layer=decoder.last.weight, step=0).loss.backward()
    fake, real = twin(torch.cat((plain(images()), images()))).chunk(2)
    loss = F.l1_loss(plain(images()), images()) + 0.3 * generator_loss("hinge", fake)
    of_decoder = torch.autograd.grad(loss, list(plain.parameters()), retain_graph=True)
    of_twin = torch.autograd.grad(discriminator_loss("hinge", real, fake), list(twin.parameters()))
    found = [[parameter.grad for parameter in module.parameters()] for module in (decoder, whole)]
    torch.testing.assert_close(found, [list(of_decoder), list(of_twin)], rtol=1e-3, atol=1e-6)
    apart = discriminator_loss("hinge", deepcopy(twin)(images()), deepcopy(twin)(decoder(images())))
    assert abs(float(apart.detach() - discriminator_loss("hinge", real, fake).detach())) > 1e-3


def of_players(decoder, whole, fake_of_generator, terms, parameters):
    """Gradients of the decoder and of the discriminator by autograd, of logits and terms made by hand."""
    loss = F.l1_loss(decoder(images()), images()) + 0.3 * generator_loss("hinge", fake_of_generator)
    of_decoder = torch.autograd.grad(loss, list(decoder.parameters()), retain_graph=True)
    return [list(of_decoder), list(torch.autograd.grad(terms, parameters))]


def test_running_norms_are_those_before_the_step():
    """The generator meets the discriminator in eval mode; the discriminator trains on its batch."""
    decoder = Decoder()
    whole = objective(patch(norm="batch"), joint_batch=True, running_norms=True, weight=0.3, adaptive=False).train()
    for norm in (layer for layer in whole.modules() if isinstance(layer, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
    plain, twin = deepcopy(decoder), deepcopy(whole.adversarial.discriminator)
    whole(decoder(images()), images(), last_layer=decoder.last.weight, step=0).loss.backward()
    judged = deepcopy(twin).eval()(plain(images()))
    fake, real = twin(torch.cat((plain(images()).detach(), images()))).chunk(2)
    expected = of_players(plain, whole, judged, discriminator_loss("hinge", real, fake), list(twin.parameters()))
    found = [[parameter.grad for parameter in module.parameters()] for module in (decoder, whole)]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert whole.adversarial.discriminator.training
    state = {name: value for name, value in whole.adversarial.discriminator.state_dict().items() if "running" in name}
    torch.testing.assert_close(state, {name: twin.state_dict()[name] for name in state})  # one step of the means


@pytest.mark.parametrize("running_norms", [True, False])
def test_showings_and_their_consistency(running_norms):
    """Each pass sees the batch changed by draws of its own; two showings of an image are asked to look alike."""
    augmentation = DifferentiableAugmentation(cutout=0.25, blur_steps=100)
    settings = {"augmentation": augmentation, "consistency_weight": 4.0, "discriminator_weight": 2.0}
    whole = objective(running_norms=running_norms, weight=0.3, adaptive=False, start_step=5, **settings).train()
    decoder = Decoder()
    plain, twin = deepcopy(decoder), deepcopy(whole.adversarial.discriminator)
    index, step = torch.tensor([7, 3, 11, 2]), 30
    compared = whole(decoder(images()), images(), last_layer=decoder.last.weight, step=step, index=index)
    compared.loss.backward()

    draws = augmentation.draws(4, step, index=index, device=torch.device("cpu"))
    made = plain(images())
    shown = [augmentation(made, draws[0, number], blur=blur) for number, blur in enumerate((0.75, 0.75, 0.0))]
    real = [augmentation(images(), draws[1, number], blur=blur) for number, blur in ((1, 0.75), (2, 0.0))]
    judged = twin(shown[0] if running_norms else shown[1])
    fake, real, fake_again, real_again = (twin(each.detach()) for each in (shown[1], real[0], shown[2], real[1]))
    terms = {
        "discriminator": 2 * discriminator_loss("hinge", real, fake),
        "consistency": 4 * ((fake - fake_again).square().mean() + (real - real_again).square().mean()),
    }
    for name, term in terms.items():
        torch.testing.assert_close(compared.terms[name], term.detach(), rtol=1e-4, atol=1e-6)
    expected = of_players(plain, whole, judged, sum(terms.values()), list(twin.parameters()))
    found = [[parameter.grad for parameter in module.parameters()] for module in (decoder, whole)]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert terms["consistency"] > 1e-4


def test_the_discriminators_loss_has_a_weight():
    decoder, whole = Decoder(), objective(discriminator_weight=0.75, lecam_weight=0.1).train()
    twin = deepcopy(whole)
    twin.adversarial.discriminator_weight = 1.0
    terms = []
    for each in (whole, twin):
        compared = each(decoder(images()), images(), last_layer=decoder.last.weight, step=0)
        compared.loss.backward()
        terms.append(compared.terms)
    torch.testing.assert_close(terms[0]["discriminator"], 0.75 * terms[1]["discriminator"])
    torch.testing.assert_close(
        [terms[0][name] for name in ("generator", "lecam")], [terms[1][name] for name in ("generator", "lecam")]
    )
    last = "adversarial.discriminator.main.8.bias"
    assert gradients(whole)[last] != gradients(twin)[last]


def test_the_schedule():
    decoder = Decoder()
    whole = objective(weight=0.5, adaptive=False, start_step=10, lead_steps=4, warmup_steps=3).train()
    shares, trained = [], []
    for step in range(16):
        whole.zero_grad()
        compared = whole(decoder(images()), images(), last_layer=decoder.last.weight, step=step)
        compared.loss.backward()
        shares.append(float(compared.figures.get("generator_weight", torch.zeros(()))) / 0.5)
        found = gradients(whole.adversarial.discriminator).values()
        assert all(gradient is not None for gradient in found)
        trained.append(any(gradient.abs().max() > 0 for gradient in found))
        assert ("discriminator" in compared.terms) == trained[-1] and ("generator" in compared.terms) == (step >= 10)
    assert shares == pytest.approx([0.0] * 10 + [0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert trained == [False] * 6 + [True] * 10


def test_before_the_start_nothing_is_computed():
    class Untouched(PatchGAN):
        def forward(self, images):
            raise AssertionError("computed")

    decoder, whole = Decoder(), objective(Untouched(width=4), start_step=1)
    plain = deepcopy(decoder)
    whole(decoder(images()), images(), last_layer=decoder.last.weight, step=0).loss.backward()
    F.l1_loss(plain(images()), images()).backward()
    torch.testing.assert_close(gradients(decoder), gradients(plain))


def test_validation_has_no_adversarial_terms():
    whole = objective(lecam_weight=1.0)
    before = deepcopy(whole.state_dict())
    with torch.no_grad():
        compared = whole(Decoder()(images()), images())
    assert set(compared.terms) == {"reconstruction_l1"} and not compared.figures
    torch.testing.assert_close(whole.state_dict(), before, rtol=0, atol=0)


def test_the_discriminators_activations_are_gone_before_the_backward_pass():
    """Its graph ends with the forward pass: the loss holds gradients, not activations."""
    decoder, whole = Decoder(), objective()
    compared = whole(decoder(images()), images(), last_layer=decoder.last.weight, step=0)
    behind = {type(node).__name__ for node, _ in compared.loss.grad_fn.next_functions if node is not None}
    assert behind == {"ConvolutionBackward0", "AccumulateGrad"}


def test_a_frozen_part_is_passed_backward_once():
    """For the generator's gradient; the discriminator's own is that of its weights."""
    decoder, whole = Decoder(), objective(dino())
    passes = []
    block = whole.adversarial.discriminator.frozen.prepare().blocks[1]
    block.register_full_backward_hook(lambda *arguments: passes.append(1))
    whole(decoder(images()), images(), last_layer=decoder.last.weight, step=0).loss.backward()
    assert len(passes) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """In float16 the losses stay in float32, and gradients far below its range arrive at the decoder."""
    decoder, whole = Decoder(), objective(weight=0.5)
    compared = whole(decoder(images()), images(), last_layer=decoder.last.weight, step=0)
    expected = compared.figures["generator_weight"]
    seen = []
    whole.adversarial.discriminator.main[0].register_forward_hook(lambda *arguments: seen.append(arguments[2].dtype))
    with torch.autocast("cpu", dtype):
        outputs = decoder(images()).float()
        compared = whole(outputs, images(), last_layer=decoder.last.weight, step=0)
    assert set(seen) == {torch.bfloat16 if dtype == torch.bfloat16 else torch.float32}
    (compared.loss * 2.0**10).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(decoder).values())
    torch.testing.assert_close(compared.figures["generator_weight"], expected, rtol=0.1, atol=0)


def test_an_adaptive_weight_survives_half_precision():
    """Gradients of 1e-9 at the pixels vanish in float16; what they are at the last layer must not."""
    decoder = Decoder()
    pushes = [torch.randn(4, 3, 16, 16) * size for size in (3e-9, 1e-9)]
    gradients = {"reconstruction_gradient": pushes[0], "generator_gradient": pushes[1]}
    expected = AdaptiveWeight()(decoder(images()), decoder.last.weight, **gradients)
    with torch.autocast("cpu", torch.float16):
        found = AdaptiveWeight()(decoder(images()).float(), decoder.last.weight, **gradients)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_consistency_needs_two_showings():
    with pytest.raises(ValueError, match=r"consistency_weight=4.0 of the adversarial loss .*: give an augmentation"):
        AdversarialLoss(patch(), consistency_weight=4.0)


def test_wrong_settings():
    for arguments, message in (
        ({"weight": -1}, "weight of the adversarial loss must be >= 0, got -1"),
        ({"start_step": -1}, "start_step of the adversarial loss must be >= 0"),
        ({"lead_steps": 3, "start_step": 2}, "lead_steps=3 of the adversarial loss exceed start_step=2"),
        ({"r1_every": 0}, "r1_every of the adversarial loss must be at least 1"),
        ({"lecam_weight": 1.0, "lecam_decay": 1.0}, r"lecam_decay must lie in \[0, 1\)"),
        ({"discriminator_weight": 0.0}, "learning_rate_factor and discriminator_weight above 0, got 16, 1.0 and 0.0"),
        ({"weight_decay": -0.1}, "weight_decay of the adversarial loss must be >= 0, got -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            AdversarialLoss(patch(), **arguments)
    with pytest.raises(ValueError, match="give it alone"):
        Objective("logit_laplace", adversarial_loss=AdversarialLoss(patch()))


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


def test_wrong_pixel_losses():
    with pytest.raises(ValueError, match="one of l1, l2, logit_laplace, got 'l3'"):
        Objective("l3")
    with pytest.raises(ValueError, match="weights >= 0"):
        Objective({"l1": -1.0})
    with pytest.raises(ValueError, match="give it alone"):
        Objective({"logit_laplace": 1.0, "l2": 1.0})
    with pytest.raises(ValueError, match=r"twice the channels of the images \(out_channels\), and its outputs have 3"):
        Objective("logit_laplace")(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))
