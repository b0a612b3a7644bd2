"""Adversarial training of an autoencoder (VQGAN: Esser et al., "Taming Transformers", CVPR 2021, section 3.1).

Two players share every batch. The *discriminator* D tells images x from reconstructions y; the *generator*, which is
the autoencoder, is pushed towards reconstructions that D takes for images:

    L_D = loss(D(x), D(y))  [+ LeCam] [+ R1] [+ bCR]       trains D: y is a constant
    L   = L_rec + w(step) lambda L_G,  L_G = loss(D(y))    trains the autoencoder: D is a constant
    lambda = |grad L_rec| / (|grad L_G| + 1e-4)            eq. 7, gradients at the decoder's last layer

`AdversarialLoss` says when each player trains, and computes both losses; below it stand the losses on logits, the
adaptive weight lambda, LeCam, R1, and how gradients are taken and handed on. `Objective` adds up L.

**One backward pass serves both players.** Written naively, a batch passes the reconstructions through D twice (for the
generator with D frozen, for D with the reconstructions detached), and needs two backward passes and two optimizers;
accumulation, clipping, precision and schedules then have to be redone by hand. Here D sees the reconstructions once, in
the forward pass, and both gradients are taken from those logits at once: that of L_G at the decoder's outputs y, that
of L_D at D's weights. `with_known_gradients` makes a scalar whose backward pass hands these gradients on: y's go
through the decoder as usual, D's arrive at its weights. So each network is passed backward once for each gradient that
is needed, neither player's gradient reaches the other, D's activations are freed before the decoder's backward pass,
and the step is an ordinary one of the Trainer. The result is that of two optimizers that step on the same batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from discrete_lit.core.distributed import all_reduce_sum, world_size
from discrete_lit.core.modules import OfWholeBatch, RunningStatistics, at_least_float32
from discrete_lit.tokenizers.losses.augmentation import DifferentiableAugmentation
from discrete_lit.tokenizers.losses.discriminators import Discriminator

LeCamTarget = Literal["logits", "means"]
"""The numbers that `LeCam` holds near the running means: each logit, or the mean logits of a batch."""

LogitLoss = Literal["hinge", "non_saturating", "vanilla"]
"""Kinds of adversarial loss. For the discriminator `"hinge"`, or the logistic loss under the two other names; for the
generator the logistic `"non_saturating"`, or the mean logit itself under the two other names."""

GeneratorLoss = Literal[LogitLoss, "non_saturating_mean"]
"""Kinds of the generator's loss: `LogitLoss`, or the logistic loss of the mean logit of each image, as in Open-MAGVIT2
and IBQ."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveWeight:
    """Weigh the generator's term by eq. 7, `lambda = |grad L_rec| / (|grad L_G| + delta)`, clamped.

    Gradients are those at the decoder's last layer. The defaults are taming's, but for the ranks.

    Args:
        least: the smallest lambda; 0.015 in vaex, the tokenizer of VAR's authors.
        largest: the largest lambda.
        delta: keeps the denominator from 0; 1e-6 in vaex.
        reduction: of L_rec in the ratio, which decides where the clamp acts. `"mean"` over an image's pixels, or their
            `"sum"`, as in LDM's KL autoencoders and VA-VAE (`contperceptual.py`): lambda is then
            `clamp(C H W |grad L_rec| / (|grad L_G| + delta)) / (C H W)`; their whole loss is C H W times ours.
        across_ranks: compare the gradients of the joint batch of all ranks, so that several ranks train as one; if
            not, each rank weighs its own batch, as all published code does.

    Raises:
        ValueError: a setting out of its range.
    """

    least: float = 0.0
    largest: float = 1e4
    delta: float = 1e-4
    reduction: Literal["mean", "sum"] = "mean"
    across_ranks: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.least < self.largest or self.delta < 0:
            raise ValueError(
                "an adaptive weight needs 0 <= least < largest and delta >= 0, got "
                f"least={self.least}, largest={self.largest}, delta={self.delta}"
            )
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction of an adaptive weight must be 'mean' or 'sum', got {self.reduction!r}")

    def __call__(
        self, outputs: Tensor, last_layer: Tensor, *, reconstruction_gradient: Tensor, generator_gradient: Tensor
    ) -> Tensor:
        """Compute lambda, a scalar.

        Both gradients are known at the outputs; from there they go back through the decoder's last layer alone.

        Args:
            outputs: `(B, C, H, W)` of the decoder, with their graph.
            last_layer: the weight that the gradients are compared at.
            reconstruction_gradient: `(B, C, H, W)`, of the reconstruction's terms, a mean over pixels, with respect to
                the outputs.
            generator_gradient: the same of the generator's term.
        """
        at_last_layer = []
        for gradient in (reconstruction_gradient, generator_gradient):
            # At unit length nothing underflows on its way through a half-precision layer.
            length = gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)
            (found,) = take_gradients([outputs], [last_layer], [gradient / length], retain_graph=True)
            at_last_layer.append(at_least_float32(found) * length)
        both = torch.stack(at_last_layer)
        if self.across_ranks:
            both = all_reduce_sum(both) / world_size()
        reconstruction, generator = both.flatten(1).norm(dim=1)
        pixels = outputs[0].numel() if self.reduction == "sum" else 1
        return (pixels * reconstruction / (generator + self.delta)).clamp(self.least, self.largest) / pixels


