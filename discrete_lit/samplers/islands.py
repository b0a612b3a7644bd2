"""Islands: the elements of a segment that are drawn together, not one after another.

Three kinds: masked ids, the surest first (MaskGIT, as Show-o has it); scale after scale (VAR); vectors, by a solver of
flow matching (Transfusion). `IslandDraw.draw` is the one way in, and each kind is one loop.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from discrete_lit.backbones.segments import Segment
from discrete_lit.core.modules import at_least_float32
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion import CosineSchedule, MaskSchedule
from discrete_lit.diffusion.gaussian import Estimate, GaussianDenoiser
from discrete_lit.diffusion.solvers import Solver
from discrete_lit.samplers.draw_settings import DrawSettings
from discrete_lit.samplers.maskgit import masked_counts
from discrete_lit.samplers.sampler import ScaleQuantizer
from discrete_lit.samplers.segment_reader import SegmentReader

_ISLANDS = 16
"""The first step of the random numbers of masked ids; those before are streams of ids one after another."""
_SCALES = 2**16
"""The first step of the random numbers of ids in scales."""


@dataclass(frozen=True, kw_only=True)
class MaskedSteps:
    """The steps in which the ids of a masked segment are drawn (MaskGIT, as Show-o has it).

    Attributes:
        steps: T, at least 1; the ids that are least sure are masked again after each but the last.
        choice_temperature: of the Gumbel noise on what is sure, at the beginning, >= 0; it falls to 0.
        noise: how it falls: by step i of T to 1 - i / T of the beginning's (`"linear"`), or to 1 - i / T of what it was
            before (`"product"`: Show-o's code).
        mask_schedule: the share that is masked after a share of the steps; the cosine by default.

    Raises:
        ValueError: a setting out of its range.
    """

    steps: int = 12
    choice_temperature: float = 4.5
    noise: Literal["linear", "product"] = "linear"
    mask_schedule: MaskSchedule | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.choice_temperature < 0:
            raise ValueError(
                f"steps must be at least 1 and choice_temperature at least 0, got {self.steps} and "
                f"{self.choice_temperature}"
            )
        if self.noise not in ("linear", "product"):
            raise ValueError(f"noise must be 'linear' or 'product', got {self.noise!r}")

    def noise_scale(self, step: int, steps: int) -> float:
        """Give the temperature of the noise at a step, counted from 0, of so many."""
        shares = [1 - (number + 1) / steps for number in range(step + 1)]
        return self.choice_temperature * (prod(shares) if self.noise == "product" else shares[-1])


class Island(NamedTuple):
    """The elements of an island that were drawn in each of B sequences."""

    ids: Tensor
    """`(B, n)` int64, 0 where vectors stand."""
    vectors: dict[str, Tensor]
    """`(B, n, E)` by the name of the segment, of vectors and of what ids in scales add up to."""
    codes: Tensor | None
    """`(B, P + 1)` int64, the ids of all scales; None of other islands, which the network has not read."""


@dataclass(frozen=True, kw_only=True)
class IslandDraw:
    """Draw islands behind what a network has read.

    Attributes:
        random: one stream for each sequence.
        masked: how masked ids are drawn.
        solver: how vectors are drawn.
        denoiser: reads what the network says of vectors; None where none are drawn.
        quantizer: makes the vectors of a scale of the ids of those before it; None where none are drawn.
    """

    random: CounterRandom
    masked: MaskedSteps
    solver: Solver
    denoiser: GaussianDenoiser | None
    quantizer: ScaleQuantizer | None

    def draw(
        self,
        reader: SegmentReader,
        states: Tensor,
        *,
        segment: Segment,
        settings: DrawSettings,
        number: int,
        rows: Tensor | None,
    ) -> Island:
        """Draw an island.

        Args:
            reader: has read what stands in front of it.
            states: `(B, n)` int64, those of its elements.
            segment: that it is of.
            settings: how its ids, or vectors, are drawn.
            number: of islands that were drawn before, which tells random numbers apart.
            rows: `(B,)` bool, the sequences that it belongs to; all by default.

        Raises:
            ValueError: a quantizer of other scales than the segment's.
        """
        ids = torch.zeros_like(states)
        if segment.codes is not None:
            vectors, codes = self._grow(reader, states, segment=segment, settings=settings, number=number, rows=rows)
            return Island(ids, {segment.name: vectors}, codes)
        if segment.input_dim is not None:
            vectors = self._solve(reader, states, segment=segment, settings=settings, number=number)
            return Island(ids, {segment.name: vectors}, None)
        return Island(self._unmask(reader, states, segment=segment, settings=settings, number=number), {}, None)

    def _unmask(
        self, reader: SegmentReader, states: Tensor, *, segment: Segment, settings: DrawSettings, number: int
    ) -> Tensor:
        """Draw the ids of an island from masks, the surest first (MaskGIT), with what belongs to it around them."""
        assert segment.mask_id is not None
        masking, grammar = self.masked, reader.grammar
        count, of_set = segment.positions, grammar.masked_set(segment.name)
        steps, first = min(masking.steps, count), number * min(masking.steps, count)
        begin = len(segment.begin_ids) if segment.ends_inside else 0
        inside = slice(begin, begin + count)
        whole = torch.full_like(states, segment.mask_id)
        if segment.ends_inside:
            whole[:, :begin] = whole.new_tensor(segment.begin_ids)
            whole[:, begin + count :] = whole.new_tensor(segment.end_ids)
        ids = whole[:, inside]
        codes = grammar.ids_of(of_set)
        left = count
        for step, still in enumerate(masked_counts(masking.mask_schedule or CosineSchedule(), steps, count)):
            if still == left:
                continue
            hidden = reader.read(whole, states, kept=False)[:, inside]
            uniforms = self.random.uniform(Purpose.TOKEN, count, _ISLANDS + first + step)
            chosen, score = settings.draw(reader.logits(hidden, of_set), uniforms)
            noise = masking.noise_scale(step, steps)
            sure = score + noise * self.random.gumbel(Purpose.CONFIDENCE, count, first + step)
            masked = ids == segment.mask_id
            rank = sure.masked_fill(~masked, torch.inf).argsort(dim=1).argsort(dim=1)
            ids = torch.where(masked, codes[chosen], ids).masked_fill(rank < still, segment.mask_id)
            whole, left = torch.cat((whole[:, :begin], ids, whole[:, begin + count :]), dim=1), still
        return whole

    def _grow(
        self,
        reader: SegmentReader,
        states: Tensor,
        *,
        segment: Segment,
        settings: DrawSettings,
        number: int,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Draw scale after scale, each given those before it (VAR).

        Returns:
            The vectors `(B, P, E)` that the network read, the last of which predict what follows, and the ids of all
            scales, `(B, P + 1)`.
        """
        assert segment.codes is not None
        quantizer, name = self.quantizer, segment.name
        lengths = [1, *segment.scales]
        theirs = None if quantizer is None else (list(quantizer.lengths), quantizer.dim, quantizer.vocab_size)
        if quantizer is None or theirs != (lengths, segment.input_dim, segment.codes):
            raise ValueError(
                f"segment {name!r} has scales of {lengths} ids, vectors of width {segment.input_dim} and "
                f"{segment.codes} codes: give the quantizer that makes these; of the one given they are {theirs}"
            )
        uniforms = self.random.uniform(Purpose.TOKEN, sum(lengths), _SCALES + number)
        hidden, drawn, inputs, f_hat = reader.hidden[:, None], [], [], 0.0
        begin = 0
        for scale, places in enumerate(lengths):
            if scale:
                # Positions begin with the second scale.
                here = states[:, begin - 1 : begin - 1 + places]
                hidden = reader.read(torch.zeros_like(here), here, vectors={name: inputs[-1]}, where=rows)
            logits = reader.scale_logits(hidden, name)
            drawn.append(settings.draw(logits, uniforms[:, begin : begin + places])[0])
            begin += places
            if scale + 1 < len(lengths):
                with torch.autocast(states.device.type, enabled=False):
                    f_hat = f_hat + quantizer.contribution(scale, drawn[-1])
                    inputs.append(quantizer.at_scale(scale + 1, f_hat))
        reader.predict_from(hidden[:, -1], where=rows)
        return torch.cat(inputs, dim=1), torch.cat(drawn, dim=1)

    def _solve(
        self, reader: SegmentReader, states: Tensor, *, segment: Segment, settings: DrawSettings, number: int
    ) -> Tensor:
        """Draw the vectors `(B, P, E)` of an island by the solver."""
        assert self.denoiser is not None, "vectors are drawn through a denoiser"
        denoiser, name = self.denoiser, segment.name
        count, dim = segment.positions, segment.input_dim or 0
        shape = (reader.batch, count, dim)
        ids, dtype = torch.zeros_like(states), at_least_float32(reader.hidden).dtype

        def normal(purpose: Purpose, step: int) -> Tensor:
            return self.random.normal(purpose, count * dim, step).view(shape).to(dtype)

        def denoise(x: Tensor, t: float) -> Estimate:
            times = torch.full(states.shape, t, dtype=dtype, device=states.device)
            outputs = reader.vectors(reader.read(ids, states, vectors={name: x}, times=times, kept=False), name)
            if settings.contexts == 3:
                output = settings.guide(outputs)
            elif settings.contexts == 2:
                output = denoiser.guide(outputs[0], outputs[-1], settings.guidance_scale)
            else:
                output = outputs[0]
            return denoiser(output, x, t)

        steps = self.solver.steps
        return self.solver(
            denoise,
            normal(Purpose.DIFFUSION_START, number),
            path=denoiser.path,
            noise=lambda step: normal(Purpose.DIFFUSION_STEP, number * steps + step),
        )
