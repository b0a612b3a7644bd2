"""Infinity: bitwise next-scale prediction (Han et al., "Infinity: Scaling Bitwise AutoRegressive Modeling", 2024)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from discrete_lit.backbones import SequenceLayout
from discrete_lit.backbones.condition import Condition
from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.generators.generator import Generator, Likelihood, TokenLosses, cross_entropies
from discrete_lit.samplers import NextScaleSampler, Sampler
from discrete_lit.tokenizers.quantizers import MultiScaleBinarySphericalQuantizer
from discrete_lit.tokenizers.tokenizer import Tokenizer


class BitwiseNextScale(Generator):
    """Predicts the bits of each scale from the scales before it, each bit of a place by itself.

    As `NextScale`, of an id of d bits, 2^d of which are too many for a softmax: the logits of a place are 2 d, and p is
    a product over bits, places and scales. The loss is the cross-entropy of every bit, and so -log p, exactly.

    With `flip_strength` training sees errors of its own kind (bitwise self-correction, section 3.4): of each scale a
    share of the bits is flipped in what is read, and what is to be predicted is the residual of that. The share is
    uniform in [0, flip_strength] in steps of 0.01, drawn for each image and scale; the published code draws it for each
    batch and scale. It needs images, or what else the tokenizer makes latents of: ids do not tell the residual.

    Arguments that are not listed are those of every `Generator`.

    Args:
        tokenizer: frozen here. One with a `MultiScaleBinarySphericalQuantizer` (a `VQGAN` with it), or a `TokenGrid`
            with as many ids.
        scales: of the ids, where the tokenizer does not say them: sides of squares or `[h, w]`; the first is 1.
        flip_strength: the largest share of bits that training flips, in [0, 1]; 0.3 in the published training.
        sampler: `NextScaleSampler()` by default.
        common: `backbone`, `label_dropout`, `gradient_of`, `optimizer`, `scheduler`, `weight_decay_rule` and `seed` of
            every generator.

    Raises:
        ValueError: a tokenizer of another kind, scales that are not its own or do not begin with 1, or flips without
            latents.
    """

    coordinate_name = "scale"
    scale_coordinates: Tensor
    """`(N d,)`: the middle of each bit's scale on a line from 0 to 1, in which all scales are as long."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        scales: Sequence[int | tuple[int, int]] | None = None,
        flip_strength: float = 0.0,
        sampler: Sampler | None = None,
        **common: Any,
    ) -> None:
        if not 0 <= flip_strength <= 1:
            raise ValueError(f"flip_strength must lie in [0, 1], got {flip_strength}")
        bits = _quantizer_of(tokenizer, scales)
        layout = SequenceLayout(
            2,
            tuple(tokenizer.token_shape(image_size)),
            num_classes=num_classes,
            attention="block_causal",
            scales=tuple(bits.lengths),
            scale_sizes=tuple(bits.sizes),
            input_dim=bits.dim,
            sub_tokens=bits.dim,
        )
        super().__init__(
            tokenizer,
            image_size,
            num_classes=num_classes,
            layout=layout,
            sampler=sampler or NextScaleSampler(),
            **common,
        )
        # One of its own, or that of the tokenizer, which holds it already.
        self.own_quantizer = None if hasattr(tokenizer, "quantizer") else bits
        self.flip_strength = flip_strength
        lengths = torch.tensor(bits.lengths) * bits.dim
        middles = (torch.arange(len(lengths)) + 0.5) / len(lengths)
        self.register_buffer("scale_coordinates", middles.repeat_interleave(lengths), persistent=False)

    @property
    def bits(self) -> MultiScaleBinarySphericalQuantizer:
        """Makes ids and bits of latents, and what is read of them."""
        return self.tokenizer.quantizer if self.own_quantizer is None else self.own_quantizer  # type: ignore[return-value]

    # The sequence.

    def to_sequence(self, tokens: Tensor) -> Tensor:
        ids = tokens.flatten(1)
        return torch.where(ids[..., None] < 0, -1, self.bits.bits_of(ids)).flatten(1)

    def to_grid(self, sequences: Tensor) -> Tensor:
        return self.bits.ids_of(sequences.unflatten(1, (-1, self.bits.dim))).reshape(-1, *self.token_shape)

    def scale_quantizer(self) -> "BitsOfScales":
        return BitsOfScales(self.bits)

    # The loss.

    def data_of(self, batch: dict[str, Any], random: CounterRandom) -> Tensor:
        """Return the ids `(B, N)` of a batch, or in training on errors its latents `(B, H, W, d)`."""
        if not (self.training and self.flip_strength):
            return self.tokens_of(batch)
        latents = getattr(self.tokenizer, "latents", None)
        if latents is None or "image" not in batch:
            raise ValueError(
                f"flip_strength={self.flip_strength} flips bits of latents, and needs a tokenizer that makes them of "
                f"the images of a batch; a batch holds {', '.join(map(str, batch))}: set model.init_args.flip_strength "
                "to 0 for ids"
            )
        with torch.no_grad():
            return latents(batch["image"])

    def losses_of(self, data: Any, condition: Condition | Tensor, random: CounterRandom) -> TokenLosses:
        if not data.is_floating_point():
            return super().losses_of(data, condition, random)
        with torch.no_grad(), torch.autocast(data.device.type, enabled=False):
            ids, read = self.bits.self_corrected(data, self._flips(random))
        return self._losses(self.to_sequence(ids), read, condition)

    def token_losses(self, tokens: Tensor, condition: Condition | Tensor, random: CounterRandom) -> TokenLosses:
        return self._losses(tokens, self._read(tokens), condition)

    def _losses(self, sequences: Tensor, read: Tensor, condition: Condition | Tensor) -> TokenLosses:
        values = cross_entropies(self.backbone(read, condition), sequences)
        return TokenLosses(values, torch.ones_like(values), self.scale_coordinates.expand_as(values))

    @torch.no_grad()
    def _read(self, sequences: Tensor) -> Tensor:
        """Make what is read for the bits `(B, N d)` of all scales: `(B, N - 1, d)`."""
        with torch.autocast(sequences.device.type, enabled=False):
            return self.bits.teacher_forcing(self.bits.ids_of(sequences.unflatten(1, (-1, self.bits.dim))))

    def _flips(self, random: CounterRandom) -> Tensor:
        """Draw the bits `(B, N, d)` that training flips."""
        levels = int(100 * self.flip_strength + 1e-9) + 1
        shares = (random.uniform(Purpose.MASK_RATIO, len(self.bits.lengths)) * levels).floor() * 0.01
        counts = torch.tensor(self.bits.lengths, device=shares.device)
        share = shares.repeat_interleave(counts, dim=1, output_size=sum(self.bits.lengths))
        uniforms = random.uniform(Purpose.MASK_ORDER, self.length).unflatten(1, (-1, self.bits.dim))
        return uniforms < share[..., None]

    # The likelihood.

    @torch.no_grad()
    @in_evaluation
    def log_likelihood(
        self, tokens: Tensor, condition: Condition | Tensor, *, indices: Tensor | None = None
    ) -> Likelihood:
        sequences = self.to_sequence(tokens)
        values = cross_entropies(self.backbone(self._read(sequences), condition), sequences)
        return Likelihood(-values.double().sum(dim=1), "exact")


