"""Reading of a sequence that grows: pass by pass, with a cache, in all contexts of guidance at once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from discrete_lit.backbones.cache import RaggedCache
from discrete_lit.backbones.segment_sequence import SegmentSequence, coordinates_of
from discrete_lit.backbones.segment_transformer import SegmentTransformer
from discrete_lit.core.modules import at_least_float32
from discrete_lit.core.synchronisation import on_device


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


class SegmentReader:
    """Read prompts, and then what is drawn behind them, and say what the network predicts next.

    B sequences are read in R contexts: given everything; for guidance, given nothing too, and the image alone. What is
    drawn is the same in all of them. The network has R B rows, those of a context one after another.

    Args:
        network: in eval mode.
        prompts: the beginnings of the sequences in each context, of which none may be empty.

    Attributes:
        contexts: R.
        batch: B.
        hidden: `(R B, D)`, the states that predict what follows in each row.
        lengths: `(B,)` int64, the elements of each prompt given everything.
        behind: `(B,)` int64, the state of the grammar behind each of them.

    Raises:
        ValueError: an empty prompt, or contexts of different numbers of samples.
    """

    def __init__(self, network: SegmentTransformer, prompts: Sequence[SegmentSequence]) -> None:
        self.network, self.grammar = network, network.grammar
        self.contexts, self.batch = len(prompts), len(prompts[0])
        # How many elements each pass read, and how many they attended to; and how many logits were made.
        self._made: Counter[tuple[int, int]] = Counter()
        self._logits = 0
        self._run: _Run | None = None
        self._place = 0  # of the last element that was drawn, in the run
        # Drawn ids that the network has not read: ids and states (B, 1), and which rows have one, None for all.
        self._pending: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._read_prompts(_stacked(prompts, self.grammar.done))

    def _read_prompts(self, prompts: SegmentSequence) -> None:
        grammar, lengths, most = self.grammar, prompts.lengths(), self.network.layout.length
        counts = lengths.tolist()
        if min(counts) < 1:
            raise ValueError("a prompt is empty: it begins with the first id of its first segment at least")
        prompts = prompts.up_to(max(counts))  # texts come as long as the longest that there may be
        # Behind what is kept, an island that is drawn is read again and again.
        room = max(counts) + most - min(counts[: self.batch]) + max(1, *grammar.islands)
        self.cache: RaggedCache = self.network.new_cache(len(prompts), room)
        hidden = self.network(prompts, self.cache)
        self._made[prompts.ids.shape[1], prompts.ids.shape[1]] += 1
        _, then = coordinates_of(grammar, prompts.states, origin=self.cache.origin)
        if min(counts) == max(counts):
            self.cache.advance(counts[0], then)
        else:
            self.cache.advance(lengths, then, reach=max(counts))
        last = lengths - 1
        rows = torch.arange(len(prompts), device=lengths.device)
        self.hidden: Tensor = hidden[rows, last]
        state, id = prompts.states[rows, last], prompts.ids[rows, last]
        self.behind = grammar.advance(state, id)[: self.batch]
        self.lengths = lengths[: self.batch]

    @property
    def passes(self) -> int:
        """The number of passes so far, in which all contexts are read together."""
        return self._made.total()

    def flops(self) -> int:
        """Count the floating-point operations of the network for each sample so far, in all contexts."""
        passes = sum(times * self.network.flops(*shape) for shape, times in self._made.items())
        return self.contexts * (passes + 2 * self.network.width * self._logits)

    # Elements that were drawn one after another.

    def prepare(self, run: Sequence[int]) -> None:
        """Prepare what is read with one element in each of these states, which follow one another in all rows.

        All of it is known before the first is drawn, and made for all of them at once: a pass over one element is
        short.
        """
        assert not self._pending, "what was drawn before stands in front of what is prepared"
        states = on_device(torch.tensor, tuple(run), device=self.behind.device).expand(self.batch, -1)
        of_contexts = self._repeated(states)
        coordinates, then = coordinates_of(self.grammar, of_contexts, origin=self.cache.origin)
        self._run = _Run(
            place={each: number for number, each in enumerate(run)},
            states=states,
            of_contexts=of_contexts,
            sample=torch.zeros_like(of_contexts),
            # The last of them may stand behind the longest sequence, where nothing is read any more.
            rotary=self.network.rotary_of(coordinates.clamp(max=self.network.layout.length)),
            then=then,
        )

    def is_prepared(self, state: int) -> bool:
        """Say whether a state is one of those that were prepared."""
        return self._run is not None and state in self._run.place

    def end_run(self) -> None:
        """Forget what was prepared, where the rows go on in states of their own."""
        self._run = None

    def append_prepared(self, ids: Tensor, state: int) -> Tensor:
        """Append ids `(B, 1)` that were drawn at a prepared state, and give that state in all rows, `(B, 1)`."""
        assert self._run is not None
        # What was appended before has been read, or is read together with this one.
        self._place = self._run.place[state]
        states = self._run.states[:, self._place : self._place + 1]
        self.append(ids, states)
        return states

    def append(self, ids: Tensor, states: Tensor, *, where: Tensor | None = None) -> None:
        """Append drawn ids and their states, `(B, 1)`, of some rows `(B,)` or of all; `feed` lets them be read."""
        self._pending.append((ids, states, where))

    def feed(self) -> None:
        """Let the network read what was appended, if it has not: `hidden` then predicts what follows."""
        if not self._pending:
            return
        if self._run is not None and len(self._pending) == 1 and self.cache.even:
            self._feed_one(self._run)
            return
        ids = torch.cat([each for each, _, _ in self._pending], dim=1)
        states = torch.cat([each for _, each, _ in self._pending], dim=1)
        where, self._pending = self._pending[-1][2], []
        assert where is None or ids.shape[1] == 1
        self.read_behind(ids, states, where=where)

    def _feed_one(self, run: _Run) -> None:
        """Let the network read the element that was drawn last, of a run."""
        (ids, _, _), self._pending = self._pending[0], []
        here = slice(self._place, self._place + 1)
        sequence = SegmentSequence(ids=self._repeated(ids), states=run.of_contexts[:, here], sample=run.sample[:, here])
        self._made[1, self.cache.reach + 1] += 1
        self.hidden = self.network(sequence, self.cache, rotary=run.rotary[:, :, here])[:, 0]
        self.cache.advance(1, run.then[:, here])

    # Elements that are read together.

    def read(
        self,
        ids: Tensor,
        states: Tensor,
        *,
        vectors: Mapping[str, Tensor] | None = None,
        times: Tensor | None = None,
        where: Tensor | None = None,
        kept: bool = True,
    ) -> Tensor:
        """Run the network over elements behind what it has read.

        Args:
            ids, states: `(B, n)` int64.
            vectors: `(B, n, E)` of a segment, by its name.
            times: `(B, n)`, how noisy they are; clean by default.
            where: `(B,)` bool, the rows that keep them; all by default.
            kept: whether any do; else they are read as if they had not been.

        Returns:
            The network's states at them in every context, `(R B, n, D)`.
        """
        states = self._repeated(states)
        sequence = SegmentSequence(
            ids=self._repeated(ids),
            states=states,
            sample=torch.zeros_like(states),
            vectors={name: self._repeated(values) for name, values in (vectors or {}).items()},
            times=None if times is None else self._repeated(times),
        )
        self._made[states.shape[1], self.cache.reach + states.shape[1]] += 1
        hidden = self.network(sequence, self.cache)
        if kept:
            _, then = coordinates_of(self.grammar, states, origin=self.cache.origin)
            if where is None:
                self.cache.advance(states.shape[1], then)
            else:
                counts = self._repeated(where).long() * states.shape[1]
                self.cache.advance(counts, then, reach=int((self.cache.filled + counts).max()))
        return hidden

    def read_behind(
        self,
        ids: Tensor,
        states: Tensor,
        *,
        vectors: Mapping[str, Tensor] | None = None,
        where: Tensor | None = None,
    ) -> None:
        """Read elements as `read` does, and let the last of them predict what follows."""
        self.predict_from(self.read(ids, states, vectors=vectors, where=where)[:, -1], where=where)

    def predict_from(self, hidden: Tensor, *, where: Tensor | None = None) -> None:
        """Let states `(R B, D)` of the network predict what follows, in some rows `(B,)` or in all."""
        self.hidden = hidden if where is None else torch.where(self._repeated(where)[:, None], hidden, self.hidden)

    # What is predicted, given each context.

    def logits(self, hidden: Tensor, number: int) -> Sequence[Tensor]:
        """Give the logits of a set of ids of the grammar at states `(R B, ..., D)`: R of `(B, ..., K)`."""
        return self._by_context(self._counted(self.network.logits(hidden, number)))

    def logits_in(self, states: Tensor) -> Sequence[Tensor]:
        """Give the logits of all ids that follow rows in states `(B,)` of their own: R of `(B, K)`."""
        self._logits += self.network.layout.vocab_size
        return [self.network.logits_in(states, each) for each in self.hidden.chunk(self.contexts)]

    def scale_logits(self, hidden: Tensor, segment: str) -> Sequence[Tensor]:
        """Give the logits of the codes of scales at states `(R B, n, D)`: R of `(B, n, K)`."""
        return self._by_context(self._counted(self.network.predict_scales(hidden, segment=segment)))

    def vectors(self, hidden: Tensor, segment: str) -> Sequence[Tensor]:
        """Give what the network says of vectors at states `(R B, P, D)`, in float32 or better: R of `(B, P, E)`."""
        return self._by_context(at_least_float32(self.network.predict_vectors(hidden, segment=segment)))

    def _counted(self, logits: Tensor) -> Tensor:
        self._logits += logits[0].numel()
        return logits

    def _by_context(self, rows: Tensor) -> Sequence[Tensor]:
        return rows.chunk(self.contexts) if self.contexts > 1 else (rows,)

    def _repeated(self, values: Tensor) -> Tensor:
        """Repeat `(B, ...)` for every context."""
        return torch.cat([values] * self.contexts) if self.contexts > 1 else values


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
