"""Bits three ways on a CPU: a softmax, a masked-bit head and a binary flow head on the same bits; table and figure.

  python docs/experiments/bits.py

One id of eight bits with a known law, a softmax of random numbers, so that its bits depend on one another in no simple
way. Three heads learn it from its draws on the same small backbone; the total variation between the law and what a
sampler draws is set against the calls of the head. Time on one core: about five minutes. Needs matplotlib.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from shared import spread, stamp
from torch import Tensor

from discrete_lit.backbones import BinaryFlowHead, MaskedBitHead, SequenceLayout, Transformer
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion.solvers import EulerMaruyama
from discrete_lit.generators import Autoregressive
from discrete_lit.samplers import BARSampler, BinaryFlowSampler, RasterSampler, Sampler
from discrete_lit.tokenizers import TokenGrid

BITS = 8
WIDTH = 64
HEADS = ("softmax", "masked bits", "binary flow")
# How many bits are unmasked in each step, by the number of steps.
BIT_COUNTS = {1: (8,), 2: (4, 4), 4: (2, 2, 2, 2), 8: (1,) * 8}
FLOW_STEPS = (2, 4, 8, 16, 32, 64, 101)


def samplers(head: str) -> dict[str, dict[int, Sampler]]:
    """The samplers of a head by their calls of it for each id, and by how they go about it."""
    if head == "softmax":
        return {head: {1: RasterSampler()}}
    if head == "masked bits":
        # BAR's sharpens the law of later steps; with all bits at once, or one by one in turn, it is the head's own.
        by_confidence: dict[int, Sampler] = {
            calls: BARSampler(counts, 1.0, guidance_scale=1.0) for calls, counts in BIT_COUNTS.items()
        }
        return {head: by_confidence, f"{head}, in turn": {BITS: RasterSampler()}}
    return {head: {steps: BinaryFlowSampler(flow_solver(steps)) for steps in FLOW_STEPS}}


def flow_solver(steps: int) -> EulerMaruyama:
    return EulerMaruyama(steps, last_step=0.05, last_drift="velocity")


# --- A known law ---


def known_law(sharpness: float = 1.5) -> Tensor:
    """`(256,)` float64: the law of the id."""
    numbers = torch.randn(2**BITS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (sharpness * numbers).softmax(dim=0)


def draws_of_law(law: Tensor, count: int, seed: int) -> Tensor:
    return torch.multinomial(law, count, replacement=True, generator=torch.Generator().manual_seed(seed))


def law_generator(head: str, seed: int) -> Autoregressive:
    torch.manual_seed(seed)
    heads: dict[str, Callable[[Any, int], Any] | None] = {
        "softmax": None,
        "masked bits": lambda block, size: MaskedBitHead(block, size, width=WIDTH, depth=2),
        "binary flow": lambda block, size: BinaryFlowHead(block, size, width=WIDTH, depth=2, modulations=2),
    }

    def backbone(layout: SequenceLayout) -> Transformer:
        return Transformer(
            layout, width=WIDTH, depth=1, heads=2, norm="rms", token_embedding="bits", place_head=heads[head]
        )

    return Autoregressive(
        TokenGrid(2**BITS, (1,)), 4, num_classes=1, backbone=backbone, label_dropout=0.0, sampler=RasterSampler()
    )


def train_on_law(head: str, seed: int, *, law: Tensor, batches: int, batch_size: int) -> Autoregressive:
    generator = law_generator(head, seed).train()
    optimizer = torch.optim.AdamW(generator.backbone.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches)
    ids = draws_of_law(law, batches * batch_size, seed + 1).view(batches, batch_size, 1)
    labels = torch.zeros(batch_size, dtype=torch.int64)
    for number in range(batches):
        random = CounterRandom(seed, torch.arange(batch_size) + number * batch_size)
        loss, _ = generator.loss(ids[number], labels, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return generator.eval()


def total_variation(ids: Tensor, law: Tensor) -> float:
    return float((torch.bincount(ids.flatten(), minlength=len(law)) / len(ids) - law).abs().sum() / 2)


@torch.no_grad()
def measure_law(given: argparse.Namespace) -> dict[str, Any]:
    """Total variation by head and calls, a value for each seed; nats above the entropy; seconds of training."""
    law = known_law()
    ids = torch.arange(2**BITS)
    variations: dict[str, dict[int, list[float]]] = {}
    nats: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    labels = torch.zeros(given.draws, dtype=torch.int64)
    for seed in given.seeds:
        for head in HEADS:
            begun = time.process_time()
            with torch.enable_grad():
                generator = train_on_law(head, seed, law=law, batches=given.batches, batch_size=256)
            seconds.setdefault(head, []).append(time.process_time() - begun)
            repeats = 16 if head == "binary flow" else 1
            many = ids.repeat(repeats)
            found = generator.log_likelihood(many[:, None], torch.zeros_like(many)).nats.view(repeats, -1).mean(dim=0)
            nats.setdefault(head, []).append(float((law * (law.log() - found)).sum()))
            for way, by_calls in samplers(head).items():
                for calls, sampler in by_calls.items():
                    parts = zip(labels.split(5000), torch.arange(given.draws).split(5000), strict=True)
                    drawn = [generator.draw(rows, CounterRandom(seed, kept), sampler).tokens for rows, kept in parts]
                    off = total_variation(torch.cat(drawn), law)
                    variations.setdefault(way, {}).setdefault(calls, []).append(off)
    floor = [total_variation(draws_of_law(law, given.draws, 10**6 + seed), law) for seed in given.seeds]
    bits = (ids[:, None] >> torch.arange(BITS)) & 1
    ones = (law[:, None] * bits).sum(dim=0)
    independent = torch.where(bits == 1, ones, 1 - ones).prod(dim=1)
    return {
        "entropy": float(-(law * law.log()).sum()),
        "independent": float((independent - law).abs().sum() / 2),
        "floor": floor,
        "variations": variations,
        "nats": nats,
        "seconds": seconds,
    }


def law_page(found: dict[str, Any], command: str) -> list[str]:
    calls = sorted({count for of_calls in found["variations"].values() for count in of_calls})
    lines = [
        f"`{command}`, {stamp()}. Mean ± standard deviation over the seeds.",
        "",
        f"A law of 256 ids with an entropy of {found['entropy']:.3f} nats. Independent bits with the right shares of "
        f"ones are {found['independent']:.3f} off in total variation; as many draws of the law itself "
        f"{spread(found['floor'])}.",
        "",
        f"| calls of the head | {' | '.join(map(str, calls))} |",
        f"|:--|{'--:|' * len(calls)}",
    ]
    for head, of_calls in found["variations"].items():
        cells = [spread(of_calls[count]) if count in of_calls else "" for count in calls]
        lines.append(f"| {head} | {' | '.join(cells)} |")
    lines += ["", "| head | nats above the entropy | seconds to train |", "|:--|--:|--:|"]
    for head in found["nats"]:
        more = "" if head != "binary flow" else ", at most"
        lines.append(f"| {head} | {spread(found['nats'][head], '.4f')}{more} | {mean(found['seconds'][head]):.0f} |")
    return lines


# --- The page ---


def draw_figure(found: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    _, axis = pyplot.subplots(figsize=(5.5, 3.8), constrained_layout=True)
    for head, of_calls in found["variations"].items():
        errors = [stdev(values) if len(values) > 1 else 0.0 for values in of_calls.values()]
        axis.errorbar(
            list(of_calls), [mean(values) for values in of_calls.values()], errors, marker="o", capsize=2, label=head
        )
    axis.axhline(mean(found["floor"]), color="grey", linewidth=0.8, label="draws of the law")
    axis.axhline(found["independent"], color="grey", linewidth=0.8, linestyle=":", label="independent bits")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(xlabel="calls of the head", ylabel="total variation from the law")
    axis.legend(fontsize="small")
    pyplot.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=1000, help="of training, of 256 ids")
    parser.add_argument("--draws", type=int, default=20_000, help="of each sampler")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    given = parser.parse_args()
    options = f"--seeds {' '.join(map(str, given.seeds))} --batches {given.batches} --draws {given.draws}"
    found = measure_law(given)
    draw_figure(found, given.page.with_suffix(".png"))
    lines = ["# Bits three ways", "", *law_page(found, f"python docs/experiments/bits.py {options}")]
    given.page.write_text("\n".join([*lines, "", f"![]({given.page.with_suffix('.png').name})", ""]))
    print(f"Wrote {given.page} and {given.page.with_suffix('.png')}")


if __name__ == "__main__":
    main()
