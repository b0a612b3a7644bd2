"""Checkpoints made to do harm, and damaged ones: each is refused in one message, and nothing in it runs.

What would show it is a file, `canary`: every hostile case would write it, by a shell command, by being imported from
the current folder (which is on the path here), or by being unpickled.
"""

import copy
import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_runs import TOKENIZER, generator_settings, run, write_settings
from PIL import Image

from discrete_lit.checkpoints import instantiate, load, read_checkpoint, save
from discrete_lit.cli.train import RunFolder
from discrete_lit.core.trust import trusting
from discrete_lit.pretrained.reading import read_state
from discrete_lit.tokenizers import FSQ, from_checkpoint

SHELL = {"class_path": "os.system", "init_args": {"command": "touch canary"}}
MODULE = """
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from types import ModuleType
from typing import Any

from discrete_lit.tokenizers.networks import Autoencoder

import discrete_lit.tokenizers
from torch import nn

Path("canary").touch()


def run(*arguments, **named):
    Path("canary").touch()


class Mine(discrete_lit.tokenizers.FSQ):
    pass


class Open(discrete_lit.tokenizers.FSQ):
    def __init__(self, network: Callable[[int, int], Autoencoder], kind: type | None = None,
                 call: Callable | None = None, module: ModuleType | None = None, untyped=None, **others: Any) -> None:
        super().__init__(network, levels=[4, 3], **others)
        if call is not None:
            call("touch canary")


class Anything(nn.Module):
    def __init__(self, *sizes: int, inner=None) -> None:
        super().__init__()
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of a tokenizer and of a generator on it."""
    folder = tmp_path_factory.mktemp("files")
    save(instantiate(copy.deepcopy(TOKENIZER["model"])), folder / "tokenizer.ckpt")
    save(instantiate(generator_settings(folder / "tokenizer.ckpt")["model"]), folder / "generator.ckpt")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The current folder, on the path, with a module that leaves a trace; none was left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hostile_module.py").write_text(MODULE)
    yield tmp_path
    trusted = sys.modules.pop("hostile_module", None)
    for name in ("own", "own_data"):
        sys.modules.pop(name, None)
    assert trusted is not None or not (tmp_path / "canary").exists(), "code of the file was executed"


# What a checkpoint has that a run can go on from.
OF_A_RUN: dict[str, Any] = {"loops": {}, "lr_schedulers": [], "optimizer_states": []}


def changed(file: Path, *path: str, value: Any) -> Path:
    """A copy of a checkpoint, in the current folder, with another value at a path of keys."""
    contents = torch.load(file, weights_only=True)
    inside = contents
    for name in path[:-1]:
        inside = inside[name]
    inside[path[-1]] = value
    torch.save({**OF_A_RUN, **contents}, "hostile.ckpt")
    return Path("hostile.ckpt")


def refused(file: Path, *words: str) -> str:
    """The message, a line or two, with which `load` refuses a file."""
    with pytest.raises(ValueError) as raised:
        load(file)
    message = str(raised.value)
    assert len(message) < 700 and message.count("\n") <= 1, message
    assert all(letter.isprintable() or letter == "\n" for letter in message)
    assert file.name in message
    for word in words:
        assert word in message
    return message


def argument(name: str) -> tuple[str, ...]:
    return ("hyper_parameters", "init_args", name)


