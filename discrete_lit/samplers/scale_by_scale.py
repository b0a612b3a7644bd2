"""VAR's sampler: next-scale prediction on a key-value cache (Tian et al., "Visual Autoregressive Modeling", 2024)."""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.core.random import Purpose
from discrete_lit.samplers.guidance import GuidanceSchedule, guided_steps
from discrete_lit.samplers.sampler import CachedDecoder, Sampler, SamplingContext, ScaleQuantizer


class NextScaleSampler(Sampler):
    """Sample scale by scale, all tokens of a scale at once given the scales before: one pass for each scale.

    The next scale's input is f_hat, the sum of what the scales before contribute, averaged down to it. Known tokens may
    stand anywhere: they replace what is drawn at their scale. Where they are whole first scales, the rest follows its
    exact conditional law; elsewhere this is VAR's zero-shot in-painting, in which a drawn token does not see those
    given at its own or later scales.

    Args:
        guidance_scale: at the last scale; 1 plus VAR's `cfg`.
        guidance_schedule: over the scales; by default 1 + cfg i / (S - 1) at scale i of S, from 0.
        settings: of `Sampler`; VAR is published with `top_k=900`, then `top_p=0.96`, and `guidance_scale=2.5`.

    Raises:
        ValueError: a setting out of its range; in use, no quantizer, or one of other scales.
    """

    attention = "block_causal"

    def __init__(
        self, guidance_scale: float = 1.0, guidance_schedule: GuidanceSchedule = "scale_linear", **settings: Any
    ) -> None:
        super().__init__(guidance_scale=guidance_scale, guidance_schedule=guidance_schedule, **settings)

    def draw(self, context: SamplingContext) -> Tensor:
        layout, lengths, quantizer = context.layout, context.layout.scales, checked_quantizer(context)
        scales = self.scales(len(lengths))
        decoder = CachedDecoder(context, guided_steps(scales))
        uniforms = context.random.uniform(Purpose.TOKEN, layout.length)
        tokens = context.start()
        known = tokens != layout.mask_id
        # The first scale is predicted from the label alone.
        inputs, f_hat = uniforms.new_zeros(len(tokens), 0, quantizer.dim), 0.0
        start = 0
        for number, count in enumerate(lengths):
            here = slice(start, start + count)
            logits = decoder.guide(decoder(inputs, number), scales[number])  # (B, s^2, K)
            drawn, log_probability = self.choose(logits, uniforms[:, here])
            tokens[:, here] = torch.where(known[:, here], tokens[:, here], drawn)
            if context.traced:
                confidence = torch.full(tokens.shape, torch.nan, dtype=torch.float64, device=tokens.device)
                confidence[:, here] = log_probability.double().masked_fill(known[:, here], torch.nan)
                context.record(tokens, confidence)
            start += count
            if number + 1 < len(lengths):
                with torch.autocast(tokens.device.type, enabled=False):
                    f_hat = f_hat + quantizer.contribution(number, tokens[:, here])
                    inputs = quantizer.at_scale(number + 1, f_hat)
        return tokens


def checked_quantizer(context: SamplingContext) -> ScaleQuantizer:
    """The tokenizer's quantizer, which makes the input of each next scale.

    Raises:
        ValueError: none was given, or one of other scales, width or ids than the generator's.
    """
    layout, quantizer = context.layout, context.quantizer
    if quantizer is None:
        raise ValueError("NextScaleSampler makes the next scale's input with the tokenizer's quantizer: give quantizer")
    theirs = (tuple(quantizer.lengths), quantizer.dim, quantizer.vocab_size)
    ours = (tuple(layout.scales), layout.input_dim, layout.vocab_size)
    if theirs != ours:
        raise ValueError(
            "the quantizer is of another tokenizer: its tokens of each scale, width and ids are "
            f"{theirs}, the generator's {ours}"
        )
    return quantizer
