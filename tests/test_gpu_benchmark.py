"""`benchmarks/gpu.py` runs every part without a GPU at tiny sizes, and outlives parts that fail, hang or crash."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"

PARTS = """
import os, subprocess, sys, time
sys.path.insert(0, {benchmarks!r})
import gpu
from gpu_parts.part import Check, Floor, Measurement, Peer, part

@part("fine", kind="right", seconds=60, what="one that is right")
def fine(setting):
    assert setting.tiny and setting.machine.rate("bfloat16") > 0 and setting.output.is_dir()
    yield Check(name="sum", case="of | all", error=1e-6, tolerance=1e-4, ok=True, what="share")

@part("doubtful", kind="right", seconds=60, what="one that is wrong")
def doubtful(setting):
    yield Check(name="sum", error=float("nan"), tolerance=1e-4, ok=False)

@part("broken", kind="right", seconds=60, what="one that raises")
def broken(setting):
    yield Check(name="first", ok=True)
    raise RuntimeError("out of luck")

@part("hangs", kind="fast", seconds=0.5, what="one that never ends")
def hangs(setting):
    floor, peer = Floor(value=1.5, what="bytes"), Peer(name="theirs", value=12.0)
    yield Measurement(name="speed", value=3.0, unit="ms", better="lower", floor=floor, peer=peer, target="at least 3x")
    child = subprocess.Popen(["sleep", "1000"])
    with open({child!r}, "w") as file:
        file.write(str(child.pid))
    time.sleep(1000)

@part("crashes", kind="fast", seconds=60, what="one that dies")
def crashes(setting):
    print("about to die", flush=True)
    os.kill(os.getpid(), 11)
    yield

@part("long", kind="fast", seconds=1e5, what="one that the minutes do not suffice for")
def long(setting):
    yield Measurement(name="never", value=1.0, unit="s", better="lower")

if __name__ == "__main__":
    gpu.main()
"""


def run(script: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )


def state_of(process: int) -> str:
    """The state letter of a process, or nothing where there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_part_that_fails_takes_no_other_along(tmp_path: Path, start: str) -> None:
    script, child, output = tmp_path / "script.py", tmp_path / "child", tmp_path / "results"
    script.write_text(PARTS.format(benchmarks=str(BENCHMARKS), child=str(child)))
    names = "hangs,fine,doubtful,broken,crashes,long"
    settings = ("--device", "cpu", "--tiny", "--output", output, "--start", start)
    done = run(script, *settings, "--parts", names, "--commit", "abc")
    assert done.returncode == 1, done.stdout + done.stderr

    results = json.loads((output / "gpu.json").read_text(), parse_constant=pytest.fail)
    parts = {part["name"]: part for part in results["parts"]}
    assert [*parts] == ["fine", "doubtful", "broken", "hangs", "crashes", "long"], "checks come first"
    status = {name: part["status"] for name, part in parts.items()}
    assert (status["fine"], status["doubtful"]) == ("done", "done")
    assert status["broken"] == "failed: RuntimeError: out of luck"
    assert status["hangs"].startswith("stopped: it took longer than")
    assert status["crashes"] == "failed: its process ended by SIGSEGV" and "about to die" in parts["crashes"]["log"]
    assert status["long"].startswith("skipped: ")
    assert "Traceback" in parts["broken"]["log"] and parts["broken"]["rows"][0]["name"] == "first"
    assert parts["doubtful"]["rows"][0]["error"] == "nan"
    speed = parts["hangs"]["rows"][0]
    assert (speed["share"], speed["times_the_peer"], speed["met"]) == (0.5, 4.0, None)
    assert results["commit"] == "abc" and results["versions"]["torch"] and results["machine"]["bandwidth"] > 0
    assert not results["judged"] and "--parts" in results["command"]

    page = (output / "gpu.md").read_text()
    assert "| ok | sum | of \\| all | 1.0e-06 | 1.0e-04 | share |  |" in page
    assert "| - | speed |  | 3 ms | 50% of 1.5 (bytes) | 4x theirs (12) | at least 3x |  |" in page
    assert "no speed below means anything" in page and "Skipped: " in page
    for shown in ("WRONG  sum", "speed; 3 ms; 50% of 1.5 (bytes)", "2 right, 1 wrong", "broken (failed)"):
        assert shown in done.stdout
    # What the part that hung had started is gone too.
    assert state_of(int(child.read_text())) in ("", "Z")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The runner as a module, with the parts of this tree."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu
    from gpu_parts import discovery

    assert discovery.import_parts() == {}
    return gpu


def test_names_of_parts(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from gpu_parts.part import PARTS, part

    names = [part.name for part in gpu.chosen("fast,nearest_code,right", PARTS, {})]
    assert sorted(names) == sorted(PARTS) and names[0] == "golden_float32"
    assert [part.name for part in gpu.chosen("nearest_code,golden_bf16", PARTS, {})] == ["golden_bf16", "nearest_code"]
    with pytest.raises(SystemExit) as refused:
        gpu.chosen("nearest_code,nearest_cod", PARTS, {"fast_sampling": "ImportError: no such name"})
    message = capsys.readouterr().err
    assert refused.value.code == 2 and "unknown parts: nearest_cod; there are right, fast, golden_float32" in message
    assert "not imported: fast_sampling (ImportError: no such name)" in message
    with pytest.raises(ValueError, match="names are unique"):
        part("nearest_code", kind="right", seconds=1, what="a name that is taken")
    assert sum(part.seconds for part in PARTS.values() if part.kind == "right") <= 60 * 8


def test_missing_packages_are_named_together(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = gpu.find_spec
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name in ("webdataset", "PIL") else there(name))
    with pytest.raises(SystemExit) as refused:
        gpu.check_packages()
    message = capsys.readouterr().err
    assert refused.value.code == 2
    assert "missing packages: pillow webdataset." in message and "make gpu-wheels" in message


def test_a_run_that_is_killed_keeps_what_it_had(gpu: Any, tmp_path: Path) -> None:
    from gpu_parts.part import PARTS

    noted = gpu.Run(Namespace(output=tmp_path, commit="abc", device="cpu", tiny=True))
    noted.add(PARTS["nearest_code"], "done", rows=[])
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"][0]["status"] == "done"
    assert "### nearest_code" in (tmp_path / "gpu.md").read_text()


def test_the_list_needs_no_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--list", "--parts", "right"])
    gpu.main()
    listed = capsys.readouterr().out
    assert listed.startswith("golden_float32") and "categorical_draws" in listed and " parts, at most " in listed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--parts", "nearest_code", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as refused:
        gpu.main()
    assert refused.value.code == 2
    assert "torch finds no GPU here; `--device cpu --tiny`" in capsys.readouterr().err


@pytest.mark.slow
def test_every_part_runs_without_a_gpu(tmp_path: Path) -> None:
    done = run(BENCHMARKS / "gpu.py", "--device", "cpu", "--tiny", "--output", tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    unfinished = {part["name"]: part["status"] + part["log"] for part in parts if part["status"] != "done"}
    assert unfinished == {}
    checks = [(part["name"], row) for part in parts if part["kind"] == "right" for row in part["rows"]]
    golden = "DISCRETE_LIT_GOLDEN" in os.environ
    unchecked = [(name, row) for name, row in checks if not row["ok"] and (golden or not name.startswith("golden"))]
    assert unchecked == [] and all(part["rows"] for part in parts)
