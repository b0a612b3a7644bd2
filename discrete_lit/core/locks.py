"""One process at a time writes into a folder, on this machine or on several that share a file system.

The lock is a file with the holder's name in it. It is written under another name and linked to its own, which fails
where there is one: network file systems honour that, unlike flock. It is removed at the end. A holder that was killed
leaves it; whether it lives is found as follows.

- On this machine, by its process number and the time at which that process started: numbers are used again.
- On another one, by its heartbeat: the holder touches the file every `BEAT` seconds. Whoever finds the lock watches it:
  one that is touched is held; one that is not touched for `PATIENCE` seconds is stale. No two clocks are compared.
- A SLURM job that was put back into the queue takes its own lock over at once: its earlier start has ended.

Two processes may find the same lock stale. Each record has a token, and the successor of token T is whoever makes the
file `.<purpose>.lock.T` in the same way: one of them. It writes its own record over the lock, then removes that file.
A process that wakes later may still create the file; it finds that the lock has another token than T, and withdraws.
If the successor dies in between, its record stands in `.<purpose>.lock.T`, and is judged and succeeded in the same way.
"""

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_held: list["FolderLock"] = []
BEAT = 10.0
"""Seconds between two heartbeats."""
PATIENCE = 90.0
"""Seconds without a heartbeat after which the lock of another machine's process is stale."""
_ATTEMPTS = 40
# Each launcher's number of a process. In one that is not the first of its launch, one of these is not 0.
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK")
Record = dict[str, Any]


class FolderInUse(ValueError):
    """Another process writes into the folder."""


def is_first_process() -> bool:
    """Tell whether this is the first process of its launch, before any process group exists.

    The launchers say it by environment variables: torchrun, SLURM's srun, Lightning's own subprocesses, LSF and MPI.
    """
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


