"""What is counted of a draw on a GPU without one."""

import sys
from pathlib import Path

import pytest

GPU_PARTS = Path(__file__).parents[1] / "benchmarks" / "gpu_parts"


@pytest.mark.slow
def test_the_operators_and_waits_of_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(GPU_PARTS)
    try:
        from launches import launches, markdown

        (row,) = rows = launches(["MaskGIT"])
    finally:
        sys.modules.pop("launches", None)
    assert row["family"] == "MaskGIT" and row["steps"] == 8
    assert row["synchronisations"] == "0 + 1"
    # 24 blocks of at least four products and two norms, and eight passes.
    assert 24 * 6 < row["operators a step"] < 24 * 60
    assert 8 * 24 * 6 < row["operators a draw"] < 8 * 24 * 60
    assert markdown(rows).splitlines()[-1].startswith("| MaskGIT | 8 | ")
