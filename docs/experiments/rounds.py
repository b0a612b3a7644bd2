"""About ten rounds, ten times faster? Passes, operations and seconds of masked and next-token sampling; table, figure.

  python docs/experiments/rounds.py

One transformer with random weights, whose cost does not depend on them, draws N ids of 1,024, with batches of several
sizes and without guidance: next-token prediction with a key-value cache, the same with a pass over the whole prefix for
each id, and MaskGIT in ten rounds. Operations are those of the network for one image, as the samplers report them.

Seconds are those of one thread's processor, of whole draws, the arms in turns, the median of the repeats. Without a
cache they are not of whole draws: passes over nine prefixes from 0 to N - 1 ids are timed, and summed by the
trapezoidal rule. Needs matplotlib.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from statistics import median

import torch
from shared import processor_minutes, stamp

from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.core.random import CounterRandom
from discrete_lit.samplers import MaskGITSampler, RasterSampler, Sampler

CODES, WIDTH, DEPTH, HEADS = 1024, 256, 8, 8
CACHED, UNCACHED, MASKED = "next token, cached", "next token, no cache", "MaskGIT"


@dataclass(frozen=True)
class Cost:
    """One way to draw: what it takes for an image of a batch."""

    passes: int
    flops: int  # for each image
    seconds: float  # for the whole batch


def network(length: int, attention: str) -> Transformer:
    side = isqrt(length)
    layout = SequenceLayout(
        CODES, (side, side), num_classes=10, attention=attention, mask_token=attention == "bidirectional"
    )
    torch.manual_seed(0)
    return Transformer(layout, width=WIDTH, depth=DEPTH, heads=HEADS).eval().requires_grad_(False)


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of the one thread's processor, which other work on the machine does not lengthen by making it wait."""
    start = time.process_time()
    run()
    return time.process_time() - start


def uncached_flops(backbone: Transformer, length: int) -> int:
    """The operations of passes over all prefixes of 0 to N - 1 ids; those of one are quadratic in its length."""
    first, second, third = (backbone.flops(1, count) for count in (1, 2, 3))
    curvature = (third - 2 * second + first) / 2
    slope = second - first - 3 * curvature
    constant = first - slope - curvature
    total = sum(constant + slope * count + curvature * count**2 for count in range(length))
    last = length - 1
    assert abs(constant + slope * last + curvature * last**2 - backbone.flops(1, last)) < 1, "not quadratic"
    return round(total)


def uncached_seconds(backbone: Transformer, labels: torch.Tensor, length: int) -> float:
    places = sorted({round(number * (length - 1) / 8) for number in range(9)})
    tokens = torch.zeros(len(labels), length, dtype=torch.int64)
    taken = [seconds_of(partial(backbone, tokens[:, :place], labels)) for place in places]
    inner = sum(
        (taken[number] + taken[number + 1]) / 2 * (places[number + 1] - places[number])
        for number in range(len(places) - 1)
    )
    return inner + (taken[0] + taken[-1]) / 2  # N passes: the ends count whole


def measure(length: int, batch: int, masked_rounds: int, repeats: int) -> dict[str, Cost]:
    """All three ways to draw `batch` sequences of `length` ids."""
    causal, bidirectional = network(length, "causal"), network(length, "bidirectional")
    labels = torch.arange(batch) % 10
    random = CounterRandom(0, torch.arange(batch))
    arms: dict[str, tuple[Sampler, Transformer]] = {
        CACHED: (RasterSampler(), causal),
        MASKED: (MaskGITSampler(masked_rounds), bidirectional),
    }
    outputs = {name: sampler(backbone, labels, random) for name, (sampler, backbone) in arms.items()}  # warm
    taken: dict[str, list[float]] = {name: [] for name in (*arms, UNCACHED)}
    for _ in range(repeats):
        for name, (sampler, backbone) in arms.items():
            taken[name].append(seconds_of(partial(sampler, backbone, labels, random)))
        taken[UNCACHED].append(uncached_seconds(causal, labels, length))
    costs = {
        name: Cost(output.sequential_passes, output.flops, median(taken[name])) for name, output in outputs.items()
    }
    costs[UNCACHED] = Cost(length, uncached_flops(causal, length), median(taken[UNCACHED]))
    return costs


