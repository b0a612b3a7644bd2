"""Real jobs on a real cluster of two nodes: told to end, requeued, killed; arrays, by sbatch and by submitit."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
STEPS = 1200


def missing_cluster():
    """Why there is no cluster of two nodes to submit to; None if there is one."""
    needed = [name for name in ("sinfo", "sbatch", "srun", "scontrol", "scancel") if shutil.which(name) is None]
    if needed:
        return f"SLURM's commands are not on the path: {', '.join(needed)}"
    try:
        answer = subprocess.run(["sinfo", "-h", "-o", "%D %T"], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "sinfo got no answer within 20 seconds"
    if answer.returncode:
        return f"no SLURM cluster answers: {answer.stderr.strip()}"
    usable = sum(int(line.split()[0]) for line in answer.stdout.splitlines() if re.search("idle|mixed|alloc", line))
    return None if usable >= 2 else f"two nodes are needed, sinfo shows {usable} in use or idle"


@pytest.fixture(scope="module", autouse=True)
def cluster():
    reason = missing_cluster()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def configuration(tmp_path):
    """A generator of a few thousand parameters with its token arrays, as a YAML file."""
    from helpers.distributed_run import CLASSES, IMAGE_SIZE, generator_config, tokenizer_config

    from discrete_lit.checkpoints import instantiate
    from discrete_lit.data import TokenWriter

    tokenizer = instantiate(tokenizer_config())
    checkpoint = tmp_path / "tokenizer.ckpt"
    torch.save({"state_dict": tokenizer.state_dict(), "hyper_parameters": dict(tokenizer.hparams)}, checkpoint)
    count, shape = 4 * STEPS, tokenizer.token_shape(IMAGE_SIZE)
    TokenWriter.create(
        tmp_path / "train",
        count=count,
        token_shape=shape,
        vocab_size=tokenizer.vocab_size,
        image_size=IMAGE_SIZE,
        num_classes=CLASSES,
        classes=[str(label) for label in range(CLASSES)],
        tokenizer=tokenizer.fingerprint(),
        source="noise",
    )
    writer = TokenWriter(tmp_path / "train")
    labels = torch.arange(count) % CLASSES
    tokens = torch.randint(3, (count, *shape), generator=torch.Generator().manual_seed(0)) + 3 * labels[:, None, None]
    writer.write(torch.arange(count), tokens, labels)
    writer.close()
    TokenWriter.finalise(tmp_path / "train")
    folders = dict.fromkeys(("train", "validation"), str(tmp_path / "train"))
    data = {"class_path": "discrete_lit.data.TokenArrays", "init_args": {**folders, "batch_size": 4}}
    trainer = {"max_epochs": 2, "log_every_n_steps": 1, "limit_val_batches": 1}
    model = generator_config("Masked", str(checkpoint))
    schedule = {"class_path": "discrete_lit.optimization.WarmupCosine"}
    model["init_args"]["scheduler"] = {**schedule, "init_args": {"warmup_steps": 10, "total_steps": STEPS}}
    settings = {"model": model, "data": data, "trainer": trainer}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def submit(tmp_path, configuration):
    """`submit(name)`: the job's number; its run folder and log bear the name. Jobs left over are cancelled."""
    jobs = []

    def send(name):
        sizes = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30"]
        where = [f"--chdir={ROOT}", f"--output={tmp_path / name}.log", f"--job-name={name}"]
        script = [str(ROOT / "lightning_configs/slurm/train.sbatch"), "--config", str(configuration)]
        trainer = ["--config", str(ROOT / "lightning_configs/trainer/slurm.yaml"), "--trainer.accelerator=cpu"]
        smaller = ["--trainer.devices=1", "--trainer.precision=32-true"]
        environment = {**os.environ, "RUN_DIR": str(tmp_path / name), "VENV": sys.prefix}
        command = ["sbatch", "--parsable", *sizes, *where, *script, *trainer, *smaller]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        jobs.append(answer.stdout.strip())
        return jobs[-1]

    yield send
    subprocess.run(["scancel", *jobs], check=False)


def job_record(job):
    answer = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=True)
    return dict(pair.split("=", 1) for pair in answer.stdout.split() if "=" in pair)


def wait_for(happened, job, log, seconds=600):
    """Until `happened()` is true; the job's log where it ends in another way or that does not come about."""
    deadline = time.monotonic() + seconds
    while not happened():
        state = job_record(job)["JobState"]
        if state in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY") or time.monotonic() > deadline:
            # The progress bar may be cut in the middle of a character.
            text = log.read_text(errors="replace")[-4000:] if log.exists() else "(no log)"
            pytest.fail(f"after up to {seconds} seconds job {job} is {state}; its log ends:\n{text}")
        time.sleep(1)


