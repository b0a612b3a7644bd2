"""A function that runs in a process of its own, with a time limit, and gives back what it yields, line by line.

The process is a copy of this one (`fork`), which has imported everything and touched no GPU: so none of the parts pays
for the imports again. Where an import did touch the GPU, whose driver does not survive the copy, a fresh interpreter
is started for each (`spawn`).
"""

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Start = Literal["fork", "spawn"]
_LAST_LINES = 40
_PR_SET_PDEATHSIG = 1
# A fresh interpreter imports everything first, which does not count.
_SECONDS_TO_START = 120.0


@dataclass(frozen=True, kw_only=True)
class End:
    """How a process ended.

    Args:
        status: `done`, `failed: …` or `stopped: …`.
        seconds: how long it took.
        log: the last lines that it printed, where it did not end well.
    """

    status: str
    seconds: float
    log: str = ""


def run_in_process(
    function: Callable[..., Iterable[dict[str, Any]]],
    *arguments: Any,
    seconds: float,
    log: Path,
    start: Start = "fork",
) -> Iterator[dict[str, Any] | End]:
    """Run a function in a process of its own; yield what it yields as it comes, and at last how it ended.

    Args:
        function: of a module, called with the arguments; yields dictionaries of plain values.
        arguments: of the function.
        seconds: after which the process and those that it started are killed, from when the function is called.
        log: the file that gets what the process prints.
        start: how the process begins.
    """
    lines = log.with_suffix(".jsonl")
    for file in (lines, log):
        file.write_text("")
    context: Any = multiprocessing.get_context(start)
    process = context.Process(target=_work, args=(function, arguments, lines, log))
    began = time.monotonic()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads beside a fork. Those here are the idle ones of numpy's matrix library.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    assert process.pid is not None
    ended, error, late, limit = False, "", False, _SECONDS_TO_START
    try:
        with lines.open() as file:
            left, pending = "", True
            while pending:
                pending = process.is_alive() and time.monotonic() - began < limit
                left += file.read()
                *whole, left = left.split("\n")
                for line in whole:
                    values = json.loads(line)
                    if "began" in values:
                        began, limit = time.monotonic(), seconds
                    elif "ended" in values:
                        ended, error, pending = True, values["ended"], False
                    else:
                        yield values
                if pending:
                    process.join(0.05)
        if ended:
            process.join(5)  # it has nothing left to do but to end
        late = not ended and process.is_alive()
    finally:
        _kill(process.pid)
        process.join()
    taken = time.monotonic() - began
    if ended and not error:
        yield End(status="done", seconds=taken)
        return
    if late:
        status = f"stopped: it took longer than {limit:.0f} s"
    elif error:
        status = f"failed: {error}"
    else:
        status = f"failed: its process ended {_how(process.exitcode)}"
    yield End(status=status, seconds=taken, log="\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:]))


def _work(
    function: Callable[..., Iterable[dict[str, Any]]], arguments: tuple[Any, ...], lines: Path, log: Path
) -> None:
    os.setsid()  # so that the processes it starts can be killed with it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # so that it does not outlive a run that is killed
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    error = ""
    with lines.open("a") as file:
        file.write(json.dumps({"began": True}) + "\n")
        file.flush()
        try:
            for values in function(*arguments):
                file.write(json.dumps(values) + "\n")
                file.flush()
        except BaseException as exception:
            traceback.print_exc()
            error = f"{type(exception).__name__}: {exception}".strip().splitlines()[0]
        sys.stdout.flush()
        sys.stderr.flush()
        file.write(json.dumps({"ended": error}) + "\n")
    # Nothing of what an interpreter does at its end, which can hang on the threads and queues of a GPU.
    os._exit(0)


def _kill(group: int) -> None:
    for kill in (os.killpg, os.kill):  # it may not have made its group yet
        try:
            kill(group, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _how(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"by {signal.Signals(-exitcode).name}"
    return f"with exit code {exitcode}"
