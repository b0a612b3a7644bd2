"""The exact sampler of absorbing processes (Zheng et al., "Masked Diffusion Models are Secretly Time-Agnostic Masked
Models and Exploit Inaccurate Categorical Sampling", ICLR 2025).
"""

import torch
from torch import Tensor

from discrete_lit.processes import Purpose
from discrete_lit.processes.noise_level import NoiseLevel
from discrete_lit.processes.reverse import is_absorbing
from discrete_lit.samplers.drawing import Drawing
from discrete_lit.samplers.prediction import Prediction
from discrete_lit.samplers.sampler import Sampler
from discrete_lit.samplers.trajectory import Trajectory, denoiser_of


class FirstHittingSampler(Sampler):
    """Goes from one reveal to the next: one token, and one network evaluation, at a time.

    With n tokens masked at the mask probability m the next is revealed at `m U^(1 / n)`, U uniform, and is equally
    likely to be any of them. Nothing is left to discretise: where the network's conditionals are those of one law, the
    samples follow it. The guidance is that of the clean law; r of its schedules is n / N at reveal n from 0.

    Args:
        settings: of `Sampler`.

    Raises:
        ValueError: in use, a generator whose noise does more than mask, guidance on a model without classes, or logits
            that are no numbers.
    """

    attention = "bidirectional"

    def draw(self, drawing: Drawing) -> Tensor:
        denoiser = denoiser_of(drawing, self)
        if not is_absorbing(denoiser.process):
            raise ValueError(
                "FirstHittingSampler reveals masked tokens, the process must be absorbing: "
                f"{type(denoiser.process).__name__} is not"
            )
        schedule, length = denoiser.schedule, drawing.layout.length
        scales = self.scales(length)
        start = NoiseLevel.at(schedule, torch.ones(len(drawing.labels), 1, device=drawing.labels.device))
        trajectory = Trajectory(drawing, denoiser, start)
        lowest = schedule.mask_probability(start.t.new_zeros(()))
        mask_probability = start.noise
        order = drawing.random.uniform(Purpose.ORDER, length).masked_fill(trajectory.fixed, 2.0)
        rank = order.argsort(dim=1).argsort(dim=1)
        masked = trajectory.masked.sum(dim=1, keepdim=True)
        hits = drawing.random.uniform(Purpose.CONFIDENCE, length)
        uniforms = drawing.random.uniform(Purpose.TOKEN, length)
        for number in range(int(masked.max()) if masked.numel() else 0):
            left = (masked - number).clamp(min=1)
            mask_probability = mask_probability * hits[:, number : number + 1] ** (1 / left)
            level = NoiseLevel.at(schedule, schedule.inverse(mask_probability.clamp(min=lowest)))
            prediction = Prediction.of(drawing, denoiser, trajectory.states, level, scales[number])
            here = trajectory.masked & (rank == number)
            ids, log_probability = self.choose(prediction.clean()[here], uniforms[here])
            values = torch.zeros_like(uniforms).masked_scatter(here, log_probability.double())
            trajectory.move(here, trajectory.states.masked_scatter(here, ids), values)
        return trajectory.states