class BitsOfScales:
    """Make the input of the next scale of bits, for samplers.

    Args:
        quantizer: of the ids.
    """

    vocab_size = 2

    def __init__(self, quantizer: MultiScaleBinarySphericalQuantizer) -> None:
        self.quantizer = quantizer
        self.dim, self.lengths = quantizer.dim, quantizer.lengths

    def contribution(self, number: int, ids: Tensor) -> Tensor:
        """Compute what bits `(B, h w d)` of a scale add to f_hat: `(B, d, H, W)`."""
        return self.quantizer.contribution(number, self.quantizer.ids_of(ids.unflatten(1, (-1, self.dim))))

    def at_scale(self, number: int, f_hat: Tensor) -> Tensor:
        """Interpolate f_hat `(B, d, H, W)` to a scale: `(B, h w, d)`."""
        return self.quantizer.at_scale(number, f_hat)


def _quantizer_of(
    tokenizer: Tokenizer, scales: Sequence[int | tuple[int, int]] | None
) -> MultiScaleBinarySphericalQuantizer:
    found = getattr(tokenizer, "quantizer", None)
    if isinstance(found, MultiScaleBinarySphericalQuantizer):
        made = found
        if scales is not None and list(MultiScaleBinarySphericalQuantizer(1, scales=scales).sizes) != list(found.sizes):
            raise ValueError(f"scales={list(scales)} are not the tokenizer's, which are {list(found.scales)}")
    elif found is None and scales is not None:
        bits = tokenizer.vocab_size.bit_length() - 1
        if tokenizer.vocab_size != 2**bits or not bits:
            raise ValueError(f"BitwiseNextScale needs 2^d ids of d bits, the tokenizer has {tokenizer.vocab_size}")
        made = MultiScaleBinarySphericalQuantizer(bits, scales=scales, bit_order="first_least_significant")
    else:
        raise ValueError(
            "BitwiseNextScale predicts the bits of a MultiScaleBinarySphericalQuantizer; the tokenizer "
            f"{type(tokenizer).__name__} has {'no quantizer' if found is None else 'a ' + type(found).__name__}: give "
            "it a VQGAN with one, or a TokenGrid and scales"
        )
    if made.lengths[0] != 1:
        raise ValueError(f"BitwiseNextScale needs a first scale of one place, the scales are {list(made.scales)}")
    return made