def draw_figure(found: dict[tuple[int, int], dict[str, Cost]], path: Path) -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    lengths, batches = (sorted({key[part] for key in found}) for part in (0, 1))
    for axis, other in zip(axes, (CACHED, UNCACHED), strict=True):
        for number, batch in enumerate(batches):
            ratios = [found[length, batch][other].seconds / found[length, batch][MASKED].seconds for length in lengths]
            axis.plot(lengths, ratios, marker="o", color=f"C{number}", label=f"seconds, batches of {batch}")
        of_one = [found[length, batches[0]] for length in lengths]
        axis.plot(
            lengths,
            [costs[other].flops / costs[MASKED].flops for costs in of_one],
            color="black",
            linestyle="--",
            label="operations",
        )
        axis.plot(
            lengths,
            [costs[other].passes / costs[MASKED].passes for costs in of_one],
            color="black",
            linestyle=":",
            label="passes",
        )
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="ids of an image", ylabel=f"{other} / {MASKED}")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
    axes[0].legend(fontsize="x-small")
    pyplot.savefig(path, dpi=100)


def page(found: dict[tuple[int, int], dict[str, Cost]], masked_rounds: int, command: str, machine: str) -> list[str]:
    lines = [
        "# About ten rounds, ten times faster?",
        "",
        f"`{command}`, {machine}. A transformer of {DEPTH} blocks of width {WIDTH} over {CODES:,} ids, float32; "
        f"MaskGIT in {masked_rounds} rounds. Speed-ups are of MaskGIT: above 1 it is the faster.",
        "",
        "| ids | batch | passes: next token, MaskGIT | GFLOPs/image: cached, no cache, MaskGIT | images/s: cached, no "
        "cache, MaskGIT | speed-up over cached | over no cache |",
        "|--:|--:|:--|:--|:--|--:|--:|",
    ]
    for (length, batch), costs in found.items():
        masked = costs[MASKED]
        arms = [costs[CACHED], costs[UNCACHED], masked]
        flops = ", ".join(f"{cost.flops / 1e9:.2f}" for cost in arms)
        speeds = ", ".join(f"{batch / cost.seconds:.2f}" for cost in arms)
        faster = " | ".join(f"{costs[name].seconds / masked.seconds:.2f}" for name in (CACHED, UNCACHED))
        lines.append(
            f"| {length} | {batch} | {costs[CACHED].passes}, {masked.passes} | {flops} | {speeds} | {faster} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024], help="N, squares")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="images drawn together")
    parser.add_argument("--rounds", type=int, default=10, help="of MaskGIT")
    parser.add_argument("--repeats", type=int, default=3, help="turns of the arms")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        (length, batch): measure(length, batch, given.rounds, given.repeats)
        for length in given.lengths
        for batch in given.batches
    }
    picture = given.page.with_suffix(".png")
    draw_figure(found, picture)
    command = f"python docs/experiments/rounds.py {_options(given.lengths, given.batches)} --rounds {given.rounds}"
    command += f" --repeats {given.repeats}"
    machine = f"{stamp()}, {processor_minutes():.0f} minutes of processor"
    lines = page(found, given.rounds, command, machine)
    given.page.write_text("\n".join([*lines, "", f"![]({picture.name})", ""]))
    print(f"Wrote {given.page} and {picture}")


def _options(lengths: Sequence[int], batches: Sequence[int]) -> str:
    return f"--lengths {' '.join(map(str, lengths))} --batches {' '.join(map(str, batches))}"


if __name__ == "__main__":
    main()