@dataclass(kw_only=True)
class AdversarialTerms:
    """The losses of both players on one batch, and their gradients: the discriminator's graph is gone.

    `terms` holds the discriminator's alone; the generator's waits for its weight.
    """

    generator: Tensor | None
    """L_G, a scalar without weight; None while the generator does not meet the discriminator yet."""
    generator_gradient: Tensor | None
    """`(B, C, H, W)`, the gradient of L_G with respect to the outputs."""
    terms: dict[str, Tensor]
    """Scalars whose sum is L_D, each already multiplied by its weight."""
    gradients: list[Tensor]
    """The gradient of L_D with respect to each of `parameters_to_train()`."""
    figures: dict[str, Tensor]
    """Scalars that are worth a curve beside the losses: the mean logits of images and of reconstructions."""


class AdversarialLoss(nn.Module, OfWholeBatch):
    """Train a discriminator, and take from it a gradient on the decoder's outputs (Esser et al. 2021, section 3.1).

    The discriminator's optimizer is the autoencoder's, in parameter groups of its own; it sees the reconstructions that
    the autoencoder made before the step. Steps are those of the optimizer:

        step   0 ... start_step - lead_steps ... start_step ... start_step + warmup_steps ...
        D        not computed, idle              trains         trains
        L_G      left out                        left out       weight grows to its full value

    Args:
        discriminator: gives logits of images and of reconstructions.
        weight: of the generator's term; the paper's 0.8 goes with `adaptive`.
        adaptive: multiply the weight by eq. 7: `true` for the defaults of `AdaptiveWeight`, or its settings, as
            `{reduction: sum}`.
        start_step: first step at which the generator meets the discriminator; the paper starts once the reconstruction
            has settled.
        warmup_steps: the generator's term grows linearly to its weight over them, so that the discriminator does not
            ruin what was learned.
        lead_steps: the discriminator trains alone this long before `start_step`.
        idle_steps: what the optimizer makes of the steps in which the discriminator is idle: `"skipped"`, or
            `"counted"` with gradients of 0, as in taming, LDM and LlamaGen, whose Adam then begins without its
            correction of the first moments. Weight decay acts in counted steps.
        loss: of the discriminator.
        generator_loss: of the generator if it is another kind.
        discriminator_weight: of the discriminator's loss without its regularisers; 0.75 in RQ-VAE, 0.5 in LlamaGen.
            Adam cancels it, a clip of the gradient's norm does not.
        lecam_weight: of LeCam regularisation; 0 leaves it out.
        lecam_decay: of its running means.
        lecam_on: what LeCam holds near them: each of the `"logits"`, or their `"means"`, see `LeCam`.
        r1_weight: gamma / 2 of the penalty R1 on the gradient at real images; 0 leaves it out.
        r1_every: the penalty is computed every so many steps, and weighs as many times more (StyleGAN2, appendix B).
        joint_batch: show images and reconstructions to the discriminator as one batch, as vaex does, so that batch
            norms see both; if not, one after the other.
        running_norms: let the generator meet the discriminator in eval mode, with the running means of its batch norms,
            as vaex does; that is another pass.
        augmentation: shows images and reconstructions to the discriminator changed at random, in each pass anew.
        consistency_weight: of balanced consistency (Zhao et al., "Improved Consistency Regularization for GANs", AAAI
            2021): the mean squared difference between the logits of two showings, without blur in the second, of images
            plus that of reconstructions; 4 in vaex, 0 leaves it out.
        learning_rate_factor: the discriminator's learning rate as a multiple of the autoencoder's.
        scheduler: of the discriminator's learning rate, which counts the steps since the discriminator began to train:
            a `WarmupCosine`, a `WarmupLinear` or another `LambdaLR`. None follows the autoencoder's.
        weight_decay: of the discriminator, where the optimizer has one; None takes the autoencoder's.

    Raises:
        ValueError: a setting out of its range, a consistency weight without an augmentation, or an augmentation of a
            discriminator of clips.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        weight: float = 0.8,
        *,
        adaptive: bool | AdaptiveWeight = True,
        start_step: int = 0,
        warmup_steps: int = 0,
        lead_steps: int = 0,
        idle_steps: Literal["skipped", "counted"] = "skipped",
        loss: LogitLoss = "hinge",
        generator_loss: GeneratorLoss | None = None,
        discriminator_weight: float = 1.0,
        lecam_weight: float = 0.0,
        lecam_decay: float = 0.999,
        lecam_on: LeCamTarget = "logits",
        r1_weight: float = 0.0,
        r1_every: int = 16,
        joint_batch: bool = False,
        running_norms: bool = False,
        augmentation: DifferentiableAugmentation | None = None,
        consistency_weight: float = 0.0,
        learning_rate_factor: float = 1.0,
        scheduler: Callable[[Optimizer], LambdaLR] | None = None,
        weight_decay: float | None = None,
    ) -> None:
        super().__init__()
        weights = {
            **{"weight": weight, "lecam_weight": lecam_weight, "r1_weight": r1_weight},
            "consistency_weight": consistency_weight,
        }
        steps = {"start_step": start_step, "warmup_steps": warmup_steps, "lead_steps": lead_steps}
        for name, value in (weights | steps | {"weight_decay": weight_decay or 0.0}).items():
            if value < 0:
                raise ValueError(f"{name} of the adversarial loss must be >= 0, got {value}")
        if lead_steps > start_step:
            raise ValueError(f"lead_steps={lead_steps} of the adversarial loss exceed start_step={start_step}")
        if r1_every < 1 or min(learning_rate_factor, discriminator_weight) <= 0:
            raise ValueError(
                "r1_every of the adversarial loss must be at least 1, learning_rate_factor and discriminator_weight "
                f"above 0, got {r1_every}, {learning_rate_factor} and {discriminator_weight}"
            )
        if idle_steps not in ("skipped", "counted"):
            raise ValueError(f"idle_steps of the adversarial loss must be 'skipped' or 'counted', got {idle_steps!r}")
        if consistency_weight and augmentation is None:
            raise ValueError(
                f"consistency_weight={consistency_weight} of the adversarial loss compares two showings of an image: "
                "give an augmentation"
            )
        if augmentation is not None and discriminator.sees_clips:
            raise ValueError(
                f"the augmentation changes images, and a {type(discriminator).__name__} sees clips: leave one out"
            )
        self.discriminator = discriminator
        self.weight = weight
        self.adaptive = AdaptiveWeight() if adaptive is True else adaptive or None
        self.start_step = start_step
        self.warmup_steps = warmup_steps
        self.lead_steps = lead_steps
        self.idle_steps = idle_steps
        self.loss: LogitLoss = loss
        self.generator_loss: GeneratorLoss = loss if generator_loss is None else generator_loss
        self.discriminator_weight = discriminator_weight
        self.lecam_weight = lecam_weight
        self.lecam = LeCam(lecam_decay, on=lecam_on) if lecam_weight else None
        self.r1_weight = r1_weight
        self.r1_every = r1_every
        self.joint_batch = joint_batch
        self.running_norms = running_norms
        self.augmentation = augmentation
        self.consistency_weight = consistency_weight
        self.learning_rate_factor = learning_rate_factor
        self.scheduler = scheduler
        self.weight_decay = weight_decay

    def trains(self, step: int) -> bool:
        """Whether the discriminator is computed and trained at an optimizer step."""
        return step >= self.start_step - self.lead_steps

    def warmup(self, step: int) -> float:
        """The fraction of its weight that the generator's term has at an optimizer step, w(step) in [0, 1]."""
        if step < self.start_step:
            return 0.0
        return min(1.0, (step - self.start_step + 1) / (self.warmup_steps + 1))

    def whole_batch_terms(self) -> Iterator[str]:
        if self.adaptive is not None:
            yield "the adaptive weight of the adversarial loss (adaptive)"

    def parameters_to_train(self) -> list[nn.Parameter]:
        """The discriminator's trained parameters, in the order of `AdversarialTerms.gradients`."""
        return [parameter for parameter in self.discriminator.parameters() if parameter.requires_grad]

    def forward(self, outputs: Tensor, images: Tensor, step: int, *, index: Tensor | None = None) -> AdversarialTerms:
        """Compute both players' losses and gradients on outputs and images `(B, C, H, W)`, or clips `(B, C, T, H, W)`.

        Args:
            outputs: of the decoder, cut from its graph, requiring a gradient.
            images: real ones.
            step: of the optimizer; `trains(step)`.
            index: `(B,)` int64, each image's number in the run, to which its augmentation belongs. None: nobody knows.
        """
        meets = self.warmup(step) > 0
        penalised = self.r1_weight > 0 and step % self.r1_every == 0

        outputs = outputs if meets else outputs.detach()
        images = images.detach().requires_grad_(penalised)
        showings = self._showings(outputs, images, step, index)

        # The generator: its gradient at the outputs. The logits `fake` serve both players, unless norms differ.
        generator = generator_gradient = None
        if meets and self.running_norms:
            with in_evaluation_mode(self.discriminator):
                generator = generator_loss(self.generator_loss, self.discriminator(showings(0)[0]))
            (generator_gradient,) = take_gradients(generator, [outputs])
            outputs = outputs.detach()
            showings = self._showings(outputs, images, step, index)
        with twice_differentiable() if penalised else nullcontext():
            fake, real = self._logits(*showings(1))
        if meets and not self.running_norms:
            generator = generator_loss(self.generator_loss, fake)
            (generator_gradient,) = take_gradients(generator, [outputs], retain_graph=True)

        # The discriminator.
        terms = {"discriminator": self.discriminator_weight * discriminator_loss(self.loss, real, fake)}
        if self.lecam is not None:
            terms["lecam"] = self.lecam_weight * self.lecam(real, fake)
        if self.consistency_weight:
            again = self._logits(*showings(2))
            differences = [
                F.mse_loss(at_least_float32(a), at_least_float32(b)) for a, b in zip(again, (fake, real), strict=True)
            ]
            terms["consistency"] = self.consistency_weight * (differences[0] + differences[1])
        if penalised:
            terms["r1"] = self.r1_weight * self.r1_every * gradient_penalty(real, images)
        total = torch.stack(list(terms.values())).sum()
        # With respect to the weights alone: nothing goes back to the outputs, or through what is frozen.
        gradients = take_gradients(total, self.parameters_to_train(), materialize_grads=True)
        figures = {
            "discriminator_real": real.detach().mean(),
            "discriminator_fake": fake.detach().mean(),
        }
        return AdversarialTerms(
            generator=None if generator is None else generator.detach(),
            generator_gradient=generator_gradient,
            terms={name: term.detach() for name, term in terms.items()},
            gradients=list(gradients),
            figures=figures,
        )

    def _showings(
        self, outputs: Tensor, images: Tensor, step: int, index: Tensor | None
    ) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Give the function from the number of a showing to reconstructions and images as the discriminator sees them.

        Showing 0 is the generator's, 1 the discriminator's, 2 the one that is compared with it, without blur.
        """
        augmentation = self.augmentation
        if augmentation is None:
            return lambda number: (outputs, images)
        draws = augmentation.draws(len(images), step, index=index, device=images.device)
        crops, blur = augmentation.crops(step), augmentation.blur(step - self.start_step)

        def show(number: int) -> tuple[Tensor, Tensor]:
            settings = {"blur": 0.0 if number == 2 else blur, "crop": crops[number]}
            return (
                augmentation(outputs, draws[0, number], **settings),
                augmentation(images, draws[1, number], **settings),
            )

        return show

    def _logits(self, outputs: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Give the logits `(B, ...)` of reconstructions and of images."""
        if self.joint_batch:
            fake, real = self.discriminator(torch.cat((outputs, images))).chunk(2)
            return fake, real
        return self.discriminator(outputs), self.discriminator(images)


