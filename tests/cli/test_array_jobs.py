"""`tokenize` and `sample` in parts: the same bytes as in one go, whoever does which part and however often."""

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.several_ranks import on_ranks
from helpers.stored_images import pixels, save_folder

TEMPLATE = Path(__file__).parents[2] / "lightning_configs/slurm/array.sbatch"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """29 images of three classes, each with a caption."""
    folder = tmp_path_factory.mktemp("images")
    save_folder(folder, pixels(29, 0), np.arange(29) % 3)
    for image in folder.rglob("*.png"):
        image.with_suffix(".txt").write_text(f"picture {image.stem}")
    return folder


@pytest.fixture(scope="module")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in five shards."""
    from discrete_lit.data.shard_writer import write_shards
    from discrete_lit.data.sources import ClassFolders

    folder = tmp_path_factory.mktemp("shards")
    write_shards(ClassFolders(str(images)), str(folder), split="train", samples_per_shard=6, shuffle_seed=3)
    return folder


def bytes_of(folder: Path) -> dict[str, str]:
    """The content of every file but `run.json`, which holds the speed."""
    files = [path for path in sorted(folder.iterdir()) if path.name != "run.json"]
    assert all(path.is_file() for path in files), files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def commands(
    tokenizer_checkpoint: Path, generator_checkpoints: dict[str, Path], images: Path, shards: Path
) -> dict[str, Callable[..., Any]]:
    """Both commands by name: `commands["sample"](output, "--part", "1/3")`."""
    from discrete_lit.cli.commands import main

    captions = {"class_path": "discrete_lit.data.captions.Captions", "init_args": {"kind": "txt"}}
    common = {"image_size": 8, "batch_size": 4}

    def run(command: str, fixed: list[str]) -> Callable[..., Any]:
        def call(output: Path, *arguments: object) -> None:
            main([command, *fixed, "--output", str(output), "--accelerator", "cpu", *map(str, arguments)])

        return call

    def data(kind: str, **settings: Any) -> list[str]:
        config = {"class_path": f"discrete_lit.data.{kind}", "init_args": {**common, **settings}}
        return ["--ckpt_path", str(tokenizer_checkpoint), "--data", json.dumps(config)]

    drawn = ["--ckpt_path", str(generator_checkpoints["Masked"]), "--num_samples", "29", "--batch_size", "4"]
    return {
        "tokenize": run("tokenize", data("ImageFolder", train=str(images), num_workers=0, captions=captions)),
        "tokenize_shards": run("tokenize", data("ImageShards", train=str(shards), num_workers=2)),
        "sample": run("sample", [*drawn, "--seed", "3"]),
    }


NAMES = ("tokenize", "tokenize_shards", "sample")


@pytest.mark.slow_but(2)
@pytest.mark.parametrize("name", NAMES)
def test_parts_join_to_the_bytes_of_one_run(
    name: str, commands: dict[str, Callable[..., Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = commands[name]
    run(tmp_path / "whole")
    for part in (3, 1):
        run(tmp_path / "parts", "--part", f"{part}/3")
    with pytest.raises(SystemExit, match="1"):
        run(tmp_path / "parts", "--missing", "true")
    assert capsys.readouterr().out.splitlines()[-1] == "2"
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "parts", "--join", 3)
    assert "1 of 3 parts are not in" in capsys.readouterr().err
    run(tmp_path / "parts", "--part", "2/3")
    run(tmp_path / "parts", "--part", "1/3")  # again, which does nothing
    with pytest.raises(SystemExit, match="0"):
        run(tmp_path / "parts", "--missing", "true")
    run(tmp_path / "parts", "--join", 3)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    if name == "sample":
        whole, joined = (json.loads((tmp_path / each / "run.json").read_text()) for each in ("whole", "parts"))
        assert joined.pop("parts") == 3 and joined["images_per_second"] > 0
        left_out = ("images_per_second", "images_per_second_without_decoding", "date")
        assert [(key, joined[key]) for key in joined if key not in left_out] == [
            (key, whole[key]) for key in whole if key not in left_out
        ]
    with pytest.raises(SystemExit, match="0"):
        run(tmp_path / "parts", "--missing", "true")


class Killed(BaseException):
    """Stands for the end of a process."""


# What a process that ends leaves open, this one closes late.
@pytest.mark.slow_but(2)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [None, "2/2"])
def test_an_interrupted_part_goes_on(
    name: str,
    part: str | None,
    commands: dict[str, Callable[..., Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from discrete_lit.cli import drawn_rows
    from discrete_lit.core.files import RowFile
    from discrete_lit.data import encoded_arrays

    run, output, given = commands[name], tmp_path / "parts", [] if part is None else ["--part", part]
    run(tmp_path / "whole")
    if part is not None:
        run(output, "--part", "1/2")
    monkeypatch.setattr(encoded_arrays, "COUNTED_EVERY", 0)
    monkeypatch.setattr(drawn_rows, "_MARKED_EVERY", 0)
    content = "rows.npy.partial" if name == "sample" else "tokens.npy"
    batches: list[list[int]] = []
    write = RowFile.write

    def written(self: RowFile, rows: np.ndarray, values: np.ndarray) -> None:
        if self.path.name == content:
            if batches:
                raise Killed
            batches.append(rows.tolist())
        write(self, rows, values)

    with monkeypatch.context() as patched:
        patched.setattr(RowFile, "write", written)
        with pytest.raises(Killed):
            run(output, *given)
        first, batches[:] = list(batches), []
        with pytest.raises(Killed):
            run(output, *given)
    # What was on the disk is not computed again.
    assert len(first) == len(batches) == 1 and not {row for rows in first for row in rows} & {
        row for rows in batches for row in rows
    }
    run(output, *given)
    if part is not None:
        run(output, "--join", 2)
    assert bytes_of(output) == bytes_of(tmp_path / "whole")


@pytest.mark.slow_but(1)
@pytest.mark.parametrize(("name", "change"), [("sample", ["--seed", "4"]), ("tokenize", ["--crops", "flip"])])
def test_parts_of_two_settings_or_numbers_are_refused(
    name: str,
    change: list[str],
    commands: dict[str, Callable[..., Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = commands[name]
    run(tmp_path, "--part", "1/3")
    for arguments, message in (
        (["--part", "2/3", *change], f"was begun with other settings: {'seed' if name == 'sample' else 'crops'} was"),
        (["--part", "2/4"], "was begun in 3 parts, not in 4"),
        ([], "was begun in 3 parts, not in 1"),
        (["--join", "2"], "was begun in 3 parts, not in 2"),
        (["--part", "2/9"], "make no 9 parts"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(tmp_path, *arguments)
        assert message in capsys.readouterr().err


def test_a_part_is_done_by_one_job_at_a_time(
    commands: dict[str, Callable[..., Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from discrete_lit.core.locks import sole_writer

    with sole_writer(tmp_path, "sample.part-2-of-3"):
        commands["sample"](tmp_path, "--part", "1/3")
        with pytest.raises(SystemExit, match="2"):
            commands["sample"](tmp_path, "--part", "2/3")
    assert "is being written by" in capsys.readouterr().err


@pytest.mark.slow_but(1)
@pytest.mark.parametrize(("name", "file"), [("sample", "rows.npy.partial"), ("tokenize", "tokens.npy")])
def test_rows_that_were_lost_are_found_and_made_again(
    name: str,
    file: str,
    commands: dict[str, Callable[..., Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = commands[name]
    run(tmp_path / "whole")
    output = tmp_path / "parts"
    for part in (1, 2, 3):
        run(output, "--part", f"{part}/3")
    rows = np.load(output / file, mmap_mode="r+")
    rows[12] = 0  # of the second part, which has the batches 2 to 4
    rows.flush()
    with pytest.raises(SystemExit, match="2"):
        run(output, "--join", 3)
    message = capsys.readouterr().err
    assert "the rows of 1 of 3 parts" in message and "`sbatch --array=2`, or `--part 2/3`" in message
    run(output, "--part", "2/3")
    run(output, "--join", 3)
    assert bytes_of(output) == bytes_of(tmp_path / "whole")


def tokenize_on_rank(checkpoint: str, images: str, output: str) -> None:
    from discrete_lit.cli.tokenize import tokenize
    from discrete_lit.data import ImageFolder

    data = ImageFolder(images, image_size=8, batch_size=4, num_workers=0)
    tokenize(checkpoint, data, output=output, accelerator="cpu", devices=2)


@pytest.mark.ddp
def test_two_devices_write_the_bytes_of_one(tokenizer_checkpoint: Path, images: Path, tmp_path: Path) -> None:
    from discrete_lit.cli.tokenize import tokenize
    from discrete_lit.data import ImageFolder

    data = ImageFolder(str(images), image_size=8, batch_size=4, num_workers=0)
    tokenize(str(tokenizer_checkpoint), data, output=str(tmp_path / "one"), accelerator="cpu", devices=1)
    arguments = str(tokenizer_checkpoint), str(images), str(tmp_path / "two")
    on_ranks(2, tokenize_on_rank, tmp_path / "ranks", *arguments)
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")


def test_the_array_script_runs_its_part_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    """With stand-ins for SLURM and for the command: what is called, and what happens at the time limit."""
    programs = {
        "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
        "scontrol": f'echo "$@" >> {tmp_path}/requeued',
        "discrete-lit": f'echo "$@" >> {tmp_path}/called; trap "echo ended >> {tmp_path}/called; exit 143" TERM; '
        '[ "$1" = tokenize ] || { sleep 20 & wait; }',
    }
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)
    (folder / "activate").write_text(f"PATH={folder}:$PATH\n")
    environment = {
        "PATH": os.environ["PATH"],
        "VENV": str(tmp_path / "venv"),
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_ARRAY_JOB_ID": "17",
        "SLURM_ARRAY_TASK_ID": "3",
    }
    bash = shutil.which("bash")
    assert bash is not None
    subprocess.run([bash, TEMPLATE, "tokenize", "--output", "a b"], env=environment, check=True)
    assert (tmp_path / "called").read_text() == "tokenize --output a b --part slurm\n"
    assert not (tmp_path / "requeued").exists()
    job = subprocess.Popen([bash, TEMPLATE, "sample"], env=environment)
    while (tmp_path / "called").read_text().count("\n") < 2:
        time.sleep(0.02)
    time.sleep(0.2)
    job.send_signal(signal.SIGTERM)
    assert job.wait(10) == 0
    assert (tmp_path / "called").read_text().splitlines()[1:] == ["sample --part slurm", "ended"]
    assert (tmp_path / "requeued").read_text() == "requeue 17_3\n"


@pytest.mark.slow
def test_submitit_sends_what_is_left_and_joins(
    tokenizer_checkpoint: Path, images: Path, commands: dict[str, Callable[..., Any]], tmp_path: Path
) -> None:
    """By its local executor, whose jobs are processes: three times the import of everything."""
    pytest.importorskip("submitit")
    commands["sample"](tmp_path / "whole")
    commands["sample"](tmp_path / "parts", "--part", "2/2")
    plan = json.loads((tmp_path / "parts" / "sample.parts" / "plan.json").read_text())
    given = ["--ckpt_path", plan["settings"]["checkpoint"], "--num_samples", "29", "--batch_size", "4", "--seed", "3"]
    where = ["--output", str(tmp_path / "parts"), "--accelerator", "cpu"]
    script = [sys.executable, str(TEMPLATE.parent / "submit.py"), "--parts", "2", "--cluster", "local"]
    sent = [*script, "--folder", str(tmp_path / "jobs"), "--set", "timeout_min=10", "--", "sample", *given, *where]
    answer = subprocess.run(sent, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr
    assert "1 jobs for the parts [1]" in answer.stdout
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
