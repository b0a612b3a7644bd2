"""A discriminator beside an autoencoder: when it trains, what it loses, and what it tells the decoder."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from discrete_lit.distributed import all_reduce_sum, world_size
from discrete_lit.tokenizers.losses.discriminators import Discriminator
from discrete_lit.tokenizers.losses.known_gradients import take_gradients
from discrete_lit.tokenizers.losses.logits import (
    LeCam,
    LogitLoss,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    twice_differentiable,
)

_LARGEST_WEIGHT = 1e4
_LEAST_GRADIENT = 1e-4


@dataclass
class Match:
    """What one batch gave; every gradient is there, so nothing holds the discriminator's activations any more."""

    generator: Tensor | None
    """Scalar of the generator, without weight; None while it does not meet the discriminator yet."""
    generator_gradient: Tensor | None
    """`(B, C, H, W)`, of the former with respect to the outputs."""
    terms: dict[str, Tensor]
    """Scalars of the discriminator, each already multiplied by its weight."""
    gradients: list[Tensor]
    """Of the sum of the terms with respect to each parameter of the discriminator."""
    figures: dict[str, Tensor]
    """What is worth a curve beside the losses."""


class AdversarialLoss(nn.Module):
    """Trains a discriminator and asks it for a gradient on the decoder's outputs (Esser et al. 2021, section 3.1).

    The discriminator's optimizer is the autoencoder's, in parameter groups of its own; it sees the reconstructions that
    the autoencoder made before the step. Steps are those of the optimizer. Until `start_step - lead_steps` the
    discriminator is not computed, and its weights get no update of any kind.

    Args:
        discriminator: judges images and reconstructions.
        weight: of the generator's term; the paper's 0.8 goes with `adaptive`.
        adaptive: multiply the weight by eq. 7, `|grad L_rec| / (|grad L_G| + 1e-4)`, at most 1e4, with gradients of
            the joint batch of all ranks at the decoder's last layer.
        start_step: first step at which the generator meets the discriminator; the paper starts once the reconstruction
            has settled.
        warmup_steps: the generator's term grows linearly to its weight over them, so that the discriminator does not
            ruin what was learned.
        lead_steps: the discriminator trains alone this long before `start_step`.
        loss: of the discriminator.
        generator_loss: of the generator if it is another kind.
        lecam_weight: of LeCam regularisation; 0 leaves it out.
        lecam_decay: of its running means.
        r1_weight: gamma / 2 of the penalty R1 on the gradient at real images; 0 leaves it out.
        r1_every: the penalty is computed every so many steps, and weighs as many times more (StyleGAN2, appendix B).
        learning_rate_factor: the discriminator's learning rate as a multiple of the autoencoder's.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        weight: float = 0.8,
        adaptive: bool = True,
        start_step: int = 0,
        warmup_steps: int = 0,
        lead_steps: int = 0,
        loss: LogitLoss = "hinge",
        generator_loss: LogitLoss | None = None,
        lecam_weight: float = 0.0,
        lecam_decay: float = 0.999,
        r1_weight: float = 0.0,
        r1_every: int = 16,
        learning_rate_factor: float = 1.0,
    ) -> None:
        super().__init__()
        weights = {"weight": weight, "lecam_weight": lecam_weight, "r1_weight": r1_weight}
        steps = {"start_step": start_step, "warmup_steps": warmup_steps, "lead_steps": lead_steps}
        for name, value in (weights | steps).items():
            if value < 0:
                raise ValueError(f"{name} of the adversarial loss must be >= 0, got {value}")
        if lead_steps > start_step:
            raise ValueError(f"lead_steps={lead_steps} of the adversarial loss exceed start_step={start_step}")
        if r1_every < 1 or learning_rate_factor <= 0:
            raise ValueError(
                "r1_every of the adversarial loss must be at least 1 and learning_rate_factor above 0, got "
                f"{r1_every} and {learning_rate_factor}"
            )
        self.discriminator = discriminator
        self.weight = weight
        self.adaptive = adaptive
        self.start_step = start_step
        self.warmup_steps = warmup_steps
        self.lead_steps = lead_steps
        self.loss: LogitLoss = loss
        self.generator_loss: LogitLoss = loss if generator_loss is None else generator_loss
        self.lecam_weight = lecam_weight
        self.lecam = LeCam(lecam_decay) if lecam_weight else None
        self.r1_weight = r1_weight
        self.r1_every = r1_every
        self.learning_rate_factor = learning_rate_factor

    def trains(self, step: int) -> bool:
        """Whether the discriminator is computed and trained at an optimizer step."""
        return step >= self.start_step - self.lead_steps

    def share(self, step: int) -> float:
        """How much of its weight the generator's term has at an optimizer step, in [0, 1]."""
        if step < self.start_step:
            return 0.0
        return min(1.0, (step - self.start_step + 1) / (self.warmup_steps + 1))

    def parameters_to_train(self) -> list[nn.Parameter]:
        """Those of the discriminator, in the order of `Match.gradients`."""
        return [parameter for parameter in self.discriminator.parameters() if parameter.requires_grad]

    def forward(self, outputs: Tensor, images: Tensor, step: int) -> Match:
        """Let the discriminator judge outputs and images `(B, C, H, W)`.

        The reconstructions pass through it once: both players take their gradient from the same logits.

        Args:
            outputs: of the decoder, cut from its graph, requiring a gradient.
            images: real ones.
            step: of the optimizer; `trains(step)`.
        """
        meets = self.share(step) > 0
        penalised = self.r1_weight > 0 and step % self.r1_every == 0
        fake = self.discriminator(outputs if meets else outputs.detach())
        generator = generator_gradient = None
        if meets:
            generator = generator_loss(self.generator_loss, fake)
            (generator_gradient,) = take_gradients(generator, [outputs], retain_graph=True)

        images = images.detach().requires_grad_(penalised)
        with twice_differentiable() if penalised else nullcontext():
            real = self.discriminator(images)
        terms = {"discriminator": discriminator_loss(self.loss, real, fake)}
        if self.lecam is not None:
            terms["lecam"] = self.lecam_weight * self.lecam(real, fake)
        if penalised:
            terms["r1"] = self.r1_weight * self.r1_every * gradient_penalty(real, images)
        total = torch.stack(list(terms.values())).sum()
        # With respect to the weights alone: nothing goes back to the outputs, or through what is frozen.
        gradients = take_gradients(total, self.parameters_to_train(), materialize_grads=True)
        figures = {
            "discriminator_real": real.detach().float().mean(),
            "discriminator_fake": fake.detach().float().mean(),
        }
        return Match(
            None if generator is None else generator.detach(),
            generator_gradient,
            {name: term.detach() for name, term in terms.items()},
            list(gradients),
            figures,
        )


def adaptive_weight(outputs: Tensor, last_layer: Tensor, reconstruction: Tensor, generator: Tensor) -> Tensor:
    """The weight of eq. 7, the same scalar on every rank.

    Args:
        outputs: `(B, C, H, W)` of the decoder, with their graph.
        last_layer: the weight that the gradients are compared at.
        reconstruction: `(B, C, H, W)`, gradient of the reconstruction's terms with respect to the outputs.
        generator: the same of the generator's term.
    """
    at_last_layer = []
    for gradient in (reconstruction, generator):
        # At unit length nothing underflows on its way through a half-precision layer.
        length = gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)
        (found,) = take_gradients([outputs], [last_layer], [gradient / length], retain_graph=True)
        at_last_layer.append(found.float() * length)
    joint = all_reduce_sum(torch.stack(at_last_layer)) / world_size()
    wanted, offered = joint.flatten(1).norm(dim=1)
    return (wanted / (offered + _LEAST_GRADIENT)).clamp(max=_LARGEST_WEIGHT)
