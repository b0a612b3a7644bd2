import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from discrete_lit.core import locks
from discrete_lit.core.locks import FolderInUse, FolderLock, is_first_process, sole_writer

# A shell starts what is in the background with some signals ignored, and tests may be there.
HOLD = "import signal, sys, time; from discrete_lit.core.locks import sole_writer\n"
HOLD += "signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
HOLD += "with sole_writer(sys.argv[1], 'fit'):\n    print('held', flush=True)\n    time.sleep(60)\n"


@pytest.fixture
def hold() -> Iterator[Any]:
    """`hold(folder)`: a process that holds the lock of a folder."""
    started: list[subprocess.Popen] = []

    def start(folder: Path) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def test_one_process_at_a_time_and_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with sole_writer(folder, "fit") as first:
        assert first is not None
        with pytest.raises(FolderInUse) as refused, sole_writer(folder, "fit"):
            pass
        for word in (str(folder), str(os.getpid()), os.uname().nodename, "pytest", "since"):
            assert word in str(refused.value)
        with sole_writer(folder, "sample"):
            assert sorted(os.listdir(folder)) == [".fit.lock", ".sample.lock"]
        first.check()
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyError), sole_writer(tmp_path, "fit"):
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_killed_holder_is_succeeded_at_once_and_a_living_one_is_not(hold: Any, tmp_path: Path) -> None:
    holder = hold(tmp_path)
    with pytest.raises(FolderInUse, match=f"process {holder.pid} on"), sole_writer(tmp_path, "fit"):
        pass
    holder.send_signal(signal.SIGKILL)
    # Not reaped yet: a zombie holds nothing.
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with sole_writer(tmp_path, "fit"):
        assert json.loads((tmp_path / ".fit.lock").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_gives_the_lock_back(number: signal.Signals, hold: Any, tmp_path: Path) -> None:
    holder = hold(tmp_path / "run")
    holder.send_signal(number)
    assert holder.wait(timeout=20) != 0
    assert os.listdir(tmp_path) == []


def left(folder: Path, **changes: Any) -> dict[str, Any]:
    """Leave the lock of a process that is gone, or of whom the changes say."""
    lock = FolderLock(folder, "fit")
    record = lock._record() | {"pid": 2**22 + 1, "token": "gone"} | changes
    folder.mkdir(exist_ok=True)
    lock.path.write_text(json.dumps(record))
    return record


def test_a_process_number_that_was_used_again_holds_nothing(tmp_path: Path) -> None:
    left(tmp_path, pid=os.getpid(), started="long ago")
    with sole_writer(tmp_path, "fit"):
        pass


@pytest.mark.parametrize("beats", [True, False])
def test_a_holder_on_another_machine_is_watched_for_a_heartbeat(
    beats: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.1)
    patience = 30 if beats else 0.6
    monkeypatch.setattr(locks, "PATIENCE", patience)
    elsewhere = FolderLock(tmp_path, "fit")
    monkeypatch.setattr(locks, "_machine", lambda: ["node1", "b", "c"])
    elsewhere.acquire()
    monkeypatch.setattr(locks, "_machine", lambda: ["node2", "b", "c"])
    if not beats:
        elsewhere._stop.set()
    # The clocks of the two machines do not matter.
    os.utime(tmp_path / ".fit.lock", (5, 5) if beats else (2**33, 2**33))
    begun = time.monotonic()
    if beats:
        with pytest.raises(FolderInUse, match="is being written by"), sole_writer(tmp_path, "fit"):
            pass
        assert time.monotonic() - begun < patience
        elsewhere.check()
    else:
        with sole_writer(tmp_path, "fit"):
            # It wakes up: what it does from here on must not be published.
            with pytest.raises(FolderInUse, match="was taken over by `"):
                elsewhere.check()
            elsewhere.release()
            assert (tmp_path / ".fit.lock").exists()
        assert time.monotonic() - begun >= patience
    assert "watching it for a sign of life" in capsys.readouterr().err
    elsewhere.release()


def test_a_requeued_job_takes_its_own_lock_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "PATIENCE", 30.0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    left(tmp_path, machine=["another", "b", "c"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with sole_writer(tmp_path, "fit"):
        pass
    # Two steps of one start of a job may run at the same time: that is no requeue.
    left(tmp_path, pid=os.getpid())
    with pytest.raises(FolderInUse), sole_writer(tmp_path, "fit"):
        pass


def test_a_lock_that_came_along_with_a_copy_of_the_folder_holds_nothing(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "run", "fit"):
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / ".fit.lock").write_bytes((tmp_path / "run" / ".fit.lock").read_bytes())
        with sole_writer(tmp_path / "copy", "fit"):
            pass
        (tmp_path / "link").symlink_to(tmp_path / "run")
        with pytest.raises(FolderInUse), sole_writer(tmp_path / "link", "fit"):
            pass


def test_one_of_many_takes_a_stale_lock_over(tmp_path: Path) -> None:
    """Six processes at the same moment, six times; at each second time the first successor died too, in the middle."""
    script = (
        "import sys, time; from pathlib import Path; from discrete_lit.core.locks import *\n"
        "for turn in range(6):\n"
        "    folder = Path(sys.argv[1], str(turn))\n"
        "    while time.time() < float(sys.argv[2]) + turn * 0.25: pass\n"
        "    try:\n"
        "        with sole_writer(folder, 'fit'):\n"
        "            (folder / 'inside').touch(exist_ok=False)\n"
        "            (folder / f'winner-{sys.argv[3]}').touch(); time.sleep(0.15)\n"
        "            (folder / 'inside').unlink()\n"
        "    except FolderInUse: pass\n"
    )
    for turn in range(6):
        folder = tmp_path / str(turn)
        left(folder)
        if turn % 2:
            record = json.loads((folder / ".fit.lock").read_text()) | {"token": "second"}
            (folder / ".fit.lock.gone").write_text(json.dumps(record))
    begin = str(time.time() + 1)
    jobs = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), begin, str(job)]) for job in range(6)]
    assert [job.wait() for job in jobs] == [0] * 6
    assert all(list((tmp_path / str(turn)).glob("winner-*")) for turn in range(6))
    assert [file.name for file in tmp_path.rglob(".*")] == []


