import copy
import csv
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.synthetic_data import SyntheticImages
from helpers.tiny_runs import TOKENIZER, generator_settings, run, write_settings

from discrete_lit import __version__, load
from discrete_lit.cli import commands as cli
from discrete_lit.core.trust import importable_from_here

TRAINING = {"config", "seed_everything", "trainer", "model", "data", "run_dir", "ckpt_path"}
# A name that appears or goes changes every user's files: change this list together with the documentation.
OPTIONS = {
    "fit": TRAINING | {"init_from", "init_anew"},
    "validate": TRAINING | {"verbose"},
    "test": TRAINING | {"verbose"},
    "predict": TRAINING,
    "shards": {"config", "source", "output", "split", "samples_per_shard", "shuffle_seed"},
    "tokenize": {"config", "ckpt_path", "data", "output", "split", "crops", "ten_crop_scales"}
    | {"accelerator", "devices", "num_nodes", "precision", "latents", "latent_dtype", "seed"}
    | {"part", "join", "missing"},
    "text_tokenizer": {"config", "shards", "output", "vocab_size", "captions"},
    "encode_captions": {"config", "text_encoder", "arrays", "batch_size", "accelerator"},
    "measure_latents": {"config", "ckpt_path", "data", "split", "num_images", "scale", "output"}
    | {"accelerator", "precision"},
    "models": {"config", "name", "word", "json"},
    "sample": {
        "config",
        "ckpt_path",
        "model",
        "accept_licence",
        "output",
        "num_samples",
        "labels",
        "prompt",
        "prompt_file",
        "negative_prompt",
        "thought",
        "sampler",
        "seed",
        "batch_size",
        "compile",
        "graph",
        "image_size",
        "decoder",
        "decoder_steps",
        "decoder_sampler",
        "known",
        "known_positions",
        "frame_rate",
    }
    | {"accelerator", "devices", "num_nodes", "precision", "part", "join", "missing"},
    "caption": {"config", "images", "ckpt_path", "output", "sampler", "seed", "batch_size", "resize"}
    | {"accelerator", "precision"},
    "evaluate": {"config", "reference", "output", "image_size", "num_images", "samples", "reconstructions", "held_out"}
    | {"num_reference", "apply_exif", "extractor", "classifier", "likelihoods", "lpips_weights", "batch_size"}
    | {"image_channels", "accelerator", "devices", "num_nodes", "protocol", "part", "join", "missing"}
    | {"perturbed", "perturbed_neighbours", "prompts", "captions"},
    "evaluate_audio": {"config", "data", "output", "num_clips", "samples", "reconstructions", "extractor"}
    | {"accelerator"},
    "evaluate_video": {"config", "data", "output", "num_clips", "num_reference", "samples", "reconstructions"}
    | {"continuations", "extractor", "i3d_weights", "classifier", "lpips_weights", "accelerator"},
    "retrieval": {"config", "samples", "clip", "image_tower", "image_weights", "output", "batch_size", "accelerator"},
    "replay": {"config", "run_dir", "alarm", "ckpt_path", "accelerator", "precision"},
    "compare": {"config", "reports", "output"},
    "sweep": {
        "config",
        "ckpt_path",
        "reference",
        "output",
        "settings",
        "search",
        "evaluations",
        "sampler",
        "num_samples",
        "prompt",
        "prompt_file",
        "negative_prompt",
        "classifier",
    }
    | {"num_reference", "seed", "extractor", "batch_size", "accelerator", "devices", "num_nodes", "precision"},
    "watch": {"config", "output", "checkpoints", "classes", "seeds"},
    "demo": {"config", "ckpt_path", "model", "accept_licence", "host", "port", "accelerator"},
    "advise": {"config", "wish", "image_size", "images", "seconds", "memory_gb", "training_seconds", "training_flops"}
    | {"batch_size", "accelerator", "precision", "recipes", "json"},
    "import": {"config", "weights", "family", "output", "reference_config", "tokenizer", "text_tokenizer"},
    "recipes": {"config", "name"},
    "export": {"config", "ckpt_path", "family", "output", "licence"},
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


def test_nothing_looks_for_garbage_while_a_command_is_imported() -> None:
    """That would take as long as a third of the import; what is imported is not looked through later either."""
    script = (
        "import gc; from discrete_lit.cli import commands; searches = []; "
        "gc.callbacks.append(lambda phase, info: searches.append(phase)); commands._module('evaluate'); "
        "gc.callbacks.clear(); frozen = gc.get_freeze_count(); commands._module('evaluate'); "
        "print(len(searches), gc.isenabled(), frozen > 10000, gc.get_freeze_count() == frozen)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["0", "True", "True", "True"], done.stdout + done.stderr


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_options_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--help") == 0
    words = capsys.readouterr().out.replace("[", " ").replace("]", " ").replace(",", " ").split()
    names = {word[2:].partition(".")[0].partition("=")[0].rstrip("+") for word in words if word.startswith("--")}
    reads_checkpoints = {"trust"} if command not in cli._WITHOUT_CHECKPOINT else set()
    assert names - {"help", "print_config"} == OPTIONS[command] | reads_checkpoints


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
    between = write_settings(tmp_path / "between.yaml", {"model": {"init_args": {"label_smoothing": 0.1}}})
    swap = {"class_path": "discrete_lit.generators.Autoregressive", "init_args": {"label_dropout": 0.5}}
    second = write_settings(
        tmp_path / "second.yaml",
        {
            "model": swap,
            "trainer": {"max_steps": 9, "callbacks+": [{"class_path": "discrete_lit.callbacks.Throughput"}]},
        },
    )
    more = ("--config", between, "--config", second, "--trainer.min_steps=1", "--print_config")
    assert exit_code("fit", "--config", first, *more) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["model"]["class_path"] == "discrete_lit.generators.Autoregressive"
    arguments = settings["model"]["init_args"]
    assert "label_smoothing" not in arguments
    assert (arguments["label_dropout"], arguments["image_size"]) == (0.5, 8)
    assert (settings["trainer"]["max_steps"], settings["trainer"]["min_steps"]) == (9, 1)
    assert len(settings["trainer"]["callbacks"]) == 1


# For each command: a file's settings, and an option that contradicts it.
CONTRADICTIONS: dict[str, tuple[dict[str, Any], str, Any]] = {
    **{name: ({"trainer": {"max_steps": 2}}, "trainer.max_steps", 7) for name in cli.TRAINING_COMMANDS},
    "shards": ({"split": "train"}, "split", "test"),
    "tokenize": ({"split": "train"}, "split", "validation"),
    "text_tokenizer": ({"vocab_size": 300}, "vocab_size", 400),
    "encode_captions": ({"batch_size": 2}, "batch_size", 7),
    "measure_latents": ({"split": "train"}, "split", "validation"),
    "sample": ({"num_samples": 2}, "num_samples", 7),
    "caption": ({"batch_size": 2}, "batch_size", 7),
    "evaluate": ({"batch_size": 2}, "batch_size", 7),
    "evaluate_audio": ({"num_clips": 2}, "num_clips", 7),
    "evaluate_video": ({"num_clips": 2}, "num_clips", 7),
    "retrieval": ({"batch_size": 2}, "batch_size", 7),
    "replay": ({"run_dir": "here"}, "run_dir", "there"),
    "compare": ({"output": "here"}, "output", "there"),
    "sweep": ({"num_samples": 2}, "num_samples", 7),
    "watch": ({"output": "here.html"}, "output", "there.html"),
    "advise": ({"images": 2}, "images", 7),
    "models": ({"word": "rar"}, "word", "var"),
    "demo": ({"port": 7}, "port", 8),
    "recipes": ({"name": "masked"}, "name", "rar"),
    "import": ({"family": "taming_vqgan"}, "family", "llamagen_vq"),
    "export": ({"family": "taming_vqgan"}, "family", "llamagen_vq"),
}


@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.parametrize("form", ["{0} {1}", "{1} {0}", "{2} {1}", "{1} {2}", "{1} {3}"])
def test_the_command_line_wins_wherever_it_stands(
    command: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, name, value = CONTRADICTIONS[command]
    file = write_settings(tmp_path / "settings.yaml", settings)
    given = form.format(f"--config {file}", f"--{name} {value}", f"-c {file}", f"-c{file}").split()
    assert exit_code(command, *given, "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    for part in name.split("."):
        printed = printed[part]
    assert printed == value


def test_a_group_goes_before_what_is_inside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = ("--data.init_args.batch_size", "3", "--data.train=images")
    assert exit_code("fit", *inside, "--data", "ImageFolder", "--data.image_size=8", "--print_config") == 0
    given = yaml.safe_load(capsys.readouterr().out)["data"]
    assert given["class_path"] == "discrete_lit.data.ImageFolder"
    assert (given["init_args"]["batch_size"], given["init_args"]["train"]) == (3, "images")


def test_options_of_a_list_keep_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (
        (f"--trainer.callbacks+={name}", f"--trainer.callbacks.{setting}")
        for name, setting in (("TQDMProgressBar", "refresh_rate=5"), ("LearningRateMonitor", "logging_interval=step"))
    )
    assert exit_code("fit", *one, *two, "--print_config") == 0
    callbacks = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert callbacks[0]["init_args"]["refresh_rate"] == 5
    assert callbacks[1]["init_args"]["logging_interval"] == "step"


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


def test_predictions_are_kept(tokenizer_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {key: value for key, value in TOKENIZER.items() if key != "model"}
    file = write_settings(tmp_path / "data.yaml", data)
    given = ("predict", "--config", file, "--ckpt_path", tokenizer_checkpoint)
    assert exit_code(*given) == 2
    assert "predict needs --run_dir FOLDER" in capsys.readouterr().err
    run(*given, "--run_dir", tmp_path / "run")
    files = sorted((tmp_path / "run" / "predictions").iterdir())
    assert [file.name for file in files] == ["0-000000.pt", "0-000001.pt"]
    written = [torch.load(file, weights_only=True) for file in files]
    loader = SyntheticImages(count=8, batch_size=4).predict_dataloader()
    tokenizer = load(tokenizer_checkpoint)
    for batch, file in zip(loader, written, strict=True):
        assert torch.equal(file["prediction"], tokenizer.encode(batch["image"]))


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_validate_and_test_measure_the_same_distance(
    kind: str, tokenizer_checkpoint: Path, generator_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    distance = {
        "class_path": "ImageDistance",
        "init_args": {"num_samples": 6, "extractor": {"class_path": "helpers.means_extractor.ColourMeans"}},
    }
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "", "version": "log"}}
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "callbacks": [distance], "logger": logger}
    file = write_settings(tmp_path / "data.yaml", {"data": TOKENIZER["data"], "trainer": trainer})
    found = {}
    for command, stage in (("validate", "validation"), ("test", "test")):
        checkpoint = tokenizer_checkpoint if kind == "tokenizer" else generator_checkpoints["Masked"]
        run(command, "--config", file, "--ckpt_path", checkpoint)
        log = tmp_path / "log" / "metrics.csv"
        with log.open() as lines:
            (logged,) = csv.DictReader(lines)
        found[stage] = {name.removeprefix(f"{stage}/"): value for name, value in logged.items() if "/" in name}
        log.unlink()
    assert found["test"] == found["validation"]
    names = {"rFD-Means_8", "psnr", "loss", "perplexity"} if kind == "tokenizer" else {"gFD-Means_6", "loss"}
    assert names < set(found["test"]) and all(float(found["test"][name]) > 0 for name in names)


def test_test_of_a_model_without_a_test_step_says_what_to_run(
    tokenizer_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("discrete_lit.tokenizers.autoencoder.ImageAutoencoder.test_step")
    file = write_settings(tmp_path / "data.yaml", {key: value for key, value in TOKENIZER.items() if key != "model"})
    assert exit_code("test", "--config", file, "--ckpt_path", tokenizer_checkpoint) == 2
    message = capsys.readouterr().err
    assert "FSQ has no test step: `discrete-lit validate` computes its metrics" in message


@pytest.mark.parametrize("data", [None, {"init_args": {"batch_size": 4}}, {"batch_size": 4}])
def test_a_recipe_without_its_file_of_data(data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**TOKENIZER, "data": data} if data is not None else {k: v for k, v in TOKENIZER.items() if k != "data"}
    assert exit_code("fit", "--config", write_settings(tmp_path / "recipe.yaml", settings)) == 2
    message = capsys.readouterr().err
    assert re.match(r"error: (data |the following arguments are required: data,)", message)
    assert "`--config` of a file such as lightning_configs/data/" in message


def test_a_recipe_that_lacks_its_base_says_how_it_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    recipes = Path(__file__).parents[2] / "lightning_configs"
    base, recipe = recipes / "trainer" / "cpu.yaml", recipes / "generators" / "halton_s_imagenet256.yaml"
    assert exit_code("fit", "--config", base, "--config", recipe) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1].strip()
    assert last.startswith(f"{recipe} says how it is run: discrete-lit fit --config lightning_configs/data/")
    assert "--config lightning_configs/generators/halton_b_imagenet256.yaml " in last


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("run_dir", "ckpt_path", "init_from") for value in (5, ["a"], "", "a\0b")]
    + [("trainer", value) for value in (5, ["a"], None)],
)
def test_what_is_used_before_parsing_is_checked(
    name: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_settings(tmp_path / "settings.yaml", {**TOKENIZER, name: value})
    assert exit_code("fit", "--config", "settings.yaml") == 2
    assert name in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["settings.yaml"]


@pytest.mark.parametrize("place", ["own_module.py", "own_package/inner.py", "own_folder/deeper/inner.py"])
def test_a_module_below_the_current_folder_is_found(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("class Mine: ...\n")
    module = place.removesuffix(".py").replace("/", ".")
    with importable_from_here([f"{module}.Mine"]):
        assert importlib.import_module(module).Mine
    assert str(tmp_path) not in sys.path


def test_a_dotted_name_beside_its_group_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "settings.yaml"
    data = "{class_path: ImageFolder, init_args: {image_size: 8, batch_size: 2}}"
    file.write_text(f"trainer.min_steps: 3\ndata.seed: 7\ntrainer: {{max_steps: 5}}\ndata: {data}\n")
    assert exit_code("fit", "--config", file, "--print_config") == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert (settings["trainer"]["min_steps"], settings["trainer"]["max_steps"]) == (3, 5)
    assert settings["data"]["init_args"]["seed"] == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "settings.yaml must hold `key: value` lines, it is empty"),
        ("# trainer:\n", "it is empty"),
        ("? [a]\n: 1\n", "settings.yaml is not valid YAML: a key is no word, line 1"),
        ("".join(f"k{i}: 1\n" for i in range(2000)), "settings.yaml is not valid YAML: it has more than 1,000 keys"),
        ("run_dir: " + "9" * 5000, "settings.yaml: Exceeds the limit"),
    ],
)
def test_a_file_that_is_no_configuration(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    assert exit_code("fit", "--config", tmp_path / "settings.yaml") == 2
    assert words in capsys.readouterr().err