LAMBDA = {"class_path": "torchvision.transforms.Lambda", "init_args": {"lambd": SHELL}}
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": "touch canary", "shell": True}}
INSIDE = {"class_path": "torch.optim.AdamW", "init_args": {"lr": [{"deep": POPEN}]}}
NO_PART, NOT_TRUSTED = "which a checkpoint may not build: it is no part of a model", "--trust"
CONFIGURATIONS: dict[str, tuple[str, Any, str]] = {
    "a function as the network": ("network", SHELL, NO_PART),
    "a function as the optimizer": ("optimizer", SHELL, NO_PART),
    "a function as the schedule": ("scheduler", SHELL, NO_PART),
    "a function by its name alone": ("network", "os.system", "may not build"),
    "a function with dict_kwargs": (
        "network",
        {"class_path": "os.system", "dict_kwargs": {"command": "touch canary"}},
        NO_PART,
    ),
    "dict_kwargs of a class": (
        "optimizer",
        {"class_path": "torch.optim.AdamW", "dict_kwargs": {"lr": SHELL}},
        "use init_args",
    ),
    "a function through a module of ours": (
        "network",
        {"class_path": "discrete_lit.tokenizers.titok.torch.hub.load", "init_args": {}},
        "which is not there",
    ),
    "a module of another's through ours": ("network", "discrete_lit.core.files.os.system", "may not build"),
    "a function of ours": ("network", {"class_path": "discrete_lit.tokenizers.tokenizer.load"}, "is no class"),
    "a class of ours that runs commands": (
        "optimizer",
        {"class_path": "discrete_lit.cli.train.TrainingCLI", "init_args": {"command": "fit", "arguments": []}},
        NO_PART,
    ),
    "a class of another's through ours": (
        "network",
        {"class_path": "discrete_lit.tokenizers.networks.network.nn.Module"},
        "which is not there",
    ),
    "the module that is the command": ("network", {"class_path": "discrete_lit.__main__.Main"}, NO_PART),
    "a function of an optimizer's module": ("optimizer", {"class_path": "torch.optim.adamw.adamw"}, "is no class"),
    "a class that PyTorch's optimizers use": ("optimizer", {"class_path": "torch.optim.optimizer.Tensor"}, "torch"),
    "a module of the current folder": ("network", {"class_path": "hostile_module.Mine"}, "--trust hostile_module"),
    "a module of the current folder by its name alone": ("network", "hostile_module.run", "--trust hostile_module"),
    "a class without a package": (
        "optimizer",
        {"class_path": "AdamW", "init_args": {"lr": 1}},
        "not a full class path",
    ),
    "a class path that is no text": ("optimizer", {"class_path": ["os.system"]}, "is a list"),
    "a function in place of a number": (
        "scheduler",
        {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": SHELL}},
        NO_PART,
    ),
    "a schedule that calls a function": (
        "scheduler",
        {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "os._exit"}},
        "needs a function",
    ),
    "a schedule that calls an object": (
        "scheduler",
        {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": LAMBDA}},
        "may not",
    ),
    "a function where a class calls another": (
        "scheduler",
        {
            "class_path": "torch.optim.lr_scheduler.CyclicLR",
            "init_args": {"base_lr": 0, "max_lr": 1, "scale_fn": "os.abort"},
        },
        "may not build",
    ),
    "deep inside": ("optimizer", INSIDE, NO_PART),
    "a text that is YAML": ("network", "{class_path: os.system, init_args: {command: touch canary}}", "in a string"),
    "a text that is JSON": ("network", json.dumps(SHELL), "in a string"),
    "a text that hides its keys": (
        "network",
        '{"\\x63lass_path": "os.system", "init_args": {"command": "touch canary"}}',
        "may not build",
    ),
    "a file of settings": ("network", "settings.yaml", "cannot build"),
    "dotted keys": ("network.class_path", "os.system", NO_PART),
    "a tensor": ("levels", torch.zeros(2), "not plain data"),
    "keys that are no names": ("levels", {1.5: 2}, "float for a key"),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_what_a_configuration_may_not_name(case: str, files: Path) -> None:
    name, value, words = CONFIGURATIONS[case]
    write_settings(Path("settings.yaml"), SHELL)
    refused(changed(files / "tokenizer.ckpt", *argument(name), value=value), words)


def test_the_tokenizer_and_the_backbone_inside_a_generator(files: Path) -> None:
    refused(changed(files / "generator.ckpt", *argument("backbone"), value=SHELL), NO_PART)
    inside = ("tokenizer_config", "init_args", "network")
    refused(changed(files / "generator.ckpt", *inside, value=SHELL), "init_args.tokenizer.init_args.network", NO_PART)
    refused(changed(files / "generator.ckpt", "tokenizer_config", value=SHELL), NO_PART)


def doubled(times: int) -> Any:
    value: Any = [1]
    for _ in range(times):
        value = [value, value]
    return value


def contains_itself() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


STRUCTURES: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "no settings": (("hyper_parameters",), None, "does not say how to build"),
    "settings that are none": (("hyper_parameters",), [1], "holds a list as 'hyper_parameters'"),
    "arguments that are none": (("hyper_parameters", "init_args"), 3, "holds a int for the arguments"),
    "no arguments": (("hyper_parameters", "init_args"), None, "cannot build"),
    "a list in itself": (argument("levels"), contains_itself(), "describes no model"),
    "a list doubled by sharing": (argument("levels"), doubled(32), "describes no model"),
    "a depth of a hundred": (
        argument("levels"),
        json.loads("[" * 100 + "]" * 100),
        "no model",
    ),
    "sizes that no memory holds": (argument("levels"), [2**30, 2**30, 2**30], "cannot build"),
    "a width that no memory holds": (
        (*argument("network"), "init_args", "channels"),
        2**40,
        "cannot build",
    ),
    "a width of zero": ((*argument("network"), "init_args", "channels"), 0, "cannot build"),
    "kilobytes of settings": (argument("levels"), ["x" * 50] * 500, "cannot build"),
    "weights that are none": (("state_dict",), [1], "holds a list as 'state_dict'"),
    "a weight that is text": (("state_dict", "network.encoder.conv_in.bias"), "four", "is a str"),
    "a sparse weight": (
        ("state_dict", "network.encoder.conv_in.bias"),
        torch.zeros(4).to_sparse(),
        "sparse or quantized",
    ),
    "integers for fractions": (
        ("state_dict", "network.encoder.conv_in.bias"),
        torch.zeros(4, dtype=torch.int8),
        "is torch.int8 instead of torch.float32",
    ),
    "complex weights": (
        ("state_dict", "network.encoder.conv_in.bias"),
        torch.zeros(4, dtype=torch.complex64),
        "is torch.complex64",
    ),
    "weights that are not finite": (
        ("state_dict", "network.encoder.conv_in.bias"),
        torch.tensor([0, float("nan"), float("inf"), 1]),
        "network.encoder.conv_in.bias has 2 of 4",
    ),
    "keys that write on the terminal": (("state_dict", "\x1b[2J\nerror: all is well"), torch.zeros(1), "\\nerror: all"),
    "loops that are none": (("loops",), 5, "holds a int as 'loops'"),
    "a step that is none": (("global_step",), "many", "holds a str as 'global_step'"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("case", STRUCTURES)
def test_what_a_checkpoint_may_not_be(case: str, files: Path) -> None:
    path, value, words = STRUCTURES[case]
    refused(changed(files / "tokenizer.ckpt", *path, value=value), words)


def test_a_generator_whose_tokenizer_is_itself(files: Path) -> None:
    contents = torch.load(files / "generator.ckpt", weights_only=True)
    del contents["tokenizer_config"]
    reference = {"class_path": "discrete_lit.tokenizers.from_checkpoint", "init_args": {"checkpoint": "self.ckpt"}}
    contents["hyper_parameters"]["init_args"]["tokenizer"] = reference
    torch.save(contents, "self.ckpt")
    refused(Path("self.ckpt"), "names itself as a part of itself")


def test_a_run_that_goes_on_by_its_own_configuration(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the checkpoint says of its module is only compared, so it may name anything, but must be of a sane size."""
    settings = write_settings(Path("settings.yaml"), TOKENIZER)
    changed(files / "tokenizer.ckpt", *argument("levels"), value=doubled(32))
    with pytest.raises(SystemExit):
        run("fit", "--config", settings, "--run_dir=run", "--ckpt_path=hostile.ckpt")
    assert "it describes no model" in capsys.readouterr().err


def test_precisions_are_converted(files: Path) -> None:
    weights = torch.load(files / "tokenizer.ckpt", weights_only=True)["state_dict"]
    halved = {name: value.bfloat16() if value.is_floating_point() else value for name, value in weights.items()}
    assert isinstance(load(changed(files / "tokenizer.ckpt", "state_dict", value=halved)), FSQ)


RECONSTRUCTIONS = "--reconstructions.mine=hostile.ckpt"
COMMANDS = {
    "sample": ("--ckpt_path", "hostile.ckpt", "--num_samples=1", "--output=out"),
    "tokenize": ("--config", "images.yaml", "--ckpt_path", "hostile.ckpt", "--output=out"),
    "measure_latents": ("--config", "images.yaml", "--ckpt_path", "hostile.ckpt"),
    "validate": ("--config", "data.yaml", "--ckpt_path", "hostile.ckpt"),
    "fit": ("--config", "data.yaml", "--ckpt_path", "hostile.ckpt"),
    "predict": ("--config", "data.yaml", "--ckpt_path", "hostile.ckpt"),
    "evaluate": ("--reference=set.npz", "--held_out=set.npz", "--output=out", "--image_size=8", RECONSTRUCTIONS),
    "sweep": ("--ckpt_path=hostile.ckpt", "--reference=set.npz", "--output=out", "--settings={temperature: [1.0]}"),
    "export": ("--ckpt_path", "hostile.ckpt", "--family=taming_vqgan", "--output=out"),
    "import": ("--weights=none.pt", "--family=maskgit", "--tokenizer=hostile.ckpt", "--output=out"),
}


@pytest.mark.parametrize("hostile", ["a function", "a module"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_reads_a_checkpoint(
    command: str, hostile: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = SHELL if hostile == "a function" else {"class_path": "hostile_module.Mine", "init_args": {"levels": [2]}}
    changed(files / "tokenizer.ckpt", *argument("network"), value=value)
    write_settings(Path("data.yaml"), {"data": TOKENIZER["data"], "trainer": TOKENIZER["trainer"]})
    np.savez("set.npz", arr_0=np.zeros((8, 8, 8, 3), np.uint8), labels=np.zeros(8, np.int64))
    (Path("images") / "class").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("images/class/0.png")
    images = {"train": "images", "image_size": 8, "batch_size": 1}
    write_settings(Path("images.yaml"), {"data": {"class_path": "discrete_lit.data.ImageFolder", "init_args": images}})
    with pytest.raises(SystemExit) as stopped:
        run(command, *COMMANDS[command])
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "hostile.ckpt" in message and "a checkpoint may not build" in message
    assert ("--trust hostile_module" in message) == (hostile == "a module")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the parser knows `os.system` too, and only warns
@pytest.mark.parametrize("function", ["os.system", "own.run"])
@pytest.mark.parametrize("slot", ["network", "optimizer", "scheduler"])
def test_a_function_in_the_users_own_configuration(
    slot: str, function: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "own.py").write_text("from pathlib import Path\ndef run(command: str): Path('canary').touch()")
    settings = copy.deepcopy(TOKENIZER)
    settings["model"]["init_args"][slot] = {**SHELL, "class_path": function}
    with pytest.raises(SystemExit):
        run("fit", "--config", write_settings(Path("settings.yaml"), settings), "--run_dir=run")
    message = capsys.readouterr().err
    assert f"model.init_args.{slot}.class_path is '{function}', a function" in message
    with pytest.raises(ValueError, match="a function"):
        instantiate(settings["model"])


@pytest.mark.parametrize("where", ["data", "trainer.logger", "trainer.plugins"])
def test_a_function_in_other_settings(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = copy.deepcopy(TOKENIZER)
    group, _, name = where.partition(".")
    settings[group] = {**settings[group], name: SHELL} if name else SHELL
    with pytest.raises(SystemExit):
        run("fit", "--config", write_settings(Path("settings.yaml"), settings), "--run_dir=run")
    message = capsys.readouterr().err
    assert where in message and "os.system" in message and "invalid signature" not in message


def test_sizes_in_the_users_own_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    settings = copy.deepcopy(TOKENIZER)
    settings["model"]["init_args"]["network"]["init_args"]["channels"] = 2**30
    with pytest.raises(SystemExit):
        run("fit", "--config", write_settings(Path("settings.yaml"), settings), "--run_dir=run")
    assert "error: the sizes in the configuration are too large to build" in capsys.readouterr().err


# Modules of the user's own


def test_a_trusted_module_is_built_and_nothing_else_of_it(files: Path) -> None:
    mine = changed(files / "tokenizer.ckpt", "hyper_parameters", "class_path", value="hostile_module.Mine")
    message = refused(mine, "--trust hostile_module", "`trust=['hostile_module']` to discrete_lit.load")
    assert "hostile_module" not in sys.modules and message.count("--trust") == 1
    module = load(mine, trust=("hostile_module",))
    assert type(module).__name__ == "Mine"
    with trusting("hostile_module"):
        assert type(from_checkpoint(str(mine))).__name__ == "Mine"
    refused(mine, "--trust hostile_module")  # trusted no longer
    for path in ("hostile_module.run", "hostile_module.Popen", "hostile_module.Path"):
        with pytest.raises(ValueError, match=r"is no class|may not build"):
            load(changed(files / "tokenizer.ckpt", *argument("optimizer"), value=path), trust=("hostile_module",))
    untyped = {"class_path": "hostile_module.Anything", "init_args": {"inner": {"class_path": "hostile_module.run"}}}
    with pytest.raises(ValueError, match="is no class"):
        load(changed(files / "tokenizer.ckpt", *argument("network"), value=untyped), trust=("hostile_module",))


@pytest.mark.parametrize(
    ("slot", "value"),
    [
        ("kind", "subprocess.Popen"),
        ("call", "os.system"),
        ("call", "hostile_module.run"),
        ("call", {"class_path": "functools.partial", "init_args": {"func": "os.system"}}),
        ("module", "hostile_module_2"),
        ("untyped", SHELL),
        ("untyped", [{"inside": [LAMBDA]}]),
        ("untyped", json.dumps(SHELL)),
    ],
)
def test_a_trusted_class_gets_plain_values(slot: str, value: Any, files: Path, here: Path) -> None:
    contents = torch.load(files / "tokenizer.ckpt", weights_only=True)
    contents["hyper_parameters"]["class_path"] = "hostile_module.Open"
    del contents["hyper_parameters"]["init_args"]["levels"]
    torch.save(contents, "open.ckpt")
    (here / "hostile_module_2.py").write_text("from pathlib import Path\nPath('second').touch()")
    assert isinstance(load("open.ckpt", trust=["hostile_module"]), FSQ)
    (here / "canary").unlink()  # of the import of the trusted module
    contents["hyper_parameters"]["init_args"][slot] = value
    torch.save(contents, "hostile.ckpt")
    with pytest.raises(ValueError, match=r"may not|is no class|in a string"):
        load("hostile.ckpt", trust=["hostile_module"])
    assert not (here / "canary").exists() and not (here / "second").exists()


def test_all_modules_that_are_missing_are_named_at_once(files: Path) -> None:
    contents = torch.load(files / "tokenizer.ckpt", weights_only=True)
    contents["hyper_parameters"]["class_path"] = "one.models.Tokenizer"
    contents["hyper_parameters"]["init_args"]["network"]["class_path"] = "two.Network"
    torch.save(contents, "mine.ckpt")
    refused(Path("mine.ckpt"), "`--trust one.models --trust two`")


@pytest.mark.parametrize("name", ["os", "subprocess", "builtins", "not a module", ""])
def test_what_cannot_be_trusted(name: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"trust=|--trust"):
        load(files / "tokenizer.ckpt", trust=(name,))
    with pytest.raises(SystemExit):
        run("sample", f"--trust={name}", "--ckpt_path", files / "tokenizer.ckpt", "--num_samples=1", "--output=out")
    assert "trust" in capsys.readouterr().err


def test_trust_where_no_checkpoint_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("shards", "--trust", "hostile_module")
    assert "reads no checkpoint" in capsys.readouterr().err


def test_the_command_finds_a_module_of_the_current_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a user does it: train a class by a YAML, resume with it, and use the checkpoint alone, with and without trust.

    The path has no current folder, as that of a console script.
    """
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(here))])
    settings = copy.deepcopy(TOKENIZER)
    settings["model"]["class_path"] = "hostile_module.Mine"
    settings["data"]["class_path"] = "own_data.Images"
    (here / "own_data.py").write_text("from helpers.synthetic_data import SyntheticImages as Images")
    file = write_settings(here / "mine.yaml", settings)
    before = list(sys.path)
    run("fit", "--config", file, "--run_dir=run")
    run("fit", "--config", file, "--run_dir=run", "--ckpt_path=last", "--trainer.max_steps=3")
    assert read_checkpoint("run/checkpoints/last.ckpt")["global_step"] == 3
    assert sys.path == before
    del sys.modules["hostile_module"]
    capsys.readouterr()
    export = ("export", "--ckpt_path=run/checkpoints/last.ckpt", "--family=taming_vqgan", "--output=out")
    with pytest.raises(SystemExit):
        run(*export)
    assert "`--trust hostile_module`" in capsys.readouterr().err and "hostile_module" not in sys.modules
    with pytest.raises(SystemExit):  # it is read, and is no tokenizer of that family
        run(*export, "--trust", "hostile_module")
    assert "a Mine with a FiniteScalarQuantizer cannot be written" in capsys.readouterr().err


# Records and pickles


def deflated(file: Path, *, names: str = "") -> Path:
    """A copy of a zip file, some records compressed."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile("packed.ckpt", "w") as new:
        for record in old.infolist():
            method = zipfile.ZIP_DEFLATED if names in record.filename else zipfile.ZIP_STORED
            new.writestr(record.filename, old.read(record), compress_type=method)
    return Path("packed.ckpt")


@pytest.mark.parametrize("names", ["", "/data/0", "data.pkl", "byteorder"])
def test_a_file_that_was_packed_again(names: str, files: Path) -> None:
    refused(deflated(files / "tokenizer.ckpt", names=names), "is compressed")
    with pytest.raises(ValueError, match="is compressed"):
        read_state("packed.ckpt", wrappers=["state_dict"])


def test_a_file_that_was_packed_again_without_compression(files: Path) -> None:
    packed = load(deflated(files / "tokenizer.ckpt", names="no record"))
    assert packed.fingerprint() == load(files / "tokenizer.ckpt").fingerprint()


def test_a_bomb_is_not_unpacked(files: Path) -> None:
    with zipfile.ZipFile(files / "tokenizer.ckpt") as old, zipfile.ZipFile("bomb.ckpt", "w") as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
        with new.open(zipfile.ZipInfo("archive/data/999"), "w") as large:
            large.write(bytes(1 << 20))
    content = Path("bomb.ckpt").read_bytes()
    # The directory, at the end, claims 4 GB for the record of 1 MB.
    cut = content.rindex(b"PK\x01\x02")
    claimed = content[:cut] + content[cut:].replace((1 << 20).to_bytes(4, "little"), (0xFFFFFFF0).to_bytes(4, "little"))
    assert claimed != content
    Path("bomb.ckpt").write_bytes(claimed)
    refused(Path("bomb.ckpt"), "does not fit into the file")


def flipped(file: Path) -> Path:
    """A copy with one bit changed in the middle of the largest record."""
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        record = max(archive.infolist(), key=lambda record: record.file_size)
    content[record.header_offset + 200 + record.file_size // 2] ^= 64
    Path("flipped.ckpt").write_bytes(content)
    return Path("flipped.ckpt")


def test_one_flipped_bit(files: Path, here: Path) -> None:
    refused(flipped(files / "tokenizer.ckpt"), "damaged record")
    with pytest.raises(ValueError, match="damaged record"):
        read_state("flipped.ckpt", wrappers=["state_dict"])
    checkpoints = here / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(files / "tokenizer.ckpt", checkpoints / "intact.ckpt")
    os.utime(checkpoints / "intact.ckpt", (1, 1))
    shutil.move("flipped.ckpt", checkpoints / "newer.ckpt")
    found = RunFolder(here / "run").newest_intact()
    assert found is not None and found[0].endswith("intact.ckpt")


def test_a_file_without_checksums_is_read(files: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.load(files / "tokenizer.ckpt", weights_only=True), "unchecked.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert isinstance(load("unchecked.ckpt"), FSQ)


class Trap:
    def __reduce__(self) -> Any:
        return (os.system, ("touch canary",))


@pytest.mark.parametrize("kind", ["empty", "text", "pickle", "legacy", "named with an escape"])
def test_what_is_no_checkpoint(kind: str, files: Path) -> None:
    file = Path("bad.ckpt")
    if kind == "legacy":
        torch.save({"state_dict": Trap()}, file, _use_new_zipfile_serialization=False)
    elif kind == "named with an escape":
        with zipfile.ZipFile(files / "tokenizer.ckpt") as old, zipfile.ZipFile(file, "w") as new:
            for record in old.infolist():
                pickled = record.filename.endswith("data.pkl")
                new.writestr(record.filename, b"c\x1b[31mos\nsystem\n." if pickled else old.read(record))
    else:
        file.write_bytes({"empty": b"", "text": b"model: FSQ\n", "pickle": pickle.dumps(Trap())}[kind])
    message = refused(file, "is not a readable checkpoint")
    assert ("empty" in message) == (kind == "empty") and "mmap" not in message


def sharded(folder: Path, **entries: Any) -> Path:
    """A sharded checkpoint as Lightning's ModelParallelStrategy writes it, in one process."""
    from torch.distributed import checkpoint as dcp

    state = {"state_dict": {"weight": torch.arange(6.0)}, "optimizer_0": {"lr": 0.1, **entries}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 3, "hyper_parameters": {}, "loops": {}, "lr_schedulers": []}, folder / "meta.pt")
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_sharded_checkpoints(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_checkpoint(sharded(here / "whole"))["global_step"] == 3

    hostile = sharded(here / "described")
    (hostile / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="which no sharded checkpoint holds"):
        read_checkpoint(hostile)
    (hostile / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_checkpoint(hostile)

    hostile = sharded(here / "of one rank")
    (hostile / "__0.metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="which no sharded checkpoint holds"):
        read_checkpoint(hostile)

    with pytest.raises(ValueError, match="not weights only"):
        read_checkpoint(sharded(here / "a value", trap=Trap()))

    cut = sharded(here / "cut")
    (shard,) = cut.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match="is truncated"):
        read_checkpoint(cut)

    # A strategy that reads no folder says so.
    with pytest.raises(SystemExit):
        settings = write_settings(here / "settings.yaml", TOKENIZER)
        run("fit", "--config", settings, "--run_dir=run", "--ckpt_path", here / "whole")
    assert "is a sharded checkpoint, a folder, which SingleDeviceStrategy does not read" in capsys.readouterr().err


def test_the_policy_on_imports_is_put_back() -> None:
    from jsonargparse._common import parsing_settings

    from discrete_lit.core.trust import only_trusted_imports

    before = dict(parsing_settings)
    with only_trusted_imports():
        assert parsing_settings["import_path_verdicts"]["*"] is False
    assert parsing_settings == before


def test_what_the_users_model_names_of_torch_opens_torch_to_no_checkpoint() -> None:
    from discrete_lit.core.trust import modules_of, named_by_user

    model = {"class_path": "own.Mine", "init_args": {"dtype": "torch.float32", "activation": "torch.nn.GELU"}}
    assert modules_of(named_by_user(model)) == ["own"]
