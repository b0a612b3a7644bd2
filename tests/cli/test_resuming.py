import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny_runs import TOKENIZER, generator_settings, run, write_settings
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

import discrete_lit
from discrete_lit.checkpoints import save
from discrete_lit.cli.resume import differences

OPTIMIZER = "model.init_args.optimizer"
WARMUP = {
    "class_path": "discrete_lit.optimization.WarmupCosine",
    "init_args": {"warmup_steps": 2, "total_steps": 20},
}
STEPS = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2, "gamma": 0.5}}
COSINE = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 20}}


class RecordSettings(Callback):
    """Keeps what every optimizer step of the last run was taken with."""

    taken: list[dict[str, Any]]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        RecordSettings.taken = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        RecordSettings.taken.append(
            {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
        )


class Runs:
    """Fits the tiny tokenizer in a run folder; returns the settings of each step that was taken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def __call__(self, *arguments: Any, steps: int, scheduler: Any = None, fresh: bool = False) -> list[dict[str, Any]]:
        settings = copy.deepcopy(TOKENIZER)
        settings["model"]["init_args"]["scheduler"] = scheduler
        settings["trainer"] |= {"max_steps": steps, "callbacks": [{"class_path": "test_resuming.RecordSettings"}]}
        settings["trainer"]["limit_val_batches"] = 0
        self.count += fresh
        file = write_settings(self.folder / "settings.yaml", settings)
        run("fit", "--config", file, "--run_dir", self.folder / f"run{self.count}", "--ckpt_path", "last", *arguments)
        return RecordSettings.taken

    def weights(self) -> dict[str, torch.Tensor]:
        return self.checkpoint()["state_dict"]

    def checkpoint(self) -> dict[str, Any]:
        return torch.load(self.folder / f"run{self.count}" / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture
def fit(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def rates(taken: list[dict[str, Any]]) -> list[float]:
    return [settings["lr"] for settings in taken]


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("scheduler", [None, WARMUP, STEPS, COSINE])
def test_unchanged_settings_resume_exactly(scheduler: Any, fit: Runs) -> None:
    whole = copy.deepcopy(fit(steps=4, scheduler=scheduler))
    uninterrupted = fit.checkpoint()
    halves = copy.deepcopy(fit(steps=2, scheduler=scheduler, fresh=True))
    halves += fit(steps=4, scheduler=scheduler)
    assert halves == whole
    resumed = fit.checkpoint()
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in uninterrupted["state_dict"].items())
    assert str(resumed["optimizer_states"]) == str(uninterrupted["optimizer_states"])


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("scheduler", [None, WARMUP, STEPS, COSINE])
def test_a_new_learning_rate_wins_at_its_place_of_the_schedule(
    scheduler: Any, fit: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    expected = rates(fit(f"--{OPTIMIZER}.init_args.lr=0.5", steps=4, scheduler=scheduler))
    fit(steps=2, scheduler=scheduler, fresh=True)
    caplog.clear()
    taken = fit(f"--{OPTIMIZER}.init_args.lr=0.5", steps=4, scheduler=scheduler)
    assert rates(taken) == expected[2:]
    assert f"{OPTIMIZER}.init_args.lr: 0.5 (checkpoint: 0.01)" in [record.getMessage() for record in caplog.records]
    # The moments are those of the checkpoint: they have seen all four steps.
    assert {float(state["step"]) for state in fit.checkpoint()["optimizer_states"][0]["state"].values()} == {4.0}


@pytest.mark.slow
def test_muon_and_adamw_resume_exactly_under_a_trainer(two_tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    """With clipped and accumulated gradients, an average of the weights and a schedule, which scales both rates."""
    settings = generator_settings(two_tokenizers[0])
    settings["model"]["init_args"] |= {
        "optimizer": {"class_path": "MuonAdamW", "init_args": {"lr": 0.02, "adamw_lr": 0.01}},
        "scheduler": WARMUP,
    }
    settings["trainer"] |= {
        "gradient_clip_val": 0.5,
        "accumulate_grad_batches": 2,
        "limit_val_batches": 0,
        "callbacks": [
            {"class_path": "ExponentialMovingAverage", "init_args": {"decay": 0.5}},
            {"class_path": "test_resuming.RecordSettings"},
        ],
    }

    def fit(name: str, steps: int) -> dict[str, Any]:
        settings["trainer"]["max_steps"] = steps
        file = write_settings(tmp_path / "settings.yaml", settings)
        run("fit", "--config", file, "--run_dir", tmp_path / name, "--ckpt_path", "last")
        return torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)

    whole = fit("whole", 4)
    assert [settings["lr"] for settings in RecordSettings.taken[:3]] == [0.01, 0.02, 0.02]
    muon, adamw, _ = whole["optimizer_states"][0]["param_groups"]
    assert muon["muon"] and not adamw["muon"] and muon["lr"] == 2 * adamw["lr"]
    buffers = [set(state) for state in whole["optimizer_states"][0]["state"].values()]
    assert {"momentum_buffer"} in buffers and {"step", "exp_avg", "exp_avg_sq"} in buffers
    fit("halves", 2)
    resumed = fit("halves", 4)
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, resumed[part][name]) for name, value in whole[part].items())
    assert str(resumed["optimizer_states"]) == str(whole["optimizer_states"])


def test_a_new_schedule_wins(fit: Runs) -> None:
    changed = copy.deepcopy(STEPS)
    changed["init_args"] = {"step_size": 1, "gamma": 0.1}
    expected = rates(fit(steps=4, scheduler=changed))
    fit(steps=2, scheduler=STEPS, fresh=True)
    assert rates(fit(steps=4, scheduler=changed)) == expected[2:]


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("before", [None, STEPS])
@pytest.mark.parametrize("after", [None, WARMUP])
def test_another_scheduler_goes_on_at_the_same_step(before: Any, after: Any, fit: Runs) -> None:
    expected = rates(fit(steps=4, scheduler=after))
    fit(steps=2, scheduler=before, fresh=True)
    assert rates(fit(steps=4, scheduler=after)) == expected[2:]


def test_other_settings_of_the_optimizer_win(fit: Runs) -> None:
    fit(steps=2, scheduler=WARMUP)
    expected = rates(fit(steps=4, scheduler=WARMUP, fresh=True))[2:]
    fit(steps=2, scheduler=WARMUP, fresh=True)
    arguments = (f"--{OPTIMIZER}.init_args.weight_decay=0.25", f"--{OPTIMIZER}.init_args.betas=[0.5,0.6]")
    taken = fit(*arguments, steps=4, scheduler=WARMUP)
    assert [settings["weight_decay"] for settings in taken] == [0.25, 0.25]
    assert [tuple(settings["betas"]) for settings in taken] == [(0.5, 0.6), (0.5, 0.6)]
    assert rates(taken) == expected


def test_an_optimizer_of_another_class_starts_anew(fit: Runs, caplog: pytest.LogCaptureFixture) -> None:
    fit(steps=2)
    fit(f"--{OPTIMIZER}=torch.optim.SGD", f"--{OPTIMIZER}.lr=0.25", f"--{OPTIMIZER}.momentum=0.5", steps=4)
    assert [settings["lr"] for settings in RecordSettings.taken] == [0.25, 0.25]
    assert "starts anew" in caplog.text


def test_settings_left_out_of_the_configuration_come_from_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("fit", "--config", write_settings(tmp_path / "settings.yaml", TOKENIZER), "--run_dir", tmp_path / "run")
    rest = {name: TOKENIZER[name] for name in ("data", "trainer")}
    file = write_settings(tmp_path / "rest.yaml", rest)
    caplog.clear()
    resume = ("fit", "--config", file, "--run_dir", tmp_path / "run", "--ckpt_path", "last")
    run(*resume, "--model.optimizer.lr=0.5", "--trainer.max_steps=4")
    assert [record.getMessage() for record in caplog.records if "(checkpoint: " in record.getMessage()] == [
        f"{OPTIMIZER}.init_args.lr: 0.5 (checkpoint: 0.01)"
    ]
    settings = yaml.safe_load((tmp_path / "run" / "config-resumed-1.yaml").read_text())
    assert settings["model"]["init_args"]["levels"] == [4, 3]
    assert settings["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5


@pytest.fixture(scope="module")
def two_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    file = write_settings(folder / "settings.yaml", TOKENIZER)
    for name in ("first", "second"):
        run("fit", "--config", file, "--run_dir", folder / name, "--seed_everything", len(name))
    return folder / "first" / "checkpoints" / "last.ckpt", folder / "second" / "checkpoints" / "last.ckpt"


def test_a_generator_goes_on_without_its_tokenizer_file(two_tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.ckpt"
    tokenizer.write_bytes(two_tokenizers[0].read_bytes())
    settings = generator_settings(tokenizer)
    run("fit", "--config", write_settings(tmp_path / "settings.yaml", settings), "--run_dir", tmp_path / "run")
    tokenizer.unlink()
    del settings["model"]
    file = write_settings(tmp_path / "rest.yaml", settings)
    resume = ("fit", "--config", file, "--run_dir", tmp_path / "run", "--ckpt_path", "last", "--trainer.max_steps=4")
    run(*resume)
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    saved = torch.load(two_tokenizers[0], weights_only=True)["state_dict"]
    assert checkpoint["global_step"] == 4
    assert all(torch.equal(checkpoint["state_dict"][f"tokenizer.{name}"], value) for name, value in saved.items())


def refused(capsys: pytest.CaptureFixture[str], call: Callable[[], None]) -> str:
    with pytest.raises(SystemExit) as stopped:
        call()
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_another_tokenizer_under_a_generator_is_refused(
    two_tokenizers: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = generator_settings(two_tokenizers[0])
    run("fit", "--config", write_settings(tmp_path / "settings.yaml", settings), "--run_dir", tmp_path / "run")
    other = write_settings(tmp_path / "other.yaml", generator_settings(two_tokenizers[1]))
    resume = ("fit", "--config", other, "--run_dir", tmp_path / "run", "--ckpt_path", "last")
    assert "was trained on another tokenizer" in refused(capsys, lambda: run(*resume))


def test_weights_of_another_size_are_refused(
    two_tokenizers: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_settings(tmp_path / "settings.yaml", TOKENIZER)
    wider = ("fit", "--config", file, "--ckpt_path", two_tokenizers[0], "--model.network.channels=8")
    message = refused(capsys, lambda: run(*wider))
    assert "do not fit this FSQ" in message
    assert "network.encoder.conv_in.weight has shape (4, 3, 3, 3) instead of (8, 3, 3, 3)" in message


def imported(checkpoint: Path, output: Path) -> Path:
    """The model as `import` writes one: without an optimizer or the state of a run."""
    contents = torch.load(checkpoint, weights_only=True)
    module = discrete_lit.load(checkpoint)
    del module.hparams["init_args"]["optimizer"]
    save(module, output)
    assert "optimizer" in contents["hyper_parameters"]["init_args"]
    return output


@pytest.mark.slow_but(1)
@pytest.mark.parametrize(("source", "model"), [("trained", True), ("imported", True), ("imported", False)])
def test_a_new_run_starts_from_weights(
    source: str, model: bool, two_tokenizers: tuple[Path, Path], tmp_path: Path
) -> None:
    """Of a checkpoint that was trained or imported, with the model in the configuration or from the checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    # A file of weights in the run folder is none of the run's checkpoints.
    weights = two_tokenizers[0] if source == "trained" else imported(two_tokenizers[0], folder / "imported.ckpt")
    settings = copy.deepcopy(TOKENIZER)
    settings["trainer"]["max_steps"] = 1
    # One batch an epoch: Lightning warns of a resume inside an epoch of data that cannot go on there.
    settings["data"]["init_args"]["count"] = 4
    if not model:
        del settings["model"]
    file = write_settings(tmp_path / "settings.yaml", settings)
    start = ("fit", "--config", file, "--run_dir", folder, "--init_from", weights, "--ckpt_path", "last")
    optimizer = (f"--{OPTIMIZER}=torch.optim.AdamW", f"--{OPTIMIZER}.init_args.lr=0")
    run(*start, *optimizer)
    last = folder / "checkpoints" / "last.ckpt"
    saved, now = torch.load(weights, weights_only=True), torch.load(last, weights_only=True)
    assert now["global_step"] == 1
    assert all(torch.equal(value, now["state_dict"][name]) for name, value in saved["state_dict"].items())
    assert {float(state["step"]) for state in now["optimizer_states"][0]["state"].values()} == {1.0}
    # From here on it is a run like any other, which goes on with its own checkpoints.
    run(*start, *optimizer, "--trainer.max_steps=2")
    assert torch.load(last, weights_only=True)["global_step"] == 2
    starts = json.loads((folder / "run.json").read_text())["starts"]
    assert [(start["checkpoint"], start.get("init_from")) for start in starts] == [
        (None, str(weights)),
        (str(last), None),
    ]


def test_mistakes_in_starting_from_weights_are_refused(
    two_tokenizers: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = imported(two_tokenizers[0], tmp_path / "imported.ckpt")
    file = write_settings(tmp_path / "settings.yaml", TOKENIZER)
    fit = ("fit", "--config", file, "--run_dir", tmp_path / "run")
    message = refused(capsys, lambda: run(*fit, "--ckpt_path", alone))
    assert "holds weights alone" in message and f"`--init_from {alone}`" in message
    message = refused(capsys, lambda: run(*fit, "--ckpt_path", two_tokenizers[0], "--init_from", alone))
    assert "give one of them" in message
    message = refused(capsys, lambda: run(*fit, "--init_from", alone, "--model.network.channels=8"))
    assert "does not fit this FSQ: network." in message and "instead of" in message
    frozen = {"class_path": "discrete_lit.tokenizers.from_checkpoint", "init_args": {"checkpoint": str(alone)}}
    frozen_file = write_settings(tmp_path / "frozen.yaml", {**TOKENIZER, "model": frozen})
    message = refused(capsys, lambda: run("fit", "--config", frozen_file, "--run_dir", tmp_path / "run"))
    assert "no weights to train" in message and "--init_from" in message

    settings = generator_settings(two_tokenizers[0])
    settings["trainer"]["max_steps"] = 1
    generator = write_settings(tmp_path / "generator.yaml", settings)
    run("fit", "--config", generator, "--run_dir", tmp_path / "generator")
    weights = tmp_path / "generator" / "checkpoints" / "last.ckpt"
    other = ("fit", "--config", generator, "--run_dir", tmp_path / "run", "--init_from", weights)
    message = refused(capsys, lambda: run("fit", "--config", file, "--run_dir", tmp_path / "run", *other[-2:]))
    assert "has no weight of this FSQ: it is of another model" in message
    settings["model"]["init_args"]["tokenizer"]["init_args"]["checkpoint"] = str(two_tokenizers[1])
    write_settings(generator, settings)
    assert "was trained on another tokenizer" in refused(capsys, lambda: run(*other))
    assert not (tmp_path / "run").exists()


def test_differences_are_one_line_each() -> None:
    before = {"class_path": "A", "init_args": {"x": 1, "y": [1, 2], "part": {"class_path": "B", "init_args": {"z": 1}}}}
    now = {"class_path": "A", "init_args": {"x": 2, "y": [1, 2], "part": {"class_path": "C", "init_args": {"w": 1}}}}
    assert list(differences(now, before, "model")) == [
        "model.init_args.x: 2 (checkpoint: 1)",
        "model.init_args.part.class_path: C (checkpoint: B)",
    ]
    assert list(differences({"a": None}, {"b": 1}, "m")) == [
        "m.a: null (checkpoint: not set)",
        "m.b: not set (checkpoint: 1)",
    ]
    assert list(differences(None, {"class_path": "B"}, "m")) == ["m: null (checkpoint: B)"]