@contextmanager
def in_evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Have a module in eval mode meanwhile."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def discriminator_loss(kind: LogitLoss, real: Tensor, fake: Tensor) -> Tensor:
    """Half the sum of the losses on logits `(B, ...)` of real images and of reconstructions: a scalar.

    `"hinge"`: `(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2` (Lim & Ye 2017, as in taming);
    `"non_saturating"` and `"vanilla"`: `(mean -log sigmoid(real) + mean -log sigmoid(-fake)) / 2` (Goodfellow et al.
    2014, eq. 1).
    """
    real, fake = at_least_float32(real), at_least_float32(fake)
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def generator_loss(kind: GeneratorLoss, fake: Tensor) -> Tensor:
    """The generator's loss on logits `(B, ...)` of reconstructions; scalar, float32 or float64.

    `"non_saturating"`: `mean -log sigmoid(fake)` (Goodfellow et al. 2014, section 3); `"non_saturating_mean"`: the same
    of the mean logit of each image, as in Open-MAGVIT2 and IBQ (`vqperceptual.py`); `"hinge"` and `"vanilla"`:
    `-mean fake`, in taming for both.
    """
    fake = at_least_float32(fake)
    if kind == "non_saturating_mean":
        return F.softplus(-fake.flatten(1).mean(dim=1)).mean()
    return F.softplus(-fake).mean() if kind == "non_saturating" else -fake.mean()


