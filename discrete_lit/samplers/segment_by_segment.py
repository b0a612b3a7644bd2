"""Sampling of sequences of segments: ids one after another, those of an island together, never an invalid sequence.

`SegmentSampler.__call__` is the loop. The grammar of the layout says at each element which ids may stand there; the
others have no probability. Where one id alone may stand, it is written without asking the network. Rows may be at
different places of their sequences: each has its own length in the cache, and waits where the others draw vectors.

`segment_reader.py` is how the network reads what is drawn, `draw_settings.py` how one id is drawn from what it says,
and `islands.py` how the elements of an island are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from discrete_lit.backbones.execution import packed
from discrete_lit.backbones.segment_sequence import Columns, SegmentSequence
from discrete_lit.backbones.segment_transformer import SegmentTransformer
from discrete_lit.backbones.segments import Segment
from discrete_lit.core.modules import evaluation_mode
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.core.synchronisation import checked_at_the_end
from discrete_lit.diffusion.gaussian import GaussianDenoiser
from discrete_lit.diffusion.solvers import Euler, Solver
from discrete_lit.samplers.draw_settings import DrawSettings
from discrete_lit.samplers.islands import IslandDraw, MaskedSteps
from discrete_lit.samplers.sampler import SamplerOutput, ScaleQuantizer
from discrete_lit.samplers.segment_reader import SegmentReader


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

    def costing(self, tokens: Tensor, *, before: SamplerOutput | None = None) -> SamplerOutput:
        """Give what a part of the sequence, such as its image `(B, ...)`, cost: all of it.

        Args:
            tokens: that part.
            before: what was drawn first, for this to be drawn, and costs too.
        """
        count = self.count_flops
        calls, passes = (0, 0) if before is None else (before.network_calls, before.sequential_passes)
        return SamplerOutput(
            tokens=tokens,
            network_calls=self.network_calls + calls,
            sequential_passes=self.sequential_passes + passes,
            count_flops=lambda: count() + (0 if before is None else before.flops),
        )


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
        self.sampler, self.grammar, self.layout = sampler, network.grammar, network.layout
        self.islands = IslandDraw(
            random=random, masked=sampler.masked, solver=sampler.solver, denoiser=denoiser, quantizer=quantizer
        )
        self.drawn_islands = 0
        self.codes: dict[str, Tensor] = {}
        self.drawn = [segment.name in segments for segment in self.layout.segments]
        self.forbidden = self.grammar.forbidden_events(segments)
        self.uniforms = random.uniform(Purpose.TOKEN, self.layout.length, stream)
        self.columns = Columns(self.grammar, len(prompts[0]), device=prompts[0].ids.device)
        self._ids_of: dict[int, Tensor] = {}
        self.reader = SegmentReader(network, prompts)
        self.states = self.reader.behind
        self.remaining = self.layout.length - self.reader.lengths
        # Elements drawn: of each row; and of all, while all stand in one state.
        self.done: Tensor = torch.zeros_like(self.remaining)
        self.count = 0

    def output(self) -> SegmentOutput:
        first = self.states.tolist()
        state = first[0] if len(set(first)) == 1 else None
        while state is not None and self._is_drawn(state):  # all rows stand in one state
            state = self._step_together(state)
        self.reader.end_run()
        self.done, self.remaining = self.done + self.count, self.remaining - self.count
        if state is None:
            while self._step_apart():
                pass
        return SegmentOutput(
            sequence=self.columns.joined(),
            network_calls=self.reader.contexts * self.reader.passes,
            sequential_passes=self.reader.passes,
            count_flops=self.reader.flops,
            codes=self.codes,
        )

    def _segment(self, state: int) -> Segment:
        return self.layout.segments[self.grammar.segment_numbers[state]]

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
        grammar, reader, number = self.grammar, self.reader, self.grammar.set_numbers[state]
        if self._is_island(state):
            return self._draw_island(state, rows=None)
        if grammar.following[state] is None:
            self.states = torch.full_like(self.states, state)
            return None
        if not reader.is_prepared(state):
            reader.prepare(self._run_from(state))
        segment, ids = grammar.sets[number]
        if len(ids) == 1:
            drawn = torch.full_like(self.remaining, ids[0])
        else:
            reader.feed()
            if number not in self._ids_of:
                self._ids_of[number] = grammar.ids_of(number)
            settings = self.sampler.of(self.layout.segments[segment].name)
            chosen, _ = settings.draw(reader.logits(reader.hidden, number), self.uniforms[:, self.count])
            drawn = self._ids_of[number][chosen]
        self.columns.append(drawn[:, None], reader.append_prepared(drawn[:, None], state))
        self.count += 1
        return grammar.following[state]

    def _run_from(self, state: int) -> list[int]:
        """List the states from one on, up to where ids decide what comes, or an island begins."""
        run = [state]
        while (
            (then := self.grammar.following[run[-1]]) is not None and self._is_drawn(then) and not self._is_island(then)
        ):
            run.append(then)
        return run

    # Rows in states of their own.

    def _step_apart(self) -> bool:
        """Draw one id of each row that is at one, or else an island; say whether there was anything to draw."""
        grammar, reader = self.grammar, self.reader
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
            self._draw_island(first, rows=self._mask(rows))
            return True
        reader.feed()
        where = self._mask(at_id)
        allowed = grammar.allowed(self.states, self.remaining, forbidden=self.forbidden)
        if bool((where & ~allowed.any(dim=1)).any()):
            raise ValueError("a prompt leaves no room for the end of its sequence: give a shorter one")
        logits = reader.logits_in(self.states)
        drawn = torch.zeros_like(self.states)
        for number, segment in enumerate(self.layout.segments):
            rows = [
                drawn and grammar.segment_numbers[state] == number for state, drawn in zip(here, at_id, strict=True)
            ]
            if any(rows):
                mine, settings = self._mask(rows), self.sampler.of(segment.name)
                chosen, _ = settings.draw(logits, self._uniforms_here(), allowed=allowed | ~mine[:, None])
                drawn = torch.where(mine, chosen, drawn)
        self.columns.append(drawn[:, None], self.states[:, None], valid=where[:, None])
        reader.append(drawn[:, None], self.states[:, None], where=where)
        self.done, self.remaining = self.done + where.long(), self.remaining - where.long()
        self.states = torch.where(where, grammar.advance(self.states, drawn), self.states)
        return True

    def _mask(self, rows: Sequence[bool]) -> Tensor:
        return torch.tensor(rows, device=self.states.device)

    def _uniforms_here(self) -> Tensor:
        """Give the random number `(B,)` of each row's next id."""
        return self.uniforms.gather(1, self.done.clamp(max=self.layout.length - 1)[:, None])[:, 0]

    # Islands.

    def _draw_island(self, state: int, *, rows: Tensor | None) -> int:
        """Draw the elements of a segment together, in some rows or in all; give the state behind them."""
        grammar, reader, segment = self.grammar, self.reader, self._segment(state)
        reader.feed()
        count = grammar.islands[state]
        states = (state + torch.arange(count, device=self.states.device)).expand(reader.batch, -1)
        island = self.islands.draw(
            reader,
            states,
            segment=segment,
            settings=self.sampler.of(segment.name),
            number=self.drawn_islands,
            rows=rows,
        )
        self.drawn_islands += 1
        valid = None if rows is None else rows[:, None].expand_as(states)
        self.columns.append(island.ids, states, valid=valid, vectors=island.vectors)
        then = grammar.following[state + count - 1]
        assert then is not None, "an island decides nothing"
        if island.codes is not None:
            known = self.codes.get(segment.name, island.codes)
            self.codes[segment.name] = island.codes if rows is None else torch.where(rows[:, None], island.codes, known)
        elif rows is not None or self._is_asked(then):
            reader.read_behind(island.ids, states, vectors=island.vectors, where=rows)
        if rows is None:
            self.count += count
        else:
            self.done, self.remaining = self.done + count * rows.long(), self.remaining - count * rows.long()
            self.states = torch.where(rows, torch.full_like(self.states, then), self.states)
        return then