def test_a_late_claim_to_a_lock_that_has_moved_on_is_withdrawn(tmp_path: Path) -> None:
    """One judged the lock dead; before it claims it, another has taken it over and given it back."""
    left(tmp_path)
    late = FolderLock(tmp_path, "fit")
    judged = late._is_dead

    def slow(path: Path, record: dict[str, Any]) -> bool | None:
        if record["token"] == "gone":
            quick.acquire()
        return judged(path, record)

    quick = FolderLock(tmp_path, "fit")
    late._is_dead = slow
    with pytest.raises(FolderInUse):
        late.acquire()
    quick.check()
    assert os.listdir(tmp_path) == [".fit.lock"]
    quick.release()


def test_a_file_system_without_links_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*arguments: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with sole_writer(tmp_path, "fit"):
        with pytest.raises(FolderInUse), sole_writer(tmp_path, "fit"):
            pass
    left(tmp_path)
    with sole_writer(tmp_path, "fit"):
        pass
    # One that was killed, or whose disk was full, between making the file and writing it.
    (tmp_path / ".fit.lock").touch()
    monkeypatch.setattr(locks, "_ATTEMPTS", 1)
    with pytest.raises(FolderInUse, match="is not readable: remove it"), sole_writer(tmp_path, "fit"):
        pass


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_the_first_process_of_a_launch_holds_it_for_all(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sole_writer(tmp_path, "fit"):
        monkeypatch.setenv(name, "0")
        assert is_first_process()
        monkeypatch.setenv(name, "1")
        assert not is_first_process()
        with sole_writer(tmp_path, "fit") as lock:
            assert lock is None


def test_a_forked_process_does_not_give_it_back(tmp_path: Path) -> None:
    with sole_writer(tmp_path, "fit"):
        child = os.fork()
        if child == 0:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert (tmp_path / ".fit.lock").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as refused, sole_writer(tmp_path / "file" / "run", "fit"):
        pass
    assert str(tmp_path / "file") in str(refused.value)
