"""Sampling of delayed codes (MusicGen: Copet et al., "Simple and Controllable Music Generation", 2023, section 2.2)."""

from torch import Tensor, where

from discrete_lit.backbones.delay_pattern import DelayPattern
from discrete_lit.core.random import Purpose
from discrete_lit.samplers.guidance import guided_steps
from discrete_lit.samplers.sampler import CachedDecoder, Sampler, SamplingContext


class DelaySampler(Sampler):
    """Sample the codes of all books together, position by position of the delay pattern: T + K - 1 passes.

    Known frames must come first: the model then continues a prefix. The first code of the frame behind it is drawn
    before the last codes of the prefix are read, which stand later in the sequence: so it is for every delay.

    Args:
        settings: of `Sampler`; steps of the guidance are positions. MusicGen's are `top_k=250` and
            `guidance_scale=3`.

    Raises:
        ValueError: in use, a generator without delays, or known frames that are no prefix.
    """

    attention = "causal"

    def draw(self, context: SamplingContext) -> Tensor:
        layout = context.layout
        if not layout.delays:
            raise ValueError("DelaySampler draws the delayed codes of a DelayedAutoregressive; this generator has none")
        books, positions = layout.sub_tokens, layout.positions
        pattern = DelayPattern(positions - max(layout.delays), layout.delays)
        present = pattern.present(context.labels.device)
        scales = self.scales(positions)
        uniforms = context.random.uniform(Purpose.TOKEN, positions * books).unflatten(1, (positions, books))
        decoder = CachedDecoder(context, guided_steps(scales))

        tokens = context.start()  # (B, positions * K), the mask id where nothing is known
        known = (tokens != layout.mask_id).unflatten(1, (positions, books))
        read = 0
        for position in range(_first_unknown(context, pattern, known, present), positions):
            logits = decoder(tokens[:, read * books : position * books], position)[:, -books:]  # (B, K, vocabulary)
            read = position
            drawn, _ = self.choose(decoder.guide(logits, scales[position]), uniforms[:, position])
            kept = known[:, position] | ~present[position]
            here = slice(position * books, (position + 1) * books)
            tokens[:, here] = where(kept, tokens[:, here], drawn)
            if context.traced:
                context.record(tokens, uniforms.new_full(tokens.shape, float("nan")))
        return tokens


def _first_unknown(context: SamplingContext, pattern: DelayPattern, known: Tensor, present: Tensor) -> int:
    """Find the first position with a code that is to be drawn.

    Raises:
        ValueError: known codes that are not all of the first frames.
    """
    if context.known is None:
        return 0
    frames = pattern.codes(known)  # (B, T, K)
    whole = frames.all(dim=-1)
    if bool((frames.any(dim=-1) & ~whole).any()) or bool((whole[:, 1:] & ~whole[:, :-1]).any()):
        raise ValueError(
            "known must be all codes of the first frames (a prefix): what is drawn cannot depend on later ones"
        )
    missing = (present & ~known).any(dim=-1).any(dim=0).nonzero()
    return int(missing[0, 0]) if len(missing) else pattern.positions
