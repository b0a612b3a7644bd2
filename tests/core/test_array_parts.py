"""The parts of an array of jobs: their batches, their numbers, what has begun, and what is left."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from discrete_lit.core.array_parts import (
    WHOLE,
    Part,
    PartsFolder,
    check_join,
    find_part,
    in_ranges,
    tell_missing,
)


@pytest.mark.parametrize(("count", "batch_size", "parts"), [(100, 7, 4), (15, 5, 3), (1, 64, 1), (1281167, 64, 37)])
def test_parts_are_whole_batches_and_all_of_them(count: int, batch_size: int, parts: int) -> None:
    each = [Part(number, parts) for number in range(1, parts + 1)]
    batches = [part.batches(count, batch_size) for part in each]
    assert np.array_equal(np.concatenate(batches), np.arange(-(-count // batch_size)))
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    rows = [part.rows(count, batch_size) for part in each]
    assert rows[0].start == 0 and rows[-1].stop == count
    assert all(one.stop == other.start and one.stop % batch_size == 0 for one, other in pairwise(rows))


def test_more_parts_than_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"part='2/4': 20 samples are 3 batches of 8, which make no 4 parts"):
        Part(2, 4).batches(20, 8)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`slurm(number, first, last, count)`: as a job of an array sees it."""

    def be_job(number: int, first: int, last: int, count: int) -> None:
        for name, value in {"ID": number, "MIN": first, "MAX": last, "COUNT": count}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))

    return be_job


def test_the_part_of_a_slurm_array(slurm: Any, tmp_path: Path) -> None:
    slurm(3, 1, 8, 8)
    assert find_part("slurm", tmp_path, "sample") == Part(3, 8)
    # Of an array of the missing parts alone, what has begun says how many there are.
    slurm(7, 3, 7, 2)
    with pytest.raises(ValueError, match=r"has 2 jobs from 3 to 7, and no part has begun"):
        find_part("slurm", tmp_path, "sample")
    PartsFolder(tmp_path, "sample").begin(Part(1, 8), {}, lambda: None)
    assert find_part("slurm", tmp_path, "sample") == Part(7, 8)
    slurm(9, 9, 9, 1)
    with pytest.raises(ValueError, match=r"part='slurm' is 9/8 here: accepted is `i/n`"):
        find_part("slurm", tmp_path, "sample")
    slurm(0, 0, 3, 4)
    with pytest.raises(ValueError, match=r"has 4 jobs from 0 to 3"):
        find_part("slurm", tmp_path, "tokenize")


def test_what_is_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    assert find_part(None, tmp_path, "sample") is None and find_part("2/3", tmp_path, "sample") == Part(2, 3)
    for given in ("0/4", "5/4", "1/1", "half", "1/9999999"):
        with pytest.raises(ValueError, match=f"part='{given}': accepted is `i/n`"):
            find_part(given, tmp_path, "sample")
    with pytest.raises(ValueError, match="SLURM_ARRAY_TASK_ID is 'not set'"):
        find_part("slurm", tmp_path, "sample")
    with pytest.raises(ValueError, match="join=1: accepted is the number of parts"):
        check_join(None, 1)
    with pytest.raises(ValueError, match="give one of them"):
        check_join("1/2", 2)


def test_one_of_many_jobs_lays_out(tmp_path: Path) -> None:
    made: list[int] = []

    def begin(number: int) -> None:
        PartsFolder(tmp_path, "sample").begin(Part(number, 6), {"seed": 1, "size": (8, 8)}, lambda: made.append(number))

    def finish(number: int) -> None:
        PartsFolder(tmp_path, "sample").finish(Part(number, 6), {"sha256": str(number)})

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(begin, [1, 2, 4, 5, 6, 1]))
        # A part has one writer at a time: a command holds the lock of its part.
        list(pool.map(finish, [1, 2, 4, 5, 6]))
    parts = PartsFolder(tmp_path, "sample")
    assert len(made) == 1 and parts.missing() == [3] and parts.facts(Part(5, 6)) == {"sha256": "5"}
    assert parts.facts(Part(3, 6)) is None


def test_parts_of_two_plans_do_not_mix(tmp_path: Path) -> None:
    parts = PartsFolder(tmp_path, "sample")
    parts.begin(Part(1, 4), {"seed": 1, "steps": 8}, lambda: None)
    begin = parts.begin
    with pytest.raises(ValueError, match=r"was begun with other settings: seed was '1', is '2'\. Go on as it was"):
        begin(Part(2, 4), {"seed": 2, "steps": 8}, lambda: None)
    with pytest.raises(ValueError, match="was begun in 4 parts, not in 5"):
        begin(Part(2, 5), {"seed": 1, "steps": 8}, lambda: None)
    with pytest.raises(ValueError, match="was begun in 4 parts, not in 1"):
        begin(WHOLE, {"seed": 1, "steps": 8}, lambda: None)
    with pytest.raises(ValueError, match="was begun in 4 parts, not in 3"):
        parts.check_complete(3, {"seed": 1, "steps": 8})
    with pytest.raises(ValueError, match="seed was '1', is '3'"):
        parts.check_complete(4, {"seed": 3, "steps": 8})
    with pytest.raises(ValueError, match=r"4 of 4 parts are not in .*`--part 1/4`, or `sbatch --array=1-4`"):
        parts.check_complete(4, {"seed": 1, "steps": 8})


def test_what_is_not_cut_begins_anew_with_other_settings(tmp_path: Path) -> None:
    made: list[str] = []
    parts = PartsFolder(tmp_path, "sample")
    for settings, name in (({"seed": 1}, "first"), ({"seed": 1}, "again"), ({"seed": 2}, "other")):
        parts.begin(WHOLE, settings, lambda name=name: made.append(name))
    assert made == ["first", "other"]


def test_missing_parts_are_told_as_sbatch_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert in_ranges([1, 2, 3, 7, 9, 10]) == "1-3,7,9-10" and in_ranges([]) == ""
    with pytest.raises(ValueError, match=r"no part of `sample` has begun in"):
        tell_missing(tmp_path, "sample", "samples.npz")
    parts = PartsFolder(tmp_path, "sample")
    parts.begin(Part(1, 5), {}, lambda: None)
    parts.finish(Part(3, 5), {})
    assert tell_missing(tmp_path, "sample", "samples.npz") == {"missing": [1, 2, 4, 5]}
    assert capsys.readouterr().out == "1-2,4-5\n"
    parts.clear()
    (tmp_path / "samples.npz").touch()
    assert tell_missing(tmp_path, "sample", "samples.npz") == {"missing": []}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"format": "other"}', json.dumps({"format": "discrete-lit-parts-1", "parts": -1, "settings": {}})],
)
def test_a_plan_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    parts = PartsFolder(tmp_path, "sample")
    parts.folder.mkdir()
    (parts.folder / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=r"plan\.json is (no plan of parts|not JSON)"):
        _ = parts.plan
