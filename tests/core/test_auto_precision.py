"""`precision: auto`: bfloat16 where the machine multiplies it."""

from pathlib import Path

import pytest
import torch

from discrete_lit.core import auto_precision
from discrete_lit.core.auto_precision import cpu_multiplies_bfloat16, resolve_precision


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A machine with these flags of its processor, or none that are known, and GPUs of these capabilities."""

    def make(flags: str | None, *capabilities: tuple[int, int]) -> None:
        file = tmp_path / "cpuinfo"
        if flags is not None:
            file.write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\nbugs\t\t: none\n\nprocessor\t: 1\n")
        monkeypatch.setattr(auto_precision, "_CPU_FLAGS", file)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])

    return make


@pytest.mark.parametrize(
    ("flags", "multiplies"),
    [
        ("avx512f avx512_bf16", True),
        ("amx_bf16 amx_tile", True),
        ("avx512f avx512bw avx512_vnni", False),
        ("not_avx512_bf16 avx512_bf16x", False),
        (None, False),
    ],
)
def test_processors(machine, flags: str | None, multiplies: bool) -> None:
    machine(flags)
    assert cpu_multiplies_bfloat16() is multiplies
    assert resolve_precision("auto") == resolve_precision("auto", "cpu") == ("bf16-mixed" if multiplies else "32-true")


def test_gpus(machine) -> None:
    machine("avx2", (9, 0), (8, 0))
    assert resolve_precision("auto") == resolve_precision("auto", "gpu") == "bf16-mixed"
    assert resolve_precision("auto", "cpu") == "32-true"
    machine("avx512_bf16", (9, 0), (7, 5))
    assert resolve_precision("auto", "cuda") == "32-true"
    assert resolve_precision("auto", "cpu") == "bf16-mixed"


def test_another_accelerator(machine) -> None:
    machine("avx512_bf16")
    assert resolve_precision("auto", "mps") == "32-true"


def test_a_precision_that_is_given_stays(machine) -> None:
    machine("avx512_bf16")
    assert resolve_precision("16-mixed") == "16-mixed"
