"""The benchmarks' count of memory: what is held at the same time, and not what was held before."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from side_by_side.memory import allocated_peak


def test_the_peak_is_of_what_is_held_together() -> None:
    held = [torch.empty(2**20)]

    def run() -> None:
        first, second = torch.empty(2**20), torch.empty(2**20)
        del first
        third, fourth = torch.empty(2**20), torch.empty(2**18)
        del second, third, fourth
        held.clear()

    assert allocated_peak(run) == 4 * (2 * 2**20 + 2**18)
