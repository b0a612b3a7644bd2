import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.tiny_runs import TOKENIZER, generator_settings, run, write_settings

from discrete_lit.cli.config import COMMAND_LINE, INHERITED, read_given
from discrete_lit.core.configuration import current_names, renames

GENERATOR = generator_settings(Path("tokenizer.ckpt"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What `discrete-lit` prints when it refuses the arguments with exit code 2, in a few lines."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    output = capsys.readouterr()
    assert stopped.value.code == 2
    assert output.err.startswith("error: ")
    assert output.err.count("\n") <= 6
    assert output.out == ""
    return output.err


def changed(settings: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    settings = copy.deepcopy(settings)
    inside = settings
    *parents, last = path.split(".")
    for name in parents:
        inside = inside[name]
    inside[last] = value
    return settings


WRONG_NAMES = [
    ("trainer.max_step", "trainer.max_steps"),
    ("modle", "model"),
    ("data.init_args.batchsize", "data.init_args.batch_size"),
    ("model.init_args.label_dropuot", "model.init_args.label_dropout"),
    ("model.init_args.backbone.init_args.dept", "model.init_args.backbone.init_args.depth"),
    ("model.init_args.tokenizer.init_args.chekpoint", "model.init_args.tokenizer.init_args.checkpoint"),
    ("model.init_args.optimizer.init_args.weight_decy", "model.init_args.optimizer.init_args.weight_decay"),
    ("model.init_arg", "model.init_args"),
]


@pytest.mark.parametrize(("given", "meant"), WRONG_NAMES)
def test_wrong_name_in_a_file(given: str, meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_settings(tmp_path / "settings.yaml", changed(GENERATOR, given, 3))
    message = refused(capsys, "fit", "--config", file)
    assert given in message
    assert f"did you mean {meant}?" in message
    assert str(file) in message


@pytest.mark.parametrize(("given", "meant"), WRONG_NAMES[:-1])
def test_wrong_name_on_the_command_line(
    given: str, meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_settings(tmp_path / "settings.yaml", GENERATOR)
    message = refused(capsys, "fit", "--config", file, f"--{given}", "3")
    assert given in message
    assert f"did you mean {meant}?" in message
    assert "the command line" in message


@pytest.mark.parametrize(
    ("short", "given", "meant"),
    [
        ("--data.batchsize=3", "data.init_args.batchsize", "data.init_args.batch_size"),
        (
            "--model.backbone.dept=3",
            "model.init_args.backbone.init_args.dept",
            "model.init_args.backbone.init_args.depth",
        ),
    ],
)
def test_short_names_are_reported_in_full(
    short: str, given: str, meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_settings(tmp_path / "settings.yaml", GENERATOR)
    message = refused(capsys, "fit", "--config", file, short)
    assert given in message
    assert meant in message


def test_wrong_name_inside_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "x", "patienc": 3}}
    settings = changed(TOKENIZER, "trainer.callbacks", [{"class_path": "discrete_lit.callbacks.Throughput"}, callback])
    message = refused(capsys, "fit", "--config", write_settings(tmp_path / "settings.yaml", settings))
    assert "trainer.callbacks[1].init_args.patienc " in message
    assert "did you mean trainer.callbacks[1].init_args.patience?" in message


def test_wrong_name_in_an_appended_callback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_settings(tmp_path / "settings.yaml", TOKENIZER)
    message = refused(
        capsys, "fit", "--config", file, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.patienc=3"
    )
    assert "did you mean trainer.callbacks[0].init_args.patience?" in message
    assert "trainer.callbacks[0].init_args.monitor is required" in message


@pytest.mark.parametrize(
    ("path", "value", "accepted"),
    [
        ("trainer.max_steps", "many", "int"),
        ("trainer.max_steps", 1.5, "int"),
        ("trainer.use_distributed_sampler", 3, "bool"),
        ("data.init_args.batch_size", "x", "int"),
        ("model.init_args.image_size", "eight", "int"),
        ("model.init_args.label_dropout", "none", "float"),
        ("model.init_args.backbone.init_args.norm", "layr", "'layer' or 'rms'"),
        ("model.init_args.optimizer.init_args.lr", "fast", "float"),
        ("model.init_args.optimizer.init_args.betas", [0.9, "x"], "float"),
        ("model.init_args.backbone", 3, "a class_path of Backbone"),
    ],
)
def test_wrong_type(path: str, value: Any, accepted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_settings(tmp_path / "settings.yaml", changed(GENERATOR, path, value))
    message = refused(capsys, "fit", "--config", file)
    wrong = value[1] if path.endswith("betas") and isinstance(value, list) else value
    assert message.startswith(f"error: {path}")
    assert f"is {wrong!r}" in message
    assert accepted in message.partition("accepted:")[2]


def test_wrong_type_in_a_list_names_the_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_settings(tmp_path / "settings.yaml", changed(TOKENIZER, "model.init_args.levels", [4, "three"]))
    assert "model.init_args.levels[1] is 'three', accepted: int" in refused(capsys, "fit", "--config", file)


@pytest.mark.parametrize(
    ("path", "value", "meant"),
    [
        ("model.class_path", "discrete_lit.generators.Maskd", "discrete_lit.generators.Masked"),
        ("model.class_path", "Maskd", "discrete_lit.generators.Masked"),
        ("model.init_args.optimizer.class_path", "torch.optim.Adamw", "torch.optim.AdamW"),
        (
            "model.init_args.backbone.class_path",
            "discrete_lit.backbons.Transformer",
            "discrete_lit.backbones.Transformer",
        ),
        (
            "model.init_args.tokenizer.class_path",
            "discrete_lit.tokenizers.from_chekpoint",
            "discrete_lit.tokenizers.from_checkpoint",
        ),
    ],
)
def test_unknown_class(path: str, value: str, meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_settings(tmp_path / "settings.yaml", changed(GENERATOR, path, value))
    message = refused(capsys, "fit", "--config", file)
    assert f"{path} is {value!r}" in message
    assert f"did you mean {meant}?" in message


def test_a_module_of_ones_own_that_lacks_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "needs_another.py").write_text("import a_module_that_is_not_there\n")
    file = write_settings(tmp_path / "settings.yaml", changed(TOKENIZER, "model.class_path", "needs_another.Mine"))
    message = refused(capsys, "fit", "--config", file)
    assert "needs_another cannot be imported: No module named 'a_module_that_is_not_there'" in message


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("data.class_path", "...", "data.class_path is '...'"),
        ("model.init_args.network", None, "model.init_args.network is None, accepted: a class_path of Autoencoder"),
        ("trainer.devices", -5, "`devices`"),
        ("trainer.accumulate_grad_batches", 0, "accumulate_grad_batches is 0"),
        ("model.init_args.network.init_args.channels", 0, "each at least 1, got [0]"),
    ],
)
def test_values_that_nothing_can_be_made_of(
    path: str, value: Any, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = changed(changed(TOKENIZER, "trainer.accelerator", "cpu"), path, value)
    with pytest.raises(SystemExit) as stopped:
        run("fit", "--config", write_settings(tmp_path / "settings.yaml", settings))
    assert stopped.value.code == 2
    assert words in capfd.readouterr().err


def test_class_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = changed(GENERATOR, "model.init_args.backbone.class_path", "torch.nn.Linear")
    message = refused(capsys, "fit", "--config", write_settings(tmp_path / "settings.yaml", settings))
    assert "model.init_args.backbone.class_path is 'torch.nn.Linear', which is no Backbone" in message
    assert "discrete_lit.backbones.Transformer" in message


def test_abstract_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = changed(GENERATOR, "model.class_path", "discrete_lit.generators.Generator")
    message = refused(capsys, "fit", "--config", write_settings(tmp_path / "settings.yaml", settings))
    assert "which is abstract" in message


def test_missing_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = copy.deepcopy(GENERATOR)
    del settings["model"]["init_args"]["backbone"]["init_args"]["width"]
    del settings["model"]["init_args"]["num_classes"]
    message = refused(capsys, "fit", "--config", write_settings(tmp_path / "settings.yaml", settings))
    assert "model.init_args.backbone.init_args.width is required" in message
    assert "model.init_args.num_classes is required" in message


def test_missing_model_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert "arguments are required: data, model" in refused(capsys, "fit")


def test_several_mistakes_are_reported_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = changed(changed(TOKENIZER, "trainer.max_step", 1), "data.init_args.batchsize", 2)
    message = refused(capsys, "fit", "--config", write_settings(tmp_path / "settings.yaml", settings))
    assert "trainer.max_step " in message
    assert "data.init_args.batchsize " in message


def test_a_name_far_from_all_lists_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_settings(tmp_path / "settings.yaml", changed(TOKENIZER, "data.init_args.xyzzy", 2))
    message = refused(capsys, "fit", "--config", file)
    assert "accepted: batch_size, count, image_size, num_classes" in message


@pytest.mark.parametrize(
    ("text", "words"), [("a: [1", "is not valid YAML"), ("- 1", "`key: value`"), (None, "No such file")]
)
def test_unreadable_file(text: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "settings.yaml"
    if text is not None:
        file.write_text(text)
    message = refused(capsys, "fit", "--config", file)
    assert str(file) in message
    assert words in message


def test_later_files_and_the_command_line_win_and_are_named(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("a: {b: 1, c: 2}\nd: 3\n")
    second.write_text("a: {c: 4}\n")
    given = read_given(["--config", str(first), f"--config={second}", "--a.b", "5", "--print_config"])
    assert given.values == {"a": {"b": "5", "c": 4}, "d": 3}
    assert given.source("a.b") == COMMAND_LINE
    assert given.source("a.c") == str(second)
    assert given.source("d") == str(first)
    assert given.source("nothing") is None


def test_shorthands_of_the_command_line() -> None:
    given = read_given(["--model=Name", "--model.depth=3", "--calls+=First", "--calls.x=1", "--n", "-1"])
    assert given.values == {
        "model": {"class_path": "Name", "init_args": {"depth": "3"}},
        "calls": [{"class_path": "First", "init_args": {"x": "1"}}],
        "n": "-1",
    }
    assert given.source("calls[0].init_args.x") == COMMAND_LINE


def test_another_class_sets_the_arguments_of_the_first_aside(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("model: {class_path: A, init_args: {x: 1}}\n")
    given = read_given(["--config", str(file), "--model", "B", "--model.y=2"])
    assert given.values["model"] == {"class_path": "B", "init_args": {"y": "2"}, INHERITED: {"x": 1}}
    assert given.source("model.class_path") == COMMAND_LINE


@pytest.mark.parametrize("name", ["callbacks", "callbacks+"])
def test_lists_are_replaced_or_extended(name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("trainer: {callbacks: [1]}\n")
    second.write_text(f"trainer: {{{name}: [2]}}\n")
    callbacks = read_given(["--config", str(first), "--config", str(second)]).values["trainer"]["callbacks"]
    assert callbacks == ([1, 2] if name.endswith("+") else [2])


def test_names_of_earlier_versions_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    settings = generator_settings(tmp_path)
    backbone = settings["model"]["init_args"]["backbone"]
    backbone["init_args"]["recompute"] = True
    settings["model"]["init_args"]["mask_schedule"] = "discrete_lit.processes.schedules.ArccosSchedule"
    settings["trainer"]["callbacks"] = [{"class_path": "TrainingAlarm"}]
    file = write_settings(tmp_path / "old.yaml", settings)
    with pytest.raises(SystemExit):
        run("fit", "--config", file, "--print_config")
    whole = yaml.safe_load(capsys.readouterr().out)
    assert whole["trainer"]["callbacks"][0]["class_path"] == "discrete_lit.callbacks.TrainingGuard"
    printed = whole["model"]["init_args"]
    assert printed["mask_schedule"]["class_path"].rpartition(".")[2] == "ArccosSchedule"
    assert printed["mask_schedule"]["class_path"].startswith("discrete_lit.diffusion")
    assert printed["backbone"]["init_args"]["activation_checkpointing"] is True
    assert "recompute is now activation_checkpointing" in caplog.text
    # A name without its package is no old name.
    assert not list(renames("InceptionV3", "discrete_lit.metrics.InceptionV3"))


@pytest.mark.parametrize("name", ["ConvAutoencoder", "ViTAutoencoder", "TiTokAutoencoder", "PatchGAN"])
def test_the_channels_of_a_network_had_another_name(name: str) -> None:
    old = {"class_path": f"discrete_lit.tokenizers.{name}", "init_args": {"in_channels": 1}}
    assert current_names(old)["init_args"] == {"image_channels": 1}