class LeCam(RunningStatistics, OfWholeBatch):
    """LeCam regularisation (Tseng et al., "Regularizing GANs Under Limited Data", CVPR 2021, eq. 4 and 5).

    Keeps the logits of either kind near the running mean of the other kind's. As in the authors' code, only where they
    lie outside: `mean max(0, real - m_fake)^2 + mean max(0, m_real - fake)^2`. The means are over the logits of all
    ranks, and of the micro-batches of a step so far; they begin at 0 and are part of a checkpoint.

    Args:
        decay: of the running means, in [0, 1).
        on: `"logits"` compares each of them with the running means that they moved (the authors' code, Open-MAGVIT2,
            IBQ); `"means"` compares the mean logit of the images of a rank, and that of its reconstructions, with the
            running means before they move (TiTok and MaskBit, `losses.py`).

    Raises:
        ValueError: a setting out of its range.
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(self, decay: float, *, on: LeCamTarget = "logits") -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"lecam_decay must lie in [0, 1), got {decay}")
        if on not in ("logits", "means"):
            raise ValueError(f"lecam_on must be 'logits' or 'means', got {on!r}")
        self.decay = decay
        self.on = on
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))
        self._seen: list[Tensor] = []

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Move the running means by logits `(B, ...)`, and give the scalar penalty."""
        real, fake = at_least_float32(real), at_least_float32(fake)
        before = torch.stack((self.real_mean, self.fake_mean))
        self._seen.append(all_reduce_sum(torch.stack((real.detach().mean(), fake.detach().mean()))) / world_size())
        if self.on == "means":
            real, fake = real.mean(), fake.mean()
        real_mean, fake_mean = before if self.on == "means" else self._moved()
        if not self.accumulating:
            self.end_step()
        return F.relu(real - fake_mean).square().mean() + F.relu(real_mean - fake).square().mean()

    def whole_batch_terms(self) -> tuple[str]:
        return ("the means of LeCam (lecam_weight)",)

    def _moved(self) -> Tensor:
        """The two means `(2,)` behind a step of the batches seen."""
        means = torch.stack(self._seen).mean(dim=0)
        return torch.stack((self.real_mean, self.fake_mean)).lerp(means.to(self.real_mean.dtype), 1 - self.decay)

    @torch.no_grad()
    def end_step(self) -> None:
        if self._seen:
            real_mean, fake_mean = self._moved()
            self.real_mean.copy_(real_mean)
            self.fake_mean.copy_(fake_mean)
            self._seen = []

    def forget_step(self) -> None:
        self._seen = []


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """R1 of Mescheder et al., "Which Training Methods for GANs do actually Converge?" (ICML 2018), eq. 9.

    Without its factor gamma / 2: the mean over images of `|grad D(x)|^2`, where `D(x)` is the mean of an image's
    logits. Differentiable.

    Args:
        logits: `(B, ...)` made of the images under `twice_differentiable`.
        images: `(B, C, H, W)` requiring a gradient.
    """
    of_each = at_least_float32(logits).flatten(1).mean(dim=1).sum()
    (gradient,) = take_gradients(of_each, [images], create_graph=True)
    return at_least_float32(gradient).square().flatten(1).sum(dim=1).mean()


def twice_differentiable() -> AbstractContextManager[object]:
    """A context for the forward pass behind a gradient penalty: fused attention kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def take_gradients(
    value: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor] | None = None,
    **options: bool,
) -> tuple[Tensor, ...]:
    """`torch.autograd.grad` inside a forward pass: autocast, which would reach the backward pass too, is off."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        return torch.autograd.grad(value, inputs, grad_outputs, **options)


def with_known_gradients(value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar equal to `value` whose gradient with respect to each input is the given one.

    The gradients are not differentiated further.

    Args:
        value: scalar.
        inputs: tensors of any shape that require a gradient.
        gradients: one of each input's shape.
    """
    return _KnownGradients.apply(value.detach(), list(gradients), *inputs)


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (scale,) = grad_outputs
        return None, None, *(scale * gradient for gradient in ctx.saved_tensors)
