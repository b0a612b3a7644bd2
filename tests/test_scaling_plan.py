"""The arithmetic of `benchmarks/scaling_plan.py` on a case worked out by hand, and what it counts of recipes."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from scaling_plan import Machine, Recipe, all_reduce, drawing, recipe_of, saving, step

# 10^9 parameters, 10^12 operations an image; a GPU that computes 5 * 10^14 a second.
MACHINE = Machine(
    peak=1e15,
    mfu=0.5,
    sampling_mfu=0.25,
    memory_rate=2e12,
    nvlink=400e9,
    network=200e9,
    latency=0.0,
    bucket=25e6,
    least_batch=1,
    cores=10,
    images_per_core=100,
    to_host=20e9,
    storage=2e9,
    sampling_batch=250,
)
RECIPE = Recipe(
    name="by hand",
    parameters=10**9,
    flops=1e12,
    global_batch=160,
    steps=1000,
    images=True,
    averaged=True,
    passes=100,
    full_passes=0,
    rows=2,
    cache_bytes=8e6,
)


def test_a_step_by_hand() -> None:
    """On 16 GPUs: 10 images of each. The gradients, 4 * 10^9 bytes, pass the network 2 * 15/16 times."""
    found = step(RECIPE, 16, MACHINE)
    assert found.compute == pytest.approx(10 * 1e12 / 5e14, abs=1e-9) and 10 * 1e12 / 5e14 == 0.02
    assert found.communication == pytest.approx(2 * 15 / 16 * 4e9 / 200e9) and 2 * 15 / 16 * 4e9 / 200e9 == 0.0375
    # Two thirds of the computation hide it.
    assert found.exposed == pytest.approx(0.0375 - 0.02 * 2 / 3)
    assert found.load == pytest.approx(10 / (10 * 100))
    assert found.seconds == pytest.approx(0.02 + 0.0375 - 0.02 * 2 / 3) and found.waiting == 0


def test_what_is_faster_than_the_backward_pass_leaves_its_last_bucket() -> None:
    found = step(RECIPE, 8, replace(MACHINE, network=1.0))  # one node: NVLink
    assert found.communication == pytest.approx(2 * 7 / 8 * 4e9 / 400e9) and found.communication < 0.04 * 2 / 3
    assert found.exposed == pytest.approx(2 * 7 / 8 * 25e6 / 400e9)


def test_a_step_waits_for_slow_input() -> None:
    found = step(RECIPE, 8, replace(MACHINE, images_per_core=1.0))
    assert found.load == found.seconds and found.load == pytest.approx(2.0)
    assert found.waiting == pytest.approx(1 - (found.compute + found.exposed) / 2.0)


def test_collectives_of_one_gpu_and_latencies() -> None:
    assert all_reduce(1e9, 1, MACHINE) == 0
    # 10^9 bytes are 40 buckets, each of 2 log2(8) steps.
    slow = replace(MACHINE, latency=1e-3)
    assert all_reduce(1e9, 8, slow) - all_reduce(1e9, 8, MACHINE) == pytest.approx(40 * 6 * 1e-3)


def test_a_checkpoint_by_hand() -> None:
    """Weights, two moments and the averages, 16 bytes a parameter."""
    assert saving(RECIPE, MACHINE) == (pytest.approx(0.8), pytest.approx(8.0))
    assert saving(replace(RECIPE, averaged=False), MACHINE)[0] == pytest.approx(0.6)


def test_drawing_by_hand() -> None:
    """50,000 images on 8 GPUs are 25 batches of 250 on each, of two rows each."""
    # Token by token: 100 passes read 2 * 10^9 bytes of weights, and half of 500 rows of cache.
    moved = 100 * (2e9 + 500 * 8e6 / 2)
    arithmetic = 500 * 1e12 / 3 / 2.5e14
    assert drawing(RECIPE, 50_000, 8, MACHINE) == pytest.approx(25 * max(moved / 2e12, arithmetic))
    assert arithmetic > moved / 2e12
    # All places in each of 8 passes, without a cache.
    masked = replace(RECIPE, passes=8, full_passes=8, rows=1, cache_bytes=0.0)
    assert drawing(masked, 50_000, 8, MACHINE) == pytest.approx(25 * 250 * 8 * 1e12 / 3 / 2.5e14)
    # A batch of fewer images where there are more GPUs than batches.
    assert drawing(masked, 512, 512, MACHINE) == pytest.approx(max(8 * 1e12 / 3 / 2.5e14, 8 * 2e9 / 2e12))


@pytest.mark.parametrize(
    ("name", "millions", "blocks", "width", "length", "batch", "passes"),
    [("maskgit_imagenet256", 172, 24, 768, 256, 256, 8), ("var_d16_imagenet256", 308, 16, 1024, 680, 768, 10)],
)
def test_what_is_counted_of_a_recipe(
    name: str, millions: int, blocks: int, width: int, length: int, batch: int, passes: int
) -> None:
    found = recipe_of(name)
    assert (round(found.parameters / 1e6), found.global_batch, found.passes) == (millions, batch, passes)
    # Six operations for each weight of a block and each place, and attention's products.
    least = 6 * blocks * 12 * width**2 * length + 12 * blocks * width * length**2
    assert least < found.flops < 1.25 * least
