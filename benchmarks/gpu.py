"""Check on a GPU that the results are right there, then measure that they come fast; one table, JSON and Markdown.

    python benchmarks/gpu.py                                    # everything, under 8 minutes on an H100
    python benchmarks/gpu.py --parts right                      # the checks alone
    python benchmarks/gpu.py --parts nearest_code,checkpoint_moves
    python benchmarks/gpu.py --device cpu --tiny                # every part at tiny sizes, without a GPU
    python benchmarks/gpu.py --list                             # the parts, and the time limit of each

It runs from a source tree, installed or not, on a machine without a network: `docs/gpu.md` says how the few packages
that it needs get there, and where its last table is. Each part has a process of its own and a time limit, so that one
which fails, runs out of memory or hangs takes no other along. Checks run first, then measurements, until `--minutes`
are over; what no longer fits is skipped, and says so. `OUTPUT/gpu.json` and `OUTPUT/gpu.md` are written again after
every part, the rows of one that was stopped included.

Products of float32 matrices are of float32 (TF32 is off) unless a row says otherwise; seeds are fixed.

Exit code: 0; 1 if a check found something wrong, or a part of checks failed, was stopped or skipped; 2 if nothing could
be run (an unknown part, no GPU, a package that is missing). A measurement that fails, or misses its target, leaves 0.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from gpu_parts.part import Part
    from gpu_parts.process import Start

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 8)
# What the parts import, by the name that pip knows it by. Those that only peers need are looked for by their parts.
NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "lightning": "lightning",
    "torchmetrics": "torchmetrics",
    "timm": "timm",
    "einops": "einops",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "tqdm": "tqdm",
    "scipy": "scipy",
    "jsonargparse": "jsonargparse[signatures]",
    "webdataset": "webdataset",
    "braceexpand": "braceexpand",
    "torch_fidelity": "torch-fidelity",
}
# A CPU is slower than the GPU that the limits are meant for, even at tiny sizes.
SLOWER_ON_A_CPU = 6
# A part that would get less than this share of its limit is skipped.
LEAST_SHARE = 0.25


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="right,fast", help="names, or `right` or `fast`, with commas between them")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds on a CPU; no speed means anything")
    golden = os.environ.get("DISCRETE_LIT_GOLDEN")
    parser.add_argument(
        "--golden",
        type=Path,
        default=golden and Path(golden),
        help="folder of the reference outputs, <family>/<case>.safetensors; DISCRETE_LIT_GOLDEN by default",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--commit", help="to note in the results, where git does not know it")
    parser.add_argument("--list", action="store_true", help="the parts, what they do, and their time limits")
    parser.add_argument(
        "--start", choices=("fork", "spawn"), default="fork", help="how the process of a part begins: see process.py"
    )
    return parser.parse_args()


def refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def check_packages() -> None:
    """Stop with one message that names all packages that are missing or too old."""
    if sys.version_info < OLDEST_PYTHON:
        refuse(f"Python {'.'.join(map(str, OLDEST_PYTHON))} or newer is needed; this is {sys.version.split()[0]}")
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        refuse(
            f"missing packages: {' '.join(missing)}. Where there is a network: pip install {shlex.join(missing)}. "
            "Where there is none: `make gpu-wheels` on a machine that has one makes a folder to carry; docs/gpu.md "
            "says how it is used"
        )
    import torch

    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        refuse(f"torch {'.'.join(map(str, OLDEST_TORCH))} or newer is needed; this is {torch.__version__}")


def chosen(names: str, parts: "dict[str, Part]", broken: dict[str, str]) -> "list[Part]":
    """The parts that `--parts` names, the checks first, each kind in the order of its modules."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = sorted(set(wanted) - parts.keys() - {"right", "fast"})
    if unknown:
        unread = f"; not imported: {', '.join(f'{name} ({why})' for name, why in broken.items())}" if broken else ""
        refuse(f"unknown parts: {', '.join(unknown)}; there are right, fast, {', '.join(parts)}{unread}")
    found = [part for part in parts.values() if part.name in wanted or part.kind in wanted]
    return sorted(found, key=lambda part: part.kind == "fast")


