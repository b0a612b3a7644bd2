"""Judge every crafted input: `PYTHONPATH=.:tests python -m bad_input.run [--list] [PART OF A NAME ...]`.

Each is crafted in one process and read in another, forked from this one, so that nothing is imported again. The reader
has 60 seconds and 2 GB: its largest resident memory is measured, with PyTorch's own 0.4 GB in it, and a limit of its
address space keeps the machine from harm. Nothing that it started may be left, and no code may have run.
"""

import argparse
import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import lightning  # noqa: F401 (imported once, for all)
import torch

from bad_input import archives, arrays, pictures, settings, weights
from bad_input.case import CANARY, Case

CASES: list[Case] = [*archives.CASES, *pictures.CASES, *arrays.CASES, *weights.CASES, *settings.CASES]
SECONDS, BYTES = 60, 2 * 10**9
# Of address space above what the process has already: more than the limit, less than what harms a machine.
FENCE = 6 * 2**30
READ_TIMEOUT = 5
SUBREAPER = 36


class Verdict(NamedTuple):
    """What came of a case."""

    case: Case
    end: str
    """`right` or `refused`; or what is wrong with it."""
    fault: str | None
    seconds: float
    megabytes: int


def run_forked(action: Callable[[], object], folder: Path, seconds: float) -> tuple[dict[str, str], float, int]:
    """Run something in a forked process: what it says of itself, seconds, and its largest memory in bytes."""
    said = folder.parent / "said.json"
    said.unlink(missing_ok=True)
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _in_child(action, folder, said)
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - begin > seconds:
            os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            return {"end": f"hangs: over {seconds:.0f} s"}, time.monotonic() - begin, usage.ru_maxrss * 1024
        time.sleep(0.005)
    taken = time.monotonic() - begin
    if os.waitstatus_to_exitcode(status) != 0 or not said.is_file():
        return {"end": f"died with {os.waitstatus_to_exitcode(status)}"}, taken, usage.ru_maxrss * 1024
    return json.loads(said.read_text()), taken, usage.ru_maxrss * 1024


def _in_child(action: Callable[[], object], folder: Path, said: Path) -> None:
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        log = os.open(folder.parent / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.path.insert(0, str(folder))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + FENCE, used + FENCE))
        try:
            result = {"end": str(action())}
        except ValueError as error:
            result = {"end": "refused", "message": str(error)}
        except BaseException as error:
            last = "".join(traceback.format_exception(error)[-3:])
            result = {"end": f"traceback: {type(error).__name__}: {error}"[:300], "message": last}
        said.write_text(json.dumps(result))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(3)


def judge(case: Case, place: Path) -> Verdict:
    """Craft and read one input in a folder of its own."""
    shutil.rmtree(place, ignore_errors=True)
    folder = place / "here"
    folder.mkdir(parents=True)
    crafted, _, _ = run_forked(lambda: case.craft(folder) and None, folder, 300)
    if crafted["end"] != "None":
        return Verdict(case, "not crafted", f"not crafted: {crafted}", 0, 0)

    def act() -> str:
        fault = case.fault_of_result(case.read(folder))
        return "right" if fault is None else fault

    said, seconds, memory = run_forked(act, folder, SECONDS)
    end, fault = said["end"], None
    if end == "refused":
        fault = case.fault_of_message(said["message"])
    elif end != "right":
        fault = end
    if memory > BYTES:
        fault = f"took {memory / 1e9:.1f} GB; {fault or end}"
    if (folder / CANARY).exists():
        fault = f"CODE WAS EXECUTED; {fault or end}"
    if left := _end_orphans():
        fault = f"left {left} processes; {fault or end}"
    shutil.rmtree(place, ignore_errors=True)
    return Verdict(case, end, fault, seconds, memory // 10**6)


def _end_orphans() -> int:
    """End the processes that a reader left, which are this one's children now, and count those that were alive."""
    time.sleep(0.02)
    alive = 0
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            alive += state not in "ZX"
            os.kill(int(pid), signal.SIGKILL)
            os.waitpid(int(pid), 0)
    return alive


def main(arguments: list[str] | None = None) -> list[Verdict]:
    """Judge the cases, all or those whose names have one of the given parts, and print what is wrong."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--verbose", action="store_true", help="print every verdict")
    parser.add_argument("parts", nargs="*", help="parts of the names of the cases to judge")
    asked = parser.parse_args(arguments)
    cases = [case for case in CASES if not asked.parts or any(part in case.name for part in asked.parts)]
    if asked.list:
        print("\n".join(case.name for case in cases))
        return []
    torch.set_num_threads(1)
    os.environ.setdefault("DISCRETE_LIT_READ_TIMEOUT", str(READ_TIMEOUT))
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    weights.checkpoints()
    verdicts = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bad-input-") as scratch:
        for case in cases:
            verdict = judge(case, Path(scratch, "case"))
            verdicts.append(verdict)
            if verdict.fault is not None or asked.verbose:
                wrong = "WRONG" if verdict.fault else "ok"
                print(f"{wrong} {case.name}: {verdict.fault or verdict.end}", flush=True)
                print(f"      {verdict.seconds:.1f} s, {verdict.megabytes} MB", flush=True)
    ends = Counter("wrong" if verdict.fault else verdict.end for verdict in verdicts)
    slowest = max(verdicts, key=lambda verdict: verdict.seconds)
    largest = max(verdicts, key=lambda verdict: verdict.megabytes)
    print(
        f"{len(verdicts)} crafted inputs: {ends['right']} read rightly, {ends['refused']} refused in one message, "
        f"{ends['wrong']} wrong; the slowest took {slowest.seconds:.1f} s ({slowest.case.name}), the largest "
        f"{largest.megabytes} MB ({largest.case.name}); {time.monotonic() - begin:.0f} s in all"
    )
    return verdicts


if __name__ == "__main__":
    sys.exit(any(verdict.fault for verdict in main()))
