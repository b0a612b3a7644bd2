"""The parts of a command that the jobs of an array do: which job does which, what is done, what is left.

A command with n parts cuts its work, numbered batches of numbered samples, into n runs of neighbours. Which part has a
batch follows from its number alone: not from who runs, when, or how often. So a part that is run again does the same,
and one that was interrupted goes on. All jobs fill one folder, which they share:

- `<output>/<command>.parts/plan.json`: n, and every setting that decides what the samples are. Whoever comes first
  writes it; a job with another n or other settings is refused.
- `<output>/<command>.parts/<i>-of-<n>.json`: part i is done, and what it says of itself, such as a hash of its rows.

A command that is not cut is one part of one, and goes on after an interruption in the same way.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from discrete_lit.core.bounded_reading import read_json
from discrete_lit.core.distributed import rank
from discrete_lit.core.files import atomic_write_text
from discrete_lit.core.locks import FolderInUse, FolderLock

_FORMAT = "discrete-lit-parts-1"
_MOST_PARTS = 100_000
_LONGEST_WAIT = 600.0  # Seconds for another job that lays out the folder.
FROM_SLURM = "slurm"
"""The word for the part whose number is that of this job in its SLURM array."""


@dataclass(frozen=True)
class Part:
    """Part `number`, from 1, of `parts`."""

    number: int
    parts: int

    def __str__(self) -> str:
        return f"{self.number}/{self.parts}"

    def batches(self, count: int, batch_size: int) -> np.ndarray:
        """Number the batches of this part, int64: batch b holds the samples b * batch_size and after.

        Args:
            count: samples of all parts.
            batch_size: of every batch but the last.

        Raises:
            ValueError: there are fewer batches than parts.
        """
        batches = -(-count // batch_size)
        if batches < self.parts:
            raise ValueError(
                f"part={str(self)!r}: {count:,} samples are {batches:,} batches of {batch_size}, which make no "
                f"{self.parts:,} parts; accepted are at most {batches:,} parts, or a smaller batch_size"
            )
        return np.arange(batches * (self.number - 1) // self.parts, batches * self.number // self.parts)

    def rows(self, count: int, batch_size: int) -> range:
        """Name the samples of this part."""
        batches = self.batches(count, batch_size)
        return range(int(batches[0]) * batch_size, min((int(batches[-1]) + 1) * batch_size, count))


WHOLE = Part(1, 1)
"""All of the work."""


def find_part(given: str | None, output: str | os.PathLike[str], command: str) -> Part | None:
    """Read which part a job is to do; None where the setting is not given.

    Args:
        given: `i/n`, or `slurm`: then i is the number of this job in its SLURM array, `sbatch --array=1-n`. Where the
            parts of `output` have begun, n is theirs, so that an array of the missing parts alone does the right ones.
        output: the folder that the parts fill.
        command: which fills it.

    Raises:
        ValueError: not a part of several, or no job of such an array.
    """
    if given is None:
        return None
    if given == FROM_SLURM:
        number, parts = _place_in_slurm_array(PartsFolder(output, command).parts)
    else:
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", given)
        number, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= parts <= _MOST_PARTS or parts < 2:
        raise ValueError(
            f"part={given!r}{f' is {number}/{parts} here' if given == FROM_SLURM else ''}: accepted is `i/n`, the i-th "
            f"of n parts, such as 1/8, with 1 <= i <= n, or `{FROM_SLURM}` in a job of `sbatch --array=1-n`"
        )
    return Part(number, parts)


def check_join(part: str | None, join: int | None) -> None:
    """Refuse a number of parts to join that is none.

    Raises:
        ValueError: it is below 2, or a part is given too.
    """
    if join is None:
        return
    if part is not None:
        raise ValueError(f"part={part!r} does one part, join={join} joins what all did: give one of them")
    if not 2 <= join <= _MOST_PARTS:
        raise ValueError(f"join={join}: accepted is the number of parts, at least 2")


def _place_in_slurm_array(begun: int | None) -> tuple[int, int]:
    """The number of this job and of all parts; `begun` is that of parts that have begun."""
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "MAX")]
    values = [os.environ.get(name, "") for name in names]
    if not all(value.isdecimal() and len(value) < 8 for value in values):
        raise ValueError(
            f"part='{FROM_SLURM}' is for the jobs of `sbatch --array=1-n`, and here {names[0]} is "
            f"{values[0] or 'not set'!r}; elsewhere give `i/n`"
        )
    number, count, first, last = map(int, values)
    if begun is not None:
        return number, begun
    if (first, last) != (1, count):
        raise ValueError(
            f"part='{FROM_SLURM}': this SLURM array has {count} jobs from {first} to {last}, and no part has begun; "
            f"accepted is --array=1-n, or `--part $SLURM_ARRAY_TASK_ID/n` for some of n parts"
        )
    return number, count


class PartsFolder:
    """The plan of a command's parts, and which of them are done.

    Args:
        output: the folder that the command fills.
        command: whose parts they are.
    """

    def __init__(self, output: str | os.PathLike[str], command: str) -> None:
        self.output, self.command = Path(output), command
        self.folder = self.output / f"{command}.parts"

    @property
    def plan(self) -> dict[str, Any] | None:
        """The number of parts and the settings; None where no part has begun.

        Raises:
            ValueError: the file is no such plan.
        """
        path = self.folder / "plan.json"
        if not path.is_file():
            return None
        found = read_json(path)
        parts = found.get("parts") if isinstance(found, dict) else None
        whole = isinstance(found, dict) and found.get("format") == _FORMAT and isinstance(found.get("settings"), dict)
        if not whole or type(parts) is not int or not 1 <= parts <= _MOST_PARTS:
            raise ValueError(f"{path} is no plan of parts: remove {self.folder}, and run the parts again")
        return found

    @property
    def parts(self) -> int | None:
        """The number of parts; None where none has begun."""
        return None if (plan := self.plan) is None else plan["parts"]

    def begin(self, part: Part, settings: Mapping[str, Any], lay_out: Callable[[], None]) -> None:
        """Make sure that this part belongs to those that have begun, or begin.

        A command that is not cut begins anew where it was interrupted with other settings.

        Args:
            part: to be done.
            settings: plain values, all that the samples depend on.
            lay_out: makes the empty output; called by the first job alone.

        Raises:
            ValueError: other parts have begun: of another number, or with other settings.
        """
        plan = {"format": _FORMAT, "parts": part.parts, "settings": _plain(settings)}
        if self.plan == plan:
            return
        with self.locked():
            found = self.plan
            if found == plan:
                return
            if found is not None and (found["parts"], part.parts) != (1, 1):
                raise ValueError(self._refusal(found, plan))
            self.clear()
            lay_out()
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self.folder / "plan.json", json.dumps(plan, indent=2) + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one job at a time do what is done once for all; the others wait.

        Raises:
            FolderInUse: one has held it for ten minutes.
        """
        lock, give_up = FolderLock(self.output, f"{self.command}.layout"), time.monotonic() + _LONGEST_WAIT
        while True:
            try:
                lock.acquire()
                break
            except FolderInUse:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.1)
        try:
            yield
        finally:
            lock.release()

    def finish(self, part: Part, facts: Mapping[str, Any]) -> None:
        """Write down that a part is done, and what it says of itself."""
        atomic_write_text(self._file(part), json.dumps(dict(facts), indent=2) + "\n")

    def facts(self, part: Part) -> dict[str, Any] | None:
        """Read what a finished part says of itself; None of one that is not finished.

        Raises:
            ValueError: its file was damaged.
        """
        path = self._file(part)
        if not path.is_file():
            return None
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError(f"{path} holds no facts of a part: remove it, and run `--part {part}` again")
        return found

    def reopen(self, part: Part) -> None:
        """Forget that a part was done."""
        self._file(part).unlink(missing_ok=True)

    def missing(self) -> list[int]:
        """Number the parts that are not done.

        Raises:
            ValueError: no part has begun.
        """
        if (parts := self.parts) is None:
            raise ValueError(
                f"no part of `{self.command}` has begun in {str(self.output)!r}: run one with `--part 1/n`"
            )
        return [number for number in range(1, parts + 1) if not self._file(Part(number, parts)).is_file()]

    def check_complete(self, parts: int, settings: Mapping[str, Any] | None = None) -> None:
        """Refuse to join parts that are not all there.

        Args:
            parts: how many are to be joined.
            settings: those of the joining command; None takes any.

        Raises:
            ValueError: parts are missing, of another number, or were made with other settings.
        """
        missing = self.missing()
        found = self.plan
        assert found is not None
        own = {**found, "parts": parts}
        if settings is not None:
            own["settings"] = _plain(settings)
        if own != found:
            raise ValueError(self._refusal(found, own))
        if missing:
            raise ValueError(
                f"{len(missing)} of {parts} parts are not in {str(self.output)!r}, such as part {missing[0]}: run the "
                f"same command with `--part {missing[0]}/{parts}`, or `sbatch --array={in_ranges(missing)}`"
            )

    def clear(self) -> None:
        """Forget all parts."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    def _file(self, part: Part) -> Path:
        return self.folder / f"{part.number}-of-{part.parts}.json"

    def _refusal(self, found: Mapping[str, Any], own: Mapping[str, Any]) -> str:
        there, here = found["settings"], own["settings"]
        if found["parts"] != own["parts"]:
            what = f"was begun in {found['parts']} parts, not in {own['parts']}"
        else:
            names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
            what = "was begun with other settings: " + ", ".join(
                f"{name} was {str(there.get(name))[:80]!r}, is {str(here.get(name))[:80]!r}" for name in names
            )
        return (
            f"`{self.command}` into {str(self.output)!r} {what}. Go on as it was begun, choose another folder, or "
            f"remove {str(self.folder)!r} to begin anew"
        )


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back."""
    return json.loads(json.dumps(dict(settings), default=str))


def in_ranges(numbers: Iterable[int]) -> str:
    """Write ascending numbers as SLURM does: `1-3,7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def tell_part(part: Part, output: str | os.PathLike[str]) -> dict[str, Any]:
    """Print, on the first rank, that a part is done, and what follows; give the nothing that its command returns."""
    if rank() == 0:
        print(f"Part {part} of {os.fspath(output)!r} is done: `--join {part.parts}` follows when all are")
    return {}


def tell_missing(output: str | os.PathLike[str], command: str, finished: str) -> dict[str, Any]:
    """Print the numbers of the parts that are not done, as `sbatch --array` takes them; nothing where all are.

    Args:
        output: the folder that they fill.
        command: whose parts they are.
        finished: the file in that folder that tells that they have been joined.

    Returns:
        `{"missing": [...]}`

    Raises:
        ValueError: no part has begun, and nothing is finished.
    """
    parts = PartsFolder(output, command)
    if parts.plan is None and (Path(output) / finished).is_file():
        return {"missing": []}
    missing = parts.missing()
    if missing:
        print(in_ranges(missing))
    return {"missing": missing}
