"""Discrete diffusion of tokens: any noise, schedule, parameterization and loss around the one backbone.

One class is D3PM (absorbing, uniform or discretised Gaussian noise; Austin et al., 2021), VQ-Diffusion (Gu et al.,
2022), SEDD (Lou et al., 2024), MDLM (Sahoo et al., 2024), MD4 (Shi et al., 2024), UDLM (Schiff et al., 2024), GIDD (von
Rütte et al., 2025) and discrete flow matching (Gat et al., 2024). Their mathematics is in `discrete_lit.diffusion`, and
their recipes choose from it.
"""

from collections.abc import Callable
from math import log
from typing import Any, Literal

import torch
from torch import Tensor

from discrete_lit.backbones import SequenceLayout
from discrete_lit.backbones.condition import Condition
from discrete_lit.core.distributed import world_size
from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose, streams_of
from discrete_lit.diffusion import (
    AbsorbingProcess,
    Denoiser,
    ForwardProcess,
    Head,
    LeaveOneOutHead,
    LinearSchedule,
    MaskSchedule,
)
from discrete_lit.diffusion.likelihood import enumerated_log_likelihood, likelihood_bound
from discrete_lit.diffusion.losses import DiffusionLoss, DiscreteTimeBound, LossKind, MaskedCrossEntropy
from discrete_lit.diffusion.noise_level import (
    NoiseLevel,
    spread_times,
    stratified_times,
)
from discrete_lit.diffusion.parameterization import TimeInput
from discrete_lit.diffusion.processes import is_absorbing
from discrete_lit.generators.generator import Generator, Likelihood, TokenLosses
from discrete_lit.samplers import AncestralSampler, Sampler
from discrete_lit.tokenizers.tokenizer import Tokenizer


