"""TokenBridge's sampler: masked autoregression over places, and over the channels of each (Wang et al., 2025).

The places are drawn as by MAR: several in each pass of the network, in an order of its own for each image.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from discrete_lit.backbones.channel_head import ChannelHead
from discrete_lit.backbones.masked_autoencoder import MaskedAutoencoder
from discrete_lit.core.modules import evaluation_mode
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.core.synchronisation import checked_at_the_end
from discrete_lit.diffusion import MaskSchedule
from discrete_lit.samplers.categorical import draw_filtered
from discrete_lit.samplers.masked_places import GuidanceOfPasses, MaskedPlaceSampler, Order
from discrete_lit.samplers.sampler import SamplerOutput


class DimensionwiseSampler(MaskedPlaceSampler):
    """Draw the ids of an image in T passes of the network, several places at once, the channels of each in turn.

    After pass i, `floor(N m(1 - (i + 1) / T))` places are still masked; which come next is drawn for each image. The
    places of one pass are drawn independently given what was known before it.

    Guidance acts on the hidden states, `uncond + s (cond - uncond)`, so that the head runs once (TokenBridge).

    Args:
        steps: T, from 1 to N; TokenBridge has 256, which is N.
        temperature: divides the logits of the head, > 0.
        top_k: keep the k most probable ids, >= 1; all by default. 1 is the greedy choice.
        top_p: keep the nucleus of this probability mass, in (0, 1]; all by default.
        guidance_scale: s; 1 is off.
        guidance_schedule: `"known"`: 1 + (s - 1) times the share of places that are known after the pass (TokenBridge's
            "linear"), or `"constant"`.
        order: `"random"`, another one for each image, or `"raster"`.
        mask_schedule: m; the cosine by default.

    Raises:
        ValueError: a setting out of its range; in use, more steps than places.
    """

    def __init__(
        self,
        steps: int = 64,
        temperature: float = 1.0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        guidance_schedule: GuidanceOfPasses = "known",
        order: Order = "random",
        mask_schedule: MaskSchedule | None = None,
    ) -> None:
        super().__init__(
            steps,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            order=order,
            mask_schedule=mask_schedule,
        )
        if temperature <= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise ValueError(
                "temperature must be above 0 (top_k=1 is the greedy choice), top_k at least 1 and top_p in (0, 1], got "
                f"{temperature}, {top_k} and {top_p}"
            )
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p

    def choose(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Draw an id `(M,)` from each row of logits `(M, B)` by its uniform number `(M,)`."""
        return draw_filtered(logits / self.temperature, uniforms, self.top_k, self.top_p)[0]

    @torch.no_grad()
    def __call__(
        self,
        network: MaskedAutoencoder,
        head: ChannelHead,
        labels: Tensor,
        random: CounterRandom,
        *,
        lookup: Callable[[Tensor], Tensor],
    ) -> SamplerOutput:
        """Draw the ids of one image for each label.

        Args:
            network: makes the hidden states; in eval mode here, and left in its own.
            head: draws the ids of each.
            labels: `(B,)` int64 in [0, num_classes].
            random: one stream for each image, which alone decides what is drawn.
            lookup: from ids to the numbers that they stand for, which the network reads.

        Returns:
            The output, with ids `(B, N, D)` int64 in raster order as its `tokens`.

        Raises:
            ValueError: more steps than places; logits that are NaN, which is told at the end of the draw.
        """
        layout, channels = network.layout, head.layout.channels
        drawn = labels.new_zeros((len(labels), layout.length, channels))
        made: list[tuple[int, int, int]] = []  # evaluations for each image, places known and places drawn of each pass
        with evaluation_mode(network), evaluation_mode(head), checked_at_the_end():
            for turn in self.passes(random, layout.length):
                rows = turn.rows
                labels_here = (
                    torch.cat((labels, torch.full_like(labels, layout.num_classes))) if turn.guided else labels
                )
                hidden = network(
                    lookup(drawn).repeat(rows, 1, 1), turn.masked.repeat(rows, 1), labels_here, known=turn.known
                )
                z = turn.take(hidden)
                if turn.guided:
                    conditional, unconditional = z.chunk(2)
                    z = torch.lerp(unconditional, conditional, turn.guidance_scale)
                uniforms = random.uniform(Purpose.TOKEN, turn.count * channels, turn.step).view(-1, channels)
                new = head.sample(z.flatten(0, 1), uniforms, self.choose)
                drawn = turn.put(drawn, new.view(-1, turn.count, channels))
                made.append((rows, turn.known, turn.count))
        return SamplerOutput(
            tokens=drawn,
            network_calls=sum(rows for rows, *_ in made),
            sequential_passes=len(made),
            count_flops=partial(_flops, network, head, made),
        )


def _flops(network: MaskedAutoencoder, head: ChannelHead, made: list[tuple[int, int, int]]) -> int:
    """Floating-point operations for an image: of each pass of the network, and of the head at the places it draws."""
    return sum(network.flops(evaluations, known) + head.flops(drawn) for evaluations, known, drawn in made)