def list_parts(parts: "list[Part]") -> None:
    for part in parts:
        print(f"{part.name:28s} {part.kind:6s} {part.seconds:4.0f} s  {part.what}")
    print(f"{len(parts)} parts, at most {sum(part.seconds for part in parts):.0f} s")


def driver() -> str | None:
    """The version of NVIDIA's driver; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def versions() -> dict[str, str]:
    import lightning
    import torch

    found = {"Python": sys.version.split()[0], "torch": torch.__version__, "lightning": lightning.__version__}
    return found | ({"CUDA": torch.version.cuda} if torch.version.cuda else {})


class Run:
    """What is known of a run so far, and the files that say it."""

    def __init__(self, options: argparse.Namespace) -> None:
        from discrete_lit.core.provenance import git_commit

        self.output: Path = options.output
        self.values: dict[str, Any] = {
            "command": shlex.join(["python", *(part.replace(f"{ROOT}/", "") for part in sys.argv)]),
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "commit": options.commit or git_commit(),
            "versions": versions(),
            "driver": driver() if options.device == "cuda" else None,
            "device": options.device,
            "judged": options.device == "cuda" and not options.tiny,
            "machine": None,
            "parts": [],
        }

    def add(
        self,
        part: "Part",
        status: str,
        *,
        seconds: float = 0.0,
        rows: list[dict[str, Any]] | None = None,
        log: str = "",
    ) -> None:
        """Note a part, and write what there is."""
        named = {"name": part.name, "kind": part.kind, "what": part.what, "limit": part.seconds}
        self.values["parts"].append({**named, "status": status, "seconds": seconds, "rows": rows or [], "log": log})
        self.write()

    def write(self) -> None:
        from gpu_parts.table import markdown

        texts = {"gpu.json": json.dumps(self.values, indent=1) + "\n", "gpu.md": markdown(self.values)}
        for name, text in texts.items():
            # A run that is killed while it writes leaves the file of before.
            unfinished = self.output / f"{name}.new"
            unfinished.write_text(text)
            unfinished.replace(self.output / name)

    @property
    def right(self) -> bool:
        parts = [part for part in self.values["parts"] if part["kind"] == "right"]
        return all(part["status"] == "done" and all(row["ok"] is not False for row in part["rows"]) for part in parts)

    def summary(self) -> str:
        parts = self.values["parts"]
        rows = [row for part in parts for row in part["rows"]]
        oks, mets = ([row[key] for row in rows if key in row] for key in ("ok", "met"))
        unfinished = [
            f"{part['name']} ({part['status'].partition(':')[0]})" for part in parts if part["status"] != "done"
        ]
        return (
            f"checks: {oks.count(True)} right, {oks.count(False)} wrong, {oks.count(None)} could not be made; targets: "
            f"{mets.count(True)} met, {mets.count(False)} missed; parts: {len(parts) - len(unfinished)} done"
            + (f", not done: {', '.join(unfinished)}" if unfinished else "")
        )


def measure_limits(options: argparse.Namespace, folder: Path) -> "tuple[dict[str, Any], Start]":
    """The machine's figures, measured in a process of its own, and how the processes of the parts can start."""
    import torch
    from gpu_parts.device_limits import device_limits
    from gpu_parts.process import End, run_in_process

    starts: list[Start] = ["fork", "spawn"] if options.start == "fork" else ["spawn"]
    for start in starts:
        for values in run_in_process(
            device_limits,
            torch.device(options.device),
            options.tiny,
            seconds=120,
            log=folder / "limits.log",
            start=start,
        ):
            if isinstance(values, End):
                refuse(f"the {options.device} device could not be measured: {values.status}\n{values.log}")
            if values.get("absent"):
                refuse("torch finds no GPU here; `--device cpu --tiny` runs every part without one, at tiny sizes")
            if not values.get("poisoned"):
                return values, start
            break
    raise AssertionError("a fresh process has touched no GPU")


