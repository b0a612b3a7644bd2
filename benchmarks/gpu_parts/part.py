"""What a part of `benchmarks/gpu.py` is, the setting that it runs in, and the rows that it yields.

    @part("nearest_code", kind="fast", seconds=30, what="the nearest of K codes against dense distances")
    def nearest_code(setting: Setting) -> Iterator[Measurement]:
        size = 256 if setting.tiny else 65_536
        …
        yield Measurement(name="search", case="K = 16,384", value=…, unit="ms", better="lower", floor=Floor(…))

A part runs alone in its process, and its rows are kept as they are yielded: what was measured before a part fails or
outlives its limit stays in the table. So a long part yields early, most important rows first.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

import torch

Kind = Literal["right", "fast"]
Better = Literal["higher", "lower"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the device does at most, measured on it before the first part.

    Args:
        name: the card, or the processor.
        bandwidth: bytes a second that a copy of an array far larger than the caches moves, read and written ones.
        rates: floating-point operations a second of a large matrix product, by type: `float64`, `float32` (with TF32
            off), and `tf32`, `bfloat16`, `float16` where the device has them.
        memory: bytes of the device's memory.
    """

    name: str
    bandwidth: float
    rates: Mapping[str, float]
    memory: int

    def rate(self, dtype: torch.dtype | str) -> float:
        """Operations a second of a large matrix product of this type; ValueError if it was not measured."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.rates:
            raise ValueError(f"no matrix rate of {name} was measured on {self.name}; there are {', '.join(self.rates)}")
        return self.rates[name]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a part runs, and how large.

    Args:
        device: `cuda` or `cpu`.
        tiny: sizes that take seconds on a CPU: every line of the part runs, no figure means anything.
        golden: the folder of the reference outputs, `<family>/<case>.safetensors`; None if it is not here.
        output: a folder for the part's own files; it exists, is empty, and goes after the run.
        machine: what the device does at most.
        seconds: the part's time limit.
        started: when it began, by `time.monotonic()`.
    """

    device: torch.device
    tiny: bool
    golden: Path | None
    output: Path
    machine: Machine
    seconds: float
    started: float = field(default_factory=time.monotonic)

    @property
    def judged(self) -> bool:
        """Whether speeds are held against their targets: on a GPU at full size."""
        return self.device.type == "cuda" and not self.tiny

    def seconds_left(self) -> float:
        """Until the part is stopped: for choosing how often to repeat, or what to leave out, which a note then says."""
        return self.seconds - (time.monotonic() - self.started)

    def met(self, fulfilled: bool) -> bool | None:
        """`Measurement.met` of a target: None where speeds are not judged."""
        return fulfilled if self.judged else None


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The best that the device allows, in the unit of the measurement.

    Args:
        value: such as the least milliseconds, or the most images a second.
        what: what it is made of, such as "weights and cache read once at the measured bandwidth".
    """

    value: float
    what: str


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What a user would take instead, measured in the same process, in the unit of the measurement."""

    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Check:
    """A row of a part of the kind `right`.

    Args:
        name: what was checked, such as a family.
        case: with which settings.
        error: the largest that was found, in the measure that `what` names; None where there is only yes or no.
        tolerance: the largest that is right.
        ok: whether it is right; None where it could not be checked here, and `note` says why.
        what: the measure, such as "share of the largest value", "ids that differ".
        note: what else a reader must know.
    """

    name: str
    case: str = ""
    error: float | None = None
    tolerance: float | None = None
    ok: bool | None
    what: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A row of a part of the kind `fast`.

    Args:
        name: what was measured, such as "sample, CUDA graph".
        case: with which settings, such as "RAR-B, batch 64, guidance".
        value: the measured figure.
        unit: such as "images/s", "ms", "% of the matrix rate", "MB".
        better: whether higher or lower values are better.
        floor: the best that the device allows; None where none is known.
        peer: what it is compared with; None if nothing.
        target: what is wanted, in words, such as "at least 50% of the floor"; empty if there is no target.
        met: whether it is; None without a target, and where nothing is judged (`Setting.met`).
        note: such as the spread, the memory, what was left out.
    """

    name: str
    case: str = ""
    value: float
    unit: str
    better: Better
    floor: Floor | None = None
    peer: Peer | None = None
    target: str = ""
    met: bool | None = None
    note: str = ""

    @property
    def share(self) -> float | None:
        """The share of the floor that is reached, 1 at the best; None without a floor."""
        return None if self.floor is None else self._times(self.floor.value, of_value=self.better == "higher")

    @property
    def times_the_peer(self) -> float | None:
        """How many times as good as the peer's the value is; None without a peer."""
        return None if self.peer is None else self._times(self.peer.value, of_value=self.better == "higher")

    def _times(self, other: float, *, of_value: bool) -> float:
        over, under = (self.value, other) if of_value else (other, self.value)
        return over / under if under else float("inf")


Row = Check | Measurement


def as_json(row: Row) -> dict[str, Any]:
    """A row as plain values that JSON has; of a measurement also the share of its floor and the ratio to its peer."""
    values = asdict(row)
    if isinstance(row, Measurement):
        values |= {"share": row.share, "times_the_peer": row.times_the_peer}
    return {name: _writable(value) for name, value in values.items()}


def _writable(value: Any) -> Any:
    """A number that is not finite becomes its name, which JSON lacks a number for."""
    if isinstance(value, dict):
        return {name: _writable(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not isfinite(value) else value


@dataclass(frozen=True, kw_only=True)
class Part:
    """A named part: its kind, its time limit in seconds, what it does in one line, and the function that does it."""

    name: str
    kind: Kind
    seconds: float
    what: str
    run: Callable[[Setting], Iterable[Row]]


PARTS: dict[str, Part] = {}


def part(
    name: str, *, kind: Kind, seconds: float, what: str
) -> Callable[[Callable[[Setting], Iterable[Row]]], Callable[[Setting], Iterable[Row]]]:
    """Register a function as a part.

    Args:
        name: by which `--parts` calls it, of lower-case letters, digits and `_`; unique.
        kind: `right`, whose rows are `Check`s, or `fast`, whose rows are `Measurement`s.
        seconds: after which it is stopped; all parts together must fit in `--minutes`.
        what: what it does, in one line.
    """
    if name in PARTS or kind not in get_args(Kind) or not name.replace("_", "").isalnum() or name != name.lower():
        raise ValueError(f"part {name!r} of the kind {kind!r}: names are unique words, kinds are {get_args(Kind)}")

    def register(run: Callable[[Setting], Iterable[Row]]) -> Callable[[Setting], Iterable[Row]]:
        PARTS[name] = Part(name=name, kind=kind, seconds=seconds, what=what, run=run)
        return run

    return register
