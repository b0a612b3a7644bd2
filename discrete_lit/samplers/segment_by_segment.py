"""Sampling of sequences of segments: ids one after another, those of an island together, never an invalid sequence.

`SegmentSampler.__call__` is the loop. The grammar of the layout says at each element which ids may stand there; the
others have no probability. Where one id alone may stand, it is written without asking the network. Rows may be at
different places of their sequences: each has its own length in the cache, and waits where the others draw vectors.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from discrete_lit.backbones.cache import RaggedCache
from discrete_lit.backbones.execution import packed
from discrete_lit.backbones.segment_sequence import Columns, SegmentSequence, coordinates_of
from discrete_lit.backbones.segment_transformer import SegmentTransformer
from discrete_lit.core.modules import at_least_float32, evaluation_mode
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.core.synchronisation import checked_at_the_end, on_device
from discrete_lit.diffusion import CosineSchedule, MaskSchedule
from discrete_lit.diffusion.gaussian import Estimate, GaussianDenoiser
from discrete_lit.diffusion.solvers import Euler, Solver
from discrete_lit.samplers.categorical import draw_filtered
from discrete_lit.samplers.guidance import guide, guide_twice
from discrete_lit.samplers.maskgit import masked_counts
from discrete_lit.samplers.sampler import SamplerOutput, ScaleQuantizer


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """The settings by which the ids, or the vectors, of a segment are drawn.

    Attributes:
        temperature: divides the guided log-probabilities, > 0.
        top_k: keep the k most probable ids, >= 1; all by default.
        top_p: keep the nucleus of this probability mass, in (0, 1]; all by default.
        guidance_scale: s of `null + s (full - null)`; 1 is off. With an `image_guidance_scale`, that of the text.
        image_guidance_scale: s_img of `null + s_img (image - null) + s (full - image)`, where an image is given beside
            the text; None for guidance by both together.

    Raises:
        ValueError: a setting out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0
    image_guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}; top_k=1 is the greedy choice")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

    @property
    def contexts(self) -> int:
        """The number of contexts that the network is asked given: everything; nothing too; and the image alone."""
        if self.image_guidance_scale is not None:
            return 3
        return 1 if self.guidance_scale == 1 else 2

    def guide(self, outputs: Sequence[Tensor]) -> Tensor:
        """Guide logits given everything, the image alone if there are three, and nothing."""
        if len(outputs) == 1 or self.contexts == 1:
            return outputs[0]
        if self.image_guidance_scale is None:
            return guide(outputs[0], outputs[-1], self.guidance_scale)
        full, image, null = outputs
        return guide_twice(full, image, null, image_scale=self.image_guidance_scale, text_scale=self.guidance_scale)


@dataclass(frozen=True, kw_only=True)
class SegmentOutput:
    """The elements that were drawn behind the prompts, and what they cost."""

    sequence: SegmentSequence
    """The drawn elements of each sample, with what stands around them."""
    network_calls: int
    """Network evaluations for each sample; those of a guided step count one by one."""
    sequential_passes: int
    """Passes that follow one another."""
    count_flops: Callable[[], int]
    """Counts the floating-point operations of the network for each sample, when it is asked."""
    codes: Mapping[str, Tensor] = field(default_factory=dict)
    """`(B, P + 1)` int64, the ids of all scales that were drawn last of a segment, by its name."""

    def costing(self, tokens: Tensor) -> SamplerOutput:
        """Give what a part of the sequence, such as its image `(B, ...)`, cost: all of it."""
        return SamplerOutput(
            tokens=tokens,
            network_calls=self.network_calls,
            sequential_passes=self.sequential_passes,
            count_flops=self.count_flops,
        )


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


