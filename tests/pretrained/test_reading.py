"""Published files: what is read, what is refused, and that nothing in them is executed."""

import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from discrete_lit.pretrained.reading import Averages, read_state

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[name], value) for name, value in STATE.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(zipped: bool, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert same(read_state(tmp_path / "w.pt"))


def test_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    assert same(read_state(tmp_path / "w.safetensors"))


def test_wrappers_in_the_order_of_preference(tmp_path: Path) -> None:
    torch.save({"model": {"b": torch.zeros(1)}, "ema": STATE, "steps": 3}, tmp_path / "w.pt")
    assert same(read_state(tmp_path / "w.pt", ("ema", "model")))
    assert set(read_state(tmp_path / "w.pt", ("model", "ema"))) == {"b"}
    with pytest.raises(ValueError, match=r"directly nor under state_dict: it holds model, ema, steps"):
        read_state(tmp_path / "w.pt", ("state_dict",))


def test_a_mapping_within_a_mapping(tmp_path: Path) -> None:
    torch.save({"trainer": {"generator": STATE, "optimizer": {}}, "epoch": 3}, tmp_path / "w.pt")
    assert same(read_state(tmp_path / "w.pt", ("trainer.generator",)))
    with pytest.raises(ValueError, match=r"nor under trainer.other: it holds trainer, epoch"):
        read_state(tmp_path / "w.pt", ("trainer.other",))


def test_prefixes_that_every_name_has(tmp_path: Path) -> None:
    save_file({f"module._orig_mod.module.{name}": value for name, value in STATE.items()}, tmp_path / "w.safetensors")
    assert same(read_state(tmp_path / "w.safetensors", prefixes=("_orig_mod.", "module.")))
    save_file({"module.a": torch.zeros(1), "b": torch.ones(1)}, tmp_path / "w.safetensors")
    assert set(read_state(tmp_path / "w.safetensors", prefixes=("module.",))) == {"module.a", "b"}


AVERAGES = Averages("ema.shadow", ("*.steps",))


def test_averages_without_names(tmp_path: Path) -> None:
    """They take the names of the parameters in their order; buffers have none."""
    own = {"a": torch.zeros(2), "b.steps": torch.ones(2), "c": torch.zeros(2)}
    averaged = [torch.full((2,), 2.0), torch.full((2,), 3.0)]
    torch.save({"model": own, "ema": {"decay": 0.99, "shadow": averaged}}, tmp_path / "w.pt")
    found = read_state(tmp_path / "w.pt", ("model",), (), AVERAGES)
    assert {name: value.tolist() for name, value in found.items()} == {"a": [2, 2], "b.steps": [1, 1], "c": [3, 3]}
    assert not read_state(tmp_path / "w.pt", ("model",))["c"].any()
    torch.save({"model": own}, tmp_path / "w.pt")
    assert not read_state(tmp_path / "w.pt", ("model",), (), AVERAGES)["c"].any()


def test_averages_of_other_parameters(tmp_path: Path) -> None:
    own = {"a": torch.zeros(2), "b.steps": torch.ones(2), "c": torch.zeros(3)}
    torch.save({"model": own, "ema": {"shadow": [torch.ones(2), torch.ones(2)]}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"2 averaged weights at ema.shadow for 2 parameters; .* differs is at 'c'"):
        read_state(tmp_path / "w.pt", ("model",), (), AVERAGES)
    torch.save({"model": own, "ema": {"shadow": [torch.ones(2)]}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"1 averaged weights at ema.shadow for 2 parameters$"):
        read_state(tmp_path / "w.pt", ("model",), (), AVERAGES)


# Modules of objects beside the weights.
GONE = ("pytorch_lightning", "omegaconf", "transformers")


@pytest.fixture
def trainers_objects(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Lightning checkpoints of 2020 to 2022 hold beside the weights, of modules that are gone when it is read."""
    made: dict[str, Any] = {}
    for module_name, class_name, base in (
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint", object),
        ("pytorch_lightning.utilities.parsing", "AttributeDict", dict),
        ("omegaconf.dictconfig", "DictConfig", object),
        ("transformers.models.gpt2.tokenization_gpt2_fast", "GPT2TokenizerFast", object),
    ):
        parts = module_name.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        kind = type(class_name, (base,), {"__module__": module_name})
        setattr(sys.modules[module_name], class_name, kind)
        made[class_name] = kind
    config = made["DictConfig"]()
    config.content = {"lr": 1.0}
    return {
        "callbacks": {made["ModelCheckpoint"]: {"best_model_score": torch.ones(1), "best_model_path": "x.ckpt"}},
        "hyper_parameters": made["AttributeDict"](config=config, folder=Path("runs"), text=made["GPT2TokenizerFast"]()),
    }


def test_what_trainers_left_is_not_read(
    trainers_objects: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numpy = pytest.importorskip("numpy")
    extra = {"best": numpy.float64(0.5), "epoch": 3, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}]}
    torch.save({"state_dict": STATE, **trainers_objects, **extra}, tmp_path / "last.ckpt")
    for name in [name for name in sys.modules if name.startswith(GONE)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])  # nothing could be imported
    assert same(read_state(tmp_path / "last.ckpt", ("state_dict",)))
    assert not [name for name in sys.modules if name.startswith(GONE)]


class Trap:
    def __init__(self, function: Any) -> None:
        self.function = function

    def __reduce__(self) -> Any:
        return self.function, ("executed",)


def write_pickle(value: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("write", [torch.save, write_pickle])
@pytest.mark.parametrize("function", [Path.touch, open, print, torch.load])
def test_pickled_code_is_refused_and_does_not_run(
    function: Any, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("executed").write_text("")
    write({"state_dict": STATE, "trap": Trap(function)}, tmp_path / "trap.ckpt")
    Path("executed").unlink()
    message = "holds pickled code" if write is torch.save else "cannot be read: it is truncated, or holds more than"
    with pytest.raises(ValueError, match=message):
        read_state("trap.ckpt", ("state_dict",))
    assert not Path("executed").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_truncated_file(name: str, share: float, tmp_path: Path) -> None:
    state = {"a": torch.zeros(3000)}
    torch.save(state, tmp_path / "w.pt")
    save_file(state, tmp_path / "w.safetensors")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=rf"{name}' is truncated"):
        read_state(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_a_file_of_something_else(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pt' cannot be read"):
        read_state(tmp_path / "w.pt")


def test_a_missing_file() -> None:
    with pytest.raises(ValueError, match=r"no weights at 'nowhere\.pt'"):
        read_state("nowhere.pt")


@pytest.mark.parametrize(("content", "message"), [([1, 2], "holds a list"), ({}, "it is empty")])
def test_a_file_without_tensors(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        read_state(tmp_path / "w.pt")