def curve(run_folder):
    """Every logged training loss as (step, value), sorted."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    if "train/loss" not in accumulator.Tags()["scalars"]:
        return []
    return sorted((event.step, event.value) for event in accumulator.Scalars("train/loss"))


@pytest.mark.slow
@pytest.mark.slurm
def test_a_job_is_requeued_and_goes_on_in_its_run_folder(submit, tmp_path):
    job, log = submit("interrupted"), tmp_path / "interrupted.log"
    run_folder = tmp_path / "interrupted"
    wait_for(lambda: (run_folder / "tensorboard").exists() and len(curve(run_folder)) > 20, job, log)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    wait_for(lambda: job_record(job)["Restarts"] == "1", job, log)
    assert (run_folder / "checkpoints" / "last.ckpt").is_file()
    stopped_after = len(curve(run_folder))
    assert 20 < stopped_after < STEPS

    # While SLURM holds the first job back, the same run without interruption.
    other, other_log = submit("whole"), tmp_path / "whole.log"
    for number, text in ((job, log), (other, other_log)):
        wait_for(lambda number=number: job_record(number)["JobState"] == "COMPLETED", number, text)
    whole = curve(tmp_path / "whole")
    assert [step for step, _ in whole] == list(range(STEPS))
    assert curve(run_folder) == whole
    starts = json.loads((run_folder / "run.json").read_text())["starts"]
    assert [start["checkpoint"] for start in starts] == [None, str(run_folder / "checkpoints" / "last.ckpt")]
    assert [start["world_size"] for start in starts] == [2, 2]


@pytest.fixture
def tokenizing(tmp_path):
    """The `tokenize` of 40 images up to its `--output`; its result is in the folder `whole`."""
    from helpers.distributed_run import IMAGE_SIZE, tokenizer_config
    from helpers.stored_images import pixels, save_folder

    from discrete_lit.checkpoints import instantiate, save
    from discrete_lit.cli.commands import main

    save(instantiate(tokenizer_config()), tmp_path / "tokenizer.ckpt")
    save_folder(tmp_path / "images", pixels(40, 0, IMAGE_SIZE), torch.arange(40).numpy() % 2)
    images = {"train": str(tmp_path / "images"), "image_size": IMAGE_SIZE, "batch_size": 4, "num_workers": 0}
    data = {"class_path": "discrete_lit.data.ImageFolder", "init_args": images}
    command = ["tokenize", "--ckpt_path", str(tmp_path / "tokenizer.ckpt"), "--data", json.dumps(data)]
    command += ["--accelerator", "cpu", "--output"]
    main([*command, str(tmp_path / "whole")])
    return command


def assert_as_whole(folder, whole):
    for file in ("tokens.npy", "labels.npy", "manifest.json"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.slow
@pytest.mark.slurm
def test_the_jobs_of_an_array_make_one_result(tokenizing, tmp_path):
    from discrete_lit.cli.commands import main

    command = tokenizing
    sizes = ["--gpus-per-node=0", "--cpus-per-task=1", "--time=30", "--wait"]
    where = [f"--chdir={ROOT}", f"--output={tmp_path}/%a.log"]
    script = [str(ROOT / "lightning_configs/slurm/array.sbatch"), *command, str(tmp_path / "parts")]
    for array, missing in (("1-3", None), ("2", "2")):
        if missing:  # as if it had been lost
            (tmp_path / "parts" / "tokenize.parts" / "2-of-3.json").unlink()
            with pytest.raises(SystemExit, match="1"):
                main([*command, str(tmp_path / "parts"), "--missing", "true"])
        sent = subprocess.run(
            ["sbatch", f"--array={array}", *sizes, *where, *script],
            env={**os.environ, "VENV": sys.prefix},
            timeout=600,
        )
        logs = "\n".join(log.read_text()[-2000:] for log in sorted(tmp_path.glob("*.log")))
        assert sent.returncode == 0, logs
    main([*command, str(tmp_path / "parts"), "--join", "3"])
    assert_as_whole(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.slurm
def test_submitit_sends_an_array_and_the_job_that_joins_it(tokenizing, tmp_path):
    pytest.importorskip("submitit")
    script = [sys.executable, str(ROOT / "lightning_configs/slurm/submit.py"), "--parts", "3", "--at_once", "2"]
    how = ["--cluster", "slurm", "--folder", str(tmp_path / "jobs"), "--set", "timeout_min=20", "cpus_per_task=1"]
    command = [*script, *how, "--", *tokenizing, str(tmp_path / "parts")]
    sent = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert sent.returncode == 0, sent.stderr
    assert "3 jobs for the parts [1, 2, 3]" in sent.stdout
    joining = re.search(r"job (\d+) joins them", sent.stdout)[1]
    log = tmp_path / "jobs" / joining / f"{joining}_0_log.err"
    wait_for(lambda: job_record(joining)["JobState"] == "COMPLETED", joining, log)
    assert_as_whole(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.slurm
def test_five_kills_of_jobs(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "kills.run", "--slurm", "--kills", "5", "--seed", "0", "--keep", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert "5 kills in" in done.stdout and " 0 faults" in done.stdout
