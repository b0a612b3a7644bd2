"""Diffusion or flow matching over whole latents, given a class or a text: LDM, DiT and SiT, and on pixels ADM.

- Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022: a U-Net.
- Peebles & Xie, "Scalable Diffusion Models with Transformers" (DiT), 2023: a transformer, DDPM.
- Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers", 2024.
- Chen et al., "PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image Synthesis", 2024.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from discrete_lit.backbones import DenoisingNetwork, LatentLayout
from discrete_lit.backbones.condition import Condition, as_condition, check_parts
from discrete_lit.checkpoints import load, loadable
from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import at_least_float32, in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose, streams_of
from discrete_lit.diffusion.consistency import ConsistencyLoss, Teacher
from discrete_lit.diffusion.gaussian import (
    Estimate,
    GaussianDenoiser,
    GaussianPath,
    PredictionKind,
    ScheduledPath,
    SteppedPath,
)
from discrete_lit.diffusion.gaussian_losses import DenoisingLoss, TrainingTimes, variational_bound
from discrete_lit.diffusion.solvers import DDPM, ConsistencySampler, Euler
from discrete_lit.generators.generator import Likelihood
from discrete_lit.generators.latent_generator import LatentGenerator, LatentLosses
from discrete_lit.samplers.guided_solver import GuidedNetwork, GuidedSolver
from discrete_lit.samplers.sampler import SamplerOutput
from discrete_lit.tokenizers.tokenizer import ContinuousTokenizer

# How near the times of a likelihood come to 0 and to 1, where the noise or the data are nothing.
_NEAREST = 1e-3


@loadable
class LatentDiffusion(LatentGenerator):
    """Model the latents of a frozen continuous tokenizer, given a class or a text, by undoing Gaussian noise.

    A text is read by a network with a `context_dim`, as the vectors that `text_encoder` makes of it, or those of the
    batch's `"context"`.

    Args:
        tokenizer: frozen here; `discrete_lit.tokenizers.continuous_from_checkpoint` in a YAML, or `RawPixels`.
        image_size: of the images in pixels: the side of a square, or `[height, width]`.
        num_classes: labels lie in [0, num_classes); `num_classes` itself is the null label.
        backbone: called with the layout of the latents: `DiT` or `UNet`.
        denoiser: how the network's output is read, and the path of its noise; DiT's by default: the noise with a
            learned variance, on 1,000 linear steps.
        times: how times of training are drawn; uniformly by default.
        error_of: what the squared error is of, see `DenoisingLoss`.
        consistency: train a consistency function in place of a denoiser, for samples in one step or a few by
            `ConsistencySampler`; called with the denoiser, whose estimate of the data it is.
        teacher: the checkpoint of a trained model of the same kind, which a consistency function is distilled from and
            begins with the weights of (Song et al., "Consistency Models", 2023, algorithm 2); read when training
            starts. Without one it is trained on data alone (algorithm 3).
        teacher_guidance: guidance scale that the teacher is led by; what is distilled then draws guided without
            guidance of its own (Luo et al., "Latent Consistency Models", 2023, at one scale).
        time_input: what the network reads where the path is in continuous time: `"noise"`, time_scale x t, or `"data"`,
            time_scale x (1 - t), as networks whose authors count time from noise to data. On a path of steps it is the
            step's number.
        time_scale: 1 for SiT, 1,000 for most others.
        sampler: how `sample` draws where nothing else is asked for; by default 250 steps of DDPM, or of Euler in
            continuous time, without guidance; of a consistency function one step of `ConsistencySampler`.
        likelihood_steps: of the model whose bound `log_likelihood` is; a path of steps has its own at most.
        training: `check_scale` of `LatentGenerator`; `label_dropout`, `optimizer`, `scheduler`,
            `weight_decay_rule`, `seed` and `text_encoder` of `ClassConditionalTraining`.

    Raises:
        ValueError: a setting out of its range; latents that are no grid of two axes.
    """

    sampler_kind = GuidedSolver
    coordinate_name = "time"
    tokenizer: ContinuousTokenizer
    backbone: DenoisingNetwork

    def __init__(
        self,
        tokenizer: ContinuousTokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        backbone: Callable[[LatentLayout], DenoisingNetwork],
        denoiser: GaussianDenoiser | None = None,
        times: TrainingTimes | None = None,
        error_of: PredictionKind | None = None,
        consistency: Callable[[GaussianDenoiser], ConsistencyLoss] | None = None,
        teacher: str | None = None,
        teacher_guidance: float = 1.0,
        time_input: Literal["noise", "data"] = "noise",
        time_scale: float = 1000.0,
        sampler: GuidedSolver | None = None,
        likelihood_steps: int = 250,
        **training: Any,
    ) -> None:
        super().__init__(tokenizer, image_size, num_classes=num_classes, **training)
        if time_scale <= 0 or likelihood_steps < 1:
            raise ValueError(
                f"time_scale must be above 0 and likelihood_steps at least 1, got {time_scale} and {likelihood_steps}"
            )
        self.denoiser = denoiser or GaussianDenoiser(ScheduledPath(), learned_variance=True)
        self.objective = DenoisingLoss(self.denoiser, times=times, error_of=error_of)
        self.consistency = None if consistency is None else consistency(self.denoiser)
        if self.consistency is not None and error_of is not None:
            raise ValueError(f"error_of={error_of!r} is of the denoising loss, which consistency takes the place of")
        if teacher is not None and self.consistency is None:
            raise ValueError(f"teacher={teacher!r} is for distillation: give consistency=ConsistencyLoss too")
        if teacher_guidance < 0 or (teacher_guidance != 1 and teacher is None):
            raise ValueError(
                f"teacher_guidance={teacher_guidance} must be at least 0, and is of a teacher, got teacher={teacher!r}"
            )
        self.teacher = teacher
        self.teacher_guidance = teacher_guidance
        # In a list: it is no part of this model, nor of its checkpoints.
        self._read_teacher: list[LatentDiffusion] = []
        self.backbone = backbone(self.layout())
        self.time_input: Literal["noise", "data"] = time_input
        self.time_scale = time_scale
        path = self.denoiser.path
        if sampler is None and self.consistency is not None:
            sampler = GuidedSolver(ConsistencySampler(1))
        elif sampler is None:
            stepped = isinstance(path, SteppedPath)
            variance: Literal["learned", "smallest"] = "learned" if self.denoiser.learned_variance else "smallest"
            sampler = GuidedSolver(DDPM(min(250, path.steps), variance=variance) if stepped else Euler(250))
        self.sampler = sampler
        self.sampler.solver.times(path)  # refuses what the path does not have
        self.likelihood_steps = min(likelihood_steps, path.steps) if isinstance(path, SteppedPath) else likelihood_steps

    def layout(self) -> LatentLayout:
        """Describe the latents that the network is asked to read."""
        channels, height, width = self.latent_shape
        outputs = 2 * channels if self.denoiser.learned_variance else channels
        return LatentLayout(channels=channels, grid=(height, width), outputs=outputs, num_classes=self.num_classes)

    def given(self, condition: Condition) -> dict[str, Tensor]:
        """Return what the network reads beside the label, by its names: here the vectors of a text, if it reads any."""
        if condition.context is None:
            return {}
        return {"text": condition.context, "text_mask": condition.valid()}

    def losses(self, data: Tensor, condition: Condition, random: CounterRandom) -> LatentLosses:
        t = self.objective.times(random.uniform(Purpose.DIFFUSION_TIME, 1)[:, 0])
        noise = random.normal(Purpose.DIFFUSION_NOISE, data[0].numel()).to(data.dtype).view_as(data)
        given = self.given(condition)
        if self.consistency is not None:
            step = self.global_step if self.training else None
            predict = lambda x, t: self.backbone(x, self.network_time(t), condition.labels, **given)  # noqa: E731
            teacher = None if self.teacher is None else self._teacher_given(condition)
            error = self.consistency(predict, data, noise, t=t, step=step, teacher=teacher)
            return LatentLosses({"error": error}, t)
        x_t = self.denoiser.path.add_noise(data, noise, t)
        output = self.backbone(x_t, self.network_time(t), condition.labels, **given)
        return LatentLosses(self.objective(output, data, noise, x_t=x_t, t=t), t)

    def network_time(self, t: Tensor) -> Tensor:
        """Return times `(B,)` in the units that the network reads, float32."""
        path = self.denoiser.path
        if isinstance(path, SteppedPath):
            return path.network_time(t).round().float()
        return (self.time_scale * (t if self.time_input == "noise" else 1 - t)).float()

    # The teacher of a consistency function.

    def on_fit_start(self) -> None:
        """Begin with the teacher's weights, unless a run goes on from its own checkpoint.

        Raises:
            ValueError: a teacher that does not fit, see `check_teacher`.
        """
        if self.teacher is not None and self.trainer.ckpt_path is None:
            self.begin_with_teacher()

    def begin_with_teacher(self) -> None:
        """Take the weights of the teacher.

        Raises:
            ValueError: a teacher that does not fit.
        """
        teacher = self._teacher()
        try:
            for own, other in zip(self.trained_networks(), teacher.trained_networks(), strict=True):
                own.load_state_dict(other.state_dict())
        except RuntimeError as error:
            raise ValueError(f"teacher={self.teacher!r} has a network of other sizes: {error}") from error

    def _teacher(self) -> "LatentDiffusion":
        """The teacher, frozen, on the device of this model."""
        assert self.teacher is not None
        if not self._read_teacher:
            teacher = load(self.teacher)
            self.check_teacher(teacher)
            self._read_teacher.append(teacher.eval().requires_grad_(False))
        teacher = self._read_teacher[0]
        return teacher if teacher.device == self.device else teacher.to(self.device)

    def check_teacher(self, teacher: Any) -> None:
        """Refuse to distil what does not model these latents by undoing this noise.

        Raises:
            ValueError: another kind of model, other latents or classes, another path or prediction, or a consistency
                function.
        """
        name = f"teacher={self.teacher!r}"
        if type(teacher) is not type(self):
            raise ValueError(f"{name} holds a {type(teacher).__name__}, not a {type(self).__name__}")
        if self.text_transformer is not None or teacher.text_transformer is not None:
            raise ValueError(
                f"{name}: a text_transformer is not distilled; train both on the vectors of a text_encoder"
            )
        if teacher.consistency is not None:
            raise ValueError(f"{name} holds a consistency function: give the model before it")
        for part, own, other in (
            ("latents", self.latent_shape, teacher.latent_shape),
            ("number of classes", self.num_classes, teacher.num_classes),
            ("tokenizer", self.tokenizer.fingerprint(), teacher.tokenizer.fingerprint()),
            ("text encoder", *(each.text_encoder and each.text_encoder.fingerprint() for each in (self, teacher))),
            ("path; alpha and sigma", _law(self.denoiser.path), _law(teacher.denoiser.path)),
            ("prediction", self.denoiser.prediction, teacher.denoiser.prediction),  # its weights are the first ones
        ):
            if own != other:
                raise ValueError(f"{name} has another {part}: {other}, and this model {own}")
        if self.teacher_guidance != 1 and teacher.label_dropout == 0:
            raise ValueError(
                f"teacher_guidance={self.teacher_guidance} needs a teacher that learned the null label; {name} was "
                "trained with label_dropout=0"
            )

    def _teacher_given(self, condition: Condition) -> Teacher:
        """Make the teacher's prediction from noisy latents, given what this model is given."""
        teacher = self._teacher()
        with torch.no_grad():
            null = condition.null(null_label=teacher.num_classes, null_id=teacher.null_id)
            network = GuidedNetwork(
                teacher.backbone,
                condition.labels,
                denoiser=teacher.denoiser,
                network_time=teacher.network_time,
                given=teacher.given(condition),
                null=None if self.teacher_guidance == 1 else teacher.given(null),
                null_labels=null.labels,
            )
        return lambda x, t: teacher.denoiser(network.output(x, t, self.teacher_guidance), x, t)

    # The likelihood.

    @torch.no_grad()
    @in_evaluation
    def log_likelihood(
        self, latents: Tensor, condition: Condition | Tensor, *, indices: Tensor | None = None
    ) -> Likelihood:
        """Estimate a lower bound of the log density of latents, in nats: the variational bound of DDPM (eq. 5)."""
        self.check_latents(latents)
        random, data = streams_of(latents, seed=self.seed, indices=indices), at_least_float32(latents)
        if self.consistency is not None:
            raise ValueError("a consistency function draws by jumps, and has no density: measure the model before it")
        path, guide = self.denoiser.path, self._network(as_condition(condition))

        def denoise(x: Tensor, t: float) -> Estimate:
            return guide(x, t, 1.0)

        bound = variational_bound(
            denoise,
            data,
            path=path,
            times=self._likelihood_times(),
            noise=lambda step: random.normal(Purpose.LIKELIHOOD, data[0].numel(), step).to(data.dtype).view_as(data),
            variance="learned" if self.denoiser.learned_variance else "largest",
        )
        return Likelihood(-bound, "bound")

    def _likelihood_times(self) -> list[float]:
        """List falling times above 0: steps of a path of steps, or those of `times_of_a_bound`."""
        path = self.denoiser.path
        if isinstance(path, SteppedPath):
            return DDPM(self.likelihood_steps).times(path)[:-1]
        return times_of_a_bound(self.likelihood_steps)

    # Sampling.

    @torch.no_grad()
    @in_evaluation
    def draw(
        self, labels: Condition | Tensor, random: CounterRandom, sampler: GuidedSolver | None = None
    ) -> SamplerOutput:
        sampler, condition = sampler or cast(GuidedSolver, self.sampler), as_condition(labels)
        self.check_draw(condition.labels, sampler.guidance_scale)
        check_parts(condition, places=0, grid_vocab=None, context_dim=self.backbone.context_dim)
        return self.draw_given(replace(condition, labels=condition.labels.long()), random, sampler)

    def draw_given(
        self,
        condition: Condition,
        random: CounterRandom,
        sampler: GuidedSolver,
        *,
        purposes: tuple[Purpose, Purpose] = (Purpose.DIFFUSION_START, Purpose.DIFFUSION_STEP),
        trace: bool = False,
    ) -> SamplerOutput:
        """Draw latents given all that the network reads; arguments as of `GuidedSolver`."""
        null = condition.null(null_label=self.num_classes, null_id=self.null_id)
        return sampler(
            self.backbone,
            condition.labels,
            random,
            denoiser=self.denoiser,
            network_time=self.network_time,
            given=self.given(condition),
            null=None if sampler.guidance_scale == 1 else self.given(null),
            null_labels=null.labels,
            purposes=purposes,
            trace=trace,
        )

    def _network(self, condition: Condition) -> GuidedNetwork:
        return GuidedNetwork(
            self.backbone,
            condition.labels,
            denoiser=self.denoiser,
            network_time=self.network_time,
            given=self.given(condition),
        )


def times_of_a_bound(steps: int) -> list[float]:
    """List falling times of a path in continuous time such that the noise falls evenly in its logarithm.

    Even times would leave a gap near 0, where the ratio of noise to data halves in a step however many there are.
    """
    end = torch.logit(torch.tensor(1 - _NEAREST, dtype=torch.float64)).item()
    return torch.sigmoid(torch.linspace(end, -end, steps, dtype=torch.float64)).tolist()


def _law(path: GaussianPath) -> list[list[float]]:
    """The alpha and sigma of a path at a few times, to compare paths by."""
    times = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return torch.stack((path.alpha(times), path.sigma(times))).float().tolist()
