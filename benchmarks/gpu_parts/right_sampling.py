"""What is drawn on the device is what the mathematics says: caches, compilation, batches, and the draws themselves."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from helpers.recorded_graph import RecordedGraphs
from torch import Tensor

from discrete_lit.backbones.execution import (
    compile_blocks,
    compile_for_sampling,
)
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.generators import Generator, GraphedDraw
from discrete_lit.samplers import Sampler
from discrete_lit.samplers.categorical import draw_categorical
from gpu_parts.part import Check, Setting, part
from gpu_parts.small_generators import CLASSES, FAMILIES, ONE_OF_EACH, small_generator

# Relative to the largest logit. Sums of float32 in another order differ by less; those of float64 by far less.
LOGITS = {torch.float32: 1e-4, torch.float64: 1e-11}
# Of float32: the share of images that may differ. Their logits differ by rounding where a batch, a cache or a graph
# takes other sums, and an id whose uniform number lies that close to the border of two ids is another one.
IMAGES = 0.05


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest value; infinite where something is not finite."""
    error = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
    return error if error == error else float("inf")


def same_logits(name: str, case: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> Check:
    """A row on two passes that must give the same logits."""
    error = difference(found, expected)
    return Check(
        name=name,
        case=f"{case}, {str(dtype).removeprefix('torch.')}",
        error=error,
        tolerance=LOGITS[dtype],
        ok=error <= LOGITS[dtype],
        what="share of the largest logit",
    )


def same_images(name: str, case: str, found: Tensor, expected: Tensor, dtype: torch.dtype, note: str = "") -> Check:
    """A row on two draws from the same random numbers: how many images differ."""
    differing = int((found != expected).flatten(1).any(dim=1).sum())
    tolerance = 0.0 if dtype == torch.float64 else max(1.0, IMAGES * len(found))
    return Check(
        name=name,
        case=f"{case}, {str(dtype).removeprefix('torch.')}",
        error=float(differing),
        tolerance=tolerance,
        ok=differing <= tolerance,
        what=f"images of {len(found)} that differ",
        note=note,
    )


def labels_of(count: int, setting: Setting) -> Tensor:
    return torch.arange(count, device=setting.device) % CLASSES


# --- Caches ---


@part(
    "cached_equals_uncached", kind="right", seconds=20, what="logits place by place on a cache against one whole pass"
)
@torch.no_grad()
def cached_equals_uncached(setting: Setting) -> Iterator[Check]:
    for name in (name for name in FAMILIES if name.startswith(("autoregressive", "next scale"))):
        for dtype in (torch.float64, torch.float32):
            generator, _ = small_generator(name, setting, dtype)
            whole, steps = cached_passes(generator, setting, dtype)
            yield same_logits(name, f"{len(whole)} rows", steps, whole, dtype)


def cached_passes(generator: Generator, setting: Setting, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Outputs `(B, N, …)` for the same random ids, of one pass and of a pass for each place or scale."""
    backbone = generator.sampled_backbone()
    batch, layout, labels = 4, backbone.layout, labels_of(4, setting)
    random = CounterRandom(0, torch.arange(batch, device=setting.device))
    ids = (random.uniform(Purpose.TOKEN, layout.length) * layout.vocab_size).long()
    if layout.input_dim is None:
        inputs, lengths = ids[:, :-1], [1] * layout.length
    else:
        vectors: Any = generator.scale_quantizer()
        inputs, lengths = vectors.teacher_forcing(ids).to(dtype), list(layout.scales)
    whole = backbone(inputs, labels)
    cache, rows, start = backbone.new_cache(labels), [], 0
    # The first call reads no input: the first place follows from the label.
    for number, length in enumerate(lengths):
        read = inputs[:, :0] if number == 0 else inputs[:, start : start + length]
        rows.append(backbone(read, labels, cache))
        start += length if number else 0
    return whole, torch.cat(rows, dim=1)


# --- Compiled code ---


@part("compiled_equals_eager", kind="right", seconds=60, what="compiled blocks against eager ones: logits, and draws")
@torch.no_grad()
def compiled_equals_eager(setting: Setting) -> Iterator[Check]:
    batch, dtype = (4 if setting.tiny else 32), torch.float32
    for name in ("autoregressive, LlamaGen",) if setting.tiny else ONE_OF_EACH:
        if setting.seconds_left() < setting.seconds / 4:
            yield Check(name=name, ok=None, note="no time was left to compile it")
            continue
        torch.compiler.reset()
        generator, sampler = small_generator(name, setting, dtype)
        expected = generator.sample(labels_of(batch, setting), sampler)
        began = time.monotonic()
        if setting.tiny:
            # What is captured is checked; C++ for it takes a minute to compile.
            compile_blocks(generator.backbone, backend="aot_eager")
        else:
            compile_for_sampling(generator.backbone)
        found = generator.sample(labels_of(batch, setting), sampler)
        note = f"the first draw compiled for {time.monotonic() - began:.0f} s"
        yield same_images(name, f"batch {batch}", found, expected, dtype, note)


# --- CUDA graphs ---


@part(
    "graph_equals_eager", kind="right", seconds=45, what="a draw that was recorded as a CUDA graph against an eager one"
)
def graph_equals_eager(setting: Setting) -> Iterator[Check]:
    """The first batch warms up, the second is recorded, the third replays the record on other labels and indices.

    On a CPU, which has no such graphs, a list of the same operations is replayed on the same memory.
    """
    batch = 4 if setting.tiny else 32
    for name in FAMILIES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            autocast = torch.autocast(setting.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
            generator, sampler = small_generator(
                name, setting, torch.float64 if dtype == torch.float64 else torch.float32
            )
            recorder = None if setting.device.type == "cuda" else RecordedGraphs()
            draw = GraphedDraw(generator, sampler, seed=3, batch_size=batch, recorder=recorder)
            found, expected = [], []
            with autocast:
                for number in range(3):
                    labels = (labels_of(batch, setting) + number) % CLASSES
                    indices = torch.arange(batch, device=setting.device) + 2**20 * number
                    found.append(draw(labels, indices).tokens)
                    expected.append(generator.sample(labels, sampler, seed=3, indices=indices))
            row = same_images(name, f"3 batches of {batch}", torch.cat(found), torch.cat(expected), dtype)
            yield row if draw.recorded else replace(row, ok=False, note=f"not recorded: {draw.reason}")


# --- Batches ---


@part("same_samples_any_batch", kind="right", seconds=40, what="the same seed gives the same samples for every batch")
@torch.no_grad()
def same_samples_any_batch(setting: Setting) -> Iterator[Check]:
    """In float64 the ids are the same, whatever the batch. In float32 the matrix products of another batch take their
    sums in another order: where a uniform number falls on the border of two ids to within that rounding, another id is
    drawn, and what follows differs. So it is counted."""
    for name in FAMILIES:
        for dtype in (torch.float64, torch.float32):
            generator, sampler = small_generator(name, setting, dtype)
            yield from batches_of(generator, sampler, name, setting, dtype)


def batches_of(
    generator: Generator, sampler: Sampler, name: str, setting: Setting, dtype: torch.dtype
) -> Iterator[Check]:
    labels, indices = labels_of(64, setting), torch.arange(64, device=setting.device)
    expected = generator.sample(labels, sampler, seed=5, indices=indices)
    for batch, count in ((7, 64), (1, 4)):
        parts = zip(labels[:count].split(batch), indices[:count].split(batch), strict=True)
        found = torch.cat([generator.sample(each, sampler, seed=5, indices=index) for each, index in parts])
        yield same_images(name, f"batch {batch} against 64", found, expected[:count], dtype)


# --- Draws ---


@part("categorical_draws", kind="right", seconds=15, what="random bits, draws from given numbers, and rare ids")
@torch.no_grad()
def categorical_draws(setting: Setting) -> Iterator[Check]:
    yield from random_bits(setting)
    yield from draws_of_a_cpu(setting)
    yield from rare_ids(setting)


def random_bits(setting: Setting) -> Iterator[Check]:
    """Philox gives the same bits on every device."""
    indices = torch.tensor([0, 1, 2**31, 2**40 + 7])
    for seed in (0, -1, 2**63 + 5):
        found, expected = (
            CounterRandom(seed, indices.to(device)).uniform(Purpose.TOKEN, 10_001, step=3).cpu()
            for device in (setting.device, torch.device("cpu"))
        )
        yield Check(
            name="uniform numbers",
            case=f"seed {seed}",
            error=float((found != expected).sum()),
            tolerance=0.0,
            ok=torch.equal(found, expected),
            what="numbers that differ from a CPU's",
        )


def draws_of_a_cpu(setting: Setting) -> Iterator[Check]:
    """The same logits and uniform numbers give the ids that they give on a CPU."""
    rows, ids = (256, 500) if setting.tiny else (4096, 16_384)
    uniforms = CounterRandom(1, torch.arange(rows)).uniform(Purpose.TOKEN, 1)[:, 0]
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, ids, generator=generator, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        given = logits.to(dtype)
        found = draw_categorical(given.to(setting.device), uniforms.to(setting.device)).cpu()
        differing = int((found != draw_categorical(given, uniforms)).sum())
        tolerance = 0 if dtype == torch.float64 else rows // 100
        yield Check(
            name="draws",
            case=f"{rows:,} rows of {ids:,} ids, {str(dtype).removeprefix('torch.')}",
            error=float(differing),
            tolerance=float(tolerance),
            ok=differing <= tolerance,
            what="ids that differ from a CPU's",
            note="" if dtype == torch.float64 else "softmax rounds in float32: borders of ids move by 1e-7",
        )


def rare_ids(setting: Setting) -> Iterator[Check]:
    """Ids of probability 1e-9 are drawn exactly where the uniform number says, in front of the others and behind."""
    rare, count = 1e-9, 1000
    common = 1 - rare * count
    logits = torch.full((count + 1,), rare, dtype=torch.float64).log()
    middles = rare * (torch.arange(count, dtype=torch.float64) + 0.5)
    places = {
        "in front": (torch.cat((logits[1:], logits[:1])), middles, torch.arange(count)),
        "behind": (logits, common + middles, torch.arange(1, count + 1)),
    }
    for place, (values, uniforms, expected) in places.items():
        values[count if place == "in front" else 0] = torch.tensor(common, dtype=torch.float64).log()
        rows = values.float().expand(count, -1).to(setting.device)
        found = draw_categorical(rows, uniforms.to(setting.device)).cpu()
        differing = int((found != expected).sum())
        yield Check(
            name="ids of probability 1e-9",
            case=f"{count} {place}, float32 logits",
            error=float(differing),
            tolerance=0.0,
            ok=differing == 0,
            what=f"ids of {count} that were not drawn at their place",
        )