class FolderLock:
    """Be the only writer of one kind in a folder, between `acquire` and `release`.

    Args:
        folder: made where it is not there; removed at the end if it is still empty then.
        purpose: the kind of output, such as the command: different kinds may be written at the same time.
    """

    def __init__(self, folder: str | os.PathLike[str], purpose: str) -> None:
        self.folder = Path(folder)
        self.purpose = purpose
        self.path = self.folder / f".{purpose}.lock"
        self.token = uuid.uuid4().hex
        self._process = os.getpid()
        self._made: list[Path] = []
        self._watched: dict[str, tuple[float, int]] = {}
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock, or that of a dead holder.

        Where another machine's process holds it, this waits for its heartbeat: up to `PATIENCE` seconds if it is dead.

        Raises:
            FolderInUse: somebody else holds it; the message says who.
            OSError: the folder cannot be written.
        """
        try:
            self._make_folder()
            self._take()
        except BaseException:
            self._remove_empty_folders()
            raise
        self._beats = threading.Thread(target=self._beat, name=f"lock of {self.folder}", daemon=True)
        self._beats.start()
        _held.append(self)

    def check(self) -> None:
        """Ask whether the lock is still this process's.

        A process that was stopped for minutes may wake after another machine has taken the lock over.

        Raises:
            FolderInUse: another process has taken it over.
        """
        record = _read(self.path)
        if record is None:
            _create(self.path, self._record())  # whoever removed it by hand did not take it
        elif record.get("token") != self.token:
            raise FolderInUse(
                f"{self.folder} was taken over by {_describe(record)}, since this process gave no sign of life for "
                f"{PATIENCE:.0f} seconds: what it did since then is not written"
            )

    def release(self) -> None:
        """Give the lock back; a process forked from the holder does nothing."""
        if os.getpid() != self._process or self._beats is None:
            return
        _held.remove(self)
        self._stop.set()
        self._beats.join()
        self._beats = None
        record = _read(self.path)
        if record is not None and record.get("token") == self.token:
            with suppress(OSError):
                self.path.unlink()
        self._remove_empty_folders()

    def _take(self) -> None:
        unreadable = 0
        while True:
            path, record = self._last_record()
            if record is None:
                if _create(self.path, self._record()):
                    break
                # One that vanished meanwhile; or, on a file system without links, one that is just being written.
                unreadable += 1
                if unreadable > _ATTEMPTS:
                    raise FolderInUse(f"{self.path} is not readable: remove it if no process writes into {self.folder}")
                time.sleep(0.05)
                self._make_folder()  # the one that released it may have removed the folder too
                continue
            dead = self._is_dead(path, record)
            if dead is None:
                time.sleep(BEAT / 20)
            elif not dead:
                raise FolderInUse(
                    f"{self.folder} is being written by {_describe(record)}: wait for its end, stop it, or choose "
                    f"another folder (if that process is gone, remove {self.path})"
                )
            elif _create(claim := _after(self.path, record), self._record()):
                if self._last_record()[0] == claim:
                    self._replace()
                    break
                claim.unlink(missing_ok=True)
        # What processes left that died while they took the lock.
        for file in self.folder.glob(f"{self.path.name}.*"):
            file.unlink(missing_ok=True)

    def _last_record(self) -> tuple[Path, Record | None]:
        """Read the lock, or, of those that were about to succeed each other in it, the last; and where it stands."""
        path, record = self.path, _read(self.path)
        while record is not None and (successor := _read(_after(self.path, record))) is not None:
            path, record = _after(self.path, record), successor
        return path, record

    def _is_dead(self, path: Path, record: Record) -> bool | None:
        """Tell whether the holder of a record is gone; None where that takes longer to see."""
        job, own_job = record.get("slurm"), _slurm_job()
        if job and own_job and job[:2] == own_job[:2] and job[2] < own_job[2]:
            return True
        if record.get("machine") == _machine():
            if _started(record["pid"]) != record["started"]:
                return True
            # The lock came along when somebody copied the folder; the holder has its own.
            origin = Path(record["path"])
            return not _same(origin, self.path) and (_read(origin) or {}).get("token") == record["token"]
        try:
            with open(path, "rb") as file:  # opening it is what makes a network file system look again
                touched = os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None
        if record["token"] not in self._watched:
            self._watched[record["token"]] = (time.monotonic(), touched)
            sys.stderr.write(
                f"{self.folder} has the lock of {_describe(record)}: watching it for a sign of life, at most "
                f"{PATIENCE:.0f} seconds\n"
            )
        begun, first = self._watched[record["token"]]
        if touched != first:
            return False
        return True if time.monotonic() - begun >= PATIENCE else None

    def _record(self) -> Record:
        return {
            "token": self.token,
            "host": platform.node(),
            "pid": self._process,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": _command(),
            "machine": _machine(),
            "started": _started(self._process),
            "slurm": _slurm_job(),
            "path": str(self.path.absolute()),
        }

    def _replace(self) -> None:
        temporary = self.path.with_name(f"{self.path.name}.{self.token}")
        _create(temporary, self._record())
        os.replace(temporary, self.path)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            record = _read(self.path)
            if record is not None and record.get("token") == self.token:
                with suppress(OSError):
                    os.utime(self.path)

    def _make_folder(self) -> None:
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self._made = list(dict.fromkeys((*self._made, *missing)))
        self.folder.mkdir(parents=True, exist_ok=True)

    def _remove_empty_folders(self) -> None:
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()


def check_locks() -> None:
    """Ask, before a file is given its final name, whether the locks that this process took are still its own.

    Raises:
        FolderInUse: another process has taken one over.
    """
    for lock in _held:
        lock.check()


@contextmanager
def sole_writer(
    folder: str | os.PathLike[str], purpose: str, *, end_on_signals: bool = True
) -> Iterator[FolderLock | None]:
    """Let one launch at a time write one kind of output into a folder; its first process holds the lock.

    Args:
        folder: made where it is not there.
        purpose: the kind of output, such as the command.
        end_on_signals: SIGTERM and SIGHUP end the block by `SystemExit`, so that the lock is given back. Without it
            somebody else handles them.

    Yields:
        The lock; None in the other processes of the launch.

    Raises:
        FolderInUse: another launch holds it; the message says who.
    """
    if not is_first_process():
        yield None
        return
    lock = FolderLock(folder, purpose)
    with ExitStack() as ends:
        if end_on_signals and threading.current_thread() is threading.main_thread():
            ends.enter_context(_ending_on_signals())
        lock.acquire()
        ends.callback(lock.release)
        yield lock


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    process = os.getpid()

    def end(number: int, frame: Any) -> None:
        if os.getpid() == process:
            raise SystemExit(128 + number)
        # A worker forked from this process, which holds nothing.
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    handled = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    replaced = {number: signal.signal(number, end) for number in handled if signal.getsignal(number) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


def _after(path: Path, record: Record) -> Path:
    """Name the file that succeeds a record of the lock."""
    return path.with_name(f"{path.name}.{record['token']}")


def _read(path: Path) -> Record | None:
    """Read a record; None where there is none, or where it is not whole."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and {"token", "pid", "started", "path"} <= record.keys() else None


def _create(path: Path, record: Record) -> bool:
    """Make a file with a record; False where it is there already."""
    text = json.dumps(record)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    try:
        try:
            _write(temporary, text)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        try:
            os.link(temporary, path)
        except FileExistsError:
            # The answer to a link may get lost on the network, and it is asked for again.
            return (_read(path) or {}).get("token") == record["token"]
        except FileNotFoundError:
            return False  # whoever took the lock has tidied up
        except OSError:  # a file system without links
            try:
                _write(path, text)
            except FileExistsError:
                return False
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _describe(record: Record) -> str:
    return (
        f"`{record.get('command')}` (process {record.get('pid')} on {record.get('host')}, since {record.get('since')})"
    )


def _command() -> str:
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


def _same(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except OSError:
        return False


def _slurm_job() -> list[Any] | None:
    """Return cluster, job and how often SLURM has started it again."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    return [os.environ.get("SLURM_CLUSTER_NAME", ""), job, int(os.environ.get("SLURM_RESTART_COUNT", 0))]


def _machine() -> list[str]:
    """Name what process numbers count in: the host since it was started, and the container."""
    boot = container = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        container = os.readlink("/proc/self/ns/pid")
    return [platform.node(), boot, container]


def _started(pid: int) -> str | None:
    """When a process of this machine started, in the system's own words; None where there is none, or a zombie."""
    if Path("/proc/self/stat").exists():
        try:
            # The name of the program, which may hold anything, ends with the last parenthesis.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    found = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True)
    state, _, started = found.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else started.strip()
