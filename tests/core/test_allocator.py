"""What a process frees is kept for the next batch: pages that the system has to clear are counted."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from discrete_lit.core.allocator import keep_freed_memory

PAGES = """
import resource, torch
from discrete_lit.core.allocator import keep_freed_memory
kept = keep_freed_memory(torch.device("cpu"))
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, [pages() for _ in range(10)][-1])  # the heap grows at first
"""


def of_a_process(environment: dict[str, str]) -> tuple[bool, int]:
    done = subprocess.run([sys.executable, "-c", PAGES], env=environment, capture_output=True, text=True, check=True)
    kept, pages = done.stdout.split()
    return kept == "True", int(pages)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_is_kept_unless_the_environment_says_how() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    kept, pages = of_a_process(plain)
    assert kept and pages < 1000
    # 48 MB of 4 kB pages, three times.
    told, cleared = of_a_process({**plain, "MALLOC_MMAP_THRESHOLD_": "1000000"})
    assert not told and cleared > 20 * max(pages, 1)


def test_other_devices_have_memory_of_their_own() -> None:
    assert not keep_freed_memory(torch.device("meta"))
