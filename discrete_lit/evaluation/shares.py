"""A measurement of a set of images in shares: over ranks, over the jobs of an array, and over interruptions.

A `Meter` counts batches of images. What it counted is a `Tally`: sums, and rows in the order of the images. Tallies of
shares join into that of the whole set, so ranks, jobs and the two sides of an interruption are one mechanism:
`measure_in_shares` cuts a selection into whole batches, gives each process its own, and joins what they counted. As no
batch depends on who measures it, the features are the same bits for any number of processes, and the sums the same to
the rounding of float64.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from discrete_lit.core.bounded_reading import MOST_JSON, parse_json
from discrete_lit.core.distributed import (
    all_gather_rows,
    all_reduce_sum,
    failing_together,
    gather_objects,
    rank,
    world_size,
)
from discrete_lit.core.files import Npz, atomic_write, content_sha256
from discrete_lit.evaluation.compared_images import NO_CLASS, Selection

_log = logging.getLogger(__name__)

KEPT_EVERY = 30.0
"""Seconds after which an unfinished share is written down, so that no more work is done again after an interruption."""

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(kw_only=True)
class Tally:
    """Holds the counts of some images, and what was met on the way."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    """By name what adds up over shares; one that is missing is 0."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """By name what stands one behind the other, `(n, ...)`."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Plain values that JSON holds, which all shares that know them say alike."""
    broken: dict[int, str] = field(default_factory=dict)
    """Position of each image that cannot be read, and why."""

    @staticmethod
    def joined(tallies: Iterable[Tally]) -> Tally:
        """Join tallies of shares, in their order."""
        whole = Tally()
        for tally in tallies:
            for name, value in tally.sums.items():
                whole.sums[name] = whole.sums[name] + value if name in whole.sums else value
            for name, value in tally.rows.items():
                whole.rows[name] = torch.cat((whole.rows[name], value)) if name in whole.rows else value
            whole.facts |= tally.facts
            whole.broken |= tally.broken
        return whole

    def over_ranks(self, device: torch.device) -> Tally:
        """Join the tallies of all ranks, in their order; a rank that measured nothing has its part in it too.

        Args:
            device: where the process group adds.
        """
        if world_size() == 1:
            return self
        everyone = gather_objects((_layout(self.sums), _layout(self.rows), self.facts, self.broken))
        sums: Layout = {name: what for each in everyone for name, what in each[0].items()}
        rows: Layout = {name: what for each in everyone for name, what in each[1].items()}
        whole = Tally()
        for name in sorted(sums):
            shape, dtype = sums[name]
            own = self.sums.get(name, torch.zeros(shape, dtype=dtype))
            whole.sums[name] = all_reduce_sum(own.to(device)).cpu()
        for name in sorted(rows):
            shape, dtype = rows[name]
            own = self.rows.get(name, torch.zeros((0, *shape[1:]), dtype=dtype))
            whole.rows[name] = all_gather_rows(own.to(device)).cpu()
        for each in everyone:
            whole.facts |= each[2]
            whole.broken |= each[3]
        return whole

    def save(self, path: Path) -> None:
        """Write an npz, whole or not at all."""
        arrays = {f"sums/{name}": value.cpu().numpy() for name, value in self.sums.items()}
        arrays |= {f"rows/{name}": value.cpu().numpy() for name, value in self.rows.items()}
        text = json.dumps({"facts": self.facts, "broken": list(self.broken.items())})
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, allow_pickle=False, text=np.array(text), **arrays)

    @staticmethod
    def load(path: Path) -> Tally:
        """Read what `save` wrote.

        Raises:
            ValueError: a file that is damaged, or another.
        """
        with Npz(path) as file:
            if "text" not in file.headers:
                raise ValueError(f"{str(path)!r} holds {sorted(file.headers)}: it is no share of an evaluation")
            if file.headers["text"].size > 4 * MOST_JSON:
                raise ValueError(f"{str(path)!r} holds a text of {file.headers['text'].size:,} bytes")
            said = parse_json(str(file.read("text")), repr(str(path)))
            if not isinstance(said, dict) or said.keys() != {"facts", "broken"}:
                raise ValueError(f"{str(path)!r} is no share of an evaluation")
            arrays = {name: torch.from_numpy(file.read(name)) for name in file.headers if name != "text"}
        kinds = {
            kind: {
                name.removeprefix(f"{kind}/"): value for name, value in arrays.items() if name.startswith(f"{kind}/")
            }
            for kind in ("sums", "rows")
        }
        return Tally(**kinds, facts=said["facts"], broken=dict(said["broken"]))


