"""Pack what `benchmarks/gpu.py` needs on a machine that has neither this repository nor a network.

    make gpu-wheels                                    # once, where there is a network
    python benchmarks/gpu_pack.py --golden FOLDER      # or make gpu-pack GOLDEN=FOLDER

Into `gpu.tar` go the package, the benchmarks, the recipes and cases that these share with others, the folder
`gpu_wheels/`, and `gpu_golden/`, which is made here: the reference outputs of the families that are loaded, without the
others. Both folders stay, for machines that get the source tree in another way. The sizes are printed.
"""

import argparse
import os
import shutil
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ("discrete_lit", "benchmarks", "lightning_configs", "tests/helpers", "Makefile", "pyproject.toml", "LICENSE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    golden = os.environ.get("DISCRETE_LIT_GOLDEN")
    parser.add_argument("--golden", type=Path, default=golden and Path(golden), help="DISCRETE_LIT_GOLDEN by default")
    parser.add_argument("--output", type=Path, default=ROOT / "gpu.tar")
    parser.add_argument("--most", type=float, default=64.0, help="MiB that the machine takes; more is an error")
    options = parser.parse_args()
    if options.golden and not options.golden.is_dir():
        parser.error(f"--golden {options.golden} is no folder")
    if options.golden:
        copy_golden(options.golden, ROOT / "gpu_golden")

    parts = [*TREE, "gpu_wheels", "gpu_golden"]
    with tarfile.open(options.output, "w") as tar:
        for name in parts:
            if (ROOT / name).exists():
                before = tar.offset
                tar.add(ROOT / name, name, filter=without_compiled)
                print(f"{(tar.offset - before) / 2**20:7.1f} MiB  {name}")
            else:
                print(
                    f"      no     {name}" + (": see `make gpu-wheels`" if name == "gpu_wheels" else ": see --golden")
                )
    size = options.output.stat().st_size / 2**20
    print(f"{size:7.1f} MiB  {options.output}")
    if size > options.most:
        sys.exit(f"error: {size:.1f} MiB are more than --most {options.most:g}")


def copy_golden(source: Path, target: Path) -> None:
    """Copy the cases of the families whose outputs are compared."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from helpers.golden import cases_in
    from helpers.golden_outputs import compared

    shutil.rmtree(target, ignore_errors=True)
    for case in cases_in(source):
        if compared(case.family):
            (target / case.family).mkdir(parents=True, exist_ok=True)
            for file in (case.file, case.file.with_suffix(".json")):
                shutil.copyfile(file, target / case.family / file.name)


def without_compiled(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in entry.name else entry


if __name__ == "__main__":
    main()
