"""Discrete diffusion: any noise, schedule, head and loss around the one backbone."""

from collections.abc import Callable
from math import log
from typing import Any, Literal

import torch
from torch import Tensor

from discrete_lit.backbones import Backbone, SequenceLayout
from discrete_lit.core.distributed import world_size
from discrete_lit.core.random import CounterRandom, Purpose
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
from discrete_lit.diffusion.losses import DiffusionLoss, LossKind, MaskedCrossEntropy
from discrete_lit.diffusion.parameterization import TimeInput
from discrete_lit.diffusion.processes import is_absorbing
from discrete_lit.diffusion.schedules import NoiseLevel, spread_times, stratified_times
from discrete_lit.generators.generator import Generator, Likelihood, TokenLosses
from discrete_lit.samplers import AncestralSampler, Sampler
from discrete_lit.tokenizers.tokenizer import Tokenizer


class DiscreteDiffusion(Generator):
    """Learns to undo noise that changes each token independently of the others.

    D3PM (Austin et al., 2021), SEDD (Lou et al., 2024), MDLM (Sahoo et al., 2024), MD4 (Shi et al., 2024), UDLM (Schiff
    et al., 2024), GIDD (von Rütte et al., 2025) and discrete flow matching (Gat et al., 2024) are choices of `process`,
    `schedule`, `head` and `loss`. Losses are nats per token; times are spread evenly over the global batch. Where the
    loss is a bound, validation logs it as `validation/bits_per_token` too, which of text is bits per character.

    Args:
        tokenizer: frozen here; `discrete_lit.tokenizers.from_checkpoint` in a YAML.
        image_size: side of the images in pixels.
        num_classes: labels lie in [0, num_classes).
        backbone: called with the `SequenceLayout`.
        process: called with the vocabulary K; masks by default.
        schedule: of training; `LinearSchedule()` by default. Samplers have their grids.
        head: what the backbone predicts; `LeaveOneOutHead()` by default.
        loss: `MaskedCrossEntropy()` by default; see `objective_kind`.
        time_input: what the backbone is told of the time: nothing, 1000 t or the total noise. By default nothing where
            noise only masks, whose best prediction does not depend on it, and else t.
        sampler: `AncestralSampler()` by default. Those of `Masked` serve too where noise only masks.
        likelihood_samples: network evaluations for each `log_likelihood`.
        training: of `Generator`: label_dropout, optimizer, scheduler, seed.

    Raises:
        ValueError: parts that do not fit together, or a setting out of its range.
    """

    coordinate_name = "time"

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: int,
        num_classes: int,
        backbone: Callable[[SequenceLayout], Backbone],
        process: Callable[[int], ForwardProcess] = AbsorbingProcess,
        schedule: MaskSchedule | None = None,
        head: Head | None = None,
        loss: DiffusionLoss | None = None,
        time_input: TimeInput | None = None,
        sampler: Sampler | None = None,
        likelihood_samples: int = 16,
        **training: Any,
    ) -> None:
        if likelihood_samples < 1:
            raise ValueError(f"likelihood_samples must be at least 1, got {likelihood_samples}")
        noise = process(tokenizer.vocab_size)
        if noise.needs_order and not tokenizer.ordered_ids:
            raise ValueError(
                f"{type(noise).__name__} moves ids to their neighbours, and those of {type(tokenizer).__name__} have "
                "no order: it is for grey levels (PixelLevels)"
            )
        schedule, head, objective = (
            schedule or LinearSchedule(),
            head or LeaveOneOutHead(),
            loss or MaskedCrossEntropy(),
        )
        objective.check(head, noise)
        if time_input is None:
            time_input = "none" if is_absorbing(noise) else "time"
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
            num_classes,
            layout,
            backbone,
            sampler or AncestralSampler(),
            **training,
        )
        self.objective = objective
        self.likelihood_samples = likelihood_samples
        self._denoiser = Denoiser(noise, schedule, head, time_input)

    @property
    def objective_kind(self) -> LossKind:
        """Whether the training loss bounds -log p with this process and schedule, the prior's constant aside."""
        return self.objective.label(self._denoiser.process, self._denoiser.schedule)

    def denoiser(self) -> Denoiser:
        return self._denoiser

    def token_losses(self, tokens: Tensor, labels: Tensor, random: CounterRandom) -> TokenLosses:
        parts = self._denoiser
        times = stratified_times(random, len(tokens) * world_size()) if self.training else spread_times(random)
        level = self.objective.level(parts.schedule, times, self.length)
        uniforms = random.uniform(Purpose.MASK_ORDER, self.length)
        states = self.objective.corrupt(parts.process, tokens, level, uniforms)
        logits = self._logits(states, labels, level)
        values = self.objective(logits, parts.head, tokens, states, parts.process, level)
        return TokenLosses(values, torch.ones_like(values), level.t.expand_as(values))

    def on_validation_epoch_end(self) -> None:
        total, weight = self.profile.compute()
        super().on_validation_epoch_end()
        if self.objective_kind == "bound":
            # What the loss leaves out, of the id for which it is most.
            process, end = self._denoiser.process, torch.ones(1, 1, dtype=torch.float64, device=total.device)
            ids = torch.arange(self.vocab_size, device=total.device)[None]
            prior = process.prior_divergence(ids, self._denoiser.schedule.alpha(end)).max()
            bits = (total.sum() / weight.sum() + prior) / log(2)
            self.log("validation/bits_per_token", bits.float(), sync_dist=True)

    @torch.no_grad()
    def log_likelihood(
        self,
        tokens: Tensor,
        labels: Tensor,
        indices: Tensor | None = None,
        method: Literal["mask_count", "mask_ratio", "enumeration"] = "mask_count",
    ) -> Likelihood:
        """An estimate of a bound of log p that no cut-off makes too high, or the exact value of a small model.

        Where noise only masks, the mean over the number of masked tokens or over their share; for other noise the
        integral over the training schedule, its ends included, whatever `method`. See `likelihood_bound`.

        Args:
            tokens: `(B, *token_shape)` int64 in [0, K).
            labels: `(B,)` int64 in [0, num_classes].
            indices: `(B,)` int64, each image's place in its data set, to which the estimate's random numbers belong; 0
                to B - 1 by default.
            method: `"enumeration"` is exact for revealing one token at a time, with 2^N passes; N at most 12.

        Raises:
            ValueError: an enumeration that is too long, or of a process that does more than mask.
        """
        sequences = self.to_sequence(tokens)

        def network(states: Tensor, level: NoiseLevel) -> Tensor:
            return self._logits(states, labels, level)

        if method == "enumeration":
            return Likelihood(enumerated_log_likelihood(network, self._denoiser, sequences), "exact")
        if indices is None:
            indices = torch.arange(len(tokens), device=tokens.device)
        random = CounterRandom(self.seed, indices)
        nats, error = likelihood_bound(network, self._denoiser, sequences, random, self.likelihood_samples, method)
        return Likelihood(nats, "bound", error)

    def _logits(self, states: Tensor, labels: Tensor, level: NoiseLevel) -> Tensor:
        return self.backbone(states, labels, time=self._denoiser.network_time(level))