class DiscreteDiffusion(Generator):
    """Learns to undo noise that changes each token independently of the others.

    A time t in (0, 1) is drawn for each sequence x_0, evenly spread over the batch of a step; `process` and `schedule`
    draw x_t from q(x_t | x_0); the backbone sees x_t, and `time_input` of t; `head` says what its logits predict, and
    `loss` what the prediction costs, in nats per token. Where the loss is a bound of -log p (`objective_kind`),
    validation also logs it as `validation/bits_per_token`, the prior term included; of text, bits per character.

    Arguments that are not listed are those of every `Generator`.

    Args:
        process: the noise, called with the vocabulary K; masks (absorbing) by default.
        schedule: alpha(t) of training; `LinearSchedule()` by default. Samplers have grids of their own.
        head: what the backbone predicts; `LeaveOneOutHead()` by default.
        loss: `MaskedCrossEntropy()` by default.
        time_input: what the backbone is told of the time: nothing, 1000 t (`"time"`), t itself (`"unit_time"`) or the
            total noise. By default nothing where noise only masks, whose best prediction does not depend on it, and
            else 1000 t.
        likelihood_samples: network evaluations for each `log_likelihood`; a quarter more where noise does more than
            mask and the schedule's m(0) is above 0.
        sampler: `AncestralSampler()` by default. Samplers of `Masked` serve too where noise only masks.
        common: `backbone`, `label_dropout`, `gradient_of`, `optimizer`, `scheduler`, `weight_decay_rule` and `seed` of
            every generator.

    Raises:
        ValueError: choices that do not fit together, or a setting out of its range.
    """

    coordinate_name = "time"

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        process: Callable[[int], ForwardProcess] = AbsorbingProcess,
        schedule: MaskSchedule | None = None,
        head: Head | None = None,
        loss: DiffusionLoss | None = None,
        time_input: TimeInput | None = None,
        likelihood_samples: int = 16,
        sampler: Sampler | None = None,
        **common: Any,
    ) -> None:
        if likelihood_samples < 1:
            raise ValueError(f"likelihood_samples must be at least 1, got {likelihood_samples}")
        noise = process(tokenizer.vocab_size)
        schedule = schedule or LinearSchedule()
        head = head or LeaveOneOutHead()
        objective = loss or MaskedCrossEntropy()
        if time_input is None:
            time_input = "none" if is_absorbing(noise) else "time"
        if noise.needs_order and not tokenizer.ordered_ids:
            raise ValueError(
                f"{type(noise).__name__} moves ids to their neighbours, and those of {type(tokenizer).__name__} have "
                "no order: it is for grey levels (PixelLevels)"
            )
        objective.check(head, noise)
        if time_input == "total_noise" and schedule.ends()[1] == 1:
            raise ValueError(
                f"time_input='total_noise' needs a schedule whose total noise is finite, that of "
                f"{type(schedule).__name__} is not: use LogLinearSchedule or another with an epsilon, or 'time'"
            )
        layout = SequenceLayout(
            tokenizer.vocab_size,
            tokenizer.token_shape(image_size),
            num_classes=num_classes,
            attention="bidirectional",
            mask_token=noise.masks,
            timed=time_input != "none",
            mask_output=head.mask_output,
        )
        super().__init__(
            tokenizer,
            image_size,
            num_classes=num_classes,
            layout=layout,
            sampler=sampler or AncestralSampler(),
            **common,
        )
        if getattr(self.backbone, "norm_tables", None) is not None and time_input != "time":
            raise ValueError(
                f"conditioning='adaln_tables' has rows for the steps of the time: time_input must be 'time', got "
                f"{time_input!r}"
            )
        self.objective = objective
        self.importance = objective.importance
        self.likelihood_samples = likelihood_samples
        self._denoiser = Denoiser(process=noise, schedule=schedule, head=head, time_input=time_input)

    def token_losses(self, tokens: Tensor, condition: Condition | Tensor, random: CounterRandom) -> TokenLosses:
        process, schedule, head = self._denoiser.process, self._denoiser.schedule, self._denoiser.head
        joint = len(tokens) * world_size() * self.micro_batches
        t = stratified_times(random, joint) if self.training else spread_times(random)  # (B, 1)
        level = self.objective.level(schedule, t, self.length)
        x_t = self.objective.corrupt(process, tokens, level, random.uniform(Purpose.MASK_ORDER, self.length))
        logits = self._logits(x_t, condition, level)
        values = self.objective(logits, tokens=tokens, head=head, states=x_t, process=process, level=level)
        if self.training:
            self.objective.end_batch()
        values = values.to(logits.dtype)
        return TokenLosses(values, torch.ones_like(values), level.t.expand_as(values))

    def _logits(self, states: Tensor, condition: Condition | Tensor, level: NoiseLevel) -> Tensor:
        """Return the backbone's output for noisy states `(B, N)`: `(B, N, K)`, or one more with the mask's."""
        return self.backbone(states, condition, time=self._denoiser.network_time(level))

    @property
    def objective_kind(self) -> LossKind:
        """Whether the training loss bounds -log p with this process and schedule, the prior's constant aside."""
        return self.objective.label(self._denoiser.process, self._denoiser.schedule)

    def validation_figures(self, mean_loss: Tensor) -> dict[str, Tensor]:
        """Give the bits per token that a bound amounts to; nothing where the loss is no bound."""
        if self.objective_kind != "bound":
            return {}
        # The loss leaves the prior's divergence at t = 1 out: count it as for the id for which it is most.
        end = torch.ones(1, 1, dtype=torch.float64, device=mean_loss.device)
        ids = torch.arange(self.vocab_size, device=mean_loss.device)[None]
        prior = self._denoiser.process.prior_divergence(ids, self._denoiser.schedule.alpha(end)).max()
        return {"bits_per_token": (mean_loss + prior) / log(2)}

    @torch.no_grad()
    @in_evaluation
    def log_likelihood(
        self,
        tokens: Tensor,
        condition: Condition | Tensor,
        *,
        indices: Tensor | None = None,
        method: Literal["mask_count", "mask_ratio", "enumeration"] = "mask_count",
    ) -> Likelihood:
        """Estimate a bound of log p that no cut-off makes too high, or give the exact value of a small model.

        Where noise only masks, the bound is a mean over the number of masked tokens, or over the mask ratio. For other
        noise it is the integral over the training schedule, its ends included, whatever `method`; for noise of T steps
        (`MaskAndReplaceProcess`) the sum over these. See `likelihood_bound`.

        Args:
            tokens: `(B, *token_shape)` int64 in [0, K).
            condition: labels `(B,)` int64 in [0, num_classes], or all that the generator is given.
            indices: `(B,)` int64, each image's position in its data set, to which the estimate's random numbers
                belong; 0 to B - 1 by default.
            method: what the mean is over; or `"enumeration"`, exact for unmasking one token at a time, with 2^N passes
                and N at most 12.

        Raises:
            ValueError: an enumeration that is too long, or of a process that does more than mask.
        """
        sequences = self.to_sequence(tokens)

        def network(states: Tensor, level: NoiseLevel) -> Tensor:
            return self._logits(states, condition, level)

        if method == "enumeration":
            return Likelihood(enumerated_log_likelihood(network, self._denoiser, sequences), "exact")
        random = streams_of(tokens, seed=self.seed, indices=indices)
        # Noise without rates is that of a model of so many steps.
        rates, loss = self._denoiser.process.homogeneous, self.objective
        steps = loss.steps if isinstance(loss, DiscreteTimeBound) and not rates else None
        nats, error = likelihood_bound(
            network, self._denoiser, sequences, random, self.likelihood_samples, method, steps
        )
        return Likelihood(nats, "bound", error)

    def denoiser(self) -> Denoiser:
        return self._denoiser
