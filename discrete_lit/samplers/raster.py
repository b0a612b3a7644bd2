"""Token after token in the generator's order, with a key-value cache."""

import torch
from torch import Tensor

from discrete_lit.backbones import Backbone
from discrete_lit.processes import CounterRandom, Purpose
from discrete_lit.samplers.guidance import guide
from discrete_lit.samplers.sampler import Sampler, SamplerOutput


class RasterSampler(Sampler):
    """Ancestral sampling of an autoregressive generator: N single-token passes. Settings as in `Sampler`."""

    attention = "causal"

    def draw(self, backbone: Backbone, labels: Tensor, random: CounterRandom) -> SamplerOutput:
        batch, length, null = len(labels), backbone.layout.length, backbone.layout.null_label
        scales = [self.scale_at(place / length) for place in range(length)]
        # The null rows' cache must be filled from the first token on, also where the scale is still 1.
        guided = any(scale != 1 for scale in scales)
        if guided:
            labels = torch.cat((labels, torch.full_like(labels, null)))
        cache = backbone.new_cache(labels)
        uniforms = random.uniform(Purpose.TOKEN, length)
        tokens = labels.new_empty(batch, length)
        for place, scale in enumerate(scales):
            previous = tokens[:, max(0, place - 1) : place]  # (B, 1), and (B, 0) before the first token
            # (B, 1, K), or (2B, 1, K) guided
            logits = backbone(previous.repeat(2, 1) if guided else previous, labels, cache)
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = guide(conditional, unconditional, scale)
            tokens[:, place : place + 1], _ = self.choose(logits, uniforms[:, place : place + 1])
        return SamplerOutput(tokens, network_calls=length * (1 + guided), sequential_passes=length)
