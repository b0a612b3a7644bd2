"""The sets of clips of `discrete-lit evaluate_audio` and `evaluate_video`, and the report on them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from discrete_lit.core.files import atomic_write_text
from discrete_lit.data.clips import Clips
from discrete_lit.data.data_module import Split


def check_splits(data: Clips) -> None:
    """Refuse data without clips to compare with, or without clips that are held out.

    Raises:
        ValueError: no split `train`, or no split `validation`.
    """
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        if not data.has_split(split):
            raise ValueError(f"data has no {split} split: set data.init_args.{split}")


def count_clips(data: Clips, split: Split, *, asked: int | None, setting: str, least: int = 1) -> int:
    """Count the clips of a split that are measured: as many as were asked for, all of them by default.

    Args:
        data: of clips.
        split: of them.
        asked: the first so many of them.
        setting: that asked, for the message.
        least: the fewest that can be measured.

    Raises:
        ValueError: there are not so many, or fewer than `least` were asked for.
    """
    available = data.evaluation_source(split, 0, 1).samples
    if asked is not None and not least <= asked <= available:
        raise ValueError(f"{setting}={asked} must lie between {least} and the {available:,} clips that there are")
    return available if asked is None else asked


def real_clips(data: Clips, split: Split, count: int) -> Iterator[dict[str, Any]]:
    """Read the first clips of a split, none of which may be broken: batches by name, `(B, ...)`."""
    loader = data.evaluation_loader(split, 0, 1, max_bad_fraction=0.0)
    left = count
    for batch in loader:
        rows = {name: values[:left] for name, values in batch.items()}
        yield rows
        left -= len(next(iter(rows.values())))
        if not left:
            return


def write_report(output: str, report: dict[str, Any], table: str) -> None:
    """Write `report.json` and `report.md` into a folder, and print the table."""
    folder = Path(output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    atomic_write_text(folder / "report.md", table + "\n")
    print(f"{table}\nReport: {folder / 'report.md'} and report.json")
