"""Clocks, and ratios with their spread."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import NamedTuple

import torch


class Seconds(NamedTuple):
    """Of the wall clock, and of this process on all its processors."""

    wall: float
    processor: float


def clock() -> Seconds:
    """Now, after everything that a GPU was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Seconds(perf_counter(), process_time())


def since(start: Seconds, count: int = 1) -> Seconds:
    """From `start` to now, divided by `count`."""
    end = clock()
    return Seconds((end.wall - start.wall) / count, (end.processor - start.processor) / count)


def timed(run: Callable[[], object], at_least: float = 0.0) -> Seconds:
    """What a call takes: the mean of as many as take `at_least` seconds together, of one otherwise."""
    start, calls = clock(), 0
    while not calls or perf_counter() - start.wall < at_least:
        run()
        calls += 1
    return since(start, calls)


def alternate(
    arms: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, at_least: float = 0.0
) -> dict[str, list[Seconds]]:
    """What each arm takes in each round, in which all take turns.

    Args:
        arms: what is measured.
        rounds: of turns.
        warmup: calls of each arm before.
        at_least: seconds of a turn. Arms that take less are called several times, so that what the arm before them left
            in the caches does not decide the outcome.
    """
    for _ in range(warmup):
        for run in arms.values():
            run()
    taken: dict[str, list[Seconds]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            taken[name].append(timed(run, at_least))
    return taken


def milliseconds(taken: Sequence[Seconds]) -> str:
    """Medians, for a table."""
    wall, processor = (1e3 * median(part) for part in zip(*taken, strict=True))
    return f"{wall:9.1f} ms ({processor:9.1f} of processors)"


def ratio(numerator: Sequence[Seconds], denominator: Sequence[Seconds], target: str = "") -> str:
    """Median and quartiles of the rounds' ratios, by both clocks; of fewer than two rounds, the ratio alone."""
    pairs = list(zip(numerator, denominator, strict=True))
    wall = [above.wall / below.wall for above, below in pairs]
    processor = median(above.processor / below.processor for above, below in pairs)
    spread = ""
    if len(pairs) > 1:
        low, _, high = quantiles(wall, n=4)
        spread = f" (quartiles {low:.3f} to {high:.3f})"
    wanted = f"; target {target}" if target else ""
    return f"{median(wall):.3f}{spread}, {processor:.3f} by processor time{wanted}"


class Repeated(NamedTuple):
    """Wall-clock seconds of a call that was repeated."""

    median: float
    lowest: float
    highest: float
    repeats: int

    def spread(self) -> str:
        """How far the calls were apart, in percent of the median, for a note."""
        return f"median of {self.repeats}, {100 * (self.highest - self.lowest) / self.median:.0f}% apart"


def repeated(run: Callable[[], object], *, repeats: int = 5, warmup: int = 1, at_least: float = 0.0) -> Repeated:
    """What a call takes, by the median of `repeats`, each of which waits for the device before and after.

    Args:
        run: what is measured.
        repeats: at least 1.
        warmup: calls before.
        at_least: seconds of a repeat; calls that take less follow one another without waiting, and their mean counts.
    """
    for _ in range(warmup):
        run()
    taken = [timed(run, at_least).wall for _ in range(repeats)]
    return Repeated(median(taken), min(taken), max(taken), repeats)
