"""Five kills at random points, judged by the package `kills`; as many as you like by `make kills`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_five_kills(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "kills.run", "--kills", "5", "--seed", "0", "--keep", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert "5 kills in" in done.stdout and " 0 faults" in done.stdout