def _layout(tensors: Mapping[str, Tensor]) -> Layout:
    return {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}


class Meter(Protocol):
    """Counts batches of images."""

    def update(self, images: Tensor, labels: Tensor | None, indices: Tensor) -> None:
        """Count a batch.

        Args:
            images: uint8 `(B, C, H, W)`, on the device.
            labels: int64 `(B,)` on the CPU, the class of each or `NO_CLASS`; None of a set without labels.
            indices: int64 `(B,)` on the CPU, the number of each image in its selection.
        """

    def tally(self) -> Tally:
        """Give what was counted so far, on the CPU."""
        ...

    def restore(self, tally: Tally) -> None:
        """Take a tally in place of what was counted so far."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Who measures which share of every set, and where shares are kept.

    Args:
        folder: where unfinished shares and the parts of an array of jobs are kept; None keeps nothing.
        part: which part of `parts` this job measures, from 1.
        parts: jobs of the array; with 1 the job measures everything.
        join: measure nothing: read the parts of all jobs.
    """

    folder: Path | None = None
    part: int = 1
    parts: int = 1
    join: bool = False

    @property
    def partial(self) -> bool:
        """Whether this job measures one part of several."""
        return self.parts > 1 and not self.join

    def part_file(self, name: str, part: int) -> Path:
        """Name the file of a finished part."""
        assert self.folder is not None
        return self.folder / f"{name}.part-{part}-of-{self.parts}.npz"

    def share_file(self, name: str) -> Path | None:
        """Name the file of the unfinished share of this rank of this job; None where nothing is kept."""
        worker, workers = self.worker()
        return None if self.folder is None else self.folder / f"{name}.share-{worker + 1}-of-{workers}.npz"

    def clear(self) -> None:
        """Remove what was kept of a finished evaluation for an interruption; the parts of an array stay."""
        if self.folder is not None and self.folder.is_dir():
            for file in self.folder.glob("*.share-*.npz"):
                file.unlink()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def worker(self) -> tuple[int, int]:
        """Return the number of this process among all of all jobs, from 0, and how many they are."""
        if self.join:
            return rank(), world_size()
        return (self.part - 1) * world_size() + rank(), self.parts * world_size()


