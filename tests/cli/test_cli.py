import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.tiny_runs import TOKENIZER, generator_settings, run, write_settings

from discrete_lit import __version__
from discrete_lit.cli import commands as cli

TRAINING = {"config", "seed_everything", "trainer", "model", "data", "run_dir", "ckpt_path"}
# A name that appears or goes changes every user's files: change this list together with the documentation.
OPTIONS = {
    "fit": TRAINING | {"weights"},
    "validate": TRAINING | {"verbose"},
    "test": TRAINING | {"verbose"},
    "predict": TRAINING | {"return_predictions"},
    "shards": {"config", "source", "output", "split", "samples_per_shard", "shuffle_seed"},
    "tokenize": {"config", "ckpt_path", "data", "output", "split", "crops", "ten_crop_scales"}
    | {"accelerator", "devices", "num_nodes", "precision"},
    "sample": {
        "config",
        "ckpt_path",
        "output",
        "num_samples",
        "labels",
        "sampler",
        "seed",
        "batch_size",
        "compile",
        "image_size",
    }
    | {"accelerator", "devices", "num_nodes", "precision"},
    "evaluate": {"config", "reference", "output", "image_size", "num_images", "samples", "reconstructions", "held_out"}
    | {"num_reference", "extractor", "classifier", "likelihoods", "lpips_weights", "batch_size", "device"},
    "import": {"config", "weights", "family", "output", "reference_config", "tokenizer"},
    "export": {"config", "ckpt_path", "family", "output"},
}


def exit_code(*arguments: Any) -> Any:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    return stopped.value.code


def test_help_and_version_import_neither_torch_nor_lightning() -> None:
    script = (
        "import sys; from discrete_lit.cli.commands import main; main(['--help']); main(['--version']); main([]);"
        "assert not {'torch', 'lightning', 'jsonargparse'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"discrete-lit {__version__}" in done.stdout


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_every_command_has_its_line(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    run(*arguments)
    lines = capsys.readouterr().out.splitlines()
    for name, summary in cli.COMMANDS.items():
        assert any(line.split(maxsplit=1) == [name, summary] for line in lines)


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("tokenise") == 2
    assert "did you mean 'tokenize'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_options_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--help") == 0
    words = capsys.readouterr().out.replace("[", " ").replace("]", " ").replace(",", " ").split()
    names = {word[2:].partition(".")[0].partition("=")[0].rstrip("+") for word in words if word.startswith("--")}
    assert names - {"help", "print_config"} == OPTIONS[command]


def test_print_config_goes_back_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_settings(tmp_path / "settings.yaml", generator_settings(Path("tokenizer.ckpt")))
    arguments = ("--model.init_args.label_dropout=0.25", "--trainer.max_steps=7", "--print_config")
    assert exit_code("fit", "--config", file, *arguments) == 0
    first = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(first)
    assert exit_code("fit", "--config", tmp_path / "printed.yaml", "--print_config") == 0
    assert capsys.readouterr().out == first
    settings = yaml.safe_load(first)
    assert settings["model"]["init_args"]["label_dropout"] == 0.25
    assert settings["trainer"]["max_steps"] == 7
    assert settings["trainer"]["use_distributed_sampler"] is False


def test_later_files_go_over_earlier_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_settings(tmp_path / "first.yaml", generator_settings(Path("tokenizer.ckpt")))
    swap = {"class_path": "discrete_lit.generators.Autoregressive", "init_args": {"label_dropout": 0.5}}
    second = write_settings(
        tmp_path / "second.yaml",
        {
            "model": swap,
            "trainer": {"max_steps": 9, "callbacks+": [{"class_path": "discrete_lit.callbacks.Throughput"}]},
        },
    )
    more = ("--model.init_args.label_smoothing=0.1", "--config", second, "--trainer.min_steps=1", "--print_config")
    assert exit_code("fit", "--config", first, *more) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["model"]["class_path"] == "discrete_lit.generators.Autoregressive"
    arguments = settings["model"]["init_args"]
    assert "label_smoothing" not in arguments
    assert (arguments["label_dropout"], arguments["image_size"]) == (0.5, 8)
    assert (settings["trainer"]["max_steps"], settings["trainer"]["min_steps"]) == (9, 1)
    assert len(settings["trainer"]["callbacks"]) == 1


def test_a_users_mistake_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_settings(tmp_path / "settings.yaml", generator_settings(tmp_path / "nowhere.ckpt"))
    assert exit_code("fit", "--config", file) == 2
    message = capsys.readouterr().err
    assert f"error: no checkpoint at {str(tmp_path / 'nowhere.ckpt')!r}" in message
    assert "Traceback" not in message
    monkeypatch.setenv("DISCRETE_LIT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no checkpoint at"):
        run("fit", "--config", file)


def test_settings_that_the_trainer_refuses_are_a_users_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_settings(tmp_path / "settings.yaml", TOKENIZER)
    assert exit_code("fit", "--config", file, "--trainer.limit_train_batches=2.5") == 2
    assert "limit_train_batches" in capsys.readouterr().err


def test_other_errors_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("helpers.synthetic_data.IndexedImages.__getitem__", fail)
    file = write_settings(tmp_path / "settings.yaml", TOKENIZER)
    with pytest.raises(RuntimeError, match="a defect"):
        run("fit", "--config", file, "--run_dir", tmp_path / "run")


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    from PIL import Image

    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "0.png")
    return tmp_path / "images"


def shard_settings(folder: Path, output: Path) -> dict[str, Any]:
    source = {"class_path": "discrete_lit.data.sources.ClassFolders", "init_args": {"root": str(folder)}}
    return {"source": source, "output": str(output), "split": "train"}


def test_a_command_runs_from_a_file(class_folder: Path, tmp_path: Path) -> None:
    file = write_settings(tmp_path / "shards.yaml", shard_settings(class_folder, tmp_path / "ignored"))
    run("shards", "--config", file, "--output", tmp_path / "shards", "--samples_per_shard", 1)
    assert len(list((tmp_path / "shards").glob("train-*.tar"))) == 2
    assert not (tmp_path / "ignored").exists()


@pytest.mark.parametrize(("given", "meant"), [("outptu", "output"), ("source.init_args.rot", "source.init_args.root")])
def test_a_command_names_the_wrong_setting(
    given: str, meant: str, class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_settings(tmp_path / "shards.yaml", shard_settings(class_folder, tmp_path / "shards"))
    assert exit_code("shards", "--config", file, f"--{given}=x") == 2
    message = capsys.readouterr().err
    assert given in message
    assert f"did you mean {meant}?" in message


def test_a_command_prints_its_configuration(
    class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_settings(tmp_path / "shards.yaml", shard_settings(class_folder, tmp_path / "shards"))
    assert exit_code("shards", "--config", file, "--print_config") == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["samples_per_shard"] == 1000
    (tmp_path / "printed.yaml").write_text(printed)
    assert exit_code("shards", "--config", tmp_path / "printed.yaml", "--print_config") == 0
    assert capsys.readouterr().out == printed


def test_an_alarm_ends_the_run_with_its_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = copy.deepcopy(TOKENIZER) | {"run_dir": str(tmp_path / "run")}
    settings["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 1e30
    assert exit_code("fit", "--config", write_settings(tmp_path / "settings.yaml", settings)) == 1
    error = capfd.readouterr().err
    assert "stopped: the loss of a batch is not finite at step 1" in error and "Traceback" not in error
    reports = list((tmp_path / "run" / "alarms").glob("*.json"))
    assert len(reports) == 1 and len(json.loads(reports[0].read_text())["ranks"][0]["index"]) == 4