def run_part(name: str, setting: Any) -> Iterator[dict[str, Any]]:
    """In the process of a part: its rows."""
    import torch
    from gpu_parts import discovery
    from gpu_parts.part import PARTS, as_json

    if name not in PARTS:
        discovery.import_parts()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield from map(as_json, PARTS[name].run(replace(setting, started=time.monotonic())))


def run_parts(options: argparse.Namespace, parts: "list[Part]", broken: dict[str, str], folder: Path) -> bool:
    """Run the parts in turn, with their own files in `folder`; whether all that was checked is right."""
    import torch
    from gpu_parts import discovery
    from gpu_parts.part import Machine, Part, Setting
    from gpu_parts.process import End, run_in_process
    from gpu_parts.table import line

    began = time.monotonic()
    slower = SLOWER_ON_A_CPU if options.device == "cpu" else 1
    run = Run(options)
    machine, start = measure_limits(options, folder)
    run.values["machine"] = machine
    rates = ", ".join(f"{name} {rate / 1e12:,.2f}" for name, rate in machine["rates"].items())
    print(f"{machine['name']}: {machine['bandwidth'] / 1e9:,.0f} GB/s copied; TFLOP/s: {rates}")
    for name, why in broken.items():
        module = Part(name=name, kind=discovery.kind_of(name), seconds=0.0, what="a module of parts", run=lambda _: [])
        run.add(module, f"failed: it cannot be imported: {why}")
        print(f"\n{name}: cannot be imported: {why}", flush=True)

    for part in parts:
        limit, left = part.seconds * slower, 60 * options.minutes * slower - (time.monotonic() - began)
        print(f"\n{part.name}: {part.what}", flush=True)
        if left < LEAST_SHARE * limit:
            run.add(part, f"skipped: {max(0, left):.0f} s were left, and it may take {limit:.0f} s")
            print(f"  {run.values['parts'][-1]['status']}", flush=True)
            continue
        setting = Setting(
            device=torch.device(options.device),
            tiny=options.tiny,
            golden=options.golden or None,
            output=folder / part.name,
            machine=Machine(**machine),
            seconds=min(limit, left),
        )
        setting.output.mkdir(exist_ok=True)
        rows: list[dict[str, Any]] = []
        log = folder / f"{part.name}.log"
        for values in run_in_process(run_part, part.name, setting, seconds=setting.seconds, log=log, start=start):
            if isinstance(values, End):
                run.add(part, values.status, seconds=values.seconds, rows=rows, log=values.log)
                print(
                    f"  {values.status}, {values.seconds:.0f} s" + (f"\n{values.log}" if values.log else ""), flush=True
                )
            else:
                rows.append(values)
                print(line(values), flush=True)
    print(f"\n{run.summary()}\n{time.monotonic() - began:.0f} s; written to {options.output}/gpu.md and gpu.json")
    return run.right


def main() -> None:
    options = parse()
    for folder in (BENCHMARKS, ROOT):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    check_packages()
    # An import that only asks whether there is a GPU then asks the driver's library, and does not open the device.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if options.device == "cpu":
        os.environ.setdefault("DISCRETE_LIT_CPU_KERNELS", "0")  # it stands for a GPU, which has none of a CPU's own
    from gpu_parts import discovery
    from gpu_parts.part import PARTS

    broken = discovery.import_parts()
    parts = chosen(options.parts, PARTS, broken)
    if options.list:
        list_parts(parts)
        return
    if options.golden and not options.golden.is_dir():
        refuse(f"--golden {options.golden} is no folder")

    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        right = run_parts(options, parts, broken, Path(folder))
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