class SegmentSampler:
    """Draw what follows a prompt, segment by segment.

    Args:
        settings: of segments by name; the plain draw from the network's law for others.
        solver: how vectors are drawn; 30 Euler steps by default.
        masked: how masked ids are drawn; 12 steps by default, or as many as there are ids where these are fewer.
    """

    def __init__(
        self,
        settings: Mapping[str, DrawSettings] | None = None,
        *,
        solver: Solver | None = None,
        masked: MaskedSteps | None = None,
    ) -> None:
        self.settings = dict(settings or {})
        self.solver = solver or Euler(30)
        self.masked = masked or MaskedSteps()

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of images, 1 where they are drawn without."""
        return self.of("image").guidance_scale

    def of(self, segment: str) -> DrawSettings:
        """Give the settings of a segment."""
        return self.settings.get(segment, _PLAIN)

    def contexts(self, segments: Sequence[str]) -> int:
        """Count what the network is asked given, 1 to 3, where these segments are drawn."""
        return max(self.of(name).contexts for name in segments)

    @torch.no_grad()
    def __call__(
        self,
        network: SegmentTransformer,
        prompts: Sequence[SegmentSequence],
        random: CounterRandom,
        *,
        segments: Sequence[str],
        denoiser: GaussianDenoiser | None = None,
        quantizer: ScaleQuantizer | None = None,
        stream: int = 0,
    ) -> SegmentOutput:
        """Draw behind prompts until their sequences leave the segments that are drawn, or end.

        Args:
            network: in any mode; it is sampled in eval mode.
            prompts: beginnings of the B sequences given everything; for guidance also given nothing, and between
                both given the image alone, as `contexts` says. None may be empty.
            random: one stream for each sequence; it alone decides what is drawn.
            segments: names of the segments that are drawn; others may not begin.
            denoiser: reads what the network says of vectors.
            quantizer: makes the vectors of a scale of the ids of those before it.
            stream: of the random numbers of ids; two draws of one sequence need two.

        Raises:
            ValueError: settings of segments that the layout does not have, prompts that do not fit, or a sequence for
                which no length is left.
        """
        unknown = set(self.settings) - {segment.name for segment in network.layout.segments}
        if unknown:
            raise ValueError(
                f"the sampler has settings of {', '.join(sorted(unknown))}; the segments are "
                f"{', '.join(segment.name for segment in network.layout.segments)}"
            )
        if self.contexts(segments) > len(prompts):
            raise ValueError(f"guidance needs {self.contexts(segments)} prompts for each sample, got {len(prompts)}")
        rows = len(prompts) * len(prompts[0])
        with evaluation_mode(network), checked_at_the_end():
            draw = _Draw(
                self,
                # A pass over one element has few rows for each weight, and there is one for each id.
                packed(network, rows=rows),
                prompts=prompts,
                random=random,
                segments=segments,
                denoiser=denoiser,
                quantizer=quantizer,
                stream=stream,
            )
            return draw.output()


_PLAIN = DrawSettings()
_ISLANDS = 16
"""The first step of the random numbers of masked ids; those before are streams of ids one after another."""
_SCALES = 2**16
"""The first step of the random numbers of ids in scales."""


class _Run(NamedTuple):
    """States that follow one another in all rows, and what the network reads with one element in each of them.

    All of it is known before the first is drawn, and made for all of them at once: a pass over one element is short.
    """

    place: dict[int, int]
    """Where each state stands in the run."""
    states: Tensor
    """`(B, n)` int64."""
    of_contexts: Tensor
    """`(R B, n)`, the same for every context."""
    sample: Tensor
    """`(R B, n)` zeros: each row has one sample."""
    rotary: Tensor
    """`(R B, 1, n, head_dim / 2, 2)`."""
    then: Tensor
    """`(R B, n)` where an element behind each begins."""


class _Draw:
    """One call of a sampler."""

    def __init__(
        self,
        sampler: SegmentSampler,
        network: SegmentTransformer,
        *,
        prompts: Sequence[SegmentSequence],
        random: CounterRandom,
        segments: Sequence[str],
        denoiser: GaussianDenoiser | None,
        quantizer: ScaleQuantizer | None,
        stream: int,
    ) -> None:
        self.sampler, self.network, self.grammar = sampler, network, network.grammar
        self.layout, self.random, self.denoiser, self.quantizer = network.layout, random, denoiser, quantizer
        self.codes: dict[str, Tensor] = {}
        self.contexts, self.batch = len(prompts), len(prompts[0])
        self.islands = 0
        # How many elements each pass read, and how many they attended to; and how many logits were made.
        self.made: Counter[tuple[int, int]] = Counter()
        self.logits = 0
        self.drawn = [segment.name in segments for segment in self.layout.segments]
        self.forbidden = self.grammar.forbidden_events(segments)
        self.uniforms = random.uniform(Purpose.TOKEN, self.layout.length, stream)
        self.columns = Columns(self.grammar, self.batch, device=prompts[0].ids.device)
        self.run: _Run | None = None
        self.place = 0  # of the last element that was drawn, in the run
        self._ids_of: dict[int, Tensor] = {}
        self._read(_stacked(prompts, self.grammar.done))

    def _read(self, prompts: SegmentSequence) -> None:
        """Read the prompts: `hidden (R B, D)` predicts what follows, `states (B,)` say what may."""
        grammar, lengths = self.grammar, prompts.lengths()
        counts = lengths.tolist()
        if min(counts) < 1:
            raise ValueError("a prompt is empty: it begins with the first id of its first segment at least")
        # Behind what is kept, an island that is drawn is read again and again.
        room = max(counts) + self.layout.length - min(counts[: self.batch]) + max(1, *grammar.islands)
        self.cache: RaggedCache = self.network.new_cache(len(prompts), room)
        hidden = self.network(prompts, self.cache)
        self.made[prompts.ids.shape[1], prompts.ids.shape[1]] += 1
        _, then = coordinates_of(grammar, prompts.states, origin=self.cache.origin)
        if min(counts) == max(counts):
            self.cache.advance(counts[0], then)
        else:
            self.cache.advance(lengths, then, reach=max(counts))
        last = lengths - 1
        rows = torch.arange(len(prompts), device=lengths.device)
        self.hidden = hidden[rows, last]
        state, id = prompts.states[rows, last], prompts.ids[rows, last]
        self.states = grammar.advance(state, id)[: self.batch]
        self.remaining = self.layout.length - lengths[: self.batch]
        # Elements drawn: of each row; and of all, while all stand in one state.
        self.done: Tensor = torch.zeros_like(self.remaining)
        self.count = 0
        # Drawn ids that the network has not read: ids and states (B, 1), and which rows have one, None for all.
        self.pending: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def output(self) -> SegmentOutput:
        first = self.states.tolist()
        state = first[0] if len(set(first)) == 1 else None
        while state is not None and self._is_drawn(state):  # all rows stand in one state
            state = self._step_together(state)
        self.run = None
        self.done, self.remaining = self.done + self.count, self.remaining - self.count
        if state is None:
            while self._step_apart():
                pass
        passes = self.made.total()
        return SegmentOutput(
            sequence=self.columns.joined(),
            network_calls=self.contexts * passes,
            sequential_passes=passes,
            count_flops=self._flops,
            codes=self.codes,
        )

    def _flops(self) -> int:
        passes = sum(times * self.network.flops(*shape) for shape, times in self.made.items())
        return self.contexts * (passes + 2 * self.network.width * self.logits)

    def _is_drawn(self, state: int) -> bool:
        number = self.grammar.segment_numbers[state]
        return number >= 0 and self.drawn[number]

    def _is_island(self, state: int) -> bool:
        """Whether what stands here is drawn together with what follows: vectors, and ids from masks."""
        return self.grammar.islands[state] > 0

    def _is_asked(self, state: int) -> bool:
        """Whether the network says anything of what is drawn from a state on; ends that must follow are written so."""
        while self._is_drawn(state):
            following = self.grammar.following[state]
            if following is None or self._is_island(state):
                return True
            if len(self.grammar.sets[self.grammar.set_numbers[state]][1]) > 1:
                return True
            state = following
        return False

    # All rows in one state, which the host knows: nothing waits for the device.

    def _step_together(self, state: int) -> int | None:
        grammar, number = self.grammar, self.grammar.set_numbers[state]
        if self._is_island(state):
            return self._draw_island(self.layout.segments[grammar.segment_numbers[state]].name, state, rows=None)
        if grammar.following[state] is None:
            self.states = torch.full_like(self.states, state)
            return None
        if self.run is None or state not in self.run.place:
            self.run = self._run_from(state)
        segment, ids = grammar.sets[number]
        if len(ids) == 1:
            drawn = torch.full_like(self.remaining, ids[0])
        else:
            self._feed()
            name = self.layout.segments[segment].name
            logits = self.network.logits(self.hidden, number)
            self.logits += len(ids)
            if number not in self._ids_of:
                self._ids_of[number] = grammar.ids_of(number)
            split = logits.chunk(self.contexts) if self.contexts > 1 else (logits,)
            drawn = self._ids_of[number][self._choose(name, split, self.uniforms[:, self.count])]
        # What was pending has been read, or is read together with this one.
        self.place = self.run.place[state]
        self._write(drawn[:, None], self.run.states[:, self.place : self.place + 1], None)
        self.count += 1
        return grammar.following[state]

    def _run_from(self, state: int) -> _Run:
        """Prepare what is read from a state on, up to where ids decide what comes, or an island begins."""
        grammar, run = self.grammar, [state]
        while (then := grammar.following[run[-1]]) is not None and self._is_drawn(then) and not self._is_island(then):
            run.append(then)
        assert not self.pending, "what was drawn before stands in front of what is prepared"
        states = on_device(torch.tensor, tuple(run), device=self.states.device).expand(self.batch, -1)
        of_contexts = self._rows(states)
        coordinates, behind = coordinates_of(grammar, of_contexts, origin=self.cache.origin)
        return _Run(
            place={each: number for number, each in enumerate(run)},
            states=states,
            of_contexts=of_contexts,
            sample=torch.zeros_like(of_contexts),
            # The last of them may stand behind the longest sequence, where nothing is read any more.
            rotary=self.network.rotary_of(coordinates.clamp(max=self.layout.length)),
            then=behind,
        )

    # Rows in states of their own.

    def _step_apart(self) -> bool:
        """Draw one id of each row that is at one, or else an island; say whether there was anything to draw."""
        grammar = self.grammar
        here = self.states.tolist()
        active = [self._is_drawn(state) for state in here]
        at_id = [drawn and not self._is_island(state) for drawn, state in zip(active, here, strict=True)]
        if not any(active):
            return False
        if not any(at_id):
            first = next(state for state, drawn in zip(here, active, strict=True) if drawn)
            segment = grammar.segment_numbers[first]
            rows = [
                drawn and grammar.segment_numbers[state] == segment for state, drawn in zip(here, active, strict=True)
            ]
            self._draw_island(self.layout.segments[segment].name, first, rows=self._mask(rows))
            return True
        self._feed()
        where = self._mask(at_id)
        allowed = grammar.allowed(self.states, self.remaining, forbidden=self.forbidden)
        if bool((where & ~allowed.any(dim=1)).any()):
            raise ValueError("a prompt leaves no room for the end of its sequence: give a shorter one")
        hidden = self.hidden.chunk(self.contexts)
        logits = [self.network.logits_in(self.states, each) for each in hidden]
        self.logits += self.layout.vocab_size
        drawn = torch.zeros_like(self.states)
        for number, segment in enumerate(self.layout.segments):
            rows = [
                drawn and grammar.segment_numbers[state] == number for state, drawn in zip(here, at_id, strict=True)
            ]
            if any(rows):
                mine = self._mask(rows)
                chosen = self._choose(segment.name, logits, self._uniforms_here(), allowed | ~mine[:, None])
                drawn = torch.where(mine, chosen, drawn)
        self._write(drawn[:, None], self.states[:, None], where)
        self.done, self.remaining = self.done + where.long(), self.remaining - where.long()
        self.states = torch.where(where, grammar.advance(self.states, drawn), self.states)
        return True

    def _mask(self, rows: Sequence[bool]) -> Tensor:
        return torch.tensor(rows, device=self.states.device)

    # The draw.

    def _uniforms_here(self) -> Tensor:
        """Give the random number `(B,)` of each row's next id."""
        return self.uniforms.gather(1, self.done.clamp(max=self.layout.length - 1)[:, None])[:, 0]

    def _choose(
        self, segment: str, logits: Sequence[Tensor], uniforms: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """Draw from guided logits `(B, K)`: `(B,)`."""
        settings = self.sampler.of(segment)
        guided = settings.guide(logits)
        if allowed is not None:
            guided = guided.masked_fill(~allowed, -torch.inf)
        if settings.temperature != 1:
            guided = guided / settings.temperature
        return draw_filtered(guided, uniforms, settings.top_k, settings.top_p)[0]

    def _write(self, ids: Tensor, states: Tensor, where: Tensor | None) -> None:
        """Keep drawn ids `(B, 1)` of some rows; the network reads them when it is next asked."""
        self.columns.append(ids, states, valid=None if where is None else where[:, None])
        self.pending.append((ids, states, where))

    def _feed(self) -> None:
        """Let the network read what it has not yet."""
        if not self.pending:
            return
        if self.run is not None and len(self.pending) == 1 and self.cache.even:
            self._feed_one(self.run)
            return
        ids = torch.cat([each for each, _, _ in self.pending], dim=1)
        states = torch.cat([each for _, each, _ in self.pending], dim=1)
        where, self.pending = self.pending[-1][2], []
        assert where is None or ids.shape[1] == 1
        hidden = self._pass(ids, states, where=where)[:, -1]
        self.hidden = hidden if where is None else torch.where(self._rows(where)[:, None], hidden, self.hidden)

    def _feed_one(self, run: _Run) -> None:
        """Let the network read the element that was drawn last, of a run."""
        (ids, _, _), self.pending = self.pending[0], []
        here = slice(self.place, self.place + 1)
        sequence = SegmentSequence(ids=self._rows(ids), states=run.of_contexts[:, here], sample=run.sample[:, here])
        self.made[1, self.cache.reach + 1] += 1
        self.hidden = self.network(sequence, self.cache, rotary=run.rotary[:, :, here])[:, 0]
        self.cache.advance(1, run.then[:, here])

    def _pass(
        self,
        ids: Tensor,
        states: Tensor,
        *,
        vectors: Mapping[str, Tensor] | None = None,
        times: Tensor | None = None,
        where: Tensor | None = None,
        kept: bool = True,
    ) -> Tensor:
        """Run the network over elements `(B, n)`, in every context; the cache keeps them, of some rows, or of none."""
        states = self._rows(states)
        sequence = SegmentSequence(
            ids=self._rows(ids),
            states=states,
            sample=torch.zeros_like(states),
            vectors={name: self._rows(values) for name, values in (vectors or {}).items()},
            times=None if times is None else self._rows(times),
        )
        self.made[states.shape[1], self.cache.reach + states.shape[1]] += 1
        hidden = self.network(sequence, self.cache)
        if kept:
            _, then = coordinates_of(self.grammar, states, origin=self.cache.origin)
            if where is None:
                self.cache.advance(states.shape[1], then)
            else:
                counts = self._rows(where).long() * states.shape[1]
                self.cache.advance(counts, then, reach=int((self.cache.filled + counts).max()))
        return hidden

    def _rows(self, values: Tensor) -> Tensor:
        """Repeat `(B, ...)` for every context."""
        return torch.cat([values] * self.contexts) if self.contexts > 1 else values

    # Islands.

    def _draw_island(self, name: str, state: int, *, rows: Tensor | None) -> int:
        """Draw the elements of a segment together, in some rows or in all; give the state behind them."""
        self._feed()
        count = self.grammar.islands[state]
        states = (state + torch.arange(count, device=self.states.device)).expand(self.batch, -1)
        ids, vectors = torch.zeros_like(states), {}
        read = self.layout[name].codes is not None
        if read:
            vectors = {name: self._grow(name, states, rows)}
        elif self.layout[name].input_dim is not None:
            vectors = {name: self._solve(name, states)}
        else:
            ids = self._unmask(name, states)
        self.islands += 1
        valid = None if rows is None else rows[:, None].expand_as(states)
        self.columns.append(ids, states, valid=valid, vectors=vectors)
        then = self.grammar.following[state + count - 1]
        assert then is not None, "an island decides nothing"
        if not read and (rows is not None or self._is_asked(then)):
            hidden = self._pass(ids, states, vectors=vectors, where=rows)[:, -1]
            self.hidden = hidden if rows is None else torch.where(self._rows(rows)[:, None], hidden, self.hidden)
        if rows is None:
            self.count += count
        else:
            self.done, self.remaining = self.done + count * rows.long(), self.remaining - count * rows.long()
            self.states = torch.where(rows, torch.full_like(self.states, then), self.states)
        return then

    def _unmask(self, name: str, states: Tensor) -> Tensor:
        """Draw the ids of an island from masks, the surest first (MaskGIT), with what belongs to it around them."""
        segment, masking, settings = self.layout[name], self.sampler.masked, self.sampler.of(name)
        assert segment.mask_id is not None
        count, number = segment.positions, self.grammar.masked_set(name)
        steps, first = min(masking.steps, count), self.islands * min(masking.steps, count)
        begin = len(segment.begin_ids) if segment.ends_inside else 0
        inside = slice(begin, begin + count)
        whole = torch.full_like(states, segment.mask_id)
        if segment.ends_inside:
            whole[:, :begin] = whole.new_tensor(segment.begin_ids)
            whole[:, begin + count :] = whole.new_tensor(segment.end_ids)
        ids = whole[:, inside]
        codes = self.grammar.ids_of(number)
        left = count
        for step, still in enumerate(masked_counts(masking.mask_schedule or CosineSchedule(), steps, count)):
            if still == left:
                continue
            hidden = self._pass(whole, states, kept=False)[:, inside]
            logits = self.network.logits(hidden, number).chunk(self.contexts)
            self.logits += count * len(codes)
            guided = settings.guide(logits) / settings.temperature
            uniforms = self.random.uniform(Purpose.TOKEN, count, _ISLANDS + first + step)
            chosen, score = draw_filtered(guided, uniforms, settings.top_k, settings.top_p)
            noise = masking.noise_scale(step, steps)
            sure = score + noise * self.random.gumbel(Purpose.CONFIDENCE, count, first + step)
            masked = ids == segment.mask_id
            rank = sure.masked_fill(~masked, torch.inf).argsort(dim=1).argsort(dim=1)
            ids = torch.where(masked, codes[chosen], ids).masked_fill(rank < still, segment.mask_id)
            whole, left = torch.cat((whole[:, :begin], ids, whole[:, begin + count :]), dim=1), still
        return whole

    def _grow(self, name: str, states: Tensor, rows: Tensor | None) -> Tensor:
        """Draw scale after scale, each given those before it (VAR): the vectors `(B, P, E)` that the network read."""
        segment, quantizer, settings = self.layout[name], self.quantizer, self.sampler.of(name)
        assert segment.codes is not None
        lengths = [1, *segment.scales]
        theirs = None if quantizer is None else (list(quantizer.lengths), quantizer.dim, quantizer.vocab_size)
        if quantizer is None or theirs != (lengths, segment.input_dim, segment.codes):
            raise ValueError(
                f"segment {name!r} has scales of {lengths} ids, vectors of width {segment.input_dim} and "
                f"{segment.codes} codes: give the quantizer that makes these; of the one given they are {theirs}"
            )
        uniforms = self.random.uniform(Purpose.TOKEN, sum(lengths), _SCALES + self.islands)
        hidden, drawn, inputs, f_hat = self.hidden[:, None], [], [], 0.0
        begin = 0
        for number, places in enumerate(lengths):
            if number:
                # Positions begin with the second scale.
                here = states[:, begin - 1 : begin - 1 + places]
                hidden = self._pass(torch.zeros_like(here), here, vectors={name: inputs[-1]}, where=rows)
            logits = self.network.predict_scales(hidden, segment=name).chunk(self.contexts)
            self.logits += places * segment.codes
            guided = settings.guide(logits) / settings.temperature
            here = uniforms[:, begin : begin + places]
            drawn.append(draw_filtered(guided, here, settings.top_k, settings.top_p)[0])
            begin += places
            if number + 1 < len(lengths):
                with torch.autocast(states.device.type, enabled=False):
                    f_hat = f_hat + quantizer.contribution(number, drawn[-1])
                    inputs.append(quantizer.at_scale(number + 1, f_hat))
        last, ids = hidden[:, -1], torch.cat(drawn, dim=1)
        self.hidden = last if rows is None else torch.where(self._rows(rows)[:, None], last, self.hidden)
        known = self.codes.get(name, ids)
        self.codes[name] = ids if rows is None else torch.where(rows[:, None], ids, known)
        return torch.cat(inputs, dim=1)

    def _solve(self, name: str, states: Tensor) -> Tensor:
        """Draw the vectors `(B, P, E)` of an island by the solver."""
        assert self.denoiser is not None, "vectors are drawn through a denoiser"
        segment, denoiser, settings = self.layout[name], self.denoiser, self.sampler.of(name)
        count, dim = segment.positions, segment.input_dim or 0
        shape = (self.batch, count, dim)
        ids, island = torch.zeros_like(states), self.islands
        dtype = at_least_float32(self.hidden).dtype

        def normal(purpose: Purpose, step: int) -> Tensor:
            return self.random.normal(purpose, count * dim, step).view(shape).to(dtype)

        def denoise(x: Tensor, t: float) -> Estimate:
            times = torch.full(states.shape, t, dtype=dtype, device=states.device)
            hidden = self._pass(ids, states, vectors={name: x}, times=times, kept=False)
            outputs = at_least_float32(self.network.predict_vectors(hidden, segment=name)).chunk(self.contexts)
            if settings.contexts == 3:
                output = settings.guide(outputs)
            elif settings.contexts == 2:
                output = denoiser.guide(outputs[0], outputs[-1], settings.guidance_scale)
            else:
                output = outputs[0]
            return denoiser(output, x, t)

        steps = self.sampler.solver.steps
        return self.sampler.solver(
            denoise,
            normal(Purpose.DIFFUSION_START, island),
            path=denoiser.path,
            noise=lambda step: normal(Purpose.DIFFUSION_STEP, island * steps + step),
        )


def _stacked(prompts: Sequence[SegmentSequence], padding: int) -> SegmentSequence:
    """Put the rows of several batches of the same samples under one another."""
    for first, second in pairwise(prompts):
        if len(first) != len(second):
            raise ValueError(f"prompts of different numbers of samples, {len(first)} and {len(second)}")
    longest = max(prompt.ids.shape[1] for prompt in prompts)

    def joined(parts: Sequence[Tensor], fill: int) -> Tensor:
        padded = []
        for part in parts:
            missing = part.new_full((len(part), longest - part.shape[1], *part.shape[2:]), fill)
            padded.append(torch.cat((part, missing), dim=1))
        return torch.cat(padded)

    names = sorted({name for prompt in prompts for name in prompt.vectors})
    dense: dict[str, Tensor] = {}
    for name in names:
        found = next(prompt.vectors[name] for prompt in prompts if name in prompt.vectors)
        empty = [found.new_zeros(*prompt.ids.shape, found.shape[2]) for prompt in prompts]
        dense[name] = joined([p.vectors.get(name, none) for p, none in zip(prompts, empty, strict=True)], 0)
    return SegmentSequence(
        ids=joined([prompt.ids for prompt in prompts], 0),
        states=joined([prompt.states for prompt in prompts], padding),
        sample=joined([prompt.sample for prompt in prompts], -1),
        vectors=dense,
    )