def measure_in_shares(
    selection: Selection,
    meter: Meter,
    *,
    batch_size: int,
    device: torch.device | str,
    shares: Shares | None = None,
    identity: Iterable[object] = (),
    description: str = "",
) -> bool:
    """Count a selection, each process its share, and give the meter of each rank the count of the whole.

    Args:
        selection: which images.
        meter: counts them.
        batch_size: images at once; a batch is measured whole by one process.
        device: where the images go, and where the ranks' process group adds.
        shares: which share is this job's, and where it is kept; by default everything, and nowhere.
        identity: all that the count depends on: what was kept for anything else is not taken.
        description: of the progress bar, and of messages.

    Returns:
        Whether the meter has the count of the whole; not where this job measures one part of it alone.

    Raises:
        ValueError: too few readable images; parts that are to be joined and are not there.
    """
    shares, device = shares or Shares(), torch.device(device)
    plan = selection.positions()
    key = content_sha256(repr((*identity, selection.settings, batch_size)))[:16]
    progress = _Progress(meter, selection, batch_size=batch_size, device=device, description=description)

    if shares.join:
        files = [shares.part_file(key, part) for part in range(1, shares.parts + 1)]
        missing = [part for part, file in enumerate(files, start=1) if not file.is_file()]
        if missing:
            raise ValueError(
                f"{description}: {len(missing)} of {shares.parts} parts are not in {str(shares.folder)!r}, such as "
                f"part {missing[0]}: run the same command with `--part {missing[0]}/{shares.parts}` (with other "
                "settings, or of images that have changed since, a part is another one)"
            )
        whole = Tally.joined(map(Tally.load, files))
    else:
        finished = None if not shares.partial else shares.part_file(key, shares.part)
        if finished is not None and all(gather_objects(finished.is_file())):
            return False
        worker, workers = shares.worker()
        batches = -(-len(plan) // batch_size)
        first, last = (batches * number // workers * batch_size for number in (worker, worker + 1))
        kept = shares.share_file(key)
        with failing_together():
            progress.run(plan[first:last], first, kept)
        whole = progress.tally().over_ranks(device)
        if finished is not None:
            if rank() == 0:
                whole.save(finished)
            if kept is not None:
                kept.unlink(missing_ok=True)
            return False

    # Of each broken image another is taken, which may be broken too.
    known = set(plan.tolist())
    extra = plan
    while len(extra) and whole.broken:
        extra = np.array([index for index in selection.positions(whole.broken) if index not in known], np.int64)
        begun, known = len(known), known | set(extra.tolist())
        batches = -(-len(extra) // batch_size)
        first, last = (batches * number // world_size() * batch_size for number in (rank(), rank() + 1))
        progress.restart()
        with failing_together():
            progress.run(extra[first:last], begun + first, None)
        whole = Tally.joined((whole, progress.tally().over_ranks(device)))

    selection.finish(whole.rows["classes"].numpy(), whole.broken, int(whole.sums["unturned"]))
    meter.restore(whole)
    return True


class _Progress:
    """Run a meter over images, and note what is met on the way."""

    def __init__(
        self, meter: Meter, selection: Selection, *, batch_size: int, device: torch.device, description: str
    ) -> None:
        self.meter, self.selection, self.batch_size, self.device = meter, selection, batch_size, device
        self.description = description
        self.restart()

    def restart(self) -> None:
        """Begin to count from nothing."""
        self.meter.restore(Tally())
        self.classes: list[Tensor] = []
        self.broken: dict[int, str] = {}
        self.unturned = self.done = 0

    def run(self, positions: np.ndarray, first: int, kept: Path | None) -> None:
        """Measure the images of some positions, the first of which is number `first` of the selection.

        Args:
            positions: int64, ascending.
            first: number of the first one.
            kept: file that what was measured so far is kept in, and taken from.
        """
        if kept is not None and kept.is_file():
            try:
                self._restore(Tally.load(kept))
            except ValueError as error:
                _log.warning("measuring a share again: %s", error)
        left = positions[self.done :]
        hidden = None if rank() == 0 else True
        kept_at, unkept = time.monotonic(), False
        with (
            torch.inference_mode(),
            tqdm(total=len(positions), initial=self.done, desc=self.description, unit="image", disable=hidden) as bar,
        ):
            # The processors have nothing else to do while a GPU computes, and no room for two things otherwise.
            ahead = 2 if self.device.type == "cuda" else 0
            for batch in self.selection.read(left, self.batch_size, ahead=ahead):
                taken = positions[self.done : self.done + self.batch_size]
                read = [number for number, index in enumerate(taken.tolist()) if index not in batch.broken]
                if batch.images is not None:
                    indices = torch.tensor(read) + first + self.done
                    self.meter.update(batch.images.to(self.device), batch.labels, indices)
                labels = [NO_CLASS] * len(read) if batch.labels is None else batch.labels.tolist()
                self.classes.append(torch.tensor(labels, dtype=torch.int64))
                self.unturned += batch.unturned
                self.broken |= batch.broken
                self.done += len(taken)
                unkept = True
                bar.update(len(taken))
                if kept is not None and time.monotonic() - kept_at >= KEPT_EVERY:
                    self.tally().save(kept)
                    kept_at, unkept = time.monotonic(), False
        if kept is not None and unkept:
            self.tally().save(kept)

    def tally(self) -> Tally:
        """Give what was counted and met so far."""
        counted = self.meter.tally()
        classes = torch.cat([torch.zeros(0, dtype=torch.int64), *self.classes])
        return Tally(
            sums=counted.sums | {"unturned": torch.tensor(self.unturned)},
            rows=counted.rows | {"classes": classes},
            facts=counted.facts | {"done": self.done},
            broken=dict(self.broken),
        )

    def _restore(self, tally: Tally) -> None:
        self.meter.restore(tally)
        self.classes = [tally.rows["classes"]]
        self.broken, self.unturned = dict(tally.broken), int(tally.sums["unturned"])
        self.done = int(tally.facts["done"])


def states_of(metrics: Mapping[str, Any]) -> dict[str, Tensor]:
    """Give the states of torchmetrics' metrics, which are sums, by `<name>.<state>`, on the CPU."""
    return {
        f"{name}.{key}": value.detach().cpu().clone()
        for name, metric in metrics.items()
        for key, value in metric.metric_state.items()
    }


def restore_states(metrics: Mapping[str, Any], sums: Mapping[str, Tensor]) -> None:
    """Give metrics the sums that `states_of` gave: they are of the whole, and no other rank is asked any more."""
    for name, metric in metrics.items():
        for key, value in metric.metric_state.items():
            found = sums.get(f"{name}.{key}", torch.zeros_like(value))
            setattr(metric, key, found.to(value.device).clone())
        metric.distributed_available_fn = _asks_nobody


def _asks_nobody() -> bool:
    return False


@contextmanager
def whole_metrics() -> Iterator[None]:
    """Compute metrics of the whole without torchmetrics' warning in a process that measured no image of it itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        yield
